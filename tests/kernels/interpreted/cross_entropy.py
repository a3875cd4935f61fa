"""The kernel of kernels/cross_entropy.py, interpreted (tests/interpret.py)."""

import pytest
import torch
from interpret import variant
from kernel_cases import check_error, opcheck, strided

import kernels
from kernels import cross_entropy as module
from kernels.cross_entropy import (IGNORE, linear_cross_entropy, linear_cross_entropy_ref, logits_to_gradient_torch,
                                   logits_to_gradient_triton, row_losses, row_losses_ref)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")
    monkeypatch.setitem(module.LOGITS_TILES, 80, (64, 1))


def weights_of(R):
    """Weights (R,) between 1/64 and 64; every fourth is 0"""
    w = 2.0 ** torch.linspace(-6, 6, R)
    w[3::4] = 0
    return w


def case(R, C, V, dtype=torch.float32):
    g = torch.Generator().manual_seed(R + V)
    hidden, weight = (torch.randn(n, C, generator=g).to(dtype).requires_grad_() for n in (R, V))
    labels = torch.randint(0, V, (R,), generator=g)
    labels[2::5] = IGNORE
    return hidden, weight, labels


def with_gradients(f, hidden, weight, labels, up=0.37, **how):
    loss = f(hidden, weight, labels, **how)
    return [loss.detach(), *torch.autograd.grad(loss * up, (hidden, weight))]


def check_loss(loss, true, n, V, largest):
    """A loss is a sum of n terms log(sum) + max - logit. Each makes four roundings of values no larger than these."""
    assert loss.dtype == torch.float32
    assert abs(loss.double() - true) <= 4 * 2**-24 * n * (2 * largest + 1 + torch.log(torch.tensor(V)))


def check_chunk(n, V, dtype, to_gradient=logits_to_gradient_triton):
    g = torch.Generator().manual_seed(V)
    for size in (1, 300):
        room = (torch.randn(n, V + 3, generator=g) * size).to(dtype)         # rows with a stride of V + 3
        logits, labels = room[:, :V], torch.randint(0, V, (n,), generator=g)
        labels[1::3] = IGNORE
        beyond, given = room[:, V:].clone(), logits.double()
        theirs, true = (logits_to_gradient_torch(t, labels, True) for t in (logits.clone(), given.clone()))
        loss_alone, _ = to_gradient(logits.clone(), labels, False)             # (n,)
        loss, gradient = to_gradient(logits, labels, True)
        assert gradient.data_ptr() == room.data_ptr() and torch.equal(room[:, V:], beyond)
        assert torch.equal(loss, loss_alone)
        if dtype == torch.bfloat16:                                          # the interpreter truncates: one more ulp
            torch.testing.assert_close(gradient, theirs[1], rtol=2**-7, atol=1e-6)
        else:
            check_error(gradient, theirs[1], true[1], terms=V if dtype == torch.float32 else 1)
        check_loss(loss.sum(), true[0].sum(), n, V, given.abs().max())
        assert not gradient[labels == IGNORE].any()


@pytest.mark.parametrize("n, V, dtype", [(1, 1, torch.float32), (3, 63, torch.float32), (2, 64, torch.float32),
                                         (5, 65, torch.float32), (4, 300, torch.float32), (6, 129, torch.float16),
                                         (6, 129, torch.bfloat16)])
def test_a_chunk_becomes_its_gradient(n, V, dtype):
    """Logits of size 1 and 300, labels in every block of a row"""
    check_chunk(n, V, dtype)


BROKEN = {
    "maximum of the last block": ("higher = tl.maximum(m, tl.max(x))", "higher = tl.max(x)"),
    "sum not rescaled": ("l * tl.exp2((m - higher) * LOG2E)", "l"),
    "ignored rows get a gradient": ("tl.where(keep, 1.0 / l, 0.0)", "1.0 / l"),
    "no onehot": ("tl.where(i + c == y, 1.0, 0.0)", "0.0"),
    "label off by one": ("tl.where(i + c == y, 1.0, 0.0)", "tl.where(i + c == y + 1, 1.0, 0.0)"),
    "loss of the next entry": ("tl.load(X + y, mask=valid", "tl.load(X + y - 1, mask=valid"),
    "tail not masked": ('mask=i + c < V, other=-float("inf")).to(tl.float32)\n        higher',
                        'mask=i + c < V, other=0.0).to(tl.float32)\n        higher'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_fails(name, tmp_path):
    broken = variant(module, *BROKEN[name], tmp_path)
    broken.LOGITS_TILES[80] = 64, 1
    with pytest.raises(AssertionError):
        check_chunk(6, 97, torch.float32, broken.logits_to_gradient_triton)


@pytest.mark.parametrize("R, V, chunk, dtype", [(1, 1, None, torch.float32), (17, 97, 5, torch.float32),
                                                (0, 5, None, torch.float32), (15, 129, 15, torch.float16)])
def test_loss_and_gradients_err_at_most_twice(R, V, chunk, dtype):
    args = case(R, 16, V, dtype)
    truth = with_gradients(linear_cross_entropy_ref, *(t.detach().double().requires_grad_() for t in args[:2]), args[2])
    theirs = with_gradients(linear_cross_entropy_ref, *args)
    ours = with_gradients(linear_cross_entropy, *args, chunk=chunk)
    assert ours[0].dtype == torch.float32
    for results in zip(ours[1:], theirs[1:], truth[1:]):
        check_error(*results, terms=16 + V if dtype == torch.float32 else 1)
    if dtype == torch.float32:
        logits = args[0].detach().double() @ args[1].detach().double().T if R else torch.zeros(1)
        check_loss(ours[0], truth[0], R, V, 16 * logits.abs().max())         # each logit is a sum of 16 products
    else:                                        # R losses, each from logits that are rounded to fp16
        assert abs(ours[0].double() - truth[0]) <= 2 * abs(theirs[0].double() - truth[0]) + 2**-11 * truth[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weighted_rows_err_at_most_twice(dtype):
    args, weights = case(17, 16, 97, dtype), weights_of(17)
    exact = [*(t.detach().double().requires_grad_() for t in args[:2]), args[2]]
    truth = with_gradients(linear_cross_entropy_ref, *exact, weights=weights.double())
    theirs = with_gradients(linear_cross_entropy_ref, *args, weights=weights)
    ours = with_gradients(linear_cross_entropy, *args, weights=weights, chunk=5)
    for results in zip(ours[1:], theirs[1:], truth[1:]):
        check_error(*results, terms=16 + 97 if dtype == torch.float32 else 1)
    assert abs(ours[0].double() / truth[0] - 1) < (1e-6 if dtype == torch.float32 else 2**-11)
    for a, b in zip(with_gradients(linear_cross_entropy, *args, weights=torch.ones(17), chunk=5),
                    with_gradients(linear_cross_entropy, *args, chunk=5)):
        assert torch.equal(a, b), "weights of 1 change no bit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_losses_of_rows_err_at_most_twice(dtype):
    hidden, weight, labels = case(17, 16, 97, dtype)
    up = torch.linspace(-2, 3, 17)

    def both(f, h, w, **how):
        losses = f(h, w, labels, **how)
        return [losses.detach(), *torch.autograd.grad(losses, (h, w), up.to(losses.dtype))]

    truth = both(row_losses_ref, *(t.detach().double().requires_grad_() for t in (hidden, weight)))
    for results in zip(both(row_losses, hidden, weight, chunk=5), both(row_losses_ref, hidden, weight), truth):
        check_error(*results, terms=16 + 97 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("label", [-1, 70, 2**31 + 5, -2**40])
def test_an_invalid_label_makes_the_loss_nan(label):
    """And reads nothing out of bounds: the last two are not addresses of this process."""
    hidden, weight, labels = case(4, 8, 70)
    labels[1] = label
    assert linear_cross_entropy(hidden, weight, labels).isnan()


def test_strides_change_nothing():
    hidden, weight, labels = case(9, 8, 70)
    odd = [strided(t.detach()).requires_grad_() for t in (hidden, weight)]
    for a, b in zip(with_gradients(linear_cross_entropy, *odd, strided(labels), chunk=4),
                    with_gradients(linear_cross_entropy, hidden, weight, labels, chunk=4)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


def test_rows_do_not_read_each_other():
    """Noise in one row changes no bit of the others."""
    logits = torch.randn(5, 150, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 149, 0, 64, IGNORE])
    noisy = logits.clone()
    noisy[2] = 1e30
    (_, g), (_, h) = (logits_to_gradient_triton(t, labels, True) for t in (logits, noisy))
    others = [0, 1, 3, 4]
    assert torch.equal(g[others], h[others]) and not torch.equal(g[2], h[2])


def test_the_operator_passes_opcheck():
    hidden, weight, labels = case(5, 4, 7)
    opcheck(torch.ops.pumice.linear_cross_entropy, (hidden, weight, labels, 2, torch.float32, True, True))
