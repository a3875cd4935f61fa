"""Published folders in and out. The state dict of model.VLM is the llava-hf layout already, so reading is one renaming
of older and newer spellings, and writing is none. A missing or unexpected tensor is an error that names it.

    folder        what is read from it
    vision        config.json (CLIP, SigLIP), preprocessor_config.json, *.safetensors
    llm           config.json (Llama, Mistral, Qwen2, Qwen3), tokenizer.json, tokenizer_config.json, *.safetensors
    init          a LLaVA folder, or the folder of a run: all of that at once
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import chat
from checkpoint import commit
from config import read_json, stop
from data import ImageSpec
from model import ACTIVATIONS, VLM, TextConfig, VisionConfig, VLMConfig, init_weights

# what published files hold and nobody needs: position ids and rope tables are made anew, a CLIP's text half is not ours
UNUSED = re.compile(r"(.*\.)?(position_ids|rotary_emb\.inv_freq)$|text_model\.|(visual|text)_projection\."
                    r"|logit_(scale|bias)$|(vision_model\.)?head\.")
SHARD = 5 * 10**9  # bytes per file, as published models have them

# what an absent key of config.json means, class by class, where it is not the default of VisionConfig or TextConfig
VISION = {"clip_vision_model": {},
          "siglip_vision_model": dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, patch_size=16,
                                      image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))}
TEXT = {"llama": dict(architecture="LlamaForCausalLM"),
        "mistral": dict(architecture="MistralForCausalLM", intermediate_size=14336, num_key_value_heads=8,
                        max_position_embeddings=131072, sliding_window=4096),
        "qwen2": dict(architecture="Qwen2ForCausalLM", vocab_size=151936, intermediate_size=22016,
                      num_key_value_heads=32, max_position_embeddings=32768),
        "qwen3": dict(architecture="Qwen3ForCausalLM", vocab_size=151936, intermediate_size=22016,
                      num_key_value_heads=32, max_position_embeddings=32768, head_dim=128)}


# what makes transformers' image processors do what image_aspect says, for pictures of side S
PROCESSORS = {
    "pad": lambda S: {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
    "crop": lambda S: {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True,
                       "size": {"shortest_edge": S}, "crop_size": {"height": S, "width": S}},
    "squash": lambda S: {"image_processor_type": "SiglipImageProcessor", "do_center_crop": False,
                         "size": {"height": S, "width": S}, "crop_size": None}}


# ---- reading --------------------------------------------------------------------------------------------------------

def read_tensors(folder, stem="model"):
    """All tensors of a folder, from one file or from the shards of an index that stay inside it -> {name: tensor}"""
    folder = Path(folder)
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(n, str) for n in where.values()):
            stop(f"{index} has no weight_map that says which tensor lies in which file")
        names = sorted(set(where.values()))
        if bad := [n for n in names if Path(n).name != n]:
            stop(f"{index} names a shard outside its folder: {bad[0]}")
    else:
        names, where = [f"{stem}.safetensors"], {}
    out = {}
    for name in names:
        if not (folder / name).is_file():
            pickles = [*folder.glob("*.bin"), *folder.glob("*.pt")]
            hint = "is a pickle, which can run code: convert it to safetensors first"
            stop(f"{folder / name} is missing" + (f"; {pickles[0].name} {hint}" if pickles else ""))
        try:
            with safe_open(folder / name, "pt") as f:
                for key in f.keys():
                    if key in out:
                        stop(f"{folder}: {key} stands in two shards")
                    out[key] = f.get_tensor(key)
        except SafetensorError as e:
            stop(f"{folder / name} is not a whole safetensors file: {e}")
    if lost := sorted(set(where) - set(out)):
        stop(f"{folder}: {lost[0]} stands in the index and in no shard")
    return out


def vision_config(c, feature_layer=-2, pre={}):
    """config.json of a vision tower -> VisionConfig; absent keys take the defaults of their class."""
    kind = c.get("model_type", "clip_vision_model")
    if kind not in VISION:
        stop(f"vision tower of type {kind!r}: {', '.join(VISION)} are known here")
    fields = {f.name for f in dataclasses.fields(VisionConfig)}
    given = {k: v for k, v in c.items() if k in fields and v is not None}
    given |= {k: tuple(pre[k]) for k in ("image_mean", "image_std") if pre.get(k) is not None}
    cfg = VisionConfig(**VISION[kind] | given | dict(model_type=kind, feature_layer=feature_layer))
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
    """config.json of a language model -> TextConfig; absent keys as above. Flat rope keys win over transformers 5's."""
    kind = c.get("model_type", "llama")
    if kind not in TEXT:
        stop(f"language model of type {kind!r}: {', '.join(TEXT)} are known here")
    if (act := c.get("hidden_act", "silu")) != "silu":
        stop(f"language model with hidden_act {act!r}: silu is known here")
    fields = {f.name for f in dataclasses.fields(TextConfig)}
    window = c.get("sliding_window", TEXT[kind].get("sliding_window"))        # null is a value here: no window
    d = TEXT[kind] | {k: v for k, v in c.items() if v is not None}
    heads, width = d.setdefault("num_attention_heads", 32), d.setdefault("hidden_size", 4096)
    d.setdefault("num_key_value_heads", heads)
    d.setdefault("head_dim", width // heads)
    rope = dict(d.get("rope_parameters", {}))                                 # transformers 5
    d.setdefault("rope_theta", rope.pop("rope_theta", 1e4))
    if rope.get("rope_type", "default") != "default":
        d.setdefault("rope_scaling", rope)
    scaling = d.get("rope_scaling", {})
    if (how := scaling.get("rope_type", scaling.get("type", "default"))) not in ("default", "linear", "llama3"):
        stop(f"rope scaling {how!r}: default, linear and llama3 are known here")
    if kind in ("qwen2", "qwen3"):                                            # a window from some layer on, if at all
        L, first = d.get("num_hidden_layers", 32), d.get("max_window_layers", 28)
        window = window if d.get("use_sliding_window") and first < L else None
        if window and first > 0:
            stop(f"a sliding window in layers {first} to {L - 1} alone is not known here")
    bias = d.get("attention_bias", False)
    d |= dict(model_type=kind, sliding_window=window, qkv_bias=bias or kind == "qwen2", o_bias=bias,
              qk_norm=kind == "qwen3")
    return TextConfig(**{k: v for k, v in d.items() if k in fields})


def rename(name):
    """Any known spelling of a LLaVA tensor -> the llava-hf one, which is ours."""
    name = re.sub(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.", name)    # transformers 4.52 on, in memory
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)   # transformers 5, new ones


class Folder(NamedTuple):
    """What a model came with beside its weights, for writing it out again."""
    tok: chat.Tokenizer
    vision: dict                # config of the tower, as published
    text: dict                  # config of the language model, as published
    pre: dict                   # preprocessor_config.json
    spare: dict                 # tensors that are not built: blocks behind the feature layer, the last norm
    meta: dict                  # template, system text and image_aspect of a model that was trained here
    marks: dict = {}            # {name: mark(tensor)} of what was read


def load(vision="", llm="", init="", connector="mlp", seed=0):
    """-> VLM in fp32, Folder. From two towers with a new connector, or from `init`; every tensor accounted for."""
    where = init or f"{vision} + {llm}"
    if init:
        folder = find_model(init)
        c, tensors = read_json(folder / "config.json"), {}
        if c.get("model_type") != "llava" or not c.get("vision_config") or not c.get("text_config"):
            stop(f"{folder} holds a {c.get('model_type')!r}, not a llava model with its vision_config and text_config")
        for k, x in read_tensors(folder).items():
            if tensors.setdefault(rename(k), x) is not x:
                stop(f"{folder} holds {rename(k)} under two names")
        v, t, pre = c["vision_config"], c["text_config"], read_json(folder / "preprocessor_config.json")
        layer, image_id = c.get("vision_feature_layer", -2), c.get("image_token_index", c.get("image_token_id", 32000))
        if (act := c.get("projector_hidden_act", "gelu")) == "linear":        # one matrix, as published_tensors writes it
            unit, bias = (tensors.pop(f"multi_modal_projector.linear_2.{k}", None) for k in ("weight", "bias"))
            if unit is None or bias is None or bias.any() or not unit.equal(torch.eye(*unit.shape, dtype=unit.dtype)):
                stop(f"{folder}: a linear connector of two matrices is not known here")
        connector = "mlp" if any("linear_2" in k for k in tensors) else "linear"
        meta = read_json(folder / "pumice.json") if (folder / "pumice.json").is_file() else {}
        tok = chat.Tokenizer(folder)
        if not isinstance(layer, int):
            stop(f"{folder}: several feature layers {layer}; one is known here")
        if act not in ("gelu", "linear"):
            stop(f"{folder}: projector_hidden_act {act!r} is not known here")
    else:
        vision, llm = Path(vision), Path(llm)
        v, t = read_json(vision / "config.json"), read_json(llm / "config.json")
        pre = read_json(vision / "preprocessor_config.json")
        if "vision_config" in v:                                              # a CLIP or SigLIP with both its halves
            v = {"model_type": f"{v.get('model_type')}_vision_model", **v["vision_config"]}
        tensors = {"vision_tower.vision_model." + k.removeprefix("vision_model."): x
                   for k, x in read_tensors(vision).items() if not UNUSED.match(k)}
        tensors |= {"language_model." + k: x for k, x in read_tensors(llm).items()}
        layer, meta, tok = -2, {}, chat.Tokenizer(llm)
        image_id = tok.specials.get(chat.IMAGE)
        if image_id is None or image_id >= t.get("vocab_size", 32000):
            stop(f"the tokenizer in {llm} has no {chat.IMAGE} token with a row in the embedding")
    cfg = VLMConfig(vision_config(v, layer, pre), text_config(t), connector, image_id)
    if init and (how := c.get("vision_feature_select_strategy", "default")) != strategy(cfg.vision):
        stop(f"{folder}: vision_feature_select_strategy {how!r} with {cfg.vision.model_type} is not known here")
    if (side := image_spec(pre, "pad").side) != cfg.vision.image_size:
        stop(f"{where}: preprocessor_config.json makes pictures of side {side}, the tower reads "
             f"{cfg.vision.image_size}")
    if cfg.text.vocab_size < len(tok):
        stop(f"{where}: the tokenizer knows {len(tok)} ids, the embedding {cfg.text.vocab_size}")
    with torch.device("meta"):
        model = VLM(cfg)
    want = dict(model.named_parameters())
    if cfg.text.tie_word_embeddings:
        tensors.pop("language_model.lm_head.weight", None)
    spare = {k: tensors.pop(k) for k in list(tensors) if not_built(k, cfg.vision.depth)}
    new = set() if init else {k for k in want if k.startswith("multi_modal_projector.")}
    if missing := sorted(want.keys() - tensors.keys() - new):
        stop(f"{where}: {len(missing)} tensor(s) missing, the first is {missing[0]}")
    tensors = {k: x for k, x in tensors.items() if not UNUSED.match(re.sub(r"^(vision_tower|language_model)\.", "", k))}
    if extra := sorted(tensors.keys() - want.keys()):
        stop(f"{where}: {len(extra)} unexpected tensor(s), the first is {extra[0]}")
    for k in want.keys() - new:
        if tensors[k].shape != want[k].shape:
            stop(f"{where}: {k} has shape {tuple(tensors[k].shape)}, the config says {tuple(want[k].shape)}")
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for k, p in model.named_parameters():
            if k not in new:
                p.copy_(tensors.pop(k))
    marks = {k: mark(p) for k, p in model.named_parameters() if k not in new}
    if new:
        init_weights(model.multi_modal_projector, seed)
    return model, Folder(tok, v, t, pre, spare, meta, marks)


def mark(tensor):
    """A short digest: shape, the sum of all bits, and some thousand values in their places. As fast as memory, where a
    real hash of 7B parameters takes a minute on every rank; no other model has it."""
    bits = tensor.detach().float().cpu().contiguous().flatten().view(torch.int32)
    some = bits[:: max(1, len(bits) // 1024)].tolist()
    return hashlib.sha256(repr((tuple(tensor.shape), int(bits.sum()), some)).encode()).hexdigest()[:16]


def fingerprint(marks):
    """{name: mark} -> one digest of a base, whatever the order of its tensors"""
    return hashlib.sha256(json.dumps(sorted(marks.items())).encode()).hexdigest()[:16]


def not_built(name, depth):
    """Does a tensor belong to a part of the vision tower that lies behind the feature layer?"""
    found = re.match(r"vision_tower\.vision_model\.(post_layernorm\.|encoder\.layers\.(\d+)\.)", name)
    return bool(found) and (found[2] is None or int(found[2]) >= depth)


def strategy(vision):
    """In the words of transformers: is the first token of the tower, a class token, left behind?"""
    return "default" if vision.class_token else "full"


def find_model(path):
    """A run folder, its model/, or any LLaVA folder -> the folder with config.json of a model in it."""
    path = Path(path)
    for p in (path / "model", path):
        if (p / "model.safetensors").is_file() or (p / "model.safetensors.index.json").is_file():
            return p
    if not path.exists():
        stop(f"{path} holds no model: there is no such folder")
    stop(f"{path} holds no model: no model.safetensors in it or in {path / 'model'}")


def aspect(folder, cfg):
    """How the pictures of a LLaVA folder became squares: ours says so, of others the image processor does."""
    crops = folder.pre.get("do_center_crop", cfg.vision.class_token)
    does = "pad" if folder.pre.get("do_pad") else "crop" if crops else "squash"
    says = folder.meta.get("image_aspect") or does
    if (says == "pad") != (does == "pad"):
        stop(f"{folder.tok.folder}: pumice.json says image_aspect={says}, preprocessor_config.json "
             f"{'pads' if does == 'pad' else 'does not pad'}")
    return says


def image_spec(pre, aspect):
    """preprocessor_config.json and the wished aspect -> ImageSpec"""
    if aspect not in ("pad", "crop", "squash"):
        stop(f"image_aspect={aspect}: pad, crop or squash")
    if not pre.get("do_resize", True):
        stop("preprocessor_config.json: do_resize=false is not known here, where every picture becomes one square")
    size = (pre.get("crop_size") if pre.get("do_center_crop", True) else None) or pre.get("size", 224)
    sides = {size} if isinstance(size, int) else {size.get(k) for k in ("height", "width", "shortest_edge")} - {None}
    resample = pre.get("resample", 3)
    if len(sides) != 1 or not isinstance(side := sides.pop(), int) or side < 1:
        stop(f"preprocessor_config.json: pictures of size {size} are no squares of one side")
    if resample not in list(Image.Resampling):
        stop(f"preprocessor_config.json: resample={resample} is no filter of Pillow's")
    mean = tuple(pre.get("image_mean") or ImageSpec(0).mean)
    return ImageSpec(side, aspect, Image.Resampling(resample), mean)


# ---- writing --------------------------------------------------------------------------------------------------------

def save(out, state, cfg, folder, template, system, aspect, dtype=torch.float16, card=""):
    """A complete llava-hf folder, whole or absent, that transformers since 4.46 reads alike. state: the tensors of a VLM
    by name; each is rounded to dtype when its shard is written, so that there is never a second copy of all of them."""
    v, t, tok = cfg.vision, cfg.text, folder.tok
    names = {i: name for name, i in tok.specials.items()}
    pad, image, talk = pad_id(tok), names[cfg.image_token_index], chat.jinja(template, system)
    stops = sorted(chat.stop_ids(tok, template)) if chat.template(template).stop != "\n" else [tok.eos]

    def published(old, new, keys):
        """The config a part came with, and over it what was built."""
        old = {k: x for k, x in old.items() if k not in ("rope_parameters", "dtype", "torch_dtype")}
        return old | {k: getattr(new, k) for k in keys.split()}

    sizes = "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads "
    text = published(folder.text, t, sizes + "num_key_value_heads head_dim vocab_size rms_norm_eps rope_theta "
                     "rope_scaling max_position_embeddings tie_word_embeddings")
    text["architectures"] = [TEXT[t.model_type]["architecture"]]
    vision = published(folder.vision, v, sizes + "image_size patch_size hidden_act layer_norm_eps")
    vision["num_channels"] = 3
    if v.model_type.startswith("dinov2"):
        vision["mlp_ratio"] = vision.pop("intermediate_size") // v.hidden_size
    if v.model_type == "siglip_vision_model":
        vision["vision_use_head"] = False                                     # the pooling head is not kept
    pre = {k: x for k, x in folder.pre.items() if k != "do_pad"}
    pre |= {"processor_class": "LlavaProcessor"} | PROCESSORS[aspect](v.image_size)
    tokenizer = read_json(tok.folder / "tokenizer.json") | {"post_processor": None}   # the template writes BOS
    files = {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "ignore_index": -100,
            "image_token_index": cfg.image_token_index, "image_seq_length": v.patches,
            "projector_hidden_act": "gelu" if cfg.connector == "mlp" else "linear",
            "multimodal_projector_bias": True, "vision_feature_layer": v.feature_layer,
            "vision_feature_select_strategy": strategy(v), "pad_token_id": pad,
            "tie_word_embeddings": t.tie_word_embeddings, "torch_dtype": str(dtype).removeprefix("torch."),
            "text_config": text, "vision_config": vision},
        "generation_config.json": {
            "bos_token_id": tok.bos, "eos_token_id": stops if len(stops) > 1 else stops[0], "pad_token_id": pad,
            "do_sample": False},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names.get(tok.bos),
            "eos_token": names.get(tok.eos), "pad_token": names.get(pad),
            "unk_token": "<unk>" if "<unk>" in tok.specials else None, "model_max_length": t.max_position_embeddings,
            "padding_side": "left", "clean_up_tokenization_spaces": False, "image_token": image,
            "model_input_names": ["input_ids", "attention_mask"], "processor_class": "LlavaProcessor",
            "chat_template": talk},                                           # where transformers before 4.50 look,
        "chat_template.json": {"chat_template": talk},                        # and their processors
        "preprocessor_config.json": pre,
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "patch_size": v.patch_size, "image_token": image,
            # a processor does nothing but count with these: P + 1 - 1 whichever the tower, for 4.46 always adds the 1
            "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        "pumice.json": {"template": template, "system": system, "image_aspect": aspect}}

    tensors = published_tensors({**state, **folder.spare}, cfg)
    if bad := next((k for k, x in tensors.items() if not x.to(dtype).isfinite().all()), None):
        stop(f"{out}: {bad} is not finite in {dtype} and is not published")

    def fill(tmp):
        write_shards(tmp, tensors, dtype)
        for name, obj in files.items():
            write(tmp / name, obj)
        front = "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
        (tmp / "README.md").write_text(f"{front}{card}\n", "utf-8")
        (tmp / "chat_template.jinja").write_text(talk, "utf-8")

    commit(out, fill)


def pad_id(tok):
    known = ("<pad>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
    return next((tok.specials[n] for n in known if n in tok.specials), tok.eos)


def write(path, obj):
    path.write_text(json.dumps(obj, indent=2, ensure_ascii=False), "utf-8")


# our names of a DINOv2's tensors and its own
DINOV2 = (("vision_tower.vision_model.", "vision_tower."), ("class_embedding", "cls_token"), ("encoder.layers.", "encoder.layer."),
          ("patch_embedding.", "patch_embeddings.projection."), ("position_embedding.weight", "position_embeddings"),
          ("layer_norm", "norm"), ("self_attn.out_proj", "attention.output.dense"), ("self_attn.q_proj", "attention.attention.query"),
          ("self_attn.k_proj", "attention.attention.key"), ("self_attn.v_proj", "attention.attention.value"),
          ("layer_scale1", "layer_scale1.lambda1"), ("layer_scale2", "layer_scale2.lambda1"), ("post_layernorm", "layernorm"))


def published_tensors(state, cfg):
    """The tensors of a VLM as transformers' Llava names and shapes them. A connector of one matrix is written as two, the
    second one the unit matrix and nothing between them: the same numbers, exactly, for there is no other way to say it."""
    out = dict(state)
    if cfg.connector == "linear":
        C = cfg.text.hidden_size
        out |= {"multi_modal_projector.linear_2.weight": torch.eye(C), "multi_modal_projector.linear_2.bias": torch.zeros(C)}
    if not cfg.vision.model_type.startswith("dinov2"):
        return out
    tower = {k: out.pop(k) for k in list(out) if k.startswith("vision_tower.")}
    for k, x in tower.items():
        for ours, theirs in DINOV2:
            k = k.replace(ours, theirs)
        tokens = re.search("cls_token|register_tokens|position_embeddings", k)
        out[k] = x.reshape(1, -1, x.shape[-1]) if tokens else x
    out.setdefault("vision_tower.embeddings.mask_token", torch.zeros(1, cfg.vision.hidden_size))   # never read
    return out


def write_shards(folder, tensors, dtype):
    """model.safetensors, or shards of at most SHARD bytes and their index; tensors are rounded one shard at a time."""
    nbytes = {k: tensors[k].numel() * dtype.itemsize for k in sorted(tensors)}
    shards, size = [[]], 0
    for k, n in nbytes.items():
        if shards[-1] and size + n > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(k)
        size += n
    n = len(shards)
    names = [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)] if n > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards):
        save_file({k: tensors[k].detach().to("cpu", dtype).contiguous() for k in shard}, folder / name,
                  metadata={"format": "pt"})                       # transformers 4.46 reads no file without it
    if n > 1:
        write(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(nbytes.values())},
            "weight_map": {k: name for name, shard in zip(names, shards) for k in shard}})
