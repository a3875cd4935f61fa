"""SwiGLU (Shazeer 2020): silu(gate) * up, where silu(g) = g * sigmoid(g).

    N tokens   F width of the MLP        gate, up (N, F)   ->   (N, F)

The cost in bytes. The kernels move 3 N F elements forward (two reads, one write) and 5 N F backward (three reads,
two writes). Plain torch writes silu(gate), reads it again and saves it for backward. So it moves 5 N F elements
forward, and saves three tensors instead of two. The backward kernel recomputes the sigmoid. The kernels treat a tensor
as one long array. Each program computes SWIGLU_TILE elements.
"""

import torch
import torch.nn.functional as F

from kernels import on_its_device, tl, triton, use_triton

SWIGLU_TILE, SWIGLU_WARPS = 4096, 8  # 16 elements per thread: in bf16, two loads of 16 bytes from each tensor


def swiglu_ref(gate, up):
    """Return silu(gate) * up, the definition in plain torch."""
    return F.silu(gate) * up


class SwiGLUFunction(torch.autograd.Function):
    """Compute swiglu_ref, but save only gate and up for backward. Autograd would also save silu(gate)."""

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
    # int64, because the number of elements may exceed 2**31, for example 50,000 tokens of width 44,000
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
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
    # y = u * g * p with p = sigmoid(g). The derivative of p is p * (1 - p), so that of g * p is p + g * p * (1 - p)
    tl.store(DG + i, dy * u * p * (1 + g * (1 - p)), i < n)


# ---- the operators registered with torch ----------------------------------------------------------------------------

@torch.library.custom_op("pumice::swiglu", mutates_args=())
@on_its_device
def swiglu_op(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    swiglu_forward[triton.cdiv(y.numel(), SWIGLU_TILE),](gate, up, y, y.numel(), SWIGLU_TILE, num_warps=SWIGLU_WARPS)
    return y


@torch.library.custom_op("pumice::swiglu_backward", mutates_args=())
@on_its_device
def swiglu_backward_op(gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
    dg, du = torch.empty_like(gate), torch.empty_like(up)
    programs = triton.cdiv(dy.numel(), SWIGLU_TILE)
    swiglu_backward[programs,](gate, up, dy, dg, du, dy.numel(), SWIGLU_TILE, num_warps=SWIGLU_WARPS)
    return dg, du


swiglu_op.register_fake(lambda gate, up: gate.new_empty(gate.shape))
swiglu_backward_op.register_fake(lambda gate, up, dy: (gate.new_empty(gate.shape), up.new_empty(up.shape)))
swiglu_op.register_autograd(lambda ctx, dy: swiglu_backward_op(*ctx.saved_tensors, dy),
                            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def swiglu(gate, up):
    """Return silu(gate) * up (N, F). gate and up (N, F) have the same dtype."""
    assert gate.shape == up.shape and gate.dtype == up.dtype, \
        f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}"
    if use_triton(gate):
        return swiglu_op(gate, up)
    return SwiGLUFunction.apply(gate, up) if torch.is_grad_enabled() else swiglu_ref(gate, up)
