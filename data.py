"""LLaVA json or jsonl plus a folder of images -> packed batches."""

from typing import NamedTuple

import torch

from chat import IGNORE


class Batch(NamedTuple):
    """One packed stream of N tokens from many conversations; I images, in the order of their holes."""
    ids: torch.Tensor     # (N,) int64
    labels: torch.Tensor  # (N,) int64: the id that this position must predict, or -100
    pos: torch.Tensor     # (N,) int64, from 0 in every conversation
    lo: torch.Tensor      # (N,) int32: a token reads the keys lo <= j < hi of the stream
    hi: torch.Tensor      # (N,) int32
    images: torch.Tensor  # (I, 3, S, S) uint8


def pack(examples, side):
    """[(ids, labels, images (i, 3, side, side) uint8)] -> one Batch. Labels are shifted here, each conversation on its own, so that
    no token is asked to predict the beginning of a stranger."""
    lengths = torch.tensor([len(ids) for ids, _, _ in examples], dtype=torch.long)
    starts = lengths.cumsum(0) - lengths
    ids = torch.tensor([i for ids, _, _ in examples for i in ids], dtype=torch.long)
    labels = torch.tensor([i for _, labels, _ in examples for i in [*labels[1:], IGNORE]], dtype=torch.long)
    lo = starts.repeat_interleave(lengths)
    at = torch.arange(len(ids))
    images = [images for _, _, images in examples if len(images)]
    images = torch.cat(images) if images else torch.zeros(0, 3, side, side, dtype=torch.uint8)
    return Batch(ids, labels, at - lo, lo.int(), at.int() + 1, images)
