"""Settings of a run are checked before anything is spent; what they leave open comes from `init`; the dry run."""

import json
import math

import pytest
from conftest import error
from tiny_runs import SCRIPTS, refusal, run

import eval as evaluation
import kernels
import sample
from run import stage


@pytest.mark.parametrize("kind, changes, line", [
    ("align", dict(data="nowhere.json"), "no data file nowhere.json"),
    ("align", dict(data="."), ". is a folder, no data file"), ("align", dict(data=""), "data is empty"),
    ("align", dict(val_data="."), ". is a folder, no data file"), ("align", dict(val_data="gone"), "no data file gone"),
    ("align", dict(vision="no_tower"), "no such folder"),
    ("align", dict(images="no_images"), "images=no_images is not a folder"),
    ("align", dict(vision=""), "init is empty, so vision and llm must name a vision tower and a language model"),
    ("sft", dict(init="runs/never"), "no such folder"),
    ("sft", dict(init="runs/align", llm="x"), "init=runs/align brings its own towers, so llm=x would not be read"),
    ("sft", dict(parallel="both"), "parallel=both: one of auto, ddp, fsdp"),
    ("align", dict(recompute="some"), "recompute=some: one of none, block"),
    ("align", dict(dtype="fp8"), "dtype=fp8: one of auto, bf16, fp32, fp64"),
    ("align", dict(save_dtype="fp64"), "save_dtype=fp64: one of auto, bf16, fp16, fp32"),
    ("align", dict(connector="foo"), "connector=foo: one of mlp, linear"),
    ("align", dict(device="foo"), "device=foo: auto, cpu"),
    ("align", dict(kernels="foo"), "kernels=foo: one of auto, torch, triton"),
    ("sft", dict(bits=8, lora_r=2), "bits=8: one of 4, 16"),
    ("align", dict(lr=0.0), "nothing would be trained"), ("align", dict(lr=-1.0), "lr=-1.0: expected at least 0"),
    ("align", dict(lr=math.inf), "lr=inf: expected at least 0"), ("align", dict(seed=2**70), "seed="),
    ("align", dict(warmup=100.0), "warmup=100.0: expected between 0 and 0.99 (share of the steps with a rising"),
    ("align", dict(batch_size=0), "batch_size=0: expected between 1 and"), ("align", dict(out=""), "out is empty"),
    ("align", dict(steps=0, epochs=0.0), "nothing to do"),
    ("align", dict(steps=0, epochs=1e300), "epochs=1e+300: expected between 0 and"),
    ("align", dict(resume="runs/never"), "resume=runs/never is not a checkpoint: those of a run are called"),
    ("align", dict(max_len=4097, max_tokens=5000), "max_len=4097, but the language model was made for 4,096 positions"),
    ("align", dict(data="toy"), "data=toy brings its own images and val_data"),
    ("sft", dict(lora_r=2, lora_targets="nose"), "nose"),
    ("sft", dict(lora_r=2, lora_alpha=0.0), "lora_alpha=0.0: expected at least 1e-06"),
    *(("sft", {k: v}, f"{k}={v} means nothing while lora_r is 0") for k, v in dict(
        bits=4, lora_alpha=8.0, lora_dropout=0.1, lora_targets="q_proj").items())])
def test_a_wrong_setting_ends_in_one_line(world, tmp_path, kind, changes, line):
    said = refusal(kind, world, **{"out": tmp_path / "run", **changes})
    assert line in said and "\n" not in said and not (tmp_path / "run").exists()


def test_another_connector_than_that_of_init_is_refused(world, aligned, tmp_path):
    line = refusal("sft", world, tmp_path / "run", init=str(aligned), connector="linear")
    assert line == f"connector=linear, but that of {aligned} is mlp"


def test_kernels_without_a_gpu_are_refused(world, tmp_path, monkeypatch):
    """In the training scripts, in sample.py and eval.py; and on a GPU without Triton"""
    line = "kernels=triton needs a GPU; on a CPU TRITON_INTERPRET=1 interprets them, a thousand times slower"
    monkeypatch.setattr("kernels.has_triton", True)
    assert all(refusal(kind, world, tmp_path, kernels="triton") == line for kind in SCRIPTS)
    (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "text": "What?", "answer": "A cat"}\n')
    for script, more in ((sample, {}), (evaluation, {"data": str(tmp_path / "questions.jsonl")})):
        settings = script.Settings(model=str(tmp_path), device="cpu", kernels="triton", **more)
        assert error(script.main, settings) == line
    monkeypatch.setattr("kernels.has_triton", False)
    assert refusal("align", world, tmp_path, kernels="triton") == "kernels=triton, but Triton is not installed"
    assert not (tmp_path / "checkpoints").exists() and kernels.choice == "auto"


def test_the_toy_world_that_cannot_be_drawn(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")
    toy = {**world, "data": "toy", "images": "."}
    assert refusal("align", toy, tmp_path / "out").startswith("the toy world cannot be drawn in runs/toy: ")


def test_stage_2_inherits_open_settings_from_init(world, aligned, tmp_path):
    how = {**world, "system": None, "steps": 1}

    def meta(out):
        return json.loads((out / "model" / "pumice.json").read_text())
    run("align", {**world, "steps": 1}, tmp_path / "a", image_aspect="squash")
    assert meta(tmp_path / "a") == {"template": "plain", "system": "", "image_aspect": "squash"}
    run("sft", how, tmp_path / "b", init=str(tmp_path / "a"))
    assert meta(tmp_path / "b") == {"template": "vicuna_v1", "system": "", "image_aspect": "squash"}
    run("sft", how, tmp_path / "c", init=str(tmp_path / "b"), template="chatml", image_aspect="crop", system="S")
    run("sft", how, tmp_path / "d", init=str(tmp_path / "c"))
    assert meta(tmp_path / "d") == meta(tmp_path / "c") == {"template": "chatml", "system": "S", "image_aspect": "crop"}
    assert meta(aligned)["image_aspect"] == "pad"                              # without init: as LLaVA-1.5


# ---- the dry run ----------------------------------------------------------------------------------------------------

def test_a_dry_run_only_prints_the_plan(world, tmp_path, capsys):
    assert run("align", world, tmp_path / "none", dry_run=True) is None
    said = capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    for words in ("multi_modal_projector", "6 steps of 4 samples", "memory, roughly", "its loss mask"):
        assert words in said


def test_a_dry_run_stops_where_the_run_would(world, tmp_path, capsys):
    """For samples of its first step and for the validation file; then no sample is shown as if all were well."""
    (tmp_path / "bad.jsonl").write_text("{}\n" * 9)
    bad, out = str(tmp_path / "bad.jsonl"), tmp_path / "run"
    wrong = [dict(data=bad), dict(images=str(tmp_path)), dict(images="gone"), dict(val_data="gone"),
             dict(val_data=bad)]
    lines = [refusal("align", world, out, **w, dry_run=True) for w in wrong]
    assert "its loss mask" not in capsys.readouterr().out
    assert run("align", {**world, "data": bad}, out, dry_run=True, max_dropped=1.0) == 1
    said = capsys.readouterr().out
    assert "none of the first step's samples can be used" in said
    assert "  4 of these samples cannot be used, as bad.jsonl[" in said and "no conversations" in said
    run("align", world, out, images=str(tmp_path), batch_size=22, max_dropped=1.0, dry_run=True)
    said = capsys.readouterr().out                                             # not of one whose image is gone
    assert ", 0 image(s), its loss mask" in said and said.rstrip().endswith("]]") and "a white cat, " in said
    assert not out.exists()
    assert lines == [refusal("align", world, out, **w) for w in wrong]


def test_a_dry_run_shows_what_training_sees(world, tmp_path, capsys):
    """The first sample of the first packed sequence, with its image placeholders and all its supervised tokens"""
    (tmp_path / "one.jsonl").write_text(open(world["data"]).readline())
    run("align", {**world, "data": str(tmp_path / "one.jsonl"), "batch_size": 2}, tmp_path / "run", dry_run=True)
    name, text = capsys.readouterr().out.partition("its loss mask:\n")[::2]
    assert "\n  one.jsonl[0] id=0, " in name and name.endswith(" tokens, 1 image(s), ")
    assert text.startswith("<s>[4 x image]") and "[[a black cat, 0" in text and text.count("a black cat") == 1


# ---- threads --------------------------------------------------------------------------------------------------------

def test_loading_a_model_sets_the_threads(world, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(stage.engine, "set_threads", lambda model, world: calls.append(type(model).__name__))
    run("align", world, tmp_path / "run", dry_run=True)
    assert calls == ["VLM"]
