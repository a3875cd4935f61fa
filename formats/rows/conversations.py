"""What a row contains: turns, images and a system text. The forms of a row:

    LLaVA, ShareGPT        {"image": name, "conversations": [{"from": "human", "value": text}, {"from": "gpt", ...}]}
    OpenAI, TRL, swift     {"images": [name], "messages": [{"role": "user", "content": text or parts}, ...]}
    FineVision, Cauldron   {"images": [image], "texts": [{"user": text, "assistant": text}]}
    minimind-v             {"image_bytes": bytes, "conversations": the list of messages, as a text of json}
    caption                {"image": name, "caption": text}
    document               {"text": "words <image> words", "images": [name]}, or {"text": words} alone

An image is a file name, bytes, {"bytes": ..., "path": ...}, a data: URL or base64."""

import base64
import re

from chat import IMAGE
from config import BadSample
from formats.strict_json import strict_json

MAX_IMAGES = 256           # limit for one row
MAX_PATH = 4096            # bytes; a longer text in the place of an image is not a path, but base64
USER, ASSISTANT = ("human", "user"), ("gpt", "assistant")      # each: LLaVA's name of the role, OpenAI's name
UNSUPPORTED = ("video", "audio")
IMAGE_KEYS = ("image", "images", "image_bytes")                # LLaVA; messages and tables; minimind-v


def conversation(row):
    """Read a row. Raise BadSample if the row is unusable. Return three values:

        [(question, answer)]           one pair of texts for each turn; a document is [(its text, "")]
        [name]                         the images, each a file name, or the bytes of a file
        the system text, or None"""
    names = next((row[key] for key in IMAGE_KEYS if row.get(key) not in (None, "", [])), [])
    names = [read_image(x) for x in (names if isinstance(names, list) else [names]) if x not in (None, "")]
    messages = row_messages(row, len(names))
    is_document = messages is None and "text" in row and "question_id" not in row        # a question is for eval.py
    if not is_document and (not isinstance(messages, list) or not messages):
        raise BadSample("no conversations")
    # a file that was made from a table has "system" in every row: there, "" means that a row has no system text
    system, turns = row.get("system") or None, []
    if not isinstance(system, str | None):
        raise BadSample("the system text is not a string", f"{system!r:.80}")
    if is_document:
        if not isinstance(row["text"], str) or not row["text"].strip() or system:
            raise BadSample("a document is one text, without a system text")
        messages, turns = [], [(row["text"], "")]
    for i, message in enumerate(messages):
        message = message if isinstance(message, dict) else {}
        role, content = (message.get(a, message.get(b)) for a, b in (("from", "role"), ("value", "content")))
        text, inside = read_content(content, i)
        if message.get("loss") is False or message.get("weight") == 0:
            raise BadSample("an answer without loss is not supported", f"turn {i}")
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


def row_messages(row, images):
    """-> the messages of a row, or None. images: number of its images. Where a form has no markers, the images stand
    before the first question."""
    messages = next((row[key] for key in ("conversations", "messages", "texts") if row.get(key) is not None), None)
    if isinstance(messages, str):                              # minimind-v: a text of json
        try:
            messages = strict_json(messages, "conversations")
        except ValueError as e:
            raise BadSample("not JSON", str(e)) from None
    if isinstance(messages, dict) and messages:                # datasets' Sequence: {"from": [...], "value": [...]}
        lists = messages.values()
        if not all(isinstance(x, list) and len(x) == len(next(iter(lists))) for x in lists):
            raise BadSample("conversations is an object, but not of lists of the same length", f"{messages!r:.80}")
        messages = [dict(zip(messages, message)) for message in zip(*lists)]
    if messages is None and row.get("caption") is not None:
        if isinstance(row["caption"], str):
            messages = [{"user": "", "assistant": row["caption"]}]
        elif "text" not in row:
            raise BadSample("a caption is not one text; several captions need a row each", f"{row['caption']!r:.80}")
    is_table = isinstance(messages, list) and all(isinstance(m, dict) and "assistant" in m for m in messages)
    if is_table:                                               # FineVision, Cauldron: their markers say nothing
        pairs = [(m.get("user"), m["assistant"]) for m in messages]
        messages = [{"role": role, "content": text.replace(IMAGE, "").strip() if isinstance(text, str) else text}
                    for pair in pairs for role, text in zip(("user", "assistant"), pair)]
    if messages and images and (is_table or row.get("image_first") is True) and isinstance(messages[0], dict):
        k = int(messages[0].get("role", messages[0].get("from")) == "system" and len(messages) > 1)
        key = "value" if "value" in messages[k] else "content"
        if isinstance(text := messages[k].get(key), str):
            messages = [*messages[:k], {**messages[k], key: f"{IMAGE}\n" * images + text}, *messages[k + 1 :]]
    return messages


def at_an_edge(turns, marker):
    """Count the questions that begin or end with `marker`. LLaVA writes markers only there. In the middle of a
    question, the same characters are ordinary text."""
    return sum(user.strip().startswith(marker) or user.strip().endswith(marker) for user, _ in turns)


def read_image(value):
    """Read one image of a row -> a file name or bytes. `value` is a file name, bytes, {"bytes": ..., "path": ...} as in
    tables, a data: URL, or base64 (a text longer than any path). No image is downloaded."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "url", "path") if value.get(key)), value)
    if not isinstance(value, str):
        return value
    if re.match("(?i)https?:", value):
        raise BadSample("image is a URL, and training downloads nothing", f"{value!r:.80}")
    if value.startswith("data:") or len(value) > MAX_PATH:
        text = value.partition("base64,")[2] if value.startswith("data:") else value
        try:
            return base64.b64decode(text, validate=True)
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
