"""A published family of models beside LLaVA: how its folders name what our VLM has. One file per family fills a Family.

Our names of tensors are those of llava-hf folders. A family renames them by pairs (pattern, replacement), applied in
order to our name. A replacement that ends in #i/n is the i-th of n equal parts of a published tensor, along dimension 0
(for example, q, k and v in one matrix); #i/n/H means the same within each of H heads: its rows are (H, n, K). One that
ends in @n is a published tensor of n dimensions; ours has fewer, and the other ones, of size 1, come first.
"""

import json
import re
from typing import NamedTuple

import torch

import chat
from chat import IMAGE
from config import stop
from formats.configs import positions
from formats.metadata import generation_config, tokenizer_files
from formats.names import rename
from formats.strict_json import read_json

WORDS = "qformer_tokenizer"    # folder of the tokenizer of InstructBLIP's Q-Former


class Family(NamedTuple):
    model_type: str          # the value of this key in config.json
    template: str            # name in chat.TEMPLATES: writes prompts as the family's own processor does. Or a function
                             # (text_config of config.json, Tokenizer) -> name
    config: callable         # (config.json, preprocessor_config.json) -> VLMConfig
    fits: callable           # VLMConfig -> can transformers' class of this family hold such a model?
    names: callable          # VLMConfig -> [(pattern, replacement)], from our names to published ones
    files: callable          # (Folder, VLMConfig) -> {file name: content}, without tokenizer and pumice.json
    read: callable = lambda tensors, cfg: tensors      # {published name, as by names.rename: tensor} before read_names
    write: callable = lambda tensors, cfg: tensors     # {published name: tensor} after write_names


def usual_template(family, c, tok):
    """Family, its config.json, Tokenizer -> name of the template"""
    return family.template if isinstance(family.template, str) else family.template(c.get("text_config") or {}, tok)


def published_name(name, pairs):
    """Our name -> name of the published tensor; the part that our tensor holds: (i, n), (i, n, H), or () for the whole;
    the number of dimensions of the published tensor, or 0 if ours has as many"""
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name)
    name, _, dims = name.partition("@")
    name, _, part = name.partition("#")
    return name, tuple(int(n) for n in part.split("/")) if part else (), int(dims or 0)


def read_names(tensors, names, pairs, where):
    """{published name, spelled as by names.rename: tensor} -> {our name: tensor}. names: {our name: tensor of the right
    shape}. Unknown tensors keep their name."""
    out, used = {}, set()
    for ours in names:
        name, part, dims = published_name(ours, pairs)
        if (name := rename(name)) not in tensors:
            continue                                       # account() reports the tensor as missing
        out[ours] = tensors[name]
        used.add(name)
        if dims == out[ours].ndim:
            out[ours] = out[ours].squeeze(tuple(range(dims - names[ours].ndim)))       # account() checks the shape
        if part:
            i, n, H = *part[:2], *(part[2:] or (1,))
            if len(out[ours]) % (n * H):
                stop(f"{where}: {name} has {len(out[ours])} rows, which are not {n * H} equal parts")
            out[ours] = out[ours].unflatten(0, (H, n, -1))[:, i].flatten(0, 1)
    return out | {k: x for k, x in tensors.items() if k not in used}


def write_names(state, pairs):
    """{our name: tensor} -> {published name: tensor}"""
    out, parts = {}, {}
    for ours, x in state.items():
        name, part, dims = published_name(ours, pairs)
        x = x[(None,) * max(0, dims - x.ndim)]
        if part:
            parts.setdefault((name, *part[1:]), {})[part[0]] = x
        else:
            out[name] = x
    for (name, n, *heads), x in parts.items():
        split = [x[i].unflatten(0, ((heads or [1])[0], -1)) for i in range(n)]
        out[name] = torch.stack(split, 1).flatten(0, 2)
    return out


def image_settings(folder):
    """-> preprocessor_config.json of a folder, or what transformers 5 writes in its place into processor_config.json"""
    both = read_json(folder / "processor_config.json", {}).get("image_processor")
    return read_json(folder / "preprocessor_config.json", both or {})


def with_ids(layout, tok):
    """A layout of images (VLMConfig.layout) with tokens or texts -> the same with ids. before, after, row_end: lists of
    tokens. row_end, grid_end, whole and each cell may be a text; it is one token if the tokenizer knows it."""
    def text(t):
        return ([tok.id(t)] if t in tok.specials else tok.text(t, first=False)[0]) if isinstance(t, str) else t

    def ids(k, x):
        if k in ("before", "after", "row_end") and not isinstance(x, str):
            return [t if isinstance(t, int) else tok.id(t) for t in x]
        return [text(t) for t in x] if k == "cells" else text(x) if k in ("row_end", "grid_end", "whole") else x

    return {k: ids(k, x) for k, x in layout.items()}


def family_files(family, folder, cfg, template, system, aspect, dtype):
    """-> {file name: content} of a folder, except weights and model card"""
    files, own = tokenizer_files(folder.tok, template, system, positions(cfg.text)), family.files(
        folder._replace(meta=folder.meta | {"image_aspect": aspect}), cfg)
    extra = own.pop("tokenizer_config.json", {})
    if placeholder := extra.get("image_token"):                # the family's name for the token <image>
        for name, content in files.items():                    # a vocabulary may have other tokens that contain <image>
            old, new = (f'"{t}"' if name == "tokenizer.json" else t for t in (IMAGE, placeholder))
            files[name] = json.loads(json.dumps(content).replace(old, new))
    files |= own
    files["tokenizer_config.json"] |= extra
    processor = files["preprocessor_config.json"]["processor_class"]
    files["tokenizer_config.json"]["processor_class"] = processor
    files["config.json"] |= {"torch_dtype": str(dtype).removeprefix("torch."), "pad_token_id": folder.tok.pad}
    files |= generation_config(folder.tok, cfg, template)
    if chat.template(template).stop == "\n":                   # BLIP-2's class asks text_config where an answer ends
        ends = [i for i in (folder.tok.eos, folder.tok.text("\n", first=False)[0][-1]) if i is not None]
        for settings in (files["generation_config.json"], files["config.json"].get("text_config", {})):
            settings["eos_token_id"] = ends
    files |= {f"{WORDS}/{name}": content for name, content in folder.words.items()}
    return files | {"pumice.json": {"template": template, "system": system, "image_aspect": aspect}}
