"""config.json and preprocessor_config.json of published folders -> the configs of model.py and data.py. Published files
leave keys out: an absent one means what the class of transformers says that wrote the file, and what a key asks for
and nothing here can do is an error that names it."""

import dataclasses

from PIL import Image

from config import stop
from formats.strict_json import read_json
from images import ImageSpec
from model import ACTIVATIONS, TextConfig, VisionConfig

# what an absent key of config.json means, class by class, where it is not the default of VisionConfig or TextConfig
DINO = dict(hidden_act="gelu", layer_norm_eps=1e-6, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))
VISION = {"clip_vision_model": {},
          "siglip_vision_model": dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, patch_size=16,
                                      image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)),
          "dinov2": dict(DINO, patch_size=14),
          "dinov2_with_registers": dict(DINO, patch_size=16, num_register_tokens=4)}
QWEN = dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768)
TEXT = {"llama": dict(architecture="LlamaForCausalLM", num_key_value_heads=None, head_dim=None,
                      max_position_embeddings=2048),
        "mistral": dict(architecture="MistralForCausalLM", intermediate_size=14336, num_key_value_heads=8,
                        head_dim=None, max_position_embeddings=131072, sliding_window=4096),
        "qwen2": dict(QWEN, architecture="Qwen2ForCausalLM", head_dim=None, sliding_window=4096),
        "qwen3": dict(QWEN, architecture="Qwen3ForCausalLM", head_dim=128, sliding_window=4096)}
# the tower of a LLaVA whose config.json has no vision_config
LLAVA_EYES = dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                  num_attention_heads=16, image_size=336, patch_size=14)

# what makes transformers' image processors do what image_aspect says, for pictures of side S, cut from `short`
PROCESSORS = {
    "pad": lambda S, short: {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": True,
                             "size": {"shortest_edge": S}, "crop_size": {"height": S, "width": S}},
    "crop": lambda S, short: {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True,
                              "size": {"shortest_edge": short}, "crop_size": {"height": S, "width": S}},
    "squash": lambda S, short: {"image_processor_type": "SiglipImageProcessor", "do_center_crop": False,
                                "size": {"height": S, "width": S}, "crop_size": None}}


# ---- config.json -----------------------------------------------------------------------------------------------------

def read_config(folder):
    """config.json beside weights, which are the numbers themselves and not codes for them"""
    c = read_json(folder / "config.json")
    for key in ("vision_config_dict", "vision_config", "text_config"):
        if not isinstance(c.get(key) or {}, dict):
            stop(f"{folder}: {key} in its config.json is no object of settings")
    if (how := c.get("quantization_config")) is not None:
        how = how.get("quant_method") if isinstance(how, dict) else how
        stop(f"{folder} holds quantised weights ({how}): those that they were made of are read here")
    return c


def typed(Config, what, d):
    """The values of d that Config has a field for, if they are of its types -> Config"""
    fields = {f.name: f.type for f in dataclasses.fields(Config)}
    for k, x in d.items():
        kind = fields.get(k)
        if kind in (int, float, bool, str) and type(x) is not kind and not (kind is float and type(x) is int):
            stop(f"{what}: {k}={x!r} in its config.json, where {kind.__name__} belongs")
        if kind is int and x < (k != "num_register_tokens") and k != "feature_layer":
            stop(f"{what}: {k}={x} in its config.json")
    return Config(**{k: x for k, x in d.items() if k in fields})


def vision_kind(c):
    """config.json of a vision tower -> its type, one that is known"""
    kind = c.get("model_type", "clip_vision_model")
    if kind not in list(VISION):
        stop(f"vision tower of type {kind!r}: {', '.join(VISION)} are known here")
    return kind


def vision_config(c, feature_layer=-2, pre={}):
    """config.json of a vision tower -> VisionConfig; absent keys take the defaults of their class."""
    kind = vision_kind(c)
    if c.get("use_swiglu_ffn") or c.get("num_channels", 3) != 3:
        stop(f"vision tower with use_swiglu_ffn={c.get('use_swiglu_ffn', False)} and num_channels="
             f"{c.get('num_channels', 3)}: false and 3 are known here")
    d = VISION[kind] | {k: x for k, x in c.items() if x is not None}
    for k in ("image_mean", "image_std"):
        if (x := pre.get(k)) is not None:
            if not isinstance(x, list | tuple) or [type(n) in (int, float) for n in x] != [True] * 3:
                stop(f"preprocessor_config.json: {k}={x!r} is no number for each of three colours")
            if k == "image_std" and not min(x) > 0:
                stop(f"preprocessor_config.json: {k}={x!r}, by which nothing can be divided")
            d[k] = tuple(x)
    cfg = typed(VisionConfig, "vision tower", d | dict(model_type=kind, feature_layer=feature_layer))
    if kind.startswith("dinov2"):
        if type(ratio := d.get("mlp_ratio", 4)) not in (int, float) or not 0 < ratio < 1000:
            stop(f"vision tower: mlp_ratio={ratio!r} in its config.json")
        cfg.intermediate_size = int(cfg.hidden_size * ratio)
    if not -cfg.num_hidden_layers - 1 <= feature_layer <= cfg.num_hidden_layers:
        stop(f"feature layer {feature_layer} of a vision tower of {cfg.num_hidden_layers} blocks")
    if cfg.hidden_size % cfg.num_attention_heads:
        stop(f"vision tower of width {cfg.hidden_size} with {cfg.num_attention_heads} heads")
    if not pre.get("do_normalize", True):
        cfg.image_mean, cfg.image_std = (0.0,) * 3, (1.0,) * 3
    # the processor computes (factor x - mean) / std of a byte x, the model (x / 255 - mean) / std
    factor = pre.get("rescale_factor", 1 / 255) if pre.get("do_rescale", True) else 1
    if not isinstance(factor, int | float) or factor <= 0:
        stop(f"preprocessor_config.json: rescale_factor={factor!r} is no number above 0")
    factor *= 255
    cfg.image_mean, cfg.image_std = (tuple(v / factor for v in t) for t in (cfg.image_mean, cfg.image_std))
    if cfg.hidden_act not in ACTIVATIONS:
        stop(f"vision tower with hidden_act {cfg.hidden_act!r}: {', '.join(ACTIVATIONS)} are known here")
    return cfg


def text_config(c):
    """config.json of a language model -> TextConfig; absent keys take the defaults of their class, as above."""
    kind = c.get("model_type", "llama")
    if kind not in list(TEXT):
        stop(f"language model of type {kind!r}: {', '.join(TEXT)} are known here")
    if (act := c.get("hidden_act", "silu")) != "silu":
        stop(f"language model with hidden_act {act!r}: silu is known here")
    null = ("num_key_value_heads", "head_dim", "sliding_window")              # here null is a value, and not an absence
    d = TEXT[kind] | {k: x for k, x in c.items() if x is not None or k in null}
    plain = typed(TextConfig, "language model", {k: x for k, x in d.items() if x is not None})
    heads, L = plain.num_attention_heads, plain.num_hidden_layers
    d["num_key_value_heads"] = d["num_key_value_heads"] or heads
    d["head_dim"] = d["head_dim"] or plain.hidden_size // heads
    if heads % d["num_key_value_heads"]:
        stop(f"language model with {heads} heads for {d['num_key_value_heads']} keys and values")
    d |= rope_settings(d, plain.max_position_embeddings)
    if (window := d.get("sliding_window") if kind != "llama" else None) and type(window) is not int:
        stop(f"language model: sliding_window={window!r} in its config.json, where int belongs")
    if kind in ("qwen2", "qwen3"):                                            # in some of its layers, if at all
        first, kinds = d.get("max_window_layers", 28), d.get("layer_types")
        slides = max(0, L - first) if d.get("use_sliding_window") and type(first) is int else 0
        slides = kinds.count("sliding_attention") if isinstance(kinds, list) else min(slides, L)
        if window and 0 < slides < L and window < plain.max_position_embeddings:
            stop(f"language model with a sliding window in {slides} of its {L} layers: all or none is known here")
        window = window if slides == L else None
    bias = d.get("attention_bias", False) if kind in ("llama", "qwen3") else False
    d |= dict(model_type=kind, sliding_window=window, qkv_bias=bias or kind == "qwen2", o_bias=bias,
              qk_norm=kind == "qwen3", mlp_bias=d.get("mlp_bias", False) if kind == "llama" else False)
    return typed(TextConfig, "language model", d)


def rope_settings(c, length):
    """rope_theta and rope_scaling, flat until transformers 4, or in one dict of transformers 5 -> both, flat"""
    d = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if not isinstance(d, dict):
        stop(f"rope scaling {d!r} is no object of settings")
    d = dict(d)
    theta, kind = d.pop("rope_theta", c.get("rope_theta", 1e4)), d.get("rope_type", d.get("type", "default"))
    need = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                             "original_max_position_embeddings")}
    if kind not in list(need):
        stop(f"rope scaling {kind!r}: default, linear and llama3 are known here")
    if kind == "llama3":
        d.setdefault("original_max_position_embeddings", length)
    if lost := [k for k in need[kind] if not isinstance(d.get(k), int | float) or not d[k] > 0]:
        stop(f"rope scaling {kind!r} without a number above 0 for {lost[0]}")
    if isinstance(theta, int | float) and not theta > 0:
        stop(f"language model: rope_theta={theta} in its config.json")
    if (part := d.get("partial_rotary_factor", c.get("partial_rotary_factor", 1))) != 1:
        stop(f"partial_rotary_factor={part}: 1 is known here")
    return dict(rope_theta=theta, rope_scaling=d if need[kind] else None)


def positions(cfg):
    """The tokens of one document that a language model was made for. Of scalings, llama3's max_position_embeddings is
    the scaled length; a linear one multiplies it (as in vicuna-7b-v1.5-16k: 4096, factor 4)."""
    scaling = cfg.rope_scaling or {}
    linear = scaling.get("rope_type", scaling.get("type")) == "linear"
    return int(cfg.max_position_embeddings * (scaling["factor"] if linear else 1))


def strategy(vision):
    """In the words of transformers: is the first token of the tower, a class token, left behind?"""
    return "default" if vision.class_token else "full"


# keys of adapter_config.json that make another function of the same tensors. Ways to begin are no matter, but for those
# that change the base as well (PiSSA, OLoRA, CorDA ...)
UNKNOWN = ("fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
           "kasa_config", "monteclora_config", "layer_replication", "target_parameters")
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


def read_adapter_config(folder):
    """adapter_config.json of a LoRA, which asks for no other function of its tensors than we know"""
    c = read_json(folder / "adapter_config.json")
    for key in UNKNOWN:
        if c.get(key):
            stop(f"{folder}: {key}={c[key]} is not known here")
    if (how := c.get("init_lora_weights")) not in BEGINNINGS:
        stop(f"{folder}: init_lora_weights={how} changed the base as well, which is not known here")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(c.get(key) or {}, dict):
            stop(f"{folder}: {key}={c[key]} is no object of numbers by layer")
    return c


def adapter_alpha(folder, c, r, alpha):
    """alpha of a layer, so that B A times alpha / r is meant; rsLoRA means alpha / sqrt(r)"""
    if type(r) is not int or r < 1 or type(alpha) not in (int, float):
        stop(f"{folder}: r={r!r} and lora_alpha={alpha!r} in its adapter_config.json")
    return alpha * (r**0.5 if c.get("use_rslora") else 1)


# ---- preprocessor_config.json ----------------------------------------------------------------------------------------

def read_pre(folder, kind):
    """What is done to pictures for a tower of this type: preprocessor_config.json, or the part of processor_config.json
    that took its place in transformers 5. Colours that it leaves out are those of the tower's class, told here, for a
    reader of what is written would take those of an image processor's."""
    file, both = folder / "preprocessor_config.json", folder / "processor_config.json"
    pre = read_json(both).get("image_processor") if both.is_file() and not file.is_file() else None
    pre = pre if isinstance(pre, dict) else read_json(file)
    usual = typed(VisionConfig, "vision tower", VISION[kind])
    return pre | {k: getattr(usual, k) for k in ("image_mean", "image_std") if pre.get(k) is None}


def image_spec(pre, aspect):
    """preprocessor_config.json and the wished aspect -> ImageSpec"""
    if aspect not in ("pad", "crop", "squash"):
        stop(f"image_aspect={aspect}: pad, crop or squash")
    if not pre.get("do_resize", True):
        stop("preprocessor_config.json: do_resize=false is not known here, where every picture becomes one square")
    size = (pre.get("crop_size") if pre.get("do_center_crop", True) else None) or pre.get("size", 224)
    sides = [size.get(k) for k in ("height", "width", "shortest_edge")] if isinstance(size, dict) else [size]
    sides = [n for i, n in enumerate(sides) if n is not None and n not in sides[:i]]
    resample = pre.get("resample", 3)
    if len(sides) != 1 or type(side := sides[0]) is not int or side < 1:
        stop(f"preprocessor_config.json: pictures of size {size} are no squares of one side")
    if resample not in list(Image.Resampling):
        stop(f"preprocessor_config.json: resample={resample} is no filter of Pillow's")
    mean = tuple(pre.get("image_mean") or ImageSpec(0).mean)
    whole = pre.get("size") or side if aspect == "crop" and pre.get("do_center_crop", True) else side
    short = whole.get("shortest_edge", side) if isinstance(whole, dict) else whole
    if not isinstance(short, int) or short < side:
        stop(f"preprocessor_config.json: no squares of side {side} can be cut from pictures of size {whole}")
    return ImageSpec(side, aspect, Image.Resampling(resample), mean, short if short > side else 0)
