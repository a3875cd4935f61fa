"""Filter a data file: what goes, and why. Kept rows, removed rows and a page of examples are written.

    python -m tools.curate filter FILE --images=DIR --out=kept.jsonl --pair=runs/pairs --min_similarity=0.2
    python -m tools.curate filter FILE --images=DIR --out=kept.jsonl --max_distance=16       # near-duplicate images
    python -m tools.curate filter FILE --images=DIR --out=kept.jsonl --same_text             # duplicate texts
    python -m tools.curate filter FILE --images=DIR --out=kept.jsonl --max_distance=16 --same_text --both
    python -m tools.curate filter "shards/*.parquet" --out=kept.jsonl --min_rating=4 --out_images=kept_images

Each row is tested in this order, and the first reason counts:

    it is unusable (formats/rows); with --pair or --max_distance its images are read, too
    one of FineVision's four ratings is below --min_rating
    the cosine of image and caption is below --min_similarity. The caption is the first answer, as train_pairs.py reads
      it. A row without an image, with several, or with a document is not measured and stays
    it is a duplicate of an earlier row that stays: images near (tools/image_hash.py), texts equal, or with --both, both

So the first of two duplicates in the order of the file stays, unless it goes for another reason. Texts are equal if
all questions and answers are, after Unicode's NFKC, in small letters, each white space as one space, without <image>.

The files appear when all rows are done, or not at all. FILE is read once; memory holds hashes of rows, not the rows.
"""

import dataclasses
import json
import random
import sys
import time
import unicodedata
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

import config
from chat import IMAGE
from config import BadSample, setting, stop
from formats.image_files import image_folder, load_image, safe_path
from formats.preferences import preference
from formats.rows import conversation
from formats.rows.parquet import RATINGS
from formats.whole import whole_file, write_file
from images import preprocess
from parts.pairs import similarities
from run.arguments import parse
from tools.check_data import form_of
from tools.curate_page import filter_page, keep_some
from tools.curate_rows import check_length, check_written, open_input, row_line
from tools.image_hash import BITS, HashIndex, image_hash
from tools.retrieval import Towers

BINS = 80                  # bars of the similarities, from -1 to 1


@dataclasses.dataclass
class Settings:
    out: str = setting("", "file to write, jsonl: the rows that stay")
    removed: str = setting("", "file to write, jsonl: the others, with reason and value; empty: OUT_removed.jsonl")
    html: str = setting("", "page to write; empty: OUT_removed.html")
    images: str = setting(".", "folder that image names are relative to")
    out_images: str = setting("", "folder for images that rows hold as bytes; empty: they become data: URLs")
    min_rating: int = setting(0, "all four ratings of FineVision must be this high; 0: do not test", 0)
    pair: str = setting("", "a run of train_pairs.py, or a folder of CLIP or SigLIP; empty: do not test")
    min_similarity: float = setting(-1.0, "least cosine of image and caption", -1, 1)
    max_distance: int = setting(-1, "bits of 192 in which near-duplicates may differ; -1: do not test", -1, BITS - 1)
    same_text: bool = setting(False, "rows with the texts of an earlier row go")
    both: bool = setting(False, "a duplicate must have both the near image and the same text")
    batch_size: int = setting(64, "rows at once", 1)
    device: str = setting("cpu", "of the two towers")


class Look:
    """A row and what is known about it. reason, value: why it goes; twin: the earlier row that it duplicates"""

    def __init__(self, i, rows, s, spec):
        """spec: images.ImageSpec of the tower, None without one"""
        self.i, self.row, self.reason, self.value, self.twin, self.pixels = i, None, "", None, None, None
        try:
            self.row = row = rows[i]
            self.names, texts, self.caption = content(row)
            self.text = blake2b("\0".join(map(normal, texts)).encode("utf-8", "surrogatepass"), digest_size=16).digest()
            images = [load_image(safe_path(s.images, n)) for n in self.names if spec or s.max_distance >= 0]
        except BadSample as e:
            self.reason, self.value = e.reason, str(e)[len(e.reason) + 2 :]
            return
        self.hashes = [image_hash(image) for image in images] if s.max_distance >= 0 else []
        if spec and len(images) == 1 and self.caption:
            self.pixels = preprocess(images[0], spec)                                                  # (3, S, S)
        if s.min_rating and {*RATINGS} & row.keys():
            ratings = [row.get(key) for key in RATINGS]
            low = None if None in ratings else min(ratings)
            if low is None or not low >= s.min_rating:
                self.reason, self.value = f"a rating is below {s.min_rating}", low

    def record(self):
        """-> what the file of removed rows says, without the row"""
        row = self.row or {}
        return {"index": self.i, "id": row.get("id"), "reason": self.reason, "value": self.value, "twin": self.twin}


def content(row):
    """-> names of the images of a row, all its texts, its caption ("": none)"""
    if form_of(row) == "preference pairs":
        turns, chosen, rejected, names, system = preference(row)
        return names, [system or "", *(t for turn in turns for t in turn if t is not None), chosen, rejected], chosen
    turns, names, system = conversation(row)
    return names, [system or "", *(t for turn in turns for t in turn)], turns[0][1].strip()


def normal(text):
    return " ".join(unicodedata.normalize("NFKC", text.replace(IMAGE, " ")).casefold().split())


def measure(looks, towers):
    """Set the similarity of image and caption of each row that has one of each -> {row number: cosine}"""
    found = [look for look in looks if look.pixels is not None]
    if not found:
        return {}
    image = towers.encode(torch.stack([look.pixels for look in found]).to(towers.device))              # (n, E)
    text = towers.texts([look.caption for look in found])                                              # (n, E)
    return {look.i: similarities(v[None], t[None]).item() for look, v, t in zip(found, image, text)}


class Earlier:
    """The rows that stay so far: which of them does a row duplicate?"""

    def __init__(self, s):
        self.s, self.texts, self.images = s, {}, HashIndex(s.max_distance) if s.max_distance >= 0 else None

    def mark(self, look):
        """Set reason, value and twin of a duplicate; remember any other row."""
        s = self.s
        near = self.images.near(look.hashes) if look.hashes else {}
        same = self.texts.get(look.text, ()) if s.same_text else ()
        if s.both:                                             # a row without images: its text decides
            twin = next((r for r in same if r in near or not look.names), None)
            reason = "near-duplicate images and the same text"
        else:
            twin = next(iter([*same, *near]), None)
            reason = "the same text" if same else "near-duplicate images"
        if twin is not None:
            look.reason, look.value, look.twin = reason, near.get(twin), twin
            return
        if s.same_text:
            self.texts.setdefault(look.text, []).append(look.i)
        if look.hashes:
            self.images.add(look.hashes, look.i)


def filtered(rows, s, towers, counts):
    """Yield every row as a Look, in order; an empty reason means that it stays. counts (BINS,): of similarities"""
    earlier = Earlier(s)
    for a in range(0, len(rows), s.batch_size):
        looks = [Look(i, rows, s, towers and towers.spec) for i in range(a, min(len(rows), a + s.batch_size))]
        similar = measure([look for look in looks if not look.reason], towers) if towers else {}
        for look in looks:
            if look.i in similar:
                cosine = similar[look.i]
                counts[min(BINS - 1, int((cosine + 1) / 2 * BINS))] += 1
                if cosine < s.min_similarity:
                    look.reason = f"image and caption: similarity below {s.min_similarity:g}"
                    look.value = round(cosine, 4)
            if not look.reason:
                earlier.mark(look)
            yield look


def main(argv):
    s = parse(Settings, [a for a in argv if a.startswith("--")], __doc__)
    config.check_ranges(s)
    image_folder(s.images)
    rows = open_input(argv, s)
    if s.both and not (s.same_text and s.max_distance >= 0):
        stop("--both needs --same_text and --max_distance")
    if s.min_similarity > -1 and not s.pair:
        stop(f"min_similarity={s.min_similarity} needs --pair=FOLDER")
    out, stem = Path(s.out), Path(s.out).with_suffix("")
    removed, page = Path(s.removed or f"{stem}_removed.jsonl"), Path(s.html or f"{stem}_removed.html")
    check_written(rows, out=out, removed=removed, html=page)
    towers = Towers(s.pair, s.device, s.batch_size) if s.pair else None
    counts, reasons, examples, draw = np.zeros(BINS, int), Counter(), {}, random.Random(0)
    last = time.monotonic()

    def read(i):
        row = rows[i]
        try:
            return row, content(row)[0]
        except BadSample:
            return row, []

    try:
        for folder in {out.parent, removed.parent, page.parent, *([Path(s.out_images)] if s.out_images else [])}:
            folder.mkdir(parents=True, exist_ok=True)
        with whole_file(out) as kept, whole_file(removed) as gone:
            for look in filtered(rows, s, towers, counts):
                if not look.reason:
                    kept.write(check_length(row_line(look.row, s.out_images), look.i))
                else:
                    reasons[look.reason] += 1
                    gone.write(row_line(look.record() | {"row": look.row}))
                    keep_some(examples.setdefault(look.reason, []), look.record(), reasons[look.reason], draw)
                if time.monotonic() > last + 10:
                    last = time.monotonic()
                    print(f"{look.i + 1:,} of {len(rows):,} rows", file=sys.stderr)
            stay = len(rows) - reasons.total()
            facts = [(f"{stay:,}", "rows stay"), (f"{reasons.total():,}", "rows are removed")]
            facts += [(f"{counts.sum():,}", "rows with a cosine of image and caption")] if towers else []
            write_file(page, filter_page(f"{rows.file}: what goes", facts, reasons, examples, counts,
                                         read, s.images))
    except OSError as e:
        stop(f"{e.filename or out} could not be written: {e.strerror}")
    print(json.dumps({"out": str(out), "rows": len(rows), "kept": stay, "measured": int(counts.sum()),
                      "removed": dict(reasons.most_common()), "html": str(page)}))
