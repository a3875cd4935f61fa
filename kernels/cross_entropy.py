"""Linear cross-entropy: the sum of -log softmax(hidden @ weight.T)[label] over rows, without ever holding all the logits.

    R supervised rows   C width   V vocabulary
    hidden (R, C)   weight (V, C)   labels (R,) int64, -100 = ignored   ->   scalar, fp32 (fp64 for fp64)

The argument in bytes. Logits are R x V: at 8,192 rows and 128k words 4 GiB in fp32, and autograd would keep them, their softmax
and their gradient. The gradient of a sum of losses is softmax - onehot whatever comes after, up to one scalar, so it can be
formed in the forward pass while a chunk of logits is at hand: each chunk is a product, turned into its own gradient in place,
multiplied back into hidden and weight, and freed. Peak memory is one chunk.
"""

import torch
import torch.nn.functional as F

CHUNK_BYTES = 256 << 20  # one chunk of fp32 logits, at most; and at least 256 rows, so that the products stay products


def linear_cross_entropy_ref(hidden, weight, labels):
    """The definition."""
    logits = hidden @ weight.T
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels, ignore_index=-100, reduction="sum")


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk):
        R, V = hidden.shape[0], weight.shape[0]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        chunk = chunk or max(256, CHUNK_BYTES // (4 * V))
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        need_h, need_w = ctx.needs_input_grad[:2]
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
            g = g.mul_(keep[:, None]).to(h.dtype)
            if need_h:
                torch.matmul(g, weight, out=dh[i : i + chunk])
            if need_w:
                dw += g.T @ h
        ctx.save_for_backward(dh, dw)
        ctx.w_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return (None if dh is None else dh * grad.to(dh.dtype),
                None if dw is None else (dw * grad.to(dw.dtype)).to(ctx.w_dtype), None, None)


def linear_cross_entropy(hidden, weight, labels, chunk=None):
    """Sum of losses over rows whose label is not -100; shapes in the head of this file. `chunk` rows of logits exist at a time.
    Labels must lie in [0, V) or be -100: the loader guarantees it, and a check here would stall a GPU."""
    assert hidden.shape[0] == labels.shape[0], f"{hidden.shape[0]} rows, {labels.shape[0]} labels"
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return LinearCrossEntropy.apply(hidden, weight, labels, chunk)
