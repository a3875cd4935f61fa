"""The kernels of kernels/swiglu.py, interpreted (tests/interpret.py)."""

import pytest
import torch
from interpret import variant
from kernel_cases import check_errors, close, normal, opcheck, strided, with_gradients

import kernels
from kernels import swiglu as module
from kernels.swiglu import SWIGLU_TILE, swiglu, swiglu_backward_op, swiglu_op, swiglu_ref


@pytest.fixture(autouse=True)
def use_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")


def case(N, F, dtype=torch.float64):
    return normal(N, F, dtype=dtype) * 3, normal(N, F, dtype=dtype, seed=1)


@pytest.mark.parametrize("N, F", [(0, 15), (1, 1), (17, 97), (129, 97)])
def test_outputs_and_gradients_equal_the_definition(N, F):
    """Part of one program's tile, and several tiles"""
    close(swiglu, swiglu_ref, *case(N, F))
    assert 17 * 97 < SWIGLU_TILE < 129 * 97


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_precision_errs_at_most_twice_as_much(dtype):
    check_errors(swiglu, swiglu_ref, *case(97, 129, dtype))


BROKEN = {
    "gate and up swapped": ("g * tl.sigmoid(g) * u", "u * tl.sigmoid(u) * g"),
    "derivative of the sigmoid alone": ("dy * u * p * (1 + g * (1 - p))", "dy * u * p * (1 - p)"),
    "last element forgotten": ("tl.store(DU + i, dy * g * p, i < n)", "tl.store(DU + i, dy * g * p, i < n - 1)"),
    "sigmoid in half precision": ("p = tl.sigmoid(g)", "p = tl.sigmoid(g).to(tl.float16).to(wide)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_fails(name, tmp_path):
    with pytest.raises(AssertionError):
        check_errors(variant(module, *BROKEN[name], tmp_path).swiglu, swiglu_ref, *case(17, 15, torch.float32))


def test_extreme_gates_stay_finite():
    gate = torch.tensor([-6e4, -200.0, -89.0, -0.0, 0.0, 89.0, 200.0, 6e4])
    for dtype in (torch.float32, torch.float16):
        for t in with_gradients(swiglu, gate.to(dtype), torch.ones(8, dtype=dtype), up=[torch.ones(8, dtype=dtype)]):
            assert t.isfinite().all()


def test_strides_change_nothing():
    gate, up = case(24, 17)
    close(swiglu, swiglu_ref, strided(gate), up.T.contiguous().T, up=[strided(normal(24, 17, seed=3))])
    close(swiglu, swiglu_ref, *torch.cat([gate, up], 1).chunk(2, 1))        # halves of one fused projection


def test_operators_pass_opcheck():
    gate, up = (t.requires_grad_() for t in case(5, 15, torch.float32))
    opcheck(swiglu_op, (gate, up))
    opcheck(swiglu_backward_op, (gate.detach(), up.detach(), up.detach()))
