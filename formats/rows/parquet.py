"""Tables in parquet (needs the package pyarrow). A row group is the smallest part that can be read: rows[i] reads the
group of row i, and keeps the last groups. In shuffled order nearly every sample reads its group, so small groups are
fast: 100 rows, as the hub's own files of images have, cost about as much as decoding an image."""

import functools
import json
import os

import numpy as np

from config import BadSample, stop
from formats.rows.index import digest
from formats.rows.lines import HAS_IMAGE

FORMS = ("conversations", "messages", "texts", "text", "caption", "chosen")          # a column that a known form has
RATINGS = ("relevance_min", "visual_dependency_min", "image_correspondence_min", "formatting_min")    # FineVision
BINARY = ("image", "images", "image_bytes")


def parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        stop("reading parquet needs the package pyarrow (pip install pyarrow)")
    return pyarrow.parquet


@functools.lru_cache(8)
def opened(file, process):
    """process: its id; a loader process opens files of its own"""
    return parquet().ParquetFile(file, memory_map=True)


@functools.lru_cache(2)
def group(file, process, g):
    """-> row group g as a pyarrow table"""
    return opened(file, process).read_row_group(g, use_threads=False)


def has_value(x):
    """x: null, a name, bytes, {"bytes": ..., "path": ...}, or a list of these"""
    return any(map(has_value, x.values() if isinstance(x, dict) else x)) if isinstance(x, dict | list) else bool(x)


class Parquet:
    """The rows of a parquet file. min_rating: use only the rows whose four ratings are all at least this (FineVision);
    0 uses all rows. A file without ratings is used whole."""

    def __init__(self, file, min_rating=0):
        self.file, self.min_rating = str(file), min_rating
        pq = parquet()
        try:
            meta = pq.read_metadata(file)
        except Exception as e:                                 # pyarrow raises many exception types on a broken file
            stop(f"{file} cannot be read as parquet: {type(e).__name__}: {e}".splitlines()[0])
        columns = meta.schema.to_arrow_schema().names
        if not {*FORMS} & {*columns}:
            stop(f"{file} has columns {', '.join(columns)}, but none of {', '.join(FORMS)}: rename them first, as in "
                 "pandas.read_parquet(FILE).rename(columns={'old': 'caption'}).to_parquet('new.parquet')")
        groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
        self.ends = np.cumsum([g.num_rows for g in groups])                              # (groups,) rows up to its end
        of_text = [column for g in groups[:1] for column in map(g.column, range(g.num_columns))
                   if column.path_in_schema.split(".")[0] not in BINARY]
        self.mean = sum(c.total_uncompressed_size for c in of_text) // max(1, groups[0].num_rows) if groups else 0
        self.images = int(bool({*BINARY} & {*columns}))
        self.kept, self.rated = None, {*RATINGS} <= {*columns}
        if min_rating and self.rated:
            table = pq.read_table(file, columns=[*RATINGS], use_threads=False)
            low = np.stack([table[c].to_numpy() for c in RATINGS]).min(0)                # (rows,); NaN: one is missing
            self.kept = np.flatnonzero(low >= min_rating)
        if not len(self):
            stop(f"{file} holds no samples" + (f" with ratings of {min_rating} or more" if min_rating else ""))

    def __reduce__(self):
        return Parquet, (self.file, self.min_rating)

    @property
    def bytes(self):
        return os.path.getsize(self.file)

    def __len__(self):
        return len(self.kept) if self.kept is not None else int(self.ends[-1]) if len(self.ends) else 0

    def guess(self, i):
        return self.mean, self.images                          # the means of the first group

    def has_images(self):
        """-> (rows,) bool. A row group is read if its statistics do not say that every row has an image"""
        table, out = opened(self.file, os.getpid()), []
        paths = [table.metadata.schema.column(k).path for k in range(table.metadata.num_columns)]
        images = [k for k, path in enumerate(paths) if path.split(".")[0] in BINARY]
        parts = [path.split(".")[0] for path in paths if path.endswith(".type")]         # of messages
        for g in range(table.num_row_groups):
            about = table.metadata.row_group(g)
            known = (about.column(k).statistics for k in images)
            known = [s for s in known if s and s.has_null_count and s.has_min_max]
            if not images + parts or any(s.null_count == 0 and s.min not in ("", b"") for s in known):
                out.append(np.full(about.num_rows, bool(images)))
            else:
                names = {*parts, *(paths[k].split(".")[0] for k in images)}
                rows = table.read_row_group(g, columns=sorted(names), use_threads=False).to_pylist()
                out.append(np.array([any(has_value(row[c]) for c in names & {*BINARY}) or HAS_IMAGE.search(
                    json.dumps([row[c] for c in parts], default=str).encode()) is not None for row in rows]))
        whole = np.concatenate(out)
        return whole if self.kept is None else whole[self.kept]

    def digest(self, h, total=0):
        with open(self.file, "rb") as f:                       # the footer: places, sizes and ranges of all columns
            f.seek(-8, os.SEEK_END)
            footer = 8 + int.from_bytes(f.read(4), "little")
            f.seek(-min(footer, self.bytes), os.SEEK_END)
            digest(h, self.file, f.read(), total)

    def __getitem__(self, i):
        i = int(i if self.kept is None else self.kept[i])
        g = int(np.searchsorted(self.ends, i, "right"))
        try:
            table = group(self.file, os.getpid(), g)
            row, = table.slice(i - (int(self.ends[g - 1]) if g else 0), 1).to_pylist()
        except Exception as e:
            raise BadSample("a row group cannot be read", f"{g} of {self.file}: {type(e).__name__}") from None
        return {key: value for key, value in row.items() if value is not None}
