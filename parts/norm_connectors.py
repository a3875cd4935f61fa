"""Connectors of linear layers and a LayerNorm.

    norm_mlp       VipLlava (arXiv 2312.00784, section 3.1): LayerNorm, linear, GELU, linear
    linear_norm    DeepSpeed-VisualChat (arXiv 2309.14327, section 4): linear, LayerNorm with eps 1e-12

    I images   P features per image   D width of a feature   C width of the language model
"""

import torch.nn as nn

from model import LayerNorm, MLPConnector


class NormMLP(MLPConnector):
    """(I, P, D) -> (I, P, C)"""

    def __init__(self, D, C, eps=1e-5):
        super().__init__(D, C)
        self.norm = LayerNorm(D, eps=eps)

    def forward(self, x):
        return super().forward(self.norm(x))


class LinearNorm(nn.Module):
    """(I, P, D) -> (I, P, C)"""

    def __init__(self, D, C, eps=1e-12):
        super().__init__()
        self.linear_1 = nn.Linear(D, C)
        self.norm = LayerNorm(C, eps=eps)

    def forward(self, x):
        return self.norm(self.linear_1(x))
