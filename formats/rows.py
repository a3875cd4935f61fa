"""The samples of one data file, json or jsonl, parsed when asked for."""

import json
import mmap
import os
import re

import numpy as np

from config import BadSample, stop
from formats.strict_json import STRICT, strict_json

SPACE = re.compile(r"[ \t\n\r]*")


def elements(blob):
    """Where the values of a json list stand in its bytes -> [(begin, end)]. Each is parsed once and let go: beside the
    map of the file there is its text for a moment, and never all of its values."""
    text = str(blob, "utf-8")
    i, spans = text.index("[") + 1, []
    at = len(text[:i].encode())                                # i in characters, at in bytes: read so far
    a = SPACE.match(text, i).end()
    more = text[a : a + 1] != "]"
    while more:
        try:
            b = STRICT.raw_decode(text, a)[1]
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as e:              # these say what is wrong and not where
            raise ValueError(f"sample {len(spans)}: {e}") from None
        begin = at + len(text[i:a].encode())
        at, i = begin + len(text[a:b].encode()), b
        spans.append((begin, at))
        a = SPACE.match(text, b).end()
        more = text[a : a + 1] == ","
        if more:
            a = SPACE.match(text, a + 1).end()
        elif text[a : a + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, a)
    if SPACE.match(text, a + 1).end() < len(text):
        raise json.JSONDecodeError("Extra data", text, a + 1)
    return spans


class Rows:
    """The samples of one file, parsed when asked for: what is kept is where they stand in a memory map of it, which all
    processes of a machine share."""

    def __init__(self, file):
        self.file = str(file)
        if not os.path.isfile(file):
            stop(f"{file} is a folder, no data file" if os.path.isdir(file) else f"no data file {file or '(no name)'}")
        if os.path.getsize(file) == 0:
            stop(f"{file} is empty")
        with open(file, "rb") as f:
            self.blob = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        first = re.match(rb"(?:\xef\xbb\xbf)?\s*([^\r\n]{0,9})", self.blob)[1].strip()
        if first[:1] == b"[":
            try:
                spans = elements(self.blob)
            except ValueError as e:
                stop(f"{file} cannot be read (is it jsonl, with one object per line, or cut off?): {e}")
        elif first[:1] != b"{" or first == b"{":               # a { alone opens one object over several lines
            stop(f"{file}: neither a json list of samples nor jsonl, with one sample per line")
        else:
            spans = [m.span() for m in re.finditer(rb"[^\n]+", self.blob) if m[0].strip()]
        self.spans = np.array(spans, np.int64)
        if not len(self.spans):
            stop(f"{file} holds no samples")

    def __reduce__(self):                                      # a memory map does not travel to a worker: open it there
        return Rows, (self.file,)

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        a, b = self.spans[i]
        if self.blob.size() < b:                               # to read on would end the process without a word
            raise BadSample("the file has become shorter since it was opened")
        try:
            row = strict_json(self.blob[a:b].decode("utf-8-sig"), f"{self.file}, sample {i}")
        except ValueError as e:
            raise BadSample("not JSON", str(e)) from None
        if not isinstance(row, dict):
            raise BadSample("not an object", f"{row!r:.80}")
        return row
