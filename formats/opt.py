"""OPT in published folders: keys of config.json and names of tensors, where they differ from Llama's."""

from config import stop

ALWAYS = {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "enable_bias": True,
          "layer_norm_elementwise_affine": True}                              # opt-350m has other values
LLAMA_ONLY = ("intermediate_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling")

NAMES = [(r"^(language_model\.model\.layers\.\d+\.)self_attn\.o_proj", r"\1self_attn.out_proj"),
         (r"^(language_model\.model\.layers\.\d+\.)input_layernorm", r"\1self_attn_layer_norm"),
         (r"^(language_model\.model\.layers\.\d+\.)post_attention_layernorm", r"\1final_layer_norm"),
         (r"^(language_model\.model\.layers\.\d+\.)mlp\.", r"\1"),
         (r"^language_model\.model\.norm", "language_model.model.final_layer_norm"),
         (r"^language_model\.model\.", "language_model.model.decoder.")]


def read_opt(c):
    """config.json of an OPT -> the same with Llama's keys. Stops at a form of OPT that is not supported."""
    for key, value in ALWAYS.items():
        if c.get(key, value) != value:
            stop(f"OPT with {key}={c[key]}: {value} is supported")
    if (c.get("word_embed_proj_dim") or c.get("hidden_size", 768)) != c.get("hidden_size", 768):
        stop(f"OPT with word_embed_proj_dim={c['word_embed_proj_dim']}: only hidden_size is supported")
    return c | {"intermediate_size": c.get("ffn_dim", 3072), "hidden_act": c.get("activation_function", "relu")}


def write_opt(c):
    """text_config with Llama's keys -> the same with OPT's"""
    own = {"ffn_dim": c["intermediate_size"], "activation_function": "relu", "word_embed_proj_dim": c["hidden_size"]}
    return {k: x for k, x in c.items() if k not in LLAMA_ONLY} | ALWAYS | own
