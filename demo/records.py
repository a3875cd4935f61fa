"""Check a claimed record: CPU seconds of one core from nothing to 98 % on the held-out questions of the toy world.

    python -m demo.records                                 # the default recipe with seeds 0, 1 and 2 (half an hour)
    python -m demo.records --name="stage 2 alone" --commands="train_sft.py --init= --vision=demo/vit --llm=demo/llm \\
        --seed=SEED"                                       # a claim: commands, separated by ;

The script clones the last commit of this repository, so the clone has no runs/ and no change that is not committed. For
each seed it runs the commands on one core, adds their CPU seconds (user and system, all processes), and scores the
model with eval.py, seeing and blind. Each seed becomes a row of demo/RECORDS.md, which has the rules.
"""

import dataclasses
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import config
from config import setting
from demo.systems import command
from run.arguments import parse

ROOT = Path(__file__).resolve().parent.parent
LEAST, BLIND = 0.98, 0.35        # what every seed must reach with the images, and must not pass without them


@dataclasses.dataclass
class Settings:
    name: str = setting("default recipe", "of the record, for the table")
    commands: str = setting("train_align.py --seed=SEED; train_sft.py --seed=SEED",
                            "scripts with their settings, separated by ; SEED becomes the seed")
    model: str = setting("runs/sft", "run that the commands leave")
    seeds: str = setting("0,1,2", "a record needs all three")
    rows: str = setting("demo/RECORDS.md", "file to which rows are appended")


def yardstick():
    """-> CPU seconds of 200 products of 512 x 512 matrices on one thread: the speed of this core at this moment"""
    a, begin = torch.rand(512, 512), time.process_time()
    for _ in range(200):
        a @ a
    return time.process_time() - begin


def measure(commands, model, seed):
    """Run the commands in the current folder, a clone without runs/ -> CPU seconds, yardstick, scores seeing and blind.
    The yardstick is the mean of a measurement before and one after the commands."""
    before, seconds = yardstick(), 0.0
    for line in commands.split(";"):
        seconds += command(*shlex.split(line.replace("SEED", str(seed))))[1]
    speed = (before + yardstick()) / 2
    seeing, blind = (json.loads(command("eval.py", f"--model={model}", *how)[0][-1])["accuracy"]
                     for how in ([], ["--blind"]))
    return seconds, speed, seeing, blind


def machine():
    """-> name of the processor, versions"""
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(": ")[2] for line in facts.splitlines() if line.startswith("model name")]
    wide = ", AVX-512" if "avx512f" in facts else ""
    return f"{[*names, platform.machine()][0]}{wide}; Python {platform.python_version()}, torch {torch.__version__}"


def check(s, root):
    """Measure all seeds on a clone of the repository `root`, and append their rows -> do all reach the goal?"""
    rows, reached, here, cores = Path(s.rows).resolve(), [], os.getcwd(), os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as clone:
        if subprocess.run(["git", "clone", "--quiet", str(root), clone], stderr=subprocess.DEVNULL).returncode:
            config.stop(f"{root} cannot be cloned: is it a git repository? A record is of a commit")
        revision = subprocess.run(["git", "-C", clone, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        try:
            os.chdir(clone)
            os.sched_setaffinity(0, {max(cores)})                            # the commands inherit it
            for seed in s.seeds.split(","):
                shutil.rmtree("runs", ignore_errors=True)
                seconds, speed, seeing, blind = measure(s.commands, s.model, seed)
                reached.append(seeing >= LEAST and blind <= BLIND)
                row = [datetime.date.today().isoformat(), s.name, seed, f"{seconds:.0f}", f"{speed:.2f}",
                       f"{100 * seeing:.1f} %", f"{100 * blind:.1f} %", "yes" if reached[-1] else "no",
                       revision.stdout.strip(), machine(), f"`{s.commands}`"]
                with open(rows, "a", encoding="utf-8") as f:
                    f.write(f"| {' | '.join(row)} |\n")
                print(*row, sep=" | ", file=sys.stderr, flush=True)
        finally:
            os.chdir(here)
            os.sched_setaffinity(0, cores)
    return all(reached)


def main(s):
    if not all(seed.isdigit() for seed in s.seeds.split(",")):
        config.stop(f"seeds={s.seeds}: numbers with commas")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    goal = f"{100 * LEAST:.0f} % seeing and at most {100 * BLIND:.0f} % blind"
    print(f"{s.name}: " + ("every seed reaches" if check(s, ROOT) else "not every seed reaches") + f" {goal}")


if __name__ == "__main__":
    with config.one_line_errors():
        main(parse(Settings, sys.argv[1:], __doc__))
