"""Validation during a run: the loss on a validation file, and answers to its first questions. It does not affect
training: train/eval modes, gradients and torch's random state are the same afterwards."""

import math

import torch

import chat
from config import BadSample, stop
from data import Steps, conversation
from engine import unwrap
from generate import Chat
from loss import total_weight


def level(steps, parts, world):
    """Yield the StepData `parts` of data.Steps, in the same order on all ranks. DDP and FSDP need equally many
    micro-batches on all ranks: a rank that has fewer gets empty ones."""
    empty = steps.pack([], steps.image_spec.side, steps.span_ends, steps.encode.reader)
    for part in parts:
        most = max(world.sum([len(part.micro) * (rank == world.rank) for rank in range(world.size)]))
        yield part._replace(micro=part.micro + [empty] * (int(most) - len(part.micro)))


class Once(Steps):
    """Steps that take every sample exactly once; the last step may have fewer samples."""

    def samples(self, step):
        return super().samples(step)[: max(0, self.total - step * self.batch_size)]

    def __len__(self):
        return math.ceil(self.total / self.batch_size)


class Validation:
    Steps, conversation = Once, staticmethod(conversation)       # how samples and rows are read: other for other rows

    def __init__(self, s, world, samples):
        self.s, self.world, self.questions = s, world, []
        self.steps = self.Steps(s.val_data, s.images, samples.encode, samples.image_spec, min(s.batch_size, 32),
                                s.max_tokens, 0, world.rank, world.size, samples.span_ends) if s.val_data else []
        if not s.val_data:
            return
        if not any(sum(world.gather(len(self.steps[i].names))) for i in range(len(self.steps))):
            first = "".join(f"; {name}: {why}" for name, why in self.steps[0].dropped[:1])
            stop(f"{s.val_data}: no sample can be used{first}")
        self.questions = self.first_questions()

    @torch.no_grad()
    def loss(self, step, model, loss_fn, log):
        """Compute, log and print the mean validation loss per supervised token, over all ranks."""
        if not self.steps:
            return
        model.eval()
        total = count = bad = 0.0
        for part in level(self.steps, (self.steps[i] for i in range(len(self.steps))), self.world):
            bad += len(part.dropped)
            for batch in part.micro:
                with self.world.autocast():
                    total += float(loss_fn(model, batch.to(self.world.device)))
                count += total_weight(batch)
        model.train()
        total, count, bad = self.world.sum([total, count, bad])
        # count is 0 if no sample can be used any more, because the images were deleted during the run
        loss = total / count if count else math.nan
        log.append({"step": step + 1, "val_loss": loss, "val_dropped": int(bad)})
        self.world.print(f"step {step + 1}/{log.steps}  validation loss {loss:.4f}"
                         + (f" ({bad:.0f} of {self.steps.total} samples could not be used)" if bad else ""))

    def first_questions(self, n=4):
        """Choose the questions to answer: the first turns of n usable samples with images.
        -> [(sample id, question, true answer, prompt ids, images)]"""
        out, encode = [], self.steps.encode
        for row in (self.steps.files[0][i] for i in range(len(self.steps.files[0]))):
            try:
                turns, names, system = self.conversation(row)
                if names and turns[0][1] and turns[0][0].count(chat.IMAGE) == len(names):      # no document: no answer
                    encode(row, self.s.images)                           # raises BadSample if training would drop `row`
                    prompt, _ = encode.encode([(turns[0][0], None)], encode.blocks(names, self.s.images), system)
                    pixels = [self.steps.pixels(name)[0] for name in names]
                    out.append((row.get("id"), *turns[0], torch.tensor(prompt), pixels))
            except BadSample:
                continue
            if len(out) == n:
                break
        return out

    def answers(self, step, model, folder, log):
        """Answer the fixed questions, write the answers to samples.jsonl, and print the first answer."""
        if not self.questions:
            return
        s = self.s
        model = Chat.of(unwrap(model), folder, s.template, s.system, s.image_aspect)
        with self.world.autocast(), torch.compiler.set_stance("force_eager"):    # else torch recompiles for each token
            answers = model.answers([p for *_, p, _ in self.questions], [x for *_, p in self.questions for x in p])
        for (i, question, truth, _, _), answer in zip(self.questions, answers):
            log.append({"step": step + 1, "id": i, "prompt": question, "expected": truth, "answer": answer},
                       log.file.with_name("samples.jsonl"))
        _, question, truth, *_ = self.questions[0]
        question = " ".join(question.replace(chat.IMAGE, "").split())
        self.world.print(chat.printable(f"  question: {question:.100}\n  answer:   {answers[0]}\n  expected: {truth}"))


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
