"""Folders of PaliGemma (arXiv 2407.07726): SigLIP with its last norm, a linear layer, Gemma, and prefix attention."""

from config import stop
from formats.configs import text_config, vision_config
from formats.family import Family
from formats.metadata import text_part, vision_part
from model import TextConfig, VisionConfig, VLMConfig
from parts.gemma import GemmaConfig


def paligemma_config(c, pre):
    v, t = c["vision_config"], c["text_config"]
    vision = vision_config({"model_type": "siglip_vision_model", **v}, -1, pre)
    if vision.class_token:
        stop(f"PaliGemma with a vision tower of type {vision.model_type!r}: its class token would be a feature")
    vision.feature_norm = True
    text = text_config({"model_type": "gemma", **t})
    text.first_position = 1
    text.tie_word_embeddings = c.get("tie_word_embeddings", t.get("tie_word_embeddings", True))
    return VLMConfig(vision, text, "linear", c.get("image_token_index", c.get("image_token_id", 256000)), mask="prefix")


def paligemma_fits(cfg):
    v = cfg.vision
    return (type(v) is VisionConfig and type(cfg.text) in (TextConfig, GemmaConfig) and cfg.mask == "prefix"
            and cfg.connector == "linear" and cfg.text.first_position == 1 and v.feature_norm
            and v.feature_layer in (-1, v.num_hidden_layers) and not v.class_token
            and not (v.keep_class or cfg.tokens or cfg.layout or cfg.second or cfg.connector_args))


def paligemma_names(cfg):
    return [(r"^multi_modal_projector\.linear_1\.", "multi_modal_projector.linear.")]


def paligemma_files(folder, cfg):
    C, Q, S = cfg.text.hidden_size, cfg.image_tokens, cfg.vision.image_size
    return {"config.json": {
        "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma", "projection_dim": C,
        "hidden_size": C, "image_token_index": cfg.image_token_index,
        "tie_word_embeddings": cfg.text.tie_word_embeddings,
        "text_config": text_part(folder, cfg) | {"use_bidirectional_attention": True},
        "vision_config": vision_part(folder, cfg) | {"projection_dim": C}},
        "preprocessor_config.json": folder.pre | {
            "image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor",
            "image_seq_length": Q, "do_convert_rgb": True, "size": {"height": S, "width": S}}}


PALIGEMMA = Family("paligemma", "paligemma", paligemma_config, paligemma_fits, paligemma_names, paligemma_files)
