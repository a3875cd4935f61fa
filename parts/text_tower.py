"""Text towers of CLIP and SigLIP: a caption becomes one vector. Texts are packed; a text is one document of the stream.

    CLIP      arXiv 2103.00020, section 2.4: a token sees itself and earlier tokens; the state of EOS, the last token
    SigLIP    arXiv 2303.15343: all tokens of a text see each other; the state of the last token, then a linear layer.
              Each text is filled up to 64 tokens, and these padding tokens are read like all others

The blocks are those of the vision towers. The spans [lo, hi) of the batch say which tokens a token sees.

    N tokens of the stream   B texts   D width
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from kernels.cross_entropy import IGNORE
from model import LayerNorm, ViTBlock


@dataclass
class TextTowerConfig:
    """The names of the published config.json. The defaults are those of transformers' CLIPTextConfig"""
    model_type: str = "clip_text_model"      # or siglip_text_model
    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def causal(self):
        return self.model_type == "clip_text_model"


def last_tokens(labels, rows):
    """-> (B,) places of the last tokens. The one label of a text stands before its last token: labels are shifted.
    rows: of the labels, or empty; then a GPU makes the CPU wait"""
    return (rows if len(rows) else (labels != IGNORE).nonzero()[:, 0]) + 1


class TextTower(nn.Module):
    """data.Batch -> (B, D); with a head (SigLIP): (B, E)"""

    def __init__(self, cfg, E):
        super().__init__()
        D = cfg.hidden_size
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(cfg.vocab_size, D)
        self.embeddings.position_embedding = nn.Embedding(cfg.max_position_embeddings, D)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.num_hidden_layers))
        self.final_layer_norm = LayerNorm(D, eps=cfg.layer_norm_eps)
        self.head = None if cfg.causal else nn.Linear(D, E)

    def forward(self, ids, labels, pos, lo, hi, images, weights=None, rows=()):
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding(pos)                 # (N, D)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))                  # autocast does not cast embeddings
        for block in self.encoder.layers:
            x = block(x, lo, hi)
        x = self.final_layer_norm(x[last_tokens(labels, rows)])                                            # (B, D)
        return x if self.head is None else self.head(x)
