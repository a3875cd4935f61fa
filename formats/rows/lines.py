"""Files of json: a list of objects, or jsonl with one object per line."""

import json
import os
import re
from array import array

import numpy as np

from config import BadSample, stop
from formats.rows.index import Mapped, index
from formats.strict_json import STRICT, strict_json

SPACE = r"[ \t\n\r]*"
# in a json list: FIRST matches the text before the first row, NEXT matches the text after a row
FIRST, NEXT = re.compile(rf"[^[]*\[{SPACE}(\]?){SPACE}"), re.compile(rf"{SPACE}([,\]]?){SPACE}")
PART = re.compile(rb'"type" ?: ?"image')   # a part of a message that is an image
# in a row of json: a part that is an image, or a key of images whose value is not empty
HAS_IMAGE = re.compile(PART.pattern + rb'|"image(?:s|_bytes)?"\s*:(?!\s*(?:null|""|\[\s*(?:null|"")?\s*\]))')
# keys of the forms of a row; a list whose first object has such a key: the samples, where the file is one object
KEYS = {"conversations", "messages", "texts", "caption", "chosen", "completion", "question", "text"}
INSIDE = re.compile(rb'"(\w+)"\s*:\s*\[\s*\{(?:[^{}\[\]]|\[[^{}\[\]]*\]|\{[^{}\[\]]*\})*?"(?:%s)"\s*:'
                    % "|".join(sorted(KEYS)).encode())
MAX_BYTES = 8_000_000      # limit for one row; chat.encode limits the characters of a text


def elements(blob):
    """Find the values in the bytes of a json list -> (values, 2): begin and end of each value in bytes. A value is
    parsed to find its end, and freed at once. So memory holds the text of the file, but never all parsed values."""
    text, spans, i, at = str(blob, "utf-8"), array("q"), 0, 0  # i, at: one position, in characters and in bytes
    between = FIRST.match(text)
    while between[1] != "]":
        a = between.end()
        try:
            b = STRICT.raw_decode(text, a)[1]
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as e:              # these errors do not say which sample
            raise ValueError(f"sample {len(spans) // 2}: {e}") from None
        begin = at + len(text[i:a].encode())
        at, i = begin + len(text[a:b].encode()), b
        spans.extend((begin, at))
        between = NEXT.match(text, b)
        if not between[1]:
            raise json.JSONDecodeError("Expecting ',' or ']'", text, between.end())
    if between.end() < len(text):
        raise json.JSONDecodeError("Extra data", text, between.end())
    return np.array(spans, np.int64).reshape(-1, 2)


def line_spans(blob, chunk=2**24):
    """Find the lines of jsonl that are not blank -> (lines, 2): begin and end of each line in bytes"""
    view, out, begin = np.frombuffer(blob, np.uint8), [], 0    # begin: of the first line that is not complete
    for at in range(0, len(view), chunk):
        ends = np.flatnonzero(view[at : at + chunk] == ord("\n")) + at
        if at + chunk >= len(view):
            ends = np.append(ends, len(view))
        spans = np.stack([np.concatenate([[begin], ends + 1])[: len(ends)], ends], 1)
        begin = int(ends[-1]) + 1 if len(ends) else begin
        spans = spans[spans[:, 1] > spans[:, 0]]
        blank = [i for i in np.flatnonzero(view[spans[:, 0]] <= ord(" ")) if not blob[slice(*spans[i])].strip()]
        out.append(np.delete(spans, blank, 0))
    return np.concatenate(out)


def list_inside(blob, spans):
    """-> the key of the list of samples, if the file is one object that has such a list, on one line or several"""
    if not (len(spans) == 1 or goes_on(blob, spans)):
        return None
    found = INSIDE.search(blob, 0, 2**16)
    try:                                                       # a row may have a list of objects, too: words and boxes
        row = strict_json(blob[spans[0][0] : min(spans[-1][1], MAX_BYTES)].decode("utf-8-sig"), "") if found else {}
    except ValueError:                                         # broken, or larger than a row may be
        row = {}
    return found[1].decode() if found and not KEYS & row.keys() else None


def goes_on(blob, spans):
    """Does the object of the first line end in another line?"""
    return len(spans) > 1 and blob[slice(*spans[0])].rstrip().endswith((b"{", b"[", b",", b":"))


class Rows(Mapped):
    """The rows of one data file, json or jsonl. A row is parsed when it is read."""

    def __init__(self, file):
        if not os.path.isfile(file):
            stop(f"{file} is a folder, no data file" if os.path.isdir(file) else f"no data file {file or '(no name)'}")
        if os.path.getsize(file) == 0:
            stop(f"{file} is empty")
        super().__init__(file)
        first = re.match(rb"(?:\xef\xbb\xbf)?\s*([^\r\n]{0,9})", self.blob)[1].strip()
        if first[:1] == b"[":
            try:
                self.spans = index(file, lambda: elements(self.blob))
            except ValueError as e:
                stop(f"{file} cannot be read (is it jsonl, with one object per line, or cut off?): {e}")
        else:
            self.spans = index(file, lambda: line_spans(self.blob)) if first[:1] == b"{" else ()
            if key := list_inside(self.blob, self.spans):
                stop(f"{file} is one object, and its samples are the list {key!r}: write the list alone, as in "
                     f"json.dump(json.load(open({str(file)!r}))[{key!r}], open('rows.json', 'w'))")
            if first[:1] != b"{" or goes_on(self.blob, self.spans):
                stop(f"{file}: neither a json list of samples nor jsonl, with one sample per line (pandas converts "
                     "tables: read_csv(FILE).to_json('rows.jsonl', orient='records', lines=True))")
        if not len(self.spans):
            stop(f"{file} holds no samples")

    def guess(self, i):
        a, b = self.spans[i]
        text = self.blob[a : min(b, a + MAX_BYTES)] if b <= self.blob.size() else b""
        images = max(text.count(b"<image>"), len(PART.findall(text)))
        return len(text), images or b'"image' in text

    def has_images(self):
        """-> (rows,) bool"""
        found = np.array([m.start() for m in HAS_IMAGE.finditer(self.blob)], np.int64)
        out = np.zeros(len(self), bool)
        out[np.searchsorted(self.spans[:, 0], found, "right") - 1] = True
        return out

    def __getitem__(self, i):
        a, b = self.span(i, MAX_BYTES)
        try:
            row = strict_json(self.blob[a:b].decode("utf-8-sig"), f"{self.file}, sample {i}")
        except ValueError as e:
            raise BadSample("not JSON", str(e)) from None
        if not isinstance(row, dict):
            raise BadSample("not an object", f"{row!r:.80}")
        return row
