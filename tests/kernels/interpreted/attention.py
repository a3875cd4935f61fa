"""The kernels of kernels/attention.py, interpreted (tests/interpret.py), in fp32 and fp16. Tiles are small, so that
sequences of a hundred tokens have full blocks, partly masked blocks and skipped ones."""

import pytest
import torch
from interpret import variant
from kernel_cases import check_error, normal, opcheck, strided, with_gradients
from span_cases import CASES, documents, prefixes, qkv, unused_keys, window

import kernels
from kernels import attention as module
from kernels.attention import attention, attention_ref, attention_torch, attention_triton, key_spans

BM, BN = 32, 16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")
    monkeypatch.setattr(module, "FP32_TILE", (BM, BN, 1, 1))
    for D in (32, 64, 128):
        tiles = dict(forward=(BM, BN, 1, 1), backward_q=(BM, BN, 1, 1), backward_kv=(BN, BM, 1, 1))
        monkeypatch.setitem(module.ATTENTION_TILES, (80, D), tiles)


def attend(f, spans):
    return lambda q, k, v: f(q, k, v, *spans)


def check(spans, M, dtype=torch.float32, f=attention, **shape):
    """The error budget of kernel_cases. Plain torch sums p dp where the kernel has delta = do . out, so for a row with
    one key its dp - delta is exactly 0; hence `largest` includes do . v, the largest intermediate value."""
    low = [t.detach() for t in qkv(spans, M, dtype=dtype, **shape)]
    theirs = with_gradients(attend(attention_ref, spans), *low)
    true = with_gradients(attend(attention_ref, spans), *(t.double() for t in low))
    largest = 4 * float(low[2].abs().max()) if M else 0.0
    terms = low[0].shape[2] + M if dtype == torch.float32 else 1
    with torch.no_grad():                        # alone first: a wrong output costs no backward pass
        check_error(f(*low, *spans), theirs[0], true[0], terms, largest)
    ours = with_gradients(attend(f, spans), *low)
    for results in zip(ours, theirs, true):
        check_error(*results, terms, largest)
    empty, unused = spans[1] <= spans[0], unused_keys(spans, M)
    assert not any(t.any() for t in (ours[0][empty], ours[1][empty], ours[2][unused], ours[3][unused]))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("images of other sizes", "some rows")])
def test_every_mask(name):
    check(*CASES[name], torch.float16 if name in ("packed", "gaps") else torch.float32, H=2, G=1)


@pytest.mark.parametrize("spans, M", [(documents(1, 15, 17, 65), 98), (prefixes((40, 70)), 70),
                                      (window((80, 9), 20), 89), (tuple(t[60:] for t in documents(100)), 100)],
                         ids=["documents", "prefix", "window", "end of a document"])
def test_full_masked_and_skipped_blocks(spans, M):
    check(spans, M, H=1, G=1)


@pytest.mark.parametrize("K", [64, 72, 88])
def test_head_sizes_of_real_models(K):
    check(documents(17, 20), 37, torch.float16, H=2, G=1, K=K)


@pytest.mark.parametrize("H, G", [(2, 2), (3, 1), (4, 2)])
def test_grouped_queries_read_their_own_group(H, G):
    check(documents(9, 8), 17, H=H, G=G)


BROKEN = {
    "mask forgotten": ("K, D, BN, True)\n\n    n = start", "K, D, BN, False)\n\n    n = start"),
    "mask reaches one key too far": ("(c[None, :] < (hi - j)[:, None])", "(c[None, :] <= (hi - j)[:, None])"),
    "mask begins one key late in dk": ("_inside(lo, hi, i, BM)", "_inside(lo + 1, hi, i, BM)"),
    "one full block too many": ("tl.maximum(hi - a, 0) // B * B", "(tl.maximum(hi - a, 0) + B - 1) // B * B"),
    "blocks on the right lost": ("return a, b, end - (b - a)", "return a, b, a"),
    "sum not rescaled": ("l = l * shrink + tl.sum(p, 1)", "l = l + tl.sum(p, 1)"),
    "empty rows divided": ("acc / tl.where(l == 0, 1.0, l)[:, None]", "acc / l[:, None]"),
    "no scale in dq": ("(dq * norm)", "(dq)"),
    "no delta in dq": ("input_precision=\"ieee\") - delta[:, None])", "input_precision=\"ieee\"))"),
    "no delta in dk": ("input_precision=\"ieee\") - delta[None, :])", "input_precision=\"ieee\"))"),
    "dk of one head": ("range(group * g, group * g + g)", "range(group * g, group * g + 1)"),
    "heads tiled": ("range(group * g, group * g + g)", "range(group, group + g)"),
    "queries start too late": ("torch.searchsorted(hi, after,", "torch.searchsorted(hi, after + 8,"),
    "probabilities in half precision": ("tl.dot(p.to(v.dtype), v", "tl.dot(p.to(tl.float16).to(v.dtype), v"),
}


@pytest.mark.parametrize("name", [None, *BROKEN])
def test_a_broken_kernel_fails(name, tmp_path):
    lo, hi = documents(14, 26)
    hi[:2] = 0                                                               # two empty rows
    H, G = (4, 2) if name in (None, "heads tiled") else (2, 1) if name == "dk of one head" else (1, 1)
    if name is None:
        return check((lo, hi), 40, H=H, G=G)
    broken = variant(module, *BROKEN[name], tmp_path)
    broken.FP32_TILE = module.FP32_TILE
    with pytest.raises(AssertionError):
        check((lo, hi), 40, f=broken.attention, H=H, G=G)


def test_strides_change_nothing():
    spans = documents(9, 8)
    q, k, v = (t.detach() for t in qkv(spans, 17, H=2, dtype=torch.float32))
    odd = [q.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([k, -k], 1)[:, :2], torch.cat([v, -v], 2)[..., :6]]
    assert not any(t.is_contiguous() for t in odd) and len({t.stride()[:2] for t in odd}) == 3
    up = strided(normal(*q.shape, dtype=torch.float32, seed=3))
    slices = [torch.stack([t, -t], 1)[:, 0] for t in spans]
    want = with_gradients(attend(attention, spans), q, k, v, up=[up.contiguous()])
    assert all(map(torch.equal, want, with_gradients(attend(attention, slices), *odd, up=[up])))
    assert all(map(torch.equal, want, with_gradients(attend(attention, spans), *map(strided, (q, k, v)), up=[up])))
    wide = up[:1].expand_as(up)                                              # stride 0
    for results in zip(*(with_gradients(attend(f, spans), q, k, v, up=[wide]) for f in (attention, attention_torch))):
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_documents_do_not_read_each_other():
    """Noise in the first document changes no bit of the others, forward and backward."""
    spans = documents(11, 5, 20)
    q, k, v = (t.detach() for t in qkv(spans, 36, H=2, G=1, dtype=torch.float32))
    noisy = [torch.cat([1e3 * normal(*t[:11].shape, seed=9).float(), t[11:]]) for t in (q, k, v)]
    for a, b in zip(*(with_gradients(attend(attention, spans), *t) for t in ((q, k, v), noisy))):
        assert torch.equal(a[11:], b[11:]) and not torch.equal(a[:11], b[:11])


def test_no_key_out_of_bounds_is_read():
    """Ends beyond the last key and starts before the first are clipped. The memory around k and v holds nan."""
    (lo, hi), M = documents(20), 20
    room = [torch.full((M + 200, 1, 8), torch.nan) for _ in range(2)]
    q, k, v = (t.detach() for t in qkv((lo, hi), M, H=1, G=1, K=8, dtype=torch.float32))
    for buffer, t in zip(room, (k, v)):
        buffer[100 : 100 + M] = t
    k, v = (buffer[100 : 100 + M] for buffer in room)
    want = attention(q, k, v, lo, torch.full_like(hi, M))
    assert torch.equal(attention(q, k, v, lo - 50, torch.full_like(hi, M + 60)), want)
    for spans in ((lo - 50, hi + 60), (hi, lo), (lo, hi.flip(0)), (hi.flip(0) - 9, hi + 5)):
        assert all(t.isfinite().all() for t in with_gradients(attend(attention, spans), q, k, v))


def test_skipped_blocks_are_not_loaded():
    """Keys and values of nan in the skipped blocks change nothing."""
    lo, hi = (t[64:96] for t in window((128,), 16))                          # one tile of queries, keys 49 to 95
    q, k, v = (t.detach() for t in qkv((lo, hi), 128, H=1, G=1, dtype=torch.float32))
    want = attention(q, k, v, lo, hi)
    k[:49], v[:49], k[96:], v[96:] = (torch.nan,) * 4
    assert torch.equal(attention(q, k, v, lo, hi), want)


def test_key_spans_equal_a_loop():
    for (lo, hi), M in CASES.values():
        for j, (first, stop) in enumerate(zip(*(t.tolist() for t in key_spans(lo, hi, M)), strict=True)):
            assert [*range(first, stop)] == [i for i in range(len(lo)) if lo[i] <= j < hi[i]]


def test_operators_pass_opcheck():
    spans, M = CASES["image blocks"]
    q, k, v = qkv(spans, M, H=2, G=1, dtype=torch.float32)
    opcheck(attention_triton, (q, k, v, *spans))
    q, k, v = (t.detach() for t in (q, k, v))
    out, lse = attention_triton(q, k, v, *spans)
    opcheck(torch.ops.pumice.attention_backward, (out, q, k, v, *spans, out, lse))


def test_fp64_and_wide_heads_use_plain_torch():
    spans = documents(5)
    for q, k, v in (qkv(spans, 5), qkv(spans, 5, dtype=torch.float32, K=136)):
        assert torch.equal(attention(q, k, v, *spans), attention_torch(q, k, v, *spans))
