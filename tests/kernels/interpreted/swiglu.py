"""The kernels of kernels/swiglu.py, interpreted (tests/interpret.py)."""

import pytest
import torch
from kernel_cases import SIZES, close, normal, odd, with_gradients, within_budget

import kernels
from kernels.swiglu import BLOCK, swiglu, swiglu_backward_op, swiglu_op, swiglu_ref


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")


def case(N, F, dtype=torch.float64):
    return normal(N, F, dtype=dtype) * 3, normal(N, F, dtype=dtype, seed=1)


@pytest.mark.parametrize("F", SIZES)
def test_it_is_the_definition_and_so_are_the_gradients(F):
    for N in (0, 1, 17, 129):
        close(swiglu, swiglu_ref, *case(N, F))
    assert 17 * 97 < BLOCK < 129 * 129  # a part of a piece, and several


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_precision_errs_little_more_than_torch_does(dtype):
    assert within_budget(swiglu, swiglu_ref, *case(97, 129, dtype))


@pytest.mark.parametrize("broken", ["gate and up swapped", "derivative of sigmoid alone", "last number forgotten"])
def test_a_kernel_that_is_wrong_would_be_seen(broken):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return swiglu_ref(*((up, gate) if broken == "gate and up swapped" else (gate, up)))

        @staticmethod
        def backward(ctx, dy):
            gate, up = ctx.saved_tensors
            dg, du = swiglu_backward_op(gate, up, dy)
            if broken == "last number forgotten":
                dg[-1, -1] = 0
            elif broken == "derivative of sigmoid alone":
                dg = dy * up * torch.sigmoid(gate)
            return dg, du
    assert not within_budget(Wrong.apply, swiglu_ref, *case(17, 15, torch.float16))


def test_extreme_gates_neither_overflow_nor_leave_a_nan():
    gate = torch.tensor([-6e4, -200.0, -89.0, -0.0, 0.0, 89.0, 200.0, 6e4])
    for dtype in (torch.float32, torch.float16):
        for t in with_gradients(swiglu, gate.to(dtype), torch.ones(8, dtype=dtype), up=[torch.ones(8, dtype=dtype)]):
            assert t.isfinite().all()


def test_strides_do_not_matter():
    gate, up = case(24, 17)
    dy = odd(normal(24, 17, seed=3))
    close(swiglu, swiglu_ref, odd(gate), up.T.contiguous().T, up=[dy])
    close(swiglu, swiglu_ref, *torch.cat([gate, up], 1).chunk(2, 1))        # one product for both, cut in two


def test_it_passes_a_finite_difference_check():
    assert torch.autograd.gradcheck(swiglu, [t.requires_grad_() for t in case(3, 5)])


def test_opcheck():
    gate, up = (t.requires_grad_() for t in case(5, 15, torch.float32))
    torch.library.opcheck(swiglu_op, (gate, up))
    torch.library.opcheck(swiglu_backward_op, (gate.detach(), up.detach(), up.detach()))


def test_it_compiles_as_one_graph():
    args = case(17, 15, torch.float32)
    whole = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(whole, *args), with_gradients(swiglu, *args)))
