"""The Triton side of kernels/attention.py, interpreted (tests/interpret.py says how): fp32 and fp16, for tl.dot of bf16
is wrong there. Tiles are small, so that streams of a hundred tokens have full blocks, cut blocks and skipped ones."""

import pytest
import torch
from interpret import variant
from test_attention import CASES, case, documents, images, prefixes, window

import kernels
import kernels.attention
from kernels.attention import attention, attention_ref, attention_torch, attention_triton, ranges

BM, BN = 32, 16


@pytest.fixture(autouse=True)
def triton_with_small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")
    monkeypatch.setattr(kernels.attention, "FP32", (BM, BN, 1, 1))
    for D in (32, 64, 128):
        tiles = dict(forward=(BM, BN, 1, 1), backward_q=(BM, BN, 1, 1), backward_kv=(BN, BM, 1, 1))
        monkeypatch.setitem(kernels.attention.TILES, (80, D), tiles)


def low(spans, M, dtype, **shape):
    return [t.detach().to(dtype).requires_grad_() for t in case(spans, M, **shape)]


def with_gradients(f, q, k, v, lo, hi):
    """-> out, dq, dk, dv for an uneven gradient from above"""
    out = f(q, k, v, lo, hi)
    up = torch.linspace(-1, 2, out.numel()).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), up)]


def check(spans, M, dtype, f=attention, **shape):
    """Against the float64 definition: RMS error at most 1.25 times that of plain torch at this precision, and the
    largest at most 4 times; one rounding of the largest product on the way, do v, is granted. Torch sums p dp where we
    have do . out, so that a row with one key errs by nothing at all there: its ds is p (dp - dp)."""
    q, k, v = low(spans, M, dtype, **shape)
    ours, theirs = with_gradients(f, q, k, v, *spans), with_gradients(attention_ref, q, k, v, *spans)
    truth = with_gradients(attention_ref, *(t.detach().double().requires_grad_() for t in (q, k, v)), *spans)
    for a, b, true in zip(ours, theirs, truth):
        assert a.dtype == dtype and a.shape == true.shape and a.isfinite().all()
        if true.numel():
            unit = torch.finfo(dtype).eps * max(t.abs().max() for t in (2 * v, true) if t.numel())  # do is 2 at most
            a, b = (t.double() - true for t in (a, b))
            assert a.square().mean().sqrt() <= 1.25 * b.square().mean().sqrt() + unit / 4
            assert a.abs().max() <= 4 * b.abs().max() + unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [n for n in CASES if n != "ragged sizes"])
def test_every_mask(name, dtype):
    spans, M = CASES[name]
    check(spans, M, dtype)


@pytest.mark.parametrize("spans, M", [
    (documents(1, 15, 17, 97), 130), (documents(129), 129), (images(49, 49), 98), (prefixes((40, 90)), 90),
    (window((100, 9), 20), 109), (tuple(t[60:] for t in documents(100)), 100)],
    ids=["ragged", "long", "images", "prefix", "window", "end of a document"])
def test_tiles_that_are_full_cut_and_skipped(spans, M):
    check(spans, M, torch.float32, H=1, G=1)


@pytest.mark.parametrize("K", [32, 64, 72, 80, 96, 128])
def test_head_sizes_of_real_models(K):
    check(documents(17, 20), 37, torch.float16, H=2, G=1, K=K)


@pytest.mark.parametrize("H, G", [(6, 6), (5, 1), (4, 2)])
def test_grouped_queries_read_their_own_group(H, G):
    check(documents(20, 13), 33, torch.float32, H=H, G=G)


def test_a_query_without_keys_gets_zeros_and_gives_gradients_of_zero():
    for name in ("gaps", "nothing to read", "no query", "no key", "cross-attention"):
        spans, M = CASES[name]
        out, dq, dk, dv = with_gradients(attention, *low(spans, M, torch.float32), *spans)
        empty = spans[1] <= spans[0]
        read = torch.zeros(M, dtype=torch.bool)
        for a, b in zip(*(s.tolist() for s in spans)):
            read[a:b] = True
        assert not out[empty].any() and not dq[empty].any() and not dk[~read].any() and not dv[~read].any()


def test_strides_do_not_matter():
    spans = documents(20, 13)
    q, k, v = (t.detach() for t in low(spans, 33, torch.float32))
    odd = [q.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([k, -k], 1)[:, :2], torch.cat([v, -v], 2)[..., :6]]
    every_other = [torch.stack([t, -t], -1)[..., 0] for t in (q, k, v)]
    assert not any(t.is_contiguous() for t in (*odd, *every_other)) and len({t.stride()[:2] for t in odd}) == 3
    up = torch.randn(*q.shape[:2], 2 * q.shape[2])[..., ::2]
    slices = [torch.stack([t, -t], 1)[:, 0] for t in spans]
    wide, got = up[:1].expand_as(up), []                             # one row's gradient, seen from everywhere
    for tensors, s, d in ((odd, slices, up), (every_other, spans, up), ((q, k, v), spans, up.contiguous()),
                          ((q, k, v), spans, wide)):
        tensors = [t.requires_grad_() for t in tensors]
        out = attention(*tensors, *s)
        got.append([out, *torch.autograd.grad(out, tensors, d)])
    for a, b, c in zip(*got[:3]):
        assert torch.equal(a, c) and torch.equal(b, c)
    want = torch.autograd.grad(attention_torch(*tensors, *spans), tensors, wide)
    for a, b in zip(got[3][1:], want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_documents_do_not_see_each_other():
    """Noise in the first document leaves every bit of the others, forward and backward."""
    spans = documents(11, 5, 23, 40)
    q, k, v = (t.detach() for t in low(spans, 79, torch.float32, H=2, G=1))
    noisy = [torch.cat([1e3 * torch.randn_like(t[:11]), t[11:]]).requires_grad_() for t in (q, k, v)]
    for a, b in zip(with_gradients(attention, *(t.requires_grad_() for t in (q, k, v)), *spans),
                    with_gradients(attention, *noisy, *spans)):
        assert torch.equal(a[11:], b[11:]) and not torch.equal(a[:11], b[:11])


def test_spans_that_break_the_rules_read_nothing_outside():
    """Ends behind the last key and beginnings before the first are cut to what exists; beside k and v lies nan, which
    would be read, and counted through a mask that says all is seen."""
    (lo, hi), M = documents(40), 40
    room = [torch.full((M + 200, 1, 8), torch.nan) for _ in range(2)]
    q, k, v = (t.detach() for t in low((lo, hi), M, torch.float32, H=1, G=1, K=8))
    for at, t in zip(room, (k, v)):
        at[100 : 100 + M] = t
    k, v = (at[100 : 100 + M] for at in room)
    want = attention(q, k, v, lo, torch.full_like(hi, M))
    assert torch.equal(attention(q, k, v, lo - 50, torch.full_like(hi, M + 60)), want)
    q, k, v = (t.requires_grad_() for t in (q, k.detach(), v.detach()))
    for spans in ((lo - 50, hi + 60), (hi, lo), (lo, hi.flip(0)), (hi.flip(0) - 9, hi + 5)):
        assert all(t.isfinite().all() for t in with_gradients(attention, q, k, v, *spans))


@pytest.mark.parametrize("name", CASES)
def test_ranges_are_those_of_a_loop(name):
    (lo, hi), M = CASES[name]
    by_hi, by_lo = ranges(lo, hi, M, 8)
    for t, first in enumerate(range(0, M, 8)):
        last = min(first + 8, M) - 1
        some = [i for i in range(len(lo)) if lo[i] <= last and hi[i] > first]
        whole = [i for i in range(len(lo)) if lo[i] <= first and hi[i] > last]
        assert set(some) <= set(range(by_hi[0, t], by_lo[1, t])) and whole == [*range(by_hi[1, t], by_lo[0, t])]


def test_blocks_that_nobody_sees_are_not_loaded():
    """Keys and values of nan, in whole blocks of the skipped kind, reach nothing."""
    spans = window((128,), 16)
    lo, hi = (t[64:96] for t in spans)                              # one tile of queries, that reads keys 49 to 95
    q, k, v = (t.detach() for t in low((lo, hi), 128, torch.float32, H=1, G=1))
    want = attention(q, k, v, lo, hi)
    k[:49], v[:49], k[96:], v[96:] = (torch.nan,) * 4
    assert torch.equal(attention(q, k, v, lo, hi), want)


BROKEN = {
    "mask forgotten": ("K, D, BN, True)\n\n    n = start", "K, D, BN, False)\n\n    n = start"),
    "full blocks one too many": ("tl.maximum(hi - a, 0) // B * B", "(tl.maximum(hi - a, 0) + B - 1) // B * B"),
    "blocks on the right lost": ("return a, b, end - (b - a)", "return a, b, a"),
    "sum not rescaled": ("l = l * shrink + tl.sum(p, 1)", "l = l + tl.sum(p, 1)"),
    "empty rows divided": ("acc / tl.where(l == 0, 1.0, l)[:, None]", "acc / l[:, None]"),
    "delta forgotten in dk": ("input_precision=\"ieee\") - delta[None, :])", "input_precision=\"ieee\"))"),
    "dk of one head": ("range(group * g, group * g + g)", "range(group * g, group * g + 1)"),
    "heads tiled": ("range(group * g, group * g + g)", "range(group, group + g)"),
    "queries found too late": ("first + 1, (first", "first + 9, (first"),
}


@pytest.mark.parametrize("name", [None, *BROKEN])
def test_a_broken_kernel_is_seen(name, tmp_path):
    """What is asked above of the kernels, nine wrong ones cannot give."""
    lo, hi = documents(30, 45)
    hi[:2] = 0                                                               # two empty rows
    if name is None:
        return check((lo, hi), 75, torch.float32)
    broken = variant(kernels.attention, *BROKEN[name], tmp_path)
    broken.FP32 = kernels.attention.FP32
    with pytest.raises(AssertionError):
        check((lo, hi), 75, torch.float32, broken.attention)


def test_the_operators_are_what_torch_believes_them_to_be():
    spans, M = CASES["image blocks"]
    q, k, v = low(spans, M, torch.float32)
    torch.library.opcheck(attention_triton, (q, k, v, *spans))
    q, k, v = (t.detach() for t in (q, k, v))
    out, lse = attention_triton(q, k, v, *spans)
    torch.library.opcheck(torch.ops.pumice.attention_backward, (out, q, k, v, *spans, out, lse))


def test_one_graph_holds_it_all():
    """torch.compile without a break in the graph: the same bits, forward and backward."""
    f = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for spans in (documents(9, 8), documents(20)):
        q, k, v = low(spans, len(spans[0]), torch.float32)
        for ours, theirs in zip(with_gradients(f, q, k, v, *spans), with_gradients(attention, q, k, v, *spans)):
            assert torch.equal(ours, theirs)


def test_what_the_kernels_do_not_take_goes_to_torch():
    """float64 and heads of more than 128 numbers."""
    spans = documents(5)
    for q, k, v in (case(spans, 5), low(spans, 5, torch.float32, K=136)):
        assert torch.equal(attention(q, k, v, *spans), attention_torch(q, k, v, *spans))
