"""The folder of a run: what may be written there, which run goes on there, and which is refused."""

import dataclasses
import errno
import functools
import json
import os
import shutil
import signal
import types
from pathlib import Path

import pytest
import torch
from conftest import error, fork
from safetensors.torch import load_file, save_file
from tiny_runs import LORA, SCRIPTS, files, refusal, rows, run, state, write_data

import engine
from config import setting_facts
from run import folder
from run.folder import RunFolder

# ---- may we write there? --------------------------------------------------------------------------------------------

def test_the_nearest_folder_says_whether_we_may_write(tmp_path, monkeypatch):
    assert folder.unwritable(tmp_path / "a" / "b") is None and not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    assert folder.unwritable(tmp_path / "file" / "b") == f"{tmp_path / 'file'} is not a folder"
    monkeypatch.setattr("os.access", lambda path, mode: False)                 # root may write everywhere
    assert folder.unwritable(tmp_path / "a" / "b") == f"{tmp_path} cannot be written to"


def test_an_unwritable_folder_is_named_first(world, tmp_path):
    (tmp_path / "file").write_text("")
    line = f"out={tmp_path / 'file' / 'run'}: {tmp_path / 'file'} is not a folder"
    assert refusal("align", world, tmp_path / "file" / "run", vision="no_tower") == line
    line = refusal("align", world, "/proc/pumice/run")                         # which only the attempt shows
    assert line.startswith("out=/proc/pumice/run: ") and "\n" not in line


@pytest.mark.parametrize("theirs", ["config.json", "model/notes.txt", "checkpoints/best.pt", "log.jsonl"])
def test_a_folder_that_is_no_run_loses_nothing(world, tmp_path, theirs):
    """Of a model's own folder, named as `out`, the config.json would be replaced."""
    file = tmp_path / "out" / theirs
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    line = f"out={tmp_path / 'out'}: it is not a run, and its {theirs.split('/')[0]} would be lost"
    assert all(refusal("align", world, tmp_path / "out", resume=resume) == line for resume in ("auto", "none"))
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [file] and file.read_text() == "{}"


@pytest.mark.parametrize("how", [{"resume": "none"}, {"overfit": True}])
def test_a_second_run_in_one_folder_is_refused(world, tmp_path, how):
    out = tmp_path / "run" / "overfit" if "overfit" in how else tmp_path / "run"
    (hears, speaks), (ends, holds) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(holds)
            lock = folder.claim(out)
            if loader := os.fork():                                            # which outlives its parent
                os.write(speaks, b"%d\n" % loader)
            os.read(ends, 1)                                                   # until the test ends, however it does
        finally:
            os._exit(bool(lock))
    os.close(speaks), os.close(ends)
    loader = int(os.read(hears, 99))                                           # empty where the lock was not taken
    before = files(tmp_path)
    line = refusal("align", world, tmp_path / "run", **how)
    assert line == f"out={out}: another run is writing there; --out=DIR writes elsewhere"
    assert files(tmp_path) == before
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    run("align", world, tmp_path / "run", **how, steps=1)
    os.kill(loader, 0)                                                         # it is still there
    os.close(hears), os.close(holds)


def test_without_locks_a_run_only_warns(tmp_path, monkeypatch):
    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.lockf", lockf)
    said = []
    assert folder.claim(tmp_path / "run", said.append)
    assert "cannot be locked (No locks available): a second run that writes there would not be noticed" in said[0]


def test_a_disk_without_room_stops_first(world, tmp_path, monkeypatch, capsys):
    """There must be room for one checkpoint; where there is none for all of them, a note says so."""
    weights = 4 * 2112                                                         # of the connector, in bytes
    one, all_of_them = 3 * weights, 3 * 3 * weights + 2 * 67_200               # keep_last + 1, and model/ in fp16

    def free(n):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=n))
    free(one - 1)
    with monkeypatch.context() as m:
        m.setattr(engine, "adamw", lambda *a: pytest.fail("too late"))
        assert "0.0 GiB are free, one checkpoint takes 0.0" in refusal("align", world, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for n, note in ((one, True), (all_of_them - 1, True), (all_of_them, False)):
        free(n)
        run("align", world, tmp_path / f"{n}", steps=1)
        assert ("are free, 3 checkpoints and model/ take" in capsys.readouterr().out) == note
    free(0)                                                                    # neither of these writes a checkpoint
    run("align", world, tmp_path / f"{one}", steps=1)
    assert run("align", world, tmp_path / f"{one}", steps=1, overfit=True) == 1


# ---- which run goes on? ---------------------------------------------------------------------------------------------

def other(value):
    """Another value of the same type"""
    return {bool: lambda: not value, str: lambda: value + "x", type(None): lambda: "x"}.get(
        type(value), lambda: value + 1)()


@pytest.mark.parametrize("kind", SCRIPTS)
def test_what_a_resumed_run_may_change(kind):
    """Every setting by what stands beside its field: same is refused, say and free pass."""
    Settings = SCRIPTS[kind].Settings
    s, found = Settings(), RunFolder.__new__(RunFolder)
    found.s, found.data, found.base, found.origin = s, "d", "b", "somewhere"
    facts = setting_facts(Settings)
    assert {"seed", "batch_size", "max_len", "template", "system", "image_aspect", "connector"} <= {
        key for key, fact in facts.items() if fact["resume"] == "same"}
    for key, fact in facts.items():
        before = {**dataclasses.asdict(s), key: other(getattr(s, key))}
        old = dict(data="d", base="b", settings=before)
        assert fact["resume"] in ("same", "say", "free"), key
        if fact["resume"] == "same":
            line = error(found.compare, "it", old, ("same",))
            assert line.startswith(f"it was trained with {key}={before[key]}, not {getattr(s, key)}; --resume=none")
        else:
            found.compare("it", old, ("same",))
    found.compare("it", dict(data="d", base="b", settings={}), ("same",))      # of an older version, without settings


@pytest.mark.parametrize("changes, words", [
    (dict(seed=1), "seed=0, not 1"), (dict(lora_r=0, lora_dropout=0.0), "lora_r=2, not 0"),
    (dict(train="*=1e-3", lora_r=0, lora_dropout=0.0), "lora_r=2, not 0"),
    (dict(vision_lr=1e-3, lora_targets="vision_tower.*q_proj"), "lora_targets=all-linear, not vision_tower.*q_proj"),
    (dict(image_aspect="crop"), "image_aspect=pad, not crop"),
    (dict(lora_alpha=8.0), "lora_alpha=64.0, not 8.0"), (dict(steps=1), "is of step 2 of 3 and only 1 are asked for"),
    (dict(steps=2), "its learning rate has not come down by then. --steps=3 goes on")])
def test_a_resumed_run_is_refused_and_loses_nothing(half, world, changes, words):
    before = files(half)
    line = refusal("sft", world, half, **{**LORA, "steps": 3, **changes})
    assert words in line and "--resume=none starts again" in line and "\n" not in line
    assert files(half) == before


@pytest.fixture(scope="module")
def half(world, tmp_path_factory):
    """A run of three steps that was stopped after its second one"""
    out = tmp_path_factory.mktemp("half") / "run"
    run("sft", world, out, **LORA, steps=3, save_every=1)
    shutil.rmtree(out / "checkpoints/step_0000003")
    (out / "finished.json").unlink()
    return out


def test_more_steps_go_on_and_none_starts_again(world, aligned, tmp_path, capsys):
    out = tmp_path / "run"
    run("align", world, out, steps=4)
    run("align", world, out, steps=6, lr=5e-3)
    said = capsys.readouterr().out
    assert "resumed with steps=6, before it was 4" in said and "resumed with lr=0.005, before it was 0.002" in said
    log = [r for r in rows(out / "log.jsonl") if "loss" in r]
    assert [r["step"] for r in log] == [1, 2, 3, 4, 5, 6] and log[-1]["lr"] == engine.lr_at(5, 6, 1, 5e-3)
    run("align", world, out, resume="none")
    assert [r["step"] for r in rows(out / "log.jsonl") if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert state(out) == state(aligned)


def test_a_finished_run_changes_no_file(validated, world, aligned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "update", lambda *a, **k: pytest.fail("a step"))
    before = files(aligned)
    for changes in ({}, {"steps": 4}, {"log_every": 5, "workers": 1, "max_tokens": 48}):
        assert run("align", validated, aligned, **changes) is None
        assert "is finished (6 steps): nothing to do" in capsys.readouterr().out
    other = tmp_path / "llm"
    other.symlink_to(world["llm"])
    for changes, words in ((dict(lr=0.1), "lr=0.002, not 0.1"), (dict(save_dtype="fp32"), "save_dtype=auto, not fp32"),
                           (dict(llm=str(other)), f"llm={world['llm']}, not {other}")):
        line = refusal("align", validated, aligned, **changes)
        assert f"the finished run in {aligned} was trained with {words}" in line
    file = tmp_path / "data.jsonl"
    file.write_text(open(world["data"]).read().replace("black cat, 0", "black dog, 0"))
    assert "was trained on other data" in refusal("align", {**validated, "data": str(file)}, aligned)
    assert files(aligned) == before


def test_rank_0_decides_that_a_run_is_finished(aligned, tmp_path):
    """The other ranks may be on a machine that does not see the folder yet."""
    state = json.loads((aligned / "finished.json").read_text())

    def rank(r):
        s = SCRIPTS["align"].Settings(**{**state["settings"], "resume": "auto"})
        found = RunFolder.__new__(RunFolder)
        found.s, found.steps, found.data, found.base = s, 6, state["data"], state["base"]
        found.world = engine.World(r, 2, torch.device("cpu"), torch.float32)
        found.out = tmp_path / "unseen" if r else aligned
        return found.is_finished()
    assert fork(2, rank, tmp_path) == [True, True]


def test_a_checkpoint_without_steps_left_is_published_elsewhere(world, aligned, tmp_path):
    assert run("align", world, tmp_path / "b", resume=str(aligned / "checkpoints/step_0000006")) is None
    one, other = (load_file(out / "model/model.safetensors") for out in (aligned, tmp_path / "b"))
    assert one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)
    shutil.rmtree(tmp_path / "b/model")
    assert run("align", world, tmp_path / "b") is None and (tmp_path / "b/model/model.safetensors").is_file()


def test_a_run_resumed_elsewhere_keeps_its_counts(world, tmp_path):
    (tmp_path / "bad.jsonl").write_text(Path(world["data"]).read_text() + "{}\n" * 2)      # 24 samples, in six steps
    a, b = (functools.partial(run, "align", {**world, "data": str(tmp_path / "bad.jsonl")}, tmp_path / out)
            for out in "ab")
    a()
    b(resume=str(tmp_path / "a/checkpoints/step_0000004"))
    one, other = (json.loads((tmp_path / out / "checkpoints/step_0000006/state.json").read_text()) for out in "ab")
    assert one["seen"]["samples"] == 24 and one["reasons"]["no conversations"][0] == 2
    del one["settings"], other["settings"]
    assert one == other


def test_other_data_and_another_mixture_are_refused(world, tmp_path):
    a, b = world["data"], write_data(tmp_path, "b.jsonl", 22)
    text, settings = b.read_text(), {**world, "images": str(tmp_path / "images")}
    run("align", settings, tmp_path / "run", steps=2, data=f"{b}:0.5,{a}:0.5")
    line = refusal("align", settings, tmp_path / "run", data=f"{b}:0.2,{a}:0.8")
    assert "or on another mixture of it" in line
    b.write_text(text.replace("black cat, 0", "black dog, 0"))
    assert "was trained on other data" in refusal("align", settings, tmp_path / "run", data=f"{b}:0.5,{a}:0.5")
    (tmp_path / "c.jsonl").write_text(text)                                    # the same data under another name
    run("align", settings, tmp_path / "run", steps=3, data=f"{tmp_path / 'c.jsonl'}:0.5,{a}:0.5")


def test_another_base_is_refused(world, tmp_path):
    """Frozen weights that have changed; those that train come from the checkpoint."""
    shutil.copytree(world["llm"], tmp_path / "llm")
    settings = {**world, "llm": str(tmp_path / "llm")}
    run("align", settings, tmp_path / "run", steps=2)
    run("sft", settings, tmp_path / "whole", steps=2)
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "llm" / "model.safetensors")
    assert "the finished run in" in refusal("align", settings, tmp_path / "run", steps=2)
    line = refusal("align", settings, tmp_path / "run")
    assert "step_0000002 was trained on another base" in line and str(tmp_path / "llm") in line
    run("sft", settings, tmp_path / "whole", steps=3)


def test_nothing_is_deleted_before_the_first_step(world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run("align", world, out, steps=4)
    before = files(out)
    for changes in (dict(vision="no_tower"), dict(images=str(tmp_path))):
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
