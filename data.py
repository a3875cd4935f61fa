"""Turn LLaVA json or jsonl and a folder of images into packed sequences. A step's samples depend only on (seed, step).

    python data.py FILE --images=DIR --model=DIR [--template=NAME --max_len=N --show=N --bad=FILE]   # check a file

    row      one object of a data file           sample   ids, labels and images of a row     step   batch_size samples
    stream   the samples of one micro-batch, packed into one sequence without padding

    N tokens of a stream   I images   S side in pixels   Q tokens per image
"""

import heapq
import runpy
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

import chat
from config import BadSample, stop
from formats.image_files import image_folder, load_image, safe_path
from formats.rows import ORDERS, conversation, open_mixture, token_rates
from images import preprocess
from kernels.cross_entropy import IGNORE
from parts.augment import Change, augment_kinds, draw_change

# ---- rows -> samples -------------------------------------------------------------------------------------------------

class Encoder:
    """Turns a row of a data file into ids, labels and image names: a sample without its pixels."""

    def __init__(self, tok, template, layout, max_len, system=None, reader=None):
        """layout: images.Layout, or an object with the same methods; reader: of instructions (parts/instruct.py)"""
        self.tok, self.template, self.layout, self.max_len = tok, template, layout, max_len
        self.system, self.reader = system, reader
        try:
            self.encode([("?", "!")])
        except BadSample as e:
            stop(f"template {template} does not fit the tokenizer in {tok.folder}: {e}")

    def encode(self, turns, blocks=(), system=None, template=None):
        return chat.encode(self.tok, template or self.template, turns, blocks,
                           self.system if system is None else system, self.max_len)

    def blocks(self, names, root):
        """Names of images below the folder root -> for each image, the list of ids that stand for it"""
        return [self.layout.block(safe_path(root, name) if self.layout.needs_image else None) for name in names]

    def __call__(self, row, root=""):
        """A row -> ids, labels, names of the images that fit into max_len, number of tokens cut off"""
        turns, names, system = conversation(row)
        blocks = self.blocks(names, root)
        ids, labels = self.encode(turns, blocks, system, "document" if turns[0][1] == "" else None)
        short, kept, images = chat.truncate(ids, labels, blocks, self.layout.image_id, self.max_len)
        if all(y == IGNORE for y in kept[1:]):                 # [1:]: no position predicts the first token
            if len(short) == len(ids):
                raise BadSample("no supervised token")
            first = next((i for i, y in enumerate(labels) if i and y != IGNORE), len(ids))
            raise BadSample("the question is longer than max_len",
                            f"{first} tokens before the answer, max_len={self.max_len}")
        return short, kept, names[:images], len(ids) - len(short)


# ---- samples -> packed sequences ------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """One stream (packed sequence): N tokens of several samples, and I images in the order of their placeholders."""
    ids: torch.Tensor     # (N,) int64
    labels: torch.Tensor  # (N,) int64: the id that this position must predict, or -100 if it is not supervised
    pos: torch.Tensor     # (N,) int64: positions, counted from 0 in every sample
    lo: torch.Tensor      # (N,) int32: each token attends to the keys lo <= j < hi of the stream
    hi: torch.Tensor      # (N,) int32: end of the range of keys that each token attends to
    images: torch.Tensor  # (I, 3, S, S) uint8
    weights: torch.Tensor = torch.zeros(0)  # (R,) fp32: of the R supervised tokens in the loss; empty: all are 1
    rows: torch.Tensor = torch.zeros(0, dtype=torch.long)  # (R,) the supervised tokens; empty: to() finds them

    def to(self, device):  # the CPU does not wait for a GPU: it finds rows before it sends them
        return Batch(*(send(t, device) for t in self._replace(rows=(self.labels != IGNORE).nonzero()[:, 0])))


def send(t, device):
    """-> tensor t on the device. From the CPU to a GPU it is copied from pinned memory: then the CPU does not wait."""
    pin = torch.device(device).type == "cuda" and t.device.type == "cpu"
    return (t.pin_memory() if pin else t).to(device, non_blocking=True)


def pack(samples, side, span_ends=None, reader=None, weights=()):
    """Samples [(ids, labels, images (n, 3, side, side) uint8)] -> one Batch. Labels are shifted by one within each
    sample, so no sample predicts the next one. span_ends: function that gives `hi` (parts/spans.py); None = causal
    weights: for each sample, the weight of its tokens in the loss; () = all are 1"""
    lengths = torch.tensor([len(ids) for ids, _, _ in samples], dtype=torch.long)
    ids = torch.tensor([i for ids, _, _ in samples for i in ids], dtype=torch.long)
    labels = torch.tensor([y for _, labels, _ in samples for y in [*labels[1:], IGNORE]], dtype=torch.long)
    lo = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    at = torch.arange(len(ids))
    images = [images for _, _, images in samples if len(images)]
    images = torch.cat(images) if images else torch.zeros(0, 3, side, side, dtype=torch.uint8)
    images = reader(samples, images) if reader else images
    hi = span_ends(ids, labels, at - lo, lo) if span_ends else at + 1
    w = torch.tensor(weights if any(w != 1 for w in weights) else [], dtype=torch.float32)
    w = w.repeat_interleave(lengths)[labels != IGNORE] if len(w) else w
    return Batch(ids, labels, at - lo, lo.int(), hi.int(), images, w)


def share_out(costs, n):
    """Costs -> n groups of indices with similar cost sums. Each index, highest cost first, joins the cheapest group."""
    groups, heap = [[] for _ in range(n)], [(0, k) for k in range(n)]                    # heap: (cost sum, group)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, k = heap[0]
        groups[k].append(i)
        heapq.heapreplace(heap, (load + costs[i], k))
    return groups


def best_fit(indices, lengths, room):
    """Pack samples into few streams of at most `room` tokens. The longest sample comes first; each sample goes into the
    fullest stream that has room for it. A sample longer than `room` gets its own stream."""
    streams = []                                                  # each stream: [free tokens, indices of its samples]
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        fit = min((s for s in streams if s[0] >= lengths[i]), key=lambda s: s[0], default=None)
        if fit is None:
            streams.append(fit := [room, []])
        fit[0] -= lengths[i]
        fit[1].append(i)
    return [sorted(s[1]) for s in streams]


# ---- which samples make up a step -----------------------------------------------------------------------------------

class Encoded(NamedTuple):
    """A sample of a step, before its images are read."""
    name: str
    ids: list
    labels: list
    images: list      # names of its images
    cut: int          # number of tokens that were cut off at its end
    weight: float     # of each of its supervised tokens in the loss
    change: Change    # how its images are augmented


class StepData(NamedTuple):
    """The work of one rank in one optimizer step."""
    micro: list       # micro-batches (Batch)
    names: list       # names of the usable samples of this rank
    dropped: list     # (name, reason) of each unusable sample of this rank
    truncated: int    # number of samples that lost tokens at their end
    animated: int     # number of images with several frames; only the first frame is used
    drawn: dict = {}  # path of a file: number of its samples in the step, of all ranks
    flipped: int = 0  # number of samples of this rank with mirrored images (parts/augment.py)


class Steps(torch.utils.data.Dataset):
    """steps[s] -> StepData of this rank for step s. The samples of a step depend only on (seed, s): `order` names a
    function of formats/rows/order.py. They are divided between the ranks by an estimate of their cost, and a rank reads
    only its own. So ranks may have different numbers of micro-batches (run.validate.level adds empty ones).
    spec: "a.json:0.7,b.json:0.3" mixes files by share; "a.json,b.json" takes every sample once per epoch. An epoch has
    as many samples as all files together. A second number, as in "a.json:0.7:0.2", multiplies the loss of the file's
    tokens. loss="sample": each sample counts 1 in the loss, its supervised tokens share this weight (PaliGemma)."""
    pack, open = staticmethod(pack), staticmethod(open_mixture)          # a subclass may read or pack in another way

    def __init__(self, spec, images, encode, image_spec, batch_size, max_tokens, seed, rank=0, world=1, span_ends=None,
                 loss="token", min_rating=0, order="shuffle", augment=""):
        if max_tokens < encode.max_len:
            stop(f"max_tokens={max_tokens} is less than max_len={encode.max_len}: one sample must fit into a stream")
        image_folder(images)
        self.files, self.counts, self.weights = self.open(spec, min_rating)             # counts: samples per epoch
        self.order, self.total = ORDERS[order](self.files, self.counts, batch_size, seed, spec)
        self.rates = [token_rates(r, encode, images) if world > 1 else (0, 0) for r in self.files]          # for cost()
        self.images, self.encode, self.image_spec, self.span_ends = images, encode, image_spec, span_ends
        self.batch_size, self.max_tokens, self.seed, self.rank, self.world = batch_size, max_tokens, seed, rank, world
        self.loss, self.augment = loss, augment_kinds(augment)

    def samples(self, step):
        """-> [(index of the file, index of the sample in it)] for one step"""
        return self.order(step)

    def name(self, file, i):
        return f"{Path(self.files[file].file).name}[{i}]"

    def cost(self, file, i):
        """Estimate the tokens of LLM and ViT from the size of a row. All ranks estimate all samples of a step alike."""
        (size, images), (per_byte, per_image) = self.files[file].guess(i), self.rates[file]
        text, image = size * per_byte >> 10, images * per_image >> 10      # rates are 1,024 x tokens
        return min(self.encode.max_len, text + image) + min(self.encode.max_len, image)

    def encode_rows(self, step, drawn):
        """drawn: [(place in the step, index of the file, index of the row)] -> list of Encoded, [(name, reason)]"""
        samples, dropped = [], []
        for n, f, i in drawn:
            name = self.name(f, i)
            try:
                row = self.files[f][i]
                name += f" id={row.get('id')!r:.80}"
                ids, labels, images, cut = self.encode(row, self.images)
                count = sum(y != IGNORE for y in labels[1:]) if self.loss == "sample" else 1
                change = draw_change(self.augment, row, self.seed, step, n)
                samples.append(Encoded(name, ids, labels, images, cut, self.weights[f] / count, change))
            except BadSample as e:
                dropped.append((name, str(e)))
        return samples, dropped

    def __getitem__(self, step):
        """Encode the samples of this rank, pack them by their lengths, then read the images of one stream at a time."""
        drawn = self.samples(step)                             # of all ranks
        own = sorted(share_out([self.cost(*at) for at in drawn], self.world)[self.rank])
        encoded, dropped = self.encode_rows(step, [(n, *drawn[n]) for n in own])
        micro, names, animated, flipped = [], [], 0, 0
        for stream in best_fit(range(len(encoded)), [len(e.ids) for e in encoded], self.max_tokens):
            samples, weights = [], []
            for e in (encoded[j] for j in stream):
                try:
                    read = [self.pixels(image, e.change) for image in e.images]
                    pixels = torch.cat([p for p, _ in read]) if read else []                           # (i, 3, S, S)
                    samples.append((e.ids, e.labels, pixels))
                    weights.append(e.weight)
                    names.append(e.name)
                    animated += sum(moving for _, moving in read)
                    flipped += e.change.flip and bool(e.images)
                except BadSample as error:
                    dropped.append((e.name, str(error)))
            micro.append(self.pack(samples, self.image_spec.side, self.span_ends, self.encode.reader, weights))
        drawn = dict(Counter(str(self.files[f].file) for f, _ in drawn))
        return StepData(micro, names, dropped, sum(e.cut > 0 for e in encoded), animated, drawn, flipped)

    def pixels(self, file, change=Change()):
        """-> pixels (n, 3, S, S) uint8, is the image animated? n is 1, or the number of tiles that the layout cuts the
        image into. The full-size image is freed before the next is read."""
        image = load_image(safe_path(self.images, file))
        tiles = [preprocess(tile, self.image_spec) for tile in self.encode.layout.cut(change(image))]
        return torch.stack(tiles), image.info["animated"]


if __name__ == "__main__":
    runpy.run_module("tools.check_data", run_name="__main__")
