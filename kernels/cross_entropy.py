"""Linear cross-entropy: the sum of -log softmax(hidden @ weight.T)[label] over rows, one chunk of logits at a time.

    R rows (one per token)   C width   V vocabulary entries   n rows of a chunk
    hidden (R, C)   weight (V, C)   labels (R,) int64, -100 = ignored   ->   scalar, fp32 (fp64 for fp64)
    weights (R,): of each row in the sum; without them, every row counts 1

The cost in bytes. The logits (R, V) take 4 GiB in fp32 for 8,192 rows and 128k entries. Plain autograd also holds their
softmax and their gradient. But the gradient of a summed loss for the logits is softmax - onehot, times one scalar that
backward receives. So the forward pass takes one chunk of rows at a time: it computes the logits of the chunk, replaces
them by softmax - onehot, and computes from these the gradients of hidden and weight. Only one chunk of logits exists
at a time. The kernel reads a row twice (for its sum, then for the gradient) and writes it once: 3 V elements.
Weights of rows cost nothing in V: with g = softmax - onehot and row weights w, the gradients are w * (g @ weight) and
g.T @ (w * hidden), and both products with w have the width C.

A chunk should have many rows. Its matrix products do 6 V C flops per row. Each chunk adds to the gradient of weight in
fp32. This moves 8 V C bytes, however few rows the chunk has: the product itself adds to the sum, so it is never
rounded to bf16 (torch 2.9 refuses this product on a GPU: pytorch, pull request 167931). At 790 TFLOP/s and 4.3 TB/s,
products and addition take equal time at 250 rows.

row_losses() returns the losses of the rows, not their sum. Then backward receives one factor per row, which forward
does not know. So forward computes the losses alone, and backward computes each chunk of logits again. This costs 2 V C
more flops per row.
"""

import torch
import torch.nn.functional as F

from kernels import architecture, on_its_device, tl, triton, use_triton
from kernels.linear import add_product

IGNORE = -100            # the label of a token that is not supervised
CHUNK_BYTES = 512 << 20  # 512 MiB: the usual size of a chunk of logits, 8,388 rows in bf16 for 32,000 entries
CHUNK_ROWS = 2048        # a chunk has at least this many rows, even if it is then larger than CHUNK_BYTES


def chunk_rows(V, dtype):
    """Return the number of rows in a chunk of logits, for V vocabulary entries and logits of `dtype`."""
    return max(CHUNK_ROWS, CHUNK_BYTES // (V * dtype.itemsize))


def kernel_applies(x):
    """Return True if the Triton kernel is used for logits with the device and dtype of x. It does not support fp64."""
    return use_triton(x) and x.dtype != torch.float64


def logits_bytes(R, V, like):
    """Return the bytes that logits take at most, for R rows and V vocabulary entries. The logits have the dtype and the
    device of tensor `like`. The kernel holds one chunk of them. Plain torch also holds the exponentials of the chunk
    and, in bf16, a copy of the chunk in fp32."""
    each, wide = like.dtype.itemsize, max(4, like.dtype.itemsize)
    if not kernel_applies(like):
        each = 2 * wide + (each if each < wide else 0)
    return min(R, chunk_rows(V, like.dtype)) * V * each


def row_losses_ref(hidden, weight, labels):
    """Compute the loss of each row (R,) by its definition in plain torch. All logits exist at the same time."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")


def linear_cross_entropy_ref(hidden, weight, labels, weights=None):
    """Compute the summed loss by its definition in plain torch."""
    loss = row_losses_ref(hidden, weight, labels)
    return (loss if weights is None or not len(weights) else loss * weights).sum()


# ---- one chunk: logits -> loss and gradient -------------------------------------------------------------------------

def logits_to_gradient_torch(logits, labels, gradient):
    """Return the losses (n,) of logits (n, V) and labels (n,), and the gradient of their sum for the logits (n, V). The
    gradient is softmax minus one-hot labels. It overwrites fp32 and fp64 logits. With gradient=False, it is None."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    keep = labels != IGNORE
    at = labels.where(keep, 0)[:, None]
    lse = wide.logsumexp(-1, keepdim=True)
    loss = (lse - wide.gather(1, at)).squeeze(1) * keep
    if not gradient:
        return loss, None
    g = wide.sub_(lse).exp_()                                                 # softmax overwrites `wide`
    g.scatter_add_(1, at, torch.full_like(at, -1, dtype=g.dtype))             # subtract onehot
    return loss, g.mul_(keep[:, None]).to(logits.dtype)


# The key is the GPU type, 80 or 90 (see architecture). The values are: logits that a program (one row) holds at a time,
# and number of warps. Tests check that no registers spill, which would make the kernel slow.
LOGITS_TILES = {80: (4096, 8), 90: (4096, 8)}


@triton.jit
def _logits_to_gradient(X, LABELS, LOSS, V, stride, IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the loss of each row of logits and, if GRADIENT, overwrite the row by its gradient. One program computes
    one row, BLOCK columns at a time. `stride` is the distance between two rows of X in memory.

    X (n, V) logits      LABELS (n,)      LOSS (n,) fp32: the result"""
    LOG2E = 1.4426950408889634               # exp(x) = exp2(x * log2(e)): GPUs have an instruction for exp2 only
    row = tl.program_id(0).to(tl.int64)      # int64: for V = 128,000, row * V exceeds 2**31 from row 16,800 on
    X += row * stride
    c = tl.arange(0, BLOCK)                  # (BLOCK,) columns of a block; columns from V on are masked
    y = tl.load(LABELS + row)
    keep = y != IGNORE
    valid = (0 <= y) & (y < V)               # without a valid label, the loss is 0 if the label is IGNORE, else nan
    xy = tl.load(X + y, mask=valid, other=float("nan")).to(tl.float32)  # the label's logit, before it is overwritten

    m, l = -float("inf"), 0.0                # m: maximum so far; l: sum of exp(x - m) so far
    for i in range(0, V, BLOCK):
        x = tl.load(X + i + c, mask=i + c < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(m, tl.max(x))
        l = l * tl.exp2((m - higher) * LOG2E) + tl.sum(tl.exp2((x - higher) * LOG2E))
        m = higher
    tl.store(LOSS + row, tl.where(keep, tl.log(l) + (m - xy), 0.0))

    if GRADIENT:
        scale = tl.where(keep, 1.0 / l, 0.0)
        for i in range(0, V, BLOCK):
            x = tl.load(X + i + c, mask=i + c < V, other=-float("inf")).to(tl.float32)
            g = tl.exp2((x - m) * LOG2E) * scale - tl.where(i + c == y, 1.0, 0.0)  # the label -100 matches no column
            tl.store(X + i + c, g.to(X.dtype.element_ty), mask=i + c < V)


def logits_to_gradient_triton(logits, labels, gradient):
    """Compute logits_to_gradient_torch with the kernel, one program per row. The gradient overwrites logits of any
    dtype. With gradient=False, the second result is the unchanged logits."""
    n, V = logits.shape
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    if n:
        block, warps = LOGITS_TILES[architecture(logits)]
        _logits_to_gradient[(n,)](logits, labels, loss, V, logits.stride(0), IGNORE=IGNORE, GRADIENT=gradient,
                                  BLOCK=block, num_warps=warps)
    return loss, logits


# ---- the operator registered with torch -----------------------------------------------------------------------------

@on_its_device
def loss_and_gradients(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int, dtype: torch.dtype,
                       need_h: bool, need_w: bool, weights: torch.Tensor | None = None
                       ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the summed loss (), the gradient of hidden (R, C) in `dtype`, and the gradient of weight (V, C) in fp32
    (in fp64 if `dtype` is fp64). A gradient that is not needed is an empty tensor. The gradient of hidden is not yet
    multiplied by `weights`: _backward does it before it rounds.

    chunk     rows per chunk of logits
    dtype     of the matrix products
    need_h    is the gradient of hidden needed?
    need_w    is the gradient of weight needed?
    weights   (R,) of the rows in the sum; None: all are 1"""
    R, V = hidden.shape[0], weight.shape[0]
    hidden, weight, labels = hidden.to(dtype), weight.to(dtype), labels.contiguous()
    loss, dh, dw = _outputs(hidden, weight, dtype, need_h, need_w)
    loss, dw = loss.zero_(), dw.zero_()
    to_gradient = logits_to_gradient_triton if kernel_applies(hidden) else logits_to_gradient_torch
    room = hidden.new_empty(min(chunk, R), V)                                 # all chunks use this buffer in turn
    with torch.autocast(hidden.device.type, enabled=False):
        for i in range(0, R, chunk):
            h, y = hidden[i : i + chunk], labels[i : i + chunk]
            logits = torch.mm(h, weight.T, out=room[: h.shape[0]])            # (chunk, V)
            part, g = to_gradient(logits, y, need_h or need_w)                # part (chunk,), g (chunk, V)
            if need_h:
                torch.mm(g, weight, out=dh[i : i + chunk])
            if weights is not None:
                w = weights[i : i + chunk].to(part.dtype)                     # (chunk,)
                part, h = part * w, (h * w[:, None]).to(dtype)
            loss += part.sum()
            if need_w:
                add_product(dw, g.T, h)
    return loss, dh, dw


def _outputs(hidden, weight, dtype, need_h, need_w, *_):
    """Return uninitialised tensors with the shapes and dtypes of the outputs of loss_and_gradients. torch.compile uses
    them when it traces a model."""
    wide = torch.promote_types(torch.float32, dtype)
    return (hidden.new_empty((), dtype=wide), hidden.new_empty(hidden.shape if need_h else (0,), dtype=dtype),
            weight.new_empty(weight.shape if need_w else (0,), dtype=wide))


linear_cross_entropy_op = torch.library.custom_op("pumice::linear_cross_entropy", loss_and_gradients, mutates_args=())
linear_cross_entropy_op.register_fake(lambda hidden, weight, labels, chunk, *rest: _outputs(hidden, weight, *rest))


def _setup(ctx, inputs, output):
    _, dh, dw = output
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.mark_non_differentiable(dh, dw)
    ctx.set_materialize_grads(False)  # else autograd allocates zero gradients for dh and dw
    ctx.save_for_backward(dh, dw, inputs[-1])


@torch.autograd.function.once_differentiable
def _backward(ctx, grad, *_):
    """Multiply dh and dw by the incoming scalar `grad` in fp32, then round. A scalar rounded to bf16 would change all
    gradients by up to 1/500. dw is not overwritten, because a compiled graph may not overwrite a saved tensor."""
    (dh, dw, weights), (hidden, weight), (need_h, need_w, *_) = ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad
    if grad is None:
        return (None,) * 8
    rows = grad if weights is None else grad * weights[:, None].to(grad.dtype)             # () or (R, 1)
    dh = (dh.to(grad.dtype) * rows).to(hidden) if need_h else None
    dw = torch.mul(dw, grad, out=dw.new_empty(dw.shape, dtype=weight)) if need_w else None  # `out` avoids an fp32 copy
    return dh, dw if need_w else None, None, None, None, None, None, None


linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup)


def linear_cross_entropy(hidden, weight, labels, weights=None, chunk=None):
    """Return the sum of the losses of all rows whose label is not -100, each times its weight. The top of this file
    shows the shapes; without weights (None, or an empty tensor) every row counts 1. `chunk` is the number of rows per
    chunk of logits; if it is None, chunk_rows decides.

    For any other label outside [0, V), plain torch raises RuntimeError. The kernel returns nan instead, because a check
    would make the CPU wait for the GPU."""
    weights = None if weights is None or not len(weights) else weights
    assert weights is None or len(weights) == len(labels), f"{len(weights)} weights, {len(labels)} labels"
    chunk, dtype = _chunk_and_dtype(hidden, weight, labels, chunk)
    need_h, need_w = (torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    return linear_cross_entropy_op(hidden, weight, labels, chunk, dtype, need_h, need_w, weights)[0]


def _chunk_and_dtype(hidden, weight, labels, chunk):
    """Return the number of rows per chunk and the dtype of the matrix products."""
    assert hidden.shape[0] == labels.shape[0], f"{hidden.shape[0]} rows, {labels.shape[0]} labels"
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return chunk or chunk_rows(weight.shape[0], dtype), dtype


# ---- the losses of the rows -----------------------------------------------------------------------------------------

@on_its_device
def losses_of_rows(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int, dtype: torch.dtype
                   ) -> torch.Tensor:
    """Return the loss of each row (R,) in fp32 (in fp64 if `dtype` is fp64). chunk, dtype: as in loss_and_gradients"""
    R, V = hidden.shape[0], weight.shape[0]
    hidden, weight, labels = hidden.to(dtype), weight.to(dtype), labels.contiguous()
    loss = _losses(hidden, weight, labels, chunk, dtype)
    to_gradient = logits_to_gradient_triton if kernel_applies(hidden) else logits_to_gradient_torch
    room = hidden.new_empty(min(chunk, R), V)                                 # all chunks use this buffer in turn
    with torch.autocast(hidden.device.type, enabled=False):
        for i in range(0, R, chunk):
            h = hidden[i : i + chunk]
            logits = torch.mm(h, weight.T, out=room[: h.shape[0]])            # (chunk, V)
            loss[i : i + chunk] = to_gradient(logits, labels[i : i + chunk], False)[0]
    return loss


def _losses(hidden, weight, labels, chunk, dtype):
    return hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(torch.float32, dtype))


row_losses_op = torch.library.custom_op("pumice::row_losses", losses_of_rows, mutates_args=())
row_losses_op.register_fake(_losses)


def _setup_rows(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


@torch.autograd.function.once_differentiable
def _backward_rows(ctx, grad):
    """Compute the gradients of the losses, weighted by grad (R,): the gradients of linear_cross_entropy."""
    (hidden, weight, labels), (need_h, need_w, *_) = ctx.saved_tensors, ctx.needs_input_grad
    _, dh, dw = linear_cross_entropy_op(hidden, weight, labels, *ctx.rest, need_h, need_w, grad.contiguous())
    dh = (dh.to(grad.dtype) * grad[:, None]).to(hidden) if need_h else None
    return dh, dw.to(weight) if need_w else None, None, None, None


row_losses_op.register_autograd(_backward_rows, setup_context=_setup_rows)


def row_losses(hidden, weight, labels, weights=None, chunk=None):
    """Return the loss of each row (R,): -log softmax(hidden @ weight.T)[label], 0 where the label is -100. Labels and
    `chunk` are as in linear_cross_entropy. weights: not read; a `head` of model.VLM gets them"""
    return row_losses_op(hidden, weight, labels, *_chunk_and_dtype(hidden, weight, labels, chunk))
