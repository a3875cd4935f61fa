"""Span attention: query i attends to the keys j with lo[i] <= j < hi[i], its span. Spans are the only masks.

    N queries   M keys   H query heads   G key/value heads (H = g * G)   K head dim, padded to D in a kernel
    q (N, H, K)   k, v (M, G, K)   lo, hi (N,) int32 in [0, M], both non-decreasing   ->   out (N, H, K)

    out[i, h] = sum_j softmax_j(q[i, h] . k[j, h // g] / sqrt(K)) v[j, h // g]   over lo[i] <= j < hi[i]
    If the span of query i is empty, out[i, h] is zero.

The cost in bytes. A packed sequence of N tokens holds documents of length L << N. In an N x N mask only a share
L / N of the entries would be true. Spans hold the same information in 2 N integers. lo and hi never decrease, so the
queries split into segments whose key ranges do not overlap. The work is the sum of L^2 over documents, not N^2.

On a GPU the kernels never write the attention scores to memory. A program holds a tile of queries in registers and
loops over blocks of keys (Dao et al. 2022). So keys are read once per tile, not once per query. For backward, autograd
saves q, k, v, out and one value per query and head: the logarithm of the softmax sum (LSE).
"""

import functools

import torch

from kernels import architecture, on_its_device, tl, triton, use_triton

# ---- the definition, and what a CPU runs ----------------------------------------------------------------------------

WHOLE_SEGMENT = 512  # a segment (adjacent queries that share keys) with at most this many keys is computed at once
CHUNK_QUERIES = 64   # a longer segment is cut into chunks of this many queries; larger ones mask more scores


def attention_ref(q, k, v, lo, hi):
    """Compute span attention by its definition, with the full (N, M) mask. The top of this file shows the shapes."""
    N, H, K = q.shape
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))  # (M, H, K): query head h uses k/v head h // g
    j = torch.arange(k.shape[0], device=q.device)
    mask = (lo[:, None] <= j) & (j < hi[:, None])                         # (N, M)
    s = torch.einsum("nhk,mhk->hnm", q, k) * K**-0.5
    p = s.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)  # an empty span gives nan; 0 replaces it
    return torch.einsum("hnm,mhk->nhk", p, v)


def segments(lo, hi):
    """Split the queries into segments that share no key -> list of (n, a, b, c, d, kind).

    Queries [a, b) read keys in [c, d), and no other query reads these keys. `kind` says which keys a query reads:
        "full"      each query reads all of [c, d)
        "causal"    query a + t reads [c, c + t]
        "mask"      any other pattern of lo and hi
        "empty"     no query reads a key
    If n > 1, the entry stands for n adjacent segments of equal shape, for example the images of a ViT. Then a, b, c, d
    describe the first one."""
    N = lo.shape[0]
    if N == 0:
        return []
    lo, hi = lo.cpu().long(), hi.cpu().long()
    assert (lo[1:] >= lo[:-1]).all() and (hi[1:] >= hi[:-1]).all(), "spans may not move backwards"
    at, empty = torch.arange(N), hi <= lo
    start = torch.ones(N, dtype=torch.bool)
    start[1:] = lo[1:] >= hi[:-1]                     # a segment starts at a query that shares no key with earlier ones
    start[1:] &= ~(empty[1:] & empty[:-1])            # adjacent empty spans form one segment
    start[1:] |= empty[1:] != empty[:-1]
    a = start.nonzero()[:, 0]
    b = torch.cat([a[1:], torch.tensor([N])])
    segment = start.cumsum(0) - 1                     # (N,) index of the segment of each query
    c, d = lo[a], hi[b - 1]
    R = a.numel()
    same_lo = lo == c[segment]
    not_full, not_causal = (torch.zeros(R, dtype=torch.long).index_add_(0, segment, (~(same_lo & ok)).long())
                            for ok in (hi == d[segment], hi - c[segment] == at - a[segment] + 1))
    out = []
    rows = zip(*(t.tolist() for t in (a, b, c, d, empty[a], not_full == 0, not_causal == 0)))
    for a, b, c, d, no_key, full, causal in rows:
        kind = "empty" if no_key else "full" if full else "causal" if causal else "mask"
        if out and kind in ("full", "causal"):
            n, a0, b0, c0, d0, kind0 = out[-1]
            follows = (a, c) == (a0 + n * (b - a), c0 + n * (d - c))
            if follows and (b - a, d - c, kind) == (b0 - a0, d0 - c0, kind0):
                out[-1] = (n + 1, a0, b0, c0, d0, kind)
                continue
        out.append((1, a, b, c, d, kind))
    return out


@functools.lru_cache(8)
def _chunks(lo, hi):
    lo, hi = (torch.frombuffer(bytearray(t), dtype=torch.int32) for t in (lo, hi))
    out = []
    for n, a, b, c, d, kind in segments(lo, hi):
        if d - c <= WHOLE_SEGMENT:
            out += [(n, a, b, c, d, kind)] if kind != "empty" else []
            continue
        for i in range(a, a + n * (b - a), b - a):
            end = i + b - a
            cuts = [(r, min(r + CHUNK_QUERIES, end)) for r in range(i, end, CHUNK_QUERIES)]
            out += [(1, r, stop, int(lo[r]), int(hi[stop - 1]), kind) for r, stop in cuts]
    return out


def chunks(lo, hi):
    """Return a list of entries like those of segments(), but cut long segments into chunks of CHUNK_QUERIES queries. A
    "causal" chunk of L queries needs a mask only on its last L keys, a triangle. The result is cached, because all
    layers of a model use the same spans."""
    return _chunks(*(t.to("cpu", torch.int32).numpy().tobytes() for t in (lo, hi))) if lo.shape[0] else []


def by_head(t, n, a, L, G):
    """Return a view (n, G, g, L, K) of n * L rows of t (N, H, K): n segments of L rows, the first one from row a on."""
    return t[a : a + n * L].unflatten(0, (n, L)).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)


def probabilities(q, k, v, lo, hi):
    """Compute the softmax of each entry of chunks(), which has Lq queries and Lk keys. Yield for each entry:

    (n, a, Lq, c, Lk)               n, a and c are as in segments()
    q / sqrt(K)                     (n * G, g * Lq, K), where g = H / G
    k and v                         (n * G, Lk, K) each
    the softmax of the scores       (n * G, g * Lq, Lk)"""
    G, K, todo = k.shape[1], k.shape[2], chunks(lo, hi)
    q = q * K**-0.5
    widest = max((b - a for n, a, b, c, d, kind in todo if kind == "causal"), default=0)
    ahead = torch.full((widest, widest), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    for n, a, b, c, d, kind in todo:
        Lq, Lk = b - a, d - c
        x = by_head(q, n, a, Lq, G).reshape(n * G, -1, K)
        y, z = (by_head(t, n, c, Lk, G).reshape(n * G, Lk, K) for t in (k, v))
        s = torch.bmm(x, y.mT)
        rows = s.view(n * G, -1, Lq, Lk)
        if kind == "causal":
            rows[..., Lk - Lq :].add_(ahead[:Lq, :Lq])
        elif kind == "mask":
            j = torch.arange(c, d, device=q.device)
            rows.masked_fill_((j < lo[a:b, None]) | (hi[a:b, None] <= j), -torch.inf)
        yield (n, a, Lq, c, Lk), x, y, z, s.softmax(-1)


@torch.library.custom_op("pumice::attention_torch", mutates_args=())
def attention_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor
                    ) -> torch.Tensor:
    """Compute attention_ref chunk by chunk, so that no (N, M) tensor exists. Backward recomputes the scores instead of
    saving them."""
    out, G = q.new_zeros(q.shape), k.shape[1]
    for (n, a, Lq, _, _), _, _, z, p in probabilities(q, k, v, lo, hi):
        o = by_head(out, n, a, Lq, G)
        o.copy_(torch.bmm(p, z).view(o.shape))
    return out


@torch.library.custom_op("pumice::attention_torch_backward", mutates_args=())
def attention_torch_backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor,
                             hi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dv, the gradients of q, k and v. `do` is the gradient of the output. The formulas are in a comment
    above the backward kernels, later in this file."""
    G, K = k.shape[1:]
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    for (n, a, Lq, c, Lk), x, y, z, p in probabilities(q, k, v, lo, hi):
        w = by_head(do, n, a, Lq, G).reshape(x.shape)
        ds = torch.ops.aten._softmax_backward_data(torch.bmm(w, z.mT), p, -1, p.dtype)  # p * (dp - sum(p * dp))
        o = by_head(dq, n, a, Lq, G)
        o.copy_(torch.bmm(ds, y).view(o.shape))
        for grad, left, right in ((dk, ds, x), (dv, p, w)):
            if n == 1:  # chunks of one segment read the same keys: add their gradients
                grad[c : c + Lk].transpose(0, 1).baddbmm_(left.mT, right)
            else:
                by_head(grad, n, c, Lk, G).copy_(torch.bmm(left.mT, right).view(n, G, 1, Lk, K))
    return dq.mul_(K**-0.5), dk, dv


attention_torch.register_fake(lambda q, k, v, lo, hi: q.new_empty(q.shape))
attention_torch_backward.register_fake(lambda do, q, k, v, lo, hi: tuple(t.new_empty(t.shape) for t in (q, k, v)))


@torch.autograd.function.once_differentiable
def _torch_gradients(ctx, do):
    return *attention_torch_backward(do, *ctx.saved_tensors), None, None


attention_torch.register_autograd(_torch_gradients,
                                  setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


# ---- forward --------------------------------------------------------------------------------------------------------
#
# A tile has a first and a last query. lo and hi never decrease, so no query of the tile reads a key outside
# [lo[first], hi[last]). Every query of the tile reads all keys in [lo[last], hi[first]): blocks of keys in this range
# need no mask. In a long document almost all blocks are of this kind.
#
# Three features of Triton appear only in this file:
# - The grid has two dimensions: tiles x heads.
# - tl.dot multiplies tiles on tensor cores, which would round fp32 inputs to TF32 (10-bit mantissa). With "ieee", fp32
#   inputs do not use tensor cores.
# - do_not_specialize: one compiled kernel serves all values of these arguments. For any other integer argument, Triton
#   compiles separate kernels for the value 1, for multiples of 16 and for the rest.


@triton.jit
def _cut(begin, end, lo, hi, B: tl.constexpr):
    """Split [begin, end) into blocks of B -> a, b, reach, where reach = end - (b - a). The blocks in [a, b) lie inside
    [lo, hi) and need no mask. All other blocks need a mask. range(begin, reach, B) has one step per masked block."""
    a = begin + (lo - begin + B - 1) // B * B
    b = a + tl.maximum(hi - a, 0) // B * B
    return a, b, end - (b - a)


@triton.jit
def _bounds(LO, HI, start, N, M, BM: tl.constexpr, BN: tl.constexpr):
    """Find the keys that a tile reads: the tile of BM queries from `start` on. Keys outside [0, M) are never read, even
    if a span contains them. Returns:

    lo, hi (BM,)    the spans of the queries
    begin, end      the range of keys that the tile reads
    a, b, reach     the results of _cut for blocks of BN keys"""
    at = start + tl.arange(0, BM)
    lo = tl.load(LO + at, mask=at < N, other=0)  # queries from N on do not exist; they get empty spans
    hi = tl.minimum(tl.load(HI + at, mask=at < N, other=0), M)
    last = tl.minimum(start + BM, N) - 1
    begin, end = tl.maximum(tl.load(LO + start), 0), tl.minimum(tl.load(HI + last), M)
    a, b, reach = _cut(begin, end, tl.maximum(tl.load(LO + last), begin), tl.minimum(tl.load(HI + start), end), BN)
    return lo, hi, begin, end, a, b, reach


@triton.jit
def _inside(lo, hi, j, B: tl.constexpr):
    """Return a mask (rows, B): does row r read the keys j ... j + B - 1, which means lo[r] <= key < hi[r]? The bounds
    are made relative to j, so that a thread compares them to constants. This saves 4 of 10 instructions of a mask."""
    c = tl.arange(0, B)
    return ((lo - j)[:, None] <= c[None, :]) & (c[None, :] < (hi - j)[:, None])


@triton.jit
def _tile(X, start, rows, count, stride, K: tl.constexpr, D: tl.constexpr):
    """Load B rows of X from row `start` on -> (B, D). `rows` (B,) holds 0 ... B - 1. `stride` is the row stride of X.
    In the result, rows from `count` on and columns from K on are zero.

    start * stride is int64, because the product can exceed 2**31. If count = B and K = D, the compiler removes the
    mask, which saves 20 registers."""
    d = tl.arange(0, D)
    X += tl.cast(start, tl.int64) * stride
    return tl.load(X + rows[:, None] * stride + d[None, :],
                   mask=(rows[:, None] < count) & (d[None, :] < K), other=0.0)


@triton.jit
def _attend(q, KEYS, VALUES, j, count, lo, hi, m, l, acc, stride_k, stride_v, scale,
            K: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr):
    """Add the BN keys from key j on to the online softmax of the queries q (BM, D). Return the updated state: maximum m
    (BM,), sum l (BM,), output acc (BM, D). If MASK is False, every query reads all of these keys."""
    c = tl.arange(0, BN)
    k = _tile(KEYS, j, c, count, stride_k, K, D)                               # (BN, D)
    v = _tile(VALUES, j, c, count, stride_v, K, D)
    s = tl.dot(q, k.T, input_precision="ieee")                                 # (BM, BN)
    if MASK:
        s = tl.where(_inside(lo, hi, j, BN), s, -float("inf"))
    higher = tl.maximum(m, tl.max(s, 1) * scale)        # scale contains log2(e), because exp2 replaces exp
    # `higher` is -inf for a query that has read no key so far; then s - higher = -inf - (-inf) would be nan
    base = tl.where(higher == -float("inf"), 0.0, higher) if MASK else higher
    p = tl.exp2(s * scale - base[:, None])              # one instruction multiplies and subtracts
    shrink = tl.exp2(m - base)
    l = l * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, l, acc


@triton.jit(do_not_specialize=["N", "M", "g"])
def _forward(Q, KEYS, VALUES, LO, HI, OUT, LSE, N, M, stride_q, stride_k, stride_v, scale, g,
             K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Compute OUT and LSE for one tile of BM queries of one head. OUT (N, H, K) and LSE (H, N) are contiguous. LSE is
    the base-2 logarithm of the softmax sum."""
    start, h, H = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64), tl.num_programs(1)
    r, d = tl.arange(0, BM), tl.arange(0, D)
    lo, hi, begin, end, a, b, reach = _bounds(LO, HI, start, N, M, BM, BN)

    q = _tile(Q + h * K, start, r, N - start, stride_q, K, D)
    KEYS += h // g * K
    VALUES += h // g * K
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for j in range(a, b, BN):
        m, l, acc = _attend(q, KEYS, VALUES, j, BN, lo, hi, m, l, acc, stride_k, stride_v, scale, K, D, BN, False)
    for i in range(begin, reach, BN):
        j = tl.where(i < a, i, i + (b - a))
        m, l, acc = _attend(q, KEYS, VALUES, j, end - j, lo, hi, m, l, acc, stride_k, stride_v, scale,
                            K, D, BN, True)

    n = start.to(tl.int64) + r
    inside = n < N
    out = acc / tl.where(l == 0, 1.0, l)[:, None]                            # an empty span gives zeros
    # for an empty span, lse is inf: then backward computes p = exp2(s - lse) = 0
    lse = tl.where(l == 0, float("inf"), m + tl.log2(l))
    tl.store(LSE + h * N + n, lse, mask=inside)
    tl.store(OUT + (n[:, None] * H + h) * K + d[None, :], out.to(OUT.dtype.element_ty),
             mask=inside[:, None] & (d[None, :] < K))


# ---- backward -------------------------------------------------------------------------------------------------------
#
# With s = q k^T / sqrt(K), p = softmax(s), out = p v and the incoming gradient do:
#
#     dv = p^T do      dp = do v^T      ds = p (dp - delta)   where delta_i = sum_j p_ij dp_ij = do_i . out_i
#     dq = ds k / sqrt(K)      dk = ds^T q / sqrt(K)
#
# One kernel computes dq, and another computes dk and dv. Together they need seven matrix products, and they add in a
# fixed order. A single kernel would need five products, but also atomic additions. Their order varies, so its gradients
# would not be deterministic.


@triton.jit
def _dq_block(dq, q, do, lse, delta, KEYS, VALUES, j, count, lo, hi, stride_k, stride_v, scale,
              K: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr):
    c = tl.arange(0, BN)
    k = _tile(KEYS, j, c, count, stride_k, K, D)                               # (BN, D)
    v = _tile(VALUES, j, c, count, stride_v, K, D)
    p = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale - lse[:, None])  # (BM, BN)
    if MASK:
        p = tl.where(_inside(lo, hi, j, BN), p, 0.0)
    ds = p * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["N", "M", "g"])
def _backward_q(Q, KEYS, VALUES, LO, HI, OUT, LSE, DO, DELTA, DQ, N, M, stride_q, stride_k, stride_v, stride_d,
                scale, norm, g, K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Compute DQ and DELTA for one tile of BM queries of one head. delta = sum(do * out) over the head dim.
    _backward_kv reads DELTA (H, N)."""
    start, h, H = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64), tl.num_programs(1)
    r, d = tl.arange(0, BM), tl.arange(0, D)
    n = start.to(tl.int64) + r
    inside = n < N
    lo, hi, begin, end, a, b, reach = _bounds(LO, HI, start, N, M, BM, BN)

    do = _tile(DO + h * K, start, r, N - start, stride_d, K, D)
    out = _tile(OUT + h * K, start, r, N - start, H * K, K, D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)                # (BM,)
    tl.store(DELTA + h * N + n, delta, mask=inside)
    lse = tl.load(LSE + h * N + n, mask=inside, other=float("inf"))
    q = _tile(Q + h * K, start, r, N - start, stride_q, K, D)
    KEYS += h // g * K
    VALUES += h // g * K
    dq = tl.zeros([BM, D], tl.float32)
    for j in range(a, b, BN):
        dq = _dq_block(dq, q, do, lse, delta, KEYS, VALUES, j, BN, lo, hi, stride_k, stride_v, scale,
                       K, D, BN, False)
    for i in range(begin, reach, BN):
        j = tl.where(i < a, i, i + (b - a))
        dq = _dq_block(dq, q, do, lse, delta, KEYS, VALUES, j, end - j, lo, hi, stride_k, stride_v, scale,
                       K, D, BN, True)
    tl.store(DQ + (n[:, None] * H + h) * K + d[None, :], (dq * norm).to(DQ.dtype.element_ty),
             mask=inside[:, None] & (d[None, :] < K))


@triton.jit
def _dkdv_block(k, v, Q, DO, LSE, DELTA, i, count, lo, hi, dk, dv, stride_q, stride_d, scale,
                K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, MASK: tl.constexpr):
    """Add to dk and dv of a tile of keys what the BM queries from query i on contribute. Return the new dk and dv. Here
    p and ds are transposed: they have one row per key."""
    r = tl.arange(0, BM)
    q = _tile(Q, i, r, count, stride_q, K, D)                                  # (BM, D)
    do = _tile(DO, i, r, count, stride_d, K, D)
    lse = tl.load(LSE + i + r, mask=r < count, other=0.0)
    delta = tl.load(DELTA + i + r, mask=r < count, other=0.0)
    p = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale - lse[None, :])  # (BN, BM)
    if MASK:
        p = tl.where(_inside(lo, hi, i, BM), p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (tl.dot(v, do.T, input_precision="ieee") - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["N", "M", "g"])
def _backward_kv(Q, KEYS, VALUES, LO, HI, LSE, DO, DELTA, DK, DV, N, M, stride_q, stride_k, stride_v, stride_d, scale,
                 norm, g, K: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Compute dk and dv of one tile of BN keys of one key/value head, summed over its g query heads. Here LO and HI
    (M,) are spans of the keys: the queries in [LO[j], HI[j]) read key j. See key_spans()."""
    start, group, G = tl.program_id(0) * BN, tl.program_id(1).to(tl.int64), tl.num_programs(1)
    c, d = tl.arange(0, BN), tl.arange(0, D)
    lo, hi, begin, end, a, b, reach = _bounds(LO, HI, start, M, N, BN, BM)

    k = _tile(KEYS + group * K, start, c, M - start, stride_k, K, D)
    v = _tile(VALUES + group * K, start, c, M - start, stride_v, K, D)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    for h in range(group * g, group * g + g):
        h = tl.cast(h, tl.int64)
        q, do, row = Q + h * K, DO + h * K, h * N
        for i in range(a, b, BM):
            dk, dv = _dkdv_block(k, v, q, do, LSE + row, DELTA + row, i, BM, lo, hi, dk, dv,
                                 stride_q, stride_d, scale, K, D, BM, False)
        for i in range(begin, reach, BM):
            i = tl.where(i < a, i, i + (b - a))
            dk, dv = _dkdv_block(k, v, q, do, LSE + row, DELTA + row, i, end - i, lo, hi, dk, dv,
                                 stride_q, stride_d, scale, K, D, BM, True)
    n = start.to(tl.int64) + c
    at = (n[:, None] * G + group) * K + d[None, :]
    inside = (n[:, None] < M) & (d[None, :] < K)
    tl.store(DK + at, (dk * norm).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=inside)


def key_spans(lo, hi, M):
    """Find the queries that read each of M keys, by binary search on the device -> (M,) int32, twice. lo and hi never
    decrease, so these queries are adjacent: those from the number of hi <= j on, up to the number of lo <= j."""
    after = torch.arange(1, M + 1, dtype=torch.int32, device=lo.device)
    return torch.searchsorted(hi, after, out_int32=True), torch.searchsorted(lo, after, out_int32=True)


# ---- tile sizes -----------------------------------------------------------------------------------------------------

# The key is (architecture(q), padded head dim). For each kernel there are four numbers: queries per tile, keys per
# tile, warps, pipeline stages. Head dims 72, 80 and 96 are padded to 128. These sizes have not been timed. A loop that
# spills registers is slow. tests/kernels/test_attention.py bounds the spills in each loop, and the loop's length.
ATTENTION_TILES = {
    (80, 32):  dict(forward=(128, 64, 4, 3), backward_q=(128, 64, 8, 2), backward_kv=(64, 64, 4, 2)),
    (80, 64):  dict(forward=(128, 64, 8, 3), backward_q=(128, 64, 8, 2), backward_kv=(32, 128, 8, 2)),
    (80, 128): dict(forward=(128, 64, 8, 2), backward_q=(64, 64, 8, 1), backward_kv=(32, 64, 8, 2)),
    (90, 32):  dict(forward=(128, 64, 4, 3), backward_q=(128, 64, 8, 3), backward_kv=(64, 128, 8, 2)),
    (90, 64):  dict(forward=(128, 64, 4, 3), backward_q=(128, 64, 8, 3), backward_kv=(64, 128, 8, 2)),
    (90, 128): dict(forward=(128, 128, 8, 3), backward_q=(128, 64, 8, 3), backward_kv=(64, 128, 8, 2)),
}
# The same four numbers for fp32. Its kernels are slow: registers spill, and tensor cores are not used, because they
# would round the inputs.
FP32_TILE = 32, 32, 8, 1


def tile_sizes(q, kernel):
    """Return the keyword arguments to launch `kernel`, which is "forward", "backward_q" or "backward_kv"."""
    K = q.shape[2]
    D = max(16, triton.next_power_of_2(K))
    tile = FP32_TILE if q.dtype == torch.float32 else ATTENTION_TILES[architecture(q), max(32, D)][kernel]
    return dict(K=K, D=D, BM=tile[0], BN=tile[1], num_warps=tile[2], num_stages=tile[3])


# ---- the operators registered with torch ----------------------------------------------------------------------------

def heads_adjacent(*tensors):
    """Return the tensors (N, H, K), and copy those whose heads are not adjacent in memory. The kernels assume that
    heads are K elements apart, because K is a constant at compile time. If a run-time stride is not a multiple of 16,
    such as 72, Triton loads elements one by one. A tensor with a row stride of 2**24 or more is copied too: offsets in
    a tile of 128 rows must fit in int32."""
    return [t if t.stride()[1:] == (t.shape[2], 1) and t.stride(0) < 2**24 else t.contiguous() for t in tensors]


def scale_and_group(q, k):
    """Return two arguments of the kernels: `scale` and `g`, the number of query heads per key head. scale is log2(e) /
    sqrt(K), because exp(s / sqrt(K)) = exp2(s * scale)."""
    return dict(scale=q.shape[2]**-0.5 * 1.4426950408889634, g=q.shape[1] // k.shape[1])


@torch.library.custom_op("pumice::attention", mutates_args=())
@on_its_device
def attention_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor
                     ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (N, H, K), and the base-2 logarithm of the softmax sums (H, N) fp32."""
    N, H, K = q.shape
    q, k, v = heads_adjacent(q, k, v)
    out, lse = _fake(q, k, v, lo, hi)
    how = tile_sizes(q, "forward")
    if N:
        _forward[(triton.cdiv(N, how["BM"]), H)](q, k, v, lo.contiguous(), hi.contiguous(), out, lse, N, k.shape[0],
                                                 q.stride(0), k.stride(0), v.stride(0), **scale_and_group(q, k), **how)
    return out, lse


@attention_triton.register_fake
def _fake(q, k, v, lo, hi):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("pumice::attention_backward", mutates_args=())
@on_its_device
def attention_triton_backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor,
                              hi: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
                              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dv, the gradients of q, k and v. `do` is the gradient of `out`."""
    (N, H, K), (M, G, _) = q.shape, k.shape
    do, q, k, v = heads_adjacent(do, q, k, v)
    lo, hi, out, lse = (t.contiguous() for t in (lo, hi, out, lse))
    dq, dk, dv = _fake_backward(do, q, k, v, lo, hi, out, lse)
    delta, norm, strides = torch.empty_like(lse), K**-0.5, [t.stride(0) for t in (q, k, v, do)]
    if N:
        how = tile_sizes(q, "backward_q")
        _backward_q[(triton.cdiv(N, how["BM"]), H)](q, k, v, lo, hi, out, lse, do, delta, dq, N, M,
                                                    *strides, norm=norm, **scale_and_group(q, k), **how)
    if M:
        how = tile_sizes(q, "backward_kv")
        _backward_kv[(triton.cdiv(M, how["BN"]), G)](q, k, v, *key_spans(lo, hi, M), lse, do, delta, dk, dv, N, M,
                                                     *strides, norm=norm, **scale_and_group(q, k), **how)
    return dq, dk, dv


@attention_triton_backward.register_fake
def _fake_backward(do, q, k, v, lo, hi, out, lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros as the gradient of lse
    ctx.save_for_backward(*inputs, *output)


@torch.autograd.function.once_differentiable
def _gradients(ctx, do, _):
    if do is None:
        return (None,) * 5
    return *attention_triton_backward(do, *ctx.saved_tensors), None, None


attention_triton.register_autograd(_gradients, setup_context=_setup)


def attention(q, k, v, lo, hi):
    """Compute span attention. The top of this file shows the shapes. fp64 inputs and head dims above 128 always use
    plain torch."""
    assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads"
    assert k.shape == v.shape and q.shape[2] == k.shape[2], \
        f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    assert lo.shape[0] == hi.shape[0] == q.shape[0], f"{q.shape[0]} queries, {lo.shape[0]} spans"
    if use_triton(q) and q.dtype != torch.float64 and q.shape[2] <= 128:
        return attention_triton(q, k, v, lo, hi)[0]
    return attention_torch(q, k, v, lo, hi)
