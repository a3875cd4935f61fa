"""Linear layers: a frozen weight W, alone or with low-rank adapters (lora.py), or a trained W. A frozen W may have
4 bits per element (NF4).

    N tokens   C input width   O output width, one per layer   r rank, one per layer   s = alpha / r
    x (N, C)   W (O, C) or its NF4 tensors   b (O,) or None   A (r, C)   B (O, r)   ->   y = x W^T + b + s (d A^T) B^T
    Without dropout, d = x. With dropout of probability p, d = x * keep, where keep (N, C) is a bool mask, and s is
    divided by 1 - p.

The cost in bytes, with adapters. Often several layers read the same x: q, k and v, or gate and up. Plain autograd adds
each adapter's output to the base output in a separate pass: 3 N O elements per layer. It also adds each gradient of x
to the others in separate passes: 6 N C elements per layer. Here addmm adds its matrix product to the output without
such a pass. One product multiplies x by the A of all layers. The layers share one dropout mask, and x is saved once. A
dequantized W is not saved. Backward dequantizes W again.

The cost in bytes, with a trained W in fp32 and products in bf16. For each packed sequence, plain torch casts W (6 bytes
per element), writes the gradient of W in bf16 (2), casts it to fp32 (6) and, after the first sequence, adds it to
W.grad (12). It also keeps all W in bf16 from forward to backward. Here the product of backward adds to W.grad in fp32
(8 bytes, 4 in the first sequence), and backward casts W again (6), so no W is kept in bf16: 20 bytes instead of 26, 16
instead of 14 in the first sequence. The gradient of W is never rounded to bf16.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import nf4

ROWS = 1024    # add_product on a CPU converts this many rows at a time to the dtype of the sum


def dense(W, dtype):
    """Return the matrix (O, C) of W in `dtype`. W is a matrix, or the tuple of NF4 tensors of a matrix."""
    return nf4.dequantize(*W, dtype) if isinstance(W, tuple) else W.to(dtype)


def base_linear(x, W, b):
    """Return x W^T + b (..., O) in the dtype of x (..., C)."""
    return F.linear(x, dense(W, x.dtype), None if b is None else b.to(x.dtype))


class FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b):
        ctx.W = W
        return base_linear(x, W, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return dy @ dense(ctx.W, dy.dtype), None, None


class LoRALinears(torch.autograd.Function):
    """Layers with adapters that read the same x. `bases` holds (W, b, s) of each layer. `AB` holds the A of all layers,
    then the B of all layers. keep: dropout mask or None"""

    @staticmethod
    def forward(ctx, x, keep, bases, *AB):
        A, B = AB[: len(bases)], AB[len(bases) :]
        with torch.autocast(x.device.type, enabled=False):
            xa = (x if keep is None else x * keep) @ torch.cat(A).to(x.dtype).T                        # (N, sum of r)
            # addmm_ works in place. Compiled code uses addmm: with addmm_, torch 2.11 would make the gradients zero
            addmm, out = torch.addmm if torch.compiler.is_compiling() else torch.Tensor.addmm_, []
            for (W, b, s), B_i, xa_i in zip(bases, B, xa.split([a.shape[0] for a in A], 1)):
                out.append(addmm(base_linear(x, W, b), xa_i, (s * B_i).to(x.dtype).T))                  # (N, O)
        ctx.save_for_backward(x, keep, xa, *AB)
        ctx.bases = bases
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dy):
        x, keep, xa, *AB = ctx.saved_tensors
        A, B, dx = AB[: len(dy)], AB[len(dy) :], None
        ranks, weights, scales = [a.shape[0] for a in A], [W for W, _, _ in ctx.bases], [s for _, _, s in ctx.bases]
        with torch.autocast(x.device.type, enabled=False):
            dxa = torch.cat([g @ (s * b).to(x.dtype) for g, s, b in zip(dy, scales, B)], 1)            # (N, sum of r)
            dA = (dxa.T @ (x if keep is None else x * keep)).split(ranks)
            dB = [(g.T @ xa_i).mul_(s) for g, s, xa_i in zip(dy, scales, xa.split(ranks, 1))]
            if ctx.needs_input_grad[0]:
                dx = dy[0] @ dense(weights[0], x.dtype)                                                # (N, C)
                for g, W in zip(dy[1:], weights[1:]):
                    dx.addmm_(g, dense(W, x.dtype))
                A = torch.cat(A).to(x.dtype)
                dx = dx.addmm_(dxa, A) if keep is None else dx.add_((dxa @ A).mul_(keep))
        return dx, None, None, *(g.to(p.dtype) for g, p in zip((*dA, *dB), AB))


def autocasted(x):
    """Return x in the dtype of autocast, if autocast is enabled. Autocast does not cast inputs of a custom Function."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def frozen_linear(x, W, b):
    """Return x W^T + b (..., O) for x (..., C). W and b are frozen: only x gets a gradient."""
    x = autocasted(x)
    with torch.autocast(x.device.type, enabled=False):
        return FrozenLinear.apply(x, W, b)


def lora_linears(x, p, bases, A, B):
    """Compute layers with adapters that all read x -> list of their outputs (..., O). Only x, A and B get gradients.

    x (..., C)      p: probability of dropout      bases: (W, b, s = alpha / r) of each layer
    A, B: lists with one matrix per layer"""
    z, keep = autocasted(x).flatten(0, -2), None                               # (N, C)
    if p:
        keep = torch.empty_like(z, dtype=torch.bool).bernoulli_(1 - p)
        bases = [(W, b, s / (1 - p)) for W, b, s in bases]
    return [y.unflatten(0, x.shape[:-1]) for y in LoRALinears.apply(z, keep, tuple(bases), *A, *B)]


# ---- trained weights ------------------------------------------------------------------------------------------------

def add_product(total, a, b, beta=1):
    """Set total (M, N) to beta * total + a (M, K) @ b (K, N), in place. total may have a wider dtype than a and b: then
    the product is not rounded to their dtype. With beta=0, total may be uninitialised."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:                                                             # a CPU has no product of bf16 in fp32
        b = b.to(total.dtype)
        for some, rows in zip(total.split(ROWS), a.split(ROWS)):
            some.addmm_(rows.to(total.dtype), b, beta=beta)


class LinearIntoGrad(torch.autograd.Function):
    """x W^T + b. Backward adds the gradient of W to W.grad and returns no gradient of W to autograd."""

    @staticmethod
    def forward(ctx, x, W, b):
        ctx.save_for_backward(x)
        ctx.W, ctx.b = W, b            # not saved: with recomputation, autograd would return a copy without .grad
        return base_linear(x, W, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x,), W, dx, db = ctx.saved_tensors, ctx.W, None, None
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = dy @ dense(W, dy.dtype)                                                           # (..., C)
            x, dy = (t.reshape(-1, t.shape[-1]) for t in (x, dy))                                      # (N, C), (N, O)
            if ctx.needs_input_grad[2]:
                db = dy.sum(0, dtype=ctx.b.dtype)
            if ctx.needs_input_grad[1]:                                # False if W was frozen after add_into_grad
                first = W.grad is None
                if first:
                    W.grad = torch.empty_like(W)
                add_product(W.grad, dy.T, x, beta=0 if first else 1)
        return dx, None, db


class TrainedLinear(nn.Linear):
    """A layer whose backward adds to weight.grad. Other uses of the same weight may add to it, too."""

    def forward(self, x):
        if not torch.is_grad_enabled():
            return super().forward(x)  # autocast then casts W once for all tokens of an answer
        x = autocasted(x)
        with torch.autocast(x.device.type, enabled=False):
            return LinearIntoGrad.apply(x, self.weight, self.bias)


def add_into_grad(model):
    """Make each trained linear layer a TrainedLinear. Only for eager code in one process: DDP, FSDP and torch.compile
    need the gradient from autograd. torch.autograd.grad does not see these weights, and hooks on them do not run."""
    for m in model.modules():
        if type(m) is nn.Linear and m.weight.requires_grad:
            m.__class__ = TrainedLinear
