"""LoRA (Hu et al. 2021), written by hand and applied from outside: y = W x + (alpha / r) B A dropout(x), W frozen.

A wrapped layer keeps its weight under its published name and gains lora_A.weight (r, in) and lora_B.weight (out, r),
which are the names of a PEFT adapter. B starts at zero, so that a wrapped model says exactly what it said before.

QLoRA (Dettmers et al. 2023) is the same over a frozen W in four bits (kernels/nf4.py): quantize_base() comes first. W is
then no parameter but a few buffers, is written out for each product, forward and backward, and is in no checkpoint: it
follows from the model that a run starts from. What is published is merged with the W the adapter was trained over."""

import fnmatch
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import stop
from kernels import nf4


def held(layer):
    """What a layer holds of its W: the matrix, or the parts that stand for it"""
    return tuple(getattr(layer, k) for k in nf4.PARTS) if hasattr(layer, "absmax") else layer.weight


def dense(W, dtype):
    """What a layer holds -> W (O, C) in dtype"""
    return nf4.dequantize(*W, dtype) if isinstance(W, tuple) else W.to(dtype)


class Frozen(torch.autograd.Function):
    """y = x W^T + b with a W that is not kept but written out again for the gradient of x, the only one there is.
    x (..., C)   W: what held() gives   b (O,) or None   ->   (..., O)"""

    @staticmethod
    def forward(ctx, x, W, b):
        ctx.W = W
        return F.linear(x, dense(W, x.dtype), None if b is None else b.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return dy @ dense(ctx.W, dy.dtype), None, None


class NF4Linear(nn.Linear):
    """A frozen layer in four bits a weight, as quantize_base() puts it in."""

    def __init__(self, base):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        for k, t in zip(nf4.PARTS, nf4.quantize(base.weight)):
            self.register_buffer(k, t)
        self.bias = base.requires_grad_(False).bias

    def forward(self, x):
        x = computed(x)
        with torch.autocast(x.device.type, enabled=False):
            return Frozen.apply(x, held(self), self.bias)


def computed(x):
    """x in the dtype that autocast asks for, where it is on"""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Adapted(torch.autograd.Function):
    """y = x W^T + b + s (d A^T) B^T for all layers that read the same x, with d = x, or x where `keep` says so.

    One product serves all A; each adapter's second product is added onto the base's result by the matrix product itself
    (addmm), and so are the gradients of x, so that no pass adds two large tensors. Kept for the backward pass: keep,
    d A^T (N, sum of r) and the sources, of which x = make(*sources). W is frozen and asks for nothing.

    N rows   C width of x   O of a result, own of each layer   r rank, own of each layer
    x (N, C)   keep (N, C) bool or None   scales: s of each layer   weights: what held() gives of each layer
    parts: b (O,) or None of each, then A (r, C) of each, then B (O, r) of each, the sources   ->   y (N, O) of each"""

    @staticmethod
    def forward(ctx, x, keep, scales, weights, make, *parts):
        n = len(scales)
        bias, A, B, sources = parts[:n], parts[n : 2 * n], parts[2 * n : 3 * n], parts[3 * n :]
        with torch.autocast(x.device.type, enabled=False):
            xa = (x if keep is None else x * keep) @ torch.cat(A).to(x.dtype).T                        # (N, sum of r)
            # in place, but for torch 2.11, which compiles a change to a result of forward into gradients of zero
            addmm, out = torch.addmm if torch.compiler.is_compiling() else torch.Tensor.addmm_, []
            for s, W, b, B_i, xa_i in zip(scales, weights, bias, B, xa.split([a.shape[0] for a in A], 1)):
                y = F.linear(x, dense(W, x.dtype), None if b is None else b.to(x.dtype))
                out.append(addmm(y, xa_i, (s * B_i).to(x.dtype).T))
        ctx.save_for_backward(keep, xa, *A, *B, *sources)
        ctx.scales, ctx.weights, ctx.make = scales, weights, make
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dy):
        keep, xa, *AB = ctx.saved_tensors
        n, dx = len(dy), None
        A, B, sources = AB[:n], AB[n : 2 * n], AB[2 * n :]
        ranks = [a.shape[0] for a in A]
        with torch.autocast(xa.device.type, enabled=False):
            x = ctx.make(*sources).to(xa.dtype)
            dxa = torch.cat([g @ (s * b).to(x.dtype) for g, s, b in zip(dy, ctx.scales, B)], 1)        # (N, sum of r)
            dA = (dxa.T @ (x if keep is None else x * keep)).split(ranks)
            dB = [(g.T @ xa_i).mul_(s) for g, s, xa_i in zip(dy, ctx.scales, xa.split(ranks, 1))]
            if ctx.needs_input_grad[0]:
                dx = dy[0] @ dense(ctx.weights[0], x.dtype)
                for g, W in zip(dy[1:], ctx.weights[1:]):
                    dx.addmm_(g, dense(W, x.dtype))
                A = torch.cat(A).to(x.dtype)
                dx = dx.addmm_(dxa, A) if keep is None else dx.add_((dxa @ A).mul_(keep))
        grads = [g.to(p.dtype) for g, p in zip((*dA, *dB), AB)]
        return dx, None, None, None, None, *[None] * n, *grads, *[None] * len(sources)


class LoRALinear(nn.Linear):
    def __init__(self, base, r, alpha, dropout):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        if isinstance(base, NF4Linear):
            for k, t in zip(nf4.PARTS, held(base)):
                self.register_buffer(k, t)
        else:
            self.weight = base.weight
        self.bias = base.requires_grad_(False).bias
        self.scale, self.dropout = alpha / r, dropout
        self.lora_A = nn.Linear(base.in_features, r, bias=False)   # U(-1/sqrt(in), 1/sqrt(in)), as in PEFT
        self.lora_B = nn.Linear(r, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.together(x, (self,))[0]

    @staticmethod
    def together(x, layers, made=None):
        """x (..., C) -> [layer(x) (..., O)] of layers of which some carry an adapter; model.together comes here, and
        says how x is made of what is kept anyway. Those adapters share one dropout mask, where PEFT draws one for each:
        as random, and a copy of x less for each."""
        mine = [f for f in layers if type(f) is LoRALinear]
        if len({f.dropout for f in mine}) != 1:                                # none, or no mask that would do for all
            return [f(x) for f in layers]
        p, keep, rest = mine[0].dropout, None, x.shape[:-1]
        z = computed(x).flatten(0, -2)                                         # (N, C)
        if p and mine[0].training:
            keep = torch.empty_like(z, dtype=torch.bool).bernoulli_(1 - p)
        scales = tuple(f.scale if keep is None else f.scale / (1 - p) for f in mine)
        make, sources = made or (lambda z: z, (z,))
        ys = Adapted.apply(z, keep, scales, tuple(held(f) for f in mine), make, *(f.bias for f in mine),
                           *(f.lora_A.weight for f in mine), *(f.lora_B.weight for f in mine),
                           *(t.detach() for t in sources))
        done = {f: y.unflatten(0, rest) for f, y in zip(mine, ys)}
        return [done[f] if f in done else f(x) for f in layers]


class DoRALinear(LoRALinear):
    """DoRA (Liu et al. 2024): the rows of W + s B A, each at the length that a vector says. It is read and merged here;
    training it would want a gradient that takes the rows' own lengths as constant."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(self.out_features))

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            stop("a DoRA adapter is read and merged here, not trained")
        W = merged(held(self), self.lora_A.weight, self.lora_B.weight, self.scale, self.lora_magnitude_vector)
        return F.linear(x, W.to(x.dtype), self.bias)


def merged(W, A, B, scale, lengths=None):
    """W + scale B A (O, C) in fp32 (fp64 for fp64); with lengths (O,), DoRA's: its rows, made as long as that. W: what
    held() gives."""
    wide = torch.promote_types(torch.float32, A.dtype if isinstance(W, tuple) else W.dtype)
    V = dense(W, wide) + B.to(wide) @ A.to(wide) * scale
    return V if lengths is None else V * (lengths.to(wide) / V.norm(dim=1))[:, None]


def targets(model, pattern):
    """Names of the Linear layers a pattern means: `all-linear` = every one in the language model; else comma-separated
    leaf names there (q_proj,v_proj) or globs over whole names. Never the head: it is a matrix that nobody calls."""
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not re.search("lora_|lm_head", n)]
    if pattern == "all-linear":
        return [n for n in linears if n.startswith("language_model.model.")]
    out = []
    for p in pattern.split(","):
        glob = p if "." in p or "*" in p else f"language_model.*.{p}"
        fits = [n for n in linears if fnmatch.fnmatchcase(n, glob)]
        if not fits:
            stop(f"lora_targets: nothing is called {p!r}; there is, for example, {linears[-1]}")
        out += [n for n in fits if n not in out]
    return out


@torch.no_grad()
def quantize_base(model):
    """Put the linear layers of the language model but its head into NF4, in place: what QLoRA leaves in full are norms,
    embeddings, head, connector and eyes. A row's length must be even. -> their names"""
    names = targets(model, "all-linear")
    for name in names:
        parent, _, leaf = name.rpartition(".")
        base = model.get_submodule(name)
        if type(base) is not nn.Linear:
            stop(f"{name} is a {type(base).__name__} already: quantising comes first, and once")
        if base.in_features % 2:
            stop(f"{name} has rows of {base.in_features} numbers, which four bits each cannot hold: two share a byte")
        if not base.weight.isfinite().all():
            stop(f"{name}.weight is not finite and is not quantised")
        setattr(model.get_submodule(parent), leaf, NF4Linear(base))
    return names


def apply(model, r, alpha, dropout, pattern, seed=0, kind=LoRALinear):
    """Wrap layers in place, by LoRALinear or another `kind`. -> their names"""
    names = targets(model, pattern)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            parent, _, leaf = name.rpartition(".")
            base = model.get_submodule(name)
            if isinstance(base, LoRALinear):
                stop(f"{name} carries an adapter already")
            setattr(model.get_submodule(parent), leaf, kind(base, r, alpha, dropout))
    return names


def scales(model):
    """-> {name: alpha / r} of the wrapped layers, each its own"""
    return {n: m.scale for n, m in model.named_modules() if isinstance(m, LoRALinear)}


@torch.no_grad()
def merge_state(state, scales, dtype=None):
    """Tensors of a wrapped model by name -> those of the plain model (merged), with the scale of each layer by name.
    What was in NF4 is written out. Each matrix is formed in fp32 (fp64 for fp64) and rounded to dtype, if one is given,
    so that 7B never lie there in fp32. The tensors given are not changed: merging twice gives the same."""
    def kept(W):
        return W.to(dtype or W.dtype)

    out, packed = {k: v for k, v in state.items() if ".lora_" not in k}, {}
    for name in [k.removesuffix(".absmax") for k in out if k.endswith(".absmax")]:
        packed[name] = tuple(out.pop(f"{name}.{part}") for part in nf4.PARTS)
        out[f"{name}.weight"] = kept(dense(packed[name], torch.float32))
    for name in [k.removesuffix(".lora_A.weight") for k in state if k.endswith(".lora_A.weight")]:
        A, B = (state[f"{name}.lora_{x}.weight"] for x in "AB")
        W = merged(packed.get(name, out[f"{name}.weight"]), A, B, scales[name],
                   state.get(f"{name}.lora_magnitude_vector"))
        if not W.isfinite().all():
            stop(f"the adapter of {name} is not finite and is not merged")
        out[f"{name}.weight"] = kept(W)
    return out


