"""The kernel of kernels/rope.py, interpreted (tests/interpret.py)."""

import pytest
import torch
from interpret import variant
from kernel_cases import check_errors, close, normal, opcheck, strided

import kernels
from kernels import rope as module
from kernels.rope import rope_op, rope_ref


@pytest.fixture(autouse=True)
def use_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")


def case(N, H=4, G=2, K=12, rows=None, dtype=torch.float64, m=module):
    """-> q, k and two functions of them: the kernel, the definition"""
    angles = normal(N, K // 2, dtype=torch.float32) * 10
    rows = None if rows is None else torch.tensor(rows, dtype=torch.long)
    cos, sin, at = angles.cos(), angles.sin(), slice(None) if rows is None else rows
    q, k = normal(N if rows is None else len(rows), H, K, dtype=dtype), normal(N, G, K, dtype=dtype, seed=1)
    return (q, k, lambda q, k: m.rope_qk(q, k, cos, sin, rows),
            lambda q, k: (rope_ref(q, cos[at], sin[at]), rope_ref(k, cos, sin)))


@pytest.mark.parametrize("N, H, G, K", [(0, 4, 2, 12), (1, 1, 1, 2), (5, 15, 5, 30), (2, 17, 17, 72), (2, 4, 2, 128)])
def test_outputs_and_gradients_equal_the_definition(N, H, G, K):
    q, k, f, true = case(N, H, G, K)
    close(f, true, q, k)


@pytest.mark.parametrize("rows", [[], [0, 3, 4, 6]])
def test_queries_of_some_rows(rows):
    q, k, f, true = case(7, rows=rows)
    close(f, true, q, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_precision_errs_at_most_twice_as_much(dtype):
    q, k, f, true = case(7, K=16, dtype=dtype)
    check_errors(f, true, q, k)


BROKEN = {
    "gradient not rotated back": ("*ctx.saved_tensors, -ctx.sign)", "*ctx.saved_tensors, ctx.sign)"),
    "wrong sign": ("tl.store(Y + first, x1 * cos - x2", "tl.store(Y + first, x1 * cos + x2"),
    "neighbouring pairs": ("first = (n * H + h) * 2 * HALF + i\n", "first = (n * H + h) * 2 * HALF + i // 2 * 2\n"),
    "positions of k for q": ("at = tl.load(ROWS + n)", "at = n"),
    "last head forgotten": ("mask = (h < H) &", "mask = (h < H - 1) &"),
    "last pair forgotten": ("& (i < HALF)", "& (i < HALF - 1)"),
}


@pytest.mark.parametrize("name", [None, *BROKEN])
def test_a_broken_kernel_fails(name, tmp_path):
    m = module if name is None else variant(module, *BROKEN[name], tmp_path)
    q, k, f, true = case(7, rows=[0, 3, 4, 6], dtype=torch.float16, m=m)
    if name is None:
        return check_errors(f, true, q, k)
    with pytest.raises(AssertionError):
        check_errors(f, true, q, k)


def test_strides_change_nothing():
    q, k, f, true = case(6)
    up = [strided(normal(*t.shape, seed=3)) for t in (q, k)]
    close(f, true, strided(q), k.transpose(0, 1).contiguous().transpose(0, 1), up=up)


def test_the_operator_passes_opcheck():
    q, k, *_ = case(5, rows=[1, 4], dtype=torch.float32)
    cos, sin = normal(5, 6, dtype=torch.float32).cos(), normal(5, 6, dtype=torch.float32).sin()
    opcheck(rope_op, (q.requires_grad_(), k.requires_grad_(), cos, sin, torch.tensor([1, 4]), 1))
