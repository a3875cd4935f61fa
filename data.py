"""LLaVA json or jsonl plus a folder of images -> packed batches, in an order that is a function of (seed, step) alone.

    python data.py FILE --images=DIR --model=DIR [--template=NAME --max_len=N --show=N]     # check a file; show samples, mask coloured

    N tokens of the stream   I images   S side in pixels   Q tokens per image
"""

import dataclasses
import json
import mmap
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

import chat
from chat import IGNORE, BadSample
from config import load, stop, strict_json

MAX_PIXELS = 64_000_000                                # a header may promise more than memory holds: refuse before decoding
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO"]  # an allow-list keeps Pillow from starting Ghostscript for EPS


# ---- pictures -----------------------------------------------------------------------------------------------------------------

class ImageSpec(NamedTuple):
    """How a picture becomes S x S: pad = to a square of the mean colour, then resize (LLaVA-1.5); crop = resize the shorter side,
    cut out the centre (CLIP); squash = resize both sides (SigLIP)."""
    side: int
    aspect: str = "pad"
    resample: int = Image.BICUBIC
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)


def safe_path(root, name):
    """A file below root, whatever the name says and wherever links lead."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadSample(f"image name {name!r} is not a path")
    root = os.path.realpath(root)
    path = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        raise BadSample(f"image {name} lies outside {root}")
    if not os.path.isfile(path):
        raise BadSample(f"image {name} is missing" if not os.path.exists(path) else f"image {name} is not a file")
    return path


def load_image(path):
    """-> PIL image, RGB, upright. Transparency shows white; 16 bits are scaled, not cut; of an animation, the first frame."""
    name = os.path.basename(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSample(f"image {name} has {image.width} x {image.height} pixels, over the limit of {MAX_PIXELS:,}")
            image.load()
            if image.mode.startswith("I"):                      # I;16 and I: convert("RGB") would saturate at 255
                image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
            elif image.mode == "F":
                a = np.asarray(image)
                if not np.isfinite(a).all() or a.min() < 0:
                    raise BadSample(f"image {name} holds floats outside 0..1 and 0..255")
                image = Image.fromarray((a * (255 if a.max() <= 1 else 1)).clip(0, 255).round().astype(np.uint8))
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
            return image.convert("RGB")
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample(f"image {name} is over the pixel limit") from None
    except Exception as e:                                       # Pillow raises almost anything on a broken file
        raise BadSample(f"image {name} cannot be read ({type(e).__name__})") from None


def preprocess(image, spec):
    """PIL RGB -> (3, S, S) uint8; equal to the pixels of transformers' Pillow processors before they normalise."""
    w, h, S = *image.size, spec.side
    if spec.aspect == "pad" and w != h:
        canvas = Image.new("RGB", (max(w, h),) * 2, tuple(int(255 * m) for m in spec.mean))
        canvas.paste(image, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
        image, w, h = canvas, max(w, h), max(w, h)
    if spec.aspect == "squash":
        size = (S, S)
    else:
        size = (S, int(S * h / w)) if w <= h else (int(S * w / h), S)
    image = image.resize(size, spec.resample)
    left, top = (size[0] - S) // 2, (size[1] - S) // 2
    image = image.crop((left, top, left + S, top + S))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# ---- rows ---------------------------------------------------------------------------------------------------------------------

class Rows:
    """The samples of one file, kept as text and parsed when asked for: memory is that of the file, shared between workers."""

    def __init__(self, file):
        self.file = str(file)
        if not os.path.isfile(file):
            stop(f"no data file {file}")
        if os.path.getsize(file) == 0:
            stop(f"{file} is empty")
        with open(file, "rb") as f:
            self.blob = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        head = self.blob[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if head == b"[":
            try:
                rows = strict_json(self.blob[:].decode("utf-8-sig"), file)
            except (ValueError, UnicodeDecodeError) as e:
                stop(f"{e} (is it jsonl, with one object per line, or cut off?)")
            lines = [json.dumps(r, ensure_ascii=True).encode() for r in rows]
            self.blob = b"\n".join(lines)
            ends = np.cumsum([len(l) + 1 for l in lines], dtype=np.int64)
            self.spans = np.stack([ends - [len(l) + 1 for l in lines], ends - 1], 1) if lines else np.zeros((0, 2), np.int64)
        elif head == b"{":
            spans, at = [], 0
            while at < len(self.blob):
                end = self.blob.find(b"\n", at)
                end = len(self.blob) if end < 0 else end
                if self.blob[at:end].strip():
                    spans.append((at, end))
                at = end + 1
            self.spans = np.array(spans, np.int64)
        else:
            stop(f"{file}: neither a json list nor jsonl")
        if not len(self.spans):
            stop(f"{file} holds no samples")

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        a, b = self.spans[i]
        try:
            row = strict_json(self.blob[a:b].decode("utf-8-sig"), f"{self.file}, sample {i}")
        except ValueError as e:
            raise BadSample(str(e)) from None
        if not isinstance(row, dict):
            raise BadSample("not an object")
        return row


USER, ASSISTANT = ("human", "user"), ("gpt", "assistant")


def conversation(row):
    """A LLaVA row -> (turns [(user, assistant)], image names, system text or None)."""
    said = row.get("conversations", row.get("messages"))
    if not isinstance(said, list) or not said:
        raise BadSample("no conversations")
    system, turns = None, []
    for i, m in enumerate(said):
        who, text = (m.get("from", m.get("role")), m.get("value", m.get("content"))) if isinstance(m, dict) else (None, None)
        if not isinstance(text, str):
            raise BadSample(f"turn {i} has no text")
        if who == "system" and i == 0:
            system = text
        elif who in USER:
            if turns and turns[-1][1] is None:
                raise BadSample(f"turn {i}: two questions in a row")
            turns.append((text, None))
        elif who in ASSISTANT:
            if not turns or turns[-1][1] is not None:
                raise BadSample(f"turn {i}: an answer without a question")
            if not text.strip():
                raise BadSample(f"turn {i}: empty answer")
            turns[-1] = (turns[-1][0], text)
        else:
            raise BadSample(f"turn {i}: unknown speaker {who!r}")
    if not turns or turns[-1][1] is None:
        raise BadSample("the last question has no answer")
    names = row.get("image", [])
    names = [names] if isinstance(names, str) else names or []
    if not isinstance(names, list):
        raise BadSample("image is neither a name nor a list of names")
    return turns, names, system


# ---- batches ------------------------------------------------------------------------------------------------------------------

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
    """[(ids, labels, images (i, 3, side, side) uint8)] -> one Batch. Labels are shifted here, each conversation on its own, so that
    no token is asked to predict the beginning of a stranger."""
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
    """Indices of `costs` in n groups of nearly equal sum: the dearest first, each to the group that has least so far."""
    groups, load = [[] for _ in range(n)], [0] * n
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        k = min(range(n), key=lambda k: (load[k], k))
        groups[k].append(i)
        load[k] += costs[i]
    return groups


def fill(indices, lengths, room):
    """Best fit, longest first: `indices` into as few streams of at most `room` tokens as it finds; a longer one gets its own."""
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
        self.tok, self.template, self.image_id, self.image_tokens, self.max_len, self.system = tok, template, image_id, image_tokens, max_len, system

    def __call__(self, row):
        """-> ids, labels, names of the images kept, tokens cut off"""
        turns, names, system = conversation(row)
        ids, labels = chat.encode(self.tok, self.template, turns, len(names), self.image_id, self.image_tokens, self.system if system is None else system)
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


class Steps(torch.utils.data.Dataset):
    """steps[s] -> StepData of this rank. Which samples make up step s depends on (seed, s) alone; the ranks divide them by cost.

    spec: "a.json:0.7,b.json:0.3" mixes files by weight; "a.json" or "a.json,b.json" takes each as often as it stands there. An
    epoch is as many samples as the files hold together; each file is shuffled anew whenever it has been used up."""

    def __init__(self, spec, images, encode, image_spec, batch_size, max_tokens, seed, rank=0, world=1):
        files = [part.rsplit(":", 1) if ":" in part else (part, None) for part in spec.split(",")]
        self.files = [Rows(f) for f, _ in files]
        self.total = sum(len(r) for r in self.files)
        try:
            weights = [len(r) if w is None else float(w) for (_, w), r in zip(files, self.files)]
        except ValueError:
            stop(f"data={spec}: after the colon stands a weight, as in a.json:0.7,b.json:0.3")
        if max_tokens < encode.max_len:
            stop(f"max_tokens={max_tokens} is less than max_len={encode.max_len}: one sample must fit into a stream")
        edges = np.cumsum(weights) / sum(weights) * self.total
        self.counts = np.diff(np.concatenate([[0], edges.round()])).astype(int)  # draws from each file per epoch
        self.images, self.encode, self.image_spec = images, encode, image_spec
        self.batch_size, self.max_tokens, self.seed, self.rank, self.world = batch_size, max_tokens, seed, rank, world
        self._epoch = (None, None)

    def epoch(self, e):
        """(total, 2): file and sample of every draw of epoch e."""
        if self._epoch[0] != e:
            draws = []
            for f, (rows, count) in enumerate(zip(self.files, self.counts)):
                first, last = e * count, (e + 1) * count         # this file's own, endless order, cut into epochs
                order = [np.random.default_rng([self.seed, f, lap]).permutation(len(rows)) for lap in range(first // len(rows), (last - 1) // len(rows) + 1)] if count else []
                picked = np.concatenate(order)[first % len(rows):][:count] if count else np.zeros(0, int)
                draws.append(np.stack([np.full(count, f), picked], 1))
            draws = np.concatenate(draws)
            self._epoch = (e, draws[np.random.default_rng([self.seed, len(self.files), e, 1]).permutation(len(draws))])
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
            try:
                row = self.files[f][i]
                ids, labels, names, cut = self.encode(row)
                made.append((f"{self.name(f, i)} id={row.get('id')}", ids, labels, names))
                truncated += cut > 0 and n % self.world == self.rank
            except BadSample as e:                                # every rank sees this one; one of them reports it
                if n % self.world == self.rank:
                    dropped.append((self.name(f, i), str(e)))
        lengths = [len(ids) for _, ids, _, _ in made]
        costs = [n + self.encode.image_tokens * len(m[3]) for n, m in zip(lengths, made)]  # a picture is paid for in the ViT too
        bins = [fill(group, lengths, self.max_tokens) for group in share_out(costs, self.world)]
        mine, micro, names = bins[self.rank], [], []
        for b in range(max(map(len, bins))):
            examples = []
            for j in mine[b] if b < len(mine) else []:
                name, ids, labels, files = made[j]
                try:
                    pixels = [preprocess(load_image(safe_path(self.images, f)), self.image_spec) for f in files]
                    examples.append((ids, labels, torch.stack(pixels) if pixels else []))
                    names.append(name)
                except BadSample as e:
                    dropped.append((name, str(e)))
            micro.append(pack(examples, self.image_spec.side))
        return StepData(micro, names, dropped, truncated)


def loader(steps, order, workers):
    """StepData for the steps in `order`. A worker prepares whole steps, so that nothing depends on how many workers there are."""
    return torch.utils.data.DataLoader(steps, batch_size=None, sampler=order, num_workers=workers, prefetch_factor=2 if workers else None)


# ---- python data.py -----------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Check:
    images: str = "."              # folder of the images
    model: str = ""                # folder with a tokenizer.json: a run, a LLaVA folder, a language model
    template: str = "vicuna_v1"    # plain, vicuna_v1, llava_llama_2, llama_3, chatml, mistral
    max_len: int = 2048            # tokens
    image_tokens: int = 576        # tokens of one image, where the model does not say
    show: int = 3                  # samples to print


def main(argv):
    files = [a for a in argv if not a.startswith("--")]
    s = load(Check, [a for a in argv if a.startswith("--")], __doc__)
    if len(files) != 1 or not s.model:
        stop("usage: python data.py FILE --images=DIR --model=DIR [--template=NAME]")
    folder = Path(s.model)
    folder = folder / "model" if (folder / "model" / "tokenizer.json").is_file() else folder
    tok = chat.Tokenizer(folder)
    cfg = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    image_id = cfg.get("image_token_index", tok.specials.get(chat.IMAGE, len(tok)))
    encode = Encoder(tok, s.template, image_id, cfg.get("image_seq_length", s.image_tokens), s.max_len)
    rows, reasons, shown, tokens, learnt, images, cut = Rows(files[0]), {}, 0, [], 0, 0, 0
    for i in range(len(rows)):
        try:
            row = rows[i]
            ids, labels, names, lost = encode(row)
            for name in names:
                load_image(safe_path(s.images, name))
        except BadSample as e:
            reasons.setdefault(str(e).split(" is missing")[0] if "missing" not in str(e) else "image is missing", []).append(f"[{i}] {e}")
            continue
        tokens.append(len(ids))
        learnt += sum(l != IGNORE for l in labels)
        images += len(names)
        cut += lost > 0
        if shown < s.show:
            shown += 1
            print(f"--- sample {i}, id {row.get('id')}: {len(ids)} tokens, {len(names)} image(s)")
            chat.show(tok, ids, labels, image_id)
    good, bad = len(tokens), len(rows) - len(tokens)
    print(f"--- {files[0]}: {len(rows)} samples, {good} good, {bad} dropped, {cut} truncated to {s.max_len} tokens")
    if good:
        print(f"    {sum(tokens):,} tokens ({learnt / sum(tokens):.1%} learnt), longest {max(tokens)}, mean {sum(tokens) / good:.0f}, {images} images")
    for reason, where in sorted(reasons.items(), key=lambda r: -len(r[1])):
        print(f"    {len(where)} x {reason}; first: {where[0]}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
