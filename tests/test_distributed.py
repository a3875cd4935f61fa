"""However one optimizer step is cut into micro-batches and ranks, it is the same step: in float64 correct layouts agree
to 1e-14, and the classic mistakes differ by ten orders of magnitude."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from conftest import example, fork, tiny_vlm, train_step
from conftest import cpu_world as world
from safetensors.torch import load_file, save_file

import engine
from config import Error
from data import Batch, pack
from loss import token_loss

GATE = 1e-12
TEXT, ANSWERS = [38, 9, 15, 18, 27, 14, 29, 9], [30, 2, 11, 4, 20, 1, 9, 3]  # ragged, so that a mean of means shows
IMAGES = [1, 0, 2, 1, 1, 3, 0, 0]                                           # the last two are text alone
SAMPLES = [example(i, *shape) for i, shape in enumerate(zip(TEXT, ANSWERS, IMAGES))]
ALONE = [[i] for i in range(8)]
TABLE = {"*": 1e-2}


def batches(groups):
    return [pack([SAMPLES[i] for i in group], 8) for group in groups]


class Spy:
    """An optimizer that keeps the gradients and changes nothing."""

    def __init__(self, model):
        self.model = model

    def step(self):
        self.seen = {n: engine.whole_tensor(p.grad).clone() for n, p in engine.unwrap(self.model).named_parameters()
                     if p.requires_grad}

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none)


def gradients(groups, w=None, model=None, loss=token_loss, wrap=None, clip=0.0):
    """-> gradients by name, result of the step"""
    w = w or world()
    model = model or tiny_vlm()
    engine.choose(model, TABLE, torch.float64)
    if w.size > 1:
        model = engine.parallelize(model, w, [*model.language_model.model.layers], wrap)
    spy = Spy(model)
    return spy, train_step(model, spy, batches(groups), loss, w, clip, check=True)


def one_by_one(indices=range(8), **text):
    """The definition: each sample alone, summed, divided once."""
    model, n, total = tiny_vlm(**text), sum(ANSWERS[i] for i in indices), 0.0
    for b in batches([[i] for i in indices]):
        loss = token_loss(model, b) / n
        loss.backward()
        total += loss.item()
    return {k: p.grad for k, p in model.named_parameters()}, total


def error(found, truth):
    """Of the worst tensor, relative. A bias of keys moves no softmax: its gradient is rounding alone, not compared."""
    assert found.keys() == truth.keys()
    return max(((found[k] - truth[k]).norm() / truth[k].norm()).item() for k in truth if not k.endswith("k_proj.bias"))


@pytest.fixture(scope="module")
def truth():
    return one_by_one()


# ---- one process ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("groups", [[[*range(8)]], [[0, 1, 2, 3], [4, 5, 6, 7]], ALONE,
                                    [[7, 0], [], [3, 1, 6, 2, 5, 4]]])
def test_micro_batches_packed_anyhow_give_one_gradient(groups, truth):
    spy, result = gradients(groups)
    assert error(spy.seen, truth[0]) < GATE
    assert abs(result["loss"] / truth[1] - 1) < GATE
    assert (result["supervised_tokens"], result["tokens"]) == (sum(ANSWERS), sum(len(s[0]) for s in SAMPLES))
    norm = sum(g.square().sum() for g in truth[0].values()).sqrt().item()
    assert abs(result["grad_norm"] / norm - 1) < GATE


def test_a_mean_of_means_would_fail_by_far(truth):
    def mean_of_means(model, b):
        return token_loss(model, b) / (b.labels >= 0).sum() * sum(ANSWERS) / 2
    spy, result = gradients([[0, 1, 2, 3], [4, 5, 6, 7]], loss=mean_of_means)
    assert error(spy.seen, truth[0]) > 1000 * GATE
    assert abs(result["loss"] / truth[1] - 1) > 1000 * GATE


def test_attention_between_documents_would_fail_by_far(truth):
    def leaky(model, b):
        return token_loss(model, b._replace(lo=torch.zeros_like(b.lo)))
    assert error(gradients([[*range(8)]], loss=leaky)[0].seen, truth[0]) > 1000 * GATE


def test_labels_over_the_edge_would_fail_by_far():
    model, (ids, _, images) = tiny_vlm(), SAMPLES[1]
    both = [SAMPLES[0], (ids, ids, images)]                  # the second is supervised from its first token on
    alone = sum(token_loss(model, pack([e], 8)).item() for e in both)
    honest = pack(both, 8)
    labels = torch.tensor([y for _, labels, _ in both for y in labels])
    shifted = honest._replace(labels=labels.roll(-1))        # the end of one predicts the beginning of the next
    assert abs(token_loss(model, honest).item() / alone - 1) < GATE
    assert abs(token_loss(model, shifted).item() / alone - 1) > 1000 * GATE


def test_a_short_last_step_has_its_own_count():
    model = tiny_vlm()
    for window in ([0, 1, 2, 3], [4, 5, 6]):
        spy, result = gradients([[i] for i in window], model=model)
        truth, loss = one_by_one(window)
        assert error(spy.seen, truth) < GATE and abs(result["loss"] / loss - 1) < GATE


def test_a_step_without_supervised_tokens_changes_nothing():
    model = tiny_vlm()
    optimizer = engine.adamw(model, engine.choose(model, TABLE, torch.float64), 0.1)
    engine.set_lr(optimizer, 0, 2, 0)
    train_step(model, optimizer, batches([[0]]), token_loss, world())
    before = [p.clone() for p in model.parameters()]
    for micro in ([], batches([[]])):
        result = train_step(model, optimizer, micro, token_loss, world(), check=True)
        assert not result["updated"] and math.isnan(result["loss"])
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_nan_loss_is_seen_despite_finite_gradients():
    """The mean over no label is NaN with a gradient of zero; the gradient norm does not show it."""
    model = tiny_vlm()
    optimizer = engine.adamw(model, engine.choose(model, TABLE, torch.float64), 0.1)
    engine.set_lr(optimizer, 0, 2, 0)
    before = [p.clone() for p in model.parameters()]
    nan = torch.tensor(torch.nan)
    result = train_step(model, optimizer, batches([[0]]), lambda m, b: token_loss(m, b) + nan, world())
    assert result["grad_norm"] > 0 and not result["updated"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# ---- ranks ----------------------------------------------------------------------------------------------------------

TWO = [[[0, 5], [1, 2, 3, 4]], [[6, 7], []]]         # rank 1 has less to do and no image
FOUR = [[[0, 1, 2, 3, 4, 5]], [[]], [[6]], [[7]]]


def spread(tmp_path, layout, wrap, work):
    """work(groups, world, wrap) -> tensors, result on every rank; those of rank 0, and every rank's result."""
    def rank(r):
        tensors, result = work(layout[r], world(r, len(layout)), wrap)
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"tensors_{r}.safetensors")
        return result
    results = fork(len(layout), rank, tmp_path)
    tensors = [load_file(tmp_path / f"tensors_{r}.safetensors") for r in range(len(layout))]
    for t in tensors[1:]:
        assert all(torch.equal(v, tensors[0][k]) for k, v in t.items()), "ranks disagree"
    return tensors[0], results


def plain(groups, w, wrap):
    spy, result = gradients(groups, w, wrap=wrap)
    return spy.seen, result


@pytest.mark.parametrize("layout, wrap", [(TWO, "fsdp"), (FOUR, "ddp")])
def test_unequal_ranks_give_the_gradient_of_one(layout, wrap, truth, tmp_path):
    found, results = spread(tmp_path, layout, wrap, plain)
    assert error(found, truth[0]) < GATE
    assert all(r == results[0] for r in results) and abs(results[0]["loss"] / truth[1] - 1) < GATE


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_mean_per_rank_would_fail_by_far(wrap, truth, tmp_path):
    class Local(engine.World):
        def sum(self, numbers):
            return [v * self.size for v in numbers]

    def broken(groups, w, wrap):
        return plain(groups, Local(w.rank, w.size, w.device, w.dtype), wrap)
    assert error(spread(tmp_path, TWO, wrap, lambda *a: (broken(*a)[0], None))[0], truth[0]) > 1000 * GATE


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_tied_embeddings_stay_one_tensor_when_wrapped(wrap, tmp_path):
    truth, _ = one_by_one(tie_word_embeddings=True)

    def work(groups, w, wrap):
        model = tiny_vlm(tie_word_embeddings=True)
        spy, result = gradients(groups, w, model, wrap=wrap)
        assert model.language_model.head_weight is model.language_model.model.embed_tokens.weight
        return spy.seen, sum(p is model.language_model.head_weight for p in model.parameters())
    found, entries = spread(tmp_path, TWO, wrap, work)
    assert error(found, truth) < GATE and entries == [1, 1]


def adam_step(groups, w, wrap, clip=0.05):
    model = tiny_vlm()
    lrs = engine.choose(model, TABLE, torch.float64)
    if w.size > 1:
        model = engine.parallelize(model, w, [*model.language_model.model.layers], wrap)
    optimizer = engine.adamw(model, lrs, 0.1, eps=1e-3)  # so large that the first step is not the mere sign
    engine.set_lr(optimizer, 0, 2, 0)
    result = train_step(model, optimizer, batches(groups), token_loss, w, clip)
    assert result["updated"] and result["grad_norm"] > 2 * clip
    moved = {n: engine.whole_tensor(p.detach()).clone() for n, p in engine.unwrap(model).named_parameters()}
    return moved, result["grad_norm"]


def test_a_clipped_adamw_step_is_alike_everywhere(tmp_path):
    truth, _ = adam_step([[*range(8)]], world(), None)
    assert error(adam_step([[0, 1], [2, 3, 4], [5], [6, 7]], world(), None)[0], truth) < GATE
    for wrap in ("ddp", "fsdp"):
        (tmp_path / wrap).mkdir()
        assert error(spread(tmp_path / wrap, TWO, wrap, adam_step)[0], truth) < GATE
    assert error(adam_step([[*range(8)]], world(), None, clip=0.1)[0], truth) > 1000 * GATE, "clipping would not show"


def test_clipping_each_micro_batch_would_fail_by_far():
    truth, _ = adam_step([[*range(8)]], world(), None)
    model = tiny_vlm()
    optimizer = engine.adamw(model, engine.choose(model, TABLE, torch.float64), 0.1, eps=1e-3)
    engine.set_lr(optimizer, 0, 2, 0)
    for b in batches([[0, 1, 2, 3], [4, 5, 6, 7]]):
        (token_loss(model, b) / sum(ANSWERS)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    assert error({n: p.detach() for n, p in model.named_parameters()}, truth) > 1000 * GATE


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_ddp_reduces_gradients_once_per_step(wrap, tmp_path):
    """FSDP reduces them in every micro-batch: no rank keeps gradients of whole weights from one to the next."""
    def rank(r):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        counts = []

        def note(state, bucket):
            counts[-1] += 1
            return allreduce_hook(state, bucket)

        def scatter(*args, **how):
            counts[-1] += 1
            return real(*args, **how)

        name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        real = getattr(dist, name)
        setattr(dist, name, scatter)                 # in this forked process alone
        model = tiny_vlm()
        engine.choose(model, TABLE, torch.float64)
        model = engine.parallelize(model, world(r, 2), [*model.language_model.model.layers], wrap)
        if wrap == "ddp":
            model.register_comm_hook(None, note)
        honest = engine.sync_gradients
        def eager(model, enabled):
            return honest(model, True)
        for micro, engine.sync_gradients in ((1, honest), (1, honest), (3, honest), (3, eager)):
            counts.append(0)
            train_step(model, Spy(model), batches([[0]] * micro), token_loss, world(r, 2))
        return counts[1:]                            # DDP sorts its buckets anew after the first step
    for one, three, eager in fork(2, rank, tmp_path):
        assert one > 0 and eager == 3 * one and three == (one if wrap == "ddp" else 3 * one)


class Explode(torch.autograd.Function):
    """The identity, with an infinite gradient"""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * torch.inf


@pytest.mark.parametrize("wrap, poison", [("ddp", lambda loss: loss * torch.nan), ("fsdp", Explode.apply)],
                         ids=["nan loss", "inf gradient"])
def test_a_bad_gradient_changes_no_rank(wrap, poison, tmp_path):
    def rank(r):
        model = tiny_vlm()
        lrs = engine.choose(model, TABLE, torch.float64)
        model = engine.parallelize(model, world(r, 2), [*model.language_model.model.layers], wrap)
        optimizer = engine.adamw(model, lrs, 0.1)
        engine.set_lr(optimizer, 0, 2, 0)

        def state():
            tensors = [t for p in model.parameters() for t in (p, *optimizer.state[p].values())]
            return [engine.whole_tensor(t.detach()).clone() for t in tensors]

        def loss(model, b):
            return poison(token_loss(model, b)) if r == 1 else token_loss(model, b)

        good = train_step(model, optimizer, batches([[r], [2]]), token_loss, world(r, 2), 1.0)
        before = state()
        bad = train_step(model, optimizer, batches([[r], [2]]), loss, world(r, 2), 1.0)
        after = state()
        again = train_step(model, optimizer, batches([[r], [2]]), token_loss, world(r, 2), 1.0)
        assert len(before) == len(after) == 4 * len(lrs)
        return [good["updated"], bad["updated"], again["updated"], all(map(torch.equal, before, after))]
    assert fork(2, rank, tmp_path) == [[True, False, True, True]] * 2


def test_clipping_alone_would_poison_the_weights():
    model = tiny_vlm()
    optimizer = engine.adamw(model, engine.choose(model, TABLE, torch.float64), 0.1)
    engine.set_lr(optimizer, 0, 2, 0)
    Explode.apply(token_loss(model, batches([[0]])[0])).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert any(p.isnan().any() for p in model.parameters())


def test_dropout_differs_between_ranks_and_weights_must_not(tmp_path):
    def rank(r):
        w = engine.start("cpu", "fp64", seed=5)
        noise = torch.rand(4).tolist()
        model = tiny_vlm(seed=r)
        lrs = engine.choose(model, TABLE, torch.float64)
        assert lrs
        try:
            engine.parallelize(model, w, [], "fsdp")
        except Error as e:
            return noise, str(e)
    (a, why), (b, _) = fork(2, rank, tmp_path)
    assert a != b and "different weights" in why


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_step_draws_no_warning_from_torch(wrap, tmp_path):
    def rank(r):
        model = tiny_vlm()
        lrs = engine.choose(model, {"multi_modal_projector.*": 1e-2, "language_model.*": 1e-3}, torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = engine.parallelize(model, world(r, 2), [*model.vision_tower.vision_model.encoder.layers,
                                                            *model.language_model.model.layers], wrap, "block")
            optimizer = engine.adamw(model, lrs, 0.1)
            for step in range(2):
                train_step(model, optimizer, batches(TWO[r]), token_loss, world(r, 2), 1.0, check=True)
        assert not list(model.buffers()), "a buffer that a wrapper could cast"
        return None
    fork(2, rank, tmp_path)


def test_sums_and_gathered_objects_are_alike_everywhere(tmp_path):
    def rank(r):
        w = world(r, 2)
        return w.sum([r, 2**53 if r else 0, 0.5]), w.gather({"rank": r, "long": "x" * 100 * r})
    a, b = fork(2, rank, tmp_path)
    assert a == b == [[1, 2**53, 1.0], [{"rank": 0, "long": ""}, {"rank": 1, "long": "x" * 100}]]


def test_every_field_of_a_batch_moves():
    b = batches([[0]])[0].to("meta")
    assert isinstance(b, Batch) and len(b) == 8 and all(t.is_meta for t in b)


def test_fsdp_reduces_gradients_in_fp32(truth, tmp_path):
    """The computation in bf16 rounds the gradient of each rank. Their sum must not be rounded again: then every element
    of the sum would be a bf16 number."""
    def rank(r):
        w = engine.World(r, 2, torch.device("cpu"), torch.bfloat16)
        model = tiny_vlm(dtype=torch.float32)
        engine.choose(model, TABLE, torch.bfloat16)
        model = engine.parallelize(model, w, [*model.language_model.model.layers], "fsdp")
        spy = Spy(model)
        train_step(model, spy, batches([[0, 1, 2, 3], [4, 5, 6, 7]][r : r + 1]), token_loss, w)
        if r == 0:
            save_file({n: g.contiguous() for n, g in spy.seen.items()}, tmp_path / "found.safetensors")
    fork(2, rank, tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    assert error({n: g.double() for n, g in found.items()}, truth[0]) < 0.2
    for n, g in found.items():
        in_bf16 = (g.bfloat16().float() == g).float().mean()
        assert g.dtype == torch.float32 and (in_bf16 < 0.9 or g.ndim < 2 or "embed" in n), (n, in_bf16)


def test_the_group_is_made_with_a_time_limit(monkeypatch):
    made = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **how: made.update(how))
    state = torch.get_rng_state()
    engine.start("cpu", "fp32")
    torch.set_rng_state(state)
    assert made["timeout"] == engine.TIMEOUT
