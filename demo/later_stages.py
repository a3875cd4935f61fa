"""Preferences and rewards on the toy world, after a stage 2 that is cut short: what DPO, KTO and GRPO change there.

    python -m demo.later_stages                        # run what demo/later_stages.jsonl lacks (an hour), and print
    python -m demo.later_stages --only=base,grpo_0     # some of it
    python -m demo.later_stages --show                 # print the tables alone

    base         one pass over captions, one over conversations: it counts and reads worse than a finished model
    sft_more     stage 2 goes on, with questions about new scenes and their true answers
    grpo_SEED    answers to the same questions are drawn, and rewarded if they are right; grpo_on goes on from grpo_0
    dpo, kto     pairs of its own wrong answers to these questions (tools/pairs.py); dpo_NUMBER: another beta
    dpo_sft      DPO with an SFT term; sft_chosen: the SFT term alone, because a beta of 1e-9 leaves no DPO
    hacked       the reward counts words, and nothing else

A row of demo/later_stages.jsonl is one run: scores on the held-out questions, the first answer of each type, and what
its log says. yes is the share of "yes" among the answers to yes/no questions (POPE's yes ratio, which counts an answer
without "no" as "yes"); neither is the share of answers that are neither of both words. docs/training.md has these
numbers; tools/draw_later_stages.py draws the rewards.
"""

import dataclasses
import datetime
import json
import subprocess
import sys
from pathlib import Path

import config
from config import setting
from demo.questions import write_questions
from demo.systems import ONE, command, measured
from metrics.yes_no import pope
from run.arguments import parse

OUT, TOY = Path("runs/later"), Path("runs/toy")
KINDS = "count", "read"                  # questions to train on; of the other types, which are right, a tenth
KEYS = "reward", "equal_groups", "answer_tokens", "margin", "accuracy", "kl", "chosen", "rejected"   # of log.jsonl
FROM = [f"--init={OUT}/base", "--save_every=0", "--eval_every=0"]
SFT = ["train_sft.py", *FROM, f"--data={OUT}/conversations.jsonl", f"--images={TOY}/images", "--system=",
       "--batch_size=32", "--steps=200", "--lr=1e-3", "--sample_every=0"]
DPO = ["train_dpo.py", *FROM, f"--data={OUT}/pairs.jsonl", f"--images={TOY}/images", "--system=", "--lr=2e-4",
       "--epochs=1", "--log_every=5", "--sample_every=0"]
GRPO = ["train_grpo.py", *FROM, f"--data={OUT}/questions.jsonl", "--batch_size=32", "--log_every=1",
        "--sample_every=25"]
EXACT = [*GRPO, "--lr=4e-4", "--steps=200", "--max_new_tokens=4"]

# arm: what trains it, from the base
ARMS = {"base": [], "sft_more": SFT, **{f"sft_more_{seed}": [*SFT, f"--seed={seed}"] for seed in (1, 2)},
        "sft_on": [*SFT, "--seed=3", f"--init={OUT}/sft_more"],
        **{f"grpo_{seed}": [*EXACT, f"--seed={seed}"] for seed in range(3)},
        "grpo_on": [*EXACT, "--seed=3", f"--init={OUT}/grpo_0"],
        "grpo_on_1": [*EXACT, "--seed=4", f"--init={OUT}/grpo_1"],
        "grpo_on_2": [*EXACT, "--seed=5", f"--init={OUT}/grpo_2"],
        "dpo": DPO, "dpo_1e-4": [*DPO, "--beta=1e-4"], "dpo_1e-9": [*DPO, "--beta=1e-9"],
        "dpo_sft": [*DPO, "--sft=1"], "sft_chosen": [*DPO, "--sft=1", "--beta=1e-9"], "kto": [*DPO, "--loss=kto"],
        **{f"dpo_seed_{seed}": [*DPO, f"--seed={seed}"] for seed in (1, 2)},
        "ipo": [*DPO, "--loss=ipo", "--length_norm"],
        "simpo": [*DPO, "--loss=simpo", "--beta=2"], "orpo": [*DPO, "--loss=orpo"],
        "hacked": [*GRPO, "--lr=3e-4", "--steps=60", "--max_new_tokens=16", "--reward=length"]}


@dataclasses.dataclass
class Settings:
    only: str = setting("", "arms to run, separated by commas; empty: all")
    rows: str = setting("demo/later_stages.jsonl", "measured runs; new ones are appended")
    show: bool = setting(False, "print the tables and run nothing")


def as_conversation(q):
    """A question with its true answer -> row for train_sft.py"""
    turns = [{"from": "human", "value": f"<image>\n{q['text']}"}, {"from": "gpt", "value": q["answer"]}]
    return {"id": q["question_id"], "image": q["image"], "conversations": turns}


def make_base():
    """Train the base, ask it about new scenes, and make pairs of its wrong answers"""
    if not (OUT / "base/model").exists():
        command("train_align.py", *ONE, f"--out={OUT}/align")
        command("train_sft.py", *ONE, f"--init={OUT}/align", f"--out={OUT}/base")
    if not (OUT / "pairs.jsonl").exists():
        write_questions(TOY, 3000)
        rows = [json.loads(line) for line in (TOY / "questions_more.jsonl").open()]
        rows = [q for q in rows if q["type"] in KINDS or int(q["question_id"].split("_")[1]) % 10 == 0]
        (OUT / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in rows))
        (OUT / "conversations.jsonl").write_text("".join(json.dumps(as_conversation(q)) + "\n" for q in rows))
        command("eval.py", f"--model={OUT}/base", f"--data={OUT}/questions.jsonl", f"--images={TOY}/images",
                f"--answers={OUT}/answers.jsonl")
        command("-m", "tools.pairs", f"{OUT}/answers.jsonl", f"--out={OUT}/pairs.jsonl", "--types=count,read",
                "--right=1")


def measure(arm):
    """Train an arm and ask it the held-out questions -> row for demo/later_stages.jsonl"""
    lines, cpu = command(*ARMS[arm], f"--out={OUT}/{arm}") if ARMS[arm] else ([], 0.0)
    against = [f"--against={OUT}/base/answers_seeing.jsonl"] if ARMS[arm] else []
    scores = json.loads(command("eval.py", f"--model={OUT}/{arm}", *against)[0][-1])
    asked = [json.loads(row) for row in (OUT / arm / "answers_seeing.jsonl").open()]
    yes_no = [row for row in asked if row["type"] == "exists"]
    log = [json.loads(row) for row in (OUT / arm / "log.jsonl").open()] if ARMS[arm] else []
    said = {row["type"]: [row["prompt"].split("\n")[0], row["text"], row["answers"][0]] for row in reversed(asked)}
    keys = [k for k in KEYS if log and k in log[-1]]
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"arm": arm, "accuracy": scores["accuracy"], "types": scores["types"], "n": scores["n"],
            "yes": pope([r["text"] for r in yes_no], [r["answers"][0] for r in yes_no])["yes_ratio"],
            "neither": sum(r["text"] not in ("yes", "no") for r in yes_no) / len(yes_no),
            "log": {k: [round(row[k], 4) for row in log if row.get(k) is not None] for k in keys},
            "generate_s": round(sum(row.get("generate_s", 0) for row in log), 1),
            "said": said, "against": scores.get("against"), "command": " ".join(ARMS[arm]), "cpu_s": round(cpu),
            "date": datetime.date.today().isoformat(), "revision": revision}


def table(rows):
    """-> lines of a Markdown table"""
    kinds = sorted(rows[0]["types"]) if rows else []
    out = [f"| arm | all | {' | '.join(kinds)} | yes | first and last value of the log |",
           "|---|--:|" + "--:|" * (len(kinds) + 1) + "---|"]
    for row in rows:
        log = {k: [v[0], v[-1]] for k, v in row["log"].items() if v}
        out.append(f"| {row['arm']} | {100 * row['accuracy']:.1f} | "
                   + " | ".join(f"{100 * row['types'][k]:.0f}" for k in kinds) + f" | {100 * row['yes']:.0f} | "
                   + ", ".join(f"{k} {a:.2f} to {b:.2f}" for k, (a, b) in log.items()) + " |")
    return out


def main(s):
    wanted = s.only.split(",") if s.only else list(ARMS)
    if unknown := [arm for arm in wanted if arm not in ARMS]:
        config.stop(f"only={unknown[0]}: {', '.join(ARMS)}")
    for arm in [] if s.show else wanted:
        if arm not in {row["arm"] for row in measured(s.rows)}:
            make_base()
            row = measure(arm)
            with open(s.rows, "a") as f:
                f.write(json.dumps(row) + "\n")
            print(row["arm"], row["accuracy"], file=sys.stderr, flush=True)
    print(*table(measured(s.rows)), sep="\n")


if __name__ == "__main__":
    with config.one_line_errors():
        main(parse(Settings, sys.argv[1:], __doc__))
