"""Folders of VipLlava (arXiv 2312.00784): several layers of CLIP side by side, LayerNorm, two linear layers, Llama."""

import torch

from config import stop
from formats.configs import text_config, vision_config
from formats.family import Family
from formats.metadata import has_later_blocks, metadata
from model import TextConfig, VisionConfig, VLMConfig
from parts.features import feature_layers

NORM = "vision_tower.vision_model.post_layernorm."


def vipllava_config(c, pre):
    layers = c.get("vision_feature_layer", c.get("vision_feature_layers", [-2, -5, -8, -11, 6]))
    layers = layers if isinstance(layers, list) else [layers]
    vision, eps = vision_config(c.get("vision_config") or {}, -1, pre), c.get("projector_layernorm_eps", 1e-5)
    L, act = vision.num_hidden_layers, c.get("projector_hidden_act", "gelu")
    if vision.model_type != "clip_vision_model" or act != "gelu":
        stop(f"VipLlava with a vision tower of type {vision.model_type!r} and projector_hidden_act={act!r}: "
             "'clip_vision_model' and 'gelu' are supported")
    if not layers or not all(type(n) is int and -L - 1 <= n <= L for n in layers) or type(eps) is not float:
        stop(f"VipLlava with vision_feature_layer={layers} of {L} blocks and projector_layernorm_eps={eps}")
    vision.feature_layer = tuple(layers) if len(layers) > 1 else layers[0]
    text = text_config(c.get("text_config") or {})
    text.tie_word_embeddings = bool(c.get("tie_word_embeddings") or text.tie_word_embeddings)
    return VLMConfig(vision, text, "norm_mlp", c.get("image_token_index", c.get("image_token_id", 32000)),
                     connector_args={"eps": eps})


def vipllava_fits(cfg):
    v = cfg.vision
    return (cfg.connector == "norm_mlp" and type(cfg.text) is TextConfig and type(v) is VisionConfig
            and v.model_type == "clip_vision_model" and cfg.mask == "causal"
            and not (v.feature_norm or v.keep_class or cfg.tokens or cfg.layout or cfg.second
                     or cfg.text.first_position))


def vipllava_names(cfg):
    return [(r"^multi_modal_projector\.norm", "multi_modal_projector.projector_layernorm")]


def vipllava_write(tensors, cfg):
    """transformers needs a last norm in the tower, although it does not use its output"""
    D = cfg.vision.hidden_size
    return {f"{NORM}weight": torch.ones(D), f"{NORM}bias": torch.zeros(D)} | tensors


def vipllava_files(folder, cfg):
    llava, v = metadata(folder, cfg, "llava_v0", "", folder.meta["image_aspect"], torch.float32), cfg.vision
    L = v.num_hidden_layers if has_later_blocks(folder, cfg) else None      # None: count from the first block
    layers = [n if L or n >= 0 else n + v.num_hidden_layers + 1 for n in feature_layers(v)]
    keys = ("image_token_index", "image_seq_length", "tie_word_embeddings", "text_config", "vision_config")
    return {"config.json": {k: llava["config.json"][k] for k in keys} | {
        "architectures": ["VipLlavaForConditionalGeneration"], "model_type": "vipllava",
        "projector_hidden_act": "gelu", "projector_layernorm_eps": cfg.connector_args.get("eps", 1e-5),
        "vision_feature_layer": layers if len(layers) > 1 else layers[0]},
        "preprocessor_config.json": llava["preprocessor_config.json"],
        "processor_config.json": llava["processor_config.json"]}


VIPLLAVA = Family("vipllava", "llava_v0", vipllava_config, vipllava_fits, vipllava_names, vipllava_files,
                  write=vipllava_write)
