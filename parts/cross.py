"""Attention in which the tokens of one sequence see the tokens of another one. Connectors with learned queries need it.

Both sequences are packed, without padding: the queries of all images, and the keys of all images. So "the queries of an
image see the features of the same image" is one span [lo, hi) for each query (kernels/attention.py).

    I images   Q queries and M keys per image   N queries and L keys in all   C width of queries   E width of keys
"""

import torch
import torch.nn as nn

from kernels.attention import attention


def own_keys(images, Q, M, device):
    """Each query sees all M keys of its own image, and no others -> lo, hi (I Q,) int32"""
    lo = torch.arange(images, dtype=torch.int32, device=device).repeat_interleave(Q) * M
    return lo, lo + M


class Projection(nn.Linear):
    """A linear layer whose new weights are N(0, 1/sqrt(fan in)), biases 0. The weights of torch's own nn.Linear begin
    smaller, by sqrt(3). The scores of a new attention are then so equal that its queries long see only a mean."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """A linear layer whose new weights and biases are 0: what it is added to begins unchanged"""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class CrossAttention(nn.Module):
    """q (N, C), k and v (L, E) -> (N, C)"""

    def __init__(self, C, heads, E=None):
        super().__init__()
        self.heads, E = heads, E or C
        self.q_proj, self.k_proj, self.v_proj = Projection(C, C), Projection(E, C), Projection(E, C)
        self.out_proj = Projection(C, C)

    def forward(self, q, k, v, lo, hi):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1))
                   for f, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v)))             # (N or L, H, K)
        return self.out_proj(attention(q, k, v, lo, hi).flatten(1))
