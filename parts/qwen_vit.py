"""Qwen-VL's vision tower (arXiv 2308.12966, section 2.1), OpenCLIP's ViT-bigG. Four things differ from CLIP's ViT:

    class token   there is none
    last layer    its output is used, without a norm: the resampler has one
    MLP           exact GELU
    positions     a table of 16 x 16 places. For an image of more patches it is resampled in every forward pass. So the
                  table of 224 x 224 pixels also serves 448 x 448, and trains at both sizes

    D width   n, m places along a side, of the table and of the image
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from model import LayerNorm, VisionConfig, VisionTower
from parts.resampler import resized


@dataclass
class QwenViTConfig(VisionConfig):
    model_type: str = "qwen_vl_vision"
    hidden_size: int = 1664
    intermediate_size: int = 8192
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    feature_layer: int | tuple = -1
    position_side: int = 16                  # n of the table of positions
    class_token = False


class Positions(nn.Module):
    """Takes the place of the table of positions: `weight` (m m, D) is read from a table (n n, D)"""

    def __init__(self, n, m, D):
        super().__init__()
        self.m, self.table = m, nn.Parameter(torch.empty(n * n, D))

    @property
    def weight(self):
        n = math.isqrt(len(self.table))
        return resized(self.table.unflatten(0, (n, n)), self.m).flatten(0, 1)


class QwenViT(VisionTower):
    def __init__(self, cfg):
        super().__init__(cfg)
        D, p, embeddings = cfg.hidden_size, cfg.patch_size, self.vision_model.embeddings
        embeddings.patch_embedding = nn.Conv2d(3, D, p, p, bias=False)
        embeddings.position_embedding = Positions(cfg.position_side, cfg.image_size // p, D)
        self.vision_model.pre_layrnorm = LayerNorm(D, eps=cfg.layer_norm_eps)
