"""Persimmon, the language model of Fuyu (adept.ai/blog/persimmon-8b). It differs from Llama in five things:

    norms        LayerNorm, with a bias
    MLP          down(relu(up(x))^2), without a gate
    biases       in all linear layers
    q and k      have a LayerNorm over each head, before the rotation
    rotation     of the first part of each head only (partial_rotary_factor)

    N tokens   R tokens with a label   C width   H heads   K head width   r rotated width of a head
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.attention import attention
from kernels.rope import rope_qk
from model import LayerNorm, Llama, LlamaAttention, LlamaLayer, TextConfig, rope_frequencies, take


@dataclass
class PersimmonConfig(TextConfig):
    model_type: str = "persimmon"
    vocab_size: int = 262144
    intermediate_size: int = 16384
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int = 64
    head_dim: int = 64
    max_position_embeddings: int = 16384
    rope_theta: float = 25000.0
    qkv_bias: bool = True
    o_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = True
    layer_norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.5

    @property
    def rotated(self):
        return int(self.head_dim * self.partial_rotary_factor)


class PersimmonAttention(LlamaAttention):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.r = cfg.rotated
        if cfg.qk_norm:
            self.q_norm, self.k_norm = (LayerNorm(self.K, cfg.layer_norm_eps) for _ in range(2))

    def forward(self, x, cos, sin, lo, hi, rows=None, cache=None):
        """x (N, C) -> (N, C), or (R, C) for the tokens `rows`"""
        q, k, v = (t.unflatten(-1, (-1, self.K)) for t in self.qkv(x, rows))                          # (N or R, H, K)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        turned = rope_qk(q[..., : self.r], k[..., : self.r], cos, sin, rows)                          # (N or R, H, r)
        q, k = (torch.cat([t, x[..., self.r :]], -1) for t, x in zip(turned, (q, k)))
        if cache is not None:
            k, v = cache.append(self, k, v)
        return self.o_proj(attention(q, k, v, take(lo, rows), take(hi, rows)).flatten(1))


class PersimmonMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=cfg.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)) ** 2)


class PersimmonLayer(LlamaLayer):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.self_attn, self.mlp = PersimmonAttention(cfg), PersimmonMLP(cfg)
        self.input_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.post_attention_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)


class Persimmon(Llama):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.model.layers = nn.ModuleList(PersimmonLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.model.norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)

    def forward(self, x, pos, lo, hi, rows=None, cache=None):
        frequencies = rope_frequencies(dataclasses.replace(self.cfg, head_dim=self.cfg.rotated), x.device)   # (r/2,)
        angles = (pos[:, None] + self.cfg.first_position).float() * frequencies                       # (N, r/2)
        cos, sin = angles.cos(), angles.sin()
        for layer in self.model.layers[:-1]:
            x = layer(x, cos, sin, lo, hi, cache=cache)
        return self.model.norm(self.model.layers[-1](x, cos, sin, lo, hi, rows, cache))
