"""The server: OpenAI's protocol answers as Chat does, streams what it answers whole, and refuses in one line."""

import base64
import http.client
import importlib.util
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from conftest import FOREVER, ROOT, error, in_thread
from test_read_again import noise, tiny_chat
from test_look import folder, tok  # noqa: F401

from formats.tokenizer import Tokenizer
from generate import Chat
from tools import look, serve, serve_answer
from tools.attention import read_again
from tools.serve_request import Incoming

POST = "/v1/chat/completions"


def data_url(image, kind="png"):
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def image_part(seed=0):
    return {"type": "image_url", "image_url": {"url": data_url(noise(seed)), "detail": "low"}}


def user(*content):
    return {"role": "user", "content": content[0] if len(content) == 1 and type(content[0]) is str else [
        {"type": "text", "text": c} if type(c) is str else c for c in content]}


def running(chat, **settings):
    """A context with a server in a thread: Server"""
    server = serve.Server(chat, serve.Settings(**{"model": "tiny", "port": 0, **settings}))
    return in_thread(server, server.end)


def talker(folder):
    chat = tiny_chat(Tokenizer(folder), max_position_embeddings=400, vocab_size=700)
    chat.stop_ids = set()                                      # a random model would end some answers early
    return chat


@pytest.fixture(scope="module")
def chat(bytes_folder):
    return talker(bytes_folder)


@pytest.fixture(scope="module")
def server(chat):
    with running(chat, max_request=0.1, max_images=3, max_new_tokens=9) as server:
        yield server


@pytest.fixture(scope="module")
def each_server(tok_folder):
    """For each of two kinds of tokenizers"""
    with running(talker(tok_folder)) as server:
        yield server


def request(server, path, body=None, **headers):
    """-> status, headers, text"""
    data = body if body is None or type(body) is bytes else json.dumps(body).encode()
    asked = urllib.request.Request(server.url().split("#")[0].rstrip("/") + path, data, headers)
    try:
        with urllib.request.urlopen(asked, timeout=FOREVER) as reply:
            return reply.status, reply.headers, reply.read().decode()
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.headers, e.read().decode()


def complete(server, *messages, **fields):
    status, headers, text = request(server, POST, {"messages": list(messages), **fields})
    assert status == 200, text
    if not fields.get("stream"):
        return json.loads(text)
    assert headers["Content-Type"] == "text/event-stream" and text.endswith("\n\ndata: [DONE]\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]


def text_of(reply):
    return reply["choices"][0]["message"]["content"]


def pieces(events):
    return [e["choices"][0]["delta"].get("content") for e in events if e["choices"]]


# ---- the same answers as Chat ---------------------------------------------------------------------------------------

def test_one_question_is_answered_as_by_chat(chat, server):
    a, b = noise(0), noise(1)
    for content, images, text in ((("Hi!",), None, "Hi!"), (("Hi ", "you!"), None, "Hi you!"),
                                  ((image_part(), "What is this?"), a, "What is this?"),
                                  (("What is this?", image_part()), a, "What is this?"),
                                  ((image_part(1), image_part(0), "Same?"), [b, a], "Same?"),
                                  (("One ", image_part(), "and ", image_part(1), "two"), [a, b],
                                   "One <image>\nand <image>\ntwo"), (("Say <image>",), None, "Say <image>")):
        reply = complete(server, user(*content), max_tokens=8)
        assert text_of(reply) == chat.ask(images, text, 8) and text_of(reply), content
        usage = reply["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["completion_tokens"] == 8 and reply["choices"][0]["finish_reason"] == "length"
    assert len({chat.ask(x, "What is this?", 8) for x in (None, a, b)}) == 3, "the images matter"


def test_turns_and_system_text_reach_the_model(chat, server):
    turns = [("<image>\nWhat?", "A cat."), ("<image>\nAnd now?", None)]
    tiles, blocks = chat.look([noise(0), noise(1)])
    true = chat.answers([chat.prompt(turns, blocks)], tiles, 9)[0]
    messages = [user(image_part(0), "What?"), {"role": "assistant", "content": "A cat."},
                user(image_part(1), "And now?")]
    assert text_of(complete(server, *messages)) == true                       # 9 tokens: the server's own default
    for role, system in (("system", "Describe."), ("developer", ""), ("system", "Be brief.")):
        chat.system, before = system, chat.system
        expected = chat.answers([chat.prompt(turns, blocks)], tiles, 9)[0]
        chat.system = before
        got = complete(server, {"role": role, "content": system}, *messages)
        assert text_of(got) == expected and (expected == true) == (system == "Be brief.")


@pytest.mark.parametrize("temperature", [0, 1.0, 30])
def test_a_stream_joined_is_the_whole(each_server, temperature):
    """At high temperature, bytes of unfinished and of broken characters come in any order."""
    chat, server, streamed = each_server.chat, each_server, []
    for seed in range(3 if temperature else 1):
        fields = dict(temperature=temperature, seed=seed, max_tokens=16)
        whole = complete(server, user("Yes?"), **fields)
        events = complete(server, user("Yes?"), stream=True, stream_options={"include_usage": True}, **fields)
        parts = pieces(events)
        assert "".join(p for p in parts if p) == text_of(whole) == chat.ask(None, "Yes?", 16, temperature, seed)
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""} and parts[-1] is None
        assert events[-1]["usage"] == whole["usage"] and not events[-1]["choices"]
        assert events[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert {e["object"] for e in events} == {"chat.completion.chunk"} and len({e["id"] for e in events}) == 1
        streamed.append(sum(map(bool, parts)))
    assert max(streamed) > (3 if temperature else 1)


def test_stop_texts_end_the_answer_before_them(server):
    fields = dict(temperature=1.0, max_tokens=16)
    cases = 0
    for seed in range(3):
        whole = text_of(complete(server, user("Yes?"), seed=seed, **fields))
        for stops in ([whole[5:8]], [whole[-2:], "no such text", whole[5:8]]):
            true = whole[: min((i for i in map(whole.find, stops) if i >= 0), default=None)]
            reply = complete(server, user("Yes?"), seed=seed, stop=stops if len(stops) > 1 else stops[0], **fields)
            events = complete(server, user("Yes?"), seed=seed, stop=stops, stream=True, **fields)
            assert text_of(reply) == "".join(p for p in pieces(events) if p) == true
            assert reply["choices"][0]["finish_reason"] == ("stop" if true != whole else "length")
            cases += reply["usage"]["completion_tokens"] < 16
    assert cases >= 4


def test_a_stop_token_ends_the_answer(chat, server, monkeypatch):
    steps = []
    chat.answers([chat.prompt([("Hi!", None)])], [], 8, each=steps.append)
    ids = steps[-1][0]
    monkeypatch.setattr(chat, "stop_ids", {ids[3]})
    n = ids.index(ids[3])
    reply = complete(server, user("Hi!"), logprobs=True, look=True)
    assert text_of(reply) == chat.tok.decode(ids[:n]).strip() and reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == n + 1 and len(reply["choices"][0]["logprobs"]["content"]) == n
    assert [t["end"] for t in reply["look"]["tokens"]] == [False] * n + [True]


def test_log_probabilities_are_the_models(chat, server):
    steps, prompt = [], chat.prompt([("Hi!", None)])
    chat.answers([prompt], [], 8, each=steps.append)
    ids = steps[-1][0]
    p, _ = read_again(chat, prompt, ids, [])
    content = complete(server, user("Hi!"), max_tokens=8, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]
    for t, row in enumerate(content["content"]):
        assert row["logprob"] == float(p[t, ids[t]].log()) == row["top_logprobs"][0]["logprob"]      # greedy
        assert [x["logprob"] for x in row["top_logprobs"]] == p[t].topk(3).values.log().tolist()
        assert bytes(row["bytes"]).decode() == row["token"]
    assert len(content["content"]) == 8
    assert complete(server, user("Hi!"))["choices"][0]["logprobs"] is None


def test_the_record_comes_with_the_answer(chat, server):
    answer, record = look.ask_and_record(chat, [noise(0)], "What is this?", 6)
    record = json.loads(json.dumps(record))
    reply = complete(server, user(image_part(), "What is this?"), max_tokens=6, look=True)
    assert text_of(reply) == answer and reply["look"] == record and not record["no_map"]
    *_, last = complete(server, user(image_part(), "What is this?"), max_tokens=6, look=True, stream=True)
    assert last["look"] == record
    assert "look" not in complete(server, user("Hi!"))


# ---- refusals -------------------------------------------------------------------------------------------------------

GOOD = [user("Hi!")]
BAD_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(b"no").decode()}}


def urls(url):
    return {"messages": [user({"type": "image_url", "image_url": {"url": url}}, "?")]}


REFUSED = [
    (b"{", "not JSON"), (b"[1]", "not a JSON object"), (b'{"messages": NaN}', "NaN is not JSON"), (b"\xff", "not JSON"),
    (b'{"seed": 1, "seed": 2}', "duplicate key"), (b"[" * 5000, "not JSON"), ({}, "messages: expected a list"),
    ({"messages": []}, "messages: expected a list"), ({"messages": ["Hi"]}, "messages: expected a list"),
    ({"messages": [{"role": "user"}]}, "messages[0]: content is a string"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
    ({"messages": [user("a"), user("b")]}, "messages[1]: two questions in a row"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "an answer without a question"),
    ({"messages": [*GOOD, {"role": "assistant", "content": "x"}]}, "the last message must be the user's"),
    ({"messages": [*GOOD, {"role": "system", "content": "x"}]}, "only the first message"),
    ({"messages": [{"role": "system", "content": [image_part()]}]}, "only a user's message may have images"),
    ({"messages": [user({"type": "input_audio"})]}, "parts of type text and image_url"),
    ({"messages": [user("a \ud800")]}, "lone surrogate"), ({"messages": [user(*[image_part()] * 4)]}, "the limit is 3"),
    ({"messages": [user(image_part(), "<image>")]}, "not as many <image> markers as images"),
    (urls("http://127.0.0.1:1/a.png"), "other URLs are not opened"), (urls("file:///etc/passwd"), "not opened"),
    (urls("/etc/passwd"), "not opened"), (urls("data:text/html;base64,aGk="), "not opened"), (urls(None), "not opened"),
    (urls("data:image/png;base64,a*b="), "not base64"),
    ({"messages": [user(BAD_IMAGE)]}, "image cannot be read: number 1 (UnidentifiedImageError)"),
    ({"messages": GOOD, "max_tokens": 0}, "max_tokens: expected a whole number from 1"),
    ({"messages": GOOD, "max_completion_tokens": True}, "max_completion_tokens: expected a whole number"),
    ({"messages": GOOD, "temperature": -1}, "temperature: expected a number from 0 to 100"),
    ({"messages": GOOD, "temperature": "1"}, "temperature: expected a number"),
    ({"messages": GOOD, "seed": 1.5}, "seed: expected a whole number"), ({"messages": GOOD, "stop": [""]}, "stop: "),
    ({"messages": GOOD, "stop": ["a"] * 5}, "stop: expected up to four"), ({"messages": GOOD, "stop": 3}, "stop: "),
    ({"messages": GOOD, "stream": 1}, "stream: expected true or false"),
    ({"messages": GOOD, "stream_options": {"x": 1}}, "only include_usage"),
    ({"messages": GOOD, "n": 2}, "n: only 1 is supported"), ({"messages": GOOD, "top_p": 0.5}, "top_p: only 1"),
    ({"messages": GOOD, "top_logprobs": 2}, "needs logprobs"), ({"messages": GOOD, "temprature": 1}, "unknown field"),
    ({"messages": GOOD, "top_logprobs": 21, "logprobs": True}, "from 0 to 20"),
    ({"messages": GOOD, "logprobs": True, "stream": True}, "not supported together")]


@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_refused_in_one_line(server, stream):
    for body, message in REFUSED:
        body = {**body, "stream": True} if stream and type(body) is dict and "stream" not in body else body
        status, headers, text = request(server, POST, body)
        found = json.loads(text)["error"]
        assert status == 400 and message in found["message"] and "\n" not in found["message"], (body, text)
        assert found["type"] == "invalid_request_error" and headers["Content-Type"] == "application/json"
    assert text_of(complete(server, *GOOD))                      # the server goes on


def test_too_long_and_unknown_are_refused(server):
    for fields, status, code in (({"max_tokens": 400}, 400, "context_length_exceeded"),
                                 ({"model": "gpt-4"}, 404, "model_not_found")):
        got, _, text = request(server, POST, {"messages": GOOD, **fields})
        assert (got, json.loads(text)["error"]["code"]) == (status, code)
    long = [user("Yes! " * 500)]
    got, _, text = request(server, POST, {"messages": long})
    assert got == 400 and "are more than the 400 of this model" in text
    fields = {"n": 1, "top_p": 1.0, "user": "me", "frequency_penalty": None, "tools": [], "model": "tiny", "seed": -1}
    assert text_of(complete(server, *GOOD, **fields))


def raw(server, text, *more):
    """Send bytes, and after the headers perhaps more -> status, body"""
    with socket.create_connection(server.server_address, FOREVER) as s:
        s.sendall(text)
        for part in more:
            s.sendall(part)
        reply = b"".join(iter(lambda: s.recv(65536), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"] if body.startswith(b'{"error') else body


def test_http_errors_are_error_objects(server):
    host = b"Host: localhost\r\n"
    assert raw(server, b"POST " + POST.encode() + b" HTTP/1.1\r\n" + host + b"\r\n")[0] == 411
    assert raw(server, b"POST " + POST.encode() + b" HTTP/1.1\r\n" + host + b"Content-Length: -1\r\n\r\n")[0] == 400
    chunked = b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n"
    assert raw(server, b"POST " + POST.encode() + b" HTTP/1.1\r\n" + host + chunked)[0] == 411
    size = 3 * 2**20                                           # far over 0.1 MiB: the client can still read the error
    status, message = raw(server, b"POST " + POST.encode() + b" HTTP/1.1\r\n" + host
                          + b"Content-Length: %d\r\n\r\n" % size, b"x" * size)
    assert status == 413 and "the limit is 0.1 MiB" in message
    assert raw(server, b"PUT / HTTP/1.1\r\n" + host + b"\r\n")[0] == 501
    assert raw(server, b"GET / HTTP/1.1\r\nHost: [\r\n\r\n")[0] == 400
    assert raw(server, b"GET http://[ HTTP/1.1\r\n" + host + b"\r\n")[0] == 400
    assert raw(server, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n")[0] == 431
    assert request(server, "/v1/embeddings", b"{}")[0] == request(server, "/etc/passwd")[0] == 404
    assert request(server, POST)[0] == request(server, "/health", b"{}")[0] == 405
    for path in ("/../../README.md", "/look.js", "/tools/serve.py"):
        assert request(server, path)[0] == 404


def test_pages_of_other_servers_are_refused(server):
    """By Origin (a page that knows our address) and by Host (a page whose own name resolves to our address)"""
    good = {"Content-Type": "text/plain"}
    port, body = server.server_address[1], {"messages": GOOD, "max_tokens": 1}
    assert request(server, POST, body, Origin="https://evil.example", **good)[0] == 403
    assert request(server, POST, body, Origin="null")[0] == 403
    assert request(server, "/", Host="evil.example")[0] == request(server, "/", Host=f"evil.example:{port}")[0] == 403
    for name in ("localhost", "127.0.0.1"):
        assert request(server, POST, body, Host=f"{name}:{port}", Origin=f"http://{name}:{port}")[0] == 200


def test_the_page_and_the_lists_are_served(server):
    status, headers, text = request(server, "/")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"] and "function send()" in text
    assert not re.search(r"<!-- \w+ -->|innerHTML|https?://", text)
    assert json.loads(request(server, "/health")[2]) == {"status": "ok"}
    models = json.loads(request(server, "/v1/models")[2])
    assert models["object"] == "list" and [m["id"] for m in models["data"]] == ["tiny"]


# ---- token, queue, clients that leave -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def plain_chat(tok):  # noqa: F811
    return tiny_chat(tok, max_position_embeddings=400)


def test_a_token_is_asked_for(plain_chat):
    with running(plain_chat, token="secret") as server:
        for given, status in ((None, 401), ("Bearer wrong", 401), ("Bearer secret2", 401), ("Basic secret", 401),
                              ("Bearer s\u00e9cret", 401), ("secret", 401), ("Bearer secret", 200),
                              ("bearer secret", 200)):
            headers = {} if given is None else {"Authorization": given}
            for got in (request(server, POST, {"messages": GOOD, "max_tokens": 1}, **headers),
                        request(server, "/v1/models", **headers)):
                assert got[0] == status, given
                assert status == 200 or (json.loads(got[2])["error"]["code"] == "invalid_api_key"
                                         and got[1]["WWW-Authenticate"] == "Bearer")
        assert request(server, "/")[0] == request(server, "/health")[0] == 200
        assert server.url().endswith("/#token=secret")


def test_another_address_needs_a_token(plain_chat):
    tokens = []
    for _ in range(2):
        server = serve.Server(plain_chat, serve.Settings(host="0.0.0.0", port=0))
        tokens.append(server.token)
        server.end()
    assert tokens[0] != tokens[1] and min(map(len, tokens)) >= 32
    for host in ("127.0.0.1", "localhost"):
        server = serve.Server(plain_chat, serve.Settings(host=host, port=0))
        assert server.token == "" and server.here
        server.end()
    assert not serve.is_this_machine("") and not serve.is_this_machine("localhost.evil.example")
    assert "cannot listen" in error(serve.Server, plain_chat, serve.Settings(host="203.0.113.1", port=0))
    assert "token" in error(serve.Server, plain_chat, serve.Settings(token="a b", port=0))


@pytest.fixture
def slow(plain_chat, monkeypatch):
    """Each token waits until the test lets it go -> [number of tokens so far], function that lets n tokens go"""
    count, gate, answers = [0], threading.Semaphore(0), Chat.answers

    def wait(self, *args):
        def each(found):
            count[0] += 1
            assert gate.acquire(timeout=FOREVER)
            return args[-1](found)
        return answers(self, *args[:-1], each)

    monkeypatch.setattr(Chat, "answers", wait)
    yield count, gate.release
    gate.release(1000)


def until(condition):
    end = time.monotonic() + FOREVER
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def start(server, **fields):
    """Send a request and do not wait for the answer -> connection; it closes when it is forgotten"""
    c = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=FOREVER)
    c.request("POST", POST, json.dumps({"messages": GOOD, "max_tokens": 300, **fields}))
    return c


def test_requests_wait_until_the_queue_is_full(plain_chat, slow):
    count, release = slow
    with running(plain_chat, queue=1) as server:
        first = start(server, max_tokens=3)
        until(lambda: count[0] == 1)
        second = start(server, max_tokens=3)
        until(lambda: server.places._value == 0)
        status, headers, text = request(server, POST, {"messages": GOOD})
        assert status == 503 and json.loads(text)["error"]["code"] == "overloaded" and headers["Retry-After"]
        assert request(server, "/health")[0] == 200
        assert count[0] == 1, "one answer at a time"
        release(6)
        replies = [json.loads(c.getresponse().read()) for c in (first, second)]
        assert text_of(replies[0]) == text_of(replies[1]) and count[0] == 6
        release(3)
        assert text_of(complete(server, *GOOD, max_tokens=3)) == text_of(replies[0])     # the places are free again


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_answer(plain_chat, slow, stream):
    count, release = slow
    with running(plain_chat) as server:
        client = start(server, stream=stream)
        until(lambda: count[0] == 1)
        waiting = start(server)                                # leaves while it waits
        until(lambda: server.places._value == 7)
        waiting.close()
        until(lambda: server.places._value == 8)
        assert count[0] == 1
        release(2)
        until(lambda: count[0] == 3)
        if stream:
            assert b'"role": "assistant"' in client.getresponse().fp.readline()
        client.close()
        client.sock = None
        release(5)
        until(lambda: server.places._value == 9)
        assert count[0] <= 5, "300 tokens were asked for"
        release(10)
        assert plain_chat.model.training and text_of(complete(server, *GOOD, max_tokens=2))


@pytest.mark.parametrize("begin", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ",
                                   b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                                   b"Content-Length: 9000\r\n\r\n"])
def test_a_client_that_sends_slowly_is_cut_off(plain_chat, monkeypatch, begin, capsys):
    monkeypatch.setattr(serve, "PATIENCE", 0.2)
    with running(plain_chat) as server, socket.create_connection(server.server_address, FOREVER) as s:
        s.sendall(begin)
        with pytest.raises(ConnectionError):
            for _ in range(200):                               # 10 seconds, a byte each 0.05
                s.sendall(b"x")
                time.sleep(0.05)
        until(lambda: server.places._value == 9)
        assert request(server, "/health")[0] == 200
    assert capsys.readouterr().err == ""


def test_the_deadline_ends_also_a_fast_stream():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"xy")
        incoming = Incoming(ours, 9)
        assert incoming.read(1) == b"x"
        incoming.allow(0)
        with pytest.raises(TimeoutError):
            incoming.read(1)
        incoming.allow(9)
        assert incoming.read(1) == b"y" and ours.gettimeout() is None


def test_too_many_connections_are_closed(plain_chat, monkeypatch):
    with running(plain_chat) as server:
        monkeypatch.setattr(serve, "CONNECTIONS", before := threading.active_count())
        with socket.create_connection(server.server_address, FOREVER):
            until(lambda: threading.active_count() == before + 1)
            with socket.create_connection(server.server_address, FOREVER) as s:
                assert s.recv(1) == b""
        until(lambda: threading.active_count() == before)
        assert request(server, "/health")[0] == 200


def test_the_end_of_the_server_stops_an_answer(plain_chat, slow):
    count, release = slow
    with running(plain_chat) as server:
        client = start(server)
        until(lambda: count[0] == 1)
        server.stopping = True
        release(5)
        until(lambda: server.places._value == 9)
        assert count[0] <= 2
        client.close()


# ---- as users start it ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def process(folder):  # noqa: F811
    """The command, on a free port -> its process and its address"""
    command = [sys.executable, ROOT / "tools/serve.py", f"--model={folder / 'model'}", "--port=0", "--device=cpu",
               "--dtype=fp64"]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # a shell may ignore it
    yield p, p.stdout.readline().split()[0]
    p.kill()
    p.wait()


def doc_block(kind):
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs/serving.md").read_text("utf-8"), re.S)


def test_the_commands_of_the_page_run(process, folder, monkeypatch):  # noqa: F811
    """Then Ctrl-C, in the middle of an answer, ends the process with code 0 and without a word."""
    p, address = process
    commands = [c for block in doc_block("bash") for c in block.replace("\\\n", "").splitlines()]
    assert commands[0].startswith("python tools/serve.py --model=runs/sft")
    curl, = (c for c in commands if c.startswith("curl"))
    if shutil.which("curl"):
        done = subprocess.run(curl.replace("http://127.0.0.1:8000/", address), shell=True, capture_output=True)
        assert text_of(json.loads(done.stdout))
    code = "".join(doc_block("python")).replace("http://127.0.0.1:8000/", address)
    assert code.startswith("from openai import OpenAI")
    (folder / "cat.jpg").write_bytes((folder / "a.png").read_bytes())
    monkeypatch.chdir(folder)
    if importlib.util.find_spec("openai"):                     # else test_the_openai_client skips, and says why
        exec(code, {})
    body = {"messages": GOOD, "max_tokens": 2000, "stream": True, "temperature": 1.0}
    with urllib.request.urlopen(urllib.request.Request(address + POST[1:], json.dumps(body).encode())) as stream:
        stream.readline()
        p.send_signal(signal.SIGINT)
        assert p.wait(FOREVER) == 0
    assert p.stderr.read() == ""


def test_the_openai_client(chat, server):
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    client = openai.OpenAI(base_url=server.url() + "v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny"]
    messages = [user(image_part(), "What is this?")]
    fields = dict(model="tiny", messages=messages, max_completion_tokens=8)
    reply = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    true = chat.ask(noise(0), "What is this?", 8)
    assert reply.choices[0].message.content == true and reply.choices[0].finish_reason == "length"
    assert len(reply.choices[0].logprobs.content) == 8 == reply.usage.completion_tokens
    stream = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == true
    assert chunks[-1].usage.completion_tokens == 8
    with pytest.raises(openai.BadRequestError, match="two questions in a row") as e:
        client.chat.completions.create(model="tiny", messages=GOOD * 2)
    assert e.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=GOOD)


def test_texts_so_far_only_grow(tok_folder):
    """Random ids, one by one: each text begins with the one before, and the whole with the last."""
    chat = SimpleNamespace(tok=Tokenizer(tok_folder))
    g = torch.Generator().manual_seed(0)
    small = [i for i in range(len(chat.tok)) if re.fullmatch("<0x..>|<.*>|[^ -~]", chat.tok.full.id_to_token(i))]
    for _ in range(400):
        ids, sent = torch.randint(0, len(chat.tok), (12,), generator=g).tolist(), ""
        ids[3:9] = [small[i] for i in torch.randint(0, len(small), (6,), generator=g)]
        for n in range(1, 13):
            text = serve_answer.text_so_far(chat, ids[:n])
            assert text.startswith(sent)
            sent = text
        assert chat.tok.decode(ids).strip().startswith(sent)


def test_certain_holds_back_what_may_become_a_stop():
    assert serve_answer.certain("abc", ["cd"]) == "ab" and serve_answer.certain("abc", ["d"]) == "abc"
    assert serve_answer.certain("aXX", ["XXY", "Xa"]) == "a" == serve_answer.certain("a", [])
    assert serve_answer.certain("", ["a"]) == ""
    assert serve_answer.before_stop("abcab", ["b", "ca"]) == ("a", True)
    assert serve_answer.before_stop("abc", ["x"]) == ("abc", False)
