"""Each recipe of a system: its plan at the size of the paper, and both stages on tiny towers and data."""

import importlib
import math
import os
import re
import shlex
import signal

import pytest
from conftest import ROOT
from tiny_runs import SCRIPTS, refusal, rows, run, state

import config
from formats.configs import CLASSES
from model import VisionConfig, VLMConfig
from parts.settings import apply_parts
from run.arguments import parse, run_recipe
from run.log import Log

# tokens per image, tile or patch in the paper
SYSTEMS = {"paligemma": 256, "llava": 256, "pali3": 256, "internvl15": 256, "fuyu": 1, "mm1": 144, "blip2": 32,
           "comm": 576, "qwen_vl": 256, "flamingo": 1, "visualchat": 257,
           "instructblip": 32}
KEPT = {"connector", "parts", "train", "template", "system", "warmup", "max_len", "max_tokens", "loss"}   # toy settings


def values(name, stage, toy):
    return run_recipe(ROOT / "recipes" / f"{name}.py", {"stage": stage, "toy": toy})


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_plan_has_the_size_of_the_paper(name, stage, capsys, monkeypatch):
    s = parse(SCRIPTS[stage].Settings, [str(ROOT / "recipes" / f"{name}.py"), "--dry_run", "--device=cpu"])
    with pytest.raises(SystemExit) as e:
        SCRIPTS[stage].main(s)
    out = capsys.readouterr().out
    assert not e.value.code and f"{SYSTEMS[name]} tokens per image" in out and s.paper["hours"] in out
    trained, frozen = (int(n.replace(",", "")) for n in re.search(r"together +([\d,]+) +([\d,]+)", out).groups())
    assert trained > 1e6 and trained + frozen > 1e9, "the size of the paper, not of the toy"


def killed(*args, **how):
    """Run in a child process that kills itself in its second step, behind the checkpoint of the first."""
    if not (child := os.fork()):
        try:
            count = Log.count
            Log.count = lambda log, step, *rest: (
                os.kill(os.getpid(), signal.SIGKILL) if step else count(log, step, *rest))
            run(*args, **how)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("name", SYSTEMS)
def test_both_stages_end_killed_or_not(name, world, tmp_path, monkeypatch):
    """Two steps of the toy's towers each; the second stage brings the parts of the first. A run that was killed and
    started again publishes the same bits, and so does the stage after it."""
    monkeypatch.chdir(ROOT)
    for stage, init in (("align", ""), ("sft", "align")):
        found = {k: x for k, x in values(name, stage, toy=True).items() if k in KEPT}
        found |= {"parts": ""} if init else {"vision": "demo/vit", "llm": "demo/llm"}
        found |= {"batch_size": 2, "steps": 2, "save_every": 1, "lr": SCRIPTS[stage].Settings.lr}
        for life in ("whole", "killed"):
            out = tmp_path / life / stage
            how = found | ({"init": str(tmp_path / life / init)} if init else {})
            if life == "killed":
                killed(stage, world, out, **how)
                assert (out / "checkpoints/step_0000001").is_dir() and not (out / "model").exists()
            assert run(stage, world, out, **how) is None
        assert state(tmp_path / "whole" / stage, 2) == state(tmp_path / "killed" / stage, 2)
        weights = [(tmp_path / life / stage / "model/model.safetensors").read_bytes() for life in ("whole", "killed")]
        assert weights[0] == weights[1]
    toy = values(name, "align", toy=True)
    assert not toy.get("steps") and toy["batch_size"] == 16, "the toy's own length"
    logged = [row["loss"] for row in rows(tmp_path / "killed" / "sft" / "log.jsonl") if "loss" in row]
    assert len(logged) == 2 and all(math.isfinite(loss) for loss in logged)


@pytest.mark.parametrize("name", SYSTEMS)
def test_commands_of_a_recipe_are_read(name):
    text = (ROOT / "recipes" / f"{name}.py").read_text().split('"""')[1]
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if "recipes/" in line and "train_" in line]
    assert len(lines) >= 3
    for words in lines:
        script = importlib.import_module(words[1].removesuffix(".py"))
        words = [str(ROOT / w) if w.endswith(".py") else w for w in words[2:]]
        config.check_ranges(s := parse(script.Settings, words))
        assert s.data or s.dry_run


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recipe_is_short_and_says_its_paper(name):
    text = (ROOT / "recipes" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60 and "arXiv" in text
    for command in re.findall(r"recipes/(\w+)\.py", text.split('"""')[1]):
        assert command == name, "its commands name itself"


def test_data_must_be_named(world, tmp_path):
    assert "data is empty" in refusal("align", world, tmp_path / "x", data="")


def test_all_systems_are_tested():
    there = {p.stem for p in (ROOT / "recipes").glob("*.py")} - {"llava15", "llava15_align"}
    assert there == set(SYSTEMS)
    assert sum(len((ROOT / "recipes" / f"{name}.py").read_text().splitlines()) for name in there) <= 500


@pytest.mark.parametrize("name", SYSTEMS)
def test_real_data_train_the_parts_of_the_paper(name):
    """`paper` is for the plan, `parts` for a run: both must describe one system."""
    found = values(name, "align", toy=False)
    want = found["paper"]["model"]
    cfg = VLMConfig(VisionConfig(num_hidden_layers=want.vision.num_hidden_layers), connector=found["connector"])
    apply_parts(cfg, found.get("parts", ""), CLASSES, lambda folder: VisionConfig(num_hidden_layers=24))
    for field in ("connector", "mask", "tokens", "connector_args"):
        assert getattr(cfg, field) == getattr(want, field), field
    assert cfg.layout.get("kind") == want.layout.get("kind") or name == "internvl15", "the plan counts tiles itself"
    assert cfg.vision.keep_class == want.vision.keep_class or name in ("blip2", "instructblip"), "EVA's own default"
    if cfg.vision.model_type == want.vision.model_type:
        assert cfg.vision.feature_layer in (want.vision.feature_layer, want.vision.num_hidden_layers)
    assert bool(cfg.second) == bool(want.second) and (cfg.text.model_type == "flamingo") == (name == "flamingo")
    assert not found.get("init") and values(name, "sft", toy=False)["init"] == f"runs/{name}_align"


@pytest.mark.parametrize("name, changes, says", [
    ("align", {"train": "multi_modal_projector.*=-1e-3"}, "expected glob=lr"),
    ("align", {"train": "multi_modal_projector.*=nan"}, "expected glob=lr"),
    ("align", {"train": "multi_modal_projector.*"}, "expected glob=lr"),
    ("align", {"train": "*=1 multi_modal_projector.*=2 *=3"}, "each glob once"),
    ("align", {"train": "multi_modal_projector.*=1e-3", "lr": 5.0}, "lr would not be read"),
    ("sft", {"train": "multi_modal_projector.*=1e-3", "connector_lr": 5.0}, "connector_lr would not be read"),
    ("sft", {"train": "multi_modal_projector.*=1e-3", "lora_r": 2}, "lora_r would not be read"),
    ("align", {"parts": "mask=foo"}, "mask 'foo'"), ("align", {"parts": "connector=foo"}, "connector 'foo'"),
    ("align", {"parts": "text.model_type=foo"}, "model_type 'foo'"),
    ("align", {"parts": "vision.keep_class=true"}, "gives 5 tokens per image, not tokens=4"),
    ("align", {"parts": "vision.feature_layer=9"}, "feature_layer=9 of a vision tower of"),
    ("align", {"parts": "connector_args.heads=2"}, "connector=mlp has no settings"),
    ("align", {"parts": "connector_args.heads"}, "is not a field=value"),
    ("align", {"parts": "tokens=9"}, "gives 4 tokens per image, not tokens=9"),
    ("align", {"parts": "mask=prefix text.sliding_window=4"}, "only causal attention has a window")])
def test_a_contradiction_ends_in_one_line(name, changes, says, world, tmp_path):
    usual = {"lr": SCRIPTS[name].Settings.lr}
    assert says in refusal(name, world, tmp_path / "x", **usual | changes)
