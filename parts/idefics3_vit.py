"""The vision tower of Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): SigLIP with its last norm.

It can read images of any shape, as NaViT (arXiv 2307.06304): the place of a patch is a share of the image's height and
width, and its position is the row and column of the n x n table at these shares. Here all images are square tiles of
full size (parts/tiles.py, Split). Then patch (y, x) has row y and column x, as in SigLIP; parts/features.py builds the
tower. Transformers computes the shares in float32, and for some n it rounds to other rows: formats/idefics3.py refuses
these n. The published models have n = 26, 27 and 32, where it does not.
"""

from dataclasses import dataclass

import torch

from model import VisionConfig


@dataclass
class Idefics3ViTConfig(VisionConfig):
    model_type: str = "idefics3_vision"
    hidden_size: int = 1152
    intermediate_size: int = 3072
    num_attention_heads: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    feature_layer: int | tuple = -1
    feature_norm: bool = True
    image_mean: tuple = (0.5, 0.5, 0.5)
    image_std: tuple = (0.5, 0.5, 0.5)
    class_token = False


def table_rows(n):
    """-> (n,): for each row of patches of a full tile, the row of the table that transformers gives it"""
    share = (torch.arange(n, dtype=torch.float32, device="cpu") * (1 / n)).clamp(max=1 - 1e-6)
    return torch.bucketize(share, torch.arange(1 / n, 1.0, 1 / n, device="cpu"), right=True)
