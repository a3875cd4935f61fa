"""Linear cross-entropy: the sum of -log softmax(hidden @ weight.T)[label] over rows; all the logits are never held.

    R supervised rows   C width   V vocabulary
    hidden (R, C)   weight (V, C)   labels (R,) int64, -100 = ignored   ->   scalar, fp32 (fp64 for fp64)

The argument in bytes. Logits are R x V: at 8,192 rows and 128k words 4 GiB in fp32, and autograd would keep them, their
softmax and their gradient. The gradient of a sum of losses is softmax - onehot whatever comes after, up to one scalar,
so it can be formed in the forward pass while a chunk of logits is at hand: each chunk is a product, turned into its own
gradient in place, and multiplied back into hidden and weight. Peak memory is one chunk. The turning moves 3 V numbers
for each row, read, read again, write: a reader sees each logit twice because the first write needs the last logit's
share of the sum. Of the second reads those hit the cache whose row is still there: at 32,000 words the rows that a GPU
has at work together are about as large as it, at 128k they are several times larger. Not measured yet.

A chunk should be tall: its products do 6 V C flops a row, but to add to the weight's gradient in fp32 moves 10 V C
bytes per chunk whatever its height. At 790 TFLOP/s and 4.3 TB/s the two balance near 300 rows, so 2,048 rows spend
seven eighths of their time on products.
"""

import torch
import torch.nn.functional as F

from kernels import architecture, on_its_device, tl, triton, use_triton

IGNORE = -100
CHUNK_BYTES = 256 << 20  # what one chunk of logits may take,
CHUNK_ROWS = 2048        # but it has this many rows at least
SLICE = 8192             # words of the weight's gradient that are multiplied at once where a sum needs a second buffer


def chunk_rows(V, dtype):
    """Rows of logits in `dtype` that exist at a time."""
    return max(CHUNK_ROWS, CHUNK_BYTES // (V * dtype.itemsize))


def by_kernel(x):
    """Is a chunk of logits like x turned into its gradient by the kernel? It has no fp64."""
    return use_triton(x) and x.dtype != torch.float64


def logits_bytes(R, V, like):
    """What the logits of R rows take at most, in dtype and on device of `like`: a chunk, which the kernel turns in
    place; plain torch widens a low one and makes its exponentials once (stage.memory reads this)."""
    each, wide = like.dtype.itemsize, max(4, like.dtype.itemsize)
    if not by_kernel(like):
        each = 2 * wide + (each if each < wide else 0)
    return min(R, chunk_rows(V, like.dtype)) * V * each


# ---- the definition -------------------------------------------------------------------------------------------------


def linear_cross_entropy_ref(hidden, weight, labels):
    """The definition."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


# ---- one chunk of logits into its gradient --------------------------------------------------------------------------


def turn_torch(logits, labels, gradient):
    """logits (n, V), labels (n,) -> (summed loss, softmax - onehot (n, V), in place where no cast is needed). Without
    `gradient` the second is not formed."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    keep = labels != IGNORE
    at = labels.where(keep, 0)[:, None]
    lse = wide.logsumexp(-1, keepdim=True)
    loss = ((lse - wide.gather(1, at)).squeeze(1) * keep).sum()
    if not gradient:
        return loss, None
    g = wide.sub_(lse).exp_()                                                 # softmax, in place of the logits
    g.scatter_add_(1, at, torch.full_like(at, -1, dtype=g.dtype))             # minus onehot
    return loss, g.mul_(keep[:, None]).to(logits.dtype)


# architecture -> (words a program holds at a time, warps): compiled without spills (tests), not timed yet
TILES = {80: (4096, 8), 90: (4096, 8)}


@triton.jit
def _turn(X, LABELS, LOSS, V, stride, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One row: X (n, V) logits, which become their gradient; LABELS (n,); LOSS (n,) fp32."""
    LOG2E = 1.4426950408889634               # exp(x) = exp2(x log2(e)): exp2 is the one that GPUs have
    row = tl.program_id(0).to(tl.int64)      # int64 because n * V passes 2**31 at 16,800 rows of 128k words
    X += row * stride
    c = tl.arange(0, BLOCK)                  # (BLOCK,) the tail of the last block is masked
    y = tl.load(LABELS + row)
    keep = y != -100
    real = (0 <= y) & (y < V)                # a label that is no word makes the loss nan: nothing outside is read
    xy = tl.load(X + y, mask=real, other=float("nan")).to(tl.float32)         # before anything is written over it

    m, l = -float("inf"), 0.0                # the largest logit so far, and the sum of exp(x - m) so far
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
            g = tl.exp2((x - m) * LOG2E) * scale - tl.where(i + c == y, 1.0, 0.0)  # -100 is no column
            tl.store(X + i + c, g.to(X.dtype.element_ty), mask=i + c < V)


def turn_triton(logits, labels, gradient):
    """As turn_torch, one program per row, always in place."""
    n, V = logits.shape
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    if n:
        block, warps = TILES[architecture(logits)]
        _turn[(n,)](logits, labels, loss, V, logits.stride(0), GRADIENT=gradient, BLOCK=block, num_warps=warps)
    return loss.sum(), logits


# ---- the operator that torch sees -----------------------------------------------------------------------------------


@on_its_device
def loss_and_gradients(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int, dtype: torch.dtype,
                       need_h: bool, need_w: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> summed loss; its gradients by hidden (R, C), in `dtype`, and by weight (V, C), in fp32 because chunks are
    summed in it; of a gradient that nobody needs only an empty tensor."""
    R, V = hidden.shape[0], weight.shape[0]
    hidden, weight, labels = hidden.to(dtype), weight.to(dtype), labels.contiguous()
    loss, dh, dw = _outputs(hidden, weight, dtype, need_h, need_w)
    loss, dw = loss.zero_(), dw.zero_()
    turn = turn_triton if by_kernel(hidden) else turn_torch
    room = hidden.new_empty(min(chunk, R), V)                                 # for all chunks, or two would be alive
    with torch.autocast(hidden.device.type, enabled=False):
        for i in range(0, R, chunk):
            h, y = hidden[i : i + chunk], labels[i : i + chunk]
            logits = torch.mm(h, weight.T, out=room[: h.shape[0]])            # (chunk, V)
            part, g = turn(logits, y, need_h or need_w)                       # g (chunk, V)
            loss += part
            if need_h:
                torch.mm(g, weight, out=dh[i : i + chunk])
            if need_w and dw.dtype == dtype:
                dw.addmm_(g.T, h)
            elif need_w:                                                      # slices: no second (V, C)
                for j in range(0, V, SLICE):
                    dw[j : j + SLICE] += g[:, j : j + SLICE].T @ h
    return loss, dh, dw


def _outputs(hidden, weight, dtype, need_h, need_w, *_):
    """Uninitialised results: what torch.compile has to know of the operator."""
    wide = torch.promote_types(torch.float32, dtype)
    return (hidden.new_empty((), dtype=wide), hidden.new_empty(hidden.shape if need_h else (0,), dtype=dtype),
            weight.new_empty(weight.shape if need_w else (0,), dtype=wide))


op = torch.library.custom_op("pumice::linear_cross_entropy", loss_and_gradients, mutates_args=())
op.register_fake(lambda hidden, weight, labels, chunk, *rest: _outputs(hidden, weight, *rest))


def _setup(ctx, inputs, output):
    _, dh, dw = output
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.mark_non_differentiable(dh, dw)
    ctx.set_materialize_grads(False)                                          # or zeros would be made for dh and dw
    ctx.save_for_backward(dh, dw)


@torch.autograd.function.once_differentiable
def _backward(ctx, grad, *_):
    """The scalar is multiplied in before rounding: in bf16 it would bend all gradients by up to one part in 500. For
    this moment there are two (V, C); to multiply in place what autograd keeps is not allowed in a compiled graph."""
    (dh, dw), (hidden, weight), (need_h, need_w, *_) = ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad
    if grad is None:
        return (None,) * 7
    dh = (dh.to(grad.dtype) * grad).to(hidden) if need_h else None
    dw = torch.mul(dw, grad, out=dw.new_empty(dw.shape, dtype=weight)) if need_w else None  # and no third for a cast
    return dh, dw if need_w else None, None, None, None, None, None


op.register_autograd(_backward, setup_context=_setup)


def linear_cross_entropy(hidden, weight, labels, chunk=None):
    """Sum of losses over rows whose label is not -100; shapes in the head of this file. `chunk` rows of logits exist at
    a time. Labels lie in [0, V) or are -100. Of others the kernel makes a loss of nan, for a check would stall the
    GPU; the definition raises RuntimeError."""
    assert hidden.shape[0] == labels.shape[0], f"{hidden.shape[0]} rows, {labels.shape[0]} labels"
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    chunk = chunk or chunk_rows(weight.shape[0], dtype)
    need_h, need_w = (torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    return op(hidden, weight, labels, chunk, dtype, need_h, need_w)[0]
