"""Adapters as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from config import Error, stop
from formats.configs import adapter_alpha, read_adapter_config
from formats.hub import find_folder, find_model
from formats.llava import load_model, rename, renamed
from formats.strict_json import read_json
from formats.tensors import base_digest, read_tensors, tensor_digest
from lora import DoRALinear, LoRALinear, apply, merge_state, quantize_base, scales, targets
from model import VLM
from run.checkpoint import commit

PREFIX = "base_model.model."  # of every name in a PEFT file
# what the tower holds behind the feature layer, where PEFT puts adapters too, and nobody reads them
UNREAD = re.compile(r"vision_tower\.vision_model\.(post_layernorm|encoder\.layers\.(\d+))\.")


def in_memory(name):
    """Our name of a tensor -> the one it has in the memory of transformers since 4.52, of a tower's since 5, which is
    what PEFT goes by."""
    for ours, theirs in (("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),
                         ("vision_tower.vision_model.", "model.vision_tower."), ("multi_modal_", "model.multi_modal_")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def save_adapter(out, state, r, alpha, dropout, base, mark, about={}, card=""):
    """A PEFT folder, whole or absent. What is trained besides adapters, the connector, goes along by its own name.
    base: a LLaVA, by folder or name; or None where it was none yet but two towers, which `about` then tells (vision,
    llm). mark: hf.fingerprint of all other tensors, which are the base. about: also how the model is asked (template,
    system, image_aspect), and the bits of its base. card: README.md."""
    tensors = {PREFIX + in_memory(k): v.detach().to("cpu", torch.float32).contiguous() for k, v in state.items()}
    names = sorted({in_memory(k).split(".lora_")[0] for k in state if ".lora_" in k})
    extra = sorted({in_memory(k).rpartition(".")[0] for k in state if ".lora_" not in k})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base and str(base), "r": r,
              "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none", "target_modules": names,
              "modules_to_save": extra or None, "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
              "init_lora_weights": True, "inference_mode": True}

    def fill(tmp):
        save_file(tensors, tmp / "adapter_model.safetensors", metadata={"format": "pt"})
        (tmp / "adapter_config.json").write_text(json.dumps(config, indent=2))
        (tmp / "pumice.json").write_text(json.dumps({"base": mark, **about}))
        (tmp / "README.md").write_text(card, "utf-8")

    commit(out, fill)


def own(c, key, pattern, name):
    """r or lora_alpha of a layer: under PEFT's rank_pattern or alpha_pattern that of the first key, a regular
    expression, that its name ends in; the name it had when it was trained, which is that in the file."""
    return next((v for k, v in (c.get(pattern) or {}).items() if re.match(rf"(.*\.)?({k})$", name)), c.get(key))


def unread(model, name):
    """Is a tensor one of the tower behind the feature layer?"""
    v, at = model.cfg.vision, UNREAD.match(name)
    return bool(at) and (at[2] is None or v.depth <= int(at[2]) < v.num_hidden_layers)


def about(folder):
    """What save_adapter says beside PEFT's own files; an adapter that PEFT made says nothing"""
    file = Path(folder) / "pumice.json"
    return read_json(file) if file.is_file() else {}


def load_adapter(model, folder):
    """Wrap `model`, as hf.load read it, with the adapter of a PEFT folder. Every tensor must find its place, and the
    model must be the one that the adapter was trained on, where the folder says which that was."""
    folder = Path(folder)
    c = read_adapter_config(folder)
    if c.get("bias", "none") != "none":
        stop(f"{folder}: bias={c['bias']} is not known here")
    found = {k.removeprefix(PREFIX): v for k, v in read_tensors(folder, "adapter_model").items()}
    found = {k: v for k, v in found.items() if not unread(model, rename(k))}
    tensors = renamed(found, folder)
    there = {rename(k).split(".lora_")[0]: k.split(".lora_")[0] for k in found if ".lora_" in k}   # ours: its own name
    names, linears = sorted(there), targets(model, "*")
    if not names:
        stop(f"{folder} holds no adapter")
    if strange := [there[n] for n in names if n not in linears]:
        stop(f"{folder} holds an adapter of {strange[0]}, which is no linear layer of this model that can carry one")
    if says := about(folder):
        base = {k: tensor_digest(p) for k, p in model.named_parameters() if k not in tensors}
        if (was := says.get("base")) != base_digest(base):
            stop(f"{folder} was trained on another base (fingerprint {was}) than this model ({base_digest(base)})")
    if says.get("bits") == 4:
        quantize_base(model)
    for name in names:
        r = own(c, "r", "rank_pattern", there[name])
        alpha = adapter_alpha(folder, c, r, own(c, "lora_alpha", "alpha_pattern", there[name]))
        apply(model, r, alpha, c.get("lora_dropout", 0.0), name, kind=DoRALinear if c.get("use_dora") else LoRALinear)
    params = dict(model.named_parameters())
    if missing := sorted(k for k in params.keys() - tensors.keys() if ".lora_" in k):
        stop(f"{folder}: {missing[0]} is missing")
    with torch.no_grad():
        for k, v in tensors.items():
            if k not in params or params[k].shape != v.shape:
                stop(f"{folder}: {k} {tuple(v.shape)} does not fit this model")
            if not v.isfinite().all():
                stop(f"{folder}: {k} is not finite")
            params[k].data = v.to(torch.promote_types(v.dtype, params[k].dtype))   # fp32 over a base in fp16 stays so
    return names


def load_merged(folder, dtype):
    """The folder of an adapter -> VLM, Folder, as hf.load reads a model: its base, and the adapter merged with it as a
    run's model/ is. The base is found where the adapter says; a relative path counts from here."""
    says = about(folder)
    towers = [says[k] for k in ("vision", "llm") if isinstance(says.get(k), str)]         # where it was no LLaVA yet
    base = " and ".join(towers) or read_json(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    file = "its pumice.json" if towers else "base_model_name_or_path in its adapter_config.json"
    where = f"{folder} was trained on {base}: {file} says where that lies"
    if not base or not isinstance(base, str):
        stop(where)
    try:
        at = [find_folder(t) for t in towers] or [find_model(base)]
    except Error as e:
        stop(f"{where}, and {e}")
    if towers:                                                                # and a connector that is in the adapter
        mlp = any("linear_2" in k for k in read_tensors(folder, "adapter_model"))
        model, source = load_model(*at, connector="mlp" if mlp else "linear", dtype=None)
    else:
        model, source = load_model(init=at[0], dtype=None)                          # unrounded: the fingerprint is of that
    load_adapter(model, folder)
    for k, p in model.named_parameters():
        if ".lora_" not in k:
            p.data = p.data.to(dtype, copy=True)                              # as trained over; no view of a file
    state = merge_state(model.state_dict(), scales(model), dtype)
    with torch.device("meta"):
        model = VLM(model.cfg)
    model.load_state_dict(state, assign=True)
    pre = source.pre
    if "image_aspect" in says:
        pre = pre | {"do_pad": says["image_aspect"] == "pad"}                 # the base's may have been another
    return model, source._replace(meta=source.meta | says, pre=pre)
