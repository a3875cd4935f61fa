"""Each exercise fails the tests that judge it; a right file passes them. (The suite runs all judges on right files.)"""

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import pytest
from conftest import ROOT, error

import exercises
from exercises.tasks import TASKS


class Results:
    """A plugin of pytest: the outcome of each test, and whatever failed outside of a test"""

    def __init__(self):
        self.calls, self.outside = {}, []

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.calls.setdefault(report.nodeid.partition("[")[0].removeprefix("tests/"), []).append(report.outcome)
        elif report.outcome != "passed":
            self.outside.append(report.nodeid)


def judged(name, place):
    """In a fork: check the file in `place` as `python -m exercises NAME --check` does -> exit code, results"""
    if pid := os.fork():
        os.waitpid(pid, 0)
        return json.loads((place / "results.json").read_text())
    with open(place / "output.txt", "w") as sys.stdout:
        sys.stderr, results = sys.stdout, Results()
        try:
            for module, m in list(sys.modules.items()):             # the repository's, as if none were imported yet
                file = str(getattr(m, "__file__", ""))
                if file.startswith(str(ROOT)) and "site-packages" not in file and module.partition(".")[0] not in (
                        "kernels", "exercises", "__main__"):
                    del sys.modules[module]
            code = exercises.judge_copy(name, place, results)
            (place / "results.json").write_text(json.dumps([int(code), results.calls, results.outside]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)


@pytest.mark.parametrize("name", TASKS)
def test_a_mistake_fails_its_judges(name, tmp_path, capsys):
    exercises.begin_exercise(name, tmp_path)
    assert TASKS[name].world in capsys.readouterr().out
    code, calls, outside = judged(name, tmp_path)
    assert code == 1 and not outside, (tmp_path / "output.txt").read_text()
    assert calls.keys() == {*TASKS[name].tests} and all("failed" in outcomes for outcomes in calls.values()), calls


def test_the_right_file_passes_its_judges(tmp_path):
    shutil.copy(ROOT / "lora.py", tmp_path)
    code, calls, outside = judged("lora", tmp_path)
    assert code == 0 and not outside and calls == {TASKS["lora"].tests[0]: ["passed"]}


@pytest.mark.parametrize("name", TASKS)
def test_an_exercise_breaks_one_place(name, monkeypatch):
    task, right = TASKS[name], (ROOT / TASKS[name].file).read_text("utf-8")
    assert right.count(task.old) == 1 and exercises.broken(name).replace(task.new, task.old, 1) == right
    assert all(Path(ROOT / "tests" / test.partition("::")[0]).is_file() for test in task.tests)
    monkeypatch.setitem(TASKS, name, task._replace(old="no such line"))
    assert "has changed" in error(exercises.broken, name)


def test_the_command_begins_hints_and_keeps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exercises.main([]) == 0 and len(capsys.readouterr().out.splitlines()) == len(TASKS) == 6
    assert "there is no" in error(exercises.main, ["cache", "--check"])
    assert exercises.main(["cache"]) == 0
    copy = tmp_path / "runs/exercises/cache/generate.py"
    copy.write_text("mine")
    assert exercises.main(["cache"]) == exercises.main(["cache", "--hint"]) == 0 and copy.read_text() == "mine"
    assert TASKS["cache"].hint in capsys.readouterr().out
    assert exercises.main(["--help"]) == 0 and "--check" in capsys.readouterr().out
    for wrong in (["nope"], ["cache", "lora"], ["cache", "--nope"], ["cache", "--hint", "--check"]):
        assert "usage" in error(exercises.main, wrong)
