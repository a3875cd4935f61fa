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
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
from config import BadSample, setting, stop
from generate import Chat
from run.arguments import parse
from tools.look import PAGE, POLICY, safe_json
from tools.serve_answer import Gone, answer_request
from tools.serve_request import Incoming, Refusal, read_request

PATIENCE = 30              # seconds for the headers of a request, and for a client to read; twice for the body
CONNECTIONS = 100          # open connections; more are closed at once
NAMES = ("localhost", "127.0.0.1", "::1")


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


def parts_of(url):
    """-> its parts, as urlsplit has them"""
    try:
        return urlsplit(url)
    except ValueError as e:                                    # a bracket without its partner
        raise Refusal(400, f"not an address: {e}") from None


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
    server_version, sys_version = "pumice", ""

    def setup(self):
        self.timeout = PATIENCE
        super().setup()
        self.rfile.close()
        self.incoming = Incoming(self.connection, PATIENCE)
        self.rfile = io.BufferedReader(self.incoming)

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
        if self.server.here and parts_of(f"//{host}").hostname not in NAMES:
            raise Refusal(403, "the Host header does not name this machine")
        if origin is not None and parts_of(origin).netloc != host:
            raise Refusal(403, "requests from pages of other servers are refused")

    def check_token(self):
        if not self.server.token:
            return
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        if not (hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self.server.token.encode())
                and scheme.lower() == "bearer"):
            raise Refusal(401, "this server needs a token: Authorization: Bearer TOKEN", None, "invalid_api_key")

    def get(self):
        path = parts_of(self.path).path
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
        path = parts_of(self.path).path
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
        parts = []
        self.incoming.allow(2 * PATIENCE)
        while self.unread:
            part = self.rfile.read1(min(self.unread, 2**16))
            if not part:
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
            self.incoming.allow(5)
            while self.unread and (part := self.rfile.read1(min(self.unread, 2**16))):
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
        main(parse(Settings, sys.argv[1:], __doc__))
    sys.stdout.flush()
    os._exit(0)        # a thread of a request may be inside torch: Python's own exit would end it there, and so abort
