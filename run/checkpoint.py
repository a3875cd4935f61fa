"""Checkpoints: folders of safetensors and json files. A checkpoint is either complete or absent (formats/whole.py). A
killed process or a full disk never damages older checkpoints.

    trained.safetensors   trained weights by name, fp32        optimizer.safetensors   state of the optimizer, by name
    rng.safetensors       torch's random state of each rank    state.json              step, counters, settings, digests
"""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from config import stop
from engine import unwrap, whole_tensor
from formats.strict_json import read_json
from formats.whole import commit, remove, whole


def discard(folder):
    """Delete a checkpoint. It is renamed first: if the process is killed while it deletes, the incomplete folder does
    not have the name of a checkpoint."""
    tmp = folder.parent / f".tmp-{folder.name}"
    remove(tmp)
    os.rename(folder, tmp)
    remove(tmp)


def sweep(folder):
    """Clean up after a killed run. A folder .tmp-NAME is half written or half deleted: delete it.
    A folder .old-NAME was about to be replaced: it gets its NAME back if it is complete and NAME is free, else it is
    deleted."""
    folder = Path(folder)
    for p in folder.glob(".old-*"):
        place = folder / p.name.removeprefix(".old-")
        if not place.exists() and whole(p) is None:
            os.rename(p, place)
        else:
            remove(p)
    for p in folder.glob(".tmp-*"):
        remove(p)


def steps_in(folder):
    """-> [(step, path)] of the checkpoints in a run folder, sorted by step, lowest first"""
    paths = Path(folder, "checkpoints").glob("step_*")
    return sorted((int(m[1]), p) for p in paths if (m := re.fullmatch(r"step_(\d+)", p.name)))


def save_checkpoint(out, step, model, optimizer, world, state):
    """Write out/checkpoints/step_<step>. All ranks must call this function. Rank 0 holds all tensors and writes."""
    trained, moments = {}, {}
    for n, p in unwrap(model).named_parameters():
        if p.requires_grad:
            for into, name, t in ((trained, n, p.detach()),
                                  *((moments, f"{n}.{k}", v) for k, v in optimizer.state[p].items())):
                t = whole_tensor(t)                                      # gathers shards: every rank must call it
                if world.rank == 0:
                    into[name] = t.cpu().contiguous()
    rng = {"cpu": torch.get_rng_state().tolist()}
    if world.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state().tolist()
    rng = world.gather(rng)
    if world.rank > 0:
        return

    def fill(tmp):
        save_file(trained, tmp / "trained.safetensors")
        save_file(moments, tmp / "optimizer.safetensors")
        save_file({f"{r}.{k}": torch.tensor(v, dtype=torch.uint8) for r, s in enumerate(rng) for k, v in s.items()},
                  tmp / "rng.safetensors")
        state_file = {"step": step, "world": world.size, "optimizer": type(optimizer).__name__, **state}
        (tmp / "state.json").write_text(json.dumps(state_file, indent=1))

    commit(Path(out, "checkpoints", f"step_{step:07}"), fill)


def retire(out, step, keep_last, best=0):
    """Delete all checkpoints but the newest `keep_last` and that of step `best`. Checkpoints of steps after `step` are
    deleted, too: they are damaged, or were written before the run was resumed from an earlier step."""
    steps = steps_in(out)
    kept = [best, *[s for s, _ in steps if s <= step][-keep_last:]]
    for s, path in steps:
        if s not in kept:
            discard(path)


def find_checkpoint(out, resume, say=print):
    """Find the checkpoint to resume from -> its path, or None. resume: "auto" (the newest complete checkpoint), "none",
    or a path"""
    if resume == "none":
        return None
    if resume != "auto":
        if problem := whole(resume):
            stop(f"resume={resume}: {problem}")
        return Path(resume)
    for folder in (Path(out), Path(out, "checkpoints")):
        sweep(folder)
    steps = steps_in(out)
    for step, path in reversed(steps):
        problem = whole(path)
        if problem is None:
            return path
        say(f"the checkpoint of step {step} is not used: {problem}")
    if steps:
        stop(f"no checkpoint in {Path(out, 'checkpoints')} is whole; --resume=none starts again")
    return None


def restore(path, model, optimizer, world):
    """Load weights, optimizer state and random state by name. Stop if a tensor of the weights or of the optimizer is
    missing or unexpected, if a shape or dtype is wrong, or if the checkpoint is of another kind of optimizer."""
    named = {n: p for n, p in unwrap(model).named_parameters() if p.requires_grad}
    before, now = read_json(path / "state.json").get("optimizer", "AdamW"), type(optimizer).__name__
    if before != now:
        stop(f"{path} was trained with {before}, not {now}; --resume=none starts again")
    with (safe_open(path / "trained.safetensors", "pt") as trained,
          safe_open(path / "optimizer.safetensors", "pt") as moments, safe_open(path / "rng.safetensors", "pt") as rng):
        if odd := sorted(set(trained.keys()) ^ set(named)):
            known = "trained now but not in" if odd[0] in named else "not trained now but in"
            stop(f"{path}: {odd[0]} is {known} the checkpoint")
        kinds = sorted({k.rpartition(".")[2] for k in moments.keys()})          # for AdamW: step, exp_avg, exp_avg_sq
        if odd := sorted(set(moments.keys()) ^ {f"{n}.{k}" for n in named for k in kinds}):
            stop(f"{path}: the moment {odd[0]} is {'unexpected' if odd[0] in moments.keys() else 'missing'}")

        def get(file, name, like):
            value = file.get_tensor(name)
            if (value.shape, value.dtype) != (like.shape, like.dtype):
                want = f"{like.dtype} {tuple(like.shape)}"
                stop(f"{path}: {name} is {value.dtype} {tuple(value.shape)}, the model's is {want}")
            value = value.to(like.device, copy=True)             # a copy, because `value` may be a view of the file
            if hasattr(like, "full_tensor"):
                from torch.distributed.tensor import distribute_tensor
                value = distribute_tensor(value, like.device_mesh, like.placements)
            return value

        def moment(name, like):
            if moments.get_slice(name).get_shape():
                return get(moments, name, like)
            return moments.get_tensor(name).to(like.device if on_device else "cpu", copy=True)     # AdamW's step count

        on_device = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
        for n, p in named.items():
            with torch.no_grad():
                p.copy_(get(trained, n, p))
            optimizer.state[p] = {k: moment(f"{n}.{k}", p) for k in kinds}
        if f"{world.rank}.cpu" in rng.keys():
            torch.set_rng_state(rng.get_tensor(f"{world.rank}.cpu"))
        if world.device.type == "cuda" and f"{world.rank}.cuda" in rng.keys():
            torch.cuda.set_rng_state(rng.get_tensor(f"{world.rank}.cuda"))
