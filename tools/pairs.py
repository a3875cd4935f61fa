"""Make preference pairs from the wrong answers of a model: chosen is the true answer, rejected the model's own.

    python -m tools.pairs runs/toy/answers_more.jsonl --out=runs/toy/pairs.jsonl [--types=count,read]

The file of answers is that of eval.py, on questions to train on (never on those that score the model). Each wrong
answer becomes one row for train_dpo.py: {"id", "image", "prompt", "chosen", "rejected"}. The last line of the output
says how many answers were right, empty, or missing.
"""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import config
from config import setting, stop
from formats.answers import answer_rows
from formats.whole import write_file


@dataclasses.dataclass
class Settings:
    out: str = setting("", "file to write, jsonl")
    types: str = setting("", "question types to keep, as count,read; empty: all")


def wrong_answers(rows, types=()):
    """Rows of a file of answers -> rows of pairs, Counter of what became of the answers"""
    out, seen = [], Counter()
    for i, row in enumerate(rows):
        if not {"question_id", "prompt", "text", "score", "answers"} <= row.keys():
            stop(f"answer {i} (counted from 0) has no prompt, score or true answers: was the file written by eval.py?")
        kind = ("other type" if types and row.get("type") not in types else "missing" if row["text"] is None else
                "not scored" if row["score"] is None else "right" if row["score"] >= 1 else
                "empty" if not row["text"].strip() else "pairs")
        seen[kind] += 1
        if kind == "pairs":
            truth = Counter(row["answers"]).most_common(1)[0][0]
            image = {"image": row["image"]} if row.get("image") else {}
            out.append({"id": row["question_id"], **image, "prompt": row["prompt"], "chosen": truth,
                        "rejected": row["text"].strip()})
    return out, seen


def main(argv):
    files = [a for a in argv if not a.startswith("--")]
    s = config.parse(Settings, [a for a in argv if a.startswith("--")], __doc__)
    if len(files) != 1 or not s.out:
        stop("usage: python -m tools.pairs ANSWERS.jsonl --out=PAIRS.jsonl [--types=count,read]")
    rows, seen = wrong_answers(answer_rows(files[0]), tuple(filter(None, s.types.split(","))))
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
