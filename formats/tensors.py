"""Read and write tensors: safetensors files, whole or in shards. Files of torch.save (.bin) are only read."""

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

SHARD = 5 * 10**9  # most bytes per file, as in published models


def read_tensors(folder, stem="model"):
    """Read all tensors of a folder -> {name: tensor}. They are in one file, or in several files (shards) that an index
    file lists. The tensors are views of a memory map: a page of the file is read when it is used, and all processes
    of a machine share this memory."""
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
        out |= (read_pickle if name.endswith(".bin") else read_safetensors)(folder / name)
    return out


def read_safetensors(file):
    try:
        with safe_open(file, "pt") as f, open(file, "rb") as raw:
            # this check of the header stops if a name occurs twice
            strict_json(raw.read(int.from_bytes(raw.read(8), "little")).decode(), "its header")
            return {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, ValueError) as e:
        stop(f"{file} is not a whole safetensors file: {e}")


def read_pickle(file):
    """Read a file of torch.save -> {name: tensor}. Stop if it holds anything else. No code in the file is executed,
    because torch.load has weights_only=True."""
    try:
        found = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as e:  # damaged files raise many types of errors
        stop(f"{file} is not a file of tensors alone, or is cut off, so it is not opened ({type(e).__name__})")
    if not isinstance(found, dict) or any(getattr(x, "layout", 0) != torch.strided for x in found.values()):
        stop(f"{file} is not a dict of dense tensors by name")
    return found


def tensor_digest(tensor):
    """Compute a digest of a tensor -> 16 hex digits. They are one hash of three things together:

        the shape of the tensor
        a sum over all elements: each is converted to fp32, and its 32 bits are read as an integer
        1,024 elements or more, spread over the tensor; of a smaller tensor, all elements

    SHA-256 of 7B weights would take a minute. This digest is faster, but it does not detect forgery."""
    flat = tensor.detach().cpu().flatten()
    # convert 2**20 elements at a time to fp32, because an fp32 copy of the whole tensor would take much memory
    total = sum(int(part.float().view(torch.int32).sum()) for part in flat.split(2**20))
    some = flat[:: max(1, len(flat) // 1024)].float().view(torch.int32).tolist()
    return hashlib.sha256(repr((tuple(tensor.shape), total, some)).encode()).hexdigest()[:16]


def base_digest(digests):
    """Compute one digest of all frozen tensors -> 16 hex digits. digests: {name: tensor_digest(tensor)}, any order"""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()[:16]


def write_shards(folder, tensors, dtype):
    """Write one model.safetensors, or shards of at most SHARD bytes with an index file. Tensors are rounded to dtype
    one shard at a time, to save memory."""
    shards, size, total = [[]], 0, 0
    for k in sorted(tensors):
        nbytes = tensors[k].numel() * dtype.itemsize
        if shards[-1] and size + nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(k)
        size, total = size + nbytes, total + nbytes
    n = len(shards)
    files = {f"model-{i:05}-of-{n:05}.safetensors" if n > 1 else "model.safetensors": shard
             for i, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        save_file({k: tensors[k].detach().to("cpu", dtype).contiguous() for k in shard}, folder / file,
                  metadata={"format": "pt"})                       # transformers 4.46 needs this entry
    if n > 1:
        write_file(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": total}, "weight_map": {k: file for file, shard in files.items() for k in shard}})
