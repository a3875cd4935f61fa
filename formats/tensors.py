"""Tensors in files: safetensors, whole or in shards, and .bin files of torch.save, of which only tensors are read."""

import hashlib
import json
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import stop
from formats.hub import weights_file
from formats.strict_json import read_json, strict_json
from formats.whole import write_file

SHARD = 5 * 10**9  # bytes per file, as in published models


def read_tensors(folder, stem="model"):
    """All tensors of a folder, from one file or from the shards of an index -> {name: tensor}. They are views of a
    memory map: a page is read when it is used, and all processes of a machine share it."""
    folder = Path(folder)
    file = weights_file(folder, stem) or stop(f"{folder / stem}.safetensors is missing")
    names, where, out = [file.name], {}, {}
    if file.suffix == ".json":
        where = read_json(file).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(n, str) for n in where.values()):
            stop(f"{file} has no weight_map that says which tensor lies in which file")
        names = sorted(set(where.values()))
        if bad := [n for n in names if Path(n).name != n]:
            stop(f"{file} names a shard outside its folder: {bad[0]}")
    for name in names:
        if not (folder / name).is_file():
            stop(f"{folder / name} is missing")
        new = (read_pickle if name.endswith(".bin") else read_safetensors)(folder / name)
        if twice := sorted(out.keys() & new.keys()):
            stop(f"{folder}: {twice[0]} stands in two shards")
        out |= new
    if lost := sorted(set(where) - set(out)):
        stop(f"{folder}: {lost[0]} stands in the index and in no shard")
    return out


def read_safetensors(file):
    try:
        with safe_open(file, "pt") as f, open(file, "rb") as raw:
            strict_json(raw.read(int.from_bytes(raw.read(8), "little")).decode(), "its header")     # no name twice
            return {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, ValueError) as e:
        stop(f"{file} is not a whole safetensors file: {e}")


def read_pickle(file):
    """A file of torch.save. weights_only=True lets in tensors alone: nothing in the file is run."""
    try:
        found = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as e:  # damaged bytes raise many kinds
        stop(f"{file} is no whole file of tensors and nothing else, so it is not opened ({type(e).__name__})")
    if not isinstance(found, dict) or not all(isinstance(x, torch.Tensor) and x.layout == torch.strided
                                              for x in found.values()):
        stop(f"{file} is no dict of dense tensors by name")
    return found


def tensor_digest(tensor):
    """Shape, sum of all bits, and some thousand elements in order -> 16 hex digits. It reads at memory speed; SHA-256
    over the weights of a 7B model takes a minute on every rank. It tells models apart and is no defence."""
    flat = tensor.detach().cpu().flatten()
    total = sum(int(part.float().view(torch.int32).sum()) for part in flat.split(2**20))   # fp32 a piece at a time
    some = flat[:: max(1, len(flat) // 1024)].float().view(torch.int32).tolist()
    return hashlib.sha256(repr((tuple(tensor.shape), total, some)).encode()).hexdigest()[:16]


def base_digest(digests):
    """{name: tensor_digest} of all frozen tensors, in any order -> 16 hex digits"""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()[:16]


def write_shards(folder, tensors, dtype):
    """Write model.safetensors, or shards of at most SHARD bytes and their index. Tensors are rounded to dtype one shard
    at a time."""
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
        write_file(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(nbytes.values())},
            "weight_map": {k: name for name, shard in zip(names, shards) for k in shard}})
