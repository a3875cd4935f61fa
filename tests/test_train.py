"""The two training scripts from end to end: every setting reaches the optimizer, and the loop is the same in both."""

import gc
import inspect
import io
import json
import os
import sys
import tokenize
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fork
from interpret import interpret
from safetensors.torch import load_file
from tiny_runs import LORA, SCRIPTS, halves_agree, rows, run, state

import config
import engine
import generate
import train_sft
from formats import llava
from run import log
from run.arguments import run_recipe

MODEL = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "manifest.json",
         "model.safetensors", "pumice.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
         "tokenizer_config.json"}


# ---- what a run leaves ----------------------------------------------------------------------------------------------

def test_a_run_folder_holds_what_is_promised(aligned):
    assert {p.name for p in aligned.iterdir()} == {"config.json", "log.jsonl", "samples.jsonl", "checkpoints", "model",
                                                   "finished.json", ".lock"}
    assert sorted(p.name for p in (aligned / "checkpoints").iterdir()) == ["step_0000004", "step_0000006"]
    assert MODEL <= {p.name for p in (aligned / "model").iterdir()}
    about = json.loads((aligned / "config.json").read_text())
    assert about["settings"]["batch_size"] == 4 and about["versions"]["torch"] == torch.__version__
    lines = rows(aligned / "log.jsonl")
    assert [r["step"] for r in lines if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in lines if "val_loss" in r] == [3, 6]
    assert {"step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tokens_per_s", "samples_per_s", "mfu",
            "memory", "data_wait_s", "eta"} <= set(lines[0])
    assert [r["lr"] for r in lines if "loss" in r] == [engine.lr_at(i, 6, 1, 2e-3) for i in range(6)]
    samples = rows(aligned / "samples.jsonl")
    assert [r["step"] for r in samples] == [3] * 4 + [6] * 4 and {"prompt", "expected", "answer"} < set(samples[0])


def test_stage_1_trains_the_connector_alone(world, aligned):
    before = llava.load_model(world["vision"], world["llm"])[0].state_dict()
    after = load_file(aligned / "model/model.safetensors")
    added = after.keys() - before.keys()                                       # what LLaVA has and never reads
    assert all(k.startswith("vision_tower.vision_model.post_layernorm.") for k in added)
    assert {k.split(".")[0] for k in after.keys() - added
            if not torch.equal(after[k], before[k].to(after[k].dtype))} == {"multi_modal_projector"}


@pytest.mark.parametrize("changes, tower", [
    ({}, "frozen"), (dict(vision_lr=1e-3), "trained"), (dict(vision_lr=1e-3, **LORA), "trained"),
    (dict(vision_lr=1e-3, lora_targets="vision_tower.*q_proj,q_proj", **LORA), "adapted"),
    (dict(lora_targets="vision_tower.*q_proj,q_proj", **LORA), "adapted at lr")])
def test_the_vision_tower_trains_where_vision_lr_says(changes, tower, world, tmp_path, monkeypatch):
    """Whole or by adapters, with its own rate; what is published has it, alike in model/ and adapter/."""
    made, adamw = [], engine.adamw
    monkeypatch.setattr(engine, "adamw", lambda *a, **how: (made.append(adamw(*a, **how)), made[0])[1])
    run("sft", world, tmp_path / "run", steps=1, connector_lr=2e-3, lr=4e-3, **changes)
    rates = {n: g["peak"] for g in made[0].param_groups for n in g["names"]}
    in_tower = {n: lr for n, lr in rates.items() if n.startswith("vision_tower.")}
    assert {lr for n, lr in rates.items() if n.startswith("multi_modal")} == {2e-3}
    assert {lr for n, lr in rates.items() if n.startswith("language")} == {4e-3}
    assert set(in_tower.values()) == ({4e-3} if tower == "adapted at lr" else {1e-3} if in_tower else set())
    assert bool(in_tower) == (tower != "frozen") and all("lora_" in n for n in in_tower) == (tower != "trained")
    before = llava.load_model(world["vision"], world["llm"])[0].state_dict()
    after = load_file(tmp_path / "run/model/model.safetensors")
    moved = {n for n in before if n.startswith("vision_tower.") and not torch.equal(after[n], before[n].half())}
    assert any(n.endswith("q_proj.weight") for n in moved) == (tower != "frozen")
    assert any(n.endswith("patch_embedding.weight") for n in moved) == (tower == "trained")
    if "lora_r" in changes and tower != "frozen":
        whole, ours = (generate.Chat(tmp_path / "run" / part, "cpu", "fp32") for part in ("model", "adapter"))
        halves_agree(ours, whole)


# ---- every setting does something -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two_steps(world, tmp_path_factory):
    """(kind, changes) -> digests of weights and moments, the names of the samples of each step"""
    def go(kind, **changes):
        out, seen, count = tmp_path_factory.mktemp("two") / "run", [], log.Log.count
        with pytest.MonkeyPatch.context() as m:
            m.setattr(log.Log, "count", lambda self, step, batch, result: (seen.append(sorted(batch.names)),
                                                                          count(self, step, batch, result)))
            run(kind, world, out, **{**dict(steps=2, save_every=0), **changes})
        found = state(out, 2)
        return found["trained"], found["optimizer"], seen
    return go


@pytest.mark.parametrize("kind, how, changes", [
    ("align", {}, dict(lr=1e-3, warmup=0.6, weight_decay=0.5, grad_clip=1e-3)),
    ("sft", {}, dict(lr=1e-3, connector_lr=1e-3, vision_lr=1e-3, warmup=0.6, weight_decay=0.5, grad_clip=1e-3)),
    ("sft", dict(lora_r=2), dict(lr=1e-3, connector_lr=1e-3, vision_lr=1e-3, lora_alpha=8.0, lora_dropout=0.5,
                                 lora_targets="q_proj", bits=4, weight_decay=0.5, grad_clip=1e-3))],
    ids=["stage 1", "stage 2", "lora"])
def test_every_setting_alone_changes_the_weights(kind, how, changes, two_steps):
    weights, moments, names = two_steps(kind, **how)
    assert (weights, moments, names) == two_steps(kind, **how)
    for key, value in changes.items():
        found = two_steps(kind, **how, **{key: value})
        assert found[0] != weights and found[2] == names, key
        assert key != "grad_clip" or found[1] != moments, "AdamW hides the scale of a gradient, its moments do not"


def test_seed_draws_another_order_of_the_data(two_steps, aligned):
    """From `init`, so that no new weight depends on the seed"""
    one, other = (two_steps("sft", init=str(aligned), seed=seed) for seed in (0, 1))
    assert one[2] != other[2] and one[0] != other[0]


# ---- two processes --------------------------------------------------------------------------------------------------

def test_two_processes_train_what_one_does(validated, tmp_path, monkeypatch):
    """DDP and FSDP, with the validation loss"""
    monkeypatch.setattr(train_sft.stage.Validation, "answers", lambda *a: None)
    settings = {**validated, "dtype": "fp64", "steps": 3, "save_every": 3}
    run("sft", settings, tmp_path / "one")
    published = load_file(tmp_path / "one/model/model.safetensors")
    for parallel in ("ddp", "fsdp"):
        (tmp_path / parallel).mkdir()
        out = tmp_path / parallel / "run"
        fork(2, lambda rank: run("sft", settings, out, parallel=parallel), tmp_path / parallel)
        one, two = (load_file(p / "checkpoints/step_0000003/trained.safetensors") for p in (tmp_path / "one", out))
        assert max(((one[k] - two[k]).norm() / one[k].norm()).item() for k in one) < 1e-10
        for k, v in load_file(out / "model/model.safetensors").items():
            torch.testing.assert_close(v, published[k], rtol=1e-10, atol=1e-12)
        for x, y in zip(*(rows(p / "log.jsonl") for p in (tmp_path / "one", out)), strict=True):
            for key in ("loss", "val_loss", "grad_norm", "tokens", "supervised_tokens"):
                assert x.get(key, 0) == pytest.approx(y.get(key, 0), rel=1e-9)


# ---- other ways to the same weights ---------------------------------------------------------------------------------

@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_blocks_train_what_plain_ones_do(validated, tmp_path, monkeypatch, short_answers):
    """Each block in one graph, for packed sequences of several lengths, below the limit on compilations, after which
    torch goes on uncompiled. Generation with its cache stays out of it."""
    compiled, plain = [], torch.compile

    def in_one_graph(forward):
        compiled.append(type(forward.__self__).__name__)
        return plain(forward, fullgraph=True, backend="eager")
    monkeypatch.setattr(torch, "compile", in_one_graph)
    torch._dynamo.reset()
    for compile in (False, True):
        run("sft", validated, tmp_path / str(compile), compile=compile, steps=2, dtype="fp64")
    assert sorted(compiled) == ["LlamaLayer"] * 2 + ["ViTBlock"] * 2
    a, b = ([r[k] for r in rows(tmp_path / name / "log.jsonl") for k in ("loss", "grad_norm") if k in r]
            for name in ("False", "True"))
    assert len(a) == 4 and a == pytest.approx(b, rel=1e-9)


def test_kernels_can_be_asked_for():
    interpret("scripts")


# ---- a long life ----------------------------------------------------------------------------------------------------

def test_memory_does_not_grow_with_steps(world, tmp_path, monkeypatch):
    """Bytes in tensors after some steps, and those of the process. The latter may jump once, when the kernel joins
    small pages to large ones, but not twice."""
    held, count = [], log.Log.count

    def nbytes(t):
        try:
            return t.nbytes
        except RuntimeError:                                                   # what torch.compile left has no size
            return 0

    def held_now():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def noting(self, step, *args):
        count(self, step, *args)
        if step in (30, 60, 90):
            gc.collect()
            held.append((held_now(), sum(nbytes(t) for t in gc.get_objects() if type(t) is torch.Tensor)))
    monkeypatch.setattr(log.Log, "count", noting)
    run("sft", world, tmp_path / "run", steps=91, save_every=25, log_every=1, **LORA)
    resident, tensors = zip(*held)
    assert tensors[2] - tensors[0] < 25_000, held                              # the batches of 60 steps are 225 kB
    assert min(resident[1] - resident[0], resident[2] - resident[1]) < 2 * 2**20, held


def test_a_closed_terminal_ends_no_run(world, tmp_path):
    def rank(_):
        hears, speaks = os.pipe()
        os.close(hears)
        sys.stdout = open(speaks, "w")
        try:
            engine.leave(run("align", world, tmp_path / "run", steps=2) or 0)
        except SystemExit as e:
            return e.code
    assert fork(1, rank, tmp_path) == [0]
    assert (tmp_path / "run" / "finished.json").is_file() and len(rows(tmp_path / "run" / "log.jsonl")) == 2


# ---- the text of the scripts ----------------------------------------------------------------------------------------

def code(source):
    """Lines without comments and blank lines"""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    lines = source.splitlines()
    for t in tokens:
        lines[t.start[0] - 1] = lines[t.start[0] - 1][: t.start[1]]
    return [line.rstrip() for line in lines if line.strip()]


def split(source):
    """-> the loop and what surrounds it, both without comments"""
    first, last = source.index("    # ---- the loop"), source.rindex("    # ------")
    return code(inspect.cleandoc(source[first:last])), code(source[:first] + source[last:])


def test_both_scripts_show_the_same_short_loop():
    sources = [inspect.getsource(script) for script in SCRIPTS.values()]
    (one, before), (other, after) = map(split, sources)
    assert one == other and len(one) <= 35 and ".backward()" in "".join(one)
    changed = sources[1].replace("run.log.count(step, batch, result)", "run.log.count(step, batch)")
    assert split(changed)[0] != one
    alike = [line for line in after if line in before and line != '"""']
    assert len(alike) <= 0.17 * (len(after) + len(other)), alike               # 12 lines: imports, settings, main


def test_every_shared_setting_is_explained_once():
    shared = config.setting_facts(config.Common)
    for script in SCRIPTS.values():
        facts = config.setting_facts(script.Settings)
        assert all(fact["about"] and fact["resume"] in ("same", "say", "free") for fact in facts.values())
        assert all(facts[key] == fact for key, fact in shared.items()), "a script changes defaults alone"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.name)
def test_every_key_of_a_recipe_is_a_setting(recipe):
    for given in ({"stage": stage, "toy": toy} for stage in SCRIPTS for toy in (False, True)):
        keys = {k for k in run_recipe(recipe, given)}
        assert keys and keys <= set(config.setting_facts(SCRIPTS[given["stage"]].Settings))
