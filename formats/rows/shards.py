"""Open data files by their contents: json, jsonl, parquet, tar, and patterns of several files, which are one."""

import functools
import glob
import os

import numpy as np

from config import stop
from formats.rows.lines import Rows
from formats.rows.parquet import Parquet
from formats.rows.tar import Tar

OPEN = 64                  # files of a pattern that are open at a time: a process may open about 1,000
ARROW = ("an arrow file", "datasets.load_from_disk(DIR).to_parquet('rows.parquet')")
OTHERS = {  # how a file of another kind begins -> what it is, how to convert it
    b"\x1f\x8b": ("compressed", "gunzip FILE"), b"BZh": ("compressed", "bunzip2 FILE"),
    b"\xfd7zXZ": ("compressed", "unxz FILE"), b"\x28\xb5\x2f\xfd": ("compressed", "zstd -d FILE"),
    b"\x04\x22\x4d\x18": ("compressed", "lz4 -d FILE"),
    b"ARROW1": ARROW, b"\xff\xff\xff\xff": ARROW,              # arrow's two forms; save_to_disk writes the second
    b"PK\x03\x04": ("a zip file", "unzip FILE")}


def open_rows(name, min_rating=0):
    """-> the rows of a file, or of all files that a pattern such as "shards/*.parquet" names, in the order of their
    names. min_rating: of FineVision's tables; other files are used whole"""
    if glob.has_magic(str(name)) and not os.path.exists(name):
        files = sorted(f for f in glob.glob(str(name)) if not f.endswith(".index.npy"))
        return Shards(str(name), files, min_rating) if files else stop(f"no file is named like {name}")
    return open_file(name, min_rating)


def open_file(file, min_rating=0):
    if not os.path.isfile(file):
        return Rows(file)                                      # stops with one line
    with open(file, "rb") as f:
        begin = f.read(512)
    for magic, (kind, how) in OTHERS.items():
        if begin.startswith(magic):
            stop(f"{file} is {kind}: convert it first, as in {how}")
    if begin.startswith(b"PAR1"):
        return Parquet(file, min_rating)
    return Tar(file) if begin[257:262] == b"ustar" else Rows(file)


class Shards:
    """Several files as one. They are opened once to count their rows, and again when a row is read."""

    def __init__(self, name, files, min_rating=0):
        self.file, self.files, self.min_rating = name, files, min_rating
        self.bytes = sum(map(os.path.getsize, files))
        self.shard = functools.lru_cache(OPEN)(lambda k: open_file(self.files[k], self.min_rating))
        self.ends = np.cumsum([len(self.shard(k)) for k in range(len(files))])           # (files,) rows up to its end

    def __reduce__(self):
        return Shards, (self.file, self.files, self.min_rating)

    def __len__(self):
        return int(self.ends[-1])

    def place(self, i):
        """-> the file of row i, its number in this file"""
        k = int(np.searchsorted(self.ends, i, "right"))
        return self.shard(k), int(i) - (int(self.ends[k - 1]) if k else 0)

    def __getitem__(self, i):
        rows, j = self.place(i)
        return rows[j]

    def guess(self, i):
        rows, j = self.place(i)
        return rows.guess(j)

    def has_images(self):
        return np.concatenate([self.shard(k).has_images() for k in range(len(self.files))])

    def digest(self, h, total=0):
        for k in range(len(self.files)):
            self.shard(k).digest(h, self.bytes)
