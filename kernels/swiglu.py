"""SwiGLU (Shazeer 2020): silu(gate) * up, with silu(g) = g * sigmoid(g).

    N rows   F width of the MLP        gate, up (N, F)   ->   (N, F)

The argument in bytes. Element by element, so the floor is 3 N F forward (two reads, one write) and 5 N F backward
(three reads, two writes); plain torch writes silu(gate) out, reads it back and keeps it: 5 N F forward, and half as
much memory again for the widest tensors of the layer. One sigmoid more in the backward pass replaces that copy.

Nothing here knows of rows: both tensors are read as one long line, cut into pieces of BLOCK numbers.
"""

import torch
import torch.nn.functional as F

from kernels import on_its_device, tl, triton, use_triton

BLOCK, WARPS = 4096, 8  # 16 numbers per thread: two loads of 16 bytes from each tensor on their way at once


def swiglu_ref(gate, up):
    """The definition."""
    return F.silu(gate) * up


class SwiGLU(torch.autograd.Function):
    """The definition, keeping gate and up alone."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


# ---- the kernels ----------------------------------------------------------------------------------------------------

@triton.jit
def swiglu_forward(G, U, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # int64: 50k tokens of width 44k pass 2**31
    wide = tl.float64 if G.dtype.element_ty == tl.float64 else tl.float32
    g = tl.load(G + i, i < n, 0).to(wide)
    u = tl.load(U + i, i < n, 0).to(wide)
    tl.store(Y + i, g * tl.sigmoid(g) * u, i < n)


@triton.jit
def swiglu_backward(G, U, DY, DG, DU, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.float64 if G.dtype.element_ty == tl.float64 else tl.float32
    g = tl.load(G + i, i < n, 0).to(wide)
    u = tl.load(U + i, i < n, 0).to(wide)
    dy = tl.load(DY + i, i < n, 0).to(wide)
    p = tl.sigmoid(g)
    tl.store(DU + i, dy * g * p, i < n)
    tl.store(DG + i, dy * u * p * (1 + g * (1 - p)), i < n)  # d/dg g p = p + g p (1 - p)


# ---- what torch sees ------------------------------------------------------------------------------------------------

@torch.library.custom_op("pumice::swiglu", mutates_args=())
@on_its_device
def swiglu_op(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    swiglu_forward[triton.cdiv(y.numel(), BLOCK),](gate, up, y, y.numel(), BLOCK, num_warps=WARPS)
    return y


@swiglu_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("pumice::swiglu_backward", mutates_args=())
@on_its_device
def swiglu_backward_op(gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
    dg, du = torch.empty_like(gate), torch.empty_like(up)
    swiglu_backward[triton.cdiv(dy.numel(), BLOCK),](gate, up, dy, dg, du, dy.numel(), BLOCK, num_warps=WARPS)
    return dg, du


@swiglu_backward_op.register_fake
def _(gate, up, dy):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def swiglu_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def swiglu_gradients(ctx, dy):
    return torch.ops.pumice.swiglu_backward(*ctx.saved_tensors, dy)


swiglu_op.register_autograd(swiglu_gradients, setup_context=swiglu_context)


# ---- the choice -----------------------------------------------------------------------------------------------------

def swiglu(gate, up):
    """gate, up (N, F), of one dtype -> (N, F)"""
    assert gate.shape == up.shape and gate.dtype == up.dtype, \
        f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}"
    if use_triton(gate):
        return swiglu_op(gate, up)
    return SwiGLU.apply(gate, up) if torch.is_grad_enabled() else swiglu_ref(gate, up)
