"""Checkpoints: a directory that is whole or absent, safetensors and json only.

It is written beside its place as .tmp-*, every file synced, a manifest with a SHA-256 per file last, then renamed: so a kill or a
full disk at any moment leaves the older one untouched. What a run is made of, beyond its settings:

    trained.safetensors      what is trained, by name, fp32           optimizer.safetensors    moments, by name
    rng.safetensors          torch's random state of each rank        state.json               step, counters, settings
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import stop
from engine import full, unwrap


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def commit(folder, fill):
    """Make `folder` appear whole: fill(path) writes its files into a directory beside it. An old one is replaced."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = folder.parent / f".tmp-{folder.name}"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        fill(tmp)
        files = sorted(p for p in tmp.rglob("*") if p.is_file())
        for p in files:
            os.chmod(p, 0o666 & ~umask())                       # safetensors makes files that only the owner can read
            sync(p)
        manifest = {str(p.relative_to(tmp)): digest(p) for p in files}
        (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1))
        sync(tmp / "manifest.json")
        sync(tmp)
    except OSError as e:
        shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(e.errno, f"{e.strerror} while writing {folder} ({shutil.disk_usage(folder.parent).free:,} bytes free)") from None
    old = folder.parent / f".old-{folder.name}"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(tmp, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def whole(folder):
    """Is every file of the manifest there, unchanged? -> None, or what is wrong."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, value in manifest.items():
            if digest(folder / name) != value:
                return f"{folder / name} is damaged"
    except (OSError, ValueError, AttributeError) as e:
        return f"{folder}: {e}"
    return None


def sweep(folder):
    """Remove what a killed run left half-written; bring back what it had just moved aside."""
    folder = Path(folder)
    for p in folder.glob(".old-*") if folder.is_dir() else ():
        place = folder / p.name.removeprefix(".old-")
        if not place.exists() and whole(p) is None:
            os.rename(p, place)
        else:
            shutil.rmtree(p, ignore_errors=True)
    for p in folder.glob(".tmp-*") if folder.is_dir() else ():
        shutil.rmtree(p, ignore_errors=True)


def steps_in(folder):
    """[(step, path)] of the checkpoints below a run, oldest first, by number and not by spelling."""
    found = [(int(m[1]), p) for p in Path(folder, "checkpoints").glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))]
    return sorted(found)


def save(out, step, model, optimizer, world, state, keep_last, keep=()):
    """Write out/checkpoints/step_<step>, then delete older ones but the newest keep_last and the steps in `keep`. All ranks call it;
    rank 0 writes."""
    named = {n: p for n, p in unwrap(model).named_parameters() if p.requires_grad}
    trained = {n: full(p.detach()).cpu().contiguous() for n, p in named.items()}
    moments = {f"{n}.{k}": full(v.detach()).cpu().contiguous() for n, p in named.items() for k, v in optimizer.state[p].items()}
    rng = world.gather({"cpu": torch.get_rng_state().tolist(),
                        **({"cuda": torch.cuda.get_rng_state().tolist()} if world.device.type == "cuda" else {})})
    if world.rank == 0:
        def fill(tmp):
            save_file(trained, tmp / "trained.safetensors")
            save_file(moments, tmp / "optimizer.safetensors")
            save_file({f"{r}.{k}": torch.tensor(v, dtype=torch.uint8) for r, s in enumerate(rng) for k, v in s.items()}, tmp / "rng.safetensors")
            (tmp / "state.json").write_text(json.dumps({"step": step, "world": world.size, **state}, indent=1))

        try:
            commit(Path(out, "checkpoints", f"step_{step:07}"), fill)
        except SafetensorError as e:                             # safetensors wraps a full disk in an error of its own
            raise OSError(f"{e} while writing a checkpoint below {out} ({shutil.disk_usage(out).free:,} bytes free)") from None
        for old, path in steps_in(out)[: -max(1, keep_last)]:
            if old not in keep:
                shutil.rmtree(path)


def find(out, resume, say=print):
    """The checkpoint to go on from, or None. resume: auto = the newest whole one below `out`; none; or the path of one."""
    if resume == "none":
        return None
    if resume != "auto":
        if problem := whole(resume):
            stop(f"resume={resume}: {problem}")
        return Path(resume)
    sweep(Path(out, "checkpoints"))
    for step, path in reversed(steps_in(out)):
        problem = whole(path)
        if problem is None:
            return path
        say(f"checkpoint of step {step} is not used: {problem}")
    return None


def restore(path, model, optimizer, world):
    """Put weights, moments and random state back, by name; a missing, unexpected or misshapen tensor is an error. -> state"""
    state = json.loads((path / "state.json").read_text())
    trained, moments, rng = (load_file(path / f"{n}.safetensors") for n in ("trained", "optimizer", "rng"))
    named = {n: p for n, p in unwrap(model).named_parameters() if p.requires_grad}
    if odd := sorted(set(trained) ^ set(named)):
        stop(f"{path}: {odd[0]} is {'trained now but not in' if odd[0] in named else 'not trained now but in'} the checkpoint")

    def placed(value, like, name):
        if value.shape != like.shape:
            stop(f"{path}: {name} has shape {tuple(value.shape)}, the model's is {tuple(like.shape)}")
        value = value.to(like.device, like.dtype)
        if hasattr(like, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor
            value = distribute_tensor(value, like.device_mesh, like.placements)
        return value

    for n, p in named.items():
        with torch.no_grad():
            p.copy_(placed(trained[n], p, n))
        optimizer.state[p] = {k: moments[f"{n}.{k}"] if k == "step" else placed(moments[f"{n}.{k}"], p, f"{n}.{k}")
                              for k in ("step", "exp_avg", "exp_avg_sq") if f"{n}.{k}" in moments}
        if p.device.type == "cuda" and "step" in optimizer.state[p]:
            optimizer.state[p]["step"] = optimizer.state[p]["step"].to(p.device)
    if f"{world.rank}.cpu" in rng:
        torch.set_rng_state(rng[f"{world.rank}.cpu"])
        if world.device.type == "cuda" and f"{world.rank}.cuda" in rng:
            torch.cuda.set_rng_state(rng[f"{world.rank}.cuda"])
    return state


def trim_log(file, step):
    """Forget the lines that a killed run wrote after the checkpoint it is resumed from, so that each step appears once."""
    file = Path(file)
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            pass                                                 # the last line of a killed run may be cut off
    tmp = file.with_suffix(".tmp")
    tmp.write_text("".join(l + "\n" for l in kept))
    os.replace(tmp, file)
