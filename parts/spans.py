"""Attention masks: for each token, the end of the span of keys that it attends to.

A span [lo, hi) begins at the first token of the document, so a mask is a choice of hi (kernels/attention.py).

    N tokens of the stream   D documents in it   p length of a document's prefix
"""

import functools

import torch

from kernels.cross_entropy import IGNORE


def causal(ids, labels, pos, lo, image_id):
    """A token sees itself and all tokens before it. -> hi (N,)"""
    return lo + pos + 1


def prefix(ids, labels, pos, lo, image_id):
    """Prefix-LM (PaLI-3, PaliGemma): image and question see each other; the answer is causal. -> hi (N,)

    labels (N,) are shifted: the last token of the prefix carries the first label, because it predicts the first
    supervised token. A document without labels is all prefix. Source: PaliGemma, arXiv 2407.07726, section 3.2."""
    doc = (pos == 0).cumsum(0) - 1                                                                        # (N,)
    p = doc.bincount()                                                                                    # (D,)
    rows = labels != IGNORE
    p = p.scatter_reduce(0, doc[rows], pos[rows] + 1, "amin")[doc]                                        # (N,)
    return lo + torch.where(pos < p, p, pos + 1)


def image_block(ids, labels, pos, lo, image_id):
    """Tokens of an image see each other, and adjacent images count as one; all else is causal (Gemma 3). -> hi (N,)"""
    image = ids == image_id
    last = image & ~torch.cat([(image & (pos > 0))[1:], image.new_zeros(1)])                              # (N,)
    at = torch.arange(len(ids))
    end = torch.where(last, at, len(ids)).flip(0).cummin(0).values.flip(0)           # the next token that ends an image
    return torch.where(image, lo + pos + end - at, lo + pos) + 1


SPANS = {"causal": causal, "prefix": prefix, "image": image_block, "mmca": causal}


def span_ends(cfg):
    """Choose the mask of a VLMConfig -> a function. It takes ids, labels, pos, lo, each (N,), and returns hi (N,)."""
    return functools.partial(SPANS[cfg.mask], image_id=cfg.image_token_index)
