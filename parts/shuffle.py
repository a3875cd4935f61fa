"""Pixel shuffle: r x r neighbouring patches become one token that is r^2 times as wide, so nothing is lost.

InternVL 1.5 (arXiv 2404.16821, section 3.1) has r = 2, then LayerNorm and an MLP. Idefics3 (arXiv 2408.12637) has
r = 2, SmolVLM (arXiv 2504.05299) r = 3 or 4, then one matrix without bias. The channels of the r x r patches stand side
by side in the order [row, column, channel]. torch's F.pixel_unshuffle has another order.

    I images   P patches per image, n x n   r side of a group   Q = P / r^2 tokens   D ViT width   C LLM width
"""

import math

import torch.nn as nn

from config import stop
from model import LayerNorm, MLPConnector


def pixel_shuffle(x, r):
    """x (I, P, D) -> (I, P / r^2, r^2 D)"""
    n = math.isqrt(x.shape[1])
    x = x.unflatten(1, (n // r, r, n // r, r)).transpose(2, 3)                           # (I, n/r, n/r, r, r, D)
    return x.flatten(1, 2).flatten(2)


def group_side(P, tokens):
    """-> r, so that P patches become `tokens` tokens"""
    n, m = math.isqrt(P), math.isqrt(tokens)
    if not tokens or n * n != P or m * m != tokens or n % m:
        stop(f"pixel shuffle cannot turn {P} patches into tokens={tokens}")
    return n // m


class ShuffleConnector(MLPConnector):
    """x (I, P, D) -> (I, Q, C)"""

    def __init__(self, D, C, r):
        super().__init__(r * r * D, C)
        self.r, self.layer_norm = r, LayerNorm(r * r * D, eps=1e-5)

    def forward(self, x):
        return super().forward(self.layer_norm(pixel_shuffle(x, self.r)))


class ShuffleLinear(nn.Module):
    """x (I, P, D) -> (I, Q, C)"""

    def __init__(self, D, C, r):
        super().__init__()
        self.r, self.linear_1 = r, nn.Linear(r * r * D, C, bias=False)

    def forward(self, x):
        return self.linear_1(pixel_shuffle(x, self.r))
