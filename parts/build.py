"""From a config to a model: LLaVA's own parts, or those of other systems that the config names."""

import images
import model
import parts.templates  # noqa: F401  (adds to chat.TEMPLATES)
from parts.features import FeatureTower
from parts.gemma import Gemma

DECODERS = {"gemma": Gemma}


def build(cfg):
    """VLMConfig -> VLM"""
    v = cfg.vision
    tower = FeatureTower(v) if isinstance(v.feature_layer, tuple) or v.feature_norm or v.keep_class else None
    assert cfg.connector in model.CONNECTORS, f"connector {cfg.connector!r}: {', '.join(model.CONNECTORS)}"
    decoder = DECODERS[cfg.text.model_type](cfg.text) if cfg.text.model_type in DECODERS else None
    return model.VLM(cfg, tower, None, decoder)


def image_layout(cfg):
    """VLMConfig -> what an image is in the sequence: images.Layout, or one of parts/tiles.py"""
    return images.Layout(cfg.image_token_index, cfg.image_tokens)
