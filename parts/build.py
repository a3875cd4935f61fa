"""Build a model from its config, with LLaVA's own parts or with parts of other systems that the config names."""

import images
import model
import parts.templates  # noqa: F401  (adds to chat.TEMPLATES)
from config import stop
from parts.anyres import AnyresConnector, AnyresVLM
from parts.cross_attention import Flamingo, FlamingoDecoder, IdeficsDecoder
from parts.features import FeatureTower, levels
from parts.gemma import Gemma
from parts.instruct import InstructConfig, InstructQFormer, InstructVLM
from parts.mmca import MMCADecoder, VisualChat
from parts.norm_connectors import LinearNorm, NormMLP
from parts.opt import Opt
from parts.patches import PatchConnector, Patches
from parts.qformer import QFormer, QFormerConfig
from parts.internvit import InternViT
from parts.perceiver import Perceiver
from parts.qwen_vit import QwenViT
from parts.resampler import Resampler
from parts.persimmon import Persimmon
from parts.pool import Abstractor, PoolConnector, sides
from parts.shuffle import ShuffleConnector, ShuffleLinear, group_side
from parts.spans import SPANS
from parts.tiles import layout
from parts.two_towers import CommConnector, TwoTowers

CONNECTORS = {name: lambda cfg, kind=kind: kind(width(cfg), cfg.text.hidden_size)
              for name, kind in model.CONNECTORS.items()}                        # name -> function VLMConfig -> module
CONNECTORS["qformer"] = lambda cfg: QFormer(width(cfg), cfg.text.hidden_size, cfg.tokens,
                                            QFormerConfig(**cfg.connector_args))
CONNECTORS["instruct"] = lambda cfg: instruct(cfg, InstructConfig(**cfg.connector_args))
CONNECTORS["resampler"] = lambda cfg: Resampler(width(cfg), cfg.text.hidden_size, cfg.tokens, **cfg.connector_args)
CONNECTORS["shuffle"] = lambda cfg: ShuffleConnector(cfg.vision.hidden_size, cfg.text.hidden_size,
                                                     group_side(cfg.vision.patches, cfg.tokens))
CONNECTORS["shuffle_linear"] = lambda cfg: ShuffleLinear(cfg.vision.hidden_size, cfg.text.hidden_size,
                                                         group_side(cfg.vision.patches, cfg.tokens))
CONNECTORS["norm_mlp"] = lambda cfg: NormMLP(width(cfg), cfg.text.hidden_size, **cfg.connector_args)
CONNECTORS["linear_norm"] = lambda cfg: LinearNorm(width(cfg), cfg.text.hidden_size, **cfg.connector_args)
CONNECTORS["perceiver"] = lambda cfg: Perceiver(width(cfg), **cfg.connector_args)
CONNECTORS["pool"] = lambda cfg: PoolConnector(width(cfg), cfg.text.hidden_size, *sides(cfg.vision.patches, cfg.tokens))
CONNECTORS["abstractor"] = lambda cfg: Abstractor(width(cfg), cfg.text.hidden_size,
                                                  *sides(cfg.vision.patches, cfg.tokens), **cfg.connector_args)
CONNECTORS["patches"] = lambda cfg: PatchConnector(width(cfg), cfg.text.hidden_size)
CONNECTORS["anyres"] = lambda cfg: AnyresConnector(width(cfg), cfg.text.hidden_size)
CONNECTORS["comm"] = lambda cfg: comm(cfg)
TOWERS = {"internvl_vision": InternViT, "patches": Patches, "qwen_vl_vision": QwenViT}           # model_type -> class
DECODERS = {"gemma": Gemma, "opt": Opt, "persimmon": Persimmon}                                  # model_type -> class
DECODERS |= {"flamingo": FlamingoDecoder, "idefics": IdeficsDecoder, "mmca": MMCADecoder}        # mmca: cfg.mask
VLMS = {"flamingo": Flamingo, "idefics": Flamingo, "mmca": VisualChat, "instruct": InstructVLM}   # or connector
VLMS["anyres"] = AnyresVLM
ONE_EACH = ("linear", "mlp", "norm_mlp", "linear_norm", "comm", "anyres")       # connectors: one token per patch
NO_ARGS = ("linear", "mlp", "shuffle", "shuffle_linear", "pool", "patches", "anyres")    # connectors without settings


def build(cfg):
    """VLMConfig -> VLM"""
    if cfg.connector not in CONNECTORS:
        stop(f"connector {cfg.connector!r}: {', '.join(CONNECTORS)}")
    if cfg.connector_args and cfg.connector in NO_ARGS:
        stop(f"connector={cfg.connector} has no settings, so connector_args={cfg.connector_args} would not be read")
    for v in (cfg.vision, cfg.second):
        L, layers = (v.num_hidden_layers, v.feature_layer) if v else (0, 0)
        if not all(-L - 1 <= n <= L for n in (layers if isinstance(layers, tuple) else (layers,))):
            stop(f"feature_layer={layers} of a vision tower of {L} blocks")
    if cfg.mask not in SPANS:
        stop(f"mask {cfg.mask!r}: {', '.join(SPANS)}")
    if cfg.mask != "causal" and cfg.text.sliding_window:
        stop(f"mask={cfg.mask} with sliding_window={cfg.text.sliding_window}: only causal attention has a window")
    anyres = {cfg.connector == "anyres", cfg.layout.get("kind") == "anyres"}
    if anyres != {False} and (anyres != {True} or cfg.mask == "image"):
        stop(f"connector={cfg.connector} layout.kind={cfg.layout.get('kind')} mask={cfg.mask}: anyres is the connector "
             "and the layout, and its mask is not `image`")
    seen = cfg.vision.patches + (cfg.vision.class_token and cfg.vision.keep_class)
    one_each = (cfg.connector in ONE_EACH
                and cfg.text.model_type not in VLMS)
    if one_each and cfg.image_tokens != seen:
        stop(f"connector={cfg.connector} gives {seen} tokens per image, not tokens={cfg.image_tokens}")
    kind = cfg.text.model_type
    if cfg.mask == "mmca":
        if kind in DECODERS:
            stop(f"mask=mmca with a language model of type {kind!r}: only Llama, Mistral and Qwen have MMCA")
        kind = "mmca"
    tower = TwoTowers(cfg.vision, cfg.second) if cfg.second else build_tower(cfg.vision)
    decoder = DECODERS.get(kind, model.Llama)(cfg.text)
    if cfg.connector in VLMS:
        if kind in VLMS:
            stop(f"connector={cfg.connector} with a language model or mask of type {kind!r}: they exclude each other")
        kind = cfg.connector
    return VLMS.get(kind, model.VLM)(cfg, tower, build_connector(cfg), decoder)


def instruct(cfg, args):
    """VLMConfig, InstructConfig -> InstructBLIP's connector"""
    return InstructQFormer(width(cfg), cfg.text.hidden_size, cfg.tokens, args, args.words(cfg))


def build_connector(cfg):
    """VLMConfig -> connector. Stops at a setting in connector_args that the connector does not have."""
    try:
        return CONNECTORS[cfg.connector](cfg)
    except TypeError as e:
        stop(f"connector={cfg.connector} with connector_args={cfg.connector_args}: {e}")


def width(cfg):
    """VLMConfig -> width of the image features: those of several layers and of two towers stand side by side"""
    return sum(levels(v) * v.hidden_size for v in (cfg.vision, cfg.second) if v)


def comm(cfg):
    """VLMConfig -> COMM's connector"""
    if cfg.second is None:
        stop("connector=comm needs a second vision tower")
    a, b = cfg.vision, cfg.second
    return CommConnector(a.hidden_size, levels(a), b.hidden_size, levels(b), cfg.text.hidden_size, **cfg.connector_args)


def build_tower(v):
    """VisionConfig -> vision tower"""
    special = isinstance(v.feature_layer, tuple) or v.feature_norm or v.keep_class
    return TOWERS.get(v.model_type, FeatureTower if special else model.VisionTower)(v)


def image_layout(cfg):
    """VLMConfig -> what an image is in the sequence: images.Layout, or one of parts/tiles.py"""
    return layout(cfg) if cfg.layout else images.Layout(cfg.image_token_index, cfg.image_tokens)
