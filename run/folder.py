"""The folder of a run: which files it has, whether a run may write there, and from which checkpoint a run resumes.

    config.json      settings, versions, code revision          log.jsonl        one json object per logged step
    samples.jsonl    answers to fixed questions, in training    checkpoints/     each is complete or absent
    model/           at the end: a complete llava-hf folder     adapter/         after LoRA: the adapter in PEFT form
    best/            with keep_best, at the end: config.json, log.jsonl, model/ and adapter/ of the best step
    finished.json    written last: settings and digests of the finished run
    reference.safetensors    of train_dpo.py: log-probabilities before training (run/reference.py)
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from config import setting_facts, stop
from formats.strict_json import read_json
from formats.tensors import base_digest
from formats.whole import write_file
from run import checkpoint
from run.log import trim

# files and folders of a run, except config.json; --resume=none deletes those of the older run
OWN = ("finished.json", "model", "adapter", "best", "checkpoints", "log.jsonl", "samples.jsonl")
TRIES = 3      # the run stops after this many checkpoints in a row that could not be written


def path_of(s):
    """Return the folder of a run. With --overfit, it is the subfolder overfit/."""
    return Path(s.out, "overfit") if s.overfit else Path(s.out)


def existing(folder):
    """-> `folder` if it exists, else its nearest parent folder that exists"""
    at = Path(os.path.abspath(folder))
    return next(p for p in (at, *at.parents) if os.path.lexists(p))


def unwritable(folder):
    """Check, without writing, if files can be created in `folder` -> None, or the reason why not. `folder` itself may
    be missing: then its nearest parent folder is checked."""
    at = existing(folder)
    if not at.is_dir():
        return f"{at} is not a folder"
    return None if os.access(at, os.W_OK | os.X_OK) else f"{at} cannot be written to"


def would_overwrite(folder):
    """Would a run overwrite files in a folder that is not a run folder? -> a message that names a file, or None"""
    about, there = Path(folder, "config.json"), [n for n in (*OWN, "config.json") if os.path.lexists(Path(folder, n))]
    if there and not (about.is_file() and "settings" in read_json(about)):
        return f"it is not a run, and its {there[0]} would be lost"


def claim(folder, say=print):
    """Lock a folder for this process -> an open file, which holds the lock. A second run in the same folder stops. The
    lock ends with the process, even if the process is killed. Loader processes do not inherit the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        stop(f"out={folder}: another run is writing there; --out=DIR writes elsewhere")
    except OSError as e:                                         # the file system does not support locks
        say(f"{folder} cannot be locked ({e.strerror}): a second run that writes there would not be noticed")
    return file


def check_space(folder, checkpoint_bytes, model_bytes, keep_last, say=print):
    """Called before the first step. Stop if the disk has no room for one checkpoint. Print a note if it has no room for
    model/ and keep_last + 1 checkpoints: a new checkpoint is written before an old one is deleted."""
    at = existing(folder)
    free, least, most = shutil.disk_usage(at).free, checkpoint_bytes, (keep_last + 1) * checkpoint_bytes + model_bytes
    if free < least:
        stop(f"out={folder}: {free / 2**30:.1f} GiB are free, one checkpoint takes {least / 2**30:.1f}")
    if free < most:
        say(f"  note: {free / 2**30:.1f} GiB are free, {keep_last + 1} checkpoints and model/ take {most / 2**30:.1f}")


def versions():
    """-> versions of Python, torch and this code, for the config.json of a run"""
    here, revision = Path(__file__).resolve().parent.parent, ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        revision = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True,
                                  timeout=5).stdout.strip()
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
            "revision": revision or None}


def data_digest(samples):
    """Compute a digest (hash) of the data files and their mixture. A run is not resumed if this digest has changed. Of
    files of more than 64 MB, it reads only a part (formats/rows/index.py says which change it can miss)."""
    h = hashlib.sha256()
    for rows, draws, weight in zip(samples.files, samples.counts, samples.weights):
        h.update(b"%d of %d bytes" % (draws, rows.bytes) + (f" times {weight}".encode() if weight != 1 else b""))
        rows.digest(h)
    return h.hexdigest()


class RunFolder:
    """The folder of one run, and what defines the run: its settings, its data, and its frozen weights (the base)."""

    def __init__(self, s, world, steps, samples, folder, lrs):
        self.s, self.world, self.steps, self.out = s, world, steps, path_of(s)
        self.data = data_digest(samples)
        self.base = base_digest({n: d for n, d in folder.digests.items() if n not in lrs})
        self.origin = s.init or f"{s.vision} and {s.llm}"
        self.bad_saves = 0

    def refuse(self, what, made):
        stop(f"{what} {made}; --resume=none starts again, --out=DIR writes elsewhere")

    def compare(self, what, old, kinds, but=()):
        """Stop if a finished run or a checkpoint has other data, other frozen weights or other settings than this run.

        what     how messages call the finished run or the checkpoint
        old      its record: the content of finished.json or state.json
        kinds    a setting is compared if its `resume` (see config.setting) is one of these
        but      names of settings that are not compared"""
        if old["data"] != self.data:
            self.refuse(what, f"was trained on other data than {self.s.data}, or on another mixture of it")
        for key, fact in setting_facts(type(self.s)).items():
            before = old["settings"].get(key, getattr(type(self.s), key))  # the default if the old run lacks the key
            if fact["resume"] in kinds and key not in but and before != getattr(self.s, key):
                self.refuse(what, f"was trained with {key}={before}, not {getattr(self.s, key)}")
        if old.get("base") != self.base:
            self.refuse(what, f"was trained on another base: a frozen weight of {self.origin} has changed since, or "
                              "other weights train now")

    def is_finished(self):
        """Is this run already finished? Rank 0 checks it for all ranks, and stops if settings or data have changed."""
        found = False
        if self.world.rank == 0 and self.s.resume == "auto" and not self.s.overfit:
            done = read_json(self.out / "finished.json", absent={})
            early = done.get("ended_early") and done["settings"].get("patience") == self.s.patience
            if (early or done.get("steps", -1) >= self.steps) and (self.out / "model/config.json").is_file():
                free = "steps", "epochs", "patience"
                self.compare(f"the finished run in {self.out}", done, ("same", "say"), but=free)
                self.world.print(f"{self.out} is finished ({done['steps']} steps): nothing to do. "
                                 "--resume=none starts again, --out=DIR writes elsewhere")
                found = True
        return self.world.gather(found)[0]

    def resume(self, model, optimizer):
        """Lock the folder. Load the checkpoint to resume from, if there is one -> its state.json, or {"step": 0}"""
        s, world = self.s, self.world
        if world.rank == 0:
            try:
                self.lock = claim(self.out, world.print)
            except OSError as e:                                 # unwritable() cannot find all errors in advance
                stop(f"out={self.out}: {e.strerror}")
        path = world.rank == 0 and checkpoint.find_checkpoint(self.out, "none" if s.overfit else s.resume, world.print)
        path = world.gather(str(path) if path else None)[0]      # all ranks use the path that rank 0 found
        if not path:
            return {"step": 0}
        state = read_json(Path(path, "state.json"))
        self.compare(path, state, ("same",))
        planned = state.get("steps", state["step"])
        # no step is left to train. But more steps were planned, so the learning rate has not reached its end
        if state["step"] >= self.steps < planned:
            self.refuse(path, f"is of step {state['step']} of {planned} and only {self.steps} are asked for: its "
                              f"learning rate has not come down by then. --steps={planned} goes on")
        checkpoint.restore(Path(path), model, optimizer, world)
        for key, fact in setting_facts(type(s)).items():
            before = state["settings"].get(key, getattr(s, key))
            if before != getattr(s, key) and fact["resume"] == "say":
                world.print(f"resumed with {key}={getattr(s, key)}, before it was {before}")
        world.print(f"resumed from {path}")
        return state

    def begin(self, start):
        """Called after the first step: write config.json. Files of an older run are deleted only now: a new run with
        wrong settings stops before this point, so it does not destroy the older run."""
        if self.world.rank > 0:
            return
        try:
            for name in OWN if self.s.overfit or self.s.resume == "none" else ():
                if (self.out / name).exists():
                    checkpoint.discard(self.out / name)
            for name in ("log.jsonl", "samples.jsonl"):
                trim(self.out / name, start)
            write_file(self.out / "config.json", {"settings": dataclasses.asdict(self.s), "versions": versions()})
        except OSError as e:
            stop(f"out={self.out}: {e.strerror}")

    def kept_step(self, log):
        """-> the step whose checkpoint is not deleted because it is the best so far; 0: none is"""
        return log.best.step if self.s.keep_best else 0

    def save(self, step, model, optimizer, log):
        """Write the checkpoint after step `step` (counted from 0). If it cannot be written, training continues; after
        TRIES failures in a row the run stops."""
        if self.s.overfit:
            return
        state = dict(settings=dataclasses.asdict(self.s), steps=self.steps, data=self.data, base=self.base,
                     **log.state())
        problem = ""
        try:
            checkpoint.save_checkpoint(self.out, step + 1, model, optimizer, self.world, state)
            if self.world.rank == 0:
                checkpoint.retire(self.out, step + 1, self.s.keep_last, self.kept_step(log))
        except OSError as e:
            problem = str(e)
        problem = next(filter(None, self.world.gather(problem)), "")
        self.bad_saves = self.bad_saves + 1 if problem else 0
        if self.bad_saves >= TRIES:
            stop(f"{TRIES} checkpoints in a row could not be written: {problem}")
        if problem:
            self.world.print(f"step {step + 1}: {problem}; training goes on from memory")
