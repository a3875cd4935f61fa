"""Linear cross-entropy: the sum of -log softmax(hidden @ weight.T)[label] over rows; all the logits are never held.

    R supervised rows   C width   V vocabulary
    hidden (R, C)   weight (V, C)   labels (R,) int64, -100 = ignored   ->   scalar, fp32 (fp64 for fp64)

The argument in bytes. Logits are R x V: at 8,192 rows and 128k words 4 GiB in fp32, and autograd would keep them, their
softmax and their gradient. The gradient of a sum of losses is softmax - onehot whatever comes after, up to one scalar,
so it can be formed in the forward pass while a chunk of logits is at hand: each chunk is a product, turned into its own
gradient in place, multiplied back into hidden and weight, and freed. Peak memory is one chunk.
"""

import torch
import torch.nn.functional as F

CHUNK_BYTES = 256 << 20  # one chunk of fp32 logits, at most; and at least 256 rows, so that the products stay products


def linear_cross_entropy_ref(hidden, weight, labels):
    """The definition."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk, dtype):
        R, V = hidden.shape[0], weight.shape[0]
        wide = torch.promote_types(torch.float32, dtype)
        chunk = chunk or max(256, CHUNK_BYTES // (4 * V))
        need_h, need_w = ctx.needs_input_grad[:2]
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)                   # of the products; sums are made in `wide`
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        dh = torch.empty_like(hidden) if need_h else None
        dw = torch.zeros_like(weight, dtype=wide) if need_w else None
        for i in range(0, R, chunk):
            h, y = hidden[i : i + chunk], labels[i : i + chunk]
            logits = (h @ weight.T).to(wide)                                  # (chunk, V)
            keep = y != -100
            at = y.clamp(min=0)[:, None]
            lse = logits.logsumexp(-1, keepdim=True)
            loss += ((lse - logits.gather(1, at)).squeeze(1) * keep).sum()
            if not (need_h or need_w):
                continue
            g = logits.sub_(lse).exp_()                                       # softmax, in place of the logits
            g.scatter_add_(1, at, torch.full_like(at, -1, dtype=wide))        # minus onehot
            g = g.mul_(keep[:, None]).to(dtype)
            if need_h:
                torch.matmul(g, weight, out=dh[i : i + chunk])
            if need_w:
                dw.addmm_(g.T, h) if dw.dtype == dtype else dw.add_(g.T @ h)   # the first needs no second (V, C)
        ctx.save_for_backward(dh, dw)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # the scalar is multiplied in before rounding: in bf16 it would bend all gradients by up to one part in 500
        dh, dw = (None if d is None else (d.to(grad.dtype) * grad).to(t) for d, t in zip(ctx.saved_tensors, ctx.dtypes))
        return dh, dw, None, None, None


def linear_cross_entropy(hidden, weight, labels, chunk=None):
    """Sum of losses over rows whose label is not -100; shapes in the head of this file. `chunk` rows of logits exist at
    a time. Labels lie in [0, V) or are -100: the loader guarantees it, and a check here would stall a GPU."""
    assert hidden.shape[0] == labels.shape[0], f"{hidden.shape[0]} rows, {labels.shape[0]} labels"
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # or the Function would make gradients that nobody wants
    with torch.autocast(kind, enabled=False):
        return LinearCrossEntropy.apply(hidden, weight, labels, chunk, dtype)
