"""COMM: the features of several layers of two vision towers become one feature per patch.

Source: arXiv 2310.08825, section 4 (CLIP, layers 1 to 24, and DINOv2, layers 19 to 24). Layer m of tower t gives the
features x_tm. The weights a_tm, one number per layer, are trained:

    v_t = sum over m of a_tm Linear_tm(LayerNorm_tm(x_tm))        out = Linear([v_1, MLP(v_2)])

The paper does not name the activation of the MLP; it is GELU here. The weights begin at 1 / (number of layers).

    I images   P patches per image   D, E widths of the first and the second tower   L, M their numbers of layers
    C width of the language model
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import stop
from model import LayerNorm
from parts.features import FeatureTower


class TwoTowers(FeatureTower):
    """images (I, 3, S, S) uint8 -> features (I, P, L D + M E). Each tower normalises the pixels in its own way."""

    def __init__(self, cfg, second):
        super().__init__(cfg)
        self.second = FeatureTower(second)
        if (cfg.image_size, cfg.patches, cfg.keep_class) != (second.image_size, second.patches, second.keep_class):
            stop(f"two towers need images of one size and the same patches: {cfg.patches} patches of {cfg.image_size} "
                 f"pixels and {second.patches} of {second.image_size}")

    @property
    def blocks(self):
        return [*super().blocks, *self.second.blocks]

    def forward(self, images):
        return torch.cat([super().forward(images), self.second(images)], -1)


class Levels(nn.Module):
    """(I, P, L D): the features of L layers side by side -> their weighted sum (I, P, D)"""

    def __init__(self, L, D):
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(D) for _ in range(L))
        self.linears = nn.ModuleList(nn.Linear(D, D) for _ in range(L))
        self.level_weights = nn.Parameter(torch.empty(L))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.level_weights, 1 / len(self.level_weights))

    def forward(self, x):
        parts = zip(self.level_weights, self.linears, self.norms, x.chunk(len(self.norms), -1))
        return sum(a.to(x.dtype) * linear(norm(part)) for a, linear, norm, part in parts)


class CommConnector(nn.Module):
    """(I, P, L D + M E) -> (I, P, C). ratio: width of the MLP / E"""

    def __init__(self, D, L, E, M, C, ratio=4):
        super().__init__()
        self.split = L * D
        self.first, self.second = Levels(L, D), Levels(M, E)
        self.linear_1 = nn.Linear(E, ratio * E)
        self.linear_2 = nn.Linear(ratio * E, E)
        self.linear_3 = nn.Linear(D + E, C)

    def forward(self, x):
        a, b = self.first(x[..., : self.split]), self.second(x[..., self.split :])             # (I, P, D), (I, P, E)
        return self.linear_3(torch.cat([a, self.linear_2(F.gelu(self.linear_1(b)))], -1))
