"""Data files, json or jsonl: where their rows are, and what a row contains.

A row is LLaVA's {"image": name, "conversations": [{"from": "human", "value": text}, {"from": "gpt", ...}]}, or the
same in OpenAI's form, {"images": [name], "messages": [{"role": "user", "content": text or parts}, ...]}. Or it is a
document: {"text": "words <image> words", "images": [name]}, or {"text": words} alone.
"""

import base64
import json
import mmap
import os
import re

import numpy as np

from chat import IMAGE
from config import BadSample, stop
from formats.strict_json import STRICT, strict_json

SPACE = r"[ \t\n\r]*"
# in a json list: FIRST matches the text before the first row, NEXT matches the text after a row
FIRST, NEXT = re.compile(rf"[^[]*\[{SPACE}(\]?){SPACE}"), re.compile(rf"{SPACE}([,\]]?){SPACE}")
MAX_BYTES = 8_000_000      # limit for one row; chat.encode limits the characters of a text
MAX_IMAGES = 256           # limit for one row
MAX_PATH = 4096            # bytes; a longer text in the place of an image is no path, but base64
USER, ASSISTANT = ("human", "user"), ("gpt", "assistant")      # each: LLaVA's name of the role, OpenAI's name
UNSUPPORTED = ("video", "audio")


# ---- where the rows are ---------------------------------------------------------------------------------------------

def elements(blob):
    """Find the values in the bytes of a json list -> [(begin, end)], the byte positions of each value. A value is
    parsed to find its end, and freed at once. So memory holds the text of the file, but never all parsed values."""
    text, spans, i, at = str(blob, "utf-8"), [], 0, 0          # i, at: one position, in characters and in bytes
    between = FIRST.match(text)
    while between[1] != "]":
        a = between.end()
        try:
            b = STRICT.raw_decode(text, a)[1]
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as e:              # these errors do not say which sample
            raise ValueError(f"sample {len(spans)}: {e}") from None
        begin = at + len(text[i:a].encode())
        at, i = begin + len(text[a:b].encode()), b
        spans.append((begin, at))
        between = NEXT.match(text, b)
        if not between[1]:
            raise json.JSONDecodeError("Expecting ',' or ']'", text, between.end())
    if between.end() < len(text):
        raise json.JSONDecodeError("Extra data", text, between.end())
    return spans


class Rows:
    """The rows of one data file. A row is parsed when it is read. Rows stores the positions of the rows and a memory
    map of the file. All processes of a machine share the memory of this map."""

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
        # in jsonl, each line is a whole object; a first line "{" begins an object of several lines, which is refused
        elif first[:1] != b"{" or first == b"{":
            stop(f"{file}: neither a json list of samples nor jsonl, with one sample per line (pandas converts tables: "
                 "read_parquet(FILE).to_json('rows.jsonl', orient='records', lines=True))")
        else:
            spans = [m.span() for m in re.finditer(rb"[^\n]+", self.blob) if m[0].strip()]
        self.spans = np.array(spans, np.int64)                                            # (rows, 2): begin, end
        if not len(self.spans):
            stop(f"{file} holds no samples")

    def __reduce__(self):                                      # a memory map cannot be pickled: a worker opens its own
        return Rows, (self.file,)

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        a, b = self.spans[i]
        if self.blob.size() < b:                               # to read beyond the file's end would kill the process
            raise BadSample("the file has become shorter since it was opened")
        if b - a > MAX_BYTES:
            raise BadSample("a row is too large", f"{b - a:,} bytes, the limit is {MAX_BYTES:,}")
        try:
            row = strict_json(self.blob[a:b].decode("utf-8-sig"), f"{self.file}, sample {i}")
        except ValueError as e:
            raise BadSample("not JSON", str(e)) from None
        if not isinstance(row, dict):
            raise BadSample("not an object", f"{row!r:.80}")
        return row


# ---- what a row says ------------------------------------------------------------------------------------------------

def conversation(row):
    """Read a row. Raise BadSample if the row is unusable. Return three values:

        [(question, answer)]           one pair of texts for each turn; a document is [(its text, "")]
        [name]                         the images, each a file name, or the bytes of a file
        the system text, or None"""
    messages = row.get("conversations", row.get("messages"))
    is_document = messages is None and "text" in row and "question_id" not in row        # a question is for eval.py
    if not is_document and (not isinstance(messages, list) or not messages):
        raise BadSample("no conversations")
    # a file that was made from a table has "system" in every row: there, "" means that a row has no system text
    system, turns = row.get("system") or None, []
    if not isinstance(system, str | None):
        raise BadSample("the system text is not a string", f"{system!r:.80}")
    names = row.get("image", row.get("images"))
    names = [read_image(x) for x in (names if isinstance(names, list) else [names]) if x not in (None, "")]
    if is_document:
        if not isinstance(row["text"], str) or not row["text"].strip() or system:
            raise BadSample("a document is one text, without a system text")
        messages, turns = [], [(row["text"], "")]
    for i, message in enumerate(messages):
        message = message if isinstance(message, dict) else {}
        role, content = (message.get(a, message.get(b)) for a, b in (("from", "role"), ("value", "content")))
        text, inside = read_content(content, i)
        names = names + inside
        if role == "system" and i == 0:
            if system not in (None, text):
                raise BadSample("two system texts")
            system = text
        elif role in USER:
            if turns and turns[-1][1] is None:
                raise BadSample("two questions in a row", f"turn {i}")
            turns.append((text, None))
        elif role in ASSISTANT:
            if not turns or turns[-1][1] is not None:
                raise BadSample("an answer without a question", f"turn {i}")
            if not text.strip():
                raise BadSample("an empty answer", f"turn {i}")
            if not isinstance(content, str) and IMAGE in text:
                raise BadSample("an answer holds an image", f"turn {i}")
            turns[-1] = (turns[-1][0], text)
        else:
            raise BadSample("unknown speaker", f"turn {i}, {role!r:.80}")
    if not turns or turns[-1][1] is None:
        raise BadSample("the last question has no answer")
    if not all(isinstance(name, str | bytes) for name in names):
        raise BadSample("image is neither a name nor a list of names", f"{names!r:.80}")
    if len(names) > MAX_IMAGES:
        raise BadSample("too many images", f"{len(names):,}, the limit is {MAX_IMAGES}")
    for kind in UNSUPPORTED:
        if row.get(kind) or row.get(kind + "s") or at_an_edge(turns, f"<{kind}>"):
            raise BadSample(f"{kind} is not supported")
    if not names and (markers := at_an_edge(turns, IMAGE)):
        raise BadSample(f"not as many {IMAGE} markers as images", f"0 image(s) but {markers} marker(s)")
    return turns, names, system


def at_an_edge(turns, marker):
    """Count the questions that begin or end with `marker`. LLaVA writes markers only there. In the middle of a
    question, the same characters are ordinary text."""
    return sum(user.strip().startswith(marker) or user.strip().endswith(marker) for user, _ in turns)


def read_image(value):
    """Read one image of a row -> a file name or bytes. `value` is a file name, {"bytes": ..., "path": ...} as tables have
    it, a data: URL, base64 (a text longer than any path) or bytes. No image is downloaded."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "url", "path") if value.get(key)), value)
    if not isinstance(value, str):
        return value
    if re.match("https?:", value, re.I):
        raise BadSample("image is a URL, and training downloads nothing", f"{value!r:.80}")
    if value.startswith("data:") or len(value) > MAX_PATH:
        try:
            return base64.b64decode(value.partition("base64,")[2] if value.startswith("data:") else value, validate=True)
        except ValueError:
            raise BadSample("image is not base64", f"{value!r:.80}") from None
    return value


def read_content(content, turn):
    """Read the content of a message -> text with one marker per image, images. `content` is a string, or
    OpenAI's list of parts. turn: number of the message, for errors"""
    if isinstance(content, str):
        return content, []
    text, names = "", []
    for part in content if isinstance(content, list) and content else [None]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url"):                   # the image is in this part or in the row
            text += IMAGE + "\n"
            names += [read_image(part[key]) for key in ("image", "image_url", "path", "url", "data") if part.get(key)]
        elif kind in UNSUPPORTED:
            raise BadSample(f"{kind} is not supported", f"turn {turn}")
        else:
            raise BadSample("a turn has no text", f"turn {turn}")
    return text, names
