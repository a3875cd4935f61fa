"""Pairs of answers as training data: what train_dpo.py does before its loop, as run/stage.py does it for other stages.

A pair is one sample of two documents, which are neighbours in the packed sequence: the question with the chosen answer,
then the question with the rejected answer. Both have the images. So a pair is never divided between sequences or ranks.
"""

import hashlib
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import chat
from config import BadSample, stop
from data import Batch, Encoder, Steps, pack
from formats import configs
from formats.preferences import preference
from kernels.cross_entropy import IGNORE
from loss import sequence_log_probs
from parts import instruct
from parts.build import image_layout
from parts.spans import span_ends
from run import plan, stage
from run.reference import Table, without_adapters
from run.validate import Once, Validation, level


TOY = Path("runs/toy")


FACTS = "margin", "accuracy", "kl", "chosen", "rejected"       # what log.jsonl says of a step, means over its pairs


class TwoDocuments(list):
    """The ids of both documents of a pair, one after the other"""
    first = 0              # number of ids of the first document
    desirable = True       # of KTO: is the first document a good answer?
    key = 0                # int64, made from the ids and the images: equal for equal pairs


class PreferenceEncoder(Encoder):
    """Turns a row into the ids and labels of two documents. In each, only the answer that is compared is supervised."""

    def __call__(self, row, root=""):
        """-> ids (TwoDocuments), labels, names of the images, number of tokens cut off"""
        turns, chosen, rejected, names, system = preference(row)
        ids, *others = self.documents(turns, (chosen, rejected), names, system, root)
        if ids[: ids.first] == ids[ids.first :]:
            raise BadSample("the answers are equal in their first max_len tokens")
        return ids, *others

    def documents(self, turns, answers, names, system, root):
        """Two answers to one question -> as __call__"""
        blocks = self.blocks(names, root)
        prompt, _ = self.encode(turns, blocks, system)
        ids, labels, cut = TwoDocuments(), [], 0
        for answer in answers:
            long, kept = self.encode([*turns[:-1], (turns[-1][0], answer)], blocks, system)
            kept = [IGNORE] * len(prompt) + kept[len(prompt):]
            short, kept, _ = chat.truncate(long, kept, blocks, self.layout.image_id, self.max_len)
            if all(y == IGNORE for y in kept[1:]):             # [1:]: no position predicts the first token
                raise BadSample("the question is longer than max_len",
                                f"{len(prompt)} tokens before the answer, max_len={self.max_len}")
            ids.first = ids.first or len(short)
            ids += short
            labels += kept
            cut += len(long) - len(short)
        shown = [name if isinstance(name, str) else hash_of(name) for name in names]
        text = repr((len(prompt), ids.first, *ids, *shown))
        ids.key = int.from_bytes(bytes.fromhex(hash_of(text.encode()))[:8], "little", signed=True)
        return ids, labels, names, cut


def hash_of(blob):
    return hashlib.sha256(blob).hexdigest()


class PreferenceBatch(NamedTuple):
    """A stream of P pairs: document 2 p holds the chosen answer of pair p, document 2 p + 1 the rejected one."""
    batch: Batch
    keys: torch.Tensor     # (P,) int64, on the CPU

    ids = property(lambda self: self.batch.ids)
    labels = property(lambda self: self.batch.labels)
    lo = property(lambda self: self.batch.lo)
    images = property(lambda self: self.batch.images)

    def to(self, device):
        return self._replace(batch=self.batch.to(device))

    def log_probs(self, model):
        """-> (P, 2)"""
        return sequence_log_probs(model, self.batch, 2 * len(self.keys))[0].view(-1, 2)


def halves(sample):
    """(TwoDocuments, labels, images) -> the same for each document"""
    ids, labels, images = sample
    return [(ids[: ids.first], labels[: ids.first], images), (ids[ids.first :], labels[ids.first :], images)]


def keys_of(samples):
    """-> (P,) int64"""
    return torch.tensor([ids.key for ids, _, _ in samples], dtype=torch.long)


def pack_pairs(samples, side, span_ends=None, reader=None, weights=()):
    """As data.pack, for samples [(TwoDocuments, labels, images)] -> PreferenceBatch. weights: all are 1"""
    documents = [half for sample in samples for half in halves(sample)]
    return PreferenceBatch(pack(documents, side, span_ends, reader), keys_of(samples))


class PreferenceSteps(Steps):
    pack = staticmethod(pack_pairs)


class PreferenceOnce(Once):
    pack = staticmethod(pack_pairs)


def chosen_conversation(row):
    """As formats.rows.conversation: the turns end in the chosen answer"""
    turns, chosen, _, names, system = preference(row)
    return [*turns[:-1], (turns[-1][0], chosen)], names, system


class PreferenceValidation(Validation):
    """The mean loss per pair of the validation data, and answers to its first questions"""
    Steps, conversation = PreferenceOnce, staticmethod(chosen_conversation)
    metrics = "val_loss", "val_accuracy"

    @torch.no_grad()
    def loss(self, model, loss_fn):
        """loss_fn(model, micro-batch) -> sum of the losses of its pairs, (2, 5) sums and counts of FACTS. measured: a
        function of model and micro-batches, as in train_dpo.py; prepare_preference sets it"""
        total, right, n, bad = 0.0, 0.0, 0, 0
        for part in level(self.steps, (self.steps[i] for i in range(len(self.steps))), self.world):
            bad += len(part.dropped)
            for b in self.measured(model, part.micro):
                with self.world.autocast():
                    loss, facts = loss_fn(model, b.to(self.world.device))
                total, right = total + float(loss), right + float(facts[0, FACTS.index("accuracy")])
                n += len(b.keys)
        total, right, n, bad = self.world.sum([total, right, n, bad])
        loss, right = (total / n, right / n) if n else (math.nan, math.nan)
        return {"val_loss": loss, "val_accuracy": right, "val_dropped": int(bad)}


def begin_preference(s):
    """As stage.begin. The pairs of the toy world come from the answers of a model"""
    if s.data == "toy":
        if s.val_data or s.images != ".":
            stop("data=toy brings its own images; the given ones, and val_data, would not be read")
        s.data, s.images, s.system = str(TOY / "pairs.jsonl"), str(TOY / "images"), s.system or ""
        if not Path(s.data).is_file():
            stop(f"{s.data} is missing: python -m tools.pairs makes it from answers of a model; --help shows how")
    return stage.begin(s, "vicuna_v1")


class Form(NamedTuple):
    """How rows become samples, and what is measured in a whole step before its first backward pass."""
    encoder: type = PreferenceEncoder
    steps: type = PreferenceSteps
    validation: type = PreferenceValidation
    measured: callable = lambda s, world, reference, model, micro: micro     # pairs: nothing


def prepare_preference(s, world, model, folder, lrs, refers, form):
    """Open the data and print the plan. Then do a dry run, or start or resume the run -> stage.Run, two functions: that
    which gives the reference log p (P, 2) of a PreferenceBatch, and form.measured of model and micro-batches.

    refers    does the loss need the reference?"""
    cfg, spec = model.cfg, configs.image_spec(folder.pre, s.image_aspect)
    if s.max_tokens < 2 * s.max_len:
        stop(f"max_tokens={s.max_tokens} is less than twice max_len={s.max_len}: a pair must fit into a stream")
    encode = form.encoder(folder.tok, s.template, image_layout(cfg), s.max_len, s.system, instruct.reader(folder, cfg))
    samples = form.steps(s.data, s.images, encode, spec, s.batch_size, s.max_tokens, s.seed, world.rank, world.size,
                         span_ends(cfg), min_rating=s.min_rating, order=s.order)
    if s.augment:
        stop(f"augment={s.augment} would not be read: the reference of a pair is computed once, of the plain image")
    if any(w != 1 for w in samples.weights):
        stop(f"data={s.data}: a second colon weights the tokens of a file; every pair counts 1")
    steps = s.steps or math.ceil(s.epochs * samples.total / s.batch_size)
    first, = level(samples, [samples[0]], world)
    reference = without_adapters if refers else no_reference
    world.print(*folder.notes, *plan.lines(model, lrs, world, first.micro, steps, s), sep="\n")
    if s.dry_run:
        return stage.Run(exit_code=stage.rehearse(s, world, samples, first, folder, form.validation)), None, None

    def validation():                                          # called before a checkpoint is loaded
        made = form.validation(s, world, samples, folder)
        nonlocal reference
        if refers and not adapters_alone(lrs):
            reference = Table(s, folder, samples, steps, made.steps, world).fill(model)
        made.measured = partial(form.measured, s, world, reference)
        return made

    run = stage.begin_run(s, world, model, folder, lrs, samples, first, steps, plan.flops(model, plan.rows(cfg)),
                          validation)
    return run, reference, partial(form.measured, s, world, reference)


def finish_preference(run, s, world, folder):
    """As stage.finish. --overfit: are all chosen answers of the first batch ahead?"""
    if run.folder is None or not s.overfit:
        return stage.finish(run, s, world, folder)
    right = run.log.result.get("accuracy", 0)
    world.print(f"overfit: the chosen answer is ahead in {right:.1%} of the pairs of the first batch")
    return 0 if right == 1 else 1


def adapters_alone(lrs):
    """Do adapters train, and nothing else? Then the model without them is the reference."""
    return all(".lora_" in name for name in lrs)


def no_reference(model, b):
    """-> zeros (P, 2): the loss reads no reference"""
    return torch.zeros(len(b.keys), 2, device=b.ids.device)


def means(facts, n, world):
    """facts (2, 5): sums and counts of FACTS of this rank; n: pairs of all ranks -> {fact: mean}, {} without pairs"""
    if not n:
        return {}
    found = world.sum(facts.flatten().tolist())
    return {k: x / count if count else math.nan for k, x, count in zip(FACTS, found, found[len(FACTS) :])}
