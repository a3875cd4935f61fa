"""The images of a question: where a record has them, and where they stand in its text."""

import base64
import binascii
import re

from chat import IMAGE
from config import BadSample
from formats.questions.parquet import Stored
from formats.questions.tables import NEEDS, literal

PICTURE = ("image", "image_path", "img_path", "imgname", "file_name", "image_local_name", "image_id",
           "imageId", "data_id")


def question_image(record):
    """-> None, a name, bytes, Stored or a tuple of these. MMMU has image_1 ... image_7."""
    numbered = [record[k] for k in (f"image_{n}" for n in range(1, 10)) if record.get(k) is not None]
    key = next((k for k in PICTURE if record.get(k) not in (None, "")), None)
    found = numbered or (record[key] if key else None)
    if key in ("image_id", "imageId", "data_id") and not numbered:
        found = str(found) + ".jpg" * (key != "data_id")         # GQA, TextVQA; SEED-Bench's names have no suffix
    if "base64" in record:
        found = embedded(record["base64"])
    if isinstance(found, str) and found.startswith("["):         # VLMEvalKit's image_path
        found = literal(found)
    if not isinstance(found, list | tuple):
        return one_image(found)
    found = tuple(map(one_image, found))
    return found if len(found) > 1 else found[0] if found else None


def one_image(value):
    """A name, bytes, a data: URL, or the struct {bytes, path} of the hub's parquet files -> a name, bytes or Stored"""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value               # a struct without both is refused
    if isinstance(value, str) and value.startswith("data:"):
        return embedded(value.partition(",")[2])
    if value is not None and not isinstance(value, str | bytes | Stored):
        raise BadSample(NEEDS)
    return value


def embedded(cell):
    """An image cell of a tsv: base64, or the text of a list of base64 -> bytes, or a tuple of bytes"""
    if cell.startswith("["):
        return tuple(map(embedded, literal(cell)))
    try:
        return base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError):
        raise BadSample("image is not base64", f"{cell[:40]!r}") from None


def place_images(text, image):
    """Put <image> markers where a text says <image 1>, <image 2> ... (MMMU) -> dict of text and image; the images are
    in the order of their markers. A second mention stays text. Images that are not mentioned come first."""
    sources = image if isinstance(image, tuple) else (image,)
    mentioned = []
    for n in map(int, re.findall(r"<image (\d)>", text)):
        if n not in mentioned and 1 <= n <= len(sources) and image is not None:
            mentioned.append(n)
            text = text.replace(f"<image {n}>", IMAGE, 1)
    if not mentioned:
        return {"text": text, "image": image}
    rest = [n for n in range(1, len(sources) + 1) if n not in mentioned]
    chosen = tuple(sources[n - 1] for n in rest + mentioned)
    return {"text": f"{IMAGE}\n" * len(rest) + text, "image": chosen if len(chosen) > 1 else chosen[0]}
