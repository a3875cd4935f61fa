"""Linear layers that read the same x, trained, which keep for the backward pass what x is made of instead of x.

    N rows   C width of x   O of a result, own of each layer
    x (N, C) = make(*sources)   weights (O, C)   biases (O,) or None   ->   x W^T + b (N, O) of each layer

The argument in bytes. The gradient of W needs x, so that autograd keeps every norm's output and every silu(gate) * up
beside what their own gradients need: the norm's input, gate and up. Those two norms and one product are 2 C + F of the
numbers that a layer of a 7B Llama keeps per token, 38 of 131 KB in bf16, and they are one pass over numbers that the
backward pass reads anyway, beside 6 O C operations per row. So they are made again. The gradient of x goes where it
always goes; nothing here knows how x was differentiated.

Two things more come with having all layers in one place. The gradients of x are added up by the products themselves
(addmm), where autograd writes each and adds them. And of weights kept in fp32 under autocast only those are kept, while
autograd would hold the low copies of all layers from the forward pass to the backward.
"""

import torch
import torch.nn.functional as F


class Linears(torch.autograd.Function):
    """parts: the n sources, then weights, then as many biases"""

    @staticmethod
    def forward(ctx, x, make, n, *parts):
        half = (len(parts) - n) // 2
        weights, biases = parts[n : n + half], parts[n + half :]
        with torch.autocast(x.device.type, enabled=False):
            out = tuple(F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))
                        for W, b in zip(weights, biases))
        ctx.save_for_backward(*parts[: n + half])
        ctx.make, ctx.n = make, n
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dy):
        saved = ctx.saved_tensors                                           # unpacked once, as recomputation demands
        sources, weights = saved[: ctx.n], saved[ctx.n :]
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[3 + ctx.n :]
        need_w, need_b = need[: len(weights)], need[len(weights) :]
        dx, dw = None, [None] * len(weights)
        with torch.autocast(dy[0].device.type, enabled=False):
            if any(need_w):
                x = ctx.make(*sources).to(dy[0].dtype)
                dw = [(g.T @ x).to(W.dtype) if wanted else None for g, W, wanted in zip(dy, weights, need_w)]
            db = [g.sum(0, dtype=W.dtype) if wanted else None for g, W, wanted in zip(dy, weights, need_b)]
            if need_x:
                dx = dy[0] @ weights[0].to(dy[0].dtype)
                for g, W in zip(dy[1:], weights[1:]):
                    dx.addmm_(g, W.to(g.dtype))
        return dx, None, None, *[None] * ctx.n, *dw, *db


def linears(x, make, sources, layers):
    """x (N, C) = make(*sources), layers: torch.nn.Linear -> [layer(x) (N, O)]; autocast casts x here as there"""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return Linears.apply(x, make, len(sources), *(t.detach() for t in sources), *(f.weight for f in layers),
                         *(f.bias for f in layers))
