"""The two training scripts from end to end, on towers and data so small that a run takes a tenth of a second."""

import errno
import functools
import gc
import hashlib
import inspect
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tokenize
import types
from pathlib import Path

import pytest
import torch
from conftest import example, fork, make_tokenizer, tiny_config, tiny_vlm, train_step
from interpret import interpret
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

import data
import engine
import eval
import generate
import kernels
import lora
import sample
import train_align
import train_sft
from config import Error
from formats import configs, llava
from kernels.cross_entropy import CHUNK_ROWS
from loss import token_loss
from model import VLM, TextConfig, VisionConfig, VLMConfig, init_weights
from run import checkpoint, log, plan, stage

SCRIPTS = {"align": train_align, "sft": train_sft}


# ---- a tiny world ---------------------------------------------------------------------------------------------------

def write_towers(folder):
    """vision/ and llm/ as they would be downloaded -> folder"""
    model = tiny_vlm(dtype=torch.float32)
    v, t = model.cfg.vision, model.cfg.text
    make_tokenizer(folder / "llm")
    (folder / "vision").mkdir()
    for name, prefix, c in (("vision", "vision_tower.", v), ("llm", "language_model.", t)):
        state = {k.removeprefix(prefix): x for k, x in model.state_dict().items() if k.startswith(prefix)}
        save_file(state, folder / name / "model.safetensors")
        c = {k: x for k, x in vars(c).items() if k != "feature_layer"}
        (folder / name / "config.json").write_text(json.dumps(c))
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(dict(
        crop_size=v.image_size, size=v.image_size, resample=3, image_mean=v.image_mean, image_std=v.image_std)))
    return folder


def write_data(folder, name, n, seed=0):
    """n samples about little coloured pictures, every fourth without one, in LLaVA form -> path"""
    colors, rows = ["black", "red", "white"], []
    (folder / "images").mkdir(exist_ok=True)
    for i in range(seed, seed + n):
        color, pictures = colors[i % 3], i % 4 != 3
        Image.new("RGB", (8 + i % 3, 8), color).save(folder / "images" / f"{i}.png")
        question = ("<image>\n" if pictures else "") + "What is this?" + "?" * (i % 5)
        said = [("human", question), ("gpt", f"a {color} cat, {i}")]
        rows.append({"id": i, **({"image": f"{i}.png"} if pictures else {}),
                     "conversations": [{"from": who, "value": text} for who, text in said]})
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / name


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Settings that both scripts need for a run of this tiny world."""
    folder = write_towers(tmp_path_factory.mktemp("world"))
    return dict(data=str(write_data(folder, "train.jsonl", 22)), val_data=str(write_data(folder, "val.jsonl", 5, 100)),
                images=str(folder / "images"), vision=str(folder / "vision"), llm=str(folder / "llm"), system="",
                device="cpu", batch_size=4, max_len=48, max_tokens=96, steps=6, save_every=2, log_every=1, eval_every=3,
                sample_every=3)


@pytest.fixture(autouse=True)
def signals():
    """Scripts listen to SIGTERM for as long as their process lives; this one is not theirs."""
    kept = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for s, handler in kept.items():
        signal.signal(s, handler)


def run(kind, world, out, **changes):
    """-> what main returns"""
    script = SCRIPTS[kind]
    extra = {"init": ""} if kind == "sft" else {"lr": 2e-3}
    extra |= {"vision": "", "llm": ""} if changes.get("init") else {}
    return script.main(script.Settings(**{**world, **extra, "out": str(out), **changes}))


def refusal(*args, **how):
    """The one line with which a run stops."""
    with pytest.raises(Error) as e:
        run(*args, **how)
    return str(e.value)


def files(folder):
    return {str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
            for p in sorted(folder.rglob("*")) if p.is_file()}


def state(out, step=6):
    """Digest of weights, moments and random state after a step."""
    return {n: hashlib.sha256((out / f"checkpoints/step_{step:07}/{n}.safetensors").read_bytes()).hexdigest()
            for n in ("trained", "optimizer", "rng")}


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- what a run leaves ----------------------------------------------------------------------------------------------

LORA = dict(lora_r=2, lora_dropout=0.5)
MODEL = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "manifest.json",
         "model.safetensors", "pumice.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def aligned(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "align"
    assert run("align", world, out) is None
    return out


def test_a_run_folder_holds_what_is_promised_and_nothing_else(aligned):
    assert {p.name for p in aligned.iterdir()} == {"config.json", "log.jsonl", "samples.jsonl", "checkpoints", "model",
                                                   "finished.json", ".lock"}
    assert sorted(p.name for p in (aligned / "checkpoints").iterdir()) == ["step_0000004", "step_0000006"]
    assert MODEL <= {p.name for p in (aligned / "model").iterdir()}
    config = json.loads((aligned / "config.json").read_text())
    assert config["settings"]["batch_size"] == 4 and config["versions"]["torch"] == torch.__version__
    log = rows(aligned / "log.jsonl")
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in log if "val_loss" in r] == [3, 6]
    assert {"step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tokens_per_s", "samples_per_s", "mfu",
            "memory", "data_wait_s", "eta"} <= set(log[0])
    assert [r["lr"] for r in log if "loss" in r] == [engine.lr_at(i, 6, 1, 2e-3) for i in range(6)]
    said = rows(aligned / "samples.jsonl")
    assert [r["step"] for r in said] == [3] * 4 + [6] * 4 and {"prompt", "expected", "answer"} < set(said[0])


def test_only_the_connector_moved_in_stage_1_and_only_the_tower_stayed_in_stage_2(world, aligned, tmp_path):
    run("sft", world, tmp_path / "sft", init=str(aligned))
    start = llava.load_model(world["vision"], world["llm"])[0].state_dict()
    for before, out, moved in ((start, aligned, {"multi_modal_projector"}),
                               (None, tmp_path / "sft", {"multi_modal_projector", "language_model"})):
        before = before or load_file(aligned / "model" / "model.safetensors")
        after = load_file(out / "model" / "model.safetensors")
        added = after.keys() - before.keys()                       # what LLaVA has and never reads
        assert all(k.startswith("vision_tower.vision_model.post_layernorm.") for k in added)
        assert moved == {k.split(".")[0] for k in after.keys() - added
                         if not torch.equal(after[k], before[k].to(after[k].dtype))}


def test_a_finished_run_that_is_started_again_takes_no_step_and_changes_no_file(world, aligned, capsys, monkeypatch):
    monkeypatch.setattr(engine, "train_step", lambda *a, **k: pytest.fail("a step"))
    before = files(aligned)
    for changes in ({}, {"steps": 4}, {"log_every": 5, "workers": 1, "max_tokens": 48}):
        assert run("align", world, aligned, **changes) is None
        assert files(aligned) == before
        assert f"is finished ({changes.get('steps', 6)} steps): nothing to do" in capsys.readouterr().out


def test_more_steps_go_on_and_resume_none_starts_again(world, aligned, tmp_path, capsys):
    out = tmp_path / "run"
    run("align", world, out, steps=4)
    run("align", world, out, steps=6)
    assert "resumed with steps=6, before it was 4" in capsys.readouterr().out
    assert [r["step"] for r in rows(out / "log.jsonl") if "loss" in r] == [1, 2, 3, 4, 5, 6]
    run("align", world, out, resume="none")
    assert [r["step"] for r in rows(out / "log.jsonl") if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert state(out) == state(aligned)


def test_a_checkpoint_that_has_no_step_left_to_do_is_published_in_another_folder(world, aligned, tmp_path):
    assert run("align", world, tmp_path / "b", resume=str(aligned / "checkpoints/step_0000006")) is None
    one, other = (load_file(out / "model/model.safetensors") for out in (aligned, tmp_path / "b"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    shutil.rmtree(tmp_path / "b/model")
    assert run("align", world, tmp_path / "b") is None and (tmp_path / "b/model/model.safetensors").is_file()


def test_a_run_that_goes_on_elsewhere_knows_what_was_counted_before(world, tmp_path):
    (tmp_path / "bad.jsonl").write_text(Path(world["data"]).read_text() + "{}\n" * 2)         # 24 samples, in six steps
    a, b = (functools.partial(run, "align", {**world, "data": str(tmp_path / "bad.jsonl")}, tmp_path / out) for out in "ab")
    a()
    b(resume=str(tmp_path / "a/checkpoints/step_0000004"))
    one, other = (json.loads((tmp_path / out / "checkpoints/step_0000006/state.json").read_text()) for out in "ab")
    assert len(one["losses"]) == 6 and one["seen"]["samples"] == 24 and one["reasons"]["no conversations"][0] == 2
    del one["settings"], other["settings"]
    assert one == other
    (tmp_path / "a/finished.json").unlink()
    a(steps=4)                                               # less than was done: published as it is, and nothing goes
    assert [step for step, _ in checkpoint.steps_in(tmp_path / "a")] == [4, 6]


def test_the_best_checkpoint_is_kept_and_known_after_a_restart(world, tmp_path, monkeypatch):
    """Validation losses 5, 1 and 3 after steps 2, 4 and 6, of which the last two are done by a second life."""
    real, out = stage.Run.validate, tmp_path / "run"

    def validate(run, step):
        mean = {2: 5.0, 4: 1.0, 6: 3.0}[step + 1]
        monkeypatch.setattr(stage, "token_loss", lambda model, batch: mean * (batch.labels >= 0).sum())
        real(run, step)
    monkeypatch.setattr(stage.Run, "validate", validate)
    for steps in (4, 6):
        run("align", world, out, steps=steps, eval_every=2, keep_best=True, keep_last=1)
    assert [r["val_loss"] for r in rows(out / "log.jsonl") if "val_loss" in r] == [5, 1, 3]
    assert [step for step, _ in checkpoint.steps_in(out)] == [4, 6]


def halves_agree(ours, published):
    """Answering from adapter/ is answering from model/, which is in fp16, to the last bit"""
    for (k, p), q in zip(ours.model.state_dict().items(), published.model.state_dict().values(), strict=True):
        assert torch.equal(p.half().float(), q), k


def test_lora_leaves_an_adapter_and_a_merged_model_that_says_the_same(world, aligned, tmp_path):
    out = tmp_path / "lora"
    run("sft", world, out, init=str(aligned), image_aspect="crop", **LORA)
    assert {p.name for p in (out / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    plain = load_file(aligned / "model" / "model.safetensors")
    merged = load_file(out / "model" / "model.safetensors")
    assert merged.keys() == plain.keys()
    changed = {k for k in plain if not torch.equal(plain[k], merged[k])}
    assert any("q_proj" in k for k in changed) and not any("norm" in k or "embed" in k or "head" in k for k in changed)
    whole, ours = (generate.Chat(out / part, "cpu", "fp32") for part in ("model", "adapter"))
    halves_agree(ours, whole)
    assert (ours.template, ours.system, ours.spec) == ("vicuna_v1", "", whole.spec) and ours.spec.aspect == "crop"


def test_a_dry_run_prints_the_plan_and_writes_nothing(world, tmp_path, capsys):
    assert run("align", world, tmp_path / "none", dry_run=True) is None
    said = capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    for words in ("multi_modal_projector", "6 steps of 4 samples", "memory, roughly", "what is learnt in green"):
        assert words in said


# ---- one batch by heart ---------------------------------------------------------------------------------------------

def test_overfitting_says_yes_and_leaves_the_run_as_it_was(world, aligned, tmp_path, capsys):
    out = tmp_path / "run"
    run("sft", world, out, steps=2, init=str(aligned))
    before = files(out)
    how = dict(overfit=True, init=str(aligned), lr=1e-2, batch_size=2, log_every=100, eval_every=0, sample_every=0)
    assert run("sft", world, out, steps=40, **how) == 0
    assert "learnt by heart: yes" in capsys.readouterr().out
    assert {k: v for k, v in files(out).items() if not k.startswith("overfit")} == before
    assert not (out / "overfit" / "checkpoints").exists()
    assert run("sft", world, out, steps=1, **how) == 1
    assert "learnt by heart: no" in capsys.readouterr().out


# ---- looking changes nothing ----------------------------------------------------------------------------------------

def test_validation_samples_and_loader_workers_leave_the_weights_bit_equal(world, tmp_path):
    """With dropout on, so that a random number drawn too many would show."""
    run("sft", world, tmp_path / "seen", **LORA)
    run("sft", world, tmp_path / "blind", val_data="", eval_every=0, sample_every=0, **LORA)
    run("sft", world, tmp_path / "worker", workers=1, **LORA)
    run("sft", world, tmp_path / "seed", seed=1, **LORA)
    seen, blind, worker, seed = (state(tmp_path / n) for n in ("seen", "blind", "worker", "seed"))
    assert seen == blind == worker != seed


def test_the_validation_loss_is_the_mean_over_every_sample_once(world, aligned):
    model, folder = llava.load_model(world["vision"], world["llm"])
    model.multi_modal_projector.load_state_dict({k.removeprefix("multi_modal_projector."): v for k, v in load_file(
        aligned / "checkpoints/step_0000006/trained.safetensors").items()})
    encode = data.Encoder(folder.tok, "plain", model.cfg.image_token_index, 4, 48, "")
    spec = configs.image_spec(folder.pre, "pad")

    def mean(steps, indices):
        micro = [b for i in indices for b in steps[i].micro]
        with torch.no_grad():
            return sum(token_loss(model, b).item() for b in micro) / sum(int((b.labels >= 0).sum()) for b in micro)
    truth = mean(data.Steps(world["val_data"], world["images"], encode, spec, 1, 96, 0), range(5))
    wraps = mean(data.Steps(world["val_data"], world["images"], encode, spec, 4, 96, 0), range(2))
    said = rows(aligned / "log.jsonl")[-1]
    assert said["step"] == 6 and abs(said["val_loss"] / truth - 1) < 2e-6 < 1e-4 < abs(wraps / truth - 1)


# ---- two processes --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(parallel, world, tmp_path):
    settings = {**world, "dtype": "fp64", "steps": 3, "save_every": 3}
    run("sft", settings, tmp_path / "one")
    fork(2, lambda rank: run("sft", settings, tmp_path / "two", parallel=parallel), tmp_path)
    one, two = (load_file(tmp_path / n / "checkpoints/step_0000003/trained.safetensors") for n in ("one", "two"))
    assert max(((one[k] - two[k]).norm() / one[k].norm()).item() for k in one) < 1e-10
    a, b = (rows(tmp_path / n / "log.jsonl") for n in ("one", "two"))
    for x, y in zip(a, b, strict=True):
        for key in ("loss", "val_loss", "grad_norm", "tokens", "supervised_tokens"):
            assert x.get(key, 0) == pytest.approx(y.get(key, 0), rel=1e-9)


# ---- what stops a run -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, changes, words", [
    ("align", dict(data="nowhere.json"), ["nowhere.json"]),
    ("align", dict(vision="no_eyes"), ["no_eyes", "no such folder"]),
    ("align", dict(llm="no_tongue"), ["no_tongue", "no such folder"]),
    ("align", dict(images="no_pictures"), ["images=no_pictures is no folder"]),
    ("align", dict(images="/"), ["could not be used", "is missing"]),
    ("align", dict(vision=""), ["init is empty, so vision and llm must name two towers"]),
    ("sft", dict(llm=""), ["init is empty, so vision and llm must name two towers"]),
    ("sft", dict(init="runs/never"), ["runs/never", "no such folder"]),
    ("sft", dict(init="runs/align", llm="x"), ["init=runs/align brings its own towers", "llm=x would not be read"]),
    ("sft", dict(parallel="both"), ["parallel=both", "fsdp"]),
    ("align", dict(recompute="some"), ["recompute=some", "block"]),
    ("align", dict(dtype="fp8"), ["dtype=fp8", "bf16"]),
    ("align", dict(lr=0.0), ["nothing would be trained"]),
    ("align", dict(keep_best=True, val_data=""), ["keep_best", "val_data"]),
    ("align", dict(resume="no/such/checkpoint"), ["no/such/checkpoint"]),
    ("sft", dict(lora_r=2, lora_targets="nose"), ["nose"]),
    ("sft", dict(bits=4), ["bits=4 means nothing while lora_r is 0"]),
    ("sft", dict(bits=8, lora_r=2), ["bits=8: 4 or 16"]),
])
def test_a_mistake_of_the_user_ends_in_one_clear_line(kind, changes, words, world, tmp_path):
    line = refusal(kind, world, tmp_path / "run", **changes)
    assert ("images" in changes or "\n" not in line)
    assert all(w in line for w in words), line


def test_too_many_unusable_samples_stop_the_run_with_their_reasons_and_a_few_are_counted(world, tmp_path, capsys):
    lines = open(world["data"]).read().splitlines()
    said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    lines[3:5] = map(json.dumps, [{"conversations": []}, {"image": "gone.png", "conversations": said}])
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    settings = {**world, "data": str(tmp_path / "bad.jsonl"), "batch_size": 11, "steps": 2}
    line = refusal("align", settings, tmp_path / "run", max_dropped=0.0)
    assert "max_dropped=0.0" in line and ("no conversations" in line or "gone.png" in line)
    run("align", settings, tmp_path / "few")
    assert "2 of 22 samples dropped" in capsys.readouterr().out
    assert rows(tmp_path / "few" / "log.jsonl")[-2]["dropped"] == 2
    lines[5:7] = ['{"conversations": []}'] * 2
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    line = refusal("align", settings, tmp_path / "run")                          # 4 > 0.22 + 3
    assert "4 of 22" in line and "max_dropped=0.01" in line and "no conversations" in line and "gone.png" in line


@pytest.mark.parametrize("share, n, most", [(0.01, 10, 3), (0.01, 100, 4), (0.01, 1000, 19), (0.01, 10**6, 10_300),
                                            (0.0, 1000, 0), (1.0, 50, 50)])
def test_the_share_that_may_be_unusable_has_three_deviations_of_slack(share, n, most):
    """Both sides of the limit: `most` of n samples pass and one more does not."""
    assert most <= stage.tolerated(share, n) and (min(n, most + 1) > stage.tolerated(share, n) or share == 1)


def test_a_file_as_bad_as_its_owner_said_is_hardly_ever_stopped_and_one_four_times_as_bad_always_is():
    rng = random.Random(0)

    def stopped(share):
        bad = 0
        for n in range(1, 5001):
            bad += rng.random() < share
            if bad > stage.tolerated(0.01, n):
                return True
    assert sum(bool(stopped(0.005)) for _ in range(200)) == 0 and all(stopped(0.04) for _ in range(50))


def test_other_data_under_the_same_name_is_refused_and_changed_settings_are_said(world, tmp_path, capsys):
    text = open(world["data"]).read()
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    settings = {**world, "data": str(file)}
    run("align", settings, tmp_path / "run", steps=2)
    file.write_text(text.replace("black cat, 0", "black dog, 0"))
    assert "was trained on other data" in refusal("align", settings, tmp_path / "run")
    file.write_text(text)
    run("align", settings, tmp_path / "run", lr=5e-3)
    assert "resumed with lr=0.005, before it was 0.002" in capsys.readouterr().out
    assert rows(tmp_path / "run" / "log.jsonl")[-2]["lr"] == engine.lr_at(5, 6, 1, 5e-3)


@pytest.mark.parametrize("changes, words", [
    (dict(seed=1), "seed=0, not 1"), (dict(batch_size=2), "batch_size=4, not 2"),
    (dict(lora_alpha=8.0), "lora_alpha=64.0, not 8.0"), (dict(bits=4), "bits=16, not 4")])
def test_a_run_is_not_resumed_with_what_its_place_in_the_data_or_its_adapters_hang_on(world, tmp_path, changes, words):
    run("sft", world, tmp_path / "run", steps=2, **LORA)
    before = files(tmp_path / "run")
    line = refusal("sft", world, tmp_path / "run", **{**LORA, **changes})
    assert words in line and "--resume=none starts again" in line and "\n" not in line
    assert files(tmp_path / "run") == before


def test_another_mixture_of_the_same_files_is_other_data(world, tmp_path):
    a, b = world["data"], write_data(tmp_path, "b.jsonl", 22)
    settings = {**world, "images": str(tmp_path / "images")}
    run("align", settings, tmp_path / "run", steps=2, data=f"{b}:0.5,{a}:0.5")
    line = refusal("align", settings, tmp_path / "run", data=f"{b}:0.2,{a}:0.8")
    assert "or on another mixture of it" in line
    shutil.copy(b, tmp_path / "c.jsonl")                                       # under another name they are the same
    run("align", settings, tmp_path / "run", data=f"{tmp_path / 'c.jsonl'}:0.5,{a}:0.5")


def test_a_run_is_not_resumed_nor_taken_for_finished_on_another_base(world, tmp_path):
    shutil.copytree(world["llm"], tmp_path / "llm")
    settings = {**world, "llm": str(tmp_path / "llm")}
    run("align", settings, tmp_path / "run", steps=2)
    run("sft", settings, tmp_path / "whole", steps=2)
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "llm" / "model.safetensors")
    assert "finished on another base" in refusal("align", settings, tmp_path / "run", steps=2)
    line = refusal("align", settings, tmp_path / "run")
    assert "step_0000002 was trained on another base" in line and str(tmp_path / "llm") in line
    run("sft", settings, tmp_path / "whole", steps=4)                          # which has learnt it all by itself


def test_a_new_run_does_not_cost_the_old_one_before_its_first_step_is_done(world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run("align", world, out)
    before = files(out)
    for changes in (dict(vision="no_eyes"), dict(recompute="some"), dict(images=str(tmp_path))):
        refusal("align", world, out, resume="none", **changes)
        assert files(out) == before
    with monkeypatch.context() as m:
        m.setattr(engine, "check_gradients", lambda model: engine.stop("no gradient"))
        assert "no gradient" in refusal("align", world, out, resume="none")
        assert files(out) == before
    run("align", world, out, resume="none", steps=3, save_every=2)
    assert [r["step"] for r in rows(out / "log.jsonl") if "loss" in r] == [1, 2, 3]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_0000002", "step_0000003"]
    assert json.loads((out / "config.json").read_text())["settings"]["steps"] == 3


def test_stage_2_goes_on_as_stage_1_was_made_unless_told_otherwise(world, aligned, tmp_path):
    how = {**world, "system": None, "steps": 1, "val_data": ""}

    def meta(out):
        return json.loads((out / "model" / "pumice.json").read_text())
    run("align", {**world, "steps": 1}, tmp_path / "a", image_aspect="squash")
    assert meta(tmp_path / "a") == {"template": "plain", "system": "", "image_aspect": "squash"}
    run("sft", how, tmp_path / "b", init=str(tmp_path / "a"))
    assert meta(tmp_path / "b") == {"template": "vicuna_v1", "system": "", "image_aspect": "squash"}
    run("sft", how, tmp_path / "c", init=str(tmp_path / "b"), template="chatml", image_aspect="crop", system="S")
    run("sft", how, tmp_path / "d", init=str(tmp_path / "c"))
    assert meta(tmp_path / "d") == meta(tmp_path / "c") == {"template": "chatml", "system": "S", "image_aspect": "crop"}
    assert meta(aligned)["image_aspect"] == "pad"                              # two towers: as LLaVA-1.5
    (tmp_path / "d" / "model" / "pumice.json").write_text(json.dumps({"image_aspect": "pad"}))
    assert "pumice.json says image_aspect=pad, preprocessor_config.json" in refusal(
        "sft", how, tmp_path / "e", init=str(tmp_path / "d"))


def test_a_spike_of_the_loss_is_reported_with_all_samples_of_its_step(world, tmp_path, monkeypatch, capsys):
    calls = []

    def spiking(model, batch):
        calls.append(0)
        return token_loss(model, batch) * (9 if len(calls) == 36 else 1)
    monkeypatch.setattr(train_align, "token_loss", spiking)
    run("align", {**world, "val_data": "", "max_tokens": 1000}, tmp_path / "run", steps=38, save_every=100, lr=1e-9)
    spikes = [r for r in rows(tmp_path / "run" / "log.jsonl") if "spike" in r]
    assert [r["step"] for r in spikes] == [36] and spikes[0]["spike"] > 6 and len(spikes[0]["samples"]) == 4
    assert all(n.startswith("train.jsonl[") for n in spikes[0]["samples"])
    assert "step 36: loss" in capsys.readouterr().out


def test_memory_does_not_grow_with_steps(world, tmp_path, monkeypatch):
    """Bytes held after each step: in tensors, and of the process, which may jump once (the kernel joins small pages to
    large ones when it likes), but does not grow all the time."""
    held, count = [], stage.Run.count

    def noting(self, step, *args):
        count(self, step, *args)
        if step in (60, 120, 180):
            gc.collect()
            held.append((log.rss(), sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor)))
    monkeypatch.setattr(stage.Run, "count", noting)
    run("sft", world, tmp_path / "run", steps=181, save_every=50, eval_every=50, sample_every=50, log_every=1, **LORA)
    rss, tensors = zip(*held)
    assert tensors[2] - tensors[0] < 50_000, held                              # the streams of 120 steps are 450 kB
    assert min(rss[1] - rss[0], rss[2] - rss[1]) < 4 * 2**20, held


def test_a_finished_run_is_not_taken_for_another_one_in_the_same_folder(world, tmp_path):
    run("align", world, tmp_path / "run")
    assert "finished with lr=0.002, not 0.1" in refusal("align", world, tmp_path / "run", lr=0.1)
    file = tmp_path / "data.jsonl"
    file.write_text(open(world["data"]).read().replace("black cat, 0", "black dog, 0"))
    assert "finished on other data" in refusal("align", {**world, "data": str(file)}, tmp_path / "run")


@pytest.mark.parametrize("wrong, line", [
    (dict(warmup=100.0), "warmup=100.0: expected between 0 and 0.99, a share of the steps"),
    (dict(lr=-1.0), "lr=-1.0: expected at least 0"), (dict(lr=math.inf), "lr=inf: expected at least 0"),
    (dict(grad_clip=-1.0), "grad_clip=-1.0"), (dict(steps=-5), "steps=-5"), (dict(workers=-1), "workers=-1"),
    (dict(steps=0, epochs=0.0), "nothing to do"), (dict(steps=0, epochs=1e300), "epochs=1e+300: expected between 0"),
    (dict(seed=2**70), "seed="), (dict(data="."), ". is a folder, no data file"), (dict(data=""), "no data file (no name)"),
    (dict(val_data="."), ". is a folder, no data file"), (dict(val_data="gone"), "no data file gone"),
    (dict(batch_size=0), "batch_size=0"),
    (dict(connector="foo"), "connector=foo: mlp or linear"), (dict(device="foo"), "device=foo: auto, cpu"),
    (dict(dtype="foo"), "dtype=foo: auto, bf16, fp32, fp64"), (dict(kernels="foo"), "kernels=foo: auto, torch, triton"),
    (dict(resume="runs/never"), "resume=runs/never is no checkpoint: those of a run are called checkpoints/step_*"),
    (dict(max_len=4097, max_tokens=5000), "max_len=4097, but the language model was made for 4,096 positions"),
    (dict(keep_best=True, save_every=0), "keep_best: eval_every must be a multiple of save_every")])
def test_a_setting_that_cannot_be_meant_ends_in_one_line(world, tmp_path, wrong, line):
    said = refusal("align", world, tmp_path / "run", **wrong)
    assert line in said and "\n" not in said and not (tmp_path / "run").exists()


def test_a_run_must_have_a_folder_and_adapters_a_scale(world):
    assert refusal("align", world, "") == "out is empty: it names the folder of the run"
    assert "lora_alpha=0.0: expected at least 1e-06" in refusal("sft", world, "gone", lora_r=2, lora_alpha=0.0)


def test_kernels_without_a_gpu_are_refused_in_one_line(world, tmp_path, monkeypatch):
    """In the training scripts, and where a model is only asked; and on a GPU without Triton."""
    line = "kernels=triton needs a GPU; on a CPU TRITON_INTERPRET=1 interprets them, a thousand times slower"
    monkeypatch.setattr("kernels.has_triton", True)
    assert all(refusal(kind, world, tmp_path, kernels="triton") == line for kind in SCRIPTS)
    for script in (sample, eval):
        settings = script.Settings(model=str(tmp_path), device="cpu", kernels="triton")
        if script is eval:
            settings.data = str(tmp_path / "questions.jsonl")
            (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "text": "What?", "answer": "A cat"}\n')
        with pytest.raises(Error) as e:
            script.main(settings)
        assert str(e.value) == line
    monkeypatch.setattr("kernels.has_triton", False)
    assert refusal("align", world, tmp_path, kernels="triton") == "kernels=triton, but Triton is not installed"
    assert not (tmp_path / "checkpoints").exists() and kernels.choice == "auto"


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_blocks_learn_what_plain_ones_do(world, tmp_path, monkeypatch):
    """Each block in one graph, through streams of other lengths, and so few of them that the limit on compilations,
    after which torch goes on uncompiled, is not met: answering, with a cache, stays out of it. The backend that writes
    C++ has its test in test_engine.py and would take a minute here."""
    compiled, plain = [], torch.compile

    def in_one_graph(forward):
        compiled.append(type(forward.__self__).__name__)
        return plain(forward, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", in_one_graph)
    torch._dynamo.reset()
    for compile in (False, True):
        run("sft", world, tmp_path / str(compile), compile=compile, steps=2, dtype="fp64", eval_every=1,
            sample_every=1)
    assert sorted(compiled) == ["LlamaLayer"] * 2 + ["ViTBlock"] * 2
    a, b = ([r[k] for r in rows(tmp_path / name / "log.jsonl") for k in ("loss", "grad_norm") if k in r]
            for name in ("False", "True"))
    assert len(a) == 4 and a == pytest.approx(b, rel=1e-9)


def test_kernels_can_be_asked_for():
    interpret("scripts")


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_read(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    line = f"out={tmp_path / 'file' / 'run'}: {tmp_path / 'file'} is not a folder"
    assert refusal("align", world, tmp_path / "file" / "run", vision="no_eyes") == line
    with monkeypatch.context() as m:
        m.setattr("os.access", lambda path, mode: False)                          # root may write everywhere
        assert "cannot be written to" in refusal("align", world, tmp_path / "run", vision="no_eyes")
    line = refusal("align", world, "/proc/pumice/run")                            # which only the attempt shows
    assert line.startswith("out=/proc/pumice/run: ") and "\n" not in line


@pytest.mark.parametrize("resume", ["auto", "none"])
@pytest.mark.parametrize("theirs", ["config.json", "model/notes.txt", "checkpoints/best.pt", "log.jsonl"])
def test_a_folder_that_is_no_run_loses_nothing(world, tmp_path, resume, theirs):
    """A model's own folder named as `out`, say: its config.json would become ours."""
    file = tmp_path / "out" / theirs
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    line = f"out={tmp_path / 'out'}: it is no run, and its {theirs.split('/')[0]} would be lost"
    assert refusal("align", world, tmp_path / "out", resume=resume) == line
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [file] and file.read_text() == "{}"
    run("align", {**world, "val_data": "", "steps": 1}, tmp_path / "out", dry_run=True)


def test_a_closed_terminal_ends_no_run(world, tmp_path):
    def rank(_):
        hears, speaks = os.pipe()
        os.close(hears)
        sys.stdout = open(speaks, "w")
        run("align", world, tmp_path / "run")
        return engine.finish(0)
    assert fork(1, rank, tmp_path) == [0]
    assert (tmp_path / "run" / "finished.json").is_file() and len(rows(tmp_path / "run" / "log.jsonl")) == 8


def test_a_fixed_question_that_nobody_can_ask_or_print_stops_nothing(world, tmp_path, capsys):
    val = rows(Path(world["val_data"]))
    val[0]["conversations"][0]["value"] += "\ud800"
    val[1]["conversations"][1]["value"] += "\ud800"
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in val))
    how = {**world, "val_data": str(tmp_path / "val.jsonl")}
    run("sft", how, tmp_path / "run", steps=3)
    assert "(2 of 5 samples could not be used)" in capsys.readouterr().out
    assert [r["id"] for r in rows(tmp_path / "run" / "samples.jsonl")] == [102, 104]


def test_the_toy_world_that_cannot_be_drawn_is_one_line(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")
    toy = {**world, "data": "toy", "images": ".", "val_data": ""}
    assert refusal("align", toy, tmp_path / "out").startswith("the toy world cannot be drawn in runs/toy: ")


def test_a_setting_that_would_change_nothing_is_refused(world, aligned, tmp_path):
    how = {**world, "steps": 1}
    assert "data=toy brings its own images and val_data" in refusal("align", {**how, "data": "toy"}, tmp_path / "run")
    for idle in (dict(lora_alpha=8.0), dict(lora_dropout=0.1), dict(lora_targets="q_proj")):
        said = refusal("sft", how, tmp_path / "run", **idle)
        assert "means nothing while lora_r is 0" in said and [*idle][0] in said
    said = refusal("sft", how, tmp_path / "run", init=str(aligned), connector="linear")
    assert said == f"connector=linear, but that of {aligned} is mlp"
    assert "is no checkpoint: those of a run" in refusal("align", how, tmp_path / "run", resume=str(aligned))
    assert not (tmp_path / "run").exists()


def test_data_of_bad_samples_only_end_in_one_line_and_make_no_model(world, tmp_path):
    """For validation at the start, whatever eval_every says; for training where all may be dropped, and on resuming."""
    (tmp_path / "bad.jsonl").write_text("{}\n" * 9)
    how = {**world, "eval_every": 0, "sample_every": 0, "val_data": str(tmp_path / "bad.jsonl")}
    line = refusal("align", how, tmp_path / "run")
    assert line.startswith(f"{tmp_path / 'bad.jsonl'}: no sample can be used; bad.jsonl[") and "\n" not in line
    assert not (tmp_path / "run").exists()
    how |= {"val_data": "", "data": str(tmp_path / "bad.jsonl"), "max_dropped": 1.0}
    for _ in range(2):
        line = refusal("align", how, tmp_path / "run")
        assert line == ("nothing was learnt in 6 steps (24 of 24 samples dropped), so no model is written")
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "finished.json").exists()


def test_validation_pictures_that_go_while_training_stop_nothing(world, tmp_path, monkeypatch, capsys):
    shutil.copytree(world["images"], tmp_path / "images")
    lines = [r for r in open(world["val_data"]) if '"image"' in r]
    (tmp_path / "val.jsonl").write_text("".join(lines))
    count = stage.Run.count

    def vanishing(self, *args):
        for r in lines:
            (tmp_path / "images" / json.loads(r)["image"]).unlink(missing_ok=True)
        count(self, *args)
    monkeypatch.setattr(stage.Run, "count", vanishing)
    how = {**world, "images": str(tmp_path / "images"), "val_data": str(tmp_path / "val.jsonl")}
    run("align", how, tmp_path / "run")
    assert "validation loss nan (4 of 4 samples could not be used)" in capsys.readouterr().out
    assert [r["val_loss"] for r in rows(tmp_path / "run" / "log.jsonl") if "val_loss" in r] == [None, None]


def test_animated_pictures_are_counted_and_said(world, tmp_path, capsys):
    shutil.copytree(world["images"], tmp_path / "images")
    for i in (0, 4, 5):
        frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
        frames[0].save(tmp_path / "images" / f"{i}.png", save_all=True, append_images=frames[1:])
    how = {**world, "images": str(tmp_path / "images"), "batch_size": 11, "steps": 2, "val_data": ""}
    run("align", how, tmp_path / "run")
    assert "3 pictures are animated, only the first frame was looked at" in capsys.readouterr().out
    assert rows(tmp_path / "run" / "log.jsonl")[-1]["animated"] == 3
    data.main([world["data"], f"--images={tmp_path / 'images'}", f"--model={world['llm']}", "--image_tokens=4"])
    assert "(3 animated: only the first frame is looked at)" in capsys.readouterr().out


@pytest.mark.parametrize("how", [{}, {"resume": "none"}, {"overfit": True}])
def test_a_second_run_in_the_folder_of_a_living_one_is_refused_and_changes_nothing(world, tmp_path, how):
    out = tmp_path / "run" / "overfit" if "overfit" in how else tmp_path / "run"
    (hears, speaks), (ends, holds) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(holds)
            lock = checkpoint.claim(out)
            if loader := os.fork():                                               # which outlives its parent
                os.write(speaks, b"%d\n" % loader)
            os.read(ends, 1)                                                      # until the test ends, however it does
        finally:
            os._exit(bool(lock))
    os.close(speaks), os.close(ends)
    loader = int(os.read(hears, 99))                                              # nothing, where it could not be taken
    before = files(tmp_path)
    line = refusal("align", world, tmp_path / "run", **how)
    assert line == f"out={out}: another run is writing there, as long as it lives; --out=DIR writes elsewhere"
    assert files(tmp_path) == before
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    run("align", world, tmp_path / "run", **how, steps=1)
    os.kill(loader, 0)                                                            # it is still there
    os.close(hears), os.close(holds)


def test_where_nothing_can_be_locked_a_run_says_so_and_goes_on(world, tmp_path, monkeypatch, capsys):
    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.lockf", lockf)
    run("align", world, tmp_path / "run", steps=1)
    assert "cannot be locked (No locks available): nothing will notice a second run" in capsys.readouterr().out
    assert (tmp_path / "run" / "finished.json").is_file()


def test_a_dry_run_stops_where_the_run_would(world, tmp_path, capsys):
    """In the samples of its first step, and in the validation file; and then no sample is shown as if all were well."""
    (tmp_path / "bad.jsonl").write_text("{}\n" * 9)
    bad, out = str(tmp_path / "bad.jsonl"), tmp_path / "run"
    wrong = [dict(data=bad), dict(images=str(tmp_path)), dict(images="gone"), dict(val_data="gone"),
             dict(val_data=bad), dict(val_data=str(tmp_path))]
    said = [refusal("align", world, out, **w, dry_run=True) for w in wrong]
    assert "what is learnt in green" not in capsys.readouterr().out
    assert run("align", {**world, "data": bad}, out, dry_run=True, max_dropped=1.0) == 1
    said_of = capsys.readouterr().out
    assert "none of the first step's samples can be used" in said_of
    assert "  4 of these samples cannot be used, as bad.jsonl[" in said_of and "id=None: no conversations" in said_of
    run("align", {**world, "val_data": ""}, out, images=str(tmp_path), batch_size=22, max_dropped=1.0, dry_run=True)
    assert "0 image(s), what is learnt in green" in capsys.readouterr().out                # not one whose picture is gone
    assert not out.exists()
    assert said == [refusal("align", world, out, **w) for w in wrong]


def test_a_gradient_that_is_not_finite_is_seen_on_any_step_and_ten_in_a_row_stop_the_run(world, tmp_path, monkeypatch,
                                                                                         capsys):
    calls = []

    def poisoned(bad, model, batch):
        calls.append(0)
        return token_loss(model, batch) * (torch.nan if bad(len(calls)) else 1)
    settings = {**world, "val_data": "", "max_tokens": 1000, "log_every": 100, "steps": 20}
    monkeypatch.setattr(train_align, "token_loss", functools.partial(poisoned, lambda call: call == 3))
    run("align", settings, tmp_path / "once", steps=6)
    assert "step 3: gradient norm nan" in capsys.readouterr().out
    assert rows(tmp_path / "once" / "log.jsonl")[-1]["skipped_updates"] == 1
    calls.clear()
    monkeypatch.setattr(train_align, "token_loss", functools.partial(poisoned, lambda call: call == 2 or call > 4))
    line = refusal("align", settings, tmp_path / "ever")
    assert "10 updates in a row" in line and "step 14" in line and "train.jsonl[" in line
    with open(tmp_path / "once" / "log.jsonl") as f:
        assert "NaN" not in f.read()


# ---- what is printed before anything is spent -----------------------------------------------------------------------

class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes that tensors made in here held at once."""

    def __init__(self):
        super().__init__()
        self.most, self.known = 0, {}

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **(kwargs or {}))
        self.known = {k: v for k, v in self.known.items() if not v[0].expired()}
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.known.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.most = max(self.most, sum(size for _, size in self.known.values()))
        return out


@pytest.mark.parametrize("also, lora_r, recompute", [([], 0, "none"), (["language_model.*"], 0, "none"),
                                                     (["language_model.*"], 0, "block"), (["*.lora_*"], 8, "none")])
def test_the_plan_guesses_memory_within_a_factor_of_two(also, lora_r, recompute):
    torch.manual_seed(0)
    model = VLM(VLMConfig(VisionConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=5,
                                       num_attention_heads=4, image_size=48, patch_size=8),
                          TextConfig(vocab_size=1024, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
                                     num_attention_heads=4, num_key_value_heads=4, head_dim=32), image_token_index=3))
    init_weights(model)
    if lora_r:
        lora.add_adapters(model, lora_r, 16, 0.0, "all-linear")
    w = engine.World(0, 1, torch.device("cpu"), torch.float32)
    lrs = engine.choose(model, dict.fromkeys(["multi_modal_projector.*", *also], 1e-3), torch.float32)
    micro = [data.pack([example(i, 30 + i % 50, 10, 1, 36, 48) for i in range(20)], 48)]
    s = types.SimpleNamespace(parallel="auto", recompute=recompute, batch_size=20)
    guess = sum(plan.memory(model, w, micro, s))
    text = "\n".join(plan.lines(model, lrs, w, micro, 5, s))
    assert f"{len(micro[0].ids):,} tokens in 1 stream(s), 200 supervised, 20 images" in text and "GFLOP" in text
    blocks = [*model.vision_tower.vision_model.encoder.layers, *model.language_model.model.layers]
    engine.parallelize(model, w, blocks, recompute=recompute)
    optimizer = engine.adamw(model, lrs, 0.0)
    with Peak() as peak:
        for step in range(2):
            train_step(model, optimizer, micro, token_loss, w)
    measured = peak.most + sum(p.nbytes for p in model.parameters())
    print(f"guess {guess / 2**20:.1f} MiB, measured {measured / 2**20:.1f}")
    assert measured / 2 < guess < measured * 2


@pytest.mark.parametrize("R, rows", [(100, 100), (5000, CHUNK_ROWS)])
def test_the_plan_counts_the_logits_that_the_loss_makes(R, rows):
    """At 128k words a chunk is bounded by its rows: 2 GB in fp32, where a guess of 256 rows said a quarter of one."""
    model = VLM(tiny_config(vocab_size=128256))
    w = engine.World(0, 1, torch.device("cpu"), torch.float32)
    s = types.SimpleNamespace(parallel="auto", recompute="block", batch_size=1)
    ids, spans = torch.zeros(R, dtype=torch.long), torch.arange(R)
    work = plan.memory(model, w, [types.SimpleNamespace(ids=ids, labels=ids, lo=spans, hi=spans + 1)], s)[1]
    assert rows * 128256 * 8 <= work < 1.05 * rows * 128256 * 8


def strip(code):
    """Source lines without comments and blank lines."""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type == tokenize.COMMENT]
    lines = code.splitlines()
    for t in tokens:
        lines[t.start[0] - 1] = lines[t.start[0] - 1][: t.start[1]]
    return [line.rstrip() for line in lines if line.strip()]


def loop(source):
    a, b = source.index("# ---- the loop"), source.rindex("# ------")
    return strip(inspect.cleandoc(" " * 4 + source[a:b]))


def test_the_two_scripts_print_the_same_loop():
    one, two = (loop(open(m.__file__).read()) for m in (train_align, train_sft))
    assert one == two and len(one) > 15 and "engine.train_step" in "".join(one)
    changed = open(train_sft.__file__).read().replace("run.count(step, batch, result, waited)", "run.count(step)")
    assert loop(changed) != one
