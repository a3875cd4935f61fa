"""Rotary position embedding (Su et al. 2021): (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), where x1 and
x2 are the two halves of a head.

    N tokens   R tokens with a query   H query heads   G key heads   K head dim
    q (R, H, K)   k (N, G, K)   cos, sin (N, K/2)   rows (R,): the token of each query   ->   rotated q, k

The weights of Llama checkpoints on Hugging Face are ordered for rotations of halves. In Meta's original checkpoints
and in GGUF files they are ordered for rotations of neighbouring pairs.

The cost in bytes. One launch reads each element of q and k once and writes it once. For q and k of 32 heads each
(K = 128, bf16), 16 KB are read and 16 KB written per token. Plain torch forms four products, two sums and a
concatenation: 4.5 times the traffic. The inverse of a rotation is the rotation by the negative angle. So backward runs
the kernel with -sin and does not need q and k. The kernel writes new tensors. To overwrite q and k would save little
memory, because they are freed right afterwards.
"""

import torch

from kernels import on_its_device, tl, triton, use_triton


def rope_ref(x, cos, sin):
    """Rotate one tensor x (N, H, K) by the definition, with cos and sin (N, K/2) -> (N, H, K)"""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # the caller computes cos and sin in fp32
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


class RopeFunction(torch.autograd.Function):
    """Compute rope_ref for q and k. Only cos, sin and rows are saved for backward."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, rows):
        ctx.save_for_backward(cos, sin, rows)
        at = slice(None) if rows is None else rows
        return rope_ref(q, cos[at], sin[at]), rope_ref(k, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        cos, sin, rows = ctx.saved_tensors
        at = slice(None) if rows is None else rows
        return rope_ref(dq, cos[at], -sin[at]), rope_ref(dk, cos, -sin), None, None, None


# ---- the kernel -----------------------------------------------------------------------------------------------------

@triton.jit
def rotate(X, Y, COS, SIN, n, at, H: tl.constexpr, HALF: tl.constexpr, SIGN: tl.constexpr, HEADS: tl.constexpr,
           BLOCK: tl.constexpr):
    """Rotate all heads of X[n] by the angles of token `at` and write them to Y[n]. SIGN is -1 for the inverse rotation.
    HEADS and BLOCK are H and HALF rounded up to powers of two. Triton inlines this function into rope_kernel."""
    h, i = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]  # a tile of heads x pairs (x1, x2)
    mask = (h < H) & (i < HALF)
    wide = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    cos = tl.load(COS + at * HALF + i, i < HALF, 0).to(wide)
    sin = tl.load(SIN + at * HALF + i, i < HALF, 0).to(wide) * SIGN
    first = (n * H + h) * 2 * HALF + i
    x1 = tl.load(X + first, mask, 0).to(wide)
    x2 = tl.load(X + first + HALF, mask, 0).to(wide)
    tl.store(Y + first, x1 * cos - x2 * sin, mask)
    tl.store(Y + first + HALF, x2 * cos + x1 * sin, mask)


@triton.jit
def rope_kernel(Q, K, OUT_Q, OUT_K, COS, SIN, ROWS, R, H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr,
                SIGN: tl.constexpr, HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)  # one program per token: it rotates row n of k, and row n of q if n < R
    rotate(K, OUT_K, COS, SIN, n, n, G, HALF, SIGN, HEADS_K, BLOCK)
    if n < R:
        at = n
        if ROWS is not None:
            at = tl.load(ROWS + n)
        rotate(Q, OUT_Q, COS, SIN, n, at, H, HALF, SIGN, HEADS_Q, BLOCK)


# ---- the operator registered with torch -----------------------------------------------------------------------------

@torch.library.custom_op("pumice::rope", mutates_args=())
@on_its_device
def rope_op(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rows: torch.Tensor | None,
            sign: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated q and k. sign: 1 for the rotation, -1 for its inverse, which backward needs"""
    (R, H, K), (N, G, _) = q.shape, k.shape
    q, k, cos, sin, rows = (t if t is None else t.contiguous() for t in (q, k, cos, sin, rows))
    out_q, out_k, size = torch.empty_like(q), torch.empty_like(k), triton.next_power_of_2
    rope_kernel[N,](q, k, out_q, out_k, cos, sin, rows, R, H, G, K // 2, sign, size(H), size(G), size(K // 2))
    return out_q, out_k


def rope_context(ctx, inputs, output):
    _, _, cos, sin, rows, ctx.sign = inputs
    ctx.save_for_backward(cos, sin, rows)


def rope_gradients(ctx, dq, dk):
    return *rope_op(dq, dk, *ctx.saved_tensors, -ctx.sign), None, None, None, None


rope_op.register_fake(lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)))
rope_op.register_autograd(rope_gradients, setup_context=rope_context)


def rope_qk(q, k, cos, sin, rows=None):
    """Rotate q and k -> rotated q and k, with unchanged shapes.

    k (N, G, K)           keys of all N tokens
    q (R, H, K)           queries of the tokens with the indices `rows` (R,); None means all tokens
    cos, sin (N, K/2)     of the angles of all tokens"""
    queries = k.shape[0] if rows is None else rows.shape[0]
    assert q.shape[0] == queries <= k.shape[0] == cos.shape[0], \
        f"{q.shape[0]} queries for {queries} rows, {k.shape[0]} keys, {cos.shape[0]} positions"
    return rope_op(q, k, cos, sin, rows, 1) if use_triton(q) else RopeFunction.apply(q, k, cos, sin, rows)
