"""InternViT, the vision tower of InternVL 1.5 (arXiv 2404.16821, section 3.1): a ViT with a class token and trained
scales of the residual branches. It differs from model.py's ViT in four settings of its config:

    attention_bias   False: q, k and v have no bias
    use_qk_norm      True in the 6B kind: RMSNorm of queries and keys over the whole width, before the heads are split
    norm_type        rms_norm in the 6B kind, layer_norm in the 300M kind
    feature_norm     the last norm; use_mean_pooling=true in a published config.json means that there is none

    I images   T tokens per image   D width   H heads   K head width
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from kernels.attention import attention
from model import LayerNorm, RMSNorm, ViTAttention, ViTBlock, VisionConfig
from parts.features import FeatureTower


@dataclass
class InternViTConfig(VisionConfig):
    model_type: str = "internvl_vision"
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    feature_layer: int | tuple = -1
    attention_bias: bool = False
    use_qk_norm: bool = False
    norm_type: str = "layer_norm"            # layer_norm, rms_norm


class InternViTAttention(ViTAttention):
    def __init__(self, cfg):
        super().__init__(cfg)
        D = cfg.hidden_size
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(D, D, bias=cfg.attention_bias))
        self.q_norm, self.k_norm = (RMSNorm(D, 1e-6) if cfg.use_qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x, lo, hi):
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)            # (I T, D)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))                              # (I T, H, K)
        return self.out_proj(attention(q, k, v, lo, hi).flatten(1))


class InternViTBlock(ViTBlock):
    def __init__(self, cfg):
        super().__init__(cfg)
        D, Norm = cfg.hidden_size, RMSNorm if cfg.norm_type == "rms_norm" else LayerNorm
        self.self_attn = InternViTAttention(cfg)
        self.layer_norm1, self.layer_norm2 = (Norm(D, cfg.layer_norm_eps) for _ in range(2))
        self.layer_scale1, self.layer_scale2 = (nn.Parameter(torch.ones(D)) for _ in range(2))


class InternViT(FeatureTower):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.vision_model.encoder.layers = nn.ModuleList(InternViTBlock(cfg) for _ in range(cfg.depth))
