"""Weights in the loss: of samples (loss=sample) and of files (a.json:0.7:0.2). One gradient however a step is cut."""

import json

import pytest
import torch
from conftest import fork, tiny_vlm, train_step
from safetensors.torch import load_file
from test_distributed import ALONE, GATE, SAMPLES, TWO, Spy, error, spread, world
from tiny_runs import refusal, rows, run, write_data

import engine
from data import Encoder, Steps, pack
from formats.tokenizer import Tokenizer
from images import ImageSpec, Layout
from kernels.cross_entropy import IGNORE
from loss import token_loss, total_weight

COUNTS = [sum(y != IGNORE for y in labels[1:]) for _, labels, _ in SAMPLES]
MEAN = [1 / n for n in COUNTS]                                    # loss=sample
FILES = [1.0, 0.2, 0.03, 1.0, 0.2, 0.2, 1.0, 0.03]                # a weight per file
WEIGHTS = {"sample": MEAN, "files": FILES, "both": [a * b for a, b in zip(MEAN, FILES)]}


def batches(groups, weights):
    return [pack([SAMPLES[i] for i in group], 8, weights=[weights[i] for i in group]) for group in groups]


def weighted(groups, weights, w=None, wrap=None, loss=token_loss):
    """-> gradients by name, result of a step"""
    model, w = tiny_vlm(), w or world()
    engine.choose(model, {"*": 1e-2}, torch.float64)
    if w.size > 1:
        model = engine.parallelize(model, w, [*model.language_model.model.layers], wrap)
    spy = Spy(model)
    result = train_step(model, spy, batches(groups, weights), loss, w, check=True)
    return getattr(spy, "seen", None), result


def definition(weights, indices=range(8)):
    """Each sample alone by the unweighted loss, multiplied, summed, divided once -> gradients, loss"""
    model, total = tiny_vlm(), 0.0
    weights = torch.tensor(weights).double()                      # fp32, as in a batch
    n = sum(weights[i] * COUNTS[i] for i in indices)
    for i in indices:
        loss = weights[i] * token_loss(model, pack([SAMPLES[i]], 8)) / n
        loss.backward()
        total += loss.item()
    return {k: p.grad for k, p in model.named_parameters()}, total


# ---- one step -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("groups", [[[*range(8)]], ALONE, [[7, 0], [], [3, 1, 6, 2, 5, 4]]])
def test_weighted_micro_batches_give_one_gradient(kind, groups):
    truth, loss = definition(WEIGHTS[kind])
    found, result = weighted(groups, WEIGHTS[kind])
    assert error(found, truth) < GATE and abs(result["loss"] / loss - 1) < GATE
    assert result["supervised_tokens"] == sum(COUNTS) != result["n"]
    assert kind != "sample" or abs(result["n"] - 8) < 1e-6, "eight samples count 1 each"


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_weighted_ranks_give_the_gradient_of_one(wrap, tmp_path):
    truth, loss = definition(WEIGHTS["both"])
    found, results = spread(tmp_path, TWO, wrap, lambda groups, w, wrap: weighted(groups, WEIGHTS["both"], w, wrap))
    assert error(found, truth) < GATE and all(abs(r["loss"] / loss - 1) < GATE for r in results)


@pytest.mark.parametrize("name, groups, loss", [
    ("no weights", [[*range(8)]], lambda m, b: token_loss(m, b._replace(weights=torch.zeros(0)))),
    ("weights in bf16", [[*range(8)]], lambda m, b: token_loss(m, b._replace(weights=b.weights.bfloat16()))),
    ("mean of means", [[0, 1, 2, 3], [4, 5, 6, 7]], lambda m, b: token_loss(m, b) / total_weight(b) * 4),
    ("weights of the next row", [[*range(8)]], lambda m, b: token_loss(m, b._replace(weights=b.weights.roll(1))))])
def test_a_wrong_weight_would_fail_by_far(name, groups, loss):
    truth, _ = definition(WEIGHTS["both"])
    assert error(weighted(groups, WEIGHTS["both"], loss=loss)[0], truth) > 1000 * GATE


def test_weights_of_one_change_no_bit():
    plain, result = weighted([[0, 1, 2, 3], [4, 5, 6, 7]], [1.0] * 8)
    assert not len(batches([[0, 1]], [1.0] * 8)[0].weights), "no weights are stored"
    ones = weighted([[0, 1, 2, 3], [4, 5, 6, 7]], [1.0] * 8,
                    loss=lambda m, b: token_loss(m, b._replace(weights=torch.ones(int((b.labels >= 0).sum())))))
    assert all(torch.equal(plain[k], ones[0][k]) for k in plain) and result["loss"] == ones[1]["loss"]


def test_weights_of_zero_train_on_the_rest():
    weights, rest = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [0, 2, 3, 6]
    found, result = weighted([[*range(8)]], weights)
    truth, other = weighted([rest], [1.0] * 8)
    assert error(found, truth) < GATE and result["n"] == other["n"] == sum(COUNTS[i] for i in rest)
    assert abs(result["loss"] / other["loss"] - 1) < GATE


def test_a_step_of_weight_zero_changes_nothing():
    for micro in ([[0, 1]], [[]]):
        assert not weighted(micro, [0.0] * 8)[1]["updated"]


def test_fsdp_in_bf16_rounds_no_weight(tmp_path):
    """FSDP can cast the inputs of a model to bf16: weights of 1/3 would then be off by 1/500."""
    def rank(r):
        w = engine.World(r, 2, torch.device("cpu"), torch.bfloat16)
        model, seen = tiny_vlm(dtype=torch.float32), []
        engine.choose(model, {"*": 1e-2}, torch.bfloat16)
        layer = model.language_model.model.layers[0]
        layer.register_forward_hook(lambda m, given, out: seen.append(given[1].dtype))
        model = engine.parallelize(model, w, [*model.language_model.model.layers], "fsdp")
        batch, = batches([[0, 1]], MEAN)
        with w.autocast():
            model(*batch, head=lambda h, v, y, weights: seen.append(weights.equal(batch.weights)))
        return [str(x) for x in seen]
    assert fork(2, rank, tmp_path) == [["torch.float32", "True"]] * 2, "rotary angles, weights"


# ---- from the settings ----------------------------------------------------------------------------------------------

@pytest.fixture
def steps(tmp_path, bytes_folder):
    """-> function of spec, loss, rank, size: Steps over two files of 9 and 7 samples"""
    one, two = (write_data(tmp_path, name, n, seed) for name, n, seed in (("a.jsonl", 9, 0), ("b.jsonl", 7, 20)))
    encode = Encoder(Tokenizer(bytes_folder), "vicuna_v1", Layout(3, 4), 22, "")

    def make(spec="{a},{b}", loss="token", rank=0, size=1):
        return Steps(spec.format(a=one, b=two), str(tmp_path / "images"), encode, ImageSpec(8, "squash"), 8, 64, 0,
                     rank, size, loss=loss)
    return make


def by_document(batch):
    """-> for each document of a batch, the weights of its supervised tokens"""
    rows = batch.labels != IGNORE
    doc = ((batch.pos == 0).cumsum(0) - 1)[rows]
    weights = batch.weights if len(batch.weights) else torch.ones(len(doc))
    return [weights[doc == d] for d in range(int(doc.max()) + 1)]


def test_each_sample_counts_one_or_each_token(steps):
    assert all(not len(b.weights) for b in steps()[0].micro), "weights of 1 are not stored"
    drawn = steps(loss="sample")[0]
    parts = [w for b in drawn.micro for w in by_document(b)]
    assert len(parts) == 8 and len({len(w) for w in parts}) > 1
    for w in parts:
        assert w.tolist() == [torch.tensor(1 / len(w)).item()] * len(w)
    assert drawn.truncated > 0, "the tokens that remain share the weight"


def test_a_file_has_a_weight_of_its_loss(steps):
    plain, drawn = (steps(spec)[0] for spec in ("{a}:0.5,{b}:0.5", "{a}:0.5:1.0,{b}:0.5:0.2"))
    assert plain.names == drawn.names and any("b.jsonl" in n for n in drawn.names)
    weights = [sorted(set(w.tolist())) for b in drawn.micro for w in by_document(b)]
    of_file = [[1.0] if n.startswith("a") else [torch.tensor(0.2).item()] for n in drawn.names]
    assert sorted(weights) == sorted(of_file)
    both = steps("{a}:0.5:1.0,{b}:0.5:0.2", "sample")[0]
    total = sum(total_weight(b) for b in both.micro)
    assert abs(total - sum(w[0] for w in of_file)) < 1e-6, "a sample counts its file's weight"
    natural = steps("{a}::3,{b}")                                 # no shares, one weight
    assert natural.weights == [3.0, 1.0] and natural.counts.tolist() == [9, 7]


def test_ranks_share_weights_exactly(steps):
    spec = "{a}:0.5:1.0,{b}:0.5:0.2"
    one = sorted(w for b in steps(spec, "sample")[0].micro for w in b.weights.tolist())
    two = sorted(w for r in (0, 1) for b in steps(spec, "sample", r, 2)[0].micro for w in b.weights.tolist())
    assert one == two


# ---- runs -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mixed(world):
    """Settings of a run over two files with weights, each sample counted once"""
    from pathlib import Path
    other = write_data(Path(world["images"]).parent, "other.jsonl", 9, 40)
    return {**world, "data": f"{world['data']}:0.6:1.0,{other}:0.4:0.2", "loss": "sample", "steps": 2, "save_every": 2}


def weights_after(out):
    return load_file(out / "checkpoints/step_0000002/trained.safetensors")


def test_a_run_resumes_only_with_its_weights(mixed, tmp_path):
    run("sft", mixed, tmp_path / "run")
    assert "loss=sample, not token" in refusal("sft", {**mixed, "loss": "token"}, tmp_path / "run", steps=4)
    other = mixed["data"].replace("0.2", "0.3")
    assert "another mixture" in refusal("sft", {**mixed, "data": other}, tmp_path / "run", steps=4)
    for name, changes in (("token", {"loss": "token"}), ("files", {"data": other})):
        run("sft", {**mixed, **changes}, tmp_path / name)
        assert any(not torch.equal(a, b) for a, b in zip(weights_after(tmp_path / "run").values(),
                                                         weights_after(tmp_path / name).values())), name
    assert json.loads((tmp_path / "run/config.json").read_text())["settings"]["loss"] == "sample"


@pytest.mark.parametrize("parallel, changes", [("ddp", {"lora_r": 2}), ("fsdp", {}), ("ddp", {"recompute": "block"})])
def test_two_processes_train_the_weighted_loss(parallel, changes, mixed, tmp_path):
    settings = {**mixed, "dtype": "fp64", **changes}
    run("sft", settings, tmp_path / "one")
    fork(2, lambda rank: run("sft", settings, tmp_path / "two", parallel=parallel), tmp_path)
    one, two = (weights_after(tmp_path / name) for name in ("one", "two"))
    assert max(((one[k] - two[k]).norm() / one[k].norm()).item() for k in one) < 1e-10
    for x, y in zip(*(rows(tmp_path / name / "log.jsonl") for name in ("one", "two")), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-9)


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_blocks_train_the_weighted_loss(mixed, tmp_path, monkeypatch):
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: plain(f, fullgraph=True, backend="eager"))
    torch._dynamo.reset()
    for compile in (False, True):
        run("sft", {**mixed, "dtype": "fp64"}, tmp_path / str(compile), compile=compile)
    a, b = (weights_after(tmp_path / name) for name in ("False", "True"))
    assert max(((a[k] - b[k]).norm() / a[k].norm()).item() for k in a) < 1e-10
