"""Fuyu (adept.ai/blog/fuyu-8b) has no vision transformer: one linear layer turns the pixels of a patch into a token.

An image is cut into tiles of one patch each (PatchRows of parts/tiles.py), so an image of any size is many tiles.

    I patches, each an image of its own   S side of a patch in pixels   C LLM width
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from model import LinearConnector, VisionConfig


@dataclass
class PatchesConfig(VisionConfig):
    model_type: str = "patches"
    hidden_size: int = 2700                  # 3 S^2
    num_hidden_layers: int = 1               # no block is built, because feature_layer is 0
    image_size: int = 30
    patch_size: int = 30
    feature_layer: int | tuple = 0
    image_mean: tuple = (0.5, 0.5, 0.5)
    image_std: tuple = (0.5, 0.5, 0.5)
    class_token = False


class Patches(nn.Module):
    """images (I, 3, S, S) uint8 -> normalised pixels (I, 1, 3 S^2), in the order [row, column, colour]"""

    blocks = ()

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg

    def forward(self, images):
        colours = zip(images.unbind(1), self.cfg.image_mean, self.cfg.image_std)
        return torch.stack([(c.float() / 255 - m) / s for c, m, s in colours], -1).flatten(1)[:, None]


class PatchConnector(LinearConnector):
    """(I, 1, 3 S^2) -> (I, 1, C). The tower has no weights, so its output gets the dtype of the weights here."""

    def forward(self, x):
        return super().forward(x.to(self.linear_1.weight.dtype))
