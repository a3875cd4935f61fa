"""Gemma, the language model of PaliGemma (arXiv 2403.08295, section 2). It differs from Llama in four things:

    norms        multiply by 1 + w, so that w = 0 leaves the normalised value
    MLP          gelu(gate) up instead of silu(gate) up
    embeddings   of text are multiplied by sqrt(C); image features are not
    head         is the embedding table

    N tokens   C width   V vocabulary
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.norm import rms_norm
from model import Llama, LlamaLayer, LlamaMLP, RMSNorm, TextConfig


@dataclass
class GemmaConfig(TextConfig):
    model_type: str = "gemma"
    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 256
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True


class GemmaNorm(RMSNorm):
    def forward(self, x):
        return rms_norm(x, 1 + self.weight, self.eps)

    def add(self, x, h):
        return rms_norm(x, 1 + self.weight, self.eps, h)


class GemmaMLP(LlamaMLP):
    def forward(self, x):
        gate, up = self.gate_up(x)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


class GemmaLayer(LlamaLayer):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.mlp = GemmaMLP(cfg)
        self.input_layernorm = GemmaNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = GemmaNorm(cfg.hidden_size, cfg.rms_norm_eps)


class Gemma(Llama):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.model.layers = nn.ModuleList(GemmaLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.model.norm = GemmaNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def embed(self, ids):
        """ids (N,) -> (N, C). As in transformers, sqrt(C) is rounded to the dtype of the embeddings."""
        x = self.model.embed_tokens(ids)
        return x * torch.tensor(self.cfg.hidden_size**0.5, dtype=x.dtype)
