"""Answers that are good or bad, without a partner: the data of train_dpo.py --loss=kto.

A sample is two documents: a question with its answer, and the same question with the answer of another row. The loss of
the first one is measured from z0 (loss.kto_loss): how much more probable than the reference the model makes answers to
other questions, as a mean over all samples of the step. No gradient passes through z0. So the second documents are
packed into sequences of their own, and measure_zero() reads them in a pass without gradients before the first backward
pass of the step. This pass costs a forward pass; z0 is the same for any micro-batches and ranks.

    P samples of a micro-batch
"""

import contextlib
from functools import partial
from typing import NamedTuple

import torch

from config import BadSample, stop
from data import Batch, pack, send
from formats.preferences import preference, unpaired
from formats.rows import open_mixture
from loss import kto_loss, sequence_log_probs
from run.preference import (
    Form,
    PreferenceEncoder,
    PreferenceOnce,
    PreferenceSteps,
    PreferenceValidation,
    halves,
    keys_of,
)


class Answers:
    """The answers of a file, one by one: those of a pair become two samples. The answer to another question comes from
    the row half a file away, so each answer of the file is used once. It does not depend on step, rank or seed."""

    def __init__(self, rows):
        self.rows, self.file, self.bytes, self.digest = rows, rows.file, rows.bytes, rows.digest
        if len(rows) < 2:
            stop(f"{rows.file}: KTO compares with answers to other questions, so a file needs two rows")
        self.each = 2                                           # answers per row
        for i in range(min(len(rows), 32)):
            with contextlib.suppress(BadSample):
                self.each = 1 if "completion" in rows[i] else 2
                break

    def __len__(self):
        return len(self.rows) * self.each

    def __getitem__(self, i):
        n, (at, which) = len(self.rows), divmod(i, self.each)
        row = self.rows[at]
        if ("completion" in row) != (self.each == 1):
            raise BadSample("pairs and single answers in one file: make two files of them")
        return {"id": row.get("id"), "row": row, "other": self.rows[(at + n // 2) % n], "which": which}

    def guess(self, i):
        return self.rows.guess(i // self.each)

    def has_images(self):
        return self.rows.has_images().repeat(self.each)


def judged(row, which):
    """A row -> turns, answer, is it desirable?, images, system text. which: 0 or 1, the answer of a pair"""
    if "completion" in row:
        return unpaired(row)
    turns, *answers, names, system = preference(row)
    return turns, answers[which], which == 0, names, system


class UnpairedEncoder(PreferenceEncoder):
    def __call__(self, row, root=""):
        """-> ids (TwoDocuments), labels, names of the images, number of tokens cut off"""
        turns, answer, desirable, names, system = judged(row["row"], row["which"])
        other = judged(row["other"], row["which"])[1]
        ids, *others = self.documents(turns, (answer, other), names, system, root)
        ids.desirable = desirable
        return ids, *others


class UnpairedBatch(NamedTuple):
    """P questions with their answers, and the same questions with answers to others. A stream that is None is not
    read: log p is then nan"""
    batch: Batch
    other: Batch
    keys: torch.Tensor         # (P,) int64, on the CPU
    desirable: torch.Tensor    # (P,) bool
    zero: float = 0.0          # z0 of the step

    ids = property(lambda self: self.batch.ids)
    labels = property(lambda self: self.batch.labels)
    lo = property(lambda self: self.batch.lo)
    images = property(lambda self: self.batch.images)

    def to(self, device):
        return self._replace(batch=self.batch.to(device), other=self.other.to(device),
                             desirable=send(self.desirable, device))

    def log_probs(self, model):
        """-> (P, 2): of the own answer, of the other one"""
        found = [b and sequence_log_probs(model, b, len(self.keys))[0] for b in (self.batch, self.other)]
        known = found[0] if found[1] is None else found[1]                                             # (P,)
        return torch.stack([torch.full_like(known, torch.nan) if x is None else x for x in found], 1)


def pack_unpaired(samples, side, span_ends=None, reader=None, weights=()):
    """As data.pack, for samples [(TwoDocuments, labels, images)] -> UnpairedBatch. weights: all are 1"""
    own, other = zip(*map(halves, samples)) if samples else ((), ())
    desirable = torch.tensor([ids.desirable for ids, _, _ in samples], dtype=torch.bool)
    return UnpairedBatch(pack(own, side, span_ends, reader), pack(other, side, span_ends, reader), keys_of(samples),
                         desirable)


class UnpairedSteps(PreferenceSteps):
    pack, open = staticmethod(pack_unpaired), staticmethod(partial(open_mixture, view=Answers))


class UnpairedOnce(PreferenceOnce):
    pack, open = staticmethod(pack_unpaired), staticmethod(partial(open_mixture, view=Answers))


def good_conversation(row):
    """As formats.rows.conversation, of a desirable answer"""
    turns, answer, desirable, names, system = judged(row["row"], row["which"])
    if not desirable:
        raise BadSample("an answer that is not desirable")
    return [*turns[:-1], (turns[-1][0], answer)], names, system


class UnpairedValidation(PreferenceValidation):
    Steps, conversation = UnpairedOnce, staticmethod(good_conversation)


@torch.no_grad()
def measure_zero(s, world, reference, model, micro):
    """The micro-batches of a step -> the same ones, which know z0: the mean of all ranks, at least 0"""
    total, n = 0.0, 0
    for b in micro:
        b = b.to(world.device)
        with world.autocast():
            before = reference(model, b._replace(batch=None))[:, 1]                                    # (P,)
            log_p, lengths = sequence_log_probs(model, b.other, len(b.keys))                           # (P,)
        gap = (log_p - before.to(log_p.dtype)) / (lengths if s.length_norm else 1)
        total, n = total + gap.double().sum(), n + len(gap)
    total, n = world.sum([float(total), n])
    return [b._replace(zero=max(0.0, total / n) if n else 0.0) for b in micro]


def unpaired_loss(s, reference, model, b):
    """As train_dpo.preference_loss, of P answers. margin: beta times (policy - reference - z0) of a good answer, times
    -1 of a bad one; accuracy: is it positive? kl: z0. chosen, rejected: log p of good, of bad answers"""
    before = reference(model, b._replace(other=None))[:, 0]                                            # (P,)
    log_p, lengths = sequence_log_probs(model, b.batch, len(b.keys))                                   # (P,)
    before, unit, good = before.to(log_p.dtype), lengths if s.length_norm else 1, b.desirable
    weights = s.desirable_weight, s.undesirable_weight
    losses = kto_loss(log_p / unit, before / unit, b.zero, good, s.beta, weights)                      # (P,)
    if s.sft > 0:
        losses = losses - s.sft * good * log_p / lengths
    log_p = log_p.detach()
    margin = s.beta * ((log_p - before) / unit - b.zero) * (2.0 * good - 1)
    each = torch.ones_like(log_p)
    facts = margin, margin > 0, b.zero * each, log_p * good, log_p * ~good
    counts = each, each, each, good, ~good
    return losses.sum(), torch.stack([torch.stack([x.double().sum() for x in row]) for row in (facts, counts)])


UNPAIRED = Form(UnpairedEncoder, UnpairedSteps, UnpairedValidation, measure_zero)
