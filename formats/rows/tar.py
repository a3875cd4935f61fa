"""Tar shards in the convention of WebDataset: the members of a sample are adjacent, and their names are alike up to the
first dot of the last part. KEY.json or KEY.txt is the text, KEY.jpg, KEY.img0.jpg ... are the images. The json is

    a list of messages, or a row in one of the forms of conversations.py      (KEY.txt: a caption)
    {"texts": [message ...], "name": [member ...]}                            (LLaVA-OneVision-1.5)
    {"prompts": [...], "captions": [...], "images": [...]}                    packed: a row for each prompt (the same)

In the last form, one prompt, its captions and its images may be lists: several turns, several images."""

import itertools
import operator
import os
import struct
import zlib
from array import array

import numpy as np

from config import BadSample, stop
from formats.rows.index import Mapped, index
from formats.rows.lines import HAS_IMAGE, MAX_BYTES
from formats.strict_json import strict_json

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".avi", ".mkv", ".webm", ".mov")
MAX_SAMPLE = 2**30         # bytes of all members of a sample
HEADER = struct.Struct("100s 24x 12s 12x 8s s 100x 6s 82x 155s 12x")       # name, size, checksum, kind, magic, prefix
FILE, EMPTY = (b"0", b"7", b"\0"), (b"1", b"2", b"3", b"4", b"5", b"6")     # EMPTY: links, devices, folders


def key_of(name):
    """-> the part of a member's name that its sample shares; "" for a hidden file"""
    name = name.removeprefix("./")
    last = name.rfind("/") + 1
    dot = name.find(".", last)
    key = name[:dot] if dot >= 0 else name
    return key if len(key) > last and key[0] != "." else ""


def members(blob):
    """Read the headers of a tar file, in the formats ustar, GNU and pax -> (name, begin of its headers, begin and end
    of its data) of each file in it. tarfile does the same and takes longer."""
    at, begin, name, size = 0, 0, None, None                   # name, size: from an extended header, for the next one
    total = len(blob)
    while at < total:
        try:
            short, length, check, kind, magic, prefix = HEADER.unpack_from(blob, at)
            if not short[0] and blob[at : at + 512] == bytes(512):                       # the end
                return
            length = number(length)
            found = sum_of(blob[at : at + 256]) + sum_of(blob[at + 256 : at + 512])       # with spaces as checksum
            true = number(check) == found - sum_of(check) + 8 * ord(" ")
        except (ValueError, struct.error):
            true = False
        if not true:
            raise ValueError(f"no header at byte {at:,}")
        data = at + 512
        if kind in EMPTY:
            length = 0
        elif kind in FILE and size is not None:
            length = size
        at = data + -(-length // 512) * 512
        if length < 0 or data + length > total:
            raise ValueError(f"cut off at byte {total:,}" if length > 0 else f"a size below 0 at byte {data - 512:,}")
        if kind == b"L":
            name = text_of(blob[data : data + length])
        elif kind == b"x":
            records = pax_records(blob[data : data + length])
            name, size = records.get(b"path", name), records.get(b"size", size)
            name, size = name if isinstance(name, str | None) else text_of(name), size and int(size)
        elif kind not in (b"g", b"K"):
            if kind not in FILE and kind not in EMPTY:
                raise ValueError(f"a member of kind {kind!r} at byte {data - 512:,}")
            if name is None:
                name = text_of(short)
                if prefix[0] and magic == b"ustar\0":
                    name = f"{text_of(prefix)}/{name}"
            if kind in FILE and not name.endswith("/"):        # very old tar files have folders of this kind
                yield name, begin, data, data + length
            begin, name, size = at, None, None


def sum_of(block):
    """-> sum of at most 256 bytes. adler32 has it, plus 1 and modulo 65,521, and is 20 times faster than sum()."""
    return (zlib.adler32(block) & 0xFFFF) - 1


def number(field):
    """A number of a header: octal digits, or binary if the first bit is set"""
    return int.from_bytes(field[1:], "big") if field[0] & 128 else int(field.strip(b" \0") or b"0", 8)


def text_of(field):
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def pax_records(data):
    """-> {key: value} of records "LENGTH KEY=VALUE\\n" """
    out = {}
    while data:
        length = int(data.partition(b" ")[0])
        if not 5 <= length <= len(data):
            raise ValueError("a pax header is damaged")
        key, _, value = data[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        out[key], data = value, data[length:]
    return out


def sample_spans(blob):
    """Find the samples of a tar file -> (rows, 4): begin and end of their members in bytes, number of images, bytes of
    text. A sample with several prompts has as many rows."""
    out = array("q")
    named = ((key, member) for member in members(blob) if (key := key_of(member[0])))
    for _, group in itertools.groupby(named, operator.itemgetter(0)):
        begin, images, text, rows = None, 0, None, []          # text: its begin, its end, is it json?
        for _, (name, first, data, end) in group:
            begin = first if begin is None else begin
            if name.endswith(".json"):
                text = text if text and text[2] else (data, end, True)                  # the first one is read
            elif name.lower().endswith(IMAGES):
                images += 1
            elif name.endswith(".txt"):
                text = text or (data, end, False)
        last, (data, end, is_json) = -(-end // 512) * 512, text or (0, 0, False)
        if is_json and end - data <= MAX_BYTES:
            if not images:
                images = int(blob.find(b'"image', data, end) >= 0 and HAS_IMAGE.search(blob, data, end) is not None)
            if blob.find(b'"prompts"', data, end) >= 0:
                rows = packed_rows(blob[data:end])
        for counts in rows or [(images, end - data)]:
            out.extend((begin, last, *counts))
    return np.array(out, np.int64).reshape(-1, 4)


def packed_rows(text):
    """The json of a sample -> (number of images, bytes of text) of the row of each prompt; [] if it is not packed"""
    try:
        row = strict_json(text.decode("utf-8-sig"), "")
        fields = [[x if isinstance(x, list) else [x] for x in row[key]] for key in ("prompts", "captions", "images")]
        padded = (field + [[]] * len(fields[0]) for field in fields)         # lists that differ cost as many samples
        return [(sum(x not in (None, "") for x in images), len(str(asked + said).encode("utf-8", "replace")))
                for _, asked, said, images in zip(fields[0], *padded)]
    except (ValueError, TypeError, KeyError):
        return []


class Tar(Mapped):
    """The rows of a tar file. A row is read when it is asked for."""

    def __init__(self, file):
        super().__init__(file)
        try:
            self.spans = index(file, lambda: sample_spans(self.blob), 4)
        except ValueError as e:
            stop(f"{file} cannot be read as a tar file: {e}")
        if not len(self.spans):
            stop(f"{file} holds no samples: a sample is KEY.json or KEY.txt, and its images KEY.jpg ...")

    def guess(self, i):
        return int(self.spans[i, 3]), int(self.spans[i, 2])

    def has_images(self):
        return self.spans[:, 2] > 0

    def __getitem__(self, i):
        begin, end = self.span(i, MAX_SAMPLE)
        part, files = self.blob[begin:end], {}
        try:
            for name, _, data, stop_at in members(part):
                if key_of(name):
                    key, files[name] = key_of(name), part[data:stop_at]
        except ValueError as e:
            raise BadSample("a tar member cannot be read", str(e)) from None
        if not files:
            raise BadSample("a tar member cannot be read", "the file has changed since it was indexed")
        return read_sample(key, files, i - int(np.searchsorted(self.spans[:, 0], begin)))


def read_sample(key, files, part=0):
    """The members of a sample -> a row. files: {name of a member: its bytes}; part: which of several prompts"""
    ends = {name[len(key) + 1 :]: blob for name, blob in files.items()}                 # KEY.img0.jpg -> img0.jpg
    if any(name.lower().endswith(VIDEOS) for name in files):
        raise BadSample("video is not supported")
    images = [blob for name, blob in files.items() if name.lower().endswith(IMAGES)]
    names = {os.path.basename(name): blob for name, blob in files.items()} | files | ends
    text = next((blob for name, blob in ends.items() if name.endswith("json")), None)
    if text is None and "txt" not in ends:
        raise BadSample("no json and no txt in a sample of a tar file", f"{key!r:.80} has {', '.join(ends)}")
    if text is None:
        return {"id": key, "images": images, "caption": ends["txt"].decode("utf-8", "replace")}
    if len(text) > MAX_BYTES:
        raise BadSample("a row is too large", f"{len(text):,} bytes, the limit is {MAX_BYTES:,}")
    try:
        row = strict_json(text.decode("utf-8-sig"), key)
    except ValueError as e:
        raise BadSample("not JSON", str(e)) from None
    row = {"messages": row} if isinstance(row, list) else row
    if not isinstance(row, dict):
        raise BadSample("not an object", f"{row!r:.80}")
    row = {"id": key, **row}
    packed = "prompts" in row and "captions" in row
    if packed:
        row = one_prompt(row, part)
    inside = within_messages(row, names)                       # do the messages themselves name their images?
    listed = row.pop("images", None) or row.pop("image", None) or row.pop("name", None) or []
    listed = listed if isinstance(listed, list) else [listed]
    known = [names[x] for x in listed if isinstance(x, str) and x in names]
    row.pop("image", None)
    whole = len(known) == len(listed) and (listed or packed)   # a packed sample has the images of other prompts, too
    row["images"] = [] if inside else known if whole else listed if packed else images or listed
    row["image_first"] = b"<image>" not in text                # no marker: the images stand before the first question
    return row


def one_prompt(row, part):
    """-> the row of one prompt of a packed sample"""
    fields = [row.get(field) for field in ("prompts", "captions", "images")]
    if not all(isinstance(f, list) and len(f) == len(fields[0]) for f in fields):
        raise BadSample("prompts, captions and images are not lists of the same length")
    if part >= len(fields[0]):                                 # empty lists, or the file has changed
        raise BadSample("a packed sample without this prompt", f"{len(fields[0])} prompts")
    asked, said, images = (x if isinstance(x, list) else [x] for x in (f[part] for f in fields))
    if len(asked) != len(said):
        raise BadSample("prompts, captions and images are not lists of the same length")
    return {"id": f"{row['id']}[{part}]", "images": images,
            "texts": [{"user": q, "assistant": a} for q, a in zip(asked, said)]}


def within_messages(row, names):
    """Put the bytes of a member in the place of its name in the parts of messages -> was there one?"""
    found, messages = False, next((row[k] for k in ("messages", "conversations", "texts") if k in row), ())
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            for field in ("image", "path"):
                if isinstance(part, dict) and isinstance(part.get(field), str) and part[field] in names:
                    part[field], found = names[part[field]], True
    return found
