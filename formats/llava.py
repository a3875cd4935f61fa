"""Read and write model folders. Our tensors have the names of llava-hf checkpoints; names.py, family.py rename others.

    folder        a path, or a name `org/name` on the Hugging Face hub
    vision        a folder of a vision tower: CLIP or SigLIP (with or without its text encoder) or DINOv2
    llm           a folder of a language model: Llama, Mistral, Qwen2 or Qwen3, with its tokenizer
    init          a LLaVA: a run; a llava-hf folder; a folder that LLaVA's own code saved: all weights, only
                  mm_projector.bin, or a LoRA and non_lora_trainables.bin

    V vocabulary size
"""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import torch

import chat
from config import stop
from formats.adapter_config import PATTERNS, rank_and_alpha, read_adapter_config
from formats.configs import (CLASSES, image_spec, one_line, read_config, read_pre, strategy, text_config, vision_config,
                             vision_kind)
from formats.families import FAMILIES, family_of
from formats.family import (WORDS, family_files, image_settings, read_names, usual_template, with_ids,
                            write_names)
from formats.hub import find_folder, find_model, weights_file
from formats.metadata import metadata
from formats.names import account, dino_name, published_tensors, renamed
from formats.strict_json import read_json
from formats.tensors import read_tensors, tensor_digest, write_shards
from formats.tokenizer import Tokenizer
from formats.whole import commit, write_file
from model import VLMConfig
from parts.build import build
from parts.features import FeatureTower
from parts.init import init_new
from parts.resize import POSITIONS, asked_side, processor, resampled, resize
from parts.settings import apply_parts

# config.json written by LLaVA's code. LLAVA_TEXT: model_type -> type of the LLM. LLAVA_KEYS: supported values of keys
LLAVA_TEXT = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
LLAVA_KEYS = {"mm_projector_type": ("linear", "mlp2x_gelu"), "mm_vision_select_feature": ("patch",),
              "mm_use_im_start_end": (False,), "mm_patch_merge_type": ("flat",),
              "image_aspect_ratio": ("square", "pad")}


class Folder(NamedTuple):
    """What a model folder holds besides the weights of the VLM. save_model needs it to write a complete folder."""
    tok: Tokenizer
    vision: dict                # config of the vision tower, as published
    text: dict                  # config of the LLM, as published
    pre: dict                   # preprocessor_config.json
    unused: dict                # {name: tensor} of ViT blocks after the feature layer: not in our VLM, saved unchanged
    meta: dict                  # template, system text and image_aspect, if this repository trained the model
    digests: dict = {}          # {name: tensor_digest(tensor)} of the VLM's tensors
    notes: list = []            # lines for the user, about added tokens and resampled position embeddings
    words: dict = {}            # {file name: content} of the tokenizer of InstructBLIP's Q-Former


def read_tower(folder):
    """Folder of a vision tower -> its config, its preprocessor_config, {our name: tensor}. A folder of BLIP-2's first
    stage (formats/blip2_pairs.py) has a Q-Former, too, which starts the connector: its words and heads are not read."""
    v = read_config(folder)
    kind = v.get("model_type")
    if nested := v.get("vision_config_dict") or v.get("vision_config"):       # CLIP or SigLIP with its text encoder
        v = {"model_type": f"{kind}_vision_model", **nested}
    pre = read_pre(folder, vision_kind(v))                                    # stops here if v is not a vision tower
    tensors, former = read_tensors(folder), {}
    if kind == "pumice_blip2":
        tensors = {k: x for k, x in tensors.items() if re.match(r"vision_model\.|multi_modal_projector\.", k)}
        former = {k: tensors.pop(k) for k in list(tensors) if k.startswith("multi_modal_projector.")}
        former = {k: x for k, x in former.items() if not re.search(r"\.word_|\.position_embedding", k)}
    return v, pre, renamed({f"vision_tower.{k}": x for k, x in tensors.items()}, folder) | former


def read_llava_hf(folder, c):
    """A llava-hf folder and its config.json c -> Folder, {our name: tensor}, index of the feature layer"""
    if c.get("model_type") != "llava":
        stop(f"{folder} holds a {c.get('model_type')!r}, not a llava model")
    v, t, layer = c.get("vision_config") or {}, c.get("text_config") or {}, c.get("vision_feature_layer", -2)
    t = t | {"tie_word_embeddings": bool(c.get("tie_word_embeddings") or t.get("tie_word_embeddings"))}
    layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
    if not isinstance(layer, int):
        stop(f"{folder}: feature layers {layer}; one is supported")
    how, usual = c.get("vision_feature_select_strategy", "default"), strategy(vision_config(v, layer))
    if how != usual:
        stop(f"{folder}: vision_feature_select_strategy {how!r} with {v.get('model_type')} is not supported")
    meta = read_json(folder / "pumice.json", {})
    tensors = renamed(read_tensors(folder), folder)
    if (act := c.get("projector_hidden_act", "gelu")) == "linear":            # save_model wrote a one-matrix connector
        unit, bias = (tensors.pop(f"multi_modal_projector.linear_2.{k}", None) for k in ("weight", "bias"))
        if unit is None or bias is None or bias.any() or not unit.equal(torch.eye(*unit.shape, dtype=unit.dtype)):
            stop(f"{folder}: a linear connector of two matrices is not supported")
    elif act != "gelu":
        stop(f"{folder}: projector_hidden_act {act!r} is not supported")
    if v.get("model_type") == "dinov2_with_registers" and not meta:
        stop(f"{folder}: register tokens among the features of a vision tower are not supported")
    tok = Tokenizer(folder, c.get("image_token_index", c.get("image_token_id", 32000)))
    return Folder(tok, v, t, read_pre(folder, vision_kind(v)), {}, meta), tensors, layer


def read_llava_repository(folder, c):
    """A folder saved by LLaVA's own code, its config.json c -> Folder, {our name: tensor}, index of the feature layer.
    The vision tower is read from another folder. So is the LLM, if only a connector or a LoRA was trained."""
    for key, known in LLAVA_KEYS.items():
        if (value := c.get(key)) not in (None, *known):
            stop(f"{folder}: {key}={value!r}, where {' or '.join(map(repr, known))} is supported")
    base, extra, scale = folder, {}, 0
    if weights_file(folder, "adapter_model"):
        a = read_adapter_config(folder)
        for key in ("use_dora", *PATTERNS, "modules_to_save"):
            if a.get(key):
                stop(f"{folder}: {key}={a[key]} is not supported")
        r, alpha = rank_and_alpha(folder, a)
        base, scale = a.get("base_model_name_or_path"), alpha / r
        extra = read_tensors(folder, "adapter_model") | read_tensors(folder, "non_lora_trainables")
    elif not weights_file(folder):
        base, extra = c.get("_name_or_path"), read_tensors(folder, "mm_projector")
    if not all(name and isinstance(name, str | Path) for name in (base, c["mm_vision_tower"])):
        stop(f"{folder} does not say in its configs which models it was trained on")
    base = find_folder(base)
    v, pre, tensors = read_tower(find_folder(c["mm_vision_tower"]))
    tensors |= renamed(read_tensors(base), base) | renamed(extra, folder)     # `extra` replaces tensors of the base
    for k in [k for k in tensors if k.endswith(".lora_A.weight")]:
        name = k.removesuffix(".lora_A.weight")
        A, B, W = (tensors.pop(k, None) for k in (k, f"{name}.lora_B.weight", f"{name}.weight"))
        if B is None or W is None or W.shape != (len(B), A.shape[1]):
            stop(f"{folder}: the adapter of {name} has no matrix that it fits")
        tensors[f"{name}.weight"] = W.float() + scale * (B.float() @ A.float())
    t = {k: x for k, x in c.items() if not re.match("mm_|tune_mm_|freeze_mm_|use_mm_|image_", k)}
    t["model_type"] = LLAVA_TEXT.get(c.get("model_type"), c.get("model_type"))
    tok = Tokenizer(folder if any(folder.glob("tokenizer*")) else base)
    pre["do_pad"] = c.get("image_aspect_ratio") == "pad"
    return Folder(tok, v, t, pre, {}, {}), tensors, c.get("mm_vision_select_layer", -2)


def read_family(folder, c, family):
    """A folder of another family (formats/family.py), its config.json c -> Folder, {our name: tensor}, VLMConfig"""
    v, t = c.get("vision_config") or {}, c.get("text_config") or {}
    pre = image_settings(folder)
    with one_line(f"{folder}: config.json"):
        cfg = family.config(c, pre)
    with torch.device("meta"):
        wanted = build(cfg).state_dict()
    tensors = family.read(renamed(read_tensors(folder), folder), cfg)
    tensors = read_names(tensors, wanted, family.names(cfg), folder)
    tok = Tokenizer(folder, cfg.image_token_index)
    template = usual_template(family, c, tok)
    meta = {"template": template, "system": chat.template(template).system, "image_aspect":
            "crop" if pre.get("do_center_crop") else "squash"} | read_json(folder / "pumice.json", {})
    cfg.layout = with_ids(cfg.layout, tok)
    words = {k: read_json(folder / WORDS / k) for k in ("tokenizer.json", "tokenizer_config.json")
             if (folder / WORDS / k).is_file()}
    return Folder(tok, v, t, pre, {}, meta, words=words), tensors, cfg


def read_second(name, tensors, side):
    """Add a second vision tower to {our name: tensor} -> its VisionConfig, for images of this side. name: a folder, or
    a name on the hub"""
    v, pre, more = read_tower(find_folder(name))
    cfg = vision_config(v, -2, pre)
    with torch.device("meta"):
        names = FeatureTower(dataclasses.replace(cfg, feature_layer=-1, feature_norm=True)).state_dict()
    for k in names:
        theirs = f"vision_tower.{dino_name(k) if cfg.model_type.startswith('dinov2') else k}"
        if theirs in more:                                                    # account() reports missing tensors
            tensors[f"vision_tower.second.{k}"] = more[theirs]
    table = f"vision_tower.second.{POSITIONS}"
    if table in tensors and tensors[table].numel() == names[POSITIONS].numel():
        tensors[table] = resampled(tensors[table].flatten(0, -2), cfg, side)
    cfg.image_size = side
    return cfg


def is_new(name, cfg, given):
    """Is this tensor absent from the folders because `parts` asked for it? given: the VisionConfig of the folder"""
    if name.startswith("vision_tower."):
        return cfg.vision.model_type != given.model_type or ".post_layernorm." in name
    return not re.match(r"language_model\.(model|lm_head)\.", name)


def load_model(vision="", llm="", init="", connector="mlp", seed=0, dtype=torch.float32, parts=""):
    """Load the LLaVA `init`, or load a vision tower and an LLM and create a connector -> VLM, Folder. With dtype=None,
    tensors keep their dtype and stay memory-mapped; engine.choose copies them later."""
    where, layer, cfg = init or f"{vision} + {llm}", -2, None
    if init:
        at = find_model(init)
        c = read_config(at)
        if family := FAMILIES.get(c.get("model_type")):
            folder, tensors, cfg = read_family(at, c, family)
        else:
            folder, tensors, layer = (read_llava_repository if "mm_vision_tower" in c else read_llava_hf)(at, c)
            connector = "mlp" if any("linear_2" in k for k in tensors) else "linear"
    else:
        vision_at, llm_at = find_folder(vision), find_folder(llm)
        t, (v, pre, tensors) = read_config(llm_at), read_tower(vision_at)
        folder, started = Folder(Tokenizer(llm_at), v, t, pre, {}, {}), tensors.keys()
        tensors = tensors | renamed(read_tensors(llm_at), llm_at)
    cfg = cfg or VLMConfig(vision_config(folder.vision, layer, folder.pre), text_config(folder.text), connector,
                           folder.tok.image)
    if (layers := max(cfg.vision.num_hidden_layers, cfg.text.num_hidden_layers)) > len(tensors):
        stop(f"{where}: {layers:,} layers in its config.json, but {len(tensors):,} tensors in its files")
    if (side := image_spec(folder.pre, "pad").side) != cfg.vision.image_size and init:
        stop(f"{where}: preprocessor_config.json makes images of side {side}, the tower reads {cfg.vision.image_size}")
    head, embedding = (tensors.get(f"language_model.{k}.weight") for k in ("lm_head", "model.embed_tokens"))
    if cfg.text.tie_word_embeddings and head is not None:  # as in transformers 5, tied only if both matrices are equal
        cfg.text.tie_word_embeddings = embedding is not None and torch.equal(head, embedding)
    notes = folder.tok.notes + add_token_rows(tensors, cfg.text, folder.tok, where)
    given, new = cfg.vision, set()
    if init and parts:
        was, side, parts = side, asked_side(parts, cfg, where), ""
        folder = folder._replace(pre=processor(folder.pre, was, side))
    apply_parts(cfg, parts, CLASSES, lambda name: read_second(name, tensors, cfg.vision.image_size))
    cfg.layout = with_ids(cfg.layout, folder.tok)
    if cfg.vision.image_size != given.image_size:                             # parts ask for another size
        side = cfg.vision.image_size
        folder = folder._replace(pre=folder.pre | {"size": {"height": side, "width": side}, "do_center_crop": False})
    with torch.device("meta"):
        model = build(cfg)
    if not init:
        names = model.state_dict().keys()
        if cfg.vision.model_type != given.model_type:                         # parts replace the tower
            tensors = {k: x for k, x in tensors.items() if not k.startswith("vision_tower.") or k in names}
        tensors = {k: x for k, x in tensors.items() if not k.startswith("vision_tower.second.") or k in names}
        new = {k for k in names if k.startswith("multi_modal_projector.") and k not in started
               or k not in tensors and is_new(k, cfg, given)}
    tensors, unused = account(model, tensors, where, new)
    for k, x in (tensors | unused).items():
        if not all(v.isfinite() for v in x.aminmax()):                        # 20 times as fast as x.isfinite().all()
            stop(f"{where}: {k} holds values that are not finite")
    if side != cfg.vision.image_size:
        notes.append(f"images of side {side}, the tower was trained on {cfg.vision.image_size}: its positions are "
                     "resampled")
        resize(cfg, tensors, side)
        with torch.device("meta"):
            model = build(cfg)
    digests = {k: tensor_digest(tensors[k]) for k, _ in model.named_parameters() if k in tensors}
    for k in tensors if dtype else ():                                        # one at a time, to save memory
        tensors[k] = tensors[k].to(dtype, copy=True)                          # a copy, because the file may change
    model.load_state_dict(tensors, strict=False, assign=True)
    init_new(model, new, seed)
    return model, folder._replace(unused=unused, digests=digests, notes=notes)


def add_token_rows(tensors, cfg, tok, where):
    """Add rows to the embedding and the head for new tokens of the tokenizer, up to a multiple of 64 as in LLaVA-HF
    -> [notes for the user]. This function changes `tensors` and cfg.vocab_size.

    A new row is the mean of the V old rows, as in LLaVA. So a new logit is the mean of the old logits. By Jensen's
    inequality, this mean is at most (their log-sum-exp) - log V. So k new rows raise a loss by at most log(1 + k / V).
    """
    V = cfg.vocab_size
    if tok.published > V:
        stop(f"{where}: the tokenizer knows {tok.published} ids, the embedding {V}")
    if len(tok) <= V:
        return []
    cfg.vocab_size = -(-len(tok) // 64) * 64
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        x = tensors.get(name)
        if x is not None and x.shape[:1] == (V,):                             # else account() stops: wrong shape
            mean = sum(part.sum(0, dtype=torch.float64) for part in x.split(4096)) / V     # fp64: same on all machines
            tensors[name] = torch.cat([x, mean.to(x.dtype).expand(cfg.vocab_size - V, -1)])
    return [f"embedding and head get {cfg.vocab_size - V} rows for it, each the mean of the old ones: {V:,} -> "
            f"{cfg.vocab_size:,}"]


def aspect(folder, cfg):
    """-> image_aspect (pad, crop or squash), from pumice.json, or else from the settings of the image processor."""
    crops = folder.pre.get("do_center_crop", cfg.vision.class_token)
    does = "pad" if folder.pre.get("do_pad") else "crop" if crops else "squash"
    return folder.meta.get("image_aspect") or does


def save_model(out, state, cfg, folder, template, system, aspect, dtype=torch.float16, card=""):
    """Write a complete folder of LLaVA or another family, or nothing after an error. state: {name: tensor} of a VLM,
    each rounded to dtype when its shard is written, so memory never holds a second model. card: text of README.md"""
    family, state = family_of(cfg), {**folder.unused, **state}
    files = family_files(family, folder, cfg, template, system, aspect, dtype) if family else metadata(
        folder, cfg, template, system, aspect, dtype)
    tensors = (family.write(write_names(state, family.names(cfg)), cfg) if family else
               published_tensors(state, cfg))
    files["README.md"] = card
    if bad := next((k for k, x in tensors.items() if not x.to(dtype).isfinite().all()), None):
        stop(f"{out}: {bad} is not finite in {dtype} and is not published")

    def fill(tmp):
        write_shards(tmp, tensors, dtype)
        for name, content in files.items():
            (tmp / name).parent.mkdir(exist_ok=True)
            write_file(tmp / name, content)

    commit(out, fill)
