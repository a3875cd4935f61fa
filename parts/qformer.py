"""Q-Former, the connector of BLIP-2 (arXiv 2301.12597, section 3.1): a small BERT whose tokens are learned queries.

In each layer the queries of an image see each other. In every n-th layer, from the first one on, they also see the
features of the image. A linear layer maps the last states of the queries to the language model. So an image becomes Q
tokens, whatever its number of patches. A LayerNorm follows each residual sum (post-LN), as in BERT.

The published code drops 10 % of the activations in training. This code has no dropout. The published Q-Former begins
as BERT. A new one here begins with self-attention that adds 0: if it adds a mean of all queries from the first step,
the queries become equal in training, and then Q tokens say no more than one.

    I images   P features per image   D their width   Q queries   E width of the Q-Former   C LLM width
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import stop
from model import LayerNorm
from parts.cross import CrossAttention, ZeroLinear, own_keys


@dataclass
class QFormerConfig:
    """The names of the published config.json; VLMConfig.connector_args holds the same as a dict"""
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    cross_attention_frequency: int = 2       # the n of "every n-th layer"
    layer_norm_eps: float = 1e-12


class QFormerLayer(nn.Module):
    def __init__(self, cfg, D, looks):
        """looks: does this layer see the image?"""
        super().__init__()
        E, heads, hidden, eps = cfg.hidden_size, cfg.num_attention_heads, cfg.intermediate_size, cfg.layer_norm_eps
        self.attention, self.attention_norm = CrossAttention(E, heads), LayerNorm(E, eps=eps)
        self.attention.out_proj = ZeroLinear(E, E)
        self.cross = CrossAttention(E, heads, D) if looks else None
        self.cross_norm = LayerNorm(E, eps=eps) if looks else None
        self.fc1, self.fc2, self.mlp_norm = nn.Linear(E, hidden), nn.Linear(hidden, E), LayerNorm(E, eps=eps)

    def forward(self, x, image, own, seen):
        """x (I Q, E), image (I P, D); own, seen: the key ranges of the queries in x and in image -> (I Q, E)"""
        return self.look(self.attention_norm.add(x, self.attention(x, x, x, *own))[1], image, seen)

    def look(self, x, image, seen):
        """What follows self-attention"""
        if self.cross is not None:
            x = self.cross_norm.add(x, self.cross(x, image, image, *seen))[1]
        return self.mlp_norm.add(x, self.fc2(F.gelu(self.fc1(x))))[1]


class QFormer(nn.Module):
    """Image features (I, P, D) -> (I, Q, C)"""

    def __init__(self, D, C, Q, cfg):
        super().__init__()
        if Q < 1 or cfg.hidden_size % cfg.num_attention_heads:
            stop(f"a Q-Former of {Q} queries, width {cfg.hidden_size} with {cfg.num_attention_heads} heads: tokens= "
                 "and connector_args say what it has")
        self.query_embedding = nn.Parameter(torch.empty(Q, cfg.hidden_size))
        self.norm = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.layers = nn.ModuleList(QFormerLayer(cfg, D, looks=n % cfg.cross_attention_frequency == 0)
                                    for n in range(cfg.num_hidden_layers))
        self.projection = nn.Linear(cfg.hidden_size, C)

    def forward(self, image):
        (I, P, _), Q = image.shape, len(self.query_embedding)
        own, seen = own_keys(I, Q, Q, image.device), own_keys(I, Q, P, image.device)
        x = self.norm(self.query_embedding.to(image.dtype)).expand(I, -1, -1).flatten(0, 1)                # (I Q, E)
        image = image.flatten(0, 1)                                                                        # (I P, D)
        for layer in self.layers:
            x = layer(x, image, own, seen)
        return self.projection(x).unflatten(0, (I, Q))
