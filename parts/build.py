"""Build a model from its config, with LLaVA's own parts or with parts of other systems that the config names."""

import images
import model
import parts.templates  # noqa: F401  (adds to chat.TEMPLATES)
from parts.features import FeatureTower
from parts.gemma import Gemma

CONNECTORS = {name: lambda cfg, kind=kind: kind(cfg.vision.hidden_size, cfg.text.hidden_size)
from parts.mmca import MMCADecoder, VisualChat
from parts.norm_connectors import LinearNorm, NormMLP
from parts.opt import Opt
from parts.qformer import QFormer, QFormerConfig
from parts.internvit import InternViT
from parts.perceiver import Perceiver
from parts.shuffle import ShuffleConnector, group_side
from parts.tiles import layout
from parts.two_towers import CommConnector, TwoTowers
              for name, kind in model.CONNECTORS.items()}                        # name -> function VLMConfig -> module
CONNECTORS["qformer"] = lambda cfg: QFormer(cfg.vision.hidden_size, cfg.text.hidden_size, cfg.tokens,
                                            QFormerConfig(**cfg.connector_args))
CONNECTORS["shuffle"] = lambda cfg: ShuffleConnector(cfg.vision.hidden_size, cfg.text.hidden_size,
                                                     group_side(cfg.vision.patches, cfg.tokens))
CONNECTORS["norm_mlp"] = lambda cfg: NormMLP(width(cfg), cfg.text.hidden_size, **cfg.connector_args)
CONNECTORS["linear_norm"] = lambda cfg: LinearNorm(width(cfg), cfg.text.hidden_size, **cfg.connector_args)
CONNECTORS["perceiver"] = lambda cfg: Perceiver(width(cfg), **cfg.connector_args)
CONNECTORS["comm"] = lambda cfg: comm(cfg)
TOWERS = {"internvl_vision": InternViT}                                          # model_type -> class
DECODERS = {"gemma": Gemma, "opt": Opt}                                                      # model_type -> class
DECODERS |= {"flamingo": FlamingoDecoder, "idefics": IdeficsDecoder, "mmca": MMCADecoder}        # mmca is a mask
VLMS = {"flamingo": Flamingo, "idefics": Flamingo, "mmca": VisualChat}                       # the same keys -> class


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
    return layout(cfg) if cfg.layout else images.Layout(cfg.image_token_index, cfg.image_tokens)
