"""Validation during a run: the loss and scores on a validation file, and answers to its first questions. It does not
affect training: train/eval modes, gradients and torch's random state are the same afterwards."""

import contextlib
import math
import zlib

import torch
import torch.distributed as dist

import chat
from config import stop
from data import Steps, conversation
from engine import unwrap
from generate import Chat
from loss import total_weight
from run.held_out import caption_ranks, distinct_captions, exact_match, first_questions, short_answers


def level(steps, parts, world):
    """Yield the StepData `parts` of data.Steps, in the same order on all ranks. DDP and FSDP need equally many
    micro-batches on all ranks: a rank that has fewer gets empty ones."""
    empty = steps.pack([], steps.image_spec.side, steps.span_ends, steps.encode.reader)
    for part in parts:
        most = max(world.sum([len(part.micro) * (rank == world.rank) for rank in range(world.size)]))
        yield part._replace(micro=part.micro + [empty] * (int(most) - len(part.micro)))


@contextlib.contextmanager
def logits_of_rank_0(model, world):
    """In this context all ranks get the output of rank 0 from each forward pass, so they generate the same tokens. FSDP
    needs equally many passes on each rank, and the logits of two GPUs may differ in their last bits."""
    def take(module, args, logits):
        dist.broadcast(logits, 0)
    hook = model.register_forward_hook(take) if world.size > 1 else contextlib.nullcontext()
    with hook:
        yield


class Once(Steps):
    """Steps that take every sample exactly once; the last step may have fewer samples."""

    def samples(self, step):
        return super().samples(step)[: max(0, self.total - step * self.batch_size)]

    def __len__(self):
        return math.ceil(self.total / self.batch_size)


class Validation:
    Steps, conversation = Once, staticmethod(conversation)       # how samples and rows are read: other for other rows
    metrics = "val_loss",                                        # the numbers that are logged; without data none is

    def __init__(self, s, world, samples, folder):
        self.s, self.world, self.folder, self.questions, self.short, self.captions = s, world, folder, [], [], []
        self.steps = self.Steps(s.val_data, s.images, samples.encode, samples.image_spec, min(s.batch_size, 32),
                                s.max_tokens, 0, world.rank, world.size, samples.span_ends) if s.val_data else []
        if not s.val_data:
            self.metrics = ()
            return
        if not any(sum(world.gather(len(self.steps[i].names))) for i in range(len(self.steps))):
            first = "".join(f"; {name}: {why}" for name, why in self.steps[0].dropped[:1])
            stop(f"{s.val_data}: no sample can be used{first}")
        self.questions = self.first(4)
        if s.template != "plain":                                # plain has captions, no questions
            self.short = self.first(s.eval_questions, short_answers)
        self.captions = self.first(getattr(s, "eval_captions", 0), distinct_captions())
        self.metrics += ("val_exact",) * bool(self.short) + ("val_r1", "val_r5") * bool(self.captions)

    def first(self, n, *wanted):
        found = first_questions(self.steps, self.conversation, self.s.images, n, *wanted)
        seen = str([(q.prompt.tolist(), [list(p.shape) for p in q.pixels]) for q in found])
        if len(set(self.world.gather(zlib.crc32(seen.encode())))) > 1:
            stop(f"{self.s.val_data}: not all ranks can read the same samples: do all machines see the same files?")
        return found

    def measure(self, step, model, loss_fn, log):
        """Compute, log and print the loss, exact match and recall, over all ranks."""
        if not self.steps:
            return
        model.eval()
        found = self.loss(model, loss_fn)
        if self.captions:
            ranks = caption_ranks(self.captions, model, self.steps, self.world)
            found |= {f"val_r{k}": float((ranks < k).double().mean()) for k in (1, 5)}
        model.train()
        if self.short:
            found["val_exact"] = exact_match(self.short, lambda *asked: self.ask(model, *asked), self.steps)
        log.append({"step": step + 1, **found})
        bad = found.pop("val_dropped")
        self.world.print(f"step {step + 1}/{log.steps}  validation loss {found.pop('val_loss'):.4f}"
                         + "".join(f"  {name.removeprefix('val_')} {x:.1%}" for name, x in found.items())
                         + (f" ({bad} of {self.steps.total} samples could not be used)" if bad else ""))

    @torch.no_grad()
    def loss(self, model, loss_fn):
        """-> dict: the mean validation loss per supervised token, and how many samples could not be used"""
        total = count = bad = 0.0
        for part in level(self.steps, (self.steps[i] for i in range(len(self.steps))), self.world):
            bad += len(part.dropped)
            for batch in part.micro:
                with self.world.autocast():
                    total += float(loss_fn(model, batch.to(self.world.device)))
                count += total_weight(batch)
        total, count, bad = self.world.sum([total, count, bad])
        # count is 0 if no sample can be used any more, because the images were deleted during the run
        return {"val_loss": total / count if count else math.nan, "val_dropped": int(bad)}

    def ask(self, model, prompts, pixels, *most):
        """-> answers of the model in its present state"""
        s = self.s
        model = Chat.of(unwrap(model), self.folder, s.template, s.system, s.image_aspect)
        with (self.world.autocast(), torch.compiler.set_stance("force_eager"),   # else torch recompiles for each token
              logits_of_rank_0(model.model, self.world)):
            return model.answers(prompts, pixels, *most)

    def answers(self, step, model, log):
        """Answer the fixed questions, write the answers to samples.jsonl, and print the first answer."""
        if not self.questions:
            return
        answers = self.ask(model, [q.prompt for q in self.questions], [x for q in self.questions for x in q.pixels])
        for q, answer in zip(self.questions, answers):
            row = {"step": step + 1, "id": q.row.get("id"), "prompt": q.text, "expected": q.truth, "answer": answer}
            log.append(row, log.file.with_name("samples.jsonl"))
        question = " ".join(self.questions[0].text.replace(chat.IMAGE, "").split())
        self.world.print(chat.printable(f"  question: {question:.100}\n  answer:   {answers[0]}\n"
                                        f"  expected: {self.questions[0].truth}"))


@torch.no_grad()
def check_overfit(model, batch, world):
    """After --overfit: does the model predict every supervised token of the batch? -> exit code, 0 if it does"""
    right = count = 0
    model.eval()
    with world.autocast():
        for b in batch.micro:
            b = b.to(world.device)
            guess = model(*b, head=lambda hidden, weight, *_: (hidden @ weight.to(hidden.dtype).T).argmax(-1))
            labels = b.labels[b.labels >= 0]
            right, count = right + int((guess == labels).sum()), count + len(labels)
    right, count = world.sum([right, count])
    yes = 0 < right == count
    world.print(f"overfit: {'yes' if yes else 'no'} ({right:.0f} of {count:.0f} supervised tokens predicted)")
    return 0 if yes else 1
