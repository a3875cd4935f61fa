"""Which features of a vision tower the language model gets, where it is not LLaVA's one layer of patch features.

    last norm        PaliGemma (arXiv 2407.07726), BLIP-2 (arXiv 2301.12597): the features pass the tower's final norm
    class token      BLIP-2, Flamingo (arXiv 2204.14198): the class token is a feature, too
    several layers   COMM (arXiv 2310.08825), VipLlava: the features of several layers side by side on the channels

    I images   T tokens per image in the ViT   P features per image   D ViT width   M layers
"""

import torch

from model import LayerNorm, VisionTower


def feature_layers(cfg):
    """VisionConfig -> the indices of its feature layers, as a tuple"""
    return cfg.feature_layer if isinstance(cfg.feature_layer, tuple) else (cfg.feature_layer,)


def levels(cfg):
    """VisionConfig -> M"""
    return len(feature_layers(cfg))


class FeatureTower(VisionTower):
    """images (I, 3, S, S) uint8 -> features (I, P, M D)"""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.layers = [layer % (cfg.num_hidden_layers + 1) for layer in feature_layers(cfg)]
        if cfg.keep_class:
            self.skip = 0
        norm = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps) if cfg.feature_norm else None
        self.vision_model.post_layernorm = norm

    def forward(self, images):
        x, lo, hi = self.vision_model.tokens(images)
        shape, x = x.shape, x.flatten(0, 1)                                                # (I T, D)
        outputs = {0: x}  # {layer: output}; 0: the embeddings. Other layers are kept only if they are in self.layers
        for n, block in enumerate(self.vision_model.encoder.layers, 1):
            x = block(x, lo, hi)
            if n in self.layers:
                outputs[n] = x
        norm = self.vision_model.post_layernorm or (lambda x: x)
        return torch.cat([norm(outputs[n]).view(shape)[:, self.skip :] for n in self.layers], -1)
