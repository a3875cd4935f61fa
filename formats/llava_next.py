"""Folders of LlavaNext, which is LLaVA-1.6 (llava-vl.github.io/blog/2024-01-30-llava-next): LLaVA-1.5 with tiles at the
image's own aspect and a trained vector at the end of each row (parts/anyres.py)."""

import torch

from config import stop
from formats.configs import image_spec, strategy, text_config, vision_config
from formats.family import Family
from formats.metadata import metadata
from formats.strict_json import read_json
from formats.vipllava import vipllava_write
from model import TextConfig, VisionConfig, VLMConfig
from parts.tiles import layout

GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]         # heights and widths, of transformers


def llava_next_template(text, tok):
    """The folder's own chat template says which: of Vicuna, Mistral, Llama 3, or ChatML. Without one: the usual one of
    the language model"""
    jinja, files = tok.folder / "chat_template.jinja", ("chat_template.json", "tokenizer_config.json")
    said = jinja.read_text("utf-8", "replace") if jinja.is_file() else ""
    said += str([read_json(tok.folder / file, {}).get("chat_template") for file in files])
    marks = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama_3", "[INST]": "mistral"}
    usual = {"mistral": "mistral", "qwen2": "chatml"}.get(text.get("model_type"), "vicuna_v1")
    return next((name for mark, name in marks.items() if mark in said), usual)


def llava_next_config(c, pre):
    layer = c.get("vision_feature_layer", -2)
    layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
    if not isinstance(layer, int):
        stop(f"LlavaNext with vision_feature_layer={layer}: one layer is supported")
    vision = vision_config(c.get("vision_config") or {}, layer, pre)
    for key, usual in (("vision_feature_select_strategy", strategy(vision)), ("projector_hidden_act", "gelu"),
                       ("multimodal_projector_bias", True)):
        if (value := c.get(key, "default" if "strategy" in key else usual)) != usual:
            stop(f"LlavaNext with {key}={value!r} and a tower of type {vision.model_type!r}: {usual!r} is supported")
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        stop(f"LlavaNext with a vision tower of type {vision.model_type!r}: CLIP and SigLIP are supported")
    text, S = text_config(c.get("text_config") or {}), vision.image_size
    text.tie_word_embeddings = bool(c.get("tie_word_embeddings") or text.tie_word_embeddings)
    sizes = c.get("image_grid_pinpoints") or GRIDS
    if (other := pre.get("image_grid_pinpoints") or GRIDS) != sizes:
        stop(f"LlavaNext with image_grid_pinpoints={sizes} in config.json, but {other} in preprocessor_config.json")
    if any(side % S or side < S for size in sizes for side in size):
        stop(f"LlavaNext with image_grid_pinpoints={sizes}, which are no tiles of side {S}")
    if pre and (spec := image_spec(pre, "crop")).short:
        stop(f"LlavaNext with images of side {spec.short}, of which {spec.side} stay: one size is supported")
    tiles = {"kind": "anyres", "grids": [[w // S, h // S] for h, w in sizes], "resample": pre.get("resample", 3)}
    return VLMConfig(vision, text, "anyres", c.get("image_token_index", c.get("image_token_id", 32000)), layout=tiles)


def llava_next_fits(cfg):
    v = cfg.vision
    return (cfg.connector == "anyres" and type(cfg.text) is TextConfig and type(v) is VisionConfig
            and v.model_type in ("clip_vision_model", "siglip_vision_model") and cfg.mask == "causal"
            and isinstance(v.feature_layer, int)
            and not (v.feature_norm or v.keep_class or cfg.tokens or cfg.second or cfg.text.first_position))


def llava_next_names(cfg):
    return [(r"^multi_modal_projector\.image_newline$", "image_newline")]


def llava_next_files(folder, cfg):
    llava, S = metadata(folder, cfg, "vicuna_v1", "", "crop", torch.float32), cfg.vision.image_size
    sizes = [[rows * S, columns * S] for columns, rows in layout(cfg).grids]
    return {"config.json": llava["config.json"] | {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
        "projector_hidden_act": "gelu", "image_grid_pinpoints": sizes},
        "preprocessor_config.json": llava["preprocessor_config.json"] | {
            "image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor", "do_pad": True,
            "image_grid_pinpoints": sizes, "size": {"shortest_edge": S}, "resample": cfg.layout.get("resample", 3)},
        "processor_config.json": llava["processor_config.json"] | {
            "processor_class": "LlavaNextProcessor", "vision_feature_select_strategy": strategy(cfg.vision),
            "num_additional_image_tokens": int(cfg.vision.class_token)}}


LLAVA_NEXT = Family("llava_next", llava_next_template, llava_next_config, llava_next_fits, llava_next_names,
                    llava_next_files, write=vipllava_write)
