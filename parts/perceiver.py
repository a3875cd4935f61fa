"""The perceiver resampler of Flamingo: Q trained latents read the features of an image, so every image gets Q tokens.

Source: arXiv 2204.14198, section 2.1 and appendix A.1.1. In each layer, the latents x are the queries. Keys and values
come from the features and from the latents themselves. No linear layer has a bias, and there are no positions:

    x = x + attention(norm(x), [norm(features), norm(x)])        x = x + act(norm(x) A) B        at the end: norm(x)

The paper's act is relu(x)^2, that of Idefics is relu(x). Idefics can also normalise queries and keys (qk_norm).

    I images   P features per image   Q latents   D width of features and latents   H heads   K head width
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.attention import attention
from model import LayerNorm

ACTS = {"relu2": lambda x: F.relu(x).square(), "relu": F.relu}


class PerceiverLayer(nn.Module):
    def __init__(self, D, H, K, act, qk_norm):
        super().__init__()
        self.K, self.act = K, ACTS[act]
        self.norm_features, self.norm_latents, self.norm_mlp = (LayerNorm(D) for _ in range(3))
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(D, H * K, bias=False) for _ in range(3))
        self.linear_out = nn.Linear(H * K, D, bias=False)
        self.q_norm, self.k_norm = (LayerNorm(K) if qk_norm else None for _ in range(2))
        self.linear_1 = nn.Linear(D, 4 * D, bias=False)
        self.linear_2 = nn.Linear(4 * D, D, bias=False)

    def forward(self, features, x, lo, hi):
        """features (I, P, D), x (I, Q, D) -> (I, Q, D). lo, hi (I Q,): the keys of the image of each latent"""
        y = self.norm_latents(x)
        keys = torch.cat([self.norm_features(features), y], 1).flatten(0, 1)                       # (I (P + Q), D)
        q, k, v = (t.unflatten(-1, (-1, self.K)) for t in
                   (self.linear_q(y.flatten(0, 1)), self.linear_k(keys), self.linear_v(keys)))    # (.., H, K)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        x = x + self.linear_out(attention(q, k, v, lo, hi).flatten(1)).view(x.shape)
        return x + self.linear_2(self.act(self.linear_1(self.norm_mlp(x))))


class Perceiver(nn.Module):
    """features (I, P, D) -> (I, Q, D)"""

    def __init__(self, D, latents=64, depth=6, heads=16, head_dim=96, act="relu2", qk_norm=False):
        super().__init__()
        self.latent_embedding = nn.Parameter(torch.randn(latents, D) * 0.02)
        self.layers = nn.ModuleList(PerceiverLayer(D, heads, head_dim, act, qk_norm) for _ in range(depth))
        self.norm = LayerNorm(D)

    def forward(self, features):
        I, P, _ = features.shape
        Q = len(self.latent_embedding)
        x = self.latent_embedding.to(features.dtype).expand(I, -1, -1)                             # (I, Q, D)
        lo = torch.arange(0, I * (P + Q), P + Q, dtype=torch.int32, device=x.device).repeat_interleave(Q)     # (I Q,)
        for layer in self.layers:
            x = layer(features, x, lo, lo + P + Q)
        return self.norm(x)
