"""Folders of InternVL 1.5 and later (arXiv 2404.16821), in the form of transformers: InternViT, pixel shuffle with an
MLP, a language model, and images as a grid of tiles between <img> and </img>."""

from config import stop
from formats.configs import text_config, vision_config
from formats.family import Family
from formats.metadata import text_part, vision_part
from model import TextConfig, VLMConfig

CONTEXT = "<IMG_CONTEXT>"                                      # the placeholder in published tokenizers


def internvl_config(c, pre):
    v = {"model_type": "internvl_vision", **c["vision_config"]}
    if v["model_type"] != "internvl_vision" or not v.get("use_absolute_position_embeddings", True):
        stop(f"InternVL with a vision tower of type {v['model_type']!r}, or without position embeddings")
    for key, usual in (("vision_feature_layer", -1), ("vision_feature_select_strategy", "default"),
                       ("projector_hidden_act", "gelu")):
        if c.get(key, usual) != usual:
            stop(f"InternVL with {key}={c[key]!r}: {usual!r} is supported")
    vision = vision_config(v, -1, pre)
    vision.feature_norm = not v.get("use_mean_pooling", True)
    text = text_config({"model_type": "qwen2", **c["text_config"]})
    text.tie_word_embeddings = c.get("tie_word_embeddings", True)
    tiles = {"kind": "grid", "least": pre.get("min_patches", 1), "most": pre.get("max_patches", 12),
             "before": ["<img>"], "after": ["</img>"], "resample": pre.get("resample", 3)}
    r = round(1 / c.get("downsample_ratio", 0.5))
    return VLMConfig(vision, text, "shuffle", c.get("image_token_id", 151667), vision.patches // r**2, layout=tiles)


def internvl_fits(cfg):
    v, tiles = cfg.vision, cfg.layout
    return (type(cfg.text) is TextConfig and not (cfg.second or cfg.connector_args)
            and v.model_type == "internvl_vision" and v.feature_layer in (-1, v.num_hidden_layers) and not v.keep_class
            and cfg.connector == "shuffle" and cfg.mask == "causal" and not cfg.text.first_position
            and tiles.get("kind") == "grid" and tiles.get("thumbnail", True)
            and not (tiles.get("row_end") or tiles.get("grids"))
            and len(tiles.get("before", ())) == len(tiles.get("after", ())) == 1)


def internvl_names(cfg):
    return [(r"^vision_tower\.vision_model\.", "vision_tower."),
            (r"^(vision_tower\.embeddings\.)class_embedding$", r"\1cls_token@3"),
            (r"^(vision_tower\.embeddings\.)position_embedding\.weight$", r"\1position_embeddings@3"),
            (r"^(vision_tower\.embeddings\.)patch_embedding\.", r"\1patch_embeddings.projection."),
            (r"^(vision_tower\.encoder\.)layers\.", r"\1layer."),
            (r"^(vision_tower\..*\.)self_attn\.out_proj\.", r"\1attention.projection_layer."),
            (r"^(vision_tower\..*\.)self_attn\.", r"\1attention."),
            (r"^(vision_tower\..*\.)layer_norm1\.", r"\1layernorm_before."),
            (r"^(vision_tower\..*\.)layer_norm2\.", r"\1layernorm_after."),
            (r"^(vision_tower\..*\.)layer_scale(\d)$", r"\1lambda_\2"),
            (r"^vision_tower\.post_layernorm\.", "vision_tower.layernorm.")]


def internvl_files(folder, cfg):
    v, tiles, Q = cfg.vision, cfg.layout, cfg.image_tokens
    token = {i: name for name, i in folder.tok.specials.items()}
    own = {"start_image_token": token[tiles["before"][0]], "end_image_token": token[tiles["after"][0]],
           "context_image_token": CONTEXT, "video_token": "<video>"}
    return {"config.json": {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl",
        "image_token_id": cfg.image_token_index, "image_seq_length": Q, "downsample_ratio": (Q / v.patches) ** 0.5,
        "projector_hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        "tie_word_embeddings": cfg.text.tie_word_embeddings, "text_config": text_part(folder, cfg),
        "vision_config": vision_part(folder, cfg) | {
            "attention_bias": v.attention_bias, "use_qk_norm": v.use_qk_norm, "norm_type": v.norm_type,
            "use_mean_pooling": not v.feature_norm, "use_mask_token": False}},
        "preprocessor_config.json": folder.pre | {
            "image_processor_type": "GotOcr2ImageProcessor", "processor_class": "InternVLProcessor",
            "do_convert_rgb": True, "crop_to_patches": True, "min_patches": tiles.get("least", 1),
            "max_patches": tiles.get("most", 12), "resample": tiles.get("resample", 3),
            "size": {"height": v.image_size, "width": v.image_size}},
        "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": Q},
        "tokenizer_config.json": own | {"image_token": CONTEXT, "extra_special_tokens": own}}


INTERNVL = Family("internvl", "internvl", internvl_config, internvl_fits, internvl_names, internvl_files)
