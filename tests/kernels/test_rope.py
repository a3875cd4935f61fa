"""Rotary positions: plain torch against the definition; the kernel compiled. tests/kernels/interpreted runs it.
tests/test_model.py compares the definition with transformers."""

import pytest
import torch
from compile_check import assert_fits, compile_for
from kernel_cases import close, normal, saved

from kernels.rope import rope_kernel, rope_qk, rope_ref


def case(N, rows=None, dtype=torch.float64):
    """-> q, k and two functions of them: ours, the definition"""
    angles = normal(N, 6, dtype=torch.float32) * 10
    cos, sin, at = angles.cos(), angles.sin(), slice(None) if rows is None else rows
    q, k = normal(N if rows is None else len(rows), 4, 12, dtype=dtype), normal(N, 2, 12, dtype=dtype, seed=1)
    return (q, k, lambda q, k: rope_qk(q, k, cos, sin, rows),
            lambda q, k: (rope_ref(q, cos[at], sin[at]), rope_ref(k, cos, sin)))


@pytest.mark.parametrize("N, rows", [(0, None), (17, None), (17, []), (17, [0, 3, 16])])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_function_and_gradients_equal_the_definition(N, rows, dtype):
    """In bf16 too: both gradients consist of the same elementwise products."""
    q, k, f, true = case(N, rows if rows is None else torch.tensor(rows, dtype=torch.long), dtype)
    close(f, true, q, k)


def test_gradients_equal_finite_differences():
    q, k, f, _ = case(3, rows=torch.tensor([0, 2]))
    assert torch.autograd.gradcheck(f, (q.requires_grad_(), k.requires_grad_()))


def test_neither_q_nor_k_is_saved():
    q, k, f, true = case(50, dtype=torch.float32)
    assert saved(f, q, k) <= saved(true, q, k) == 2 * 50 * 6 * 4            # cos and sin, shared by all layers


def test_it_compiles_and_can_be_recomputed():
    from torch.utils.checkpoint import checkpoint
    q, k, f, _ = case(17, rows=torch.tensor([0, 3, 16]))
    close(torch.compile(f, fullgraph=True, backend="aot_eager"), f, q, k)
    close(lambda *a: checkpoint(f, *a, use_reentrant=False), f, q, k)


def test_wrong_shapes_are_refused():
    q, k, *_ = case(17)
    with pytest.raises(AssertionError, match="17 queries for 2 rows, 17 keys, 17 positions"):
        rope_qk(q, k, torch.ones(17, 6), torch.ones(17, 6), torch.tensor([0, 1]))


@pytest.mark.parametrize("arch, dtype, rows, H, G, K", [
    (80, "*fp32", None, 64, 8, 128), (80, "*bf16", "*i64", 15, 5, 64), (90, "*bf16", "*i64", 16, 16, 72),
    (100, "*bf16", None, 32, 32, 128)])
def test_the_kernel_fits_every_gpu(arch, dtype, rows, H, G, K):
    """70B, 0.5B, heads of 72, whose halves are no power of two, and 7B"""
    import triton
    size = triton.next_power_of_2
    args = dict.fromkeys(("Q", "K", "OUT_Q", "OUT_K"), dtype) | {"COS": "*fp32", "SIN": "*fp32", "R": "i32"}
    how = dict(H=H, G=G, HALF=K // 2, SIGN=-1, HEADS_Q=size(H), HEADS_K=size(G), BLOCK=size(K // 2))
    args, how = (args | {"ROWS": rows}, how) if rows else (args, how | {"ROWS": None})
    found = compile_for(rope_kernel, args, how, arch, unaligned=["R"])
    assert_fits(found)
    assert found["wide"]
