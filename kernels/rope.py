"""Rotary positions (Su et al. 2021), halves layout: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the
halves of a head.

    N tokens   R of them asked for   H query heads   G key heads   K head dim
    q (R, H, K)   k (N, G, K)   cos, sin (N, K/2)   rows (R,), the tokens of q   ->   rotated q, k

The published checkpoints of the Llama family are permuted for halves; Meta's originals and GGUF rotate neighbouring
pairs instead.

The argument in bytes. Every number of q and k is read once and written once, in one launch for both: with 32 heads of
128 in bf16, 16 KB read and 16 KB written per token, against which the cosines, 512 bytes, are nothing. Plain torch
makes four products, two sums and their concatenation: 4.5 times that. A rotation is undone by the rotation back, so
the gradient is the same kernel with the angle negative, and neither q nor k is kept.

Not in place, although it could be: nobody keeps the unrotated q and k (a linear layer keeps its input, not its output),
so that they are freed at once and in-place would save no traffic and no memory that lasts. It would make autograd copy
gradients, for q and k are views.
"""

import torch

from kernels import on_its_device, tl, triton, use_triton


def rope(x, cos, sin):
    """The definition, of one tensor. x (N, H, K), cos and sin (N, K/2) -> (N, H, K)"""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # angles were fp32; only cosines are cast
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


class Rope(torch.autograd.Function):
    """The definition, for q and k, keeping the cosines alone."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, rows):
        ctx.save_for_backward(cos, sin, rows)
        at = slice(None) if rows is None else rows
        return rope(q, cos[at], sin[at]), rope(k, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        cos, sin, rows = ctx.saved_tensors
        at = slice(None) if rows is None else rows
        return rope(dq, cos[at], -sin[at]), rope(dk, cos, -sin), None, None, None


# ---- the kernel -----------------------------------------------------------------------------------------------------

@triton.jit
def rotate(X, Y, COS, SIN, n, at, H: tl.constexpr, HALF: tl.constexpr, SIGN: tl.constexpr, HEADS: tl.constexpr,
           BLOCK: tl.constexpr):
    """All heads of row n, by the angles of token `at`. Called from kernels: a function of Triton is inlined."""
    h, i = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]  # a tile of heads by pairs
    there = (h < H) & (i < HALF)
    wide = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    cos = tl.load(COS + at * HALF + i, i < HALF, 0).to(wide)
    sin = tl.load(SIN + at * HALF + i, i < HALF, 0).to(wide) * SIGN
    first = (n * H + h) * 2 * HALF + i
    x1 = tl.load(X + first, there, 0).to(wide)
    x2 = tl.load(X + first + HALF, there, 0).to(wide)
    tl.store(Y + first, x1 * cos - x2 * sin, there)
    tl.store(Y + first + HALF, x2 * cos + x1 * sin, there)


@triton.jit
def rope_kernel(Q, K, OUT_Q, OUT_K, COS, SIN, ROWS, R, H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr,
                SIGN: tl.constexpr, HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)  # one program per token: row n of k, and row n of q if there is one
    rotate(K, OUT_K, COS, SIN, n, n, G, HALF, SIGN, HEADS_K, BLOCK)
    if n < R:
        at = n
        if ROWS is not None:
            at = tl.load(ROWS + n)
        rotate(Q, OUT_Q, COS, SIN, n, at, H, HALF, SIGN, HEADS_Q, BLOCK)


# ---- what torch sees ------------------------------------------------------------------------------------------------

@torch.library.custom_op("pumice::rope", mutates_args=())
@on_its_device
def rope_op(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rows: torch.Tensor | None,
            sign: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sign 1 turns forward, -1 back."""
    (R, H, K), (N, G, _) = q.shape, k.shape
    q, k, cos, sin, rows = (t if t is None else t.contiguous() for t in (q, k, cos, sin, rows))
    out_q, out_k, size = torch.empty_like(q), torch.empty_like(k), triton.next_power_of_2
    rope_kernel[N,](q, k, out_q, out_k, cos, sin, rows, R, H, G, K // 2, sign, size(H), size(G), size(K // 2))
    return out_q, out_k


@rope_op.register_fake
def _(q, k, cos, sin, rows, sign):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def rope_context(ctx, inputs, output):
    _, _, cos, sin, rows, ctx.sign = inputs
    ctx.save_for_backward(cos, sin, rows)


def rope_gradients(ctx, dq, dk):
    return *torch.ops.pumice.rope(dq, dk, *ctx.saved_tensors, -ctx.sign), None, None, None, None


rope_op.register_autograd(rope_gradients, setup_context=rope_context)


# ---- the choice -----------------------------------------------------------------------------------------------------

def rope_qk(q, k, cos, sin, rows=None):
    """q (R, H, K) of the tokens `rows` (None: of all), k (N, G, K), cos and sin (N, K/2) -> rotated q, k"""
    asked = k.shape[0] if rows is None else rows.shape[0]
    assert q.shape[0] == asked <= k.shape[0] == cos.shape[0], \
        f"{q.shape[0]} queries for {asked} rows, {k.shape[0]} keys, {cos.shape[0]} positions"
    return rope_op(q, k, cos, sin, rows, 1) if use_triton(q) else Rope.apply(q, k, cos, sin, rows)
