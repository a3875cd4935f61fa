"""The connectors of MM1 (arXiv 2403.09611, section 3.1) that turn P patches into a chosen number of tokens. Both pool
the grid of patches by averages. (MM1's third connector is a resampler: attention pooling.)

    average       the averages, then one linear layer
    abstractor    C-Abstractor of Honeybee (arXiv 2312.06742, section 3.2): position embeddings, residual blocks of
                  convolutions, averages, more blocks, an MLP. Its blocks are those of RegNet (arXiv 2003.13678) with
                  squeeze-and-excitation (arXiv 1709.01507), LayerNorm and SiLU

    I images   P patches per image, n x n   Q = m x m tokens   D ViT width   W width of the blocks   C LLM width
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import stop
from model import LayerNorm, LinearConnector


def sides(P, tokens):
    """-> n, m of the grids of P patches and of `tokens` tokens"""
    n, m = math.isqrt(P), math.isqrt(tokens)
    if n * n != P or m * m != tokens or not 0 < m <= n:
        stop(f"pooling cannot turn {P} patches into tokens={tokens}")
    return n, m


def averages(n, m, like):
    """-> (m, n): row i has the weights of the patches from floor(i n / m) to ceil((i + 1) n / m), 1 / their number.
    This is the window of torch's adaptive average pooling. It has the dtype and the device of tensor `like`"""
    i, j = torch.arange(m, device=like.device)[:, None], torch.arange(n, device=like.device)
    first, end = i * n // m, -(-(i + 1) * n // m)                                                      # (m, 1)
    return ((first <= j) & (j < end)).to(like.dtype) / (end - first)


def pool(x, m):
    """x (I, n, n, D) -> (I, m, m, D)"""
    A = averages(x.shape[1], m, x)
    return torch.einsum("an,ijnd->ijad", A, torch.einsum("bm,imnd->ibnd", A, x))


class PoolConnector(LinearConnector):
    """x (I, P, D) -> (I, Q, C)"""

    def __init__(self, D, C, n, m):
        super().__init__(D, C)
        self.n, self.m = n, m

    def forward(self, x):
        return super().forward(pool(x.unflatten(1, (self.n, self.n)), self.m).flatten(1, 2))


class ConvBlock(nn.Module):
    """x (I, n, n, D) -> (I, n, n, W): a residual block. Each channel is scaled by a gate that sees the whole image."""

    def __init__(self, D, W):
        super().__init__()
        self.linear_in = nn.Linear(D, W, bias=False)
        self.conv = nn.Conv2d(W, W, 3, padding=1, groups=W, bias=False)        # one 3 x 3 filter per channel
        self.linear_squeeze, self.linear_excite = nn.Linear(W, round(D / 4)), nn.Linear(round(D / 4), W)
        self.linear_out = nn.Linear(W, W, bias=False)
        self.norm_in, self.norm_conv, self.norm_out = (LayerNorm(W, eps=1e-5) for _ in range(3))
        self.linear_skip, self.norm_skip = None, None
        if D != W:
            self.linear_skip, self.norm_skip = nn.Linear(D, W, bias=False), LayerNorm(W, eps=1e-5)

    def forward(self, x):
        y = F.silu(self.norm_in(self.linear_in(x)))                                                # (I, n, n, W)
        y = self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = F.silu(self.norm_conv(y))
        gate = self.linear_excite(F.silu(self.linear_squeeze(y.mean((1, 2), keepdim=True))))       # (I, 1, 1, W)
        y = self.norm_out(self.linear_out(y * gate.sigmoid()))
        return F.silu(y + (x if self.linear_skip is None else self.norm_skip(self.linear_skip(x))))


class Abstractor(nn.Module):
    """x (I, P, D) -> (I, Q, C)"""

    def __init__(self, D, C, n, m, width=1024, depth=3):
        super().__init__()
        self.n, self.m = n, m
        self.position_embedding = nn.Parameter(torch.randn(n * n, D) * 0.02)
        self.before = nn.Sequential(*(ConvBlock(width if i else D, width) for i in range(depth)))
        self.after = nn.Sequential(*(ConvBlock(width, width) for _ in range(depth)))
        self.linear_1, self.linear_2 = nn.Linear(width, C), nn.Linear(C, C)

    def forward(self, x):
        x = (x + self.position_embedding.to(x.dtype)).unflatten(1, (self.n, self.n))               # (I, n, n, D)
        x = self.after(pool(self.before(x), self.m)).flatten(1, 2)                                 # (I, Q, W)
        return self.linear_2(F.silu(self.linear_1(x)))
