"""SwiGLU: the definition's own Function here, the kernels interpreted and compiled."""

import pytest
import torch
from compile_check import ARCHS, compile_for, fits
from interpret import interpret
from kernel_cases import SIZES, close, normal, saved, within_budget

from kernels.swiglu import BLOCK, WARPS, swiglu, swiglu_backward, swiglu_forward, swiglu_ref


def test_the_kernels_interpreted():
    interpret("swiglu")


@pytest.mark.parametrize("F", SIZES)
def test_the_function_is_the_definition_and_so_are_its_gradients(F):
    for N in (0, 1, 17):
        close(swiglu, swiglu_ref, normal(N, F), normal(N, F, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_little_more_than_the_definition(dtype):
    gate, up = normal(97, 129, dtype=dtype), normal(97, 129, dtype=dtype, seed=1)
    assert torch.equal(swiglu(gate, up), swiglu_ref(gate, up))
    assert within_budget(swiglu, swiglu_ref, gate, up)


def test_it_passes_a_finite_difference_check():
    assert torch.autograd.gradcheck(swiglu, (normal(3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_()))


def test_it_keeps_gate_and_up_alone():
    gate, up = normal(50, 64), normal(50, 64, seed=1)
    assert saved(swiglu, gate, up) == 0
    assert saved(swiglu_ref, gate, up) == gate.nbytes                       # what the same check says of the definition


def test_it_compiles_as_one_graph_and_is_recomputed():
    from torch.utils.checkpoint import checkpoint
    args = normal(17, 15), normal(17, 15, seed=1)
    close(torch.compile(swiglu, fullgraph=True, backend="aot_eager"), swiglu, *args)
    close(lambda *a: checkpoint(swiglu, *a, use_reentrant=False), swiglu, *args)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_the_kernels_fit_every_card(arch, dtype):
    for kernel, pointers in ((swiglu_forward, "G U Y"), (swiglu_backward, "G U DY DG DU")):
        args = dict.fromkeys(pointers.split(), dtype) | {"n": "i32"}
        found = compile_for(kernel, args, {"BLOCK": BLOCK}, arch, WARPS)
        fits(found)
        assert found["wide"] >= 2 * len(pointers.split())                   # two for each tensor, none narrow
