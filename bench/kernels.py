"""Every kernel beside what else could be called, in one process, on the same numbers.

    A1 ... A10    attention: a ViT's pictures, packed documents, long ones, grouped queries
    C1 ... C8     linear cross-entropy, forward and backward together; some with few supervised rows or a frozen head
    E1, E1r       RMSNorm, alone and with a residual      E2  SwiGLU      E3  rotary positions
    L1a, L1b      a frozen linear layer with an adapter of rank 16 or 128

A contender is built, run once for its error against the definition in float64 and once for its memory, and then all of
them are timed by turns. One that cannot run is named with its reason. Rows run in a child process, in order of worth;
where it dies, another one goes on with the next row.
"""

import dataclasses
import faulthandler
import functools
import importlib
import inspect
import math
import re
import statistics
import time

import torch
import torch._functorch.config
import torch.nn as nn
import torch.nn.functional as F

import bench
import config

# ---- a row: what is computed, who can ------------------------------------------------------------------------------

@dataclasses.dataclass
class Contender:
    """How one of them computes a row, on tensors of its own: some write over what they are given."""
    forward: object                # () -> tuple of outputs
    leaves: list                   # tensors that get gradients
    ups: list                      # gradients of the outputs
    common: object = lambda ts: ts  # [outputs..., gradients...] -> the form in which errors are taken
    note: str = ""


@dataclasses.dataclass
class Row:
    what: str
    contenders: dict               # name -> () -> Contender; ours first, and "torch" is the definition as torch runs it
    truth: object                  # () -> the common form, in float64
    plain: object = None           # () -> the common form at low precision, where "torch" is no contender
    flops: tuple = (0, 0)          # forward, backward
    bytes: tuple = (0, 0)
    together: bool = False         # forward and backward are one measurement


def leaf(t):
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def gradients(f, args, ups):
    """-> [outputs..., gradients of args...]"""
    args = [leaf(t) for t in args]
    out = f(*args)
    out = out if isinstance(out, tuple) else (out,)
    return [*(o.detach() for o in out), *torch.autograd.grad(out, args, ups)]


def simple(f, args, ups):
    """A contender that takes the row's own tensors"""
    leaves = [leaf(t) for t in args]

    def forward():
        out = f(*leaves)
        return out if isinstance(out, tuple) else (out,)
    return Contender(forward, leaves, ups)


def wide(*tensors):
    return [t.double() for t in tensors]


# ---- attention -----------------------------------------------------------------------------------------------------

def attention_row(lengths, H, G, K, causal, device, dtype):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from kernels.attention import attention, attention_ref
    N, B, L, g = sum(lengths), len(lengths), max(lengths), H // G
    q, k, v, do = (torch.randn(N, heads, K, device=device).to(dtype) for heads in (H, G, G, H))
    n = torch.tensor(lengths, device=device)
    starts = n.cumsum(0) - n
    doc = torch.arange(B, device=device).repeat_interleave(n)                   # (N,) whose token
    at = torch.arange(N, device=device)
    lo = starts[doc].int()
    hi = (at + 1 if causal else (starts + n)[doc]).int()
    pairs = sum(t * (t + 1) // 2 if causal else t * t for t in lengths)
    even = min(lengths) == L
    shared = dict(enable_gqa=True) if g > 1 else {}

    def first(ts):
        """Errors are taken of the first group's heads: in float64 all of them would not fit beside each other"""
        return [t[:, :heads] for t, heads in zip(ts, (g, g, 1, 1))]

    def documents(f, *tensors):
        """The definition, document by document: out, dq, dk, dv of the first group"""
        spans = [(int(s), int(s) + t) for s, t in zip(starts, lengths)]
        parts = [gradients(lambda *x: attention_ref(*x, lo[a:b] - a, hi[a:b] - a), [t[a:b] for t in tensors[:3]],
                           [tensors[3][a:b]]) for a, b in spans]
        return [torch.cat(p) for p in zip(*parts)]

    def cut():
        return q[:, :g], k[:, :1], v[:, :1], do[:, :g]

    place = doc * L + at - starts[doc]                                          # (N,) in a padded batch

    def spread(t):
        """(N, heads, K) -> (B, heads, L, K), as a projection would leave it in memory"""
        padded = t.new_zeros(B * L, *t.shape[1:])
        padded[place] = t
        return padded.view(B, L, *t.shape[1:]).transpose(1, 2)

    def gather(t):
        return t.transpose(1, 2).reshape(B * L, -1, K)[place]

    def sdpa(backend):
        args = [leaf(spread(t)) for t in (q, k, v)]

        def forward():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*args, is_causal=causal, **shared),
        return Contender(forward, args, [spread(do)], lambda ts: first([gather(t) for t in ts]),
                         "" if even else f"padded, {B * L / N:.2f} times the tokens")

    def varlen():
        from torch.nn.attention.varlen import varlen_attn
        bounds = F.pad(n.cumsum(0), (1, 0)).int()
        takes = inspect.signature(varlen_attn).parameters                      # 2.10 had is_causal; that heads
        how = dict(window_size=(-1, 0 if causal else -1)) if "window_size" in takes else dict(is_causal=causal)
        how |= shared if "enable_gqa" in takes else {}                          # form groups is said from 2.12 on
        return dataclasses.replace(simple(lambda q, k, v: varlen_attn(q, k, v, bounds, bounds, L, L, **how), (q, k, v),
                                          [do]), common=first)

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
        args = [leaf(into(t)) for t in (q, k, v)]
        return Contender(lambda: (run(*args, block_mask=mask, **shared),), args, [into(do)],
                         lambda ts: first([back(t) for t in ts]), note)

    who = {"ours": lambda: dataclasses.replace(simple(lambda q, k, v: attention(q, k, v, lo, hi), (q, k, v), [do]),
                                               common=first),
           "sdpa cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
           "sdpa flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
           "sdpa efficient": lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION), "varlen_attn": varlen, "flex": flex}
    kind = "causal" if causal else "full"
    many = f"{B} x {L}" if even else f"{N} tokens in {B} documents"
    return Row(f"{many}, {H}{f'/{G}' if g > 1 else ''} x {K}, {kind}", who, lambda: documents("", *wide(*cut())),
               lambda: documents("", *cut()), flops=(4 * pairs * H * K, 10 * pairs * H * K))


# ---- linear cross-entropy ------------------------------------------------------------------------------------------

def cross_entropy_row(N, C, V, share, trained, device, dtype):
    from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
    h = torch.randn(N, C, device=device).to(dtype)
    w = (torch.randn(V, C, device=device) * C**-0.5).to(dtype)
    learnt = torch.rand(N, device=device) < share
    y = torch.randint(0, V, (N,), device=device).masked_fill(~learnt, -100)
    rows = learnt.nonzero()[:, 0]
    R, up = rows.numel(), [torch.ones((), device=device)]

    def contender(f, gathered):
        """f(hidden, weight, labels) -> summed loss, of supervised rows alone, or of all with -100"""
        head = leaf(w) if trained else w
        args = [leaf(h), *[head] * trained]

        def forward():
            some = gathered and share < 1
            return f(args[0][rows] if some else args[0], head, y[rows] if some else y),
        return Contender(forward, args, up)

    def eager(h, w, y):
        return F.cross_entropy((h @ w.T).float(), y, reduction="sum", ignore_index=-100)

    def liger(gathered):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return contender(lambda h, w, y: loss(w, h, y), gathered)

    def cce(**how):
        from cut_cross_entropy import linear_cross_entropy as f
        return contender(functools.partial(f, reduction="sum", **how), True)

    def chunked():
        options = nn.LinearCrossEntropyOptions()
        return contender(lambda h, w, y: F.linear_cross_entropy(h, w, y, reduction="sum", options=options), True)

    def truth():
        """A thousand rows at a time: the logits of all do not fit"""
        head, total = leaf(w.double()), torch.zeros((), dtype=torch.float64, device=device)
        dh = torch.zeros(N, C, dtype=torch.float64, device=device)
        for r in rows.split(1024):
            x = leaf(h[r].double())
            loss = linear_cross_entropy_ref(x, head, y[r])
            loss.backward()
            total, dh[r] = total + loss.detach(), x.grad
        return [total, dh, *[head.grad] * trained]

    who = {"ours": lambda: contender(linear_cross_entropy, True), "torch": lambda: contender(eager, False)}
    if share < 1:
        who["torch, gathered"] = lambda: contender(eager, True)
    who |= {"torch.compile": lambda: contender(torch.compile(eager, dynamic=False), True),
            "F.linear_cross_entropy": chunked, "liger": lambda: liger(False)}
    if share < 1:
        who["liger, gathered"] = lambda: liger(True)
    who |= {"cce exact": lambda: cce(filter_eps=None), "cce": cce}
    return Row(f"{N} x {C}, {V} words, {share:.0%} supervised{'' if trained else ', head frozen'}", who, truth,
               flops=(2 * R * C * V, (2 + 2 * trained) * R * C * V), together=True)


# ---- element by element --------------------------------------------------------------------------------------------

def elementwise(what, ours, definition, liger, args, ups, moved, true=None):
    """moved: bytes forward, backward. liger(args, ups) -> Contender"""
    compiled = torch.compile(definition, dynamic=False)
    who = {"ours": lambda: simple(ours, args, ups), "torch": lambda: simple(definition, args, ups),
           "torch.compile": lambda: simple(compiled, args, ups), "liger": lambda: liger(args, ups)}
    return Row(what, who, lambda: gradients(true or definition, wide(*args), wide(*ups)), bytes=moved)


def norm_row(N, C, residual, device, dtype):
    from kernels.norm import rms_norm, rms_norm_ref
    x, add, dy, ds = (torch.randn(N, C, device=device).to(dtype) for _ in range(4))
    w, eps, unit = torch.rand(C, device=device).to(dtype) + 0.5, 1e-6, N * C * dtype.itemsize

    def liger(args, ups):
        from liger_kernel.transformers import LigerFusedAddRMSNorm, LigerRMSNorm
        layer = (LigerFusedAddRMSNorm if residual else LigerRMSNorm)(C, eps, in_place=False).to(device, dtype)
        tensors = [*(leaf(t) for t in args[:-1]), layer.weight]
        layer.weight.data.copy_(w)

        def forward():
            out = layer(*tensors[:-1])
            return out[::-1] if residual else (out,)                            # theirs says y first, then the sum
        return Contender(forward, tensors, ups)
    if not residual:
        return elementwise(f"RMSNorm, {N} x {C}", lambda x, w: rms_norm(x, w, eps),
                           lambda x, w: rms_norm_ref(x, w, eps), liger, (x, w), [dy], (2 * unit, 3 * unit))

    def definition(x, add, w):
        return x + add, rms_norm_ref(x + add, w, eps)
    return elementwise(f"residual + RMSNorm, {N} x {C}", lambda x, add, w: rms_norm(x, w, eps, add), definition, liger,
                       (x, add, w), [ds, dy], (4 * unit, 4 * unit))


def swiglu_row(N, C, device, dtype):
    from kernels.swiglu import swiglu, swiglu_ref
    gate, up, dy = (torch.randn(N, C, device=device).to(dtype) for _ in range(3))

    def liger(args, ups):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
        return simple(LigerSiLUMulFunction.apply, args, ups)
    unit = N * C * dtype.itemsize
    return elementwise(f"SwiGLU, {N} x {C}", swiglu, swiglu_ref, liger, (gate, up), [dy], (3 * unit, 5 * unit))


def rope_row(N, H, G, K, device, dtype):
    from kernels.rope import rope, rope_qk
    q, dq = (torch.randn(N, H, K, device=device).to(dtype) for _ in range(2))
    k, dk = (torch.randn(N, G, K, device=device).to(dtype) for _ in range(2))
    angles = torch.arange(N, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, K // 2, device=device)
    cos, sin = angles.cos(), angles.sin()

    def liger(args, ups):
        from liger_kernel.ops.rope import LigerRopeFunction
        both = [torch.cat([t, t], -1).to(dtype)[None] for t in (cos, sin)]      # (1, N, K)
        args, ups = ([t.transpose(0, 1)[None] for t in ts] for ts in (args, ups))
        leaves = [leaf(t) for t in args]
        # it rotates in place, which a leaf does not allow: a view of it does
        return Contender(lambda: LigerRopeFunction.apply(*(t.view_as(t) for t in leaves), *both), leaves, ups,
                         lambda ts: [t[0].transpose(0, 1) for t in ts])
    unit = N * (H + G) * K * dtype.itemsize
    return elementwise(f"rotary positions, {N} x {H} + {G} heads x {K}", lambda q, k: rope_qk(q, k, cos, sin),
                       lambda q, k: (rope(q, cos, sin), rope(k, cos, sin)), liger, (q, k), [dq, dk],
                       (2 * unit, 2 * unit))


# ---- an adapter ----------------------------------------------------------------------------------------------------

def lora_row(N, C, out, r, device, dtype):
    """Adapters are trained, and kept in fp32; the product runs under autocast, as in training."""
    import lora
    x, dy = torch.randn(N, C, device=device).to(dtype), torch.randn(N, out, device=device).to(dtype)
    w = (torch.randn(out, C, device=device) * C**-0.5).to(dtype)
    A, B = torch.randn(r, C, device=device) * C**-0.5, torch.randn(out, r, device=device) * r**-0.5

    def holder():
        model = nn.Module()
        model.linear = nn.Linear(C, out, bias=False, device=device, dtype=dtype)
        model.linear.weight = nn.Parameter(w, requires_grad=False)
        return model

    def contender(model, a, b):
        for given, value in ((a, A), (b, B)):
            given.data = value.clone()
        leaves = [leaf(x), a, b]

        def forward():
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                return model(leaves[0]),
        return Contender(forward, leaves, [dy])

    def ours():
        model = holder()
        lora.apply(model, r, 2 * r, 0.0, "linear*")
        has = dict(model.to(device).named_parameters())
        return contender(model.linear, has["linear.lora_A.weight"], has["linear.lora_B.weight"])

    def peft():
        from peft import LoraConfig, inject_adapter_in_model
        how = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["linear"], lora_dropout=0.0)
        layer = inject_adapter_in_model(how, holder()).linear.to(device)
        return contender(layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    def definition(x, A, B, low=dtype):
        return F.linear(x, w.to(low)) + 2.0 * F.linear(F.linear(x, A.to(low)), B.to(low))

    who = {"ours": ours, "torch": lambda: simple(definition, (x, A, B), [dy]),
           "torch.compile": lambda: simple(torch.compile(definition, dynamic=False), (x, A, B), [dy]), "peft": peft}
    return Row(f"adapter of rank {r}, {N} x {C} to {out}", who,
               lambda: gradients(functools.partial(definition, low=torch.float64), wide(x, A, B), wide(dy)),
               flops=(2 * N * C * out + 2 * N * r * (C + out), 2 * N * C * out + 4 * N * r * (C + out)), together=True)


# ---- the rows ------------------------------------------------------------------------------------------------------

def packed(tokens, scale=1.0):
    """Lengths of documents of the mixture, pictures as 576 tokens, that fill a stream"""
    out, g = [], torch.Generator().manual_seed(0)
    while sum(out) < tokens:
        for words, _, pictures in bench.drawn(64, g):
            out.append(int(scale * (words + 576 * pictures)))
    while sum(out[:-1]) >= tokens:
        out.pop()
    return [*out[:-1], tokens - sum(out[:-1])]


# in order of worth: a run that is cut short has the rows that matter most
ROWS = {
    "A3": (attention_row, packed(8192), 32, 32, 128, True), "A4": (attention_row, [2048] * 4, 32, 32, 128, True),
    "A1": (attention_row, [577] * 64, 16, 16, 64, False), "C1": (cross_entropy_row, 8192, 4096, 32000, 1.0, True),
    "C2": (cross_entropy_row, 8192, 4096, 32000, 0.1, False), "E1": (norm_row, 8192, 4096, False),
    "E1r": (norm_row, 8192, 4096, True), "E2": (swiglu_row, 8192, 11008), "E3": (rope_row, 8192, 32, 32, 128),
    "L1b": (lora_row, 8192, 4096, 11008, 128), "A7": (attention_row, packed(16384, 1.04), 32, 4, 64, True),
    "C4": (cross_entropy_row, 8192, 4096, 128256, 1.0, True), "A5": (attention_row, [8192], 32, 32, 128, True),
    "A6": (attention_row, [16384], 32, 8, 128, True), "C6": (cross_entropy_row, 16384, 2048, 128256, 0.3, True),
    "A2": (attention_row, [729] * 48, 16, 16, 72, False), "A8": (attention_row, [4096] * 4, 15, 5, 64, True),
    "C7": (cross_entropy_row, 16384, 960, 49152, 0.15, True), "L1a": (lora_row, 8192, 4096, 11008, 16),
    "A9": (attention_row, [16384], 32, 8, 64, True), "A10": (attention_row, [4096] * 4, 16, 16, 128, False),
    "C3": (cross_entropy_row, 8192, 4096, 32000, 0.3, False), "C5": (cross_entropy_row, 8192, 4096, 128256, 0.1, False),
    "C8": (cross_entropy_row, 65536, 960, 49152, 1.0, True),
}


def shrunk(make, *sizes):
    """The same row at toy sizes: nothing can be concluded from its times, but everything in it runs."""
    if make is attention_row:
        lengths, H, G, K, causal = sizes
        return make, [max(1, t // 24) for t in lengths[:3]], H // G, 1, K, causal
    return make, *(max(16, t // 64) if type(t) is int and t > 128 else t for t in sizes)


# ---- measuring -----------------------------------------------------------------------------------------------------

def run(c):
    out = c.forward()
    return [*(o.detach() for o in out), *torch.autograd.grad(out, c.leaves, c.ups)]


def apart(ts, true):
    """Relative errors: |t - true| / |true|"""
    return [((t.double() - s).norm() / s.norm().clamp(min=1e-300)).item() for t, s in zip(ts, true, strict=True)]


def poison(device):
    """What is freed here is what the next results are written into: memory that a kernel forgets shows."""
    torch.full((1 << (30 if device == "cuda" else 16),), math.nan, device=device)


def settle(device):
    """After an exception: does the device still work? Where it does not, this process is of no more use."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as e:
            raise SystemExit(f"the device is lost: {bench.reason(e)}") from None


def measure(name, row, device, ms, rounds):
    """-> one row of the result: what every contender needed, erred and took, and who could not run"""
    made, failed, errors, memory = {}, {}, {}, {}
    try:
        true = row.truth()
        plain = apart(row.plain(), true) if row.plain else None
    except Exception as e:                                                      # a smaller card: times without errors
        failed["truth"], true, plain = bench.reason(e), None, None
        settle(device)
    for who, build in row.contenders.items():
        try:
            c = build()
            poison(device)
            got = run(c)
            errors[who] = apart(c.common(got), true) if true else None
            del got
            if device == "cuda":
                run(c)
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                got = run(c)
                torch.cuda.synchronize()
                results = sum(t.numel() * t.element_size() for t in got)
                memory[who] = [(torch.cuda.max_memory_allocated() - before) / 2**20, results / 2**20]
                del got
            made[who] = c
        except Exception as e:
            failed[who] = bench.reason(e)
            settle(device)
    del true
    times = {who: [] for who in made}
    for turn in range(rounds):
        for who in [*made][::(1, -1)[turn % 2]]:
            c = made[who]
            try:
                if row.together:
                    times[who].append([bench.timed(lambda: run(c), device, ms)])
                else:
                    out = c.forward()
                    times[who].append([bench.timed(c.forward, device, ms), bench.timed(
                        lambda: torch.autograd.grad(out, c.leaves, c.ups, retain_graph=True), device, ms)])
                    del out
            except Exception as e:
                failed[who] = bench.reason(e)
                del made[who]
                settle(device)
    plain = plain or errors.get("torch")
    found = {}
    for who, c in made.items():
        parts = list(zip(*times[who]))
        found[who] = {"ms": [statistics.median(p) for p in parts], "note": c.note, "error": errors[who],
                      "spread": [(max(p) - min(p)) / statistics.median(p) for p in parts], "mib": memory.get(who)}
    return {"row": name, "what": row.what, "together": row.together, "flops": row.flops, "bytes": row.bytes,
            "plain": plain, "found": found, "failed": failed}


def judge(r):
    """Adds to a row: is every error at most 1.5 times plain torch's; ours beside the best peer that is as right as we
    ask of ourselves, times four: [ratio, name, equal within the spread] for forward and backward."""
    def exact(who, factor):
        e = r["found"][who]["error"]
        return not e or not r["plain"] or all(a <= factor * b + 1e-7 for a, b in zip(e, r["plain"]))
    ours = r["found"].get("ours")
    r["right"] = bool(ours and ours["error"] and r["plain"]) and exact("ours", 1.5)
    r["beside"] = []
    peers = [w for w in r["found"] if w != "ours" and exact(w, 4)]
    for part in range(len(ours["ms"]) if ours and peers else 0):
        best = min(peers, key=lambda w: r["found"][w]["ms"][part])
        them = r["found"][best]
        ratio = them["ms"][part] / ours["ms"][part]
        r["beside"].append([ratio, best, abs(ratio - 1) <= max(them["spread"][part], ours["spread"][part])])
    return r


# ---- the page ------------------------------------------------------------------------------------------------------

PAGE = """# Kernels, {date}

`python bench.py kernels{args}` on {machine}; {after}.

Measured ceilings: {tflops:.0f} TFLOP/s in a product of two {low} matrices, {gbs:.0f} GB/s in a copy; shares are of
these. Medians of {rounds} rounds by turns; ratio = the best peer's time over ours, = where the difference lies within
the spread of the rounds. Error: the largest of |x - true| / |true| over outputs and gradients, true in float64; plain
is the same of the definition in torch. bench/README.md says more.

"""


def speed(r, ms):
    """-> TFLOP/s or GB/s, and which ceiling that is a share of"""
    for key, unit, ceiling in (("flops", 1e9, "matmul"), ("bytes", 1e6, "copy")):
        work = [sum(r[key])] if r["together"] else r[key]
        if any(work):
            return [w / t / unit for w, t in zip(work, ms)], ceiling, unit * 1e3


def page(rows, ceilings, head):
    text = PAGE.format(tflops=ceilings["matmul"] / 1e12, gbs=ceilings["copy"] / 1e9, **head)
    text += bench.line("row", "what", "ours, ms", "of the ceiling", "ratio", "best peer", "error", "plain", "MiB",
                       "of which results") + "\n" + "|---" * 10 + "|\n"
    for r in rows:
        ours = r["found"].get("ours")
        if not ours:
            text += bench.line(r["row"], r["what"], f"**{r['failed'].get('ours', 'failed')}**", *[None] * 7) + "\n"
            continue
        per_s, ceiling, unit = speed(r, ours["ms"])
        text += bench.line(
            r["row"], r["what"], " + ".join(f"{t:.3f}" for t in ours["ms"]),
            ", ".join(f"{v * unit / ceilings[ceiling]:.0%}" for v in per_s),
            ", ".join(f"{'= ' * equal}{ratio:.2f}" for ratio, _, equal in r["beside"]) or None,
            ", ".join(dict.fromkeys(name for _, name, _ in r["beside"])) or "none ran",
            f"{max(ours['error']):.1e}{'' if r['right'] else ' **too much**'}" if ours["error"] else "not taken",
            f"{max(r['plain']):.1e}" if r["plain"] else None, 
            *([f"{m:.0f}" for m in ours["mib"]] if ours["mib"] else [None, None])) + "\n"
    for letter, kind in (("A", "attention"), ("C", "cross-entropy"), ("E", "element-wise")):
        ratios = [b[0] for r in rows if r["row"].startswith(letter) for b in r["beside"]]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            text += f"\nGeometric mean of {kind}: {mean:.2f} of the best peer, {len(ratios)} ratios.\n"
    text += "\n" + bench.line("row", "who", "ms", "TFLOP/s or GB/s", "spread", "error", "MiB", "note") + "\n"
    text += "|---" * 8 + "|\n"
    for r in rows:
        for who, c in r["found"].items():
            text += bench.line(r["row"], who, " + ".join(f"{t:.3f}" for t in c["ms"]),
                               ", ".join(f"{v:.0f}" for v in speed(r, c["ms"])[0]), f"{max(c['spread']):.0%}",
                               f"{max(c['error']):.1e}" if c["error"] else None,
                               f"{c['mib'][0]:.0f}" if c["mib"] else None, c["note"]) + "\n"
        for who, why in r["failed"].items():
            text += bench.line(r["row"], who, "did not run", *[None] * 4, why.replace("|", "/")) + "\n"
    missing = {why for r in rows for why in r["failed"].values() if re.search("No module named|has no attribute", why)}
    return text + "".join(f"\nMissing here: {why}\n" for why in sorted(missing))


# ---- the command ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Settings:
    rows: str = "all"              # or some: A3,C1
    size: str = "full"             # full, tiny: toy sizes, to see that everything runs
    device: str = "auto"           # auto, cuda, cpu
    rounds: int = 3                # by turns
    ms: float = 100.0              # of repetitions in each measurement
    seconds: float = 3600.0        # no row begins later
    row_seconds: float = 120.0     # a row that takes longer is ended, and named
    out: str = ""                  # file for the page
    date: str = ""                 # of the page; empty = today
    child: bool = False            # measure here, one line of JSON for each row (what the command starts)


def here(s, names):
    """In the child: ceilings, then row by row."""
    low, kernels = bench.LOW[s.device], importlib.import_module("kernels")
    torch._functorch.config.donated_buffer = False     # or what torch.compile made refuses a second backward pass
    if s.device == "cpu":
        torch.set_num_threads(1)
    bench.write_line({"ceilings": bench.ceilings(s.device), "kernels": kernels.here and s.device == "cuda"})
    for name in names:
        faulthandler.dump_traceback_later(s.row_seconds, exit=True)     # from a thread: a hung GPU cannot stop it
        torch.manual_seed(0)
        bench.write_line({"began": name})
        try:
            make, *sizes = ROWS[name] if s.size == "full" else shrunk(*ROWS[name])
            bench.write_line(measure(name, make(*sizes, s.device, low), s.device, s.ms, s.rounds))
        except Exception as e:
            bench.write_line({"row": name, "broke": bench.reason(e)})
            settle(s.device)
        torch._dynamo.reset()
        faulthandler.cancel_dump_traceback_later()
        if s.device == "cuda":
            torch.cuda.empty_cache()


def broken(name, why):
    return {"row": name, "what": "", "together": False, "flops": (0, 0), "bytes": (0, 0), "plain": None, "found": {},
            "failed": {"ours": why}}


def main(s, args):
    if s.device == "auto":
        s.device = "cuda" if torch.cuda.is_available() else "cpu"
    names = list(ROWS) if s.rows == "all" else s.rows.split(",")
    if unknown := [n for n in names if n not in ROWS]:
        config.stop(f"rows={unknown[0]}: all, or some of {','.join(ROWS)}")
    if s.size not in ("full", "tiny") or s.device not in ("cuda", "cpu") or s.rounds < 1:
        config.stop(f"size={s.size}, device={s.device}, rounds={s.rounds}: full or tiny, cuda or cpu, at least 1")
    if s.device == "cuda" and not torch.cuda.is_available():
        config.stop("device=cuda, but this machine has no GPU that torch can use")
    if s.device == "cpu" and s.size == "full":
        config.stop("rows of full size are for a GPU; --size=tiny shows on a CPU that they run")
    if s.child:
        return here(s, names)
    end, rows, ceilings, left = time.time() + s.seconds, [], None, list(names)
    machine = bench.machine(s.device)
    print(machine, flush=True)
    while left and time.time() < end:
        began = None
        for said in bench.child("kernels", [f"--rows={','.join(left)}", f"--size={s.size}", f"--device={s.device}",
                                            f"--rounds={s.rounds}", f"--ms={s.ms}", f"--row_seconds={s.row_seconds}",
                                            "--child"], end - time.time()):
            if "ceilings" in said:
                ceilings = ceilings or said["ceilings"]
                print(f"{ceilings['matmul'] / 1e12:.1f} TFLOP/s, {ceilings['copy'] / 1e9:.0f} GB/s; ours are "
                      f"{'Triton kernels' if said['kernels'] else 'the definitions in torch'}", flush=True)
            elif "began" in said:
                began = said["began"]
            elif "row" in said:
                row = judge(broken(said["row"], said["broke"]) if "broke" in said else said)
                rows.append(row)
                left.remove(row["row"])
                mine, best = row["found"].get("ours"), row["beside"]
                took = " + ".join(f"{t:.3f}" for t in mine["ms"]) + " ms; " if mine else "ours failed; "
                print(f"{row['row']}: {took}" + "; ".join(f"{ratio:.2f} of {name}" for ratio, name, _ in best)
                      + "".join(f"\n    {who} did not run: {why}" for who, why in row["failed"].items()), flush=True)
            elif time.time() < end and left and said["ended"]:
                lost = began if began in left else left[0]
                why = f"the process ended with {said['ended']}: {said['because']}"
                rows.append(judge(broken(lost, why)))
                left.remove(lost)
                print(f"{lost}: {why}", flush=True)
    order = list(ROWS)
    rows.sort(key=lambda r: order.index(r["row"]))
    text = ""
    if ceilings:
        after = f"afterwards {bench.machine(s.device).split(';')[0]}"          # the clocks of a GPU, the load of a CPU
        head = dict(date=s.date, args="".join(f" {a}" for a in args), machine=machine, rounds=s.rounds, after=after,
                    low=str(bench.LOW[s.device]).removeprefix("torch."))
        text = page(rows, ceilings, head)
        if left:
            text += f"\nNot measured within {s.seconds:.0f} s: {', '.join(left)}.\n"
    bench.write_page(text, s.out)
    bench.write_line({"machine": machine, "ceilings": ceilings, "rows": rows, "not_measured": left})
