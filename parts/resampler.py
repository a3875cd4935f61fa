"""Resampler, the connector of Qwen-VL (arXiv 2308.12966, section 2.1): learned queries look once at the image features.

    keys = norm(features A)      out = norm(attention(norm(queries) + p, keys + p', keys)) B

p and p' are sin-cos vectors of the places of queries and features on a grid; the values have none. p is not trained. It
is stored with the weights, as published. The features may lie on a finer grid than the queries: p' is p, resampled.

    I images   P features per image, m x m   Q queries, n x n   D feature width   C LLM width   E a width
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import stop
from model import LayerNorm
from parts.cross import CrossAttention, own_keys

EPS = 1e-6


def sincos(n, C):
    """-> (n, n, C): the first half of the channels says in which column a place is, the second half in which row. Each
    half is C/4 sines and C/4 cosines of the number times 10000^(-4 i / C), for i = 0 .. C/4 - 1."""
    f = 1e4 ** -(torch.arange(C // 4, dtype=torch.float64) * 4 / C)
    angles = torch.arange(n, dtype=torch.float64)[:, None] * f                                     # (n, C/4)
    one = torch.cat([angles.sin(), angles.cos()], -1)                                              # (n, C/2)
    return torch.cat([one[None].expand(n, n, -1), one[:, None].expand(n, n, -1)], -1).float()


def resized(grid, m):
    """grid (n, n, E) -> (m, m, E), bicubic and computed at least in fp32; the grid itself if m = n"""
    if len(grid) == m:
        return grid
    wide = grid.to(torch.promote_types(grid.dtype, torch.float32)).permute(2, 0, 1)[None]          # (1, E, n, n)
    return F.interpolate(wide, size=(m, m), mode="bicubic")[0].permute(1, 2, 0).to(grid.dtype)


class Resampler(nn.Module):
    """Image features (I, P, D) -> (I, Q, C). heads=None: of width 128, as published"""

    def __init__(self, D, C, Q, heads=None):
        super().__init__()
        n, heads = math.isqrt(Q), heads or C // 128
        if not Q or n * n != Q:
            stop(f"connector=resampler with tokens={Q}: its queries form a square, such as 16, 64 or 256 tokens")
        if C % 4 or not heads or C % heads:
            stop(f"connector=resampler of width {C} with {heads} heads (connector_args.heads)")
        self.query_embedding = nn.Parameter(torch.empty(Q, C))
        self.register_buffer("pos_embed", sincos(n, C))
        self.kv_proj = nn.Linear(D, C, bias=False) if D != C else nn.Identity()
        self.norm_q, self.norm_kv, self.norm = (LayerNorm(C, eps=EPS) for _ in range(3))
        self.attention = CrossAttention(C, heads)
        self.proj = nn.Parameter(torch.empty(C, C))

    def reset_parameters(self):
        nn.init.normal_(self.query_embedding, std=0.02)
        nn.init.normal_(self.proj, std=len(self.proj) ** -0.5)
        self.pos_embed.copy_(sincos(*self.pos_embed.shape[1:]))

    def forward(self, x):
        (I, P, _), Q, m = x.shape, len(self.query_embedding), math.isqrt(x.shape[1])
        if m * m != P:
            stop(f"connector=resampler: {P} features per image are no square (vision.keep_class=true adds one)")
        keys = self.norm_kv(self.kv_proj(x))                                                               # (I, P, C)
        p = self.pos_embed.to(keys.dtype)
        queries = self.norm_q(self.query_embedding.to(keys.dtype)) + p.flatten(0, 1)                       # (Q, C)
        queries = queries.expand(I, -1, -1).flatten(0, 1)                                                  # (I Q, C)
        placed = (keys + resized(p, m).flatten(0, 1)).flatten(0, 1)                                        # (I P, C)
        out = self.attention(queries, placed, keys.flatten(0, 1), *own_keys(I, Q, P, x.device))
        out = self.norm(out)
        return (out @ self.proj.to(out.dtype)).unflatten(0, (I, Q))
