"""EVA-CLIP's ViT-g, the vision tower of BLIP-2 (arXiv 2211.07636; BLIP-2: arXiv 2301.12597, section 3.1).

It is a ViT like CLIP's, with a bias on the patches and without a norm in front of the blocks. BLIP-2 leaves out the
last of its 40 blocks. All T tokens go to the Q-Former, the class token too, after a norm ("ln_vision") that BLIP-2
trains. So parts/features.py builds the tower from this config. The published q, k and v are one matrix, which
formats/blip2.py cuts.
"""

from dataclasses import dataclass

from model import VisionConfig


@dataclass
class EvaConfig(VisionConfig):
    model_type: str = "blip_2_vision_model"
    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    feature_layer: int | tuple = -1
    feature_norm: bool = True
    keep_class: bool = True
