"""OPT, the language model of the first BLIP-2 (arXiv 2205.01068, section 2). It differs from Llama in five things:

    positions    a learned vector for each position, added to the embedding; no rotation. The table begins with two
                 rows that are never used: position 0 is row 2
    norms        LayerNorm, with mean and bias
    MLP          linear, ReLU, linear
    biases       in all linear layers of a block
    head         is the embedding table

    N tokens   C width
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import LayerNorm, Llama, LlamaLayer, TextConfig

UNUSED = 2      # rows of the position table before position 0


@dataclass
class OptConfig(TextConfig):
    model_type: str = "opt"
    vocab_size: int = 50272
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    head_dim: int = 64
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    qkv_bias: bool = True
    o_bias: bool = True


class OptMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


class OptLayer(LlamaLayer):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.mlp = OptMLP(cfg)
        self.input_layernorm, self.post_attention_layernorm = LayerNorm(cfg.hidden_size), LayerNorm(cfg.hidden_size)


class Opt(Llama):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.model.embed_positions = nn.Embedding(cfg.max_position_embeddings + UNUSED, cfg.hidden_size)
        self.model.layers = nn.ModuleList(OptLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.model.norm = LayerNorm(cfg.hidden_size)

    def forward(self, x, pos, lo, hi, rows=None, cache=None):
        """The arguments of Llama. All rotations get position 0, whose angle is 0: queries and keys stay as they are."""
        L = self.cfg.max_position_embeddings
        torch._assert_async((pos < L).all(), f"a conversation is longer than the {L} positions of this OPT")
        x = x + self.model.embed_positions(pos + UNUSED).to(x.dtype)
        return super().forward(x, torch.zeros_like(pos), lo, hi, rows, cache)
