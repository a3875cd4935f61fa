"""Checkpoints: a directory that is whole or absent, safetensors and json only.

It is written beside its place as .tmp-*, every file synced, a manifest with a SHA-256 per file last, then renamed: so a
kill or a full disk at any moment leaves the older one untouched. What a run is made of, beyond its settings:

    trained.safetensors      what is trained, by name, fp32      optimizer.safetensors    moments, by name
    rng.safetensors          torch's random state of each rank   state.json               step, counters, settings, base
"""

import fcntl
import json
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from config import stop
from engine import full, unwrap
from formats.whole import commit, remove, whole


def claim(folder, say=print):
    """Take a folder for this process alone -> an open file, to be held; where another process has it, the run stops.
    The lock ends with the process, however that ends, and loader processes do not inherit it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        stop(f"out={folder}: another run is writing there, as long as it lives; --out=DIR writes elsewhere")
    except OSError as e:                                         # a file system that knows no locks
        say(f"{folder} cannot be locked ({e.strerror}): nothing will notice a second run that writes there")
    return file


def discard(folder):
    """Delete a checkpoint so that no moment leaves half of one under its name."""
    tmp = folder.parent / f".tmp-{folder.name}"
    remove(tmp)
    os.rename(folder, tmp)
    remove(tmp)


def sweep(folder):
    """Remove what a killed run left half-written; bring back what it had just moved aside."""
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
    """[(step, path)] of the checkpoints below a run, oldest first, by number and not by spelling."""
    paths = Path(folder, "checkpoints").glob("step_*")
    return sorted((int(m[1]), p) for p in paths if (m := re.fullmatch(r"step_(\d+)", p.name)))


def save_checkpoint(out, step, model, optimizer, world, state, keep_last, keep=()):
    """Write out/checkpoints/step_<step>, then retire older ones. All ranks call it; rank 0 writes, and alone holds a
    copy of everything."""
    trained, moments = {}, {}
    for n, p in unwrap(model).named_parameters():
        if p.requires_grad:
            for into, name, t in ((trained, n, p.detach()),
                                  *((moments, f"{n}.{k}", v) for k, v in optimizer.state[p].items())):
                t = full(t)                                      # every rank takes part in gathering it
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
        (tmp / "state.json").write_text(json.dumps({"step": step, "world": world.size, **state}, indent=1))

    commit(Path(out, "checkpoints", f"step_{step:07}"), fill)
    retire(out, step, keep_last, keep)


def retire(out, step, keep_last, keep=()):
    """Delete all checkpoints but the newest keep_last and the steps in `keep`. What lies beyond `step` belongs to a
    life that was given up (its checkpoints were damaged, or an older one was named to go on from) and goes too."""
    steps = steps_in(out)
    lives = {*keep, *[s for s, _ in steps if s <= step][-max(1, keep_last):]}
    for s, path in steps:
        if s not in lives:
            discard(path)


def find_checkpoint(out, resume, say=print):
    """The checkpoint to go on from, or None. resume: auto = the newest whole one of a run; none; or the path of one."""
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
    """Put weights, moments and random state back, by name; a missing, unexpected or misshapen tensor is an error."""
    named = {n: p for n, p in unwrap(model).named_parameters() if p.requires_grad}
    with (safe_open(path / "trained.safetensors", "pt") as trained,
          safe_open(path / "optimizer.safetensors", "pt") as moments, safe_open(path / "rng.safetensors", "pt") as rng):
        if odd := sorted(set(trained.keys()) ^ set(named)):
            known = "trained now but not in" if odd[0] in named else "not trained now but in"
            stop(f"{path}: {odd[0]} is {known} the checkpoint")
        kinds = ("step", "exp_avg", "exp_avg_sq") if moments.keys() else ()     # there are none before the first update
        if odd := sorted(set(moments.keys()) ^ {f"{n}.{k}" for n in named for k in kinds}):
            stop(f"{path}: the moment {odd[0]} is {'unexpected' if odd[0] in moments.keys() else 'missing'}")

        def get(file, name, like):
            value = file.get_tensor(name)
            if (value.shape, value.dtype) != (like.shape, like.dtype):
                want = f"{like.dtype} {tuple(like.shape)}"
                stop(f"{path}: {name} is {value.dtype} {tuple(value.shape)}, the model's is {want}")
            value = value.to(like.device, copy=True)             # what was read may be a view of the file
            if hasattr(like, "full_tensor"):
                from torch.distributed.tensor import distribute_tensor
                value = distribute_tensor(value, like.device_mesh, like.placements)
            return value

        for n, p in named.items():
            with torch.no_grad():
                p.copy_(get(trained, n, p))
            optimizer.state[p] = {k: moments.get_tensor(f"{n}.{k}").to(p.device if p.device.type == "cuda" else "cpu")
                                  if k == "step" else get(moments, f"{n}.{k}", p) for k in kinds}
        if f"{world.rank}.cpu" in rng.keys():
            torch.set_rng_state(rng.get_tensor(f"{world.rank}.cpu"))
        if world.device.type == "cuda" and f"{world.rank}.cuda" in rng.keys():
            torch.cuda.set_rng_state(rng.get_tensor(f"{world.rank}.cuda"))


def trim_log(file, step):
    """Forget the lines that a killed run wrote after the checkpoint it is resumed from: each step appears once."""
    file = Path(file)
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            pass                                                 # the last line of a killed run may be cut off
    tmp = file.with_name(f".tmp-{file.name}")
    tmp.write_text("".join(line + "\n" for line in kept))
    os.replace(tmp, file)
