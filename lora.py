"""LoRA (Hu et al. 2021), without the peft library: y = W x + b + (alpha / r) B A dropout(x), with W and b frozen.

add_adapters() replaces linear layers of a model. The new layer keeps the weight under its published name and adds
lora_A.weight (r, in) and lora_B.weight (out, r), the names of a PEFT adapter. B starts at zero, so a new adapter does
not change the output. merge_state() computes W + s B A, s = alpha / r, to save a model without adapters.

QLoRA (Dettmers et al. 2023) is LoRA on a W with 4 bits per element (NF4, kernels/nf4.py). quantize_base() must run
before add_adapters(). It stores W in buffers, and each matrix product dequantizes them. Checkpoints do not contain
these buffers, because they can be computed again from the model that the run started from.

    N tokens   C input width   O output width, one per layer   r rank, one per layer   s = alpha / r
"""

import fnmatch
import re
import types

import torch
import torch.nn as nn

from config import stop
from kernels import nf4
from kernels.linear import dense, frozen_linear, lora_linears


def base_weight(layer):
    """Return the frozen weight of a layer: a matrix (O, C), or the tuple of its NF4 tensors."""
    return tuple(getattr(layer, k) for k in nf4.PARTS) if hasattr(layer, "absmax") else layer.weight


class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight has 4 bits per element (NF4)."""

    def __init__(self, base):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        for k, t in zip(nf4.PARTS, nf4.quantize(base.weight)):
            self.register_buffer(k, t)
        self.register_parameter("bias", base.requires_grad_(False).bias)

    def forward(self, x):
        return frozen_linear(x, base_weight(self), self.bias)


class LoRALinear(nn.Linear):
    def __init__(self, base, r, alpha, dropout):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self._parameters.update(base.requires_grad_(False)._parameters)    # the frozen weight and bias
        self._buffers.update(base._buffers)                                # the frozen weight, if it is in NF4
        self.scale, self.dropout = alpha / r, dropout
        self.lora_A = nn.Linear(base.in_features, r, bias=False)   # starts uniform in +-1/sqrt(in), as in PEFT
        self.lora_B = nn.Linear(r, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return apply_shared_input(x, self)[0]


class DoRALinear(LoRALinear):
    """DoRA (Liu et al. 2024): each row of W + s B A is scaled to a stored norm. This layer is merged, not trained."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(self.out_features))

    def forward(self, x):
        stop("a DoRA adapter is merged before the model is used")


def apply_shared_input(x, *layers):
    """Return a list with layer(x) (..., O) for each of `layers`; x is (..., C). The LoRALinear layers share one dropout
    mask. PEFT draws one mask per layer."""
    adapters = [f for f in layers if type(f) is LoRALinear]
    if len({f.dropout for f in adapters}) != 1:                    # no adapters, or adapters with unequal dropout
        return [f(x) for f in layers]
    ys = lora_linears(x, adapters[0].dropout if adapters[0].training else 0.0,
                      [(base_weight(f), f.bias, f.scale) for f in adapters],
                      [f.lora_A.weight for f in adapters], [f.lora_B.weight for f in adapters])
    done = dict(zip(adapters, ys))
    return [done[f] if f in done else f(x) for f in layers]


def qkv(attention, x, rows=None):
    """Return q, k, v of x. This replaces model.LlamaAttention.qkv. rows: the tokens that need q; None: all tokens"""
    if rows is None:
        return apply_shared_input(x, attention.q_proj, attention.k_proj, attention.v_proj)
    return attention.q_proj(x[rows]), *apply_shared_input(x, attention.k_proj, attention.v_proj)


def gate_up(mlp, x):
    """Compute both projections of x in one call. Replaces model.LlamaMLP.gate_up."""
    return apply_shared_input(x, mlp.gate_proj, mlp.up_proj)


def targets(model, pattern):
    """Return names of the linear layers that `pattern` selects: "all-linear" (all in the language model) or a list with
    commas. An entry with a dot or * is a glob over whole names (vision_tower.*.q_proj). Other entries are the last part
    of names in the language model (q_proj). The head is never selected, because it is not called as a layer."""
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not re.search("lora_|lm_head", n)]
    if pattern == "all-linear":
        return [n for n in linears if n.startswith("language_model.model.")]
    out = []
    for p in pattern.split(","):
        glob = p if "." in p or "*" in p else f"language_model.*.{p}"
        fits = [n for n in linears if fnmatch.fnmatchcase(n, glob)]
        if not fits:
            stop(f"lora_targets: no linear layer is called {p!r}; the model has, for example, {linears[-1]}")
        out += [n for n in fits if n not in out]
    return out


@torch.no_grad()
def quantize_base(model):
    """Quantize the linear layers of the language model to NF4, in place -> names of these layers. Norms, embeddings,
    head, connector and vision tower keep their dtype."""
    names = targets(model, "all-linear")
    for name in names:
        base = model.get_submodule(name)
        if type(base) is not nn.Linear:
            stop(f"{name} is already a {type(base).__name__}: quantize once, and before adapters are added")
        if not base.weight.isfinite().all():
            stop(f"{name}.weight is not finite and cannot be quantized")
        model.set_submodule(name, NF4Linear(base))
    return names


def add_adapters(model, r, alpha, dropout, pattern, seed=0, kind=LoRALinear):
    """Add adapters to the layers that `pattern` selects -> names of these layers. kind: LoRALinear or DoRALinear."""
    names = targets(model, pattern)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            base = model.get_submodule(name)
            if isinstance(base, LoRALinear):
                stop(f"{name} already has an adapter")
            model.set_submodule(name, kind(base, r, alpha, dropout))
    for m in model.modules():
        for shared in (qkv, gate_up):
            if hasattr(m, shared.__name__):
                setattr(m, shared.__name__, types.MethodType(shared, m))
    return names


def scales(model):
    """Return {name: alpha / r} of the layers with adapters."""
    return {n: m.scale for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def merged(W, A, B, scale, lengths=None):
    """Return W + scale B A (O, C) in fp32 (fp64 if W is fp64). lengths (O,), for DoRA only: the norm of each row"""
    wide = torch.promote_types(torch.float32, A.dtype if isinstance(W, tuple) else W.dtype)
    V = dense(W, wide) + B.to(wide) @ A.to(wide) * scale
    return V if lengths is None else V * (lengths.to(wide) / V.norm(dim=1))[:, None]


@torch.no_grad()
def merge_state(state, scales, dtype=None):
    """Return the state dict of the merged model. `state` is that of a model with adapters; it does not change. scales:
    {layer name: alpha / r}. A merged matrix is computed in fp32 (fp64 if W is fp64). If dtype is given, the matrix is
    rounded to it before the next is computed. So a 7B model is never whole in memory in fp32."""
    out, packed = {k: v for k, v in state.items() if ".lora_" not in k}, {}
    for name in [k.removesuffix(".absmax") for k in out if k.endswith(".absmax")]:
        packed[name] = tuple(out.pop(f"{name}.{part}") for part in nf4.PARTS)
        out[f"{name}.weight"] = dense(packed[name], dtype or torch.float32)
    for name in [k.removesuffix(".lora_A.weight") for k in state if k.endswith(".lora_A.weight")]:
        A, B = (state[f"{name}.lora_{x}.weight"] for x in "AB")
        W = merged(packed.get(name, out[f"{name}.weight"]), A, B, scales[name],
                   state.get(f"{name}.lora_magnitude_vector"))
        if not W.isfinite().all():
            stop(f"the adapter of {name} is not finite and cannot be merged")
        out[f"{name}.weight"] = W.to(dtype or W.dtype)
    return out
