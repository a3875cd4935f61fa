"""Questions in parquet (needs the package pyarrow). A file is read one row group at a time. The texts stay in memory,
the bytes of images do not: a question keeps the place of an image in the file, and the image is read again when it is
shown. So memory holds two row groups (formats/rows/parquet.py), not all images of a benchmark."""

import dataclasses
import glob
import hashlib
import os

from config import BadSample, stop
from formats.questions.tables import without_missing
from formats.rows.parquet import group, opened, parquet


@dataclasses.dataclass(frozen=True)
class Stored:
    """An image in a parquet file. Two images are equal if their bytes are equal."""
    digest: str                                                  # sha256 of the bytes
    place: tuple = dataclasses.field(compare=False)              # file, row group, row in it, column, keys below it

    def read(self):
        """-> the bytes"""
        file, g, r, *keys = self.place
        try:
            value, = group(file, os.getpid(), g).slice(r, 1).to_pylist()
            for key in keys:
                value = value[key]
        except Exception as e:                                   # pyarrow raises many exception types on a broken file
            raise BadSample("an image cannot be read from its table", f"{file}: {type(e).__name__}") from None
        if not isinstance(value, bytes) or hashlib.sha256(value).hexdigest() != self.digest:
            raise BadSample("an image cannot be read from its table", f"{file} has changed since it was opened")
        return value


def image_bytes(image):
    """-> the bytes of a Stored image; a name or bytes as they are"""
    return image.read() if isinstance(image, Stored) else image


def keep_places(value, place):
    """Put Stored in the place of all bytes in the value of a cell"""
    if isinstance(value, bytes) and value:
        return Stored(hashlib.sha256(value).hexdigest(), place)
    if isinstance(value, dict):
        return {k: keep_places(v, (*place, k)) for k, v in value.items()}
    return [keep_places(v, (*place, k)) for k, v in enumerate(value)] if isinstance(value, list) else value


def parquet_records(name):
    """Read the rows of a parquet file, or of all files of a pattern such as "test-*.parquet" -> list of dicts"""
    files = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
    parquet()                                                    # stops without pyarrow
    records = []
    for file in files:
        try:
            for g in range(opened(file, os.getpid()).num_row_groups):
                table = group(file, os.getpid(), g)
                for r in range(len(table)):
                    row, = table.slice(r, 1).to_pylist()
                    records.append(keep_places(without_missing(row), (file, g, r)))
        except Exception as e:                                   # as above
            stop(f"{file} cannot be read as parquet: {type(e).__name__}: {e}".splitlines()[0])
    return records or stop(f"{name} holds no questions" if files else f"no file is named like {name}")


def joined_records(questions, images):
    """GQA as lmms-lab publishes it: a table of questions and one of images. The imageId of a question is the id of its
    image. Questions that are not balanced are left out."""
    known, records = {}, []
    for i, row in enumerate(parquet_records(images)):
        if "id" not in row or "image" not in row or row["id"] in known:
            stop(f"{images}, row {i} (counted from 0): it needs `image`, and an `id` that no other row has")
        known[row["id"]] = row["image"]
    for i, row in enumerate(parquet_records(questions)):
        if row.get("imageId") not in known:
            stop(f"{questions}, row {i} (counted from 0): {images} has no image with the id {row.get('imageId')!r}")
        records.append(row | {"image": known[row["imageId"]]})
    return [row for row in records if row.get("isBalanced", True)]
