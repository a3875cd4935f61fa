"""Folders of BLIP-2 (arXiv 2301.12597): EVA's ViT-g with a norm, a Q-Former, and OPT or Llama."""

import dataclasses

from config import stop
from formats.configs import text_config, typed, vision_config
from formats.family import Family
from formats.metadata import text_part, vision_part
from formats.opt import NAMES, write_opt
from model import TextConfig, VLMConfig
from parts.eva import EvaConfig
from parts.opt import OptConfig
from parts.qformer import QFormerConfig

LAYER = r"^(multi_modal_projector\.layers\.\d+\.)"
QFORMER = [(rf"{LAYER}(attention|cross)_norm", r"\1\2.output.LayerNorm"),
           (rf"{LAYER}(attention|cross)\.q_proj", r"\1\2.attention.query"),
           (rf"{LAYER}(attention|cross)\.k_proj", r"\1\2.attention.key"),
           (rf"{LAYER}(attention|cross)\.v_proj", r"\1\2.attention.value"),
           (rf"{LAYER}(attention|cross)\.out_proj", r"\1\2.output.dense"),
           (rf"{LAYER}cross\.", r"\1crossattention."),
           (rf"{LAYER}mlp_norm", r"\1output_query.LayerNorm"),
           (rf"{LAYER}fc1", r"\1intermediate_query.dense"),
           (rf"{LAYER}fc2", r"\1output_query.dense"),
           (r"^multi_modal_projector\.layers\.", "qformer.encoder.layer."),
           (r"^multi_modal_projector\.norm", "qformer.layernorm"),
           (r"^multi_modal_projector\.query_embedding", "query_tokens@3"),
           (r"^multi_modal_projector\.projection", "language_projection")]
TOWER = [(rf"^(vision_tower\..*)\.{x}_proj\.(weight|bias)", rf"\1.qkv.\2#{i}/3") for i, x in enumerate("qkv")] + [
    (r"^(vision_tower\..*)\.out_proj", r"\1.projection"),
    (r"^(vision_tower\..*class_embedding)", r"\1@3"),
    (r"^(vision_tower\..*position_embedding)\.weight", r"\1@3"),
    (r"^vision_tower\.", "")]


def blip2_config(c, pre, name="BLIP-2", connector="qformer", Config=QFormerConfig):
    v, q = c.get("vision_config") or {}, c.get("qformer_config") or {}
    if not v.get("qkv_bias", True):
        stop(f"{name} with a vision tower without qkv_bias is not supported")
    if q.get("use_qformer_text_input") or q.get("hidden_act", "gelu") != "gelu":
        stop(f"{name} with use_qformer_text_input={q.get('use_qformer_text_input', False)} and hidden_act="
             f"{q.get('hidden_act', 'gelu')!r} in its qformer_config: false and 'gelu' are supported")
    if type(image := c.get("image_token_index", c.get("image_token_id"))) is not int:
        stop(f"{name} without an image_token_index in its config.json: transformers 4.46 and later write one")
    vision = vision_config(v | {"model_type": "blip_2_vision_model"}, -1, pre)
    qformer = typed(Config, "Q-Former", q)
    text = text_config({"model_type": "opt", **(c.get("text_config") or {})})
    return typed(VLMConfig, name, dict(
        vision=vision, text=text, connector=connector, image_token_index=image, tokens=c.get("num_query_tokens", 32),
        connector_args=dataclasses.asdict(qformer)))


def blip2_fits(cfg, connector="qformer"):
    v = cfg.vision
    return (cfg.connector == connector and type(v) is EvaConfig and v.feature_norm and v.keep_class
            and v.feature_layer in (-1, v.num_hidden_layers) and type(cfg.text) in (TextConfig, OptConfig)
            and cfg.mask == "causal" and not (cfg.layout or cfg.second or cfg.text.first_position))


def blip2_names(cfg):
    return TOWER + QFORMER + (NAMES if cfg.text.model_type == "opt" else [])


def blip2_files(folder, cfg):
    S, text, tok = cfg.vision.image_size, text_part(folder, cfg), folder.tok
    bos = next(name for name, i in tok.specials.items() if i == tok.bos)
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"config.json": {
        "architectures": ["Blip2ForConditionalGeneration"], "model_type": "blip-2",
        "image_token_index": cfg.image_token_index, "num_query_tokens": cfg.tokens,
        "tie_word_embeddings": cfg.text.tie_word_embeddings,
        "text_config": write_opt(text) if cfg.text.model_type == "opt" else text,
        "qformer_config": {"model_type": "blip_2_qformer", "encoder_hidden_size": cfg.vision.hidden_size,
                           **cfg.connector_args},
        "vision_config": vision_part(folder, cfg) | {"model_type": "blip_2_vision_model", "qkv_bias": True}},
        "preprocessor_config.json": folder.pre | {
            "image_processor_type": "BlipImageProcessor", "processor_class": "Blip2Processor", "do_convert_rgb": True,
            "size": {"height": S, "width": S}},
        "processor_config.json": {"processor_class": "Blip2Processor", "num_query_tokens": cfg.tokens},
        "tokenizer_config.json": {"image_token": None},    # Blip2Processor needs <image> in tokenizer.json alone
        # Blip2Processor puts the image in front of the tokenizer's output, so the tokenizer must write BOS
        "tokenizer.json": tok.spec | {"post_processor": {
            "type": "TemplateProcessing", "single": first,
            "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tok.bos], "tokens": [bos]}}}}}


BLIP2 = Family("blip-2", "blip", blip2_config, blip2_fits, blip2_names, blip2_files)
