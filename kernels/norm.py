"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * w, and LayerNorm: y = (x - mean) / sqrt(var + eps) * w + b, over the last
dimension; with add, x + add is the new residual, normalised in the same pass.

    N rows   C width        x, add (N, C)   w, b (C,)   ->   y (N, C), or (x + add, y)

The argument in bytes. Plain torch reads and writes the stream once for each of its operators: cast, square, mean,
multiply, cast, multiply. A row of 4,096 numbers fits into the registers of one program, so each number needs to be read
once and written once: 2 N C forward, 4 N C with the addition, which alone would cost 3 and the norm 2 more; 3 N C
backward, or 4 N C where the residual brings a gradient of its own. The sums of the forward pass are formed again in the
backward pass: the row is in registers anyway, so that costs no byte, and nothing is kept but the input.

A first kernel in Triton. `norm_forward[programs,](...)` runs it in so many programs at once, each by num_warps x 32
threads, which the code never mentions. A program asks which one it is, computes addresses as tensors of integers, loads
a whole tile through them, works on it in registers and stores a tile. Sizes of tiles are powers of two, and lanes that
hang over an edge are switched off by a mask: tl.load(addresses, mask, what to take instead). A tensor arrives as the
address of its first number, X, and X.dtype.element_ty is what lies there. What is marked tl.constexpr is known when the
kernel is compiled, which happens once for each of its values.
"""

import torch
import torch.nn.functional as F

from kernels import on_its_device, tl, triton, use_triton

TILE = 4096     # numbers a program holds at once, 16 per thread; a longer row has a program to itself
PROGRAMS = 256  # of the backward pass: about two for each processor of an H100. Fixed: sums are the same on every card


def rms_norm_ref(x, w, eps):
    """The definition. The result returns to x's dtype before it meets the weight, as in the published Llamas:
    multiplying first moved the bf16 logits of a two-layer toy by 0.09."""
    wide = x if x.dtype == torch.float64 else x.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * r).to(x.dtype) * w.to(x.dtype)


layer_norm_ref = F.layer_norm  # keeps its input and two numbers per row, which is what we would do


class RMSNorm(torch.autograd.Function):
    """The definition, keeping its input and r (..., 1). Autograd alone keeps x r too, and of bf16 a copy in fp32."""

    @staticmethod
    def forward(ctx, x, w, eps):
        wide = x if x.dtype == torch.float64 else x.float()
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, w, r)
        return (wide * r).to(x.dtype) * w.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w, r = ctx.saved_tensors
        need_x, need_w, _ = ctx.needs_input_grad
        xhat, dy, dx, dw = x * r, dy.to(r.dtype), None, None
        if need_w:
            dw = (dy * xhat).flatten(0, -2).sum(0).to(w.dtype)
        if need_x:  # what changes a row's length alone changes nothing: that part of the gradient is taken out
            g = dy * w
            dx = g.addcmul_(xhat, (g * xhat).mean(-1, keepdim=True), value=-1).mul_(r).to(x.dtype)
        return dx, dw, None


# ---- the kernels: B is None for RMSNorm, H for a norm without an addition --------------------------------------------

@triton.jit
def norm_forward(X, H, W, B, S, Y, N, C: tl.constexpr, eps: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # my rows; N * C may pass 2**31
    c = tl.arange(0, BLOCK)[None, :]                                        # all columns, and some beyond
    at, there = n * C + c, (n < N) & (c < C)                                # (ROWS, BLOCK) addresses, and which exist
    wide = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32   # of all arithmetic
    x = tl.load(X + at, there, 0).to(wide)
    if H is not None:  # decided when the kernel is compiled: there is one kernel with the addition and one without
        s = (x + tl.load(H + at, there, 0).to(wide)).to(S.dtype.element_ty)
        tl.store(S + at, s, there)
        x = s.to(wide)  # what is normalised is what the residual became, rounding included
    if B is not None:
        x = tl.where(c < C, x - tl.sum(x, 1)[:, None] / C, 0)  # lanes beyond the row must stay 0, not become -mean
    x *= tl.rsqrt(tl.sum(x * x, 1)[:, None] / C + eps)
    w = tl.load(W + c, c < C, 0).to(wide)
    if B is not None:
        y = x * w + tl.load(B + c, c < C, 0).to(wide)
    else:
        y = x.to(Y.dtype.element_ty).to(wide) * w              # rounded before the weight, as in the definition
    tl.store(Y + at, y, there)


@triton.jit
def norm_backward(X, W, DY, DS, DX, DW, DB, N, C: tl.constexpr, eps: tl.constexpr, LAYER: tl.constexpr,
                  ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The gradient of w is a sum over all rows. Were every program to handle one tile, there would be as many partial
    sums as tiles; so a few programs stay, walk over the tiles, and each writes one row of DW (programs, C) at the end.
    Adding those rows in their order is what makes the result the same every time: atomic additions are not."""
    c = tl.arange(0, BLOCK)[None, :]
    wide = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    w = tl.load(W + c, c < C, 0).to(wide)
    dw = tl.zeros([ROWS, BLOCK], wide)
    db = tl.zeros([ROWS, BLOCK], wide)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0), num_stages=STAGES):
        # STAGES > 1: the next tile is on its way from memory while this one is worked on
        n = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        at, there = n * C + c, (n < N) & (c < C)
        x = tl.load(X + at, there, 0).to(wide)
        dy = tl.load(DY + at, there, 0).to(wide)
        if LAYER:
            x = tl.where(c < C, x - tl.sum(x, 1)[:, None] / C, 0)
        r = tl.rsqrt(tl.sum(x * x, 1)[:, None] / C + eps)
        x *= r
        if DW is not None:
            dw += dy * x
        if DB is not None:
            db += dy
        g = dy * w
        dx = g - x * (tl.sum(g * x, 1)[:, None] / C)
        if LAYER:
            dx -= tl.sum(g, 1)[:, None] / C
        dx *= r
        if DS is not None:
            dx += tl.load(DS + at, there, 0).to(wide)
        tl.store(DX + at, dx, there)
    at = tl.program_id(0) * C + tl.arange(0, BLOCK)
    if DW is not None:
        tl.store(DW + at, tl.sum(dw, 0), tl.arange(0, BLOCK) < C)
    if DB is not None:
        tl.store(DB + at, tl.sum(db, 0), tl.arange(0, BLOCK) < C)


def tiles(C, bytes_per_number):
    """-> sizes of a tile and the launch options for rows of C numbers; tests/test_norm.py compiles what this gives."""
    block = triton.next_power_of_2(C)
    assert block <= 8192, f"rows of {C} numbers are longer than the registers of a program can hold"
    rows = max(1, TILE // block)
    stages = 2 if block * bytes_per_number <= 16384 else 1  # a longer row fills its processor by itself
    return dict(ROWS=rows, BLOCK=block), dict(num_warps=rows * block // 512), stages


# ---- what torch sees ------------------------------------------------------------------------------------------------

@torch.library.custom_op("pumice::norm", mutates_args=())
@on_its_device
def norm_op(x: torch.Tensor, add: torch.Tensor | None, w: torch.Tensor, b: torch.Tensor | None,
            eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-> x + add (empty without add), its norm; RMSNorm without b, LayerNorm with it."""
    s, y = norm_shapes(x, add, w, b, eps)
    x, add, w, b = (t if t is None else t.contiguous() for t in (x, add, w, b))
    C = x.shape[-1]
    N = x.numel() // C
    tile, how, _ = tiles(C, y.element_size())
    norm_forward[triton.cdiv(N, tile["ROWS"]),](x, add, w, b, s, y, N, C, eps, **tile, **how)
    return s, y


@norm_op.register_fake
def norm_shapes(x, add, w, b, eps):
    if add is None:
        return x.new_empty(0), x.new_empty(x.shape)
    dtype = torch.promote_types(x.dtype, add.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("pumice::norm_backward", mutates_args=())
@on_its_device
def norm_backward_op(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, ds: torch.Tensor | None, eps: float,
                     layer: bool, need_w: bool, need_b: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: what was normalised; ds: a gradient it has from elsewhere. -> dx, dw, db; dw and db empty if not needed."""
    x, w, dy, ds = (t if t is None else t.contiguous() for t in (x, w, dy, ds))
    C = x.shape[-1]
    N = x.numel() // C
    tile, how, stages = tiles(C, x.element_size())
    programs = min(PROGRAMS, triton.cdiv(N, tile["ROWS"]))
    dx = torch.empty_like(x)
    dw, db = (x.new_empty(programs, C, dtype=torch.promote_types(torch.float32, x.dtype)) if need else None
              for need in (need_w, need_b))
    norm_backward[programs,](x, w, dy, ds, dx, dw, db, N, C, eps, layer, **tile, STAGES=stages, **how)
    return dx, *(x.new_empty(0) if t is None else t.sum(0).to(w.dtype) for t in (dw, db))


@norm_backward_op.register_fake
def _(x, w, dy, ds, eps, layer, need_w, need_b):
    return x.new_empty(x.shape), *(w.new_empty(w.shape) if need else x.new_empty(0) for need in (need_w, need_b))


def norm_context(ctx, inputs, output):
    x, add, w, b, ctx.eps = inputs
    ctx.added, ctx.layer = add is not None, b is not None
    ctx.dtypes = x.dtype, add.dtype if ctx.added else None
    ctx.save_for_backward(output[0] if ctx.added else x, w)
    ctx.set_materialize_grads(False)


def norm_gradients(ctx, ds, dy):
    x, w = ctx.saved_tensors
    _, _, need_w, need_b, _ = ctx.needs_input_grad
    ds = ds if ctx.added else None
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dw, db = torch.ops.pumice.norm_backward(x, w, dy, ds, ctx.eps, ctx.layer, need_w, need_b)
    dx, dadd = (None if t is None else dx.to(t) for t in ctx.dtypes)
    return dx, dadd, dw if need_w else None, db if need_b else None, None


norm_op.register_autograd(norm_gradients, setup_context=norm_context)


# ---- the choice -----------------------------------------------------------------------------------------------------

def fits(x, w, add):
    """A kernel would read what lies behind a tensor that is too small."""
    assert w.shape == x.shape[-1:] and (add is None or add.shape == x.shape), \
        f"x {tuple(x.shape)}, weight {tuple(w.shape)}, add {None if add is None else tuple(add.shape)}"


def rms_norm(x, w, eps, add=None):
    """x, add (..., C), w (C,) -> y (..., C), or with add (x + add, its norm)"""
    fits(x, w, add)
    if use_triton(x):
        s, y = norm_op(x, add, w, None, eps)
    else:
        s = x if add is None else x + add
        y = RMSNorm.apply(s, w, eps) if torch.is_grad_enabled() else rms_norm_ref(s, w, eps)  # the same bits
    return y if add is None else (s, y)


def layer_norm(x, w, b, eps, add=None):
    """x, add (..., C), w, b (C,) -> y (..., C), or with add (x + add, its norm)"""
    fits(x, w, add)
    if use_triton(x):
        s, y = norm_op(x, add, w, b, eps)
    else:
        s = x if add is None else x + add
        y = layer_norm_ref(s, w.shape, w, b, eps)
    return y if add is None else (s, y)
