"""The rows (cases) of `python -m bench kernels`: sizes, random inputs, contenders. bench/kernels.py measures them. A
contender is our kernel or one of its alternatives.

    N tokens   H, G query heads and key heads   K head size   C, O input and output width   V vocabulary   r rank
"""

import dataclasses
import functools
import inspect
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import bench


@dataclasses.dataclass
class Contender:
    """One way to compute a row. It has its own copy of the inputs, because some contenders overwrite them."""
    forward: object                # () -> tuple of outputs
    leaves: list                   # tensors that get gradients
    ups: list                      # gradients of the outputs
    # common([outputs..., gradients...]) returns these tensors in the layout that all contenders of the row share
    common: object = list
    note: str = ""

    def run(self):
        """Compute forward and backward -> [outputs..., gradients of the leaves...]"""
        out = self.forward()
        got = torch.autograd.grad(out, self.leaves, self.ups) if self.leaves else ()
        return [*(o.detach() for o in out), *got]


@dataclasses.dataclass
class Row:
    what: str
    # name -> function that builds a Contender. "ours" is first. "torch" is the definition in plain torch
    contenders: dict
    truth: object                  # () -> true outputs and gradients in float64, in the layout of Contender.common
    plain: object = None           # () -> outputs and gradients of plain torch, if no contender is "torch"
    flops: tuple = (0, 0)          # FLOPs of forward, FLOPs of backward
    bytes: tuple = (0, 0)          # bytes that forward must read or write, bytes that backward must read or write
    together: bool = False         # forward and backward are one measurement


def leaf(t):
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def simple(f, args, ups, **more):
    """Return a Contender that calls f on copies of the tensors `args`. f returns a tensor or a tuple of tensors. `ups`
    are the gradients of these outputs."""
    leaves = [leaf(t) for t in args]

    def forward():
        out = f(*leaves)
        return out if isinstance(out, tuple) else (out,)
    return Contender(forward, leaves, ups, **more)


def gradients(f, args, ups):
    """Compute f(*args) and its backward with the output gradients `ups` -> [outputs..., gradients of args...]"""
    return simple(f, args, ups).run()


def double(*tensors):
    return [t.double() for t in tensors]


def normal(*shapes, device, dtype):
    return [torch.randn(*s, device=device).to(dtype) for s in shapes]


def attention_row(lengths, H, G, K, causal, device, dtype):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from kernels.attention import attention, attention_ref
    N, B, L, g = sum(lengths), len(lengths), max(lengths), H // G
    q, k, v, do = normal(*((N, heads, K) for heads in (H, G, G, H)), device=device, dtype=dtype)
    n, at = torch.tensor(lengths, device=device), torch.arange(N, device=device)
    starts = n.cumsum(0) - n
    doc = torch.arange(B, device=device).repeat_interleave(n)                   # (N,) each token's document
    place = doc * L + at - starts[doc]                                          # (N,) a token's index in a padded batch
    lo = starts[doc].int()
    hi = (at + 1 if causal else (starts + n)[doc]).int()
    pairs = sum(t * (t + 1) // 2 if causal else t * t for t in lengths)
    even = min(lengths) == L
    shared = dict(enable_gqa=True) if g > 1 else {}

    def first(ts):
        """Keep only the heads of the first group, because float64 results of all heads would not fit in memory."""
        return [t[:, :heads] for t, heads in zip(ts, (g, g, 1, 1))]

    def definition(*tensors):
        """Compute out, dq, dk, dv of the first group of heads by the definition, one document at a time."""
        spans = [(int(s), int(s) + t) for s, t in zip(starts, lengths)]
        parts = [gradients(lambda *x: attention_ref(*x, lo[a:b] - a, hi[a:b] - a), [t[a:b] for t in tensors[:3]],
                           [tensors[3][a:b]]) for a, b in spans]
        return [torch.cat(p) for p in zip(*parts)]

    def spread(t):
        """Pad each of the B documents to L tokens: t (N, heads, K) -> (B, heads, L, K), a view of (B, L, heads, K)"""
        padded = t.new_zeros(B * L, *t.shape[1:])
        padded[place] = t
        return padded.view(B, L, *t.shape[1:]).transpose(1, 2)

    def gather(t):
        return t.transpose(1, 2).reshape(B * L, -1, K)[place]

    def sdpa(backend):
        def forward(*args):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*args, is_causal=causal, **shared)
        return simple(forward, [spread(t) for t in (q, k, v)], [spread(do)],
                      common=lambda ts: first([gather(t) for t in ts]),
                      note="" if even else f"padded, {B * L / N:.2f} times the tokens")

    def varlen():
        from torch.nn.attention.varlen import varlen_attn
        bounds = F.pad(n.cumsum(0), (1, 0)).int()
        how = dict(window_size=(-1, 0 if causal else -1))
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:           # since torch 2.12
            how |= shared
        return simple(lambda q, k, v: varlen_attn(q, k, v, bounds, bounds, L, L, **how), (q, k, v), [do], common=first)

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        run = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
        began, mask = time.perf_counter(), None
        if not even:
            mask = create_block_mask(lambda b, h, i, j: (doc[i] == doc[j]) & (i >= j if causal else i >= 0),
                                     None, None, N, N, device=device)
        elif causal:
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, L, L, device=device)
        bench.sync(device)
        note = f"block mask: {1e3 * (time.perf_counter() - began):.1f} ms more" if mask else ""
        into, back = (spread, gather) if even else (lambda t: t.transpose(0, 1)[None], lambda t: t[0].transpose(0, 1))
        return simple(lambda *args: run(*args, block_mask=mask, **shared), [into(t) for t in (q, k, v)], [into(do)],
                      common=lambda ts: first([back(t) for t in ts]), note=note)

    cut = q[:, :g], k[:, :1], v[:, :1], do[:, :g]
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION}
    who = {"ours": lambda: simple(lambda q, k, v: attention(q, k, v, lo, hi), (q, k, v), [do], common=first),
           **{f"sdpa {name}": functools.partial(sdpa, backend) for name, backend in backends.items()},
           "varlen_attn": varlen, "flex": flex}
    many = f"{B} x {L}" if even else f"{N} tokens in {B} documents"
    return Row(f"{many}, {H}{f'/{G}' if g > 1 else ''} x {K}, {'causal' if causal else 'full'}", who,
               lambda: definition(*double(*cut)), lambda: definition(*cut),
               flops=(4 * pairs * H * K, 10 * pairs * H * K))


def cross_entropy_row(N, C, V, share, trained, device, dtype):
    from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
    h, w = normal((N, C), (V, C), device=device, dtype=dtype)
    w *= C**-0.5
    supervised = torch.rand(N, device=device) < share
    y = torch.randint(0, V, (N,), device=device).masked_fill(~supervised, -100)
    rows = supervised.nonzero()[:, 0]
    R, some = rows.numel(), share < 1

    def contender(f, gathered=True):
        """Return a Contender for f(hidden, weight, labels), which returns a summed loss. If `gathered` is True, f gets
        only the supervised tokens."""
        def loss(h, head=w):
            return f(h[rows], head, y[rows]) if gathered and some else f(h, head, y)
        return simple(loss, [h, w][: 1 + trained], [torch.ones((), device=device)])

    def eager(h, w, y):
        return F.cross_entropy((h @ w.T).float(), y, reduction="sum", ignore_index=-100)

    def liger(gathered):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return contender(lambda h, w, y: loss(w, h, y), gathered)

    def cce(**how):
        from cut_cross_entropy import linear_cross_entropy as f
        return contender(functools.partial(f, reduction="sum", **how))

    def chunked():
        options = nn.LinearCrossEntropyOptions()
        return contender(lambda h, w, y: F.linear_cross_entropy(h, w, y, reduction="sum", options=options))

    def truth():
        """Compute the loss and its gradients in float64, 1,024 tokens at a time. The logits of all tokens do not fit in
        memory."""
        head, total = leaf(w.double()), torch.zeros((), dtype=torch.float64, device=device)
        dh = torch.zeros(N, C, dtype=torch.float64, device=device)
        for r in rows.split(1024):
            x = leaf(h[r].double())
            loss = linear_cross_entropy_ref(x, head, y[r])
            loss.backward()
            total, dh[r] = total + loss.detach(), x.grad
        return [total, dh, *[head.grad] * trained]

    who = {"ours": lambda: contender(linear_cross_entropy), "torch": lambda: contender(eager, False),
           **({"torch, gathered": lambda: contender(eager)} if some else {}),
           "torch.compile": lambda: contender(torch.compile(eager, dynamic=False)), "F.linear_cross_entropy": chunked,
           "liger": lambda: liger(False), **({"liger, gathered": lambda: liger(True)} if some else {}),
           "cce exact": lambda: cce(filter_eps=None), "cce": cce}
    return Row(f"{N} x {C}, vocabulary {V}, {share:.0%} supervised{'' if trained else ', head frozen'}", who, truth,
               flops=(2 * R * C * V, (2 + 2 * trained) * R * C * V), together=True)


def elementwise(what, ours, definition, liger, args, ups, moved):
    """Return the Row of an operation that is limited by memory traffic, not by FLOPs.

    moved    (bytes that forward must read or write, bytes that backward must read or write)
    liger    a function: liger(args, ups) returns the Contender that uses Liger's kernel"""
    who = {"ours": lambda: simple(ours, args, ups), "torch": lambda: simple(definition, args, ups),
           "torch.compile": lambda: simple(torch.compile(definition, dynamic=False), args, ups),
           "liger": lambda: liger(args, ups)}
    return Row(what, who, lambda: gradients(definition, double(*args), double(*ups)), bytes=moved)


def norm_row(N, C, residual, device, dtype):
    from kernels.norm import rms_norm, rms_norm_ref
    x, add, dy, ds = normal(*[(N, C)] * 4, device=device, dtype=dtype)
    w, eps, unit = torch.rand(C, device=device).to(dtype) + 0.5, 1e-6, N * C * dtype.itemsize

    def liger(args, ups):
        from liger_kernel.transformers import LigerFusedAddRMSNorm, LigerRMSNorm
        layer = (LigerFusedAddRMSNorm if residual else LigerRMSNorm)(C, eps, in_place=False).to(device, dtype)
        tensors = [*(leaf(t) for t in args[:-1]), layer.weight]
        layer.weight.data.copy_(w)

        def forward():
            out = layer(*tensors[:-1])
            return out[::-1] if residual else (out,)                            # Liger returns y, then the sum
        return Contender(forward, tensors, ups)

    def ours(*t):
        return rms_norm(t[0], t[-1], eps, *t[1:-1])

    def definition(*t):
        total = t[0] + t[1] if residual else t[0]
        y = rms_norm_ref(total, t[-1], eps)
        return (total, y) if residual else y
    args, ups, moved = ((x, add, w), [ds, dy], (4, 4)) if residual else ((x, w), [dy], (2, 3))
    return elementwise(f"{'residual + ' * residual}RMSNorm, {N} x {C}", ours, definition, liger, args, ups,
                       tuple(n * unit for n in moved))


def swiglu_row(N, C, device, dtype):
    from kernels.swiglu import swiglu, swiglu_ref
    gate, up, dy = normal(*[(N, C)] * 3, device=device, dtype=dtype)

    def liger(args, ups):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
        return simple(LigerSiLUMulFunction.apply, args, ups)
    unit = N * C * dtype.itemsize
    return elementwise(f"SwiGLU, {N} x {C}", swiglu, swiglu_ref, liger, (gate, up), [dy], (3 * unit, 5 * unit))


def rope_row(N, H, G, K, device, dtype):
    from kernels.rope import rope_qk, rope_ref
    q, dq, k, dk = normal(*((N, heads, K) for heads in (H, H, G, G)), device=device, dtype=dtype)
    angles = torch.arange(N, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, K // 2, device=device)
    cos, sin = angles.cos(), angles.sin()

    def liger(args, ups):
        from liger_kernel.ops.rope import LigerRopeFunction
        both = [torch.cat([t, t], -1).to(dtype)[None] for t in (cos, sin)]      # (1, N, K)
        args, ups = ([t.transpose(0, 1)[None] for t in ts] for ts in (args, ups))
        # Liger overwrites its inputs. Autograd does not allow this for a leaf (a tensor that gets a gradient), but for
        # a view of it
        return simple(lambda *ts: LigerRopeFunction.apply(*(t.view_as(t) for t in ts), *both), args, ups,
                      common=lambda ts: [t[0].transpose(0, 1) for t in ts])
    unit = N * (H + G) * K * dtype.itemsize
    return elementwise(f"rotary positions, {N} x {H} + {G} heads x {K}", lambda q, k: rope_qk(q, k, cos, sin),
                       lambda q, k: (rope_ref(q, cos, sin), rope_ref(k, cos, sin)), liger, (q, k), [dq, dk],
                       (2 * unit, 2 * unit))


def lora_row(N, C, O, layers, r, device, dtype):
    """Return the Row of `layers` linear layers that share the input x. Each has a trained adapter of rank r in fp32.
    They run under autocast, as in training."""
    import lora
    x, *ups = normal((N, C), *[(N, O)] * layers, device=device, dtype=dtype)
    weights = [w * C**-0.5 for w in normal(*[(O, C)] * layers, device=device, dtype=dtype)]
    pairs = [t * t.shape[1]**-0.5 for t in normal(*[(r, C), (O, r)] * layers, device=device, dtype=torch.float32)]
    names = [f"linear_{i}" for i in range(layers)]

    def contender(wrap, parts, forward):
        """Return a Contender with frozen layers in a module, to which wrap(module) adds the adapters. parts(layer)
        returns the A and B of a layer. forward(x, layers) returns the outputs."""
        holder = nn.Module()
        for name, w in zip(names, weights):
            layer = nn.Linear(C, O, bias=False, device=device, dtype=dtype)
            layer.weight = nn.Parameter(w, requires_grad=False)
            holder.add_module(name, layer)
        wrap(holder)
        wrapped = [getattr(holder.to(device), name) for name in names]
        leaves = [leaf(x), *(p for layer in wrapped for p in parts(layer))]
        for p, value in zip(leaves[1:], pairs):
            p.data = value.clone()

        def run():
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                return tuple(forward(leaves[0], wrapped))
        return Contender(run, leaves, ups)

    def ours():
        return contender(lambda m: lora.add_adapters(m, r, 2 * r, 0.0, "linear*"),
                         lambda layer: (layer.lora_A.weight, layer.lora_B.weight),
                         lambda x, wrapped: lora.apply_shared_input(x, *wrapped))

    def peft():
        from peft import LoraConfig, inject_adapter_in_model
        how = LoraConfig(r=r, lora_alpha=2 * r, target_modules=names, lora_dropout=0.0)
        return contender(lambda m: inject_adapter_in_model(how, m),
                         lambda layer: (layer.lora_A["default"].weight, layer.lora_B["default"].weight),
                         lambda x, wrapped: [layer(x) for layer in wrapped])

    def definition(x, *pairs, low=dtype):
        return tuple(F.linear(x, w.to(low)) + 2.0 * F.linear(F.linear(x, A.to(low)), B.to(low))
                     for w, A, B in zip(weights, pairs[::2], pairs[1::2]))

    who = {"ours": ours, "torch": lambda: simple(definition, (x, *pairs), ups),
           "torch.compile": lambda: simple(torch.compile(definition, dynamic=False), (x, *pairs), ups), "peft": peft}
    base, extra = 2 * N * C * O * layers, 2 * N * r * (C + O) * layers
    return Row(f"{layers} x adapter of rank {r}, {N} x {C} to {O}", who,
               lambda: gradients(functools.partial(definition, low=torch.float64), double(x, *pairs), double(*ups)),
               flops=(base + extra, base + 2 * extra), together=True)


def nf4_row(O, C, device, dtype):
    from kernels import nf4
    W = torch.randn(O, C, device=device)
    parts = codes, absmax, nested, offset = nf4.quantize(W)

    def without_gradient(f, *args):
        return Contender(lambda: (f(*args),), [], [])

    def bitsandbytes():
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
        _, state = quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type="nf4")
        state.absmax, state.state2.absmax, state.offset, state.dtype = absmax, nested, offset, dtype
        return without_gradient(dequantize_4bit, codes.view(-1, 1), state)
    who = {"ours": lambda: without_gradient(nf4.dequantize, *parts, dtype),
           "torch": lambda: without_gradient(nf4.dequantize_ref, *parts, dtype),
           "torch.compile": lambda: without_gradient(torch.compile(nf4.dequantize_ref, dynamic=False), *parts, dtype),
           "bitsandbytes": bitsandbytes}
    return Row(f"NF4 to {dtype.itemsize * 8} bits, {O} x {C}", who,
               lambda: [nf4.dequantize_ref(*parts, torch.float64)],
               bytes=(sum(t.nbytes for t in parts) + O * C * dtype.itemsize, 0), together=True)


def packed(tokens, scale=1.0):
    """Draw document lengths whose sum is `tokens`. They come from bench.MIX with 576 tokens per image, and are
    multiplied by `scale`. The last one is cut to make the sum exact."""
    out, g = [], torch.Generator().manual_seed(0)
    while sum(out) < tokens:
        for text, _, images in bench.draw_lengths(64, g):
            out.append(int(scale * (text + 576 * images)))
    while sum(out[:-1]) >= tokens:
        out.pop()
    return [*out[:-1], tokens - sum(out[:-1])]


# the most important rows first, because a run may be interrupted
ROWS = {
    "A3": (attention_row, packed(8192), 32, 32, 128, True),
    "A1": (attention_row, [577] * 64, 16, 16, 64, False),
    "C1": (cross_entropy_row, 8192, 4096, 32000, 1.0, True),
    "C2": (cross_entropy_row, 8192, 4096, 32000, 0.1, False),
    "E1r": (norm_row, 8192, 4096, True),
    "E2": (swiglu_row, 8192, 11008),
    "E3": (rope_row, 8192, 32, 32, 128),
    "L1b": (lora_row, 8192, 4096, 11008, 1, 128),
    "A4": (attention_row, [2048] * 4, 32, 32, 128, True),
    "A7": (attention_row, packed(16384, 1.04), 32, 4, 64, True),
    "C4": (cross_entropy_row, 8192, 4096, 128256, 1.0, True),
    "E1": (norm_row, 8192, 4096, False),
    "L1c": (lora_row, 8192, 4096, 4096, 3, 128),
    "A5": (attention_row, [8192], 32, 32, 128, True),
    "A6": (attention_row, [16384], 32, 8, 128, True),
    "C6": (cross_entropy_row, 16384, 2048, 128256, 0.3, True),
    "A2": (attention_row, [729] * 48, 16, 16, 72, False),
    "A8": (attention_row, [4096] * 4, 15, 5, 64, True),
    "C7": (cross_entropy_row, 16384, 960, 49152, 0.15, True),
    "L1a": (lora_row, 8192, 4096, 11008, 1, 16),
    "A9": (attention_row, [16384], 32, 8, 64, True),
    "A10": (attention_row, [4096] * 4, 16, 16, 128, False),
    "Q1": (nf4_row, 4096, 11008),
    "C3": (cross_entropy_row, 8192, 4096, 32000, 0.3, False),
    "C5": (cross_entropy_row, 8192, 4096, 128256, 0.1, False),
    "C8": (cross_entropy_row, 65536, 960, 49152, 1.0, True),
}


def shrink(make, *sizes):
    """Return the same row at toy sizes, to check that its code runs. The times of this row mean nothing."""
    if make is attention_row:
        lengths, H, G, K, causal = sizes
        return make, [max(1, t // 24) for t in lengths[:3]], H // G, 1, K, causal
    return make, *(max(16, t // 64) if type(t) is int and t > 128 else t for t in sizes)
