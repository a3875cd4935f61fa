"""Write and read adapters in PEFT's format: adapter_config.json and adapter_model.safetensors. A file pumice.json
holds a digest of the base model's weights, the template, the system text and image_aspect."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from config import Error, stop
from formats.adapter_config import rank_and_alpha, read_adapter_config
from formats.configs import positions, text_config
from formats.hub import find_folder, find_model
from formats.llava import load_model
from formats.metadata import tokenizer_files
from formats.names import name_in_transformers, rename, renamed, spelling
from formats.strict_json import read_json
from formats.tensors import base_digest, read_tensors, tensor_digest
from formats.whole import commit, write_file
from lora import DoRALinear, LoRALinear, add_adapters, merge_state, quantize_base, scales, targets
from parts.build import build

PREFIX = "base_model.model."  # every tensor name in a PEFT file begins with this
# names of the ViT's blocks and final norm. Our VLM has neither the blocks behind the feature layer nor the final norm.
# If a PEFT file adapts those, load_adapter drops their tensors
BEHIND = re.compile(r"vision_tower\.vision_model\.(?:post_layernorm|layernorm|encoder\.layers?\.(\d+))\.")


def save_adapter(out, state, r, alpha, dropout, base, digest, about={}, card="", folder=None, length=0):
    """Write a PEFT folder completely or not at all.

    state     {name: trained tensor}. Trained modules without an adapter are listed in modules_to_save
    base      folder or name of the VLM that is adapted; None if the VLM was put together from a ViT and an LLM
    digest    base_digest of the frozen tensors
    about     other keys of pumice.json: template, system, image_aspect ...
    card      text of README.md
    folder    formats.llava.Folder; its tokenizer and chat template are written, too
    length    how many tokens the LLM can read; 0: as the config.json of the LLM in `folder` says"""
    dino = folder is not None and folder.vision.get("model_type", "").startswith("dinov2")
    tensors = {name_in_transformers(k, dino): x.detach().float().cpu().contiguous() for k, x in state.items()}
    extra = sorted({k.rpartition(".")[0] for k in tensors if ".lora_" not in k})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base and str(base), "r": r,
              "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none",
              "target_modules": sorted({k.split(".lora_")[0] for k in tensors if ".lora_" in k}),
              # outermost modules only: if a module inside a listed one were listed too, PEFT would wrap it twice
              "modules_to_save": [k for k in extra if not k.startswith(tuple(f"{m}." for m in extra))] or None,
              "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True,
              "inference_mode": True}
    files = {"adapter_config.json": config, "pumice.json": {"base": digest, **about}, "README.md": card}
    if folder:
        length = length or positions(text_config(folder.text))
        files |= tokenizer_files(folder.tok, about["template"], about["system"], length)

    def fill(tmp):
        save_file({PREFIX + k: x for k, x in tensors.items()}, tmp / "adapter_model.safetensors", {"format": "pt"})
        for name, content in files.items():
            write_file(tmp / name, content)

    commit(out, fill)


def load_adapter(model, folder):
    """Add the adapter of a PEFT folder to `model`, a VLM from load_model -> names of the adapted layers. Every tensor
    must fit the model. If the folder has a pumice.json, the digest in it must equal the digest of `model`."""
    folder = Path(folder)
    c, v, spell = read_adapter_config(folder), model.cfg.vision, spelling(model)
    if c.get("bias", "none") != "none":
        stop(f"{folder}: bias={c['bias']} is not supported")
    found = {k.removeprefix(PREFIX): x for k, x in read_tensors(folder, "adapter_model").items()}
    for k in list(found):
        block = BEHIND.match(rename(k))
        if block and (block[1] is None or v.depth <= int(block[1]) < v.num_hidden_layers):
            del found[k]
    tensors = renamed(found, folder, spell)
    # the layers that have an adapter: {our name of the layer: its name in the PEFT file}
    there = {spell(k).split(".lora_")[0]: k.split(".lora_")[0] for k in found if ".lora_" in k}
    if not there:
        stop(f"{folder} holds no adapter")
    if strange := sorted(there.keys() - set(targets(model, "*"))):
        stop(f"{folder} holds an adapter of {there[strange[0]]}, which is not a linear layer of this model")
    sizes = {n: rank_and_alpha(folder, c, there[n]) for n in sorted(there)}
    shapes = {k: p.shape for k, p in model.named_parameters()}
    for n, (r, _) in sizes.items():                                           # compute all shapes before any allocation
        layer = model.get_submodule(n)
        shapes |= {f"{n}.lora_A.weight": (r, layer.in_features), f"{n}.lora_B.weight": (layer.out_features, r)}
        shapes |= {f"{n}.lora_magnitude_vector": (layer.out_features,)} if c.get("use_dora") else {}
    if missing := sorted(k for k in shapes.keys() - tensors.keys() if ".lora_" in k):
        stop(f"{folder}: {missing[0]} is missing")
    for k, x in tensors.items():
        if shapes.get(k) != x.shape:
            stop(f"{folder}: {k} {tuple(x.shape)} does not fit this model")
        if not x.isfinite().all():
            stop(f"{folder}: {k} is not finite")
    if says := read_json(folder / "pumice.json", {}):                         # PEFT itself writes no such file
        base = base_digest({k: tensor_digest(p) for k, p in model.named_parameters() if k not in tensors})
        if says.get("base") != base:
            stop(f"{folder} was trained on another base (digest {says.get('base')}) than this model ({base})")
    if says.get("bits") == 4:
        quantize_base(model)
    kind = DoRALinear if c.get("use_dora") else LoRALinear
    for n, (r, alpha) in sizes.items():
        add_adapters(model, r, alpha, c.get("lora_dropout", 0.0), n, kind=kind)
    params = dict(model.named_parameters())
    for k, x in tensors.items():
        params[k].data = x.to(torch.promote_types(x.dtype, params[k].dtype))  # an fp32 adapter stays in fp32
    return list(sizes)


def load_merged(folder, dtype):
    """Load the base model of an adapter and merge the adapter into it -> VLM, Folder, as load_model returns them. Files
    of the adapter name the base model. If this name is a relative path, it starts at the working directory."""
    says = read_json(Path(folder) / "pumice.json", {})
    towers = [says[k] for k in ("vision", "llm") if isinstance(says.get(k), str)]  # [] if the base was one whole VLM
    base = " and ".join(towers) or read_json(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    file = "its pumice.json" if towers else "base_model_name_or_path in its adapter_config.json"
    where = f"{folder} was trained on {base}: {file} says where that lies"
    if not base or not isinstance(base, str):
        stop(where)
    try:
        at = [find_folder(t) for t in towers] or [find_model(base)]
    except Error as e:
        stop(f"{where}, and {e}")
    if towers:                                                                # the connector is in the adapter's files
        mlp = any("linear_2" in k for k in read_tensors(folder, "adapter_model"))
        model, source = load_model(*at, connector="mlp" if mlp else "linear", dtype=None, parts=says.get("parts") or "")
    else:
        model, source = load_model(init=at[0], dtype=None, parts=says.get("parts") or "")  # digest: unrounded tensors
    load_adapter(model, folder)
    for k, p in model.named_parameters():
        if ".lora_" not in k:
            p.data = p.data.to(dtype, copy=True)                              # a copy, rounded as in training
    state = merge_state(model.state_dict(), scales(model), dtype)
    with torch.device("meta"):
        model = build(model.cfg)
    model.load_state_dict(state, assign=True)
    return model, source._replace(meta=source.meta | says)
