"""Every command of the README runs, as it stands there; what it names exists."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FOREVER, ROOT

TEXT = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
# the same commands at a size that a test can afford: stage 1 and 2 for a few steps, and nothing drawn that is not needed
SMALL = ["--steps=3", "--log_every=1", "--eval_every=0", "--sample_every=0", "--save_every=3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to run in, with the toy world already drawn, smaller than usual."""
    import toy
    folder = tmp_path_factory.mktemp("stranger")
    toy.write(folder / "runs/toy", "all", align=40, sft=40, val_align=4, val_sft=4, test=6)
    for name in ("align", "sft", "val_align", "val_sft", "test"):     # so that the scripts take these for the whole world
        scenes = toy.SCENES[name]
        (folder / "runs/toy" / f".{name}").write_text(json.dumps(dict(scenes=scenes, seed=0, version=toy.VERSION)))
    return folder


def run(place, command, *more, code=0, stdin=""):
    """Run a command of the README from `place`, with this interpreter and our scripts."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    elif words[0] == "python":
        words[0] = sys.executable
    words = [str(ROOT / w) if w.endswith(".py") and (ROOT / w).is_file() else w for w in words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*words, *more], cwd=place, capture_output=True, text=True, env=env, input=stdin, timeout=FOREVER)
    assert done.returncode == code, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return done


def the(pattern):
    """The one command of the README that a pattern finds."""
    found = [c for c in COMMANDS if re.search(pattern, c)]
    assert found, f"the README has no command like {pattern!r}"
    return found[0]


def test_the_two_first_commands_install_from_files_that_pin_torch_and_run_the_main_job_and_the_tests():
    first, second = (c for c in COMMANDS if c.startswith("python3 -m venv"))
    assert first.endswith("torchrun train_align.py") and "-r requirements.txt" in first
    assert second.endswith("python -m pytest -q tests") and "-r requirements-test.txt" in second
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text()
    assert "python -m pytest -q tests" in (ROOT / ".ci/run").read_text()


def test_stage_one_stage_two_eval_and_sample_run_as_written(place):
    out = run(place, "torchrun train_align.py", *SMALL).stdout
    assert "step 3/3" in out and (place / "runs/align/model/model.safetensors").is_file()
    run(place, the(r"^torchrun train_sft\.py$"), *SMALL)
    run(place, the(r"train_sft\.py --lora_r"), *SMALL)
    assert (place / "runs/lora/adapter/adapter_model.safetensors").is_file()
    score = json.loads(run(place, the(r"eval\.py --model=runs/sft$")).stdout.splitlines()[-1])
    assert score["task"] == "exact" and score["n"] > 20 and 0 <= score["accuracy"] <= 1 and score["types"]
    for control in ("blind", "shuffled"):
        score = json.loads(run(place, the(rf"eval\.py --model=runs/sft --{control}")).stdout.splitlines()[-1])
        assert score["how"] == control
    said = run(place, the(r"sample\.py .*--prompt")).stdout
    assert said.strip()
    run(place, the(r"plot\.py"))
    run(place, the(r"demo/sheet\.py"))
    scores = json.loads(run(place, the(r"demo/captions\.py .*runs/align")).stdout.splitlines()[-1])
    assert scores["n"] == 6 and scores["f1"].keys() == scores["f1_shuffled"].keys()


def test_own_data_in_five_lines_runs_as_written(place):
    from PIL import Image
    block = next(b for b in re.findall(r"```bash\n(.*?)```", TEXT, re.S) if "mine.json" in b)
    rows = re.search(r"cat > mine.json <<'JSON'\n(.*?)\nJSON", block, re.S)[1]
    (place / "mine.json").write_text(rows)
    (place / "photos").mkdir(exist_ok=True)
    for row in json.loads(rows):
        Image.new("RGB", (30, 20), "red").save(place / "photos" / row["image"])
    if not (place / "runs/sft/model").is_dir():
        pytest.fail("stage 2 has left no model: see the test before")
    out = run(place, the(r"^python data\.py mine\.json")).stdout
    assert f"{len(json.loads(rows))} good" in out
    assert "step 40/40" in run(place, the(r"train_sft\.py .*--data=mine\.json")).stdout
    command, said = re.search(r"`(python sample\.py .*?)` then says `(.*?)`", TEXT).groups()
    assert run(place, command).stdout.strip() == said == json.loads(rows)[0]["conversations"][1]["value"]


def test_a_recipe_is_read_as_the_launch_lines_say(place):
    if not (place / "runs/align/model").is_dir():
        run(place, "python train_align.py", *SMALL)
    command = the(r"^torchrun train_sft\.py recipes/llava15\.py .*").replace("FILE", "runs/toy/sft.json")
    said = run(place, command.replace("DIR", "runs/toy/images"), "--dry_run").stdout
    assert "of 128 samples" in said and "lr 2e-05: " in said and "what is learnt in green" in said


def test_the_demo_is_the_commands_of_the_readme():
    """demo/run.sh, command by command: each is one that runs in a test above."""
    lines = [line.split("#")[0].split("||")[0].strip() for line in (ROOT / "demo/run.sh").read_text().splitlines()]
    commands = [line.replace("$run ", "torchrun ").replace("$python ", "python ").removesuffix(' "$@"') for line in lines
                if line.startswith(("$run ", "$python "))]
    assert len(commands) > 7 and {*commands} <= {*COMMANDS, "torchrun train_align.py"}
    assert subprocess.run(["bash", "-n", ROOT / "demo/run.sh"]).returncode == 0


def test_launch_lines_name_scripts_recipes_and_settings_that_exist():
    import train_align
    import train_sft
    known = {f for s in (train_align, train_sft) for f in s.Settings.__dataclass_fields__}
    for command in COMMANDS:
        if "train_" not in command:
            continue
        for word in command.split():
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), f"{command}: there is no {word}"
            if (m := re.match(r"--(\w+)=", word)) and m[1] not in ("nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"):
                assert m[1] in known, f"{command}: {m[1]} is no setting"


def test_every_file_the_readme_names_is_there():
    for name in re.findall(r"`([\w/.]+\.(?:py|sh|md|txt))`", TEXT):
        assert (ROOT / name).exists() or (ROOT / Path(name).name).exists(), name
