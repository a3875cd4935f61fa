"""The Triton side of kernels/cross_entropy.py, interpreted (tests/interpret.py says how)."""

import pytest
import torch
from interpret import variant

import kernels
import kernels.cross_entropy
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref, turn_torch, turn_triton


@pytest.fixture(autouse=True)
def triton_with_small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")
    monkeypatch.setitem(kernels.cross_entropy.TILES, 80, (64, 1))


def case(R, C, V, dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(R + V)
    hidden, weight = ((torch.randn(n, C, generator=g) * scale**0.5).to(dtype).requires_grad_() for n in (R, V))
    labels = torch.randint(0, V, (R,), generator=g)
    labels[2::5] = -100
    return hidden, weight, labels


def with_gradients(f, hidden, weight, labels, up=0.37, **how):
    loss = f(hidden, weight, labels, **how)
    return [loss.detach(), *torch.autograd.grad(loss * up, (hidden, weight))]


def errs_little_more(a, b, true):
    """RMS error of a at most 1.25 times that of b, plain torch, and the largest at most 4 times; one rounding of the
    answer, which torch can avoid by luck, is granted."""
    if true.numel():
        unit = torch.finfo(a.dtype).eps * true.abs().max()
        a, b = (t.double() - true for t in (a, b))
        assert a.square().mean().sqrt() <= 1.25 * b.square().mean().sqrt() + unit / 4
        assert a.abs().max() <= 4 * b.abs().max() + unit


def agrees(loss, true, n, V, largest):
    """A loss is a sum of n terms log(sum) + max - logit, each of which rounds numbers no larger than these, 4 times."""
    assert loss.dtype == torch.float32
    assert abs(loss.double() - true) <= 4 * 2**-24 * n * (2 * largest + 1 + torch.log(torch.tensor(V)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, V", [(1, 1), (1, 15), (3, 63), (2, 64), (5, 65), (17, 97), (15, 129), (4, 300)])
def test_a_chunk_turns_into_its_gradient(n, V, dtype):
    """Logits of size 1 and 300, in every block of a row, with a stride of its own. bf16 is loaded and stored here and
    never multiplied; the interpreter truncates it on the way out, hence one more unit in the last place."""
    g = torch.Generator().manual_seed(V)
    for size in (1, 300):
        room = (torch.randn(n, V + 3, generator=g) * size).to(dtype)
        logits, labels = room[:, :V], torch.randint(0, V, (n,), generator=g)
        labels[1::3] = -100
        guard, given = room[:, V:].clone(), logits.double()
        theirs, truth = turn_torch(logits.clone(), labels, True), turn_torch(logits.double(), labels, True)
        silent, _ = turn_triton(logits.clone(), labels, False)
        ours = turn_triton(logits, labels, True)
        assert ours[1].data_ptr() == room.data_ptr() and torch.equal(room[:, V:], guard) and ours[0] == silent
        if dtype == torch.bfloat16:
            torch.testing.assert_close(ours[1], theirs[1], rtol=2**-7, atol=1e-6)
        else:
            errs_little_more(ours[1], theirs[1], truth[1])
        agrees(ours[0], truth[0], n, V, given.abs().max())
        assert not ours[1][labels == -100].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("R, V, chunk", [(1, 1, None), (17, 97, 5), (15, 129, 15), (6, 70, 4), (0, 5, None)])
def test_loss_and_gradients_err_little_more_than_plain_torch(R, V, chunk, dtype):
    args = case(R, 16, V, dtype)
    how = {} if chunk is None else {"chunk": chunk}
    truth = with_gradients(linear_cross_entropy_ref, *(t.detach().double().requires_grad_() for t in args[:2]), args[2])
    theirs = with_gradients(linear_cross_entropy_ref, *args)
    ours = with_gradients(linear_cross_entropy, *args, **how)
    assert [t.dtype for t in ours] == [torch.float32, dtype, dtype]
    for a, b, true in zip(ours[1:], theirs[1:], truth[1:]):
        errs_little_more(a, b, true)
    if dtype == torch.float32:
        logits = args[0].detach().double() @ args[1].detach().double().T if R else torch.zeros(1)
        agrees(ours[0], truth[0], R, V, 16 * logits.abs().max())  # 16 products and sums made each logit
    else:
        errs_little_more(ours[0], theirs[0], truth[0])


@pytest.mark.parametrize("word", [-1, 70, 2**31 + 5, -2**40])
def test_a_label_that_is_no_word_makes_the_loss_nan(word):
    """And reads nothing outside: addresses like the last two are nobody's."""
    hidden, weight, labels = case(4, 8, 70)
    labels[1] = word
    assert linear_cross_entropy(hidden, weight, labels).isnan()


def test_inputs_may_be_slices():
    hidden, weight, labels = case(9, 8, 70)
    odd = [torch.stack([t.detach(), -t.detach()], -1)[..., 0].requires_grad_() for t in (hidden, weight)]
    assert not any(t.is_contiguous() for t in odd)
    slices = torch.stack([labels, labels * 0], 1)[:, 0]
    for a, b in zip(with_gradients(linear_cross_entropy, *odd, slices, chunk=4),
                    with_gradients(linear_cross_entropy, hidden, weight, labels, chunk=4)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_rows_do_not_see_each_other():
    """Noise in one row leaves every bit of the others, in loss and in gradient."""
    logits = torch.randn(5, 150, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 149, 0, 64, -100])
    noisy = logits.clone()
    noisy[2] = 1e30
    (_, g), (_, h) = (turn_triton(t, labels, True) for t in (logits, noisy))
    others = [0, 1, 3, 4]
    assert torch.equal(g[others], h[others]) and not torch.equal(g[2], h[2])


def broken_kernels():
    """Variants of the kernel's source with one thing wrong each."""
    return {"largest of the last block": ("higher = tl.maximum(m, tl.max(x))", "higher = tl.max(x)"),
            "sum not rescaled": ("l * tl.exp2((m - higher) * LOG2E)", "l"),
            "ignored rows learn": ("tl.where(keep, 1.0 / l, 0.0)", "1.0 / l"),
            "no onehot": ("tl.where(i + c == y, 1.0, 0.0)", "0.0"),
            "tail not masked": ('mask=i + c < V, other=-float("inf")).to(tl.float32)\n        higher',
                                'mask=i + c < V, other=0.0).to(tl.float32)\n        higher')}


@pytest.mark.parametrize("name", broken_kernels())
def test_a_broken_kernel_is_seen(name, monkeypatch, tmp_path):
    """What the first test asks of the kernel, five wrong kernels cannot give."""
    broken = variant(kernels.cross_entropy, *broken_kernels()[name], tmp_path)
    monkeypatch.setattr(kernels.cross_entropy, "_turn", broken._turn)
    with pytest.raises(AssertionError):
        test_a_chunk_turns_into_its_gradient(17, 97, torch.float32)


def test_the_operator_is_what_torch_believes_it_to_be():
    hidden, weight, labels = case(5, 4, 7)
    torch.library.opcheck(torch.ops.pumice.linear_cross_entropy, (hidden, weight, labels, 2, torch.float32, True, True))


def test_one_graph_holds_it_all():
    f = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    args = case(6, 8, 70)
    for ours, theirs in zip(with_gradients(f, *args), with_gradients(linear_cross_entropy, *args)):
        assert torch.equal(ours, theirs)
