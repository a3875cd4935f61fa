"""A request of OpenAI's chat protocol: its bytes, with a deadline (Incoming) -> what is asked (Asked). tools/serve.py
answers it.

Every field is checked: a request with an unknown field, or with a value that would have no effect here, is refused."""

import base64
import binascii
import io
import json
import re
import time
from typing import NamedTuple

from chat import IMAGE
from formats.strict_json import strict_json

# fields of OpenAI's protocol that have one value here; null is always allowed
FIXED = {"n": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "tools": [],
         "tool_choice": "none", "parallel_tool_calls": True, "modalities": ["text"],
         "response_format": {"type": "text"}}
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
FIELDS = ("messages", "model", "max_tokens", "max_completion_tokens", "temperature", "seed", "stop", "stream",
          "stream_options", "logprobs", "top_logprobs", "look")


class Incoming(io.RawIOBase):
    """What a client sends, until the time `end`. A timeout of the socket alone would begin anew with each byte."""

    def __init__(self, connection, seconds):
        self.connection = connection
        self.allow(seconds)

    def allow(self, seconds):
        """From now on, the client may send for so long."""
        self.end = time.monotonic() + seconds

    def readable(self):
        return True

    def readinto(self, buffer):
        kept, left = self.connection.gettimeout(), self.end - time.monotonic()              # kept: of writing
        if left <= 0:                                          # also where bytes are there: they may never stop
            raise TimeoutError
        self.connection.settimeout(left)
        try:
            return self.connection.recv_into(buffer)
        except ConnectionError:                                # the client left
            return 0
        finally:
            self.connection.settimeout(kept)


class Refusal(Exception):
    """A request that is refused, with its status and the fields of OpenAI's error object"""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class Asked(NamedTuple):
    turns: list                # [(user text with <image> markers, assistant text)], the last (text, None)
    images: list               # [bytes of an image file]
    system: str | None
    max_tokens: int | None
    temperature: float
    seed: int
    stop: list                 # texts
    stream: bool
    usage: bool                # does the stream end with the numbers of tokens?
    top_logprobs: int | None   # None: no log-probabilities
    look: bool                 # our own field: add the record of tools/look.py


def wrong(param, message):
    raise Refusal(400, f"{param}: {message}", param)


def field_of(body, key, kinds, default, low=None, high=None):
    """-> body[key], checked; the default where it is missing or null"""
    x = body.get(key)
    if x is None:
        return default
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list",
             dict: "an object"}
    if type(x) not in kinds or low is not None and not low <= x <= high:
        wrong(key, f"expected {names[kinds[-1]]}" + ("" if low is None else f" from {low} to {high}"))
    return x


def read_request(text, s):
    """The body of a request -> Asked"""
    try:
        body = strict_json(text.decode("utf-8"), "the request")
    except (ValueError, RecursionError) as e:
        raise Refusal(400, f"the request is not JSON: {e}") from None
    if type(body) is not dict:
        raise Refusal(400, "the request is not a JSON object")
    for key, x in body.items():
        if key not in FIELDS and key not in FIXED and key not in WITHOUT_EFFECT:
            wrong(key, f"unknown field; known are {', '.join(FIELDS)}")
        if key in FIXED and x is not None and x != FIXED[key]:
            wrong(key, f"only {json.dumps(FIXED[key])} is supported")
    if (name := field_of(body, "model", (str,), s.model)) != s.model:
        raise Refusal(404, f"no model {name!r} here, only {s.model!r}", "model", "model_not_found")
    turns, images, system = read_messages(field_of(body, "messages", (list,), None))
    if len(images) > s.max_images:
        wrong("messages", f"{len(images)} images; the limit is {s.max_images}")
    stops = [body["stop"]] if type(body.get("stop")) is str else field_of(body, "stop", (list,), [])
    if len(stops) > 4 or not all(type(text) is str and text for text in stops):
        wrong("stop", "expected up to four strings that are not empty")
    stream, top = field_of(body, "stream", (bool,), False), field_of(body, "top_logprobs", (int,), 0, 0, 20)
    logprobs = field_of(body, "logprobs", (bool,), False)
    if top and not logprobs:
        wrong("top_logprobs", "needs logprobs: true")
    if stream and logprobs:
        wrong("logprobs", "not supported together with stream")
    options = field_of(body, "stream_options", (dict,), {})
    if set(options) - {"include_usage", "include_obfuscation"}:
        wrong("stream_options", "only include_usage is supported")
    most = field_of(body, "max_tokens", (int,), None, 1, 2**31)
    most = field_of(body, "max_completion_tokens", (int,), most, 1, 2**31)
    temperature = float(field_of(body, "temperature", (int, float), 0.0, 0, 100))
    return Asked(turns, images, system, most, temperature,
                 field_of(body, "seed", (int,), 0, -2**63, 2**63 - 1) % 2**32, stops, stream,
                 field_of(options, "include_usage", (bool,), False), top if logprobs else None,
                 field_of(body, "look", (bool,), False))


def read_messages(messages):
    """-> turns, images and system text of Asked. Questions and answers alternate; the last message is a question."""
    turns, images, system = [], [], None
    for i, message in enumerate(messages or [None]):
        where = f"messages[{i}]"
        if type(message) is not dict:
            wrong("messages", "expected a list of messages, which is not empty")
        role, (text, found) = message.get("role"), read_parts(message.get("content"), where)
        if role != "user" and found:
            wrong("messages", f"{where}: only a user's message may have images")
        if role in ("system", "developer"):
            if i > 0:
                wrong("messages", f"{where}: only the first message may be the system's")
            system = text
        elif role == "user":
            if turns and turns[-1][1] is None:
                wrong("messages", f"{where}: two questions in a row")
            turns.append((text, None))
        elif role == "assistant":
            if not turns or turns[-1][1] is not None:
                wrong("messages", f"{where}: an answer without a question")
            turns[-1] = (turns[-1][0], text)
        else:
            wrong("messages", f"{where}: role {role!r:.40} is not system, user or assistant")
        images += found
    if not turns or turns[-1][1] is not None:
        wrong("messages", "the last message must be the user's")
    return turns, images, system


def read_parts(content, where):
    """A string, or a list of parts -> text with one <image> marker per image, [bytes of an image file]"""
    if type(content) is str:
        return content, []
    text, images = "", []
    for part in content if type(content) is list and content else [None]:
        kind = part.get("type") if type(part) is dict else None
        if kind == "text" and type(part.get("text")) is str:
            text += part["text"]
        elif kind == "image_url":
            url = part.get("image_url")
            text += f"{IMAGE}\n"
            images.append(read_data_url(url.get("url") if type(url) is dict else url, where))
        else:
            wrong("messages", f"{where}: content is a string, or a list of parts of type text and image_url")
    return text, images


def read_data_url(url, where):
    """-> bytes. Other URLs are refused: the server opens no file and no connection for a request."""
    head, comma, data = url.partition(",") if type(url) is str else ("", "", "")
    if not comma or not re.fullmatch(r"data:image/[\w.+-]+;base64", head, re.I):
        wrong("messages", f"{where}: an image is given as data:image/TYPE;base64,...; other URLs are not opened")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        wrong("messages", f"{where}: the image is not base64")
