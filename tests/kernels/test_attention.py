"""Span attention against its definition in float64: all shapes of masks, all gradients, and no mask over the stream."""

import pytest
import torch
from kernel_cases import saved
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.attention
from kernels.attention import attention, attention_ref, attention_torch, attention_torch_backward, runs

# sums of at most 1,300 terms of size about 1 in float64: 1300 * 2**-53 = 1.4e-13, and products of a few of them
TIGHT = 1e-12


class Largest(TorchDispatchMode):
    """Remembers how many bytes the largest tensor that any operation made has; views do not count. `all` lists them."""

    def __init__(self):
        super().__init__()
        self.bytes, self.all = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values())
                 if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.all.append(t.untyped_storage().nbytes())
                self.bytes = max(self.bytes, self.all[-1])
        return out


def allocations(f):
    """Bytes that torch took (+) and gave back (-) in the course of f, inside its operators too, one by one"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def documents(*lengths):
    """Causal inside each document -> lo, hi"""
    n = torch.tensor(lengths)
    lo = (n.cumsum(0) - n).repeat_interleave(n).int()
    return lo, torch.arange(1, int(n.sum()) + 1, dtype=torch.int32)


def images(*lengths):
    """Both ways inside each image, as in a ViT"""
    n = torch.tensor(lengths)
    lo, hi = ((n.cumsum(0) - m).repeat_interleave(n).int() for m in (n, 0 * n))
    return lo, hi


def prefixes(*pairs):
    """Documents of (prefix, length): the prefix is read both ways, the rest causally (PaliGemma)"""
    lo, hi = documents(*(n for _, n in pairs))
    ends = torch.tensor([p for p, n in pairs for _ in range(n)])
    return lo, torch.maximum(hi, lo + ends.int())


def blocks():
    """One causal document of 12 with an image at 2..5 and one at 7..9, read both ways inside, and a second document"""
    lo, hi = documents(12, 5)
    hi[2:6], hi[7:10] = 6, 10
    return lo, hi


def cross():
    """Flamingo: text reads the latents of its last image, nothing before the first; 3 images of 4 latents in 12 keys"""
    last = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3])
    return ((last - 1) * 4).clamp(min=0).int(), (last * 4).int()


def window(lengths, w):
    lo, hi = documents(*lengths)
    return torch.maximum(lo, hi - w), hi


def rows(spans, asked):
    return tuple(t[torch.tensor(asked)] for t in spans)


def gaps():
    """Some queries read nothing, and some keys are read by nobody"""
    lo = torch.tensor([0, 2, 2, 2, 5, 9, 9, 9, 13], dtype=torch.int32)
    return lo, torch.tensor([2, 2, 2, 5, 9, 9, 9, 11, 14], dtype=torch.int32)


CASES = {
    "one token": (documents(1), 1), "one document": (documents(7), 7), "packed": (documents(3, 1, 9, 4, 4, 4, 17), 42),
    "ragged sizes": (documents(1, 2, 15, 17, 97, 127, 129), 388), "images of a ViT": (images(5, 5, 5), 15),
    "images of other sizes": (images(3, 7, 7, 1), 18), "prefix": (prefixes((3, 8), (1, 5), (6, 6)), 19),
    "image blocks": (blocks(), 17), "cross-attention": (cross(), 12),
    "some rows": (rows(documents(5, 9, 3), [4, 12, 13, 16]), 17),
    "sliding window": (window((20, 3, 30), 4), 53), "window longer than documents": (window((5, 4), 9), 9),
    "gaps": (gaps(), 20), "nothing to read": ((torch.zeros(4, dtype=torch.int32),) * 2, 6),
    "keys left out": (tuple(torch.tensor(t, dtype=torch.int32) for t in ([0, 0, 5, 5], [3, 3, 8, 8])), 9),
    "no query": (documents(0), 5), "no key": ((torch.zeros(3, dtype=torch.int32),) * 2, 0),
}
LONG = {  # beyond the rows that are handled at once
    "long document": (documents(40, 1025, 9), 1074), "long image": (images(600, 600), 1200),
    "long window": (window((700, 600), 50), 1300), "long prefix": (prefixes((300, 700)), 700),
    "chunk of a long document": (tuple(t[600:] for t in documents(700)), 700),
}


def case(spans, M, H=4, G=2, K=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, h, K, generator=g, dtype=torch.float64, requires_grad=True)
               for n, h in ((len(spans[0]), H), (M, G), (M, G)))
    return q, k, v


def with_gradients(f, q, k, v, lo, hi):
    """-> out, dq, dk, dv for an uneven gradient from above"""
    out = f(q, k, v, lo, hi)
    up = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), up)]


@pytest.mark.parametrize("name", [*CASES, *LONG])
def test_any_spans_give_what_the_definition_gives_and_so_do_the_gradients(name):
    spans, M = (CASES | LONG)[name]
    q, k, v = case(spans, M, K=4 if name in LONG else 6)
    for ours, theirs in zip(with_gradients(attention, q, k, v, *spans), with_gradients(attention_ref, q, k, v, *spans)):
        assert ours.shape == theirs.shape and ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("K", [32, 64, 72, 80, 96, 128])
def test_head_sizes_of_real_models(K):
    spans = documents(17, 40)
    q, k, v = case(spans, 57, K=K)
    for ours, theirs in zip(with_gradients(attention, q, k, v, *spans), with_gradients(attention_ref, q, k, v, *spans)):
        torch.testing.assert_close(ours, theirs, rtol=TIGHT, atol=TIGHT)


def test_fp32_errs_little_more_than_plain_torch_does():
    """Both against the truth in float64: 1.25 times the error of plain torch, as root of the mean square."""
    spans = documents(*(5 + 13 * i for i in range(12)))
    q, k, v = case(spans, len(spans[0]), K=32)
    truth = with_gradients(attention_ref, q, k, v, *spans)
    low = [t.detach().float().requires_grad_() for t in (q, k, v)]
    ours, theirs = with_gradients(attention, *low, *spans), with_gradients(attention_ref, *low, *spans)
    for ours, theirs, true in zip(ours, theirs, truth):
        assert (ours - true).square().mean().sqrt() <= 1.25 * (theirs - true).square().mean().sqrt()


@pytest.mark.parametrize("H, G", [(8, 2), (6, 6), (5, 1)])
def test_grouped_queries_read_their_own_group(H, G):
    """Against explicit loops over heads and queries, with nothing shared with the code that is tested."""
    spans = documents(4, 6)
    q, k, v = (t.detach() for t in case(spans, 10, H, G))
    want, tiled = torch.zeros_like(q), torch.zeros_like(q)
    for h in range(H):
        for out, g in ((want, h // (H // G)), (tiled, h % G)):
            for i, (a, b) in enumerate(zip(*(s.tolist() for s in spans))):
                s = torch.stack([q[i, h] @ k[j, g] for j in range(a, b)]) / q.shape[-1] ** 0.5
                p = s.exp() / s.exp().sum()
                out[i, h] = sum(w * v[j, g] for w, j in zip(p, range(a, b)))
    torch.testing.assert_close(attention(q, k, v, *spans), want, rtol=TIGHT, atol=TIGHT)
    torch.testing.assert_close(attention_ref(q, k, v, *spans), want, rtol=TIGHT, atol=TIGHT)
    if 1 < G < H:  # heads tiled instead of repeated would be seen
        assert (tiled - want).abs().max() > 0.1


def test_the_definition_passes_a_finite_difference_check():
    spans = (torch.tensor([0, 0, 2, 2, 3], dtype=torch.int32), torch.tensor([1, 2, 2, 3, 5], dtype=torch.int32))
    q, k, v = case(spans, 5, H=2, G=1, K=3)
    assert torch.autograd.gradcheck(lambda q, k, v: attention_ref(q, k, v, *spans), (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: attention_torch(q, k, v, *spans), (q, k, v))


@pytest.mark.parametrize("name", ["gaps", "nothing to read", "no query", "no key", "cross-attention"])
def test_a_query_without_keys_gets_zeros_and_gives_gradients_of_zero(name):
    spans, M = CASES[name]
    q, k, v = case(spans, M)
    out, dq, dk, dv = with_gradients(attention, q, k, v, *spans)
    empty = spans[1] <= spans[0]
    read = torch.zeros(M, dtype=torch.bool)
    for a, b in zip(*(s.tolist() for s in spans)):
        read[a:b] = True
    assert not out[empty].any() and not dq[empty].any() and not dk[~read].any() and not dv[~read].any()


@pytest.mark.parametrize("name", ["packed", "images of a ViT", "long document"])
def test_strides_do_not_matter(name):
    """Inputs that are transposed, sliced or expanded, and a gradient that arrives as a slice."""
    spans, M = (CASES | LONG)[name]
    q, k, v = case(spans, M)
    odd = [t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k)]      # (H, N, K) in memory
    odd.append(torch.stack([v.detach(), -v.detach()], -1)[..., 0])                       # every other number
    assert not any(t.is_contiguous() for t in odd if t.shape[0] > 1)
    odd = [t.requires_grad_() for t in odd]
    up = torch.randn(*q.shape[:2], 2 * q.shape[2], dtype=torch.float64)[..., ::2]
    ours = torch.autograd.grad(attention(*odd, *spans), odd, up)
    theirs = torch.autograd.grad(attention(q, k, v, *spans), (q, k, v), up.contiguous())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=TIGHT, atol=TIGHT)
    one = k.detach()[:1].expand(M, -1, -1)                                               # one key, seen from everywhere
    torch.testing.assert_close(attention(q, one, v, *spans), attention_ref(q, one, v, *spans), rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("broken", [False, True])
def test_documents_do_not_see_each_other(broken):
    """Noise in the first document leaves every bit of the others; without the lower ends of the spans it does not."""
    f = (lambda q, k, v, lo, hi: attention(q, k, v, 0 * lo, hi)) if broken else attention
    spans = documents(11, 5, 23, 600)
    q, k, v = (t.detach() for t in case(spans, 639))
    before = f(q, k, v, *spans)
    g = torch.Generator().manual_seed(9)
    for t in (q, k, v):
        t[:11] = torch.randn(t[:11].shape, generator=g, dtype=t.dtype)
    after = f(q, k, v, *spans)
    assert not torch.equal(before[:11], after[:11])
    assert torch.equal(before[11:], after[11:]) != broken


@pytest.mark.parametrize("piece", [1, 3, 7])
def test_a_prompt_read_in_pieces_is_the_prompt_read_at_once(piece):
    """Fewer queries than keys: the causal edge belongs to the last key, not to the first."""
    spans = documents(40)
    q, k, v = (t.detach() for t in case(spans, 40))
    whole = attention(q, k, v, *spans)
    parts, wrong = [], []
    for a in range(0, 40, piece):
        b = min(a + piece, 40)
        parts.append(attention(q[a:b], k[:b], v[:b], spans[0][a:b], spans[1][a:b]))
        wrong.append(attention(q[a:b], k[:b], v[:b], spans[0][a:b], spans[1][: b - a]))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=TIGHT, atol=TIGHT)
    assert (torch.cat(wrong) - whole).abs().max() > 0.1


def test_runs_cut_the_stream_where_documents_end():
    assert runs(*documents(3, 3, 5)) == [(2, 0, 3, 0, 3, "causal"), (1, 6, 11, 6, 11, "causal")]
    assert runs(*images(4, 4, 4)) == [(3, 0, 4, 0, 4, "full")]
    assert runs(*(t[3:] for t in documents(5))) == [(1, 0, 2, 0, 5, "mask")]
    assert [r[-1] for r in runs(*gaps())] == ["full", "empty", "full", "full", "empty", "full", "full"]
    nothing = torch.arange(1000, dtype=torch.int32)
    assert [r[1:3] for r in runs(nothing, nothing)] == [(0, 1000)]                        # and not a thousand
    assert runs(*documents(0)) == []


def test_spans_that_move_backwards_are_refused():
    q, k, v = case(documents(4), 4)
    with pytest.raises(AssertionError, match="backwards"):
        attention(q, k, v, torch.tensor([0, 2, 0, 2]), torch.tensor([2, 4, 2, 4]))


def test_shapes_that_do_not_fit_are_named():
    q, k, v = case(documents(4), 4)
    with pytest.raises(AssertionError, match="4 query heads cannot share 3"):
        attention(q, torch.zeros(4, 3, 6), v, *documents(4))
    with pytest.raises(AssertionError, match="4 queries, 3 spans"):
        attention(q, k, v, *documents(3))


@pytest.mark.parametrize("f", [attention, attention_ref], ids=["spans", "broken"])
def test_no_mask_over_the_stream_ever_exists(f):
    """20,000 tokens in documents of 10 to 90: no tensor is larger than the stream itself. The definition makes one of
    N x N, which is shown on a tenth of the stream."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 90, (20_000 // 50 // (10 if f is attention_ref else 1),), generator=g).tolist()
    spans = documents(*lengths)
    N = len(spans[0])
    q, k, v = (t.detach().float().requires_grad_() for t in case(spans, N, K=8))
    made = allocations(lambda: f(q, k, v, *spans).square().sum().backward())
    assert (max(made) <= q.nbytes) == (f is attention)
    assert f is attention_ref or q.nbytes < N * N / 100  # a mask of bytes would be a hundred times that


def test_a_long_document_is_never_a_square():
    spans = documents(1500)
    q, k, v = (t.detach().float().requires_grad_() for t in case(spans, 1500, H=2, G=1, K=4))
    made = allocations(lambda: attention(q, k, v, *spans).sum().backward())
    assert max(made) <= 2 * kernels.attention.ROWS * 1500 * 4  # the scores of some rows, of two heads


@pytest.mark.parametrize("lengths", [(30, 40), (1500,)])
def test_nothing_is_kept_but_q_k_and_v(lengths):
    spans = documents(*lengths)
    q, k, v = (t.detach() for t in case(spans, sum(lengths), K=4))
    assert saved(lambda q, k, v: attention(q, k, v, *spans), q, k, v) == spans[0].nbytes + spans[1].nbytes
    assert saved(lambda q, k, v: attention_ref(q, k, v, *spans), q, k, v) > sum(lengths) ** 2  # the check can fail


@pytest.mark.parametrize("name", CASES)
def test_the_operators_are_what_torch_believes_them_to_be(name):
    spans, M = CASES[name]
    q, k, v = case(spans, M)
    torch.library.opcheck(attention_torch, (q, k, v, *spans))
    torch.library.opcheck(attention_torch_backward, (*(t.detach() for t in (q, q, k, v)), *spans))


def test_one_graph_holds_it_all():
    """torch.compile without a break in the graph, whatever the spans: the same bits, forward and backward."""
    f = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for spans in (documents(9, 8), documents(20), images(5, 5), prefixes((3, 8), (1, 5))):
        q, k, v = case(spans, len(spans[0]))
        for ours, theirs in zip(with_gradients(f, q, k, v, *spans), with_gradients(attention, q, k, v, *spans)):
            assert torch.equal(ours, theirs)


def test_a_second_derivative_is_refused():
    spans = documents(4)
    q, k, v = case(spans, 4)
    grad, = torch.autograd.grad(attention(q, k, v, *spans).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_spans_that_change_in_place_are_read_again():
    """Runs are remembered by value, so that a tensor of spans may be used for the next stream."""
    (lo, hi), M = documents(9, 8), 17
    q, k, v = (t.detach() for t in case((lo, hi), M))
    attention(q, k, v, lo, hi)
    lo.copy_(documents(3, 14)[0]), hi.copy_(documents(3, 14)[1])
    torch.testing.assert_close(attention(q, k, v, lo, hi), attention_ref(q, k, v, lo, hi), rtol=TIGHT, atol=TIGHT)
