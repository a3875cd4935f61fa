"""Each command of the README runs as it is written, and each file it names exists."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import traceback

import pytest
from conftest import FOREVER, ROOT
from PIL import Image

from demo import toy

TEXT = (ROOT / "README.md").read_text("utf-8")
NOTES = (ROOT / "demo/README.md").read_text("utf-8")              # more commands of the toy world
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT + NOTES, re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
# the same commands, but a few steps of training, without validation
SMALL = ["--steps=3", "--log_every=1", "--eval_every=0", "--sample_every=0", "--save_every=3"]


def run(place, command, *more):
    """Run a command of the README in `place` -> its stdout. torchrun starts as written; a Python script runs in a fork
    of this process, which has imported torch already."""
    words = [str(ROOT / w) if w.endswith(".py") else w for w in [*shlex.split(command), *more]]
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, cwd=place, capture_output=True, text=True, env=env, timeout=FOREVER)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        pid = os.fork()
        if not pid:
            os._exit(run_script(place, words[1:]))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out, err = ((place / name).read_text() for name in ("stdout.txt", "stderr.txt"))
    assert code == 0, f"{command}\n{out[-1500:]}\n{err[-1500:]}"
    return out


def run_script(place, words):
    """In a fork: FILE.py or -m MODULE, with arguments -> exit code"""
    os.chdir(place)
    with open("stdout.txt", "w") as sys.stdout, open("stderr.txt", "w") as sys.stderr:
        try:
            module, sys.argv = words[0] == "-m", words[words[0] == "-m":]
            if module:
                runpy.run_module(words[1], run_name="__main__")
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as e:
            print(e.code if isinstance(e.code, str) else "", file=sys.stderr)
            return int(bool(e.code))
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


def find_command(pattern):
    found = [c for c in COMMANDS if re.search(pattern, c)]
    assert found, f"the README has no command like {pattern!r}"
    return found[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which both stages ran, with a small toy world that the scripts take for the whole one."""
    folder = tmp_path_factory.mktemp("reader")
    toy.write_world(folder / "runs/toy", "all", align=40, sft=40, val_align=4, val_sft=4, test=6)
    for name, scenes in toy.SCENES.items():
        (folder / "runs/toy" / f".{name}").write_text(json.dumps(dict(scenes=scenes, seed=0, version=toy.VERSION)))
    assert "step 3/3" in run(folder, "torchrun train_align.py", *SMALL)
    run(folder, find_command(r"^torchrun train_sft\.py$").replace("torchrun", "python"), *SMALL)
    return folder


def test_the_first_two_commands_install_and_run():
    first, second = (c for c in COMMANDS if c.startswith("python3 -m venv"))
    assert first.endswith("torchrun train_align.py") and "-r requirements.txt" in first
    assert second.endswith("python -m pytest -q tests") and "-r requirements-test.txt" in second
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text()
    assert "python -m pytest -q tests" in (ROOT / ".ci/run").read_text()


def test_the_commands_of_the_toy_world_run(place):
    run(place, find_command(r"train_sft\.py --lora_r").replace("torchrun", "python"), *SMALL)
    assert (place / "runs/lora/adapter/adapter_model.safetensors").is_file()
    for control in ("seeing", "blind", "shuffled"):
        command = find_command(rf"eval\.py --model=runs/sft{'$' if control == 'seeing' else f' --{control}'}")
        score = json.loads(run(place, command).splitlines()[-1])
        assert score["how"] == control and score["task"] == "exact" and score["n"] > 20
        assert 0 <= score["accuracy"] <= 1 and score["types"]
    assert run(place, find_command(r"sample\.py .*--prompt")).strip()
    for tool in (r"tools\.report", r"tools\.plot", r"demo/sheet\.py"):
        run(place, find_command(tool))
    assert (place / "runs/sft/answers_seeing.html").is_file()
    scores = json.loads(run(place, find_command(r"demo/captions\.py .*runs/align")).splitlines()[-1])
    assert scores["n"] == 6 and scores["f1"].keys() == scores["f1_shuffled"].keys()


def test_own_data_trains_the_given_answer(place):
    block = next(b for b in BLOCKS if "mine.json" in b)
    rows = re.search(r"cat > mine.json <<'JSON'\n(.*?)\nJSON", block, re.S)[1]
    (place / "mine.json").write_text(rows)
    (place / "photos").mkdir(exist_ok=True)
    for row in json.loads(rows):
        Image.new("RGB", (30, 20), "red").save(place / "photos" / row["image"])
    assert f"{len(json.loads(rows))} good" in run(place, find_command(r"^python data\.py mine\.json"))
    assert "step 40/40" in run(place, find_command(r"train_sft\.py .*--data=mine\.json").replace("torchrun", "python"))
    command, answer = re.search(r"`(python sample\.py .*?)` then prints `(.*?)`", TEXT).groups()
    assert run(place, command).strip() == answer == json.loads(rows)[0]["conversations"][1]["value"]


def test_the_python_lines_run(place):
    code, = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(code.splitlines()) <= 5
    (place / "ask.py").write_text(code)
    assert len(run(place, f"python {place}/ask.py").splitlines()) == code.count("print(")


def test_a_recipe_is_read(place):
    command = find_command(r"^torchrun train_sft\.py recipes/llava15\.py .*").replace("FILE", "runs/toy/sft.json")
    plan = run(place, command.replace("torchrun", "python").replace("DIR", "runs/toy/images"), "--dry_run")
    assert "of 128 samples" in plan and "lr 2e-05: " in plan and "supervised" in plan


def test_the_demo_runs_the_readme_commands():
    lines = [line.split("#")[0].split("||")[0].strip() for line in (ROOT / "demo/run.sh").read_text().splitlines()]
    commands = [line.replace("$run ", "torchrun ").replace("$python ", "python ").removesuffix(' "$@"')
                for line in lines if line.startswith(("$run ", "$python "))]
    assert len(commands) > 7 and {*commands} <= {*COMMANDS, "torchrun train_align.py"}
    assert subprocess.run(["bash", "-n", ROOT / "demo/run.sh"]).returncode == 0


def test_launch_lines_name_existing_scripts_and_settings():
    import train_align
    import train_sft
    known = {f for s in (train_align, train_sft) for f in s.Settings.__dataclass_fields__}
    for word in " ".join(c for c in COMMANDS if "train_" in c).split():
        if word.endswith(".py"):
            assert (ROOT / word).is_file(), word
        if m := re.match(r"--(\w+)=", word):
            assert m[1] in known | {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}, word


@pytest.mark.parametrize("page", ["README.md", "docs/formats.md", "docs/training.md", "docs/evaluation.md",
                                  "docs/serving.md", "docs/teaching.md", "docs/data.md", "demo/README.md",
                                  "demo/RECORDS.md", "bench/README.md"])
def test_named_files_exist(page):
    text, folder = (ROOT / page).read_text("utf-8"), (ROOT / page).parent
    names = re.findall(r"`([\w/.-]+\.(?:py|sh|md|txt))`", text) + re.findall(r"\]\(([\w/.-]+)\)", text)
    for name in names:
        assert (ROOT / name).exists() or (folder / name).exists(), name


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) <= 110
    for row in (line for line in TEXT.splitlines() if line.startswith("|")):
        cells = row.strip("|").split("|")
        assert len(cells) <= 4 and all(len(cell.split()) <= 20 for cell in cells), row
