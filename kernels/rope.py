"""Rotary positions (Su et al. 2021), halves layout: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the
halves of a head.

Shapes: x (N, H, K), cos and sin (N, K/2) -> (N, H, K). The published checkpoints of the Llama family are permuted for
halves; Meta's originals and GGUF rotate neighbouring pairs instead."""

import torch


def rope(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # angles were fp32; only cosines are cast
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
