"""Folders of Idefics (arXiv 2306.16527), a Flamingo with open weights: CLIP with class token, a perceiver resampler,
and a Llama with gated blocks. transformers keeps the last rows of the embedding and of the head, those of new tokens,
in two further tables. Here, the embedding is one table, and so is the head."""

import torch

from config import stop
from formats.configs import text_config, typed, vision_config
from formats.family import Family
from formats.names import rename
from model import VisionConfig, VLMConfig
from parts.cross_attention import IdeficsConfig

TOWER = "model.vision_model."
# (first rows, further rows) of our embedding and of our head
TABLES = [("model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"),
          ("lm_head.weight", "lm_head.additional_fc.weight")]
LAYER, GATED = r"^(multi_modal_projector\.layers\.\d+)\.", r"^(language_model\.gated_layers\..*)\."
NAMES = [(rf"{LAYER}norm_features", r"\1.0.context_layer_norm"), (rf"{LAYER}norm_latents", r"\1.0.latents_layer_norm"),
         (rf"{LAYER}linear_([qkv])\.", r"\1.0.\2_proj."), (rf"{LAYER}linear_out", r"\1.0.output_proj"),
         (rf"{LAYER}([qk])_norm", r"\1.0.\2_layer_norm"), (rf"{LAYER}norm_mlp", r"\1.1.ln"),
         (rf"{LAYER}linear_1", r"\1.1.fc"), (rf"{LAYER}linear_2", r"\1.1.c_proj"),
         (r"^multi_modal_projector\.layers\.", "multi_modal_projector.blocks."),
         (r"^multi_modal_projector\.norm\.", "multi_modal_projector.layer_norm."),
         (r"^multi_modal_projector\.latent_embedding", "multi_modal_projector.latents"),
         (r"^multi_modal_projector\.", "model.perceiver_resampler."),
         (rf"{GATED}([qk])_norm", r"\1.\2_layer_norm"),
         (r"^language_model\.gated_layers\.", "model.gated_cross_attn_layers."),
         (r"^language_model\.(?=model|lm_head)", ""), (r"^vision_tower\.vision_model\.", TOWER)]


def idefics_config(c, pre):
    v, p = c.get("vision_config") or {}, c.get("perceiver_config") or {}
    if not c.get("use_resampler"):
        stop("Idefics without a perceiver resampler (use_resampler=false) is not supported")
    base, more, every = c.get("vocab_size", 32000), c.get("additional_vocab_size", 0), c.get("cross_layer_interval", 1)
    pre.setdefault("size", {"height": pre.get("image_size", 224), "width": pre.get("image_size", 224)})
    usual = dict(hidden_size=v.get("embed_dim", 768), intermediate_size=5120, patch_size=14, num_hidden_layers=32,
                 num_attention_heads=16, hidden_act="gelu")
    vision = vision_config(usual | v | {"model_type": "clip_vision_model"}, -1, pre)
    vision.keep_class = True
    ours = dict(model_type="idefics", vocab_size=base + more, base_vocab=base, cross_every=every,
                cross_width=vision.hidden_size, cross_qk_norm=c.get("qk_layer_norms", False),
                gate_width=c.get("hidden_size", 4096) if c.get("alpha_type") == "vector" else 1)
    text = text_config({k: x for k, x in c.items() if k not in ("vision_config", "perceiver_config")} | ours)
    if text.num_hidden_layers % every:
        stop(f"Idefics with {text.num_hidden_layers} layers and a gated block before every {every}. layer")
    perceiver = dict(latents=p.get("resampler_n_latents", 64), depth=p.get("resampler_depth", 6),
                     heads=p.get("resampler_n_heads", 16), head_dim=p.get("resampler_head_dim", 96), act="relu",
                     qk_norm=p.get("qk_layer_norms_perceiver", False))
    return typed(VLMConfig, "Idefics", dict(
        vision=vision, text=text, connector="perceiver", tokens=1, connector_args=perceiver,
        image_token_index=c.get("image_token_id", base + 1)))            # in published tokenizers <image> is base + 1


def idefics_fits(cfg):
    v, t = cfg.vision, cfg.text
    return (type(t) is IdeficsConfig and type(v) is VisionConfig and v.model_type == "clip_vision_model"
            and v.keep_class and not v.feature_norm and v.feature_layer in (-1, v.num_hidden_layers)
            and cfg.connector_args.get("act") == "relu" and not (cfg.layout or cfg.second or t.first_position)
            and t.num_key_value_heads == t.num_attention_heads and t.head_dim * t.num_attention_heads == t.hidden_size
            and t.gate_width in (1, t.hidden_size) and t.num_hidden_layers % t.cross_every == 0
            and not (t.qkv_bias or t.o_bias or t.mlp_bias or t.qk_norm or t.sliding_window))


def idefics_names(cfg):
    return NAMES


def first_rows(cfg):
    """-> rows of the first tables. A new model has no second ones."""
    return min(cfg.text.base_vocab, cfg.text.vocab_size)


def idefics_read(tensors, cfg):
    """Join the tables, and give gates of shape (1, 1, C) the shape (C,)"""
    out = {k: x.flatten() if ".alpha_" in k else x for k, x in tensors.items()}
    for name, more in TABLES:
        name, more = rename(name), rename(more)
        if name in out and more in out:
            out[name] = torch.cat([out[name], out.pop(more)])
    return out


def idefics_write(tensors, cfg):
    """Split the tables again. transformers needs a last norm in the tower, although it does not use its output."""
    D, wide = cfg.vision.hidden_size, cfg.text.gate_width > 1
    out = {f"{TOWER}post_layernorm.weight": torch.ones(D), f"{TOWER}post_layernorm.bias": torch.zeros(D)}
    out |= {k: x[None, None] if wide and ".alpha_" in k else x for k, x in tensors.items()}
    n = first_rows(cfg)
    for name, more in TABLES if n < cfg.text.vocab_size else ():
        if name in out:
            out[name], out[more] = out[name][:n], out[name][n:]
    return out


def idefics_files(folder, cfg):
    v, t, p, S = cfg.vision, cfg.text, cfg.connector_args, cfg.vision.image_size
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
            "max_position_embeddings", "tie_word_embeddings")
    tower = ("image_size", "patch_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
             "layer_norm_eps")
    return {"config.json": {k: getattr(t, k) for k in kept} | {
        "architectures": ["IdeficsForVisionText2Text"], "model_type": "idefics", "hidden_act": "silu",
        "bos_token_id": folder.tok.bos, "eos_token_id": folder.tok.eos, "image_token_id": cfg.image_token_index,
        "vocab_size": first_rows(cfg), "additional_vocab_size": t.vocab_size - first_rows(cfg),
        "rope_theta": t.rope_theta, "rope_scaling": t.rope_scaling,
        "alpha_type": "vector" if t.gate_width > 1 else "float", "cross_layer_interval": t.cross_every,
        "qk_layer_norms": t.cross_qk_norm, "use_resampler": True,
        "vision_config": {k: getattr(v, k) for k in tower} | {
            "model_type": "idefics_vision", "embed_dim": v.hidden_size},
        "perceiver_config": {
            "model_type": "idefics_perciever", "use_resampler": True, "resampler_n_latents": p["latents"],
            "resampler_depth": p["depth"], "resampler_n_heads": p["heads"], "resampler_head_dim": p["head_dim"],
            "qk_layer_norms_perceiver": p.get("qk_norm", False)}},
        "preprocessor_config.json": folder.pre | {
            "image_processor_type": "IdeficsImageProcessor", "processor_class": "IdeficsProcessor",
            "image_num_channels": 3, "image_size": S, "size": {"height": S, "width": S}, "do_convert_rgb": True}}


IDEFICS = Family("idefics", "idefics", idefics_config, idefics_fits, idefics_names, idefics_files,
                 idefics_read, idefics_write)
