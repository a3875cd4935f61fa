"""LLaVA json or jsonl plus a folder of images -> packed batches, in an order that is a function of (seed, step) alone.

    python data.py FILE --images=DIR --model=DIR [--template=NAME --max_len=N --show=N]     # check a file, show samples

    N tokens of the stream   I images   S side in pixels   Q tokens per image
"""

import dataclasses
import math
import signal
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import chat
from config import BadSample, one_line_errors, parse, stop, within
from formats import tokenizer
from formats.rows import Rows
from formats.strict_json import read_json
from images import image_folder, load_image, preprocess, safe_path
from kernels.cross_entropy import IGNORE

REPEATS = 1024             # a step may hold so many samples although the data hold fewer: a recipe tried on a handful


# ---- pictures -------------------------------------------------------------------------------------------------------


# ---- rows -----------------------------------------------------------------------------------------------------------


USER, ASSISTANT = ("human", "user"), ("gpt", "assistant")


def conversation(row):
    """A LLaVA row -> (turns [(user, assistant)], image names, system text or None)."""
    said = row.get("conversations", row.get("messages"))
    if not isinstance(said, list) or not said:
        raise BadSample("no conversations")
    system, turns = None, []
    for i, m in enumerate(said):
        m = m if isinstance(m, dict) else {}
        who, text = m.get("from", m.get("role")), m.get("value", m.get("content"))
        if not isinstance(text, str):
            raise BadSample("a turn has no text", f"turn {i}")
        if who == "system" and i == 0:
            system = text
        elif who in USER:
            if turns and turns[-1][1] is None:
                raise BadSample("two questions in a row", f"turn {i}")
            turns.append((text, None))
        elif who in ASSISTANT:
            if not turns or turns[-1][1] is not None:
                raise BadSample("an answer without a question", f"turn {i}")
            if not text.strip():
                raise BadSample("an empty answer", f"turn {i}")
            turns[-1] = (turns[-1][0], text)
        else:
            raise BadSample("unknown speaker", f"turn {i}, {who!r:.80}")
    if not turns or turns[-1][1] is None:
        raise BadSample("the last question has no answer")
    names = row.get("image", row.get("images"))
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise BadSample("image is neither a name nor a list of names", f"{names!r:.80}")
    lost = [u for u, _ in turns if u.strip().startswith(chat.IMAGE) or u.strip().endswith(chat.IMAGE)]
    if lost and not names:                                     # where LLaVA writes it, a marker is more than a word
        raise BadSample(f"not as many {chat.IMAGE} markers as images", f"0 image(s) but {len(lost)} marker(s)")
    return turns, names, system


# ---- batches --------------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """One packed stream of N tokens from many conversations; I images, in the order of their holes."""
    ids: torch.Tensor     # (N,) int64
    labels: torch.Tensor  # (N,) int64: the id that this position must predict, or -100
    pos: torch.Tensor     # (N,) int64, from 0 in every conversation
    lo: torch.Tensor      # (N,) int32: a token reads the keys lo <= j < hi of the stream
    hi: torch.Tensor      # (N,) int32
    images: torch.Tensor  # (I, 3, S, S) uint8

    def to(self, device):
        return Batch(*(t.to(device, non_blocking=True) for t in self))


def pack(examples, side):
    """[(ids, labels, images (i, 3, side, side) uint8)] -> one Batch. Labels are shifted here, each conversation on its
    own, so that no token is asked to predict the beginning of a stranger."""
    lengths = torch.tensor([len(ids) for ids, _, _ in examples], dtype=torch.long)
    starts = lengths.cumsum(0) - lengths
    ids = torch.tensor([i for ids, _, _ in examples for i in ids], dtype=torch.long)
    labels = torch.tensor([i for _, labels, _ in examples for i in [*labels[1:], IGNORE]], dtype=torch.long)
    lo = starts.repeat_interleave(lengths)
    at = torch.arange(len(ids))
    images = [images for _, _, images in examples if len(images)]
    images = torch.cat(images) if images else torch.zeros(0, 3, side, side, dtype=torch.uint8)
    return Batch(ids, labels, at - lo, lo.int(), at.int() + 1, images)


def share_out(costs, n):
    """Indices of `costs` in n groups of nearly equal sum: the dearest first, each to the group with least so far."""
    groups, load = [[] for _ in range(n)], [0] * n
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        k = min(range(n), key=lambda k: (load[k], k))
        groups[k].append(i)
        load[k] += costs[i]
    return groups


def fill(indices, lengths, room):
    """Best fit, longest first: `indices` into few streams of at most `room` tokens; a longer one gets its own."""
    streams = []                                                  # [room left, indices]
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        fit = min((s for s in streams if s[0] >= lengths[i]), key=lambda s: s[0], default=None)
        if fit is None:
            fit = [room, []]
            streams.append(fit)
        fit[0] -= lengths[i]
        fit[1].append(i)
    return [sorted(s[1]) for s in streams]


class Encoder:
    """A row -> ids, labels and image names: everything about a sample except its pixels."""

    def __init__(self, tok, template, image_id, image_tokens, max_len, system=None):
        self.tok, self.template, self.system = tok, template, system
        self.image_id, self.image_tokens, self.max_len = image_id, image_tokens, max_len
        try:
            self.encode([("?", "!")], 0)
        except BadSample as e:
            stop(f"template {template} does not fit the tokenizer in {tok.folder}: {e}")

    def encode(self, turns, images, system=None):
        system = self.system if system is None else system
        return chat.encode(self.tok, self.template, turns, images, self.image_id, self.image_tokens, system)

    def __call__(self, row):
        """-> ids, labels, names of the images kept, tokens cut off"""
        turns, names, system = conversation(row)
        ids, labels = self.encode(turns, len(names), system)
        short, labels, kept = chat.truncate(ids, labels, self.image_id, self.image_tokens, self.max_len)
        if all(l == IGNORE for l in labels[1:]):
            raise BadSample("nothing to learn" + (f" within {self.max_len} tokens" if len(short) < len(ids) else ""))
        return short, labels, names[:kept], len(ids) - len(short)


class StepData(NamedTuple):
    """What one rank does in one optimizer step."""
    micro: list       # Batches: as many on every rank; a rank that has less work gets empty ones
    names: list       # the samples of this rank
    dropped: list     # (sample, reason) on this rank
    truncated: int    # samples that lost tokens at their end
    animated: int     # pictures of which only the first frame was looked at


class Steps(torch.utils.data.Dataset):
    """steps[s] -> StepData of this rank. Which samples make up step s depends on (seed, s) alone; the ranks divide them
    by cost.

    spec: "a.json:0.7,b.json:0.3" mixes files by weight; "a.json,b.json" takes every sample once. An epoch is as many
    samples as the files hold together; each file is shuffled anew whenever it has been used up."""

    def __init__(self, spec, images, encode, image_spec, batch_size, max_tokens, seed, rank=0, world=1):
        for name, value, least in (("batch_size", batch_size, 1), ("max_len", encode.max_len, 1), ("seed", seed, 0)):
            if value < least:
                stop(f"{name}={value}: expected at least {least}")
        if max_tokens < encode.max_len:
            stop(f"max_tokens={max_tokens} is less than max_len={encode.max_len}: one sample must fit into a stream")
        image_folder(images)
        files, _, weights = zip(*(part.partition(":") for part in spec.split(",")))
        self.files = [Rows(f) for f in files]
        self.total = sum(len(r) for r in self.files)
        if batch_size > max(self.total, REPEATS):
            stop(f"batch_size={batch_size}, but {spec} holds {self.total:,} samples")
        self.counts = self.shares(spec, weights)               # draws from each file per epoch
        self.images, self.encode, self.image_spec = images, encode, image_spec
        self.batch_size, self.max_tokens, self.seed, self.rank, self.world = batch_size, max_tokens, seed, rank, world
        self._epoch = (None, None)

    def shares(self, spec, weights):
        try:
            weights = np.array([float(w) for w in weights] if any(weights) else [len(r) for r in self.files])
        except ValueError:
            weights = np.array([math.nan])
        if not (weights.min() >= 0 and 0 < weights.sum() < math.inf):
            stop(f"data={spec}: each file needs a weight after a colon, as in a.json:0.7,b.json:0.3, or none does")
        return np.diff(np.round(np.cumsum([0, *weights]) / weights.sum() * self.total)).astype(int)

    def epoch(self, e):
        """(total, 2): file and sample of every draw of epoch e."""
        if self._epoch[0] != e:
            draws = []
            for f, (rows, count) in enumerate(zip(self.files, self.counts)):
                first, end = e * count, (e + 1) * count        # of this file's own, endless order, cut into epochs
                laps = range(first // len(rows), -(-end // len(rows)))
                order = [np.random.default_rng([self.seed, f, lap]).permutation(len(rows)) for lap in laps]
                picked = np.concatenate([[], *order]).astype(int)[first % len(rows):][:count]
                draws.append(np.stack([np.full(count, f), picked], 1))
            draws = np.concatenate(draws)
            order = np.random.default_rng([self.seed, len(self.files), e, 1]).permutation(len(draws))
            self._epoch = (e, draws[order])
        return self._epoch[1]

    def samples(self, step):
        """The (file, sample) pairs of one step."""
        at = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [tuple(int(v) for v in self.epoch(i // self.total)[i % self.total]) for i in at]

    def name(self, file, i):
        return f"{Path(self.files[file].file).name}[{i}]"

    def __getitem__(self, step):
        made, dropped, truncated = [], [], 0
        for n, (f, i) in enumerate(self.samples(step)):
            name, mine = self.name(f, i), n % self.world == self.rank
            try:
                row = self.files[f][i]
                name += f" id={row.get('id')!r:.80}"
                ids, labels, names, cut = self.encode(row)
                made.append((name, ids, labels, names))
                truncated += mine and cut > 0
            except BadSample as e:                             # every rank sees this one; one of them reports it
                if mine:
                    dropped.append((name, str(e)))
        lengths = [len(ids) for _, ids, _, _ in made]
        costs = [len(ids) + self.encode.image_tokens * len(files) for _, ids, _, files in made]  # the ViT works too
        bins = [fill(group, lengths, self.max_tokens) for group in share_out(costs, self.world)]
        mine, micro, names, moving = bins[self.rank], [], [], 0
        for b in range(max(map(len, bins))):
            examples = []
            for j in mine[b] if b < len(mine) else []:
                name, ids, labels, files = made[j]
                try:
                    pictures = [load_image(safe_path(self.images, f)) for f in files]
                    pixels = [preprocess(p, self.image_spec) for p in pictures]
                    moving += sum(p.info["animated"] for p in pictures)
                    examples.append((ids, labels, torch.stack(pixels) if pixels else []))
                    names.append(name)
                except BadSample as e:
                    dropped.append((name, str(e)))
            micro.append(pack(examples, self.image_spec.side))
        return StepData(micro, names, dropped, truncated, moving)


def deaf(worker):
    """Schedulers tell every process to stop; the trainer still needs its loaders until the end of the step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader(steps, order, workers):
    """StepData for the steps in `order`. A worker prepares whole steps, so their number changes nothing."""
    own = torch.Generator()    # or the loader draws a seed from dropout's generator, and a resumed run differs
    return watched(iter(torch.utils.data.DataLoader(
        steps, batch_size=None, sampler=order, num_workers=workers, generator=own, worker_init_fn=deaf)))


def watched(batches):
    """The same batches. torch names a dead worker, unless its connection breaks before its death is noticed."""
    try:
        yield from batches
    except (ConnectionError, EOFError) as e:
        raise RuntimeError(f"DataLoader worker exited unexpectedly, killed for its memory? ({type(e).__name__})") from e


# ---- python data.py -------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Check:
    images: str = "."              # folder of the images
    model: str = ""                # folder with a tokenizer: a run, a LLaVA folder, a language model
    template: str = ""             # plain, vicuna_v1, llava_llama_2, llama_3, chatml, mistral; empty: as train_sft.py
                                   # goes on from this model
    max_len: int = 2048            # tokens
    image_tokens: int = 576        # tokens of one image, where the model does not say
    show: int = 3                  # samples to print


def main(argv):
    files = [a for a in argv if not a.startswith("--")]
    s = parse(Check, [a for a in argv if a.startswith("--")], __doc__)
    if len(files) != 1 or not s.model:
        stop("usage: python data.py FILE --images=DIR --model=DIR [--template=NAME]")
    within(s, {"max_len": (1, None), "image_tokens": (1, None), "show": (0, None)})
    image_folder(s.images)
    folder = Path(s.model)
    folder = folder / "model" if (folder / "model" / "tokenizer.json").is_file() else folder
    cfg = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    tok = tokenizer.Tokenizer(folder, cfg.get("image_token_index", cfg.get("image_token_id")))
    meta = read_json(folder / "pumice.json") if (folder / "pumice.json").is_file() else {}
    known = meta.get("template", "plain")
    template = s.template or (known if known != "plain" else "vicuna_v1")
    image_tokens = cfg.get("image_seq_length", s.image_tokens)
    encode = Encoder(tok, template, tok.image, image_tokens, s.max_len, meta.get("system"))
    rows, lengths, reasons, learnt, images, cut, moving = Rows(files[0]), [], defaultdict(list), 0, 0, 0, 0
    for i in range(len(rows)):
        try:
            row = rows[i]
            ids, labels, names, lost = encode(row)
            frames = [load_image(safe_path(s.images, name)).info["animated"] for name in names]
        except BadSample as e:
            reasons[e.reason].append(f"[{i}] {e}")
            continue
        lengths.append(len(ids))
        learnt += sum(y != IGNORE for y in labels)
        images += len(names)
        moving += sum(frames)
        cut += lost > 0
        if len(lengths) <= s.show:
            print(f"--- sample {i}, id {row.get('id')!r:.80}: {len(ids)} tokens, {len(names)} image(s)")
            chat.show(tok, ids, labels, tok.image)
    good, bad = len(lengths), len(rows) - len(lengths)
    print(f"--- {files[0]}: {len(rows)} samples, {good} good, {bad} dropped, {cut} truncated to {s.max_len} tokens")
    if good:
        print(f"    {sum(lengths):,} tokens ({learnt / sum(lengths):.1%} learnt), longest {max(lengths)}, "
              f"mean {sum(lengths) / good:.0f}, {images} images"
              + (f" ({moving} animated: only the first frame is looked at)" if moving else ""))
    for reason, where in sorted(reasons.items(), key=lambda r: -len(r[1])):
        print(f"    {len(where)} x {reason}; first: {where[0]}")
    return 1 if bad else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(sys.argv[1:]))
