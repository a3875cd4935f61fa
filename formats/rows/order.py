"""Which samples make up a step: the setting `order`. An order is a function of (seed, step) alone, so resume needs no
state, and all ranks draw the same samples.

    shuffle          all files in one random order; the default
    by_modality      a step has samples with images or samples without, never both (LLaVA: group_by_modality_length)
    round_robin      steps take turns: each step is of one file (the baseline of Flamingo, arXiv 2204.14198, table 3)
    accumulate_all   each step has samples of every file, in fixed shares (Flamingo's own choice, the same table)
    curriculum       an epoch draws the files one after the other, in the given order; a file's samples are shuffled
    replay           the first file is new and is drawn once per epoch; the others are old and keep their shares

The curriculum goes by file, not by length: a long answer is not always a hard one, and the lengths of rows in parquet
are not known before they are read.

    B samples per step   F files   C samples drawn per epoch
"""

import functools

import numpy as np

from config import stop

CYCLE = 100                # accumulate_all: after so many steps, the counts of the files are exact


class Stream:
    """Samples without end: stream(first, n) -> [(file, index in it)]. Epoch e has counts[k] samples of part k. A part
    is shuffled again when all its samples have been drawn.

    parts    [(file, how many samples, their indices; None: all of the file)]
    mixed    shuffle the parts of an epoch into each other?      key    makes random numbers differ between streams"""

    def __init__(self, seed, parts, counts, key=(), mixed=True):
        self.seed, self.parts, self.counts, self.key, self.mixed = seed, parts, [int(c) for c in counts], key, mixed
        self.total, self.kept = sum(self.counts), (None, None)

    def epoch(self, e):
        """-> (C, 2): for every sample drawn in epoch e, its file and its index in this file"""
        if self.kept[0] != e:
            draws = []
            for (f, n, among), count in zip(self.parts, self.counts):
                first, end = e * count, (e + 1) * count        # epoch e makes the draws first ... end - 1 of this part
                laps = range(first // n, -(-end // n)) if count else ()
                order = [np.random.default_rng([self.seed, f, lap, *self.key]).permutation(n) for lap in laps]
                picked = np.concatenate([*order, np.zeros(0, int)])[first % max(1, n):][:count]
                picked = picked if among is None else among[picked]
                draws.append(np.stack([np.full(count, f, np.int32), picked.astype(np.int32)], 1))
            draws = np.concatenate(draws)
            if self.mixed:
                seed = [self.seed, len(self.parts), e, 1, *self.key]
                draws = draws[np.random.default_rng(seed).permutation(len(draws))]
            self.kept = (e, draws)
        return self.kept[1]

    def __call__(self, first, n):
        return [tuple(int(v) for v in self.epoch(i // self.total)[i % self.total]) for i in range(first, first + n)]


# ---- the orders: (files, samples of each in an epoch, B, seed, spec) -> function of a step, C ----------------------

def consecutive(stream, B, step):
    return stream(step * B, B)


def shuffle(files, counts, B, seed, spec, mixed=True):
    stream = Stream(seed, [(f, len(rows), None) for f, rows in enumerate(files)], counts, mixed=mixed)
    return functools.partial(consecutive, stream, B), stream.total


def curriculum(files, counts, B, seed, spec):
    return shuffle(files, counts, B, seed, spec, mixed=False)


def replay(files, counts, B, seed, spec):
    """The shares stay: counts are scaled so that the first file has as many draws as samples."""
    if len(files) < 2 or not given_shares(spec) or not counts[0]:
        stop(f"order=replay needs a new file, then old ones, and their shares, as in new.json:0.9,old.json:0.1, not "
             f"data={spec}")
    scale = len(files[0]) / counts[0]
    return shuffle(files, [len(files[0]), *(max(c > 0, round(c * scale)) for c in counts[1:])], B, seed, spec)


def by_modality(files, counts, B, seed, spec):
    """Steps with images are spread evenly: step s is one if s * share, rounded down, grows after it. Both kinds of
    steps go on where the last step of their kind ended, also from one epoch to the next."""
    parts, split = ([], []), ([], [])                          # of samples with images, without
    for f, (rows, count) in enumerate(zip(files, counts)):
        seen = rows.has_images()                                                                         # (rows,) bool
        least, most = min(count, int(seen.any())), count - min(count, int(not seen.all()))  # a rare kind, too
        with_images = max(least, min(most, round(count * seen.mean())))
        for k, (which, c) in enumerate(((seen, with_images), (~seen, count - with_images))):
            parts[k].append((f, int(which.sum()), np.flatnonzero(which).astype(np.int32)))
            split[k].append(c)
    images, texts = (Stream(seed, parts[k], split[k], (2 + k,)) for k in (0, 1))
    total = images.total + texts.total
    return functools.partial(one_kind, images, texts, B), total


def one_kind(images, texts, B, step):
    total = images.total + texts.total
    before, after = (s * images.total // total for s in (step, step + 1))      # steps with images up to here
    return images(before * B, B) if after > before else texts((step - before) * B, B)


def round_robin(files, counts, B, seed, spec):
    if given_shares(spec):
        stop(f"order=round_robin: steps take turns, so the shares in data={spec} would not be read")
    return functools.partial(in_turn, streams_of(files, seed), B), int(sum(counts))


def in_turn(streams, B, step):
    return streams[step % len(streams)](step // len(streams) * B, B)


def accumulate_all(files, counts, B, seed, spec):
    """Samples of the files in CYCLE steps: CYCLE * B, divided by share with the largest remainder. A step has the mean
    of each file, rounded up or down."""
    cycle = largest_remainder(counts, CYCLE * B)
    if min(cycle) < CYCLE:
        f = int(np.argmin(cycle))
        stop(f"order=accumulate_all: batch_size={B} times the share of {files[f].file} is {cycle[f] / CYCLE}, and "
             "every step must have a sample of every file")
    extra = np.cumsum([0, *(n % CYCLE for n in cycle)])                                               # (F + 1,)
    at = np.arange(CYCLE) * 37 % CYCLE                         # 37: a file's larger steps are spread over the cycle
    taken = -((at[:, None] - extra) // CYCLE)                                                         # (CYCLE, F + 1)
    table = np.diff(taken, axis=1) + [n // CYCLE for n in cycle]                                      # (CYCLE, F)
    before = np.concatenate([np.zeros((1, len(cycle)), int), table.cumsum(0)])                        # (CYCLE + 1, F)
    return functools.partial(of_all, streams_of(files, seed), before), int(sum(counts))


def of_all(streams, before, step):
    lap, at = divmod(step, CYCLE)
    first, end = lap * before[-1] + before[at], lap * before[-1] + before[at + 1]                     # (F,)
    return [draw for stream, a, b in zip(streams, first.tolist(), end.tolist()) for draw in stream(a, b - a)]


def largest_remainder(weights, n):
    """Divide n things by weights -> integers with the sum n, each its exact share rounded up or down"""
    weights = [int(w) for w in weights]
    out, rest = zip(*(divmod(w * n, sum(weights)) for w in weights))
    first = sorted(range(len(rest)), key=lambda k: (-rest[k], k))[: n - sum(out)]
    return [q + (k in first) for k, q in enumerate(out)]


def streams_of(files, seed):
    return [Stream(seed, [(f, len(rows), None)], [len(rows)]) for f, rows in enumerate(files)]


def given_shares(spec):
    return any(part.split(":")[1:2] not in ([], [""]) for part in spec.split(","))


ORDERS = {order.__name__: order for order in (shuffle, by_modality, round_robin, accumulate_all, curriculum, replay)}
