"""SwiGLU: plain torch against the definition; the kernels compiled. tests/kernels/interpreted runs them."""

import pytest
import torch
from compile_check import assert_fits, compile_for
from kernel_cases import SIZES, check_errors, close, normal, saved

from kernels.swiglu import SWIGLU_TILE, SWIGLU_WARPS, swiglu, swiglu_backward, swiglu_forward, swiglu_ref


@pytest.mark.parametrize("F", SIZES)
def test_function_and_gradients_equal_the_definition(F):
    for N in (0, 17):
        close(swiglu, swiglu_ref, normal(N, F), normal(N, F, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_at_most_twice_as_much(dtype):
    gate, up = normal(97, 129, dtype=dtype), normal(97, 129, dtype=dtype, seed=1)
    assert torch.equal(swiglu(gate, up), swiglu_ref(gate, up))
    check_errors(swiglu, swiglu_ref, gate, up)


def test_gradients_equal_finite_differences():
    assert torch.autograd.gradcheck(swiglu, (normal(3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_()))


def test_only_gate_and_up_are_saved():
    gate, up = normal(50, 64), normal(50, 64, seed=1)
    assert saved(swiglu, gate, up) == 0
    assert saved(swiglu_ref, gate, up) == gate.nbytes                       # the definition alone saves silu(gate)


def test_it_compiles_and_can_be_recomputed():
    from torch.utils.checkpoint import checkpoint
    args = normal(17, 15), normal(17, 15, seed=1)
    close(torch.compile(swiglu, fullgraph=True, backend="aot_eager"), swiglu, *args)
    close(lambda *a: checkpoint(swiglu, *a, use_reentrant=False), swiglu, *args)


@pytest.mark.parametrize("arch, dtypes", [(80, ("*bf16", "*fp32")), (90, ("*fp32", "*bf16")),
                                          (100, ("*bf16", "*fp32"))])
def test_kernels_fit_every_gpu(arch, dtypes):
    kernels = (swiglu_forward, "G U Y"), (swiglu_backward, "G U DY DG DU")
    for (kernel, pointers), dtype in zip(kernels, dtypes):
        args = dict.fromkeys(pointers.split(), dtype) | {"n": "i32"}
        found = compile_for(kernel, args, {"BLOCK": SWIGLU_TILE}, arch, SWIGLU_WARPS)
        assert_fits(found)
        assert found["wide"] >= 2 * len(pointers.split())                   # two 16-byte accesses for each tensor
