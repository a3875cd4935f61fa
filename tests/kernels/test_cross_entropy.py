"""Linear cross-entropy against its definition: any chunk, anything frozen, and never more logits than a chunk."""

import itertools

import pytest
import torch
from test_attention import Largest, allocations

from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref, logits_bytes, loss_and_gradients

TIGHT = 1e-12  # sums of at most 200 terms of size about 1 in float64


def case(R=37, C=8, V=201, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, C, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for n in (R, V))
    labels = torch.randint(0, V, (R,), generator=g)
    labels[::5] = -100
    return hidden, weight, labels


def with_gradients(f, hidden, weight, labels, up=0.37, **how):
    loss = f(hidden, weight, labels, **how)
    return [loss.detach(), *torch.autograd.grad(loss * up, (hidden, weight))]


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 38, None])
@pytest.mark.parametrize("R, V", [(37, 201), (1, 3), (0, 5)])
def test_chunks_of_any_size_give_what_the_definition_gives(R, V, chunk):
    args = case(R, V=V)
    truth = with_gradients(linear_cross_entropy_ref, *args)
    for ours, theirs in zip(with_gradients(linear_cross_entropy, *args, chunk=chunk), truth):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=TIGHT, atol=TIGHT)


def test_it_passes_a_finite_difference_check():
    hidden, weight, labels = case(4, 3, 5)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, chunk=3), (hidden, weight))


def test_rows_without_a_label_cost_nothing_and_learn_nothing():
    hidden, weight, _ = case()
    loss, dh, dw = with_gradients(linear_cross_entropy, hidden, weight, torch.full((37,), -100))
    assert loss == 0 and not dh.any() and not dw.any()
    hidden, weight, labels = case()
    _, dh, _ = with_gradients(linear_cross_entropy, hidden, weight, labels)
    assert not dh[labels == -100].any() and dh[labels != -100].any(1).all()


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_a_frozen_side_changes_no_other_gradient(frozen):
    hidden, weight, labels = case()
    _, dh, dw = with_gradients(linear_cross_entropy, hidden, weight, labels, up=1.0)
    (weight if frozen == "weight" else hidden).requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert (hidden if frozen == "hidden" else weight).grad is None
    assert torch.equal(*((hidden.grad, dh) if frozen == "weight" else (weight.grad, dw)))


def test_a_loss_that_is_used_twice_is_added_twice():
    hidden, weight, labels = case()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, once + once)


def test_extreme_logits_do_not_overflow():
    """Logits of some thousands, and all alike: the definition in float64 is the truth."""
    for scale in (1e-4, 30.0, 1e3):
        hidden, weight, labels = case()
        hidden, weight = ((t.detach() * scale ** 0.5).float().requires_grad_() for t in (hidden, weight))
        truth = with_gradients(linear_cross_entropy_ref, hidden.double(), weight.double(), labels)
        for ours, theirs in zip(with_gradients(linear_cross_entropy, hidden, weight, labels), truth):
            assert ours.isfinite().all()
            # 8 products per logit, each rounded to 2**-24 of a logit of up to 20 * scale, and as much in the softmax
            atol = max(1.0, scale) * 20 * 8 * 2**-24 * max(1.0, float(theirs.abs().max()))
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("up", [1.0, 1.0038 / 1024])
def test_bf16_gradients_err_no_more_than_plain_torch(up):
    """Truth: float64 from the rounded inputs. The second scale lies between two numbers of bf16: rounded to either, it
    would bend every gradient by 0.4 %."""
    hidden, weight, labels = case(64, 32, 300, dtype=torch.bfloat16)
    truth = with_gradients(linear_cross_entropy_ref, hidden.double(), weight.double(), labels, up)
    theirs = with_gradients(linear_cross_entropy_ref, hidden, weight, labels, up)
    ours = with_gradients(linear_cross_entropy, hidden, weight, labels, up, chunk=20)
    assert ours[0].dtype == torch.float32 and [t.dtype for t in ours[1:]] == [torch.bfloat16] * 2
    for a, b, true in zip(ours[1:], theirs[1:], truth[1:]):
        assert (a.double() - true).square().mean().sqrt() <= 1.05 * (b.double() - true).square().mean().sqrt()


def test_sums_are_made_in_fp32_whatever_the_products_are_made_in():
    """Truth: the float64 loss of the same bf16 logits. 64 rows summed in fp32 err by 64 * 2**-24 at most, in bf16 by
    1e-3."""
    hidden, weight, labels = case(64, 32, 300, dtype=torch.bfloat16)
    logits = (hidden @ weight.T).detach()
    true = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    broken = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    ours = linear_cross_entropy(hidden, weight, labels)
    assert abs(ours.double() - true) <= 4e-6 * true < abs(broken.double() - true)


def test_autocast_makes_products_in_bf16_and_gradients_in_the_dtype_of_the_weights():
    hidden, weight, labels = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    other = linear_cross_entropy(*low, labels)
    other.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, other)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert torch.equal(hidden.grad, low[0].grad.float()) and torch.equal(weight.grad.bfloat16(), low[1].grad)


@pytest.mark.parametrize("chunk", [50, 500])
def test_logits_never_exist_beyond_a_chunk(chunk):
    """500 rows, 1,000 words: loss and gradients make nothing larger than one chunk of logits, and that once: a second
    chunk would be alive beside the first. The definition makes all of them, and so does a chunk of all rows."""
    hidden, weight, labels = case(500, 16, 1000, dtype=torch.float32)
    with Largest() as largest, torch.no_grad():
        loss_and_gradients(hidden, weight, labels, chunk, torch.float32, True, True)
    assert largest.bytes == chunk * 1000 * 4 and largest.all.count(largest.bytes) == 1
    with Largest() as largest:
        linear_cross_entropy_ref(hidden, weight, labels).backward()
    assert largest.bytes == 500 * 1000 * 4


@pytest.mark.parametrize("dtype, each", [(torch.bfloat16, 10), (torch.float32, 8), (torch.float64, 16)])
def test_the_logits_take_what_is_said_of_them(dtype, each, monkeypatch):
    """Fewer rows than a chunk, and more: what the plan of a run is told (plan.memory) is what is held; hidden and
    its gradient, which are narrow, come on top, and in bf16 a copy that the CPU's product makes of its input."""
    import kernels.cross_entropy
    monkeypatch.setattr(kernels.cross_entropy, "CHUNK_BYTES", 0)
    monkeypatch.setattr(kernels.cross_entropy, "CHUNK_ROWS", 50)
    for R in (20, 50, 130):
        hidden, weight, labels = (t.detach() for t in case(R, 2, 2000, dtype=dtype))
        said = logits_bytes(R, 2000, hidden)
        made = allocations(lambda: loss_and_gradients(hidden, weight, labels, 50, dtype, True, False))
        held = max(itertools.accumulate(made))
        assert said == min(R, 50) * 2000 * each <= held < 1.25 * said


@pytest.mark.parametrize("V", [16, 17, 23])
def test_a_sum_over_chunks_in_low_precision_reaches_every_word(V, monkeypatch):
    """Of slices of 8 words: none left over, one, seven"""
    import kernels.cross_entropy
    monkeypatch.setattr(kernels.cross_entropy, "SLICE", 8)
    hidden, weight, labels = case(12, 4, V, dtype=torch.bfloat16)
    _, _, dw = with_gradients(linear_cross_entropy, hidden, weight, labels, up=1.0, chunk=5)
    true = with_gradients(linear_cross_entropy_ref, hidden.double(), weight.double(), labels, up=1.0)[2]
    torch.testing.assert_close(dw.double(), true, rtol=0.03, atol=0.03)     # of numbers that are 1 each, in bf16


def test_without_a_gradient_none_is_made():
    hidden, weight, labels = case(500, 16, 1000, dtype=torch.float32)
    with torch.no_grad(), Largest() as largest:
        loss, dh, dw = loss_and_gradients(hidden, weight, labels, 2, torch.float32, False, False)
        assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels, chunk=2))
    assert loss > 0 and largest.bytes == 2 * 1000 * 4 < hidden.nbytes  # neither dh nor dw, but the logits
    assert dh.numel() == dw.numel() == 0


def test_rows_and_labels_must_be_as_many():
    hidden, weight, labels = case()
    with pytest.raises(AssertionError, match="37 rows, 36 labels"):
        linear_cross_entropy(hidden, weight, labels[1:])


def test_chunks_are_tall_and_bounded(monkeypatch):
    """2,048 rows at least, and more while a chunk stays within its bytes: 2,097 of 32,000 words in fp32."""
    import kernels.cross_entropy
    rows = []
    monkeypatch.setattr(kernels.cross_entropy, "op", lambda h, w, y, chunk, *_: (rows.append(chunk), None))
    for V in (128256, 32000, 500):
        linear_cross_entropy(torch.zeros(3, 1), torch.zeros(V, 1), torch.zeros(3, dtype=torch.long))
    assert rows == [2048, 2097, 134217]


def test_the_operator_is_what_torch_believes_it_to_be():
    """Its schema, its shapes without data, its gradient: what torch.compile builds on."""
    for frozen in (False, True):
        hidden, weight, labels = case(5, 4, 7, dtype=torch.float32)
        args = hidden, weight.requires_grad_(not frozen), labels, 2, torch.float32, True, not frozen
        torch.library.opcheck(torch.ops.pumice.linear_cross_entropy, args)


def test_one_graph_holds_it_all():
    """torch.compile without a break in the graph gives the same loss and the same gradients; so it does in autocast."""
    f = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for R, autocast in ((37, False), (50, False), (50, True)):
        hidden, weight, labels = case(R, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for ours, theirs in zip(*(with_gradients(g, hidden, weight, labels) for g in (f, linear_cross_entropy))):
                assert torch.equal(ours, theirs)


def test_a_second_derivative_is_refused():
    """The gradient is made on the way forward and knows nothing of its own; silence would be a wrong number."""
    hidden, weight, labels = case()
    grad, = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("word", [-1, -101, 7])
def test_a_label_that_is_no_word_is_an_error(word):
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(torch.ones(2, 3), torch.ones(7, 3), torch.tensor([0, word]))
