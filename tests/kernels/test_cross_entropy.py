"""Linear cross-entropy against its definition: any chunk size, any frozen side, memory; the compiled kernel."""

import itertools

import pytest
import torch
from compile_check import assert_fits, compile_for
from kernel_cases import TIGHT, NewTensors, allocations, check_error, opcheck, saved

from kernels import cross_entropy as module
from kernels.cross_entropy import (IGNORE, LOGITS_TILES, linear_cross_entropy, linear_cross_entropy_ref, logits_bytes,
                                   loss_and_gradients, losses_of_rows, row_losses, row_losses_ref)


def case(R=37, C=8, V=201, dtype=torch.float64):
    """-> hidden (R, C), weight (V, C), labels (R,), every fifth of them ignored"""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, C, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for n in (R, V))
    labels = torch.randint(0, V, (R,), generator=g)
    labels[::5] = IGNORE
    return hidden, weight, labels


def with_gradients(f, hidden, weight, labels, up=0.37, **how):
    loss = f(hidden, weight, labels, **how)
    return [loss.detach(), *torch.autograd.grad(loss * up, (hidden, weight))]


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, None])
@pytest.mark.parametrize("R, V", [(37, 201), (1, 3), (0, 5)])
def test_any_chunk_size_equals_the_definition(R, V, chunk):
    args = case(R, V=V)
    truth = with_gradients(linear_cross_entropy_ref, *args)
    for ours, theirs in zip(with_gradients(linear_cross_entropy, *args, chunk=chunk), truth):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=TIGHT, atol=TIGHT)


def test_gradients_equal_finite_differences():
    hidden, weight, labels = case(4, 3, 5)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, chunk=3), (hidden, weight))


def weights_of(R, dtype=torch.float32):
    """Weights (R,) between 1/64 and 64; every fourth is 0"""
    w = 2.0 ** torch.linspace(-6, 6, R, dtype=dtype)
    w[3::4] = 0
    return w


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_weighted_rows_equal_the_definition(chunk):
    """The definition weights the losses. Rows of weight 0 might as well be absent."""
    hidden, weight, labels = case()
    w = weights_of(37, torch.float64)
    ours = with_gradients(linear_cross_entropy, hidden, weight, labels, weights=w, chunk=chunk)
    for a, b in zip(ours, with_gradients(linear_cross_entropy_ref, hidden, weight, labels, weights=w)):
        torch.testing.assert_close(a, b, rtol=TIGHT, atol=TIGHT)
    some = w > 0
    fewer = with_gradients(linear_cross_entropy, hidden[some], weight, labels[some], weights=w[some], chunk=chunk)
    torch.testing.assert_close(fewer[0], ours[0], rtol=TIGHT, atol=TIGHT)
    torch.testing.assert_close(fewer[2], ours[2], rtol=TIGHT, atol=TIGHT)
    assert not ours[1][~some].any()
    assert torch.autograd.gradcheck(lambda h, v: linear_cross_entropy(h, v, labels[:4], w[:4], chunk=3),
                                    (hidden[:4].detach().requires_grad_(), weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_of_one_change_no_bit(dtype):
    args = case(dtype=dtype)
    plain = with_gradients(linear_cross_entropy, *args, chunk=7)
    for w in (torch.ones(37), torch.ones(37, dtype=torch.float64), torch.zeros(0), None):
        assert all(map(torch.equal, plain, with_gradients(linear_cross_entropy, *args, weights=w, chunk=7)))
    none, empty = (with_gradients(linear_cross_entropy_ref, *args, weights=w) for w in (None, torch.zeros(0)))
    assert all(map(torch.equal, none, empty))


def rows_with_gradients(f, hidden, weight, labels, **how):
    """-> losses of the rows, gradients; each row has its own factor, some are negative, some 0"""
    losses = f(hidden, weight, labels, **how)
    up = torch.linspace(-2, 3, len(losses), dtype=losses.dtype)
    up[1::4] = 0
    return [losses.detach(), *torch.autograd.grad(losses, (hidden, weight), up)]


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, None])
@pytest.mark.parametrize("R, V", [(37, 201), (1, 3), (0, 5)])
def test_losses_of_rows_equal_the_definition(R, V, chunk):
    args = case(R, V=V)
    truth = rows_with_gradients(row_losses_ref, *args)
    for ours, theirs in zip(rows_with_gradients(row_losses, *args, chunk=chunk), truth, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=TIGHT, atol=TIGHT)


def test_losses_of_rows_sum_to_the_loss():
    """Their sum has the gradients of the summed loss to the last bit: the products are the same."""
    args = case()
    rows, whole = row_losses(*args, chunk=7).sum(), linear_cross_entropy(*args, chunk=7)
    assert abs(rows - whole) < TIGHT
    for a, b in zip(*(torch.autograd.grad(x, args[:2]) for x in (rows, whole))):
        assert torch.equal(a, b)


def test_gradients_of_rows_equal_finite_differences():
    hidden, weight, labels = case(4, 3, 5)
    assert torch.autograd.gradcheck(lambda h, w: row_losses(h, w, labels, chunk=3), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_err_at_most_twice_as_much(dtype):
    hidden, weight, labels = case(64, 32, 300, dtype=dtype)
    truth = rows_with_gradients(row_losses_ref, hidden.double(), weight.double(), labels)
    theirs = rows_with_gradients(row_losses_ref, hidden, weight, labels)
    ours = rows_with_gradients(row_losses, hidden, weight, labels, chunk=20)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    for results in zip(ours, theirs, truth):
        check_error(*results, terms=32 + 300 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_a_frozen_side_of_rows(frozen):
    hidden, weight, labels = case()
    _, dh, dw = rows_with_gradients(row_losses, hidden, weight, labels)
    (weight if frozen == "weight" else hidden).requires_grad_(False)
    losses = row_losses(hidden, weight, labels)
    up = torch.linspace(-2, 3, 37, dtype=losses.dtype)
    up[1::4] = 0
    losses.backward(up)
    assert (hidden if frozen == "hidden" else weight).grad is None
    assert torch.equal(*((hidden.grad, dh) if frozen == "weight" else (weight.grad, dw)))


def test_rows_hold_one_chunk_of_logits():
    """Nothing else of its size exists, and the graph keeps no logits and no gradient of the weight"""
    hidden, weight, labels = case(500, 16, 1000, dtype=torch.float32)
    with NewTensors() as new, torch.no_grad():
        losses_of_rows(hidden, weight, labels, 50, torch.float32)
    assert max(new.bytes) == 50 * 1000 * 4 and new.bytes.count(max(new.bytes)) == 1
    assert saved(lambda h, w: row_losses(h, w, labels, chunk=50), hidden, weight) == labels.nbytes


def test_rows_pass_opcheck_and_compile():
    hidden, weight, labels = case(5, 4, 7, dtype=torch.float32)
    opcheck(torch.ops.pumice.row_losses, (hidden, weight, labels, 2, torch.float32))
    f = torch.compile(row_losses, fullgraph=True, backend="aot_eager", dynamic=True)
    args = case(37, dtype=torch.float32)
    for ours, theirs in zip(rows_with_gradients(f, *args), rows_with_gradients(row_losses, *args)):
        assert torch.equal(ours, theirs)


def test_ignored_rows_add_nothing():
    hidden, weight, labels = case()
    loss, dh, dw = with_gradients(linear_cross_entropy, hidden, weight, torch.full((37,), IGNORE))
    assert loss == 0 and not dh.any() and not dw.any()
    _, dh, _ = with_gradients(linear_cross_entropy, hidden, weight, labels)
    assert not dh[labels == IGNORE].any() and dh[labels != IGNORE].any(1).all()


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_a_frozen_side_changes_no_other_gradient(frozen):
    hidden, weight, labels = case()
    _, dh, dw = with_gradients(linear_cross_entropy, hidden, weight, labels, up=1.0)
    (weight if frozen == "weight" else hidden).requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert (hidden if frozen == "hidden" else weight).grad is None
    assert torch.equal(*((hidden.grad, dh) if frozen == "weight" else (weight.grad, dw)))


def test_backward_twice_adds_twice():
    hidden, weight, labels = case()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, once + once)


def test_extreme_logits_do_not_overflow():
    for scale in (1e-4, 30.0, 1e3):
        hidden, weight, labels = case()
        hidden, weight = ((t.detach() * scale ** 0.5).float().requires_grad_() for t in (hidden, weight))
        truth = with_gradients(linear_cross_entropy_ref, hidden.double(), weight.double(), labels)
        for ours, theirs in zip(with_gradients(linear_cross_entropy, hidden, weight, labels), truth):
            assert ours.isfinite().all()
            # 8 products per logit, each rounded to 2**-24 of a logit of up to 20 * scale; the softmax rounds as much
            atol = max(1.0, scale) * 20 * 8 * 2**-24 * max(1.0, float(theirs.abs().max()))
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_err_at_most_twice_as_much(dtype):
    hidden, weight, labels = case(64, 32, 300, dtype=dtype)
    truth = with_gradients(linear_cross_entropy_ref, hidden.double(), weight.double(), labels)
    theirs = with_gradients(linear_cross_entropy_ref, hidden, weight, labels)
    ours = with_gradients(linear_cross_entropy, hidden, weight, labels, chunk=20)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    for results in zip(ours[1:], theirs[1:], truth[1:]):
        check_error(*results, terms=32 + 300 if dtype == torch.float32 else 1)
    w = weights_of(64)
    exact = hidden.double(), weight.double(), labels
    truth, theirs = (with_gradients(linear_cross_entropy_ref, *a, weights=w) for a in (exact, (hidden, weight, labels)))
    ours = with_gradients(linear_cross_entropy, hidden, weight, labels, weights=w, chunk=20)
    assert [t.dtype for t in ours] == [torch.float32, dtype, dtype]
    for results in zip(ours[1:], theirs[1:], truth[1:]):
        check_error(*results, terms=32 + 300 if dtype == torch.float32 else 1)


def test_the_incoming_scale_is_not_rounded():
    """1.0038 lies between two bf16 values; rounded to either, it would scale every gradient by 1 +- 0.0038."""
    hidden, weight, labels = case(dtype=torch.bfloat16)
    up = torch.tensor(1.0038 / 1024)
    _, *grads = loss_and_gradients(hidden.detach(), weight.detach(), labels, 20, torch.bfloat16, True, True)
    for ours, g in zip(with_gradients(linear_cross_entropy, hidden, weight, labels, up, chunk=20)[1:], grads):
        right, broken = ((g.float() * scale).bfloat16() for scale in (up, up.bfloat16()))
        assert torch.equal(ours, right) and not torch.equal(ours, broken)


def test_losses_are_summed_in_fp32():
    """64 rows summed in fp32 err by 64 * 2**-24 at most, in bf16 by 1e-3."""
    _, weight, labels = case(64, 64, 300, dtype=torch.bfloat16)
    hidden, logits = torch.eye(64).bfloat16(), weight.detach().T              # (64, 300), exact on any BLAS
    true = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    broken = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    ours = linear_cross_entropy(hidden, weight, labels)
    assert abs(ours.double() - true) <= 4e-6 * true < abs(broken.double() - true)


def test_autocast_multiplies_in_bf16():
    hidden, weight, labels = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    other = linear_cross_entropy(*low, labels)
    other.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, other)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32            # the dtype of the parameters
    assert torch.equal(hidden.grad, low[0].grad.float()) and torch.equal(weight.grad.bfloat16(), low[1].grad)


@pytest.mark.parametrize("chunk", [50, 500])
def test_logits_never_exceed_one_chunk(chunk):
    """One allocation of a chunk of logits, and none larger. The definition allocates all logits."""
    hidden, weight, labels = case(500, 16, 1000, dtype=torch.float32)
    with NewTensors() as new, torch.no_grad():
        loss_and_gradients(hidden, weight, labels, chunk, torch.float32, True, True)
    assert max(new.bytes) == chunk * 1000 * 4 and new.bytes.count(max(new.bytes)) == 1
    with NewTensors() as new:
        linear_cross_entropy_ref(hidden, weight, labels).backward()
    assert max(new.bytes) == 500 * 1000 * 4


@pytest.mark.parametrize("dtype, each", [(torch.bfloat16, 10), (torch.float32, 8), (torch.float64, 16)])
def test_logits_bytes_is_the_measured_peak(dtype, each, monkeypatch):
    """With fewer rows than a chunk, and with more. hidden and its gradient are narrow here; they and a copy that the
    CPU's bf16 product makes of its input come on top."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 0)
    monkeypatch.setattr(module, "CHUNK_ROWS", 50)
    for R in (20, 130):
        hidden, weight, labels = (t.detach() for t in case(R, 2, 2000, dtype=dtype))
        planned = logits_bytes(R, 2000, hidden)
        made = allocations(lambda: loss_and_gradients(hidden, weight, labels, 50, dtype, True, False))
        peak = max(itertools.accumulate(made))
        assert planned == min(R, 50) * 2000 * each <= peak < 1.25 * planned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_weight_is_summed_wide(dtype, monkeypatch):
    """Three chunks in half precision: no product is rounded before it is added in fp32."""
    hidden, weight, labels = (t.detach() for t in case(12, 4, 17, dtype=dtype))
    gradients, to_gradient = [], module.logits_to_gradient_torch
    monkeypatch.setattr(module, "logits_to_gradient_torch",
                        lambda *a: gradients.append(to_gradient(*a)) or gradients[-1])
    dw = loss_and_gradients(hidden, weight, labels, 5, dtype, False, True)[2]
    true, rounded = 0, 0
    for (_, g), h in zip(gradients, hidden.split(5), strict=True):
        true, rounded = true + g.T.double() @ h.double(), rounded + (g.T @ h).double()
    assert dw.dtype == torch.float32 and (dw - true).norm() < 1e-6 * true.norm() < (rounded - true).norm()


def test_without_gradients_only_logits_exist():
    hidden, weight, labels = case(500, 16, 1000, dtype=torch.float32)
    with torch.no_grad(), NewTensors() as new:
        loss, dh, dw = loss_and_gradients(hidden, weight, labels, 2, torch.float32, False, False)
        assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels, chunk=2))
    assert loss > 0 and max(new.bytes) == 2 * 1000 * 4 < hidden.nbytes
    assert dh.numel() == dw.numel() == 0


def test_chunks_have_many_rows_and_bounded_bytes(monkeypatch):
    rows = []
    monkeypatch.setattr(module, "linear_cross_entropy_op", lambda h, w, y, chunk, *_: (rows.append(chunk), None))
    for V in (128256, 32000, 500):
        linear_cross_entropy(torch.zeros(3, 1), torch.zeros(V, 1), torch.zeros(3, dtype=torch.long))
    assert rows == [2048, 4194, 268435]


def test_wrong_shapes_and_labels_are_refused():
    hidden, weight, labels = case()
    with pytest.raises(AssertionError, match="37 rows, 36 labels"):
        linear_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(AssertionError, match="36 weights, 37 labels"):
        linear_cross_entropy(hidden, weight, labels, torch.ones(36))
    for label in (-1, -101, 7):
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy(torch.ones(2, 3), torch.ones(7, 3), torch.tensor([0, label]))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_operator_passes_opcheck(frozen):
    hidden, weight, labels = case(5, 4, 7, dtype=torch.float32)
    args = hidden, weight.requires_grad_(not frozen), labels, 2, torch.float32, True, not frozen
    opcheck(torch.ops.pumice.linear_cross_entropy, args)
    opcheck(torch.ops.pumice.linear_cross_entropy, (*args, weights_of(5)))


def test_it_compiles_as_one_graph():
    f = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for R, autocast in ((37, False), (50, True)):
        args = case(R, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for w in (None, weights_of(R)):
                found = (with_gradients(g, *args, weights=w) for g in (f, linear_cross_entropy))
                assert all(map(torch.equal, *found))


def test_a_second_derivative_is_refused():
    hidden, weight, labels = case()
    grad, = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("arch, unaligned", [(80, ("V", "stride")), (90, ()), (100, ())])
def test_the_kernel_fits_every_gpu(arch, unaligned):
    """No spills, and 16-byte loads for aligned rows (32,000 entries); 32,003 entries still compile."""
    block, warps = LOGITS_TILES[90 if arch == 90 else 80]              # capability 10 runs the tile of key 80
    types = {"X": "*bf16", "LABELS": "*i64", "LOSS": "*fp32", "V": "i32", "stride": "i32"}
    found = compile_for(module._logits_to_gradient, types, {"IGNORE": IGNORE, "GRADIENT": True, "BLOCK": block},
                        arch, warps, unaligned=unaligned)
    assert_fits(found)
    assert (found["wide"] > 0) == (not unaligned)
