"""Two scores of held-out samples during a run: exact match of answers, and recall of captions.

    val_exact         share of short answers that the model gives as they are in the data, greedy, first turn only
    val_r1, val_r5    of B images with B captions: share of images whose own caption is the most probable one, or among
                      the five most probable ones. The score of a caption is the sum of its tokens' log p

All ranks compute the same: FSDP needs equally many forward passes on each. Streams have at most max_tokens tokens."""

from statistics import fmean
from typing import NamedTuple

import torch

import chat
from config import BadSample
from data import best_fit
from kernels.cross_entropy import IGNORE
from loss import sequence_log_probs
from metrics.words import exact

WORDS = 3      # a short answer has at most this many words


class FirstTurn(NamedTuple):
    """The first turn of a sample with images"""
    row: dict
    text: str              # with <image> markers
    truth: str
    prompt: torch.Tensor   # ids
    blocks: list           # ids of each image
    pixels: list           # (n, 3, S, S) uint8 of each image
    system: str | None


def first_questions(steps, conversation, images, n, wanted=lambda turns, names: True):
    """-> [FirstTurn]: of the first file of data.Steps, the first n usable samples that are wanted. conversation: as
    formats.rows.conversation; images: folder"""
    out, encode, rows = [], steps.encode, steps.files[0]
    for i in range(len(rows)):
        if len(out) == n:
            break
        try:
            row = rows[i]
            turns, names, system = conversation(row)
            asked = names and turns[0][1] and turns[0][0].count(chat.IMAGE) == len(names)      # no document: no answer
            if asked and wanted(turns, names):
                encode(row, images)                              # raises BadSample if training would drop `row`
                blocks = encode.blocks(names, images)
                prompt, _ = encode.encode([(turns[0][0], None)], blocks, system)
                pixels = [steps.pixels(name)[0] for name in names]
                out.append(FirstTurn(row, *turns[0], torch.tensor(prompt), blocks, pixels, system))
        except BadSample:
            continue
    return out


def short_answers(turns, names):
    return len(turns[0][1].split()) <= WORDS


def distinct_captions():
    """-> function for first_questions: one image, one turn, and a caption that no sample before had"""
    seen = set()

    def wanted(turns, names):
        new = len(names) == len(turns) == 1 and turns[0][1].strip() not in seen
        seen.update([turns[0][1].strip()] * new)
        return new
    return wanted


def exact_match(questions, ask, steps):
    """-> share of right answers. ask: function (prompts, pixels, max_new_tokens) -> answers"""
    full = [steps.encode.encode([(q.text, q.truth)], q.blocks, q.system)[1] for q in questions]
    most = max(sum(y != IGNORE for y in labels) for labels in full) + 1     # a longer answer is wrong
    lengths, points = [len(q.prompt) + most for q in questions], []
    for group in best_fit(range(len(questions)), lengths, steps.max_tokens):
        some = [questions[i] for i in group]
        answers = ask([q.prompt for q in some], [x for q in some for x in q.pixels], most)
        points += [exact(answer, [q.truth]) for answer, q in zip(answers, some)]
    return fmean(points)


@torch.no_grad()
def caption_ranks(questions, model, steps, world):
    """-> (B,) for each image, how many captions of the B samples are more probable than its own"""
    encode, B = steps.encode, len(questions)
    log_p = torch.zeros(B, B)
    for i, q in enumerate(questions):
        documents = []
        for other in questions:
            ids, labels = encode.encode([(q.text, other.truth)], q.blocks, q.system)
            documents.append(chat.truncate(ids, labels, q.blocks, encode.layout.image_id, encode.max_len)[:2])
        for stream in best_fit(range(B), [len(ids) for ids, _ in documents], steps.max_tokens):
            batch = steps.pack([(*documents[j], torch.cat(q.pixels)) for j in stream], steps.image_spec.side,
                               steps.span_ends, encode.reader)
            with world.autocast():
                log_p[i, stream] = sequence_log_probs(model, batch.to(world.device), len(stream))[0].float().cpu()
    return (~(log_p <= log_p.diagonal()[:, None])).sum(1)        # a nan is the worst score
