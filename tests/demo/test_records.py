"""The records of the toy world: the script clones, runs, measures and appends rows."""

import os
import subprocess

import pytest
from conftest import ROOT, error

from demo import records

TRAIN = """import json, os, sys, time
assert not os.path.exists("runs"), "each seed begins without runs/"
assert len(os.sched_getaffinity(0)) == 1
while time.process_time() < 0.7: pass
os.makedirs("runs/m")
json.dump(sys.argv[1:], open("runs/m/said", "w"))
"""
EVAL = """import json, sys
said, = json.load(open(sys.argv[1].removeprefix("--model=") + "/said"))
print(json.dumps({"accuracy": 0.3 if "--blind" in sys.argv else {"--seed=0": 0.985, "--seed=7": 0.979}[said]}))
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose training takes 0.7 CPU seconds; a file that is not committed must not be there"""
    root = tmp_path / "repository"
    root.mkdir()
    (root / "train.py").write_text(TRAIN)
    (root / "eval.py").write_text(EVAL)
    who = ["-c", "user.name=a", "-c", "user.email=a", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", root, *command], check=True)
    (root / "train.py").write_text("raise SystemExit('this change is not committed')")
    monkeypatch.setattr(records, "yardstick", lambda: 0.25)
    return root


def test_each_seed_becomes_a_row(repository, tmp_path):
    here, cores = os.getcwd(), os.sched_getaffinity(0)
    s = records.Settings(name="two", commands="train.py --seed=SEED", model="runs/m", seeds="0,7",
                         rows=str(tmp_path / "rows.md"))
    assert not records.check(s, repository), "seed 7 is below 98 %"
    assert os.getcwd() == here and os.sched_getaffinity(0) == cores
    first, second = ([cell.strip() for cell in line.strip("|\n").split("|")]
                     for line in (tmp_path / "rows.md").read_text().splitlines())
    assert first[1:3] == ["two", "0"] and first[4:8] == ["0.25", "98.5 %", "30.0 %", "yes"]
    assert second[2] == "7" and second[5:8] == ["97.9 %", "30.0 %", "no"] and second[-1] == "`train.py --seed=SEED`"
    assert 1 <= int(first[3]) <= 5 and len(first[8]) >= 7 and "torch" in first[9]
    assert records.check(records.Settings(**{**vars(s), "seeds": "0"}), repository)


def test_a_command_that_fails_leaves_no_row(repository, tmp_path):
    s = records.Settings(commands="nope.py", model="runs/m", rows=str(tmp_path / "rows.md"))
    assert "nope.py ended with 2" in error(records.check, s, repository)
    assert "cannot be cloned: is it a git repository?" in error(records.check, s, tmp_path)
    assert not (tmp_path / "rows.md").exists()
    assert "numbers with commas" in error(records.main, records.Settings(seeds="a"))


def test_the_page_ends_with_the_table():
    """A new row is appended to the file, so nothing may stand behind the table."""
    lines = (ROOT / "demo/RECORDS.md").read_text("utf-8").splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("| date |"))
    assert all(line.count("|") == lines[head].count("|") for line in lines[head:])
    assert f"at least {records.LEAST:.0%}".replace("%", " %") in " ".join(lines)
