"""Build a model from its config, with LLaVA's own parts or with parts of other systems that the config names."""

import images
import model
import parts.templates  # noqa: F401  (adds to chat.TEMPLATES)
from parts.features import FeatureTower
from parts.gemma import Gemma

CONNECTORS = {name: lambda cfg, kind=kind: kind(cfg.vision.hidden_size, cfg.text.hidden_size)
              for name, kind in model.CONNECTORS.items()}                        # name -> function VLMConfig -> module
TOWERS = {}                                                                      # model_type -> class
DECODERS = {"gemma": Gemma}                                                      # model_type -> class


def build(cfg):
    """VLMConfig -> VLM"""
    assert cfg.connector in CONNECTORS, f"connector {cfg.connector!r}: {', '.join(CONNECTORS)}"
    decoder = DECODERS.get(cfg.text.model_type, model.Llama)(cfg.text)
    return model.VLM(cfg, build_tower(cfg.vision), CONNECTORS[cfg.connector](cfg), decoder)


def build_tower(v):
    """VisionConfig -> vision tower"""
    special = isinstance(v.feature_layer, tuple) or v.feature_norm or v.keep_class
    return TOWERS.get(v.model_type, FeatureTower if special else model.VisionTower)(v)


def image_layout(cfg):
    """VLMConfig -> what an image is in the sequence: images.Layout, or one of parts/tiles.py"""
    return images.Layout(cfg.image_token_index, cfg.image_tokens)
