"""The kernel of kernels/rope.py, interpreted (tests/interpret.py)."""

import pytest
import torch
from kernel_cases import close, normal, odd, with_gradients, within_budget

import kernels
from kernels.rope import rope, rope_op, rope_qk


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")


def case(N, H=4, G=2, K=12, rows=None, dtype=torch.float64):
    """-> q, k and functions of them: the kernel, the definition"""
    angles = normal(N, K // 2, dtype=torch.float32) * 10
    cos, sin, at = angles.cos(), angles.sin(), slice(None) if rows is None else rows
    q, k = normal(N if rows is None else len(rows), H, K, dtype=dtype), normal(N, G, K, dtype=dtype, seed=1)
    return (q, k, lambda q, k: rope_qk(q, k, cos, sin, rows),
            lambda q, k: (rope(q, cos[at], sin[at]), rope(k, cos, sin)))


@pytest.mark.parametrize("N", [0, 1, 15, 17, 97, 129])
def test_it_is_the_definition_and_so_are_the_gradients(N):
    q, k, f, true = case(N)
    close(f, true, q, k)


@pytest.mark.parametrize("H, G", [(1, 1), (15, 5), (17, 17)])
@pytest.mark.parametrize("K", [2, 30, 72, 128])
def test_any_heads_of_any_size(H, G, K):
    q, k, f, true = case(5, H, G, K)
    close(f, true, q, k)


@pytest.mark.parametrize("rows", [[], [0], [16], [0, 3, 4, 9, 16], list(range(17))])
def test_some_rows_are_asked_for(rows):
    q, k, f, true = case(17, rows=torch.tensor(rows, dtype=torch.long))
    close(f, true, q, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_precision_errs_little_more_than_torch_does(dtype):
    q, k, f, true = case(97, K=16, dtype=dtype)
    assert within_budget(f, true, q, k)


@pytest.mark.parametrize("broken", ["neighbouring pairs", "not turned back", "positions of k", "head forgotten"])
def test_a_kernel_that_is_wrong_would_be_seen(broken):
    rows = torch.tensor([0, 3, 4, 9, 16])
    q, k, f, true = case(17, rows=rows, dtype=torch.float16)

    def wrong(q, k):
        if broken == "neighbouring pairs":
            mix = [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
            q, k = f(q[..., mix], k[..., mix])
            back = torch.tensor(mix).argsort()
            return q[..., back], k[..., back]
        if broken == "not turned back":                                     # the gradient of adding what rotation adds
            out = f(q.detach(), k.detach())
            return tuple(o + t - t.detach() for o, t in zip(out, (q, k)))
        if broken == "positions of k":
            other = case(17, dtype=q.dtype)[2]
            whole, k = other(torch.cat([q, q.new_zeros(12, *q.shape[1:])]), k)
            return whole[:5], k
        q, k = f(q, k)
        return q * torch.tensor([1, 1, 1, 0])[:, None].to(q.dtype), k
    assert within_budget(f, true, q, k) and not within_budget(wrong, true, q, k)


def test_strides_do_not_matter():
    q, k, f, true = case(24)
    up = [odd(normal(*t.shape, seed=3)) for t in (q, k)]
    close(f, true, odd(q), k.transpose(0, 1).contiguous().transpose(0, 1), up=up)


def test_a_rotation_changes_no_length_and_turning_back_undoes_it():
    q, k, f, _ = case(17)
    out_q, out_k = f(q, k)
    torch.testing.assert_close(out_q.square().sum(-1), q.square().sum(-1), rtol=1e-6, atol=0)  # cos and sin are fp32
    angles = normal(17, 6, dtype=torch.float32) * 10
    back, _ = rope_op(out_q, out_k, angles.cos(), angles.sin(), None, -1)
    torch.testing.assert_close(back, q, rtol=1e-6, atol=1e-6)


def test_it_passes_a_finite_difference_check():
    q, k, f, _ = case(3, H=2, G=1, K=4, rows=torch.tensor([0, 2]))
    assert torch.autograd.gradcheck(f, (q.requires_grad_(), k.requires_grad_()))


@pytest.mark.parametrize("rows", [None, [1, 4]])
def test_opcheck(rows):
    rows = rows and torch.tensor(rows)
    q, k, *_ = case(5, rows=rows, dtype=torch.float32)
    cos, sin = normal(5, 6, dtype=torch.float32).cos(), normal(5, 6, dtype=torch.float32).sin()
    torch.library.opcheck(rope_op, (q.requires_grad_(), k.requires_grad_(), cos, sin, rows, 1))


def test_it_compiles_as_one_graph():
    q, k, f, _ = case(17, rows=torch.tensor([0, 3, 4, 9, 16]), dtype=torch.float32)
    whole = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(whole, q, k), with_gradients(f, q, k)))
