"""All systems on the toy world, with equal data and equal steps: one pass over the captions, one over the conversations.

    python -m demo.systems                                  # run what is missing in demo/systems.jsonl (hours), and print
    python -m demo.systems --only=llava15,fuyu --seeds=1    # some of it
    python -m demo.systems --show                           # print the tables alone

A row of demo/systems.jsonl is one run of one arm with one seed: both stages, held-out questions, and the same questions
with image features set to zero (blind). An arm is a system, or a system with one change. FINDINGS compares arms: each is
a claim of a paper, and the measurement that can refute it here. A difference counts if it is larger than twice the
pooled standard deviation over the seeds.
"""

import dataclasses
import datetime
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import config
from config import setting
from generate import Chat

SYSTEMS = {"llava15": "LLaVA-1.5", "llava": "LLaVA v1", "pali3": "PaLI-3, an analogue", "paligemma": "PaliGemma",
           "internvl15": "InternVL 1.5", "fuyu": "Fuyu", "mm1": "MM1", "blip2": "BLIP-2", "instructblip": "InstructBLIP",
           "qwen_vl": "Qwen-VL", "flamingo": "Flamingo", "comm": "COMM", "visualchat": "DeepSpeed-VisualChat"}


@dataclasses.dataclass
class Settings:
    only: str = setting("", "arms to run, separated by commas; empty: all")
    seeds: int = setting(3, "seeds 0, 1, ...", 1)
    rows: str = setting("demo/systems.jsonl", "measured runs; new ones are appended")
    out: str = setting("runs/systems", "folder of the runs")
    show: bool = setting(False, "print the tables and run nothing")


ONE = ["--data=toy", "--epochs=1", "--eval_every=0", "--sample_every=0", "--save_every=0"]

# arm: (system, changed settings of stage 1, changed settings of stage 2)
ARMS = {name: (name, [], []) for name in SYSTEMS}


def command(*args):
    """Run a script of the repository -> its output as lines, CPU seconds of user and system together"""
    def used():
        u = resource.getrusage(resource.RUSAGE_CHILDREN)
        return u.ru_utime + u.ru_stime

    before = used()
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True)
    if done.returncode:
        config.stop(f"{' '.join(args)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout.splitlines(), used() - before


def plan_numbers(lines):
    """Read the plan that a training script prints -> trained parameters, steps"""
    together = next(line.split() for line in lines if line.startswith("  together"))
    steps = next(line.split()[0] for line in lines if " steps of " in line)
    return int(together[1].replace(",", "")), int(steps)


def measure(s, arm, seed):
    """Run both stages of an arm, and its questions -> row for demo/systems.jsonl"""
    system, first, second = ARMS[arm]
    recipe = [] if system == "llava15" else [f"recipes/{system}.py"]
    align, sft = (f"{s.out}/{arm}_{seed}/{stage}" for stage in ("align", "sft"))
    common = [*ONE, f"--seed={seed}"]
    lines1, cpu1 = command("train_align.py", *recipe, *common, f"--out={align}", *first)
    lines2, cpu2 = command("train_sft.py", *recipe, *common, f"--init={align}", f"--out={sft}", *second)
    (trained1, steps1), (trained2, steps2) = plan_numbers(lines1), plan_numbers(lines2)
    seeing, blind = (json.loads(command("eval.py", f"--model={sft}", *how)[0][-1]) for how in ([], ["--blind"]))
    tokens = tokens_per_image(sft)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    shutil.rmtree(f"{s.out}/{arm}_{seed}")
    return {"arm": arm, "seed": seed, "seeing": seeing["accuracy"], "blind": blind["accuracy"], "types": seeing["types"],
            "n": seeing["n"], "tokens": tokens, "trained": [trained1, trained2], "steps": [steps1, steps2],
            "cpu_s": round(cpu1 + cpu2), "date": datetime.date.today().isoformat(), "revision": revision}


def tokens_per_image(model):
    """A run of the toy world -> tokens of one image in the packed sequence, row ends included. Flamingo has one marker
    there, and its latents are keys beside the sequence: they are what counts."""
    chat = Chat(model)
    (block,) = chat.look(["runs/toy/images/test_00000.png"])[1]
    return chat.model.cfg.connector_args.get("latents", len(block))


# ---- tables ---------------------------------------------------------------------------------------------------------

def measured(file):
    """-> rows of demo/systems.jsonl. The file is read before each run: several processes may divide the arms."""
    return [json.loads(line) for line in Path(file).read_text().splitlines()] if Path(file).exists() else []


def by_arm(rows):
    """-> {arm: its rows}"""
    out = {}
    for row in rows:
        out.setdefault(row["arm"], []).append(row)
    return out


def spread(values):
    """-> mean and standard deviation as text, in percent; the deviation only of two or more values"""
    return f"{100 * fmean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def table(rows):
    """Rows of demo/systems.jsonl -> lines of a Markdown table, one line per system"""
    kinds = sorted(rows[0]["types"]) if rows else []
    out = ["| system | seeds | seeing % | blind % | " + " | ".join(kinds) + " | tokens | trained, stage 1 + 2 | CPU s |",
           "|---|--:|--:|--:|" + "--:|" * (len(kinds) + 3)]
    for arm, of in by_arm(rows).items():
        if arm in SYSTEMS:
            types = " | ".join(f"{100 * fmean(r['types'][k] for r in of):.0f}" for k in kinds)
            trained = " + ".join(f"{n / 1e6:.2f} M" for n in of[0]["trained"])
            out.append(f"| {SYSTEMS[arm]} | {len(of)} | {spread([r['seeing'] for r in of])} "
                       f"| {spread([r['blind'] for r in of])} | {types} | {of[0]['tokens']} | {trained} "
                       f"| {fmean(r['cpu_s'] for r in of):.0f} |")
    return out


def main(s):
    config.check_ranges(s)
    wanted = s.only.split(",") if s.only else list(ARMS)
    if unknown := [arm for arm in wanted if arm not in ARMS]:
        config.stop(f"only={unknown[0]}: {', '.join(ARMS)}")
    for seed in range(0 if s.show else s.seeds):
        for arm in wanted:
            if not any(r["arm"] == arm and r["seed"] == seed for r in measured(s.rows)):
                row = measure(s, arm, seed)
                with open(s.rows, "a") as f:
                    f.write(json.dumps(row) + "\n")
                print(row, file=sys.stderr, flush=True)
    print(*table(measured(s.rows)), sep="\n")


if __name__ == "__main__":
    with config.one_line_errors():
        main(config.parse(Settings, sys.argv[1:], __doc__))
