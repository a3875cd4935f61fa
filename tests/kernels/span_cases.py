"""Spans of every kind of mask, for the attention tests. Each builder -> lo, hi (N,) int32."""

import torch


def documents(*lengths):
    """Causal inside each document"""
    n = torch.tensor(lengths)
    lo = (n.cumsum(0) - n).repeat_interleave(n).int()
    return lo, torch.arange(1, int(n.sum()) + 1, dtype=torch.int32)


def images(*lengths):
    """Bidirectional inside each image, as in a ViT"""
    n = torch.tensor(lengths)
    return tuple((n.cumsum(0) - m).repeat_interleave(n).int() for m in (n, 0 * n))


def prefixes(*pairs):
    """Documents of (prefix, length): bidirectional in the prefix, causal after it (PaliGemma)"""
    lo, hi = documents(*(n for _, n in pairs))
    ends = torch.tensor([p for p, n in pairs for _ in range(n)])
    return lo, torch.maximum(hi, lo + ends.int())


def image_blocks():
    """A causal document of 12 tokens with images at 2..5 and 7..9, bidirectional inside; then a document of 5"""
    lo, hi = documents(12, 5)
    hi[2:6], hi[7:10] = 6, 10
    return lo, hi


def last_image():
    """Flamingo: each token reads the 4 latents of its last image, or nothing before the first; 3 images, 12 keys"""
    last = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3])
    return ((last - 1) * 4).clamp(min=0).int(), (last * 4).int()


def own_image(I, Q, M):
    """Q-Former and resampler: the Q queries of each of I images read the M features of their image (parts/cross.py)"""
    lo = torch.arange(I, dtype=torch.int32).repeat_interleave(Q) * M
    return lo, lo + M


def window(lengths, w):
    """A sliding window of w keys inside each document"""
    lo, hi = documents(*lengths)
    return torch.maximum(lo, hi - w), hi


def spans(lo, hi):
    return tuple(torch.tensor(t, dtype=torch.int32) for t in (lo, hi))


GAPS = spans([0, 2, 2, 2, 5, 9, 9, 9, 13], [2, 2, 2, 5, 9, 9, 9, 11, 14])  # some queries and some keys are never used
CASES = {  # name -> (spans, M)
    "one token": (documents(1), 1), "packed": (documents(3, 1, 9, 4, 4, 4, 17), 42),
    "images of a ViT": (images(5, 5, 5), 15), "images of other sizes": (images(3, 7, 7, 1), 18),
    "prefix": (prefixes((3, 8), (1, 5), (6, 6)), 19), "image blocks": (image_blocks(), 17),
    "cross-attention": (last_image(), 12), "queries of images": (own_image(3, 4, 7), 21),
    "image keys of MMCA": (spans([0] * 5 + [3] * 3, [0, 0, 2, 3, 3, 3, 3, 4]), 4),    # two documents of 5 and 3 words
    "some rows": (tuple(t[torch.tensor([4, 12, 13, 16])] for t in documents(5, 9, 3)), 17),
    "sliding window": (window((20, 3, 30), 4), 53), "gaps": (GAPS, 20), "all empty": (spans([0] * 4, [0] * 4), 6),
    "unused keys": (spans([0, 0, 5, 5], [3, 3, 8, 8]), 9), "no query": (documents(0), 5),
    "no key": (spans([0] * 3, [0] * 3), 0),
}
LONG = {  # longer than the segments that plain torch computes at once
    "long document": (documents(40, 700, 9), 749), "long images": (images(520, 520), 1040),
    "long window": (window((600, 100), 50), 700), "long prefix": (prefixes((300, 600)), 600),
    "end of a long document": (tuple(t[500:] for t in documents(600)), 600),
}


def qkv(spans, M, H=4, G=2, K=6, dtype=torch.float64):
    """-> random q (N, H, K), k, v (M, G, K)"""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, h, K, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
            for n, h in ((len(spans[0]), H), (M, G), (M, G))]


def unused_keys(spans, M):
    """-> (M,) bool: keys that no query reads"""
    used = torch.zeros(M, dtype=torch.bool)
    for lo, hi in zip(*(t.tolist() for t in spans)):
        used[lo:hi] = True
    return ~used
