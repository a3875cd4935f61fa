"""From a config to a model: LLaVA's own parts, or those of other systems, which a config names."""

import images
import model


def build(cfg):
    """VLMConfig -> VLM"""
    assert cfg.connector in model.CONNECTORS, f"connector {cfg.connector!r}: {', '.join(model.CONNECTORS)}"
    return model.VLM(cfg)


def image_layout(cfg):
    """VLMConfig -> what an image is in the sequence: images.Layout, or one of parts/tiles.py"""
    return images.Layout(cfg.image_token_index, cfg.image_tokens)
