"""Folders of Fuyu (adept.ai/blog/fuyu-8b): raw patches, one linear layer, and Persimmon. Images of any size."""

from config import stop
from formats.configs import text_config
from formats.family import Family
from formats.metadata import text_part
from formats.tokenizer import SPEAKER
from model import VLMConfig
from parts.patches import PatchesConfig

NEWLINE = "|NEWLINE|"                                          # the token at the end of a row of patches


def fuyu_config(c, pre):
    if (channels := c.get("num_channels", 3)) != 3:
        stop(f"Fuyu with num_channels={channels}: 3 is supported")
    t = dict(c.get("text_config") or c)                        # published folders have one flat config.json
    t |= {"model_type": t["model_type"] if "text_config" in c else "persimmon"}
    if t["model_type"] != "persimmon":
        stop(f"Fuyu with a language model of type {t['model_type']!r}: 'persimmon' is supported")
    rope = dict(t.pop("rope_parameters", None) or t.pop("rope_scaling", None) or {})
    share = rope.pop("partial_rotary_factor", t.pop("partial_rotary_factor", 0.5))
    text = text_config(t | {"rope_parameters": {"rope_theta": t.get("rope_theta", 25000.0)} | rope})
    text.partial_rotary_factor, text.qk_norm = share, t.get("qk_layernorm", True)
    text.qkv_bias = text.o_bias = text.mlp_bias = True
    text.tie_word_embeddings = c.get("tie_word_embeddings", False)
    S, size = c.get("patch_size", 30), pre.get("size", {"width": 1920, "height": 1080})
    if any(size[k] % S for k in ("width", "height")):
        stop(f"Fuyu with images of {size['width']} x {size['height']}, which are no whole patches of side {S}")
    if pre.get("padding_mode", "constant") != "constant":
        stop(f"Fuyu with padding_mode={pre['padding_mode']!r}: 'constant' is supported")
    for k in ("image_mean", "image_std"):                      # one number for all colours
        value = pre.get(k, 0.5)
        pre[k] = value if isinstance(value, list) else [value] * 3
    rows = {"kind": "rows", "row_end": [NEWLINE], "largest": [size["width"], size["height"]],
            "fill": int(pre.get("padding_value", 1)), "resample": pre.get("resample", 2)}
    pre["size"] = {"height": S, "width": S}                    # a preprocessed image of ours is one patch
    vision = PatchesConfig(hidden_size=3 * S * S, image_size=S, patch_size=S, image_mean=tuple(pre["image_mean"]),
                           image_std=tuple(pre["image_std"]))
    return VLMConfig(vision, text, "patches", c.get("image_token_id", 71011), layout=rows)


def fuyu_fits(cfg):
    t, rows = cfg.text, cfg.layout
    return (cfg.vision.model_type == "patches" and cfg.connector == "patches" and t.model_type == "persimmon"
            and cfg.mask == "causal" and not t.first_position and t.qkv_bias and t.o_bias and t.mlp_bias
            and rows.get("kind") == "rows" and len(rows.get("row_end", ())) == 1
            and not (rows.get("before") or rows.get("after") or rows.get("thumbnail") or cfg.second))


def fuyu_names(cfg):
    H = cfg.text.num_attention_heads
    packed = [(rf"\.{x}_proj\.(weight|bias)$", rf".query_key_value.\1#{i}/3/{H}") for i, x in enumerate("qkv")]
    return packed + [(r"^multi_modal_projector\.linear_1\.", "vision_embed_tokens."),
                     (r"\.self_attn\.o_proj\.", ".self_attn.dense."),
                     (r"\.self_attn\.([qk])_norm\.", r".self_attn.\1_layernorm."),
                     (r"\.up_proj\.", ".dense_h_to_4h."), (r"\.down_proj\.", ".dense_4h_to_h."),
                     (r"^language_model\.model\.norm\.", "language_model.model.final_layernorm.")]


def published_tokenizer(tok):
    """tokenizer.json of a formats.tokenizer.Tokenizer. As in published folders, the placeholder is a piece of the
    vocabulary like any other, and no added token, if the vocabulary has it."""
    added, vocab = tok.spec["added_tokens"], tok.spec["model"]["vocab"]
    if isinstance(vocab, list):                                # Unigram: [[piece, score], ...]
        piece = tok.image < len(vocab)
        vocab = [[SPEAKER if i == tok.image else name, score] for i, (name, score) in enumerate(vocab)]
    else:
        piece = tok.image in vocab.values()
        vocab = {SPEAKER if i == tok.image else name: i for name, i in vocab.items()}
    own = [t | {"content": SPEAKER} for t in added if t["id"] == tok.image and not piece]
    added = [t for t in added if t["id"] != tok.image] + own
    return tok.spec | {"post_processor": None, "added_tokens": added, "model": tok.spec["model"] | {"vocab": vocab}}


def fuyu_files(folder, cfg):
    t, rows, S = cfg.text, cfg.layout, cfg.vision.image_size
    width, height = rows.get("largest", (1920, 1080))
    text = {k: x for k, x in text_part(folder, cfg).items() if k not in ("rms_norm_eps", "num_key_value_heads")}
    return {"config.json": {
        "architectures": ["FuyuForCausalLM"], "model_type": "fuyu", "patch_size": S, "num_channels": 3,
        "image_token_id": cfg.image_token_index, "tie_word_embeddings": t.tie_word_embeddings, "text_config": text | {
            "layer_norm_eps": t.layer_norm_eps, "qk_layernorm": t.qk_norm, "hidden_act": "relu2",
            "partial_rotary_factor": t.partial_rotary_factor}},
        "preprocessor_config.json": folder.pre | {
            "image_processor_type": "FuyuImageProcessor", "processor_class": "FuyuProcessor",
            "size": {"height": height, "width": width}, "patch_size": {"height": S, "width": S},
            "resample": rows.get("resample", 2), "do_pad": True, "padding_mode": "constant",
            "padding_value": float(rows.get("fill", 1))},
        "tokenizer.json": published_tokenizer(folder.tok),
        "tokenizer_config.json": {"image_token": None}}        # with a name here, it would become an added token


FUYU = Family("fuyu", "fuyu", fuyu_config, fuyu_fits, fuyu_names, fuyu_files)
