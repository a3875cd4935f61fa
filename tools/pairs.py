"""Make preference pairs from the wrong answers of a model: chosen is the true answer, rejected the model's own.

    python -m tools.pairs runs/toy/answers_more.jsonl --out=runs/toy/pairs.jsonl [--types=count,read --right=3]

The file of answers is that of eval.py, on questions to train on (never on those that score the model). Each wrong
answer becomes one row for train_dpo.py: {"id", "image", "prompt", "chosen", "rejected"}. The last line of the output
says how many answers were right, empty, or missing.

Wrong answers alone teach a bias: if "1" is wrong more often than "2", the model learns to say "2". --right=3 adds three
pairs with a right answer for each wrong one; their rejected answer is a wrong answer to another question of its type.
"""

import dataclasses
import json
import random
import sys
from collections import Counter
from pathlib import Path

import config
from config import setting, stop
from formats.answers import answer_rows
from formats.whole import write_file
from run.arguments import parse


@dataclasses.dataclass
class Settings:
    out: str = setting("", "file to write, jsonl")
    types: str = setting("", "question types to keep, as count,read; empty: all")
    right: float = setting(0.0, "pairs with a right answer, for each pair with a wrong one", 0, 1000)


def answer_pairs(rows, types=(), right=0.0):
    """Rows of a file of answers -> rows of pairs, Counter of what became of the answers"""
    wrong, good, seen = [], [], Counter()
    for i, row in enumerate(rows):
        if not {"question_id", "prompt", "text", "score", "answers"} <= row.keys():
            stop(f"answer {i} (counted from 0) has no prompt, score or true answers: was the file written by eval.py?")
        kind = ("other type" if types and row.get("type") not in types else "missing" if row["text"] is None else
                "not scored" if row["score"] is None else "right" if row["score"] >= 1 else
                "empty" if not row["text"].strip() else "wrong")
        seen[kind] += 1
        if kind in ("wrong", "right"):
            (wrong if kind == "wrong" else good).append(row)
    out, draw = [one_pair(row, row["text"]) for row in wrong], random.Random(0)
    draw.shuffle(good)
    for row in good:
        others = [w["text"] for w in wrong if w.get("type") == row.get("type") and w["text"] not in row["answers"]]
        if len(out) < (1 + right) * len(wrong) and others:
            out.append(one_pair(row, draw.choice(others)))
    draw.shuffle(out)
    return out, seen | Counter(pairs=len(out))


def one_pair(row, rejected):
    truth = Counter(row["answers"]).most_common(1)[0][0]
    image = {"image": row["image"]} if row.get("image") else {}
    return {"id": row["question_id"], **image, "prompt": row["prompt"], "chosen": truth, "rejected": rejected.strip()}


def main(argv):
    files = [a for a in argv if not a.startswith("--")]
    s = parse(Settings, [a for a in argv if a.startswith("--")], __doc__)
    if len(files) != 1 or not s.out:
        stop("usage: python -m tools.pairs ANSWERS.jsonl --out=PAIRS.jsonl [--types=count,read --right=3]")
    config.check_ranges(s)
    rows, seen = answer_pairs(answer_rows(files[0]), tuple(filter(None, s.types.split(","))), s.right)
    if not rows:
        stop(f"{files[0]}: no wrong answer to make a pair of ({dict(seen)})")
    try:
        write_file(Path(s.out), "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    except OSError as e:
        stop(f"{s.out} could not be written: {e.strerror}")
    print(json.dumps({"out": s.out, **seen}))


if __name__ == "__main__":
    with config.one_line_errors():
        main(sys.argv[1:])
