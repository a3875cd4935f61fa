"""config.json and preprocessor_config.json of published folders -> the configs of model.py and images.py. An absent key
means the default of the transformers class that wrote the file. For an unsupported value, an error names the key."""

import contextlib
import dataclasses

from PIL import Image

from config import stop
from formats.opt import read_opt
from formats.strict_json import read_json
from images import ImageSpec
from model import ACTIVATIONS, TextConfig, VisionConfig
from parts.cross_attention import FlamingoConfig, IdeficsConfig
from parts.eva import EvaConfig
from parts.gemma import GemmaConfig
from parts.idefics3_vit import Idefics3ViTConfig
from parts.internvit import InternViTConfig
from parts.patches import PatchesConfig
from parts.persimmon import PersimmonConfig
from parts.opt import OptConfig
from parts.qwen_vit import QwenViTConfig

# defaults of the transformers classes, where they differ from the defaults of VisionConfig and TextConfig
DINO = dict(hidden_act="gelu", layer_norm_eps=1e-6, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))
VISION = {"clip_vision_model": {},
          "siglip_vision_model": dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, patch_size=16,
                                      image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)),
          "dinov2": dict(DINO, patch_size=14),
          "dinov2_with_registers": dict(DINO, patch_size=16, num_register_tokens=4),
          "internvl_vision": {}, "blip_2_vision_model": {}, "idefics3_vision": {}, "smolvlm_vision": {}}
QWEN = dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768)
TEXT = {"llama": dict(architecture="LlamaForCausalLM", num_key_value_heads=None, head_dim=None,
                      max_position_embeddings=2048),
        "mistral": dict(architecture="MistralForCausalLM", intermediate_size=14336, num_key_value_heads=8,
                        head_dim=None, max_position_embeddings=131072, sliding_window=4096),
        "qwen2": dict(QWEN, architecture="Qwen2ForCausalLM", head_dim=None, sliding_window=4096),
        "qwen3": dict(QWEN, architecture="Qwen3ForCausalLM", head_dim=128, sliding_window=4096),
        "gemma": dict(architecture="GemmaForCausalLM"),
        "persimmon": dict(architecture="PersimmonForCausalLM", num_key_value_heads=None, head_dim=None),
        "idefics": dict(architecture="IdeficsForVisionText2Text", num_key_value_heads=None, head_dim=None,
                        max_position_embeddings=2048),
        "opt": dict(architecture="OPTForCausalLM", num_key_value_heads=None, head_dim=None)}
READ = {"opt": read_opt}                   # LLMs whose config.json has keys of its own
# model_types with a config class of their own: TextConfig or VisionConfig does not fit
CLASSES = {"gemma": GemmaConfig, "opt": OptConfig, "blip_2_vision_model": EvaConfig, "internvl_vision": InternViTConfig,
           "flamingo": FlamingoConfig, "idefics": IdeficsConfig, "patches": PatchesConfig, "persimmon": PersimmonConfig,
           "qwen_vl_vision": QwenViTConfig, "idefics3_vision": Idefics3ViTConfig, "smolvlm_vision": Idefics3ViTConfig}
# allowed hidden_act; other LLMs: silu. Gemma's two mean tanh gelu
ACTS = {"gemma": ("gelu", "gelu_pytorch_tanh"), "opt": ("relu",), "persimmon": ("relu2",)}


def read_config(folder):
    """config.json of a folder -> dict. Stops if the folder holds quantised weights."""
    c = read_json(folder / "config.json")
    if how := c.get("quantization_config"):
        stop(f"{folder} holds quantised weights ({dict(how).get('quant_method')}), which are not supported")
    return c


@contextlib.contextmanager
def one_line(what):
    """Turn Python's errors about wrong values (for example, text instead of a number) into a message of one line."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        stop(f"{what} cannot be read: {type(e).__name__}: {e}")


MAY_BE_ZERO = ("feature_layer", "num_register_tokens", "first_position", "tokens", "gate_width")


def typed(Config, what, d):
    """Build Config from a dict d; unknown keys are ignored. Stops at a wrong type or, for most keys, a number <= 0."""
    fields = {f.name: f.type for f in dataclasses.fields(Config)}
    for k, x in d.items():
        kind = fields.get(k)
        if kind in (int, float, bool, str) and type(x) is not kind and not (kind is float and type(x) is int):
            stop(f"{what}: {k}={x!r} in its config.json, where {kind.__name__} belongs")
        if kind in (int, float) and x <= 0 and k not in MAY_BE_ZERO:
            stop(f"{what}: {k}={x} in its config.json")
    return Config(**{k: x for k, x in d.items() if k in fields})


OURS = ("first_position", "feature_norm", "keep_class")    # fields that no published config.json may set


def vision_kind(c):
    """config.json of a vision tower -> its model_type. Stops if this type is not supported."""
    kind = c.get("model_type", "clip_vision_model")
    if kind not in list(VISION):
        stop(f"vision tower of type {kind!r}: {', '.join(VISION)} are supported")
    return kind


@one_line("config.json or preprocessor_config.json of a vision tower")
def vision_config(c, feature_layer=-2, pre={}):
    """config.json of a vision tower and its preprocessor_config.json -> VisionConfig"""
    kind = vision_kind(c)
    if c.get("use_swiglu_ffn") or c.get("num_channels", 3) != 3:
        stop(f"vision tower with use_swiglu_ffn={c.get('use_swiglu_ffn', False)} and num_channels="
             f"{c.get('num_channels', 3)}: false and 3 are supported")
    d = VISION[kind] | {k: x for k, x in c.items() if x is not None and k not in OURS}
    d |= {k: tuple(pre[k]) for k in ("image_mean", "image_std") if pre.get(k) is not None}
    if kind.startswith("dinov2"):
        d["intermediate_size"] = int(d.get("hidden_size", VisionConfig.hidden_size) * d.get("mlp_ratio", 4))
    for k in ("image_size", "patch_size"):                                    # InternVL: [448, 448]
        if isinstance(side := d.get(k), list) and len(set(side)) == 1:
            d[k] = side[0]
    cfg = typed(CLASSES.get(kind, VisionConfig), "vision tower", d | dict(model_type=kind, feature_layer=feature_layer))
    if not -cfg.num_hidden_layers - 1 <= feature_layer <= cfg.num_hidden_layers:
        stop(f"feature layer {feature_layer} of a vision tower of {cfg.num_hidden_layers} blocks")
    if not pre.get("do_normalize", True):
        cfg.image_mean, cfg.image_std = (0.0,) * 3, (1.0,) * 3
    # (factor * byte / 255 - mean) / std = (byte / 255 - mean / factor) / (std / factor), and the model computes this
    factor = 255 * (pre.get("rescale_factor", 1 / 255) if pre.get("do_rescale", True) else 1)
    cfg.image_mean, cfg.image_std = (tuple(v / factor for v in t) for t in (cfg.image_mean, cfg.image_std))
    if cfg.hidden_act not in ACTIVATIONS:
        stop(f"vision tower with hidden_act {cfg.hidden_act!r}: {', '.join(ACTIVATIONS)} are supported")
    return cfg


@one_line("config.json of a language model")
def text_config(c):
    """config.json of an LLM -> TextConfig"""
    kind = c.get("model_type", "llama")
    if kind not in list(TEXT):
        stop(f"language model of type {kind!r}: {', '.join(TEXT)} are supported")
    c = READ.get(kind, dict)(c)
    Config, acts = CLASSES.get(kind, TextConfig), ACTS.get(kind, ("silu",))
    if (act := c.get("hidden_activation") or c.get("hidden_act", acts[0])) not in acts:
        stop(f"language model with hidden_act {act!r}: {' or '.join(acts)} is supported")
    null = ("num_key_value_heads", "head_dim", "sliding_window")              # in other keys, null means absent
    d = TEXT[kind] | {k: x for k, x in c.items() if k not in OURS and (x is not None or k in null)}
    plain = typed(Config, "language model", {k: x for k, x in d.items() if x is not None})
    heads, L = plain.num_attention_heads, plain.num_hidden_layers
    d["num_key_value_heads"] = d.get("num_key_value_heads", plain.num_key_value_heads) or heads
    d["head_dim"] = d.get("head_dim", plain.head_dim) or plain.hidden_size // heads
    if heads % d["num_key_value_heads"]:
        stop(f"language model with {heads} heads for {d['num_key_value_heads']} keys and values")
    d |= rope_settings(d, plain.max_position_embeddings)
    window = d.get("sliding_window") if kind != "llama" else None
    if kind in ("qwen2", "qwen3"):                                            # some layers may have no sliding window
        first, kinds = d.get("max_window_layers", 28), d.get("layer_types")
        slides = max(0, L - first) if d.get("use_sliding_window") else 0
        slides = kinds.count("sliding_attention") if kinds else min(slides, L)
        if window and 0 < slides < L and window < plain.max_position_embeddings:
            stop(f"language model with a sliding window in {slides} of its {L} layers: all or none is supported")
        window = window if slides == L else None
    bias = d.get("attention_bias", False) if kind in ("llama", "qwen3") else kind == "opt"
    d |= dict(model_type=kind, sliding_window=window, qkv_bias=bias or kind == "qwen2", o_bias=bias,
              qk_norm=kind == "qwen3", mlp_bias=d.get("mlp_bias", False) if kind == "llama" else False)
    return typed(Config, "language model", d)


def rope_settings(c, length):
    """-> {rope_theta, rope_scaling}. In config.json they are two keys or, since transformers 5, one dict."""
    d = dict(c.get("rope_scaling") or c.get("rope_parameters") or {})
    theta, kind = d.pop("rope_theta", c.get("rope_theta", 1e4)), d.get("rope_type", d.get("type", "default"))
    need = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                             "original_max_position_embeddings")}
    if kind not in list(need):
        stop(f"rope scaling {kind!r}: default, linear and llama3 are supported")
    if kind == "llama3":
        d.setdefault("original_max_position_embeddings", length)
    if lost := [k for k in need[kind] if not d.get(k, 0) > 0]:
        stop(f"rope scaling {kind!r} without a number above 0 for {lost[0]}")
    part = d.get("partial_rotary_factor", c.get("partial_rotary_factor", 1))
    if part != 1 and c.get("model_type") != "persimmon":
        stop(f"partial_rotary_factor={part}: 1 is supported")
    return dict(rope_theta=theta, rope_scaling=d if need[kind] else None)


def positions(cfg):
    """-> the number of tokens that an LLM can read: max_position_embeddings, multiplied by the factor of linear RoPE
    scaling if the LLM uses this scaling (for example vicuna-7b-v1.5-16k: 4096 x 4)."""
    scaling = cfg.rope_scaling or {}
    linear = scaling.get("rope_type", scaling.get("type")) == "linear"
    return int(cfg.max_position_embeddings * (scaling["factor"] if linear else 1))


def strategy(vision):
    """-> vision_feature_select_strategy for transformers: "default" drops the class token, "full" drops no token."""
    return "default" if vision.class_token else "full"


def read_pre(folder, kind):
    """-> dict: preprocessor_config.json, or the part of processor_config.json that replaces it in transformers 5. An
    absent image_mean or image_std gets the default for `kind`, the model_type of the vision tower."""
    file, both = folder / "preprocessor_config.json", folder / "processor_config.json"
    pre = read_json(both).get("image_processor") if both.is_file() and not file.is_file() else None
    pre = pre if isinstance(pre, dict) else read_json(file)
    usual = typed(VisionConfig, "vision tower", VISION[kind])
    return pre | {k: getattr(usual, k) for k in ("image_mean", "image_std") if pre.get(k) is None}


@one_line("preprocessor_config.json")
def image_spec(pre, aspect):
    """Content of preprocessor_config.json, and image_aspect (pad, crop or squash) -> ImageSpec"""
    if aspect not in ("pad", "crop", "squash"):
        stop(f"image_aspect={aspect}: pad, crop or squash")
    if not pre.get("do_resize", True):
        stop("preprocessor_config.json: do_resize=false is not supported: every image becomes one square")
    size = (pre.get("crop_size") if pre.get("do_center_crop", True) else None) or pre.get("size", 224)
    sides = {size.get(k) for k in ("height", "width", "shortest_edge")} if isinstance(size, dict) else {size}
    side = (sides - {None} or {None}).pop()
    if len(sides - {None}) != 1 or type(side) is not int or side < 1:
        stop(f"preprocessor_config.json: images of size {size} are no squares of one side")
    mean = tuple(pre.get("image_mean") or ImageSpec(0).mean)
    whole = pre.get("size") or side if aspect == "crop" and pre.get("do_center_crop", True) else side
    short = whole.get("shortest_edge", side) if isinstance(whole, dict) else whole       # shorter side before a crop
    if short < side:
        stop(f"preprocessor_config.json: no squares of side {side} can be cut from images of size {whole}")
    return ImageSpec(side, aspect, Image.Resampling(pre.get("resample", 3)), mean, short if short > side else 0)
