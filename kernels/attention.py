"""Span attention: query i reads the keys lo[i] <= j < hi[i], and that is the only mask there is.

    N queries   M keys   H query heads   G key/value heads (H = g * G)   K head dim
    q (N, H, K)   k, v (M, G, K)   lo, hi (N,) int32, neither ever decreases   ->   out (N, H, K)

    out[i, h] = sum_j softmax_j(q[i, h] . k[j, h // g] / sqrt(K)) v[j, h // g],  lo[i] <= j < hi[i];  empty spans give 0

The argument in bytes. A packed stream of N tokens holds documents of length L << N. A mask over it would be N x N, of
which a share L / N is ever true; spans say the same in 2 N integers, and because they never move backwards along the
stream the queries fall into runs that touch disjoint key ranges. Work and memory are then sum(L^2), not N^2.
"""

import torch
import torch.nn.functional as F

ROWS = 512  # queries handled at once inside one long document: a causal half wastes at most ROWS / L of its products


def attention_ref(q, k, v, lo, hi):
    """The definition, with the whole (N, M) mask: for reading and for tests. Shapes as above."""
    N, H, K = q.shape
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))  # (M, H, K): head h reads group h // g
    j = torch.arange(k.shape[0], device=q.device)
    seen = (lo[:, None] <= j) & (j < hi[:, None])                         # (N, M)
    s = torch.einsum("nhk,mhk->hnm", q, k) * K**-0.5
    p = s.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)  # the last fill turns rows of nan into 0
    return torch.einsum("hnm,mhk->nhk", p, v)


def runs(lo, hi):
    """Cut the queries into runs that can be computed alone: a list of (n, a, b, c, d, kind).

    Queries [a, b) see no key outside [c, d), and no other query sees one inside. kind is "full" (all of [c, d)),
    "causal" (key c + t is seen from query a + t on), "mask" (look at lo and hi) or "empty". n > 1 says that n runs of
    the same shape follow each other without a gap, so that one batched product does them all: the images of a ViT."""
    N = lo.shape[0]
    if N == 0:
        return []
    lo, hi = lo.cpu().long(), hi.cpu().long()
    assert (lo[1:] >= lo[:-1]).all() and (hi[1:] >= hi[:-1]).all(), "spans may not move backwards along the stream"
    at, empty = torch.arange(N), hi <= lo
    start = torch.ones(N, dtype=torch.bool)
    start[1:] = lo[1:] >= hi[:-1]                     # my first key lies past everything seen before me
    start[1:] &= ~(empty[1:] & empty[:-1])            # (those who see nothing stay together)
    start[1:] |= empty[1:] != empty[:-1]
    a = start.nonzero()[:, 0]
    b = torch.cat([a[1:], torch.tensor([N])])
    run = start.cumsum(0) - 1                         # (N,) which run a query belongs to
    c, d = lo[a], hi[b - 1]
    R = a.numel()
    same_lo = lo == c[run]
    odd_full, odd_causal = (torch.zeros(R, dtype=torch.long).index_add_(0, run, (~(same_lo & fits)).long())
                            for fits in (hi == d[run], hi - c[run] == at - a[run] + 1))
    out = []
    rows = zip(*(t.tolist() for t in (a, b, c, d, empty[a], odd_full == 0, odd_causal == 0)))
    for a, b, c, d, nothing, full, causal in rows:
        kind = "empty" if nothing else "full" if full else "causal" if causal else "mask"
        if out and kind in ("full", "causal"):
            n, a0, b0, c0, d0, kind0 = out[-1]
            follows = (a, c) == (a0 + n * (b - a), c0 + n * (d - c))
            if follows and (b - a, d - c, kind) == (b0 - a0, d0 - c0, kind0):
                out[-1] = (n + 1, a0, b0, c0, d0, kind)
                continue
        out.append((1, a, b, c, d, kind))
    return out


def attention_torch(q, k, v, lo, hi):
    """The same, run by run; no (N, M) mask ever exists. Short runs are written out, long ones go to torch's fused
    attention: on a CPU its backward takes 1 to 4 times as long as the plain products for documents of 160 tokens, but
    it keeps no L x L matrix; only a long run with a pattern of its own keeps its mask, ROWS queries at a time."""
    (N, H, K), G = q.shape, k.shape[1]
    g, todo = H // G, runs(lo, hi)
    if all(kind == "empty" for *_, kind in todo):
        return q * 0 + k[:0].sum() + v[:0].sum()                  # nothing to read: zeros whose gradients are zeros
    sizes, at = [], 0                                             # split, not slices: the gradients of slices are whole
    for n, a, b, c, d, kind in todo:                              # streams of zeros, one for each document
        sizes += [c - at, n * (d - c)] if kind != "empty" else [0, 0]
        at = c + n * (d - c) if kind != "empty" else at
    sizes.append(k.shape[0] - at)
    ks, vs = k.split(sizes)[1::2], v.split(sizes)[1::2]
    qs = q.split([n * (b - a) for n, a, b, *_ in todo])
    longest = max((d - c for n, a, b, c, d, kind in todo if kind == "causal" and d - c <= ROWS), default=0)
    ahead = torch.full((longest, longest), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    out = []
    for (n, a, b, c, d, kind), qr, kr, vr in zip(todo, qs, ks, vs):
        Lq, Lk = b - a, d - c
        if kind == "empty":
            out.append(qr * 0)                                    # zeros that know their graph
            continue
        kr, vr = (t.view(n, Lk, G, K).transpose(1, 2) for t in (kr, vr))                         # (n, G, Lk, K)
        qr = qr.view(n, Lq, G, g, K).permute(0, 2, 3, 1, 4)                                      # (n, G, g, Lq, K)
        if Lk <= ROWS:
            s = (qr.reshape(n, G, g * Lq, K) * K**-0.5) @ kr.transpose(-1, -2)                   # (n, G, g Lq, Lk)
            if kind == "causal":
                s = s.view(n, G, g, Lq, Lk) + ahead[:Lq, :Lk]
            elif kind == "mask":
                j = torch.arange(c, d, device=q.device)
                s = s.view(n, G, g, Lq, Lk).masked_fill((j < lo[a:b, None]) | (hi[a:b, None] <= j), -torch.inf)
            o = s.softmax(-1).view(n, G, g * Lq, Lk) @ vr                                        # (n, G, g Lq, K)
            out.append(o.view(n, G, g, Lq, K).permute(0, 3, 1, 2, 4).reshape(n * Lq, H, K))
            continue
        qr = qr.reshape(n, H, Lq, K)
        kr, vr = (t.repeat_interleave(g, dim=1) for t in (kr, vr))                               # (n, H, Lk, K)
        if kind in ("full", "causal"):
            o = F.scaled_dot_product_attention(qr, kr, vr, is_causal=kind == "causal")
        else:
            o = []
            for r in range(a, b, ROWS):
                e = min(r + ROWS, b)
                first, last = int(lo[r]), int(hi[e - 1])                          # the keys that these rows can see
                j = torch.arange(first, last, device=q.device)
                seen = (lo[r:e, None] <= j) & (j < hi[r:e, None])                 # (rows, keys)
                o.append(F.scaled_dot_product_attention(qr[:, :, r - a : e - a], kr[:, :, first - c : last - c],
                                                        vr[:, :, first - c : last - c], attn_mask=seen))
            o = torch.cat(o, 2)
        out.append(o.transpose(1, 2).reshape(n * Lq, H, K))
    return torch.cat(out)


def attention(q, k, v, lo, hi):
    """Span attention; shapes in the head of this file."""
    assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads"
    assert lo.shape[0] == hi.shape[0] == q.shape[0], f"{q.shape[0]} queries, {lo.shape[0]} spans"
    return attention_torch(q, k, v, lo, hi)
