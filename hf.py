"""Published folders in and out. The state dict of model.VLM is the llava-hf layout already, so reading is one renaming of older and
newer spellings, and writing is none. A missing or unexpected tensor is an error that names it.

    folder        what is read from it
    vision        config.json (CLIP, SigLIP), preprocessor_config.json, *.safetensors
    llm           config.json (Llama, Mistral, Qwen2, Qwen3), tokenizer.json, tokenizer_config.json, *.safetensors
    init          a LLaVA folder, or the folder of a run: all of that at once
"""

import dataclasses
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
from config import stop
from data import ImageSpec
from model import VLM, TextConfig, VisionConfig, VLMConfig, init_weights

# what published files hold and nobody needs: position ids and rope tables are recomputed, a CLIP's text half is not ours
UNUSED = re.compile(r"(.*\.)?(position_ids|rotary_emb\.inv_freq)$|text_model\.|visual_projection|text_projection|logit_scale|logit_bias|(vision_model\.)?head\.")
SHARD = 5 * 10**9  # bytes per file, as published models have them


# ---- reading ------------------------------------------------------------------------------------------------------------------

def read_json(path):
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        stop(f"{path} is missing")
    except ValueError as e:
        stop(f"{path} is not json: {e}")


def read_tensors(folder):
    """All tensors of a folder, from one file or from the shards of an index that stay inside it -> {name: tensor}"""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
        if bad := [n for n in names if Path(n).name != n]:
            stop(f"{index} names a shard outside its folder: {bad[0]}")
    else:
        names = ["model.safetensors"]
    out = {}
    for name in names:
        if not (folder / name).is_file():
            pickles = [*folder.glob("*.bin"), *folder.glob("*.pt")]
            stop(f"{folder / name} is missing" + (f"; {pickles[0].name} is a pickle, which can run code: convert it to safetensors first" if pickles else ""))
        try:
            with safe_open(folder / name, "pt") as f:
                for key in f.keys():
                    if key in out:
                        stop(f"{folder}: {key} stands in two shards")
                    out[key] = f.get_tensor(key)
        except SafetensorError as e:
            stop(f"{folder / name} is not a whole safetensors file: {e}")
    return out


def vision_config(c, feature_layer=-2, pre={}):
    """config.json of a vision tower -> VisionConfig; absent keys take the defaults of their class, as transformers does."""
    kind = c.get("model_type", "clip_vision_model")
    if kind in ("clip", "siglip"):
        c, kind = c["vision_config"], f"{kind}_vision_model"
    defaults = {"clip_vision_model": dict(hidden_act="quick_gelu", layer_norm_eps=1e-5, patch_size=32),
                "siglip_vision_model": dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, patch_size=16)}
    if kind not in defaults:
        stop(f"vision tower of type {kind!r}: {', '.join(defaults)} are known here")
    d = {**dataclasses.asdict(VisionConfig()), **defaults[kind], **{k: v for k, v in c.items() if v is not None}, "model_type": kind, "feature_layer": feature_layer}
    half = dict(image_mean=(0.5,) * 3, image_std=(0.5,) * 3) if kind == "siglip_vision_model" else {}
    d |= half | {k: tuple(pre[k]) for k in ("image_mean", "image_std") if k in pre}
    return VisionConfig(**{f.name: d[f.name] for f in dataclasses.fields(VisionConfig)})


def text_config(c):
    """config.json of a language model -> TextConfig"""
    kind = c.get("model_type", "llama")
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        stop(f"language model of type {kind!r}: llama, mistral, qwen2 and qwen3 are known here")
    c = {k: v for k, v in c.items() if v is not None}
    heads, width = c.get("num_attention_heads", 32), c.get("hidden_size", 4096)
    rope = dict(c.get("rope_parameters") or {})            # transformers 5; the flat keys are older and win where both stand
    theta = c.get("rope_theta", rope.pop("rope_theta", 1e4))
    scaling = c.get("rope_scaling", rope if rope.get("rope_type", "default") != "default" else None)
    bias = c.get("attention_bias", False)
    window = c.get("sliding_window") if kind == "mistral" or c.get("use_sliding_window") else None
    return TextConfig(
        model_type=kind, vocab_size=c.get("vocab_size", 32000), hidden_size=width, intermediate_size=c.get("intermediate_size", 11008),
        num_hidden_layers=c.get("num_hidden_layers", 32), num_attention_heads=heads, num_key_value_heads=c.get("num_key_value_heads", heads),
        head_dim=c.get("head_dim", width // heads), rms_norm_eps=c.get("rms_norm_eps", 1e-6), rope_theta=theta, rope_scaling=scaling,
        max_position_embeddings=c.get("max_position_embeddings", 4096), tie_word_embeddings=c.get("tie_word_embeddings", False),
        qkv_bias=bias or kind == "qwen2", o_bias=bias, mlp_bias=c.get("mlp_bias", False), qk_norm=kind == "qwen3", sliding_window=window)


def rename(name):
    """Any known spelling of a LLaVA tensor -> the llava-hf one, which is ours."""
    name = re.sub(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.", name)             # transformers 4.52 and later, in memory
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)      # transformers 5, new models


class Folder(NamedTuple):
    """What a model came with beside its weights, for writing it out again."""
    tok: chat.Tokenizer
    vision: dict                # config of the tower, as published
    text: dict                  # config of the language model, as published
    pre: dict                   # preprocessor_config.json
    spare: dict                 # tensors that are published but not built: blocks behind the feature layer, the last norm
    meta: dict                  # template and system text of a model that was trained here


def load(vision="", llm="", init="", connector="mlp", seed=0, need_tokens=True):
    """-> VLM in fp32, Folder. From two towers with a new connector, or from `init`; every tensor accounted for."""
    if init:
        folder = find_model(init)
        c, tensors = read_json(folder / "config.json"), {rename(k): v for k, v in read_tensors(folder).items()}
        if c.get("model_type") != "llava":
            stop(f"{folder} holds a {c.get('model_type')!r}, not a llava model")
        v, t, pre = dict(c["vision_config"]), dict(c["text_config"]), read_json(folder / "preprocessor_config.json")
        layer = c.get("vision_feature_layer", -2)
        if isinstance(layer, list):
            stop(f"{folder}: several feature layers {layer}; one is known here")
        connector = "mlp" if any("linear_2" in k for k in tensors) else "linear"
        image_id = c.get("image_token_index", c.get("image_token_id"))
        meta = read_json(folder / "pumice.json") if (folder / "pumice.json").is_file() else {}
        tok, given = chat.Tokenizer(folder), {"multi_modal_projector"}
    else:
        vision, llm = Path(vision), Path(llm)
        v, t = read_json(vision / "config.json"), read_json(llm / "config.json")
        pre = read_json(vision / "preprocessor_config.json")
        v = {"model_type": f"{v['model_type']}_vision_model", **v["vision_config"]} if "vision_config" in v else v
        tensors = {"vision_tower." + (k if k.startswith("vision_model.") else "vision_model." + k): x for k, x in read_tensors(vision).items() if not UNUSED.match(k)}
        tensors |= {"language_model." + k: x for k, x in read_tensors(llm).items()}
        layer, meta, given, tok = -2, {}, set(), chat.Tokenizer(llm)
        image_id = tok.specials.get(chat.IMAGE)
        if image_id is None or image_id >= t["vocab_size"]:
            stop(f"the tokenizer in {llm} has no {chat.IMAGE} token with a row in the embedding")
    cfg = VLMConfig(vision_config(v, layer, pre), text_config(t), connector, image_id)
    if c_skip := (c.get("vision_feature_select_strategy", "default") == "full" and cfg.vision.class_token if init else False):
        stop(f"{init}: vision_feature_select_strategy 'full' with a class token is not known here")
    with torch.device("meta"):
        model = VLM(cfg)
    want = model.state_dict()
    if cfg.text.tie_word_embeddings:
        tensors.pop("language_model.lm_head.weight", None)
    spare = {k: tensors.pop(k) for k in list(tensors) if k not in want and re.match(r"vision_tower\.vision_model\.(post_layernorm|encoder\.layers\.)", k)}
    where = init or f"{vision} + {llm}"
    new = {k for k in want if k.split(".")[0] not in given and k.startswith("multi_modal_projector.")}
    if missing := sorted(set(want) - set(tensors) - new):
        stop(f"{where}: {len(missing)} tensor(s) missing, the first is {missing[0]}")
    if extra := sorted(k for k in set(tensors) - set(want) if not UNUSED.match(k.removeprefix("vision_tower.").removeprefix("language_model."))):
        stop(f"{where}: {len(extra)} unexpected tensor(s), the first is {extra[0]}")
    model = model.to_empty(device="cpu")
    if new:
        init_weights(model.multi_modal_projector, seed)
    with torch.no_grad():
        for k, p in model.named_parameters():
            if k in new:
                continue
            if tensors[k].shape != p.shape:
                stop(f"{where}: {k} has shape {tuple(tensors[k].shape)}, the config says {tuple(p.shape)}")
            p.copy_(tensors.pop(k))
    if cfg.text.vocab_size < len(tok):
        stop(f"{where}: the tokenizer knows {len(tok)} ids, the embedding {cfg.text.vocab_size}")
    return model, Folder(tok, v, t, pre, spare, meta)


def find_model(path):
    """A run folder, its model/, or any LLaVA folder -> the folder with config.json of a model in it."""
    path = Path(path)
    for p in (path / "model", path):
        if (p / "model.safetensors").is_file() or (p / "model.safetensors.index.json").is_file():
            return p
    stop(f"{path} holds no model: neither {path / 'model'} nor model.safetensors" + ("" if path.exists() else " (there is no such folder)"))


def image_spec(pre, aspect):
    """preprocessor_config.json and the wished aspect -> ImageSpec"""
    if aspect not in ("pad", "crop", "squash"):
        stop(f"image_aspect={aspect}: pad, crop or squash")
    size = pre.get("crop_size") or pre.get("size", 224)
    side = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
    return ImageSpec(side, aspect, Image.Resampling(pre.get("resample", 3)), tuple(pre.get("image_mean", ImageSpec(0).mean)))


# ---- writing ------------------------------------------------------------------------------------------------------------------

def save(out, state, cfg, folder, template, system, aspect, dtype=torch.float16, card=""):
    """A complete llava-hf folder, whole or absent. state: the tensors of a VLM by name."""
    def fill(tmp):
        tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in {**state, **folder.spare}.items()}
        write_shards(tmp, tensors)
        t = cfg.text
        text = {**folder.text, "model_type": t.model_type, "vocab_size": t.vocab_size, "hidden_size": t.hidden_size, "intermediate_size": t.intermediate_size,
                "num_hidden_layers": t.num_hidden_layers, "num_attention_heads": t.num_attention_heads, "num_key_value_heads": t.num_key_value_heads,
                "head_dim": t.head_dim, "rms_norm_eps": t.rms_norm_eps, "rope_theta": t.rope_theta, "rope_scaling": t.rope_scaling,
                "max_position_embeddings": t.max_position_embeddings, "tie_word_embeddings": t.tie_word_embeddings}
        text.pop("rope_parameters", None)
        text.setdefault("architectures", [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[t.model_type]])
        v = cfg.vision
        vision = {**folder.vision, **{k: getattr(v, k) for k in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                                                 "image_size", "patch_size", "hidden_act", "layer_norm_eps")}, "num_channels": 3}
        strategy = "default" if v.class_token else "full"
        tok = folder.tok
        write(tmp / "config.json", {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "ignore_index": -100, "image_token_index": cfg.image_token_index,
            "image_seq_length": v.patches, "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "vision_feature_layer": v.feature_layer,
            "vision_feature_select_strategy": strategy, "pad_token_id": pad_id(tok), "tie_word_embeddings": t.tie_word_embeddings,
            "torch_dtype": str(dtype).removeprefix("torch."), "text_config": text, "vision_config": vision})
        stops = sorted(chat.stop_ids(tok, template)) if chat.template(template).stop != "\n" else [tok.eos]
        write(tmp / "generation_config.json", {"bos_token_id": tok.bos, "eos_token_id": stops if len(stops) > 1 else stops[0],
                                               "pad_token_id": pad_id(tok), "do_sample": False})
        spec = json.loads((tok.folder / "tokenizer.json").read_text("utf-8")) | {"post_processor": None}  # the template writes BOS
        write(tmp / "tokenizer.json", spec)
        names = {v: k for k, v in tok.specials.items()}
        write(tmp / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names.get(tok.bos), "eos_token": names.get(tok.eos), "pad_token": names.get(pad_id(tok)),
            "model_max_length": t.max_position_embeddings, "padding_side": "left", "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"], "image_token": names[cfg.image_token_index], "processor_class": "LlavaProcessor"})
        write(tmp / "preprocessor_config.json", {**folder.pre, "processor_class": "LlavaProcessor",
                                                 **({"image_processor_type": "LlavaImageProcessor", "do_pad": True} if aspect == "pad" else {})})
        write(tmp / "processor_config.json", {"processor_class": "LlavaProcessor", "patch_size": v.patch_size, "vision_feature_select_strategy": strategy,
                                              "num_additional_image_tokens": int(v.class_token), "image_token": names[cfg.image_token_index]})
        write(tmp / "pumice.json", {"template": template, "system": system, "image_aspect": aspect})
        (tmp / "README.md").write_text(f"---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n{card}\n", "utf-8")

    commit(out, fill)


def pad_id(tok):
    return next((tok.specials[n] for n in ("<pad>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>") if n in tok.specials), tok.eos)


def write(path, obj):
    path.write_text(json.dumps(obj, indent=2, ensure_ascii=False), "utf-8")


def write_shards(folder, tensors):
    """model.safetensors, or shards of at most SHARD bytes and their index."""
    shards, size = [{}], 0
    for k in sorted(tensors):
        n = tensors[k].numel() * tensors[k].element_size()
        if shards[-1] and size + n > SHARD:
            shards.append({})
            size = 0
        shards[-1][k] = tensors[k]
        size += n
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": {k: n for n, s in zip(names, shards) for k in s}})
