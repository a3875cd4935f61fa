"""The index of a data file: where each row begins and ends, and of tar, how many images and how much text it has. And
the digest of a file.

An index is made once. The index of a large file is kept beside it, as FILE.index.npy, or in ~/.cache/pumice if that
folder cannot be written to. It is valid while size and time of change of the file are the same. It is read by memory
map: a file of 10^7 rows has an index of 160 MB (tar: 320 MB), which all processes of a machine share."""

import contextlib
import hashlib
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from config import BadSample

VERSION = 1
KEPT = 2**26               # bytes; the index of a smaller file is made in less than a second, and is not kept
EXACT = 2**26              # bytes; a digest reads a smaller file whole
BLOCKS, BLOCK = 1024, 2**16    # of a larger file, it reads this many blocks of this many bytes


def index(file, build, columns=2):
    """-> (rows, columns) int64: the bytes begin <= i < end of each row, ... build: function that makes it"""
    about = os.stat(file)
    if about.st_size < KEPT:
        return build()
    head = np.zeros((2, columns), np.int64)
    head[0, 0], head[1, :2] = VERSION, (about.st_size, about.st_mtime_ns)
    for place in places(file):
        with contextlib.suppress(OSError, ValueError, EOFError):
            kept = np.load(place, mmap_mode="r", allow_pickle=False)
            if (kept.dtype, kept.ndim, kept.shape[1:]) == (np.int64, 2, (columns,)) and (kept[:2] == head).all():
                return kept[2:]
    spans = build()
    for place in places(file):
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".index", delete=False) as f:
                try:
                    np.save(f, np.concatenate([head, spans]))
                    f.flush()
                    os.chmod(f.name, about.st_mode & 0o666)    # who may read the data may read its index
                    os.replace(f.name, place)                  # whole or absent, also if several processes write it
                except OSError:                                # a full disk: leave nothing beside the data
                    os.unlink(f.name)
                    raise
            return np.load(place, mmap_mode="r", allow_pickle=False)[2:]
    return spans


def places(file):
    """-> the files in which the index of `file` may be kept, the best first"""
    file = Path(os.path.realpath(file))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pumice")
    return [file.with_name(file.name + ".index.npy"),
            cache / f"{hashlib.sha256(os.fsencode(file)).hexdigest()[:32]}.index.npy"]


def digest(h, file, layout, total=0):
    """Update the hash h with a file. layout: what is known about its rows (bytes or an array); total: size of all
    files that belong to this one (0: the file's own).

    If `total` is at most EXACT, all bytes count, and the digest misses no change. Else it reads the size, `layout`, and
    BLOCKS blocks, spread evenly over the files, each file's begin and end among them. Then it misses a change that
    keeps the size of each row (json, tar) or of the footer (parquet) and lies between these blocks. Times of change do
    not count: a copy of the data is the same data."""
    size = os.path.getsize(file)
    with open(file, "rb") as f:
        if max(size, total) <= EXACT:
            while block := f.read(2**20):
                h.update(block)
            return
        h.update(layout)
        blocks = max(2, BLOCKS * size // max(size, total))
        for at in np.linspace(0, max(0, size - BLOCK), blocks, dtype=np.int64).tolist():
            f.seek(at)
            h.update(f.read(BLOCK))


class Mapped:
    """A data file that is read through a memory map. All processes of a machine share the memory of this map. A
    subclass sets `spans` (rows, 2 or more): the bytes begin <= i < end of each row."""

    def __init__(self, file):
        self.file = str(file)
        with open(file, "rb") as f:
            self.blob = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

    def __reduce__(self):                                      # a memory map cannot be pickled: a worker opens its own
        return type(self), (self.file,)

    @property
    def bytes(self):
        return len(self.blob)

    def __len__(self):
        return len(self.spans)

    def digest(self, h, total=0):
        digest(h, self.file, np.ascontiguousarray(self.spans[:, :2]), total)

    def span(self, i, most):
        """-> begin, end of row i. Raise BadSample if it has more than `most` bytes, or if the file was cut."""
        begin, end = (int(x) for x in self.spans[i, :2])
        if self.blob.size() < end:                             # to read beyond the file's end would kill the process
            raise BadSample("the file has become shorter since it was opened")
        if end - begin > most:
            raise BadSample("a row is too large", f"{end - begin:,} bytes, the limit is {most:,}")
        return begin, end
