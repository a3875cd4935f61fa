"""LLaVA-NeXT, also called LLaVA-1.6 (llava-vl.github.io/blog/2024-01-30-llava-next): images keep their aspect ratio.

The vision tower sees a small picture of the whole image, and the image in tiles (parts/tiles.py, Anyres). The features
of all tiles are one picture. Its black borders are dropped, and one trained vector ends each row:

    z (I, P, C)  ->  n x n features of the small picture, then R rows of [C features of the tiles, image_newline]

The first placeholder of an image says which grid and which borders (its id is four numbers, see Anyres). So each token
can compute which feature it needs, from the ids alone: images of all sizes share one stream.

    N tokens of the stream   I tiles of all images   P = n x n features per tile   C LLM width, in Anyres a number of
    features
"""

import math

import torch
import torch.nn as nn

from model import VLM, MLPConnector


def sources(ids, image_id, n, I):
    """ids (N,) -> (N,): which row of [N token embeddings, I P features, image_newline] each token gets"""
    N, P, at = len(ids), n * n, torch.arange(len(ids), device=ids.device)
    first = ids >= 1 << 24                                                                  # (N,) begins an image
    start = torch.where(first, at, 0).cummax(0).values                                      # begin of the last image
    rows, columns, R, C = (ids[start] >> shift & 255 for shift in (24, 16, 8, 0))           # (N,) each, as in Anyres
    tiles = torch.where(first, 1 + rows * columns, 0)
    before = (tiles.cumsum(0) - tiles)[start]                                               # tiles of the images before
    placeholder = first | (ids == image_id)
    tokens = torch.where(first, P + R * (C + 1), 0)
    torch._assert_async(tiles.sum() == I, "not as many tiles as the image placeholders say")
    torch._assert_async(tokens.sum() == placeholder.sum(), "not as many placeholders as features")
    i = at - start                                                                          # place within the image
    y, x = (i - P) // (C + 1), (i - P) % (C + 1)                                            # place within the picture
    end = (i >= P) & (x == C)
    y, x = y + (rows * n - R) // 2, x + (columns * n - C) // 2                             # with the upper, left border
    tile = torch.where(i < P, before, before + 1 + y // n * columns + x // n)
    feature = tile * P + torch.where(i < P, i, y % n * n + x % n)
    return torch.where(placeholder, torch.where(end, N + I * P, N + feature), at)


class AnyresConnector(MLPConnector):
    """(I, P, D) -> (I, P, C), and the vector that ends a row of features"""

    def __init__(self, D, C):
        super().__init__(D, C)
        self.image_newline = nn.Parameter(torch.empty(C))

    def reset_parameters(self):
        nn.init.normal_(self.image_newline, std=len(self.image_newline) ** -0.5)


class AnyresVLM(VLM):
    def inputs(self, ids, pos, images, cache=None):
        """As VLM.inputs, without a host-device sync"""
        x = self.language_model.embed(torch.where(ids >> 24 > 0, self.cfg.image_token_index, ids))          # (N, C)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        z = self.image_features(images).flatten(0, 1)                                                     # (I P, C)
        newline = self.multi_modal_projector.image_newline[None]
        at = sources(ids, self.cfg.image_token_index, math.isqrt(self.cfg.image_tokens), len(images))
        return [torch.cat([x, z.to(x.dtype), newline.to(x.dtype)])[at]]
