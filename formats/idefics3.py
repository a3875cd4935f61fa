"""Folders of Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): SigLIP, pixel shuffle with one matrix, Llama,
and images in tiles whose places have names. The two differ in the names of their classes."""

import math
from functools import partial

from config import stop
from formats.configs import text_config, vision_config
from formats.family import Family
from formats.metadata import text_part, vision_part
from model import TextConfig, VLMConfig
from parts.idefics3_vit import table_rows
from parts.tiles import Split, layout


def idefics3_config(kind, c, pre):
    """kind: idefics3 or smolvlm"""
    vision = vision_config((c.get("vision_config") or {}) | {"model_type": f"{kind}_vision"}, -1, pre)
    text = text_config({"model_type": "llama", **(c.get("text_config") or {})})
    text.tie_word_embeddings = c.get("tie_word_embeddings", False)
    S, n, r = vision.image_size, vision.image_size // vision.patch_size, c.get("scale_factor", 2)
    if table_rows(n).tolist() != list(range(n)):
        stop(f"{kind} with {n} patches on a side: transformers' positions of these are no plain grid")
    longest = (pre.get("size") or {"longest_edge": 1456}).get("longest_edge")
    tile = (pre.get("max_image_size") or {"longest_edge": 364}).get("longest_edge")
    if pre and (tile != S or type(longest) is not int or longest < 1 or not pre.get("do_resize", True)):
        stop(f"{kind} with tiles of side {tile} of images of longest_edge {longest}, do_resize="
             f"{pre.get('do_resize', True)}: tiles of the tower's side {S} and true are supported")
    longest = longest if pre else 4 * S
    most, split = Split(0, 1, S, longest).most, pre.get("do_image_splitting", True)
    tiles = {"kind": "split", "longest": longest, "split": split, "before": ["<fake_token_around_image>"],
             "after": ["<fake_token_around_image>"], "whole": "<global-img>", "row_end": "\n", "grid_end": "\n\n",
             "cells": [f"<row_{y + 1}_col_{x + 1}>" for y in range(most) for x in range(most)] * split,
             "resample": pre.get("resample", 1)}
    pre["size"] = {"height": S, "width": S}                    # a preprocessed image of ours is one tile
    return VLMConfig(vision, text, "shuffle_linear", c.get("image_token_id", 128257), vision.patches // r**2,
                     layout=tiles)


def idefics3_fits(kind, cfg):
    v, tiles = cfg.vision, cfg.layout
    return (v.model_type == f"{kind}_vision" and v.feature_layer in (-1, v.num_hidden_layers) and v.feature_norm
            and not v.keep_class and type(cfg.text) is TextConfig and not cfg.text.first_position
            and cfg.connector == "shuffle_linear" and cfg.mask == "causal" and not cfg.second
            and tiles.get("kind") == "split" and all(tiles.get(k) for k in ("before", "after", "whole")))


def idefics3_names(cfg):
    return [(r"^vision_tower\.", "model."), (r"^language_model\.model\.", "model.text_model."),
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^multi_modal_projector\.linear_1\.", "model.connector.modality_projection.proj.")]


def idefics3_files(kind, Name, folder, cfg):
    v, tiles, Q = cfg.vision, layout(cfg), cfg.image_tokens
    return {"config.json": {
        "architectures": [f"{Name}ForConditionalGeneration"], "model_type": kind, "scale_factor":
        math.isqrt(v.patches // Q), "image_token_id": cfg.image_token_index,
        "tie_word_embeddings": cfg.text.tie_word_embeddings, "text_config": text_part(folder, cfg),
        "vision_config": vision_part(folder, cfg)},
        "preprocessor_config.json": folder.pre | {
            "image_processor_type": f"{Name}ImageProcessor", "processor_class": f"{Name}Processor",
            "do_convert_rgb": True, "do_image_splitting": tiles.split, "do_pad": True, "resample": tiles.resample,
            "size": {"longest_edge": tiles.longest}, "max_image_size": {"longest_edge": v.image_size}},
        "processor_config.json": {"processor_class": f"{Name}Processor", "image_seq_len": Q}}


IDEFICS3, SMOLVLM = (
    Family(kind, "idefics3", partial(idefics3_config, kind), partial(idefics3_fits, kind), idefics3_names,
           partial(idefics3_files, kind, Name)) for kind, Name in (("idefics3", "Idefics3"), ("smolvlm", "SmolVLM")))
