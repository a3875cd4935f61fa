"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * w, and LayerNorm: y = (x - mean) / sqrt(var + eps) * w + b, over the last
dimension. With an argument `add`, the norm of x + add is computed: one kernel adds and normalises. In a Transformer,
x + add is the new residual, so it is returned too.

    N tokens   C width        x, add (N, C)   w, b (C,)   ->   y (N, C), or (x + add, y)

The cost in bytes. Plain torch reads and writes the whole tensor once per operator: cast, square, mean, multiply,
cast, multiply. A row of 4,096 elements fits in the registers of one program. So the kernel moves 2 N C elements forward
(4 N C with the addition) and 3 N C backward (4 N C if x + add also gets a gradient). Autograd saves only the input and
w. The backward kernel holds a row in registers, so it recomputes the sums over the row.

How a Triton kernel works. `norm_forward[p,](...)` starts p programs, each on num_warps x 32 threads. A program reads
its index, computes addresses as integer tensors, loads a tile, computes in registers and stores the result. Tile sizes
are powers of two, so parts of a tile can lie outside the tensor. A mask switches these elements off: tl.load(addresses,
mask, value where the mask is False). A tensor argument X is a pointer to its first element, of dtype
X.dtype.element_ty. Triton compiles one kernel for each value of a tl.constexpr argument.
"""

import torch
import torch.nn.functional as F

from kernels import on_its_device, tl, triton, use_triton

NORM_TILE = 4096     # elements of a tile, 16 per thread; a row with more elements is one larger tile
NORM_PROGRAMS = 256  # programs in backward, 2 per multiprocessor of an H100; fixed, so that all GPUs add in one order


def rms_norm_ref(x, w, eps):
    """Return the RMSNorm of x (..., C) by its definition, with w (C,). The normalised x is cast back to the dtype of x
    before the product with w, as in the published Llama models. A cast after the product changed the bf16 logits of a
    toy model by 0.09."""
    wide = x if x.dtype == torch.float64 else x.float()
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * r).to(x.dtype) * w.to(x.dtype)


layer_norm_ref = F.layer_norm  # for backward it saves only its input and two values per row


class RMSNormFunction(torch.autograd.Function):
    """Compute rms_norm_ref, but save for backward only x, w and r (..., 1), where r = 1 / sqrt(mean(x^2) + eps).
    Autograd would also save x * r."""

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
        if need_x:
            # scaling x does not change y (if eps is ignored), so dx is orthogonal to x:
            # subtract the part of g along xhat
            g = dy * w
            dx = g.addcmul_(xhat, (g * xhat).mean(-1, keepdim=True), value=-1).mul_(r).to(x.dtype)
        return dx, dw, None


# ---- the kernels: B is None for RMSNorm, ADD is None for a norm without an addition ----------------------------------

@triton.jit
def norm_forward(X, ADD, W, B, S, Y, N, C: tl.constexpr, eps: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute S = X + ADD and Y = the norm of S. Without ADD, only Y = the norm of X is computed. One program computes
    a tile of ROWS rows. BLOCK is C, rounded up to a power of two."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1); int64: N * C may exceed 2**31
    c = tl.arange(0, BLOCK)[None, :]                                        # (1, BLOCK), BLOCK >= C
    at, mask = n * C + c, (n < N) & (c < C)                                 # (ROWS, BLOCK)
    wide = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32   # dtype of all arithmetic
    x = tl.load(X + at, mask, 0).to(wide)
    if ADD is not None:  # Triton decides this at compile time: it builds one kernel with the addition and one without
        s = (x + tl.load(ADD + at, mask, 0).to(wide)).to(S.dtype.element_ty)
        tl.store(S + at, s, mask)
        x = s.to(wide)  # normalise the residual as S stores it: rounded to the dtype of S
    if B is not None:
        x = tl.where(c < C, x - tl.sum(x, 1)[:, None] / C, 0)  # columns from C on must stay 0, not become -mean
    x *= tl.rsqrt(tl.sum(x * x, 1)[:, None] / C + eps)
    w = tl.load(W + c, c < C, 0).to(wide)
    if B is not None:
        y = x * w + tl.load(B + c, c < C, 0).to(wide)
    else:
        y = x.to(Y.dtype.element_ty).to(wide) * w  # round before the product with w, as rms_norm_ref does
    tl.store(Y + at, y, mask)


@triton.jit
def norm_backward(X, W, DY, DS, DX, DW, DB, N, C: tl.constexpr, eps: tl.constexpr, LAYER: tl.constexpr,
                  ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Compute DX (N, C), the gradient of X, and parts of the gradients of w and b. DY is the gradient of the norm. DS
    is the gradient of X from the residual path, or None. LAYER is True for LayerNorm.

    The gradients of w and b are sums over all rows. A fixed number of programs loops over the tiles. Each program
    writes its part of the sums to one row of DW and DB (programs, C). The caller adds these rows in a fixed order, so
    the gradients are deterministic. With atomic additions, the order of additions would vary."""
    c = tl.arange(0, BLOCK)[None, :]
    wide = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    w = tl.load(W + c, c < C, 0).to(wide)
    dw = tl.zeros([ROWS, BLOCK], wide)
    db = tl.zeros([ROWS, BLOCK], wide)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0), num_stages=STAGES):
        # if STAGES > 1, the next tile is loaded while the current tile is computed
        n = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        at, mask = n * C + c, (n < N) & (c < C)
        x = tl.load(X + at, mask, 0).to(wide)
        dy = tl.load(DY + at, mask, 0).to(wide)
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
            dx += tl.load(DS + at, mask, 0).to(wide)
        tl.store(DX + at, dx, mask)
    at = tl.program_id(0) * C + tl.arange(0, BLOCK)
    if DW is not None:
        tl.store(DW + at, tl.sum(dw, 0), tl.arange(0, BLOCK) < C)
    if DB is not None:
        tl.store(DB + at, tl.sum(db, 0), tl.arange(0, BLOCK) < C)


def norm_tile(C, element_size):
    """Choose how the kernels process rows of C elements of `element_size` bytes. Return three things: a dict of tile
    sizes, a dict of launch options, and the number of pipeline stages of norm_backward."""
    block = triton.next_power_of_2(C)
    assert block <= 8192, f"rows of {C} elements exceed the registers of a program"
    rows = max(1, NORM_TILE // block)
    stages = 2 if block * element_size <= 16384 else 1  # long rows keep a multiprocessor busy without prefetching
    return dict(ROWS=rows, BLOCK=block), dict(num_warps=rows * block // 512), stages


# ---- the operators registered with torch ----------------------------------------------------------------------------

@torch.library.custom_op("pumice::norm", mutates_args=())
@on_its_device
def norm_op(x: torch.Tensor, add: torch.Tensor | None, w: torch.Tensor, b: torch.Tensor | None,
            eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return s = x + add and y = norm of s. If add is None, s is empty and y is the norm of x. The norm is RMSNorm if b
    is None, else LayerNorm."""
    s, y = norm_shapes(x, add, w, b, eps)
    x, add, w, b = (t if t is None else t.contiguous() for t in (x, add, w, b))
    C = x.shape[-1]
    N = x.numel() // C
    tile, how, _ = norm_tile(C, y.element_size())
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
    """Return the gradients dx, dw, db. A gradient that is not needed (need_w, need_b) is an empty tensor.

    x: input of the norm      dy: gradient of its output      ds: gradient of x from the residual path, or None
    layer: True for LayerNorm, False for RMSNorm"""
    x, w, dy, ds = (t if t is None else t.contiguous() for t in (x, w, dy, ds))
    C = x.shape[-1]
    N = x.numel() // C
    tile, how, stages = norm_tile(C, x.element_size())
    programs = min(NORM_PROGRAMS, triton.cdiv(N, tile["ROWS"]))
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
    dx, dw, db = norm_backward_op(x, w, dy, ds, ctx.eps, ctx.layer, need_w, need_b)
    dx, dadd = (None if t is None else dx.to(t) for t in ctx.dtypes)
    return dx, dadd, dw if need_w else None, db if need_b else None, None


norm_op.register_autograd(norm_gradients, setup_context=norm_context)


def norm(x, w, b, eps, add, plain):
    """Return the norm of x, or, if add is given, (x + add, norm of x + add). A kernel computes it, or else the function
    `plain`, which gets the input of the norm."""
    assert w.shape == x.shape[-1:] and (add is None or add.shape == x.shape), \
        f"x {tuple(x.shape)}, weight {tuple(w.shape)}, add {None if add is None else tuple(add.shape)}"
    if use_triton(x):
        s, y = norm_op(x, add, w, b, eps)
    else:
        s = x if add is None else x + add
        y = plain(s)
    return y if add is None else (s, y)


def rms_norm(x, w, eps, add=None):
    """Return the RMSNorm of x (..., C), or, if add (..., C) is given, (x + add, RMSNorm of x + add). w has shape
    (C,)."""
    return norm(x, w, None, eps, add, lambda s: RMSNormFunction.apply(s, w, eps) if torch.is_grad_enabled() else
                rms_norm_ref(s, w, eps))  # RMSNormFunction and rms_norm_ref give identical results


def layer_norm(x, w, b, eps, add=None):
    """Return the LayerNorm of x (..., C), or, if add (..., C) is given, (x + add, LayerNorm of x + add). w and b have
    shape (C,)."""
    return norm(x, w, b, eps, add, lambda s: layer_norm_ref(s, w.shape, w, b, eps))
