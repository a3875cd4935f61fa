"""Exercises: six files of this repository, each with one mistake. The repository's own tests are the judge.

    python -m exercises                     # the list
    python -m exercises NAME                # copies the file with its mistake to runs/exercises/NAME/, and says what
                                            # a practitioner would see
    python -m exercises NAME --check        # runs the tests that judge this exercise with your file: red or green
    python -m exercises NAME --hint         # where to look

Edit the copy alone. Nothing of the repository changes: for the tests, the copy takes the place of the original module.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from config import stop
from exercises.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent


def broken(name):
    """-> text of the file of an exercise, with its mistake"""
    task = TASKS[name]
    text = (ROOT / task.file).read_text("utf-8")
    if text.count(task.old) != 1:
        stop(f"exercise {name}: {task.file} has changed; the lines that it breaks occur {text.count(task.old)} times")
    return text.replace(task.old, task.new)


def begin_exercise(name, folder):
    """Write the file with its mistake into `folder`, and print the task. A copy that exists is kept."""
    task, file = TASKS[name], folder / TASKS[name].file
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text(broken(name), "utf-8")
    print(f"{task.title}\n\n{task.world}\n\nThe mistake is in {file}. To begin again, delete this file.\n"
          f"python -m exercises {name} --check       runs the tests\npython -m exercises {name} --hint        a hint")


def judge_copy(name, folder, *plugins):
    """Run the judging tests in this process, which has not imported the module yet -> exit code of pytest: 0 if all
    pass. plugins: of pytest, that see the results"""
    task, file = TASKS[name], folder / TASKS[name].file
    if not file.is_file():
        stop(f"there is no {file} yet: python -m exercises {name}")
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)      # each `import` finds the copy
    spec.loader.exec_module(module)
    os.environ.pop("PYTEST_ADDOPTS", None)                                       # such as several processes
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"                           # the judging tests need no plugin
    tests = [str(ROOT / "tests" / test) for test in task.tests]
    return pytest.main(["-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *tests], plugins)


def main(argv):
    if {"-h", "--help"} & {*argv}:
        print(__doc__.strip())
        return 0
    names, flags = [a for a in argv if a in TASKS], [a for a in argv if a in ("--check", "--hint")]
    if not argv:
        print(*(f"{name:10}{task.title:30}{task.file}" for name, task in TASKS.items()), sep="\n")
        return 0
    if len(names) != 1 or len(flags) > 1 or len(argv) != len(names + flags):
        stop(f"usage: python -m exercises NAME [--check | --hint], NAME one of {', '.join(TASKS)}")
    name, folder = names[0], Path("runs/exercises") / names[0]
    if not flags:
        begin_exercise(name, folder)
    elif flags == ["--hint"]:
        print(TASKS[name].hint)
    elif judge_copy(name, folder):
        print(f"red: {folder / TASKS[name].file} still has its mistake, or another one")
        return 1
    else:
        print(f"green: all tests pass. The right code and its reason: {TASKS[name].explained}")
    return 0
