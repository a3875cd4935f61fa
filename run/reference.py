"""Log-probabilities of answers under the reference, which is the model as it was before training. There is never a
second model in memory:

    without_adapters    if adapters alone train, the reference is the model without them
    Table               else one pass over the data before training; the run folder keeps the result of each sample

    P pairs of a micro-batch. KTO has P answers, each with an answer to another question
"""

import contextlib
import hashlib
import json
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from config import stop
from data import send
from engine import unwrap
from lora import LoRALinear
from run.folder import data_digest, path_of

EVERY = 50             # the pass writes its results after this many steps, later after a tenth of those done
MEANING = ("template", "system", "image_aspect", "max_len", "dtype", "seed", "parts", "vision", "llm")


@contextlib.contextmanager
def adapters_off(model):
    """In this context the model has no adapters: each adds 0, and draws no dropout mask."""
    layers = [m for m in unwrap(model).modules() if isinstance(m, LoRALinear)]
    before = [(m.scale, m.dropout) for m in layers]
    try:
        for m in layers:
            m.scale, m.dropout = 0.0, 0.0
        yield
    finally:
        for m, (scale, dropout) in zip(layers, before):
            m.scale, m.dropout = scale, dropout


@torch.no_grad()
def without_adapters(model, b):
    """-> (P, 2)"""
    with adapters_off(model):
        return b.log_probs(model)


def run_digest(s, folder, *samples):
    """-> digest of what decides the reference: weights, data, and the settings that say how the model sees a row"""
    about = [sorted(folder.digests.items()), [data_digest(x) for x in samples], [getattr(s, key) for key in MEANING]]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


class Table:
    """(P, 2) for each pair of the data, found by its key. The file reference.safetensors keeps it: a killed pass goes
    on where it was, and a resumed run makes no pass."""

    def __init__(self, s, folder, samples, steps, val_steps, world):
        """samples: run.preference.PreferenceSteps of a run of `steps` steps; val_steps: those of its validation"""
        self.file, self.world = path_of(s) / "reference.safetensors", world
        self.digest = run_digest(s, folder, samples, *([val_steps] if val_steps else []))
        self.work = [(val_steps, i) for i in range(len(val_steps))] + [*new_samples(samples, 1 if s.overfit else steps)]
        self.done = 0                                                          # how many items of `work` are known
        self.keys, self.values = torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, dtype=torch.float64)

    def bits(self):
        return hashlib.sha256(self.keys.numpy().tobytes() + self.values.numpy().tobytes()).hexdigest()

    def read(self):
        """Read the file, if it belongs to this run and is whole"""
        if not self.file.is_file():
            return
        with contextlib.suppress(SafetensorError, KeyError, ValueError):
            with safe_open(self.file, "pt") as f:
                about = f.metadata()
                self.keys, self.values = f.get_tensor("keys"), f.get_tensor("values")
            self.done = int(about["done"])
            if (about["digest"], about["bits"]) == (self.digest, self.bits()):
                return
        self.world.print(f"{self.file} is damaged, or of other data or another model: the reference is computed again")
        self.done, self.keys, self.values = 0, self.keys[:0].clone(), self.values[:0].clone()

    def write(self):
        if self.world.rank > 0:
            return
        about = {"digest": self.digest, "bits": self.bits(), "done": str(self.done)}
        tmp = self.file.with_name(f".tmp-{self.file.name}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            tmp.write_bytes(save({"keys": self.keys, "values": self.values}, about))
            os.replace(tmp, self.file)
        except OSError as e:
            stop(f"{self.file} could not be written: {e.strerror}")

    def add(self, found):
        """found: [(key, log p of chosen, of rejected)] of this rank. A key keeps its first values."""
        rows = [row for rank in self.world.gather(found) for row in rank]
        new = {key: values for key, *values in reversed(rows)}
        keys = torch.tensor([*new], dtype=torch.long)
        values = torch.tensor([*new.values()], dtype=torch.float64).view(-1, 2)
        fresh = ~torch.isin(keys, self.keys)
        keys, values = torch.cat([self.keys, keys[fresh]]), torch.cat([self.values, values[fresh]])
        order = keys.argsort()
        self.keys, self.values = keys[order], values[order]

    @torch.no_grad()
    def fill(self, model):
        """The pass. model: before training, on its device, not wrapped"""
        self.read()
        left, found, written = self.work[self.done :], [], self.done
        if left:
            self.world.print(f"the reference: one pass over the data, {len(left)} of {len(self.work)} steps")
        model.eval()                                                           # dropout would draw random numbers
        for steps, i in left:
            for b in steps[i].micro:
                b = b.to(self.world.device)
                with self.world.autocast():
                    values = b.log_probs(model)
                found += [[k, *v] for k, v in zip(b.keys.tolist(), values.double().tolist())]
            self.done += 1
            if self.done - written >= max(EVERY, written // 10) or self.done == len(self.work):
                self.add(found)
                self.write()
                found, written = [], self.done
        model.train()
        return self

    def __call__(self, model, b):
        """-> (P, 2). model is not used"""
        at = torch.searchsorted(self.keys, b.keys).clamp(max=max(0, len(self.keys) - 1))
        if len(b.keys) and not (len(self.keys) and torch.equal(self.keys[at], b.keys)):
            stop(f"{self.file} lacks a sample: was its image unreadable before training? --resume=none starts again")
        return send(self.values[at], self.world.device)


def new_samples(samples, steps):
    """-> [(samples, step)] of the steps that draw a sample which no earlier step draws"""
    seen = set()
    for step in range(steps):
        drawn = set(samples.samples(step))
        if drawn - seen:
            yield samples, step
        seen |= drawn
