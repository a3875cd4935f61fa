"""Serve a model: OpenAI's chat protocol over HTTP, and a page to chat with. For one person or a small group.

    python tools/serve.py --model=runs/sft [--port=8000]             # then open http://127.0.0.1:8000/

    POST /v1/chat/completions   messages with text and images as data: URLs; streams with "stream": true
    GET  /v1/models  /health    the model; is the server alive?
    GET  /                      the page. It shows what tools/look.py shows, for each answer

One answer is generated at a time. Others wait in a queue of limited length; a client that leaves stops its answer. The
server opens no file and no URL that a request names. It listens on this machine only, unless --host says otherwise;
then each request under /v1/ needs a token (Authorization: Bearer TOKEN). It speaks plain HTTP: for the open internet,
put a proxy with TLS in front. docs/serving.md lists the fields of a request.
"""

import base64
import binascii
import dataclasses
import hmac
import io
import ipaddress
import json
import os
import re
import secrets
import select
import socket
import socketserver
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import chat as templates
import config
from chat import IMAGE
from config import BadSample, setting, stop
from formats.strict_json import strict_json
from generate import Chat
from images import FORMATS
from tools.attention import read_again
from tools.look import PAGE, POLICY, record, safe_json, piece_text

PATIENCE = 30              # seconds that a client may neither send nor read
CONNECTIONS = 100          # open connections; more are closed at once
NAMES = ("localhost", "127.0.0.1", "::1")
# fields of OpenAI's protocol that have one value here; null is always allowed
FIXED = {"n": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "tools": [],
         "tool_choice": "none", "parallel_tool_calls": True, "modalities": ["text"],
         "response_format": {"type": "text"}}
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
FIELDS = ("messages", "model", "max_tokens", "max_completion_tokens", "temperature", "seed", "stop", "stream",
          "stream_options", "logprobs", "top_logprobs", "look")


@dataclasses.dataclass
class Settings:
    model: str = setting("runs/sft", "a run, its model/ or adapter/, any LLaVA folder or adapter")
    host: str = setting("127.0.0.1", "address to listen on; another than this machine's own needs a token")
    port: int = setting(8000, "0 = a free one", 0, 65535)
    token: str = setting("", "that requests under /v1/ must send; empty: none on this machine, else a random one")
    queue: int = setting(8, "requests that may wait; more are refused with status 503", 0)
    max_request: float = setting(32.0, "MiB of one request", 0.001, 1024)
    max_images: int = setting(16, "images of one request", 0)
    max_new_tokens: int = setting(256, "tokens of an answer, where the request does not say", 1)
    template: str = setting("", "empty: as the model was trained")
    system: str | None = setting(None, "system text, where the request has none; none: as the model was trained")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1")
    dtype: str = setting("auto", "auto, bf16, fp32, fp64; auto: bf16 where the GPU has it, else fp32")
    kernels: str = setting("auto", "auto, torch, triton; auto: Triton on a GPU")


class Refusal(Exception):
    """A request that is refused, with its status and the fields of OpenAI's error object"""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class Gone(Exception):
    """The client has left, or the server ends."""


# ---- what a request asks for ----------------------------------------------------------------------------------------

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


def open_image(data, number):
    """Bytes of an image file -> PIL image, not decoded yet"""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as e:                                     # Pillow raises many exception types on a broken file
        raise BadSample("image cannot be read", f"number {number} ({type(e).__name__})") from None


# ---- text as it grows -----------------------------------------------------------------------------------------------

def text_so_far(chat, ids):
    """Ids of an unfinished answer -> its text, without the end that a later token may still change: the bytes of an
    unfinished character. Byte-level tokenizers decode them to U+FFFD; others have tokens of one byte, <0x0A>, and read
    adjacent ones together, even if a control token stands between them"""
    tok, n = chat.tok, len(ids)
    while n and (re.fullmatch("<0x..>", piece := tok.full.id_to_token(ids[n - 1]) or "") or piece in tok.specials):
        n -= 1
    return tok.decode(ids[:n]).strip().rstrip("\ufffd").rstrip()


def before_stop(text, stops):
    """-> the text before the first of the stop texts, was there one?"""
    at = min((i for i in map(text.find, stops) if i >= 0), default=None)
    return text[:at], at is not None


def certain(text, stops):
    """-> `text` without an end that may become a stop text"""
    for n in range(min(len(text), max(map(len, stops), default=0)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stops):
            return text[:-n]
    return text


# ---- answers --------------------------------------------------------------------------------------------------------

class Answer(NamedTuple):
    text: str
    finish: str                # stop or length
    prompt_tokens: int
    tokens: int                # of the answer, with the token that ended it
    extra: dict                # logprobs, look


def answer_request(chat, asked, s, begin, emit, left):
    """Answer one request. begin(): called once the request is found good. emit(piece): called with each new piece of
    the text. left(): has the client left? Then Gone is raised. -> Answer"""
    tiles, blocks = chat.look([open_image(data, i) for i, data in enumerate(asked.images, 1)])
    system = chat.system if asked.system is None else asked.system
    prompt = templates.encode(chat.tok, chat.template, asked.turns, blocks, system)[0]
    room = chat.cfg.text.max_position_embeddings - len(prompt)
    if room < (asked.max_tokens or 1):
        raise Refusal(400, f"{len(prompt)} tokens of the prompt and {asked.max_tokens or 1} of the answer are more "
                      f"than the {room + len(prompt)} of this model", "messages", "context_length_exceeded")
    most, prompt = asked.max_tokens or min(room, s.max_new_tokens), torch.tensor(prompt)
    begin()
    sent, steps = "", []

    def each(answers):
        nonlocal sent
        if left():
            raise Gone
        steps[:] = answers[0]
        text, found = before_stop(text_so_far(chat, without_end(chat, steps)), asked.stop)
        ready = text if found else certain(text, asked.stop)
        if ready.startswith(sent) and len(ready) > len(sent):
            emit(ready[len(sent):])
            sent = ready
        return found

    whole, = chat.answers([prompt], tiles, most, asked.temperature, asked.seed, each)
    whole, found = before_stop(whole, asked.stop)
    if len(whole) > len(sent):
        emit(whole[len(sent):])
    ids, extra = without_end(chat, steps), {}
    if asked.top_logprobs is not None:
        n = next((n for n in range(len(ids)) if len(chat.tok.decode(ids[:n]).strip()) >= len(whole)), len(ids))
        extra["logprobs"] = {"content": log_probabilities(chat, prompt, ids[:n], tiles, asked.top_logprobs)}
    if asked.look:
        extra["look"] = record(chat, prompt, steps, tiles, blocks)
    finish = "stop" if found or len(ids) < len(steps) else "length"
    return Answer(whole, finish, len(prompt), len(steps), extra)


def without_end(chat, ids):
    """-> ids without the stop token, if they end with one"""
    return ids[:-1] if ids and ids[-1] in chat.stop_ids else ids


def log_probabilities(chat, prompt, ids, tiles, top):
    """-> OpenAI's list: for each token its log-probability, and those of the `top` most probable tokens"""
    def row(text, p):
        return {"token": text, "logprob": max(float(p.log()), -9999.0), "bytes": list(text.encode("utf-8", "replace"))}

    p = read_again(chat, prompt, ids, tiles)[0] if ids else []
    return [row(piece_text(chat.tok, ids[:t], i), p[t, i]) | {"top_logprobs": [
        row(piece_text(chat.tok, ids[:t], int(j)), p[t, j]) for j in p[t].topk(top).indices]}
        for t, i in enumerate(ids)]


# ---- HTTP -----------------------------------------------------------------------------------------------------------

def is_this_machine(host):
    """Is `host` an address that only this machine can reach?"""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def served_page(model):
    """-> the html of the page, with style and script inside"""
    page = (PAGE / "serve.html").read_text("utf-8")
    parts = {"style": ("look.css", "serve.css"), "script": ("look.js", "serve.js")}
    for name, files in parts.items():
        page = page.replace(f"<!-- {name} -->", f"<{name}>" + "".join((PAGE / f).read_text("utf-8") for f in files)
                            + f"</{name}>")
    data = safe_json({"model": model})
    return page.replace("<!-- data -->", f"<script type=application/json id=data>{data}</script>")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, chat, s):
        self.chat, self.s, self.token, self.born = chat, s, s.token, int(time.time())
        self.here = is_this_machine(s.host)
        if not re.fullmatch(r"[!-~]*", s.token):
            stop("token: only the printable characters of ASCII, without spaces")
        if not self.here and not s.token:
            self.token = secrets.token_urlsafe(24)
        self.busy, self.places = threading.Lock(), threading.BoundedSemaphore(1 + s.queue)
        self.stopping, self.page = False, served_page(s.model).encode()
        self.address_family = socket.AF_INET6 if ":" in s.host else socket.AF_INET
        try:
            super().__init__((s.host, s.port), Handler)
        except (OSError, OverflowError) as e:
            stop(f"cannot listen on {s.host}, port {s.port}: {getattr(e, 'strerror', None) or e}")

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)               # HTTPServer's own asks a name server for our name

    def verify_request(self, request, address):
        return threading.active_count() <= CONNECTIONS

    def url(self):
        name = f"[{self.s.host}]" if ":" in self.s.host else self.s.host
        return f"http://{name}:{self.server_address[1]}/" + (f"#token={self.token}" if self.token else "")

    def end(self):
        """Let a running answer stop after its next token, then close."""
        self.stopping = True
        self.busy.acquire(timeout=PATIENCE)
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE
    server_version, sys_version = "pumice", ""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.guarded(self.get)

    def do_POST(self):
        self.guarded(self.post)

    def guarded(self, method):
        """Run a method. What it raises becomes an error object, if no answer has begun."""
        self.begun, self.unread = False, 0
        try:
            self.check_origin()
            method()
        except Refusal as e:
            self.refuse(e.status, str(e), e.param, e.code)
        except (BadSample, config.Error) as e:
            self.refuse(400, str(e), "messages")
        except (Gone, OSError):                                # the client left, or is too slow
            self.close_connection = True
        except Exception as e:
            traceback.print_exc()
            self.refuse(500, f"the server failed: {type(e).__name__}")

    def check_origin(self):
        """A page from elsewhere, open in a browser on this machine, may not use the server: not by a request to our
        address (Origin), nor by a name of its own that resolves to our address (Host)."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if self.server.here and urlsplit(f"//{host}").hostname not in NAMES:
            raise Refusal(403, "the Host header does not name this machine")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refusal(403, "requests from pages of other servers are refused")

    def check_token(self):
        if not self.server.token:
            return
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        if not (hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self.server.token.encode())
                and scheme.lower() == "bearer"):
            raise Refusal(401, "this server needs a token: Authorization: Bearer TOKEN", None, "invalid_api_key")

    def get(self):
        path = urlsplit(self.path).path
        model = {"id": self.server.s.model, "object": "model", "created": self.server.born, "owned_by": "pumice"}
        if path == "/":
            self.reply(200, self.server.page, "text/html; charset=utf-8",
                       {"Content-Security-Policy": f"{POLICY}; connect-src 'self'; frame-ancestors 'none'"})
        elif path == "/health":
            self.reply(200, {"status": "ok"})
        elif path == "/v1/models":
            self.check_token()
            self.reply(200, {"object": "list", "data": [model]})
        elif path == "/v1/chat/completions":
            raise Refusal(405, "this address takes POST")
        else:
            raise Refusal(404, f"nothing at {path:.80}")

    def post(self):
        self.unread = self.length()
        path = urlsplit(self.path).path
        if path != "/v1/chat/completions":
            raise Refusal(*((405, "this address takes GET") if path in ("/", "/health", "/v1/models") else
                            (404, f"nothing at {path:.80}")))
        self.check_token()
        if self.unread > self.server.s.max_request * 2**20:
            raise Refusal(413, f"a request of {self.unread:,} bytes; the limit is {self.server.s.max_request:g} MiB")
        if not self.server.places.acquire(blocking=False):
            raise Refusal(503, "the queue is full: try again later", None, "overloaded")
        try:
            self.complete(read_request(self.body(), self.server.s))
        finally:
            self.server.places.release()

    def length(self):
        text = self.headers.get("Content-Length")
        if text is None or self.headers.get("Transfer-Encoding"):
            raise Refusal(411, "the request needs a Content-Length")
        if not re.fullmatch("[0-9]{1,15}", text):
            raise Refusal(400, "Content-Length is not a number")
        return int(text)

    def body(self):
        parts, end = [], time.monotonic() + 2 * PATIENCE
        while self.unread:
            part = self.rfile.read1(min(self.unread, 2**16))
            if not part or time.monotonic() > end:
                raise Gone
            parts.append(part)
            self.unread -= len(part)
        return b"".join(parts)

    def left(self):
        """Has the client closed the connection, or does the server end?"""
        readable = select.select([self.connection], [], [], 0)[0]
        return self.server.stopping or bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def complete(self, asked):
        """Wait for the model, answer, and send the answer as one object or as a stream of events."""
        frame = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.server.s.model}
        stream = {**frame, "object": "chat.completion.chunk"}

        def event(delta, finish=None, **more):
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            self.send_event({**stream, "choices": [choice], **more})

        def begin():
            if asked.stream:
                self.begin(200, "text/event-stream", {"Cache-Control": "no-cache"})
                event({"role": "assistant", "content": ""})

        while not self.server.busy.acquire(timeout=0.1):
            if self.left():
                raise Gone
        try:
            if self.left():
                raise Gone
            a = answer_request(self.server.chat, asked, self.server.s, begin,
                               lambda text: event({"content": text}) if asked.stream else None, self.left)
        finally:
            self.server.busy.release()
        usage = {"prompt_tokens": a.prompt_tokens, "completion_tokens": a.tokens,
                 "total_tokens": a.prompt_tokens + a.tokens}
        look = {"look": a.extra["look"]} if asked.look else {}
        if asked.stream:
            event({}, a.finish, **look)
            if asked.usage:
                self.send_event({**stream, "choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": a.text, "refusal": None},
                  "finish_reason": a.finish, "logprobs": a.extra.get("logprobs")}
        self.reply(200, {**frame, "object": "chat.completion", "choices": [choice], "usage": usage, **look})

    # ---- writing

    def begin(self, status, kind, headers):
        self.begun = True
        self.send_response(status)
        for name, text in {"Content-Type": kind, "X-Content-Type-Options": "nosniff", "Connection": "close",
                           **headers}.items():
            self.send_header(name, text)
        self.end_headers()

    def send_event(self, thing):
        self.wfile.write(f"data: {json.dumps(thing)}\n\n".encode())

    def reply(self, status, thing, kind="application/json", headers={}):
        data = thing if type(thing) is bytes else json.dumps(thing).encode()
        self.begin(status, kind, {"Content-Length": str(len(data)), **headers})
        self.wfile.write(data)

    def refuse(self, status, message, param=None, code=None):
        """Send an error object. In a stream it is an event; what the client still sends is read and thrown away, so
        that the client sees the error."""
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        more = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}.get(status, {})
        self.close_connection = True
        try:
            if self.begun:
                self.send_event(error)
                return
            self.reply(status, error, headers=more)
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            end = time.monotonic() + 5
            while self.unread and time.monotonic() < end and (part := self.rfile.read1(min(self.unread, 2**16))):
                self.unread -= len(part)
        except OSError:
            pass

    def send_error(self, code, message=None, explain=None):
        """For requests that http.server itself refuses"""
        self.begun, self.unread = False, 0
        self.refuse(code, message or self.responses.get(code, ("?",))[0])


def main(s):
    config.check_ranges(s)
    server = Server(Chat(s.model, s.device, s.dtype, s.template, s.system, s.kernels), s)
    print(f"{server.url()}   {s.model}; Ctrl-C ends", flush=True)
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    server.end()


if __name__ == "__main__":
    with config.one_line_errors():
        main(config.parse(Settings, sys.argv[1:], __doc__))
    sys.stdout.flush()
    os._exit(0)        # a thread of a request may be inside torch: Python's own exit would end it there, and so abort
