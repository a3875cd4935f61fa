"""tools/curate.py synth: good replies become rows that train, bad ones are counted; the key stays where it belongs."""

import json
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import error, in_thread
from PIL import Image

import data
from config import BadSample
from formats.rows import Rows, conversation
from formats.tokenizer import Tokenizer
from images import Layout
from tools import curate, curate_client, curate_synth
from tools.curate_client import Endpoint, Failed, retry_after
from tools.curate_prompts import DESCRIBE, KINDS, SYSTEM, prompt, read_reply, row_facts

KEY = "sk-secret-0123456789"
TALK = "Question: What lies on the sofa?\nAnswer: A dog.\n\nQuestion: Where is it?\nAnswer: On the left."
LONG = "A brown dog sleeps on the left side of a red sofa. The sofa stands in front of a white wall, and a lamp is lit."
THINK = f"**Question:** Why may the dog be tired?\n**Answer:** {LONG} So it may have run before."
GOOD = {"conversation": TALK, "detail": LONG, "reasoning": THINK}


def kind_of(body):
    return next(k for k in KINDS if KINDS[k].ask in body["messages"][1]["content"])


def reply(text, **more):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text} | more.pop("message", {}),
                                    "finish_reason": "stop", **more}]}).encode()


class Fake(ThreadingHTTPServer):
    """A server that answers request n with answers[n], then with what is good. An answer: bytes, a text, or (status,
    headers, bytes)"""
    daemon_threads = True

    def __init__(self, *answers):
        self.answers, self.asked, self.keys, self.lock = list(answers), [], [], threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.say(200, {}, json.dumps({"data": [{"id": "toy"}]}).encode())

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body)
            server.keys.append(self.headers["Authorization"])
            answer = server.answers.pop(0) if server.answers else GOOD[kind_of(body)]
        answer = reply(answer) if isinstance(answer, str) else answer
        self.say(*(answer if isinstance(answer, tuple) else (200, {}, answer)))

    def say(self, status, headers, text):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(text))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(text)


def fake(*answers):
    server = Fake(*answers)
    return in_thread(server, server.server_close)


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "dog.png")
    return tmp_path


def rows_of(n):
    return [{"id": i, "image": "dog.png", "captions": [f"A dog on a sofa, {i}.", "A dog\nsleeps."],
             "boxes": [{"label": "dog", "box": [0.1, 0.2, 0.6, 0.9]}]} for i in range(n)]


def synth(folder, server, *args, rows=None):
    """-> rows made, rows failed"""
    if rows is not None:
        (folder / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    curate.main(["synth", str(folder / "in.jsonl"), f"--images={folder}", f"--out={folder / 'made.jsonl'}",
                 f"--url={server.url}", *args])
    return [[json.loads(line) for line in (folder / f"{n}.jsonl").read_text().splitlines()]
            for n in ("made", "made_failed")]


# ---- rows -----------------------------------------------------------------------------------------------------------

def test_rows_train_as_they_are(folder, bytes_folder, capsys):
    with fake() as server:
        made, failed = synth(folder, server, rows=rows_of(2))
    assert [r["id"] for r in made] == [f"{i}_{k}" for i in (0, 1) for k in KINDS] and not failed
    assert made[0] == {"id": "0_conversation", "image": "dog.png", "kind": "conversation", "model": "toy",
                       "conversations": [{"from": "human", "value": "<image>\nWhat lies on the sofa?"},
                                         {"from": "gpt", "value": "A dog."}, {"from": "human", "value": "Where is it?"},
                                         {"from": "gpt", "value": "On the left."}]}
    assert made[1]["conversations"][1]["value"] == LONG
    assert made[1]["conversations"][0]["value"].removeprefix("<image>\n") in DESCRIBE
    assert made[2]["conversations"][0]["value"] == "<image>\nWhy may the dog be tired?"
    tok = Tokenizer(bytes_folder, 3)
    encode, rows = data.Encoder(tok, "vicuna_v1", Layout(3, 4), 900), Rows(folder / "made.jsonl")
    for row in rows:
        ids, labels, names, cut = encode(row, str(folder))
        assert ids.count(3) == 4 and names == ["dog.png"] == conversation(row)[1] and not cut
        answers = [m["value"] for m in row["conversations"] if m["from"] == "gpt"]
        shown = tok.full.decode([y for y in labels if y >= 0])
        assert all(a in shown for a in answers) and "Where is it?" not in shown
    body = server.asked[0]
    assert body == {"model": "toy", "messages": body["messages"], "max_tokens": 1024, "temperature": 0.7, "seed": 0}
    assert body["messages"][0] == {"role": "system", "content": SYSTEM} and server.keys == [None] * 6
    assert body["messages"][1]["content"].startswith(
        "What people wrote about the image:\n- A dog on a sofa, 0.\n- A dog sleeps.\n\nObjects and their edges:\n"
        "- dog: left 0.10, top 0.20, right 0.60, bottom 0.90\n\nWrite four questions")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["made"] == 6


def test_facts_of_a_row():
    image, facts = row_facts({"image": "a.png", "caption": "A cat.", "width": 200, "height": 100,
                              "boxes": [{"label": "cat", "box": [50, 0, 200, 50]}]})
    assert image == "a.png" and facts.endswith("- cat: left 0.25, top 0.00, right 1.00, bottom 0.50")
    llava = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>"},
                                                   {"from": "gpt", "value": "A cat."}]}
    assert row_facts(llava)[1] == "What people wrote about the image:\n- A cat."
    for change, reason in (({"boxes": [{"label": "x", "box": [0, 0, 3, 1]}]}, "outside the image"),
                           ({"boxes": [{"name": "x"}]}, "a box is not"), ({"image": ""}, "one image"),
                           ({"image": ["a", "b"], "captions": ["x"]}, "one image")):
        with pytest.raises(BadSample, match=reason):
            row_facts(llava | change if "boxes" in change else {"caption": "A cat.", "image": "a.png"} | change)


REPLIES = {  # of a conversation, or (kind, text) -> the reason
    "I'm sorry, but I cannot help with that.": "the model refuses", "As an AI, I have no eyes.": "the model refuses",
    "I can\u2019t see it.": "the model refuses", "What is it? A dog.": "text before the first question",
    "Question: What is it?\nQuestion: Where is it?\nAnswer: A dog.": "questions and answers do not alternate",
    "Answer: A dog.\nQuestion: What is it?": "questions and answers do not alternate",
    TALK + "\nQuestion: And now?": "questions and answers do not alternate",
    TALK.replace("A dog.", " "): "an empty answer", TALK.replace("Where is it?", ""): "an empty question",
    TALK.replace("A dog.", "<image> A dog."): "<image> in a turn",
    TALK.replace("A dog.", "The caption says a dog."): "a turn names its source",
    TALK.replace("A dog.", "In the bounding boxes, a dog."): "a turn names its source",
    TALK.replace("A dog.", "A dog at 0.10, 0.20."): "a turn names its source",
    TALK.replace("Where is it?", "What do the given sentences say?"): "a turn names its source",
    TALK.replace("A dog.", "I'm sorry, I do not know."): "the model refuses",
    "Question: What is it?\nAnswer: A dog.": "a wrong number of questions",
    "\n".join([TALK] * 5): "a wrong number of questions",
    TALK.replace("A dog.", "A dog. " * 150): "a wrong length of the answer",
    ("detail", "A dog."): "a wrong length of the answer", ("detail", THINK): "a description has turns",
    ("detail", LONG * 40): "a wrong length of the answer", ("reasoning", TALK): "a wrong number of questions",
    ("reasoning", "Question: Why is it so?\nAnswer: So."): "a wrong length of the answer"}


def test_bad_replies_have_their_reason():
    for said, reason in REPLIES.items():
        kind, text = said if isinstance(said, tuple) else ("conversation", said)
        with pytest.raises(BadSample) as e:
            read_reply(kind, text, "x")
        assert e.value.reason == reason, said
    for kind, text in GOOD.items():
        assert all(read_reply(kind, text, name)[0][1] for name in "abcdefghijklmnopqrstuvwxyz")
    assert read_reply("detail", LONG, "7")[0][0] == read_reply("detail", LONG + " More.", "7")[0][0]
    assert all(not SYSTEM.startswith(k.ask) and k.ask in prompt(n, "")[1]["content"] for n, k in KINDS.items())


# ---- the server -----------------------------------------------------------------------------------------------------

def test_failures_are_counted_and_retried(folder, capsys):
    """Each of ten faults once: the next try is good. Then three refusals of one row: it is listed."""
    def status(code, **headers):
        return code, {k.replace("_", "-"): v for k, v in headers.items()}, b'{"error": "busy"}'
    faults = [status(429, Retry_After="0"), status(500, Retry_After="0"), status(503, Retry_After="0"),
              b'{"choices": [{"message": {"content": "Ques', b"[]", reply("Question: x"), reply(""),
              reply(TALK, finish_reason="length"), reply(None, message={"refusal": "no"}),
              (200, {"Content-Length": "999"}, reply(TALK))]
    answers = [a for fault in faults for a in (fault, TALK)] + [reply("Sorry, I cannot.")] * 3
    with fake(*answers) as server:
        made, failed = synth(folder, server, "--kinds=conversation", "--retries=2", rows=rows_of(12))
    assert [r["id"] for r in made] == [f"{i}_conversation" for i in (*range(10), 11)]
    assert failed == [{"id": "10_conversation", "reason": "the model refuses", "detail": "Sorry, I cannot."}]
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["requests"] - 1 == 2 * 10 + 3 + 1 == len(server.asked) and last["failed"] == {"the model refuses": 1}
    assert last["rejected"] == {"the model refuses": 4, "status 429": 1, "status 500": 1, "status 503": 1,
                                "the reply is not JSON": 1, "the reply has no message": 1, "the reply is empty": 1,
                                "questions and answers do not alternate": 1, "the reply is cut at max_tokens": 1,
                                "the reply is cut off": 1}
    assert [b["seed"] for b in server.asked[:4]] == [0, 1, 0, 1]


def test_a_bad_request_is_not_repeated(folder):
    with fake((400, {}, b"too long"), (413, {}, b"")) as server:
        made, failed = synth(folder, server, "--kinds=detail", rows=rows_of(3))
    assert len(server.asked) == 3 and [(f["reason"], f["detail"]) for f in failed] == [("status 400", "too long"),
                                                                                 ("status 413", "")]
    assert [r["id"] for r in made] == ["2_detail"]


def test_waiting_is_as_the_server_says(monkeypatch, folder):
    """Retry-After in seconds or as a date, and without it 1, 2, 4 ... seconds. Too long a wait is a failure."""
    holds = []
    monkeypatch.setattr(Endpoint, "hold", lambda self, seconds: holds.append(seconds))
    answers = [(429, {"Retry-After": "7"}, b""), (429, {"Retry-After": formatdate(time.time() + 30, usegmt=True)}, b""),
               (500, {}, b""), (502, {"Retry-After": "soon"}, b""), TALK, (429, {"Retry-After": "86400"}, b"")]
    with fake(*answers) as server:
        made, failed = synth(folder, server, "--kinds=conversation", "--retries=5", rows=rows_of(2))
    assert holds[0] == 7 and 27 < holds[1] <= 30 and holds[2:] == [4, 8] and len(made) == 1
    assert failed[0]["reason"] == "status 429" and len(server.asked) == 6
    assert retry_after("-5") is None and retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_hold_delays_all_requests():
    with fake() as server:
        endpoint = Endpoint(server.url)
        endpoint.hold(0.3)
        began = time.monotonic()
        endpoint.ask("toy", prompt("detail", ""))
        assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("workers", [1, 4])
def test_requests_keep_their_pace(folder, workers, monkeypatch):
    """The clock stands still: the request for the names of models and six others wait 0.05 s longer each."""
    waits = []
    monkeypatch.setattr(curate_client, "time", SimpleNamespace(monotonic=lambda: 100.0, sleep=waits.append))
    with fake() as server:
        made, _ = synth(folder, server, "--kinds=detail", "--per_minute=1200", f"--workers={workers}", rows=rows_of(6))
    assert sorted(waits) == pytest.approx([0.05 * i for i in range(7)], abs=1e-9)
    assert [r["id"] for r in made] == [f"{i}_detail" for i in range(6)], "in the order of the file"


def test_a_dead_server_stops_the_run(folder, monkeypatch):
    monkeypatch.setattr(curate_synth, "STREAK", 3)
    with fake(*[(500, {"Retry-After": "0"}, b"")] * 20) as server:
        line = error(synth, folder, server, "--kinds=detail", "--retries=1", "--model_name=m", rows=rows_of(9))
    assert line.startswith("3 failures one after another") and len(server.asked) == 6
    with pytest.raises(Failed, match="no reply"):
        Endpoint(server.url, timeout=0.2).ask("m", [])          # the server has been stopped


# ---- going on -------------------------------------------------------------------------------------------------------

def test_a_killed_run_goes_on(folder, capsys):
    with fake() as server:
        made, _ = synth(folder, server, rows=rows_of(3))
        file = folder / "made.jsonl"
        whole = file.read_bytes()
        file.write_bytes(whole[: whole.index(b"\n", whole.index(b"1_detail")) + 30])     # half of a line is left
        server.asked.clear()
        again, _ = synth(folder, server)
        assert again == made and len(server.asked) == 4 and file.read_bytes() == whole
        server.asked.clear()
        assert synth(folder, server)[0] == made and not server.asked
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["already"] == 9
        file.write_text('{"no": "id"}\n')
        assert "line 1: no row that this program wrote" in error(synth, folder, server)


def test_unusable_rows_are_listed(folder):
    rows = [*rows_of(1), rows_of(1)[0], {"id": 5, "image": "gone.png", "caption": "x"}, {"id": 6, "caption": "x"}]
    with fake() as server:
        made, failed = synth(folder, server, "--kinds=detail", rows=rows)
    assert [(f["id"], f["reason"]) for f in failed] == [
        ("0", "the id of an earlier row"), ("5", "image is missing"), ("6", "a row needs one image and a caption")]
    assert len(made) == 1


# ---- the key --------------------------------------------------------------------------------------------------------

def test_the_key_is_in_no_file_or_message(folder, monkeypatch, capfd):
    """A server that sends the key back, in an answer and in errors"""
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    echo = [(500, {"Retry-After": "0"}, KEY.encode()), (400, {}, f"bad key {KEY}".encode()), reply(f"I am sorry {KEY}"),
            b'{"x": ' + KEY.encode(), json.dumps({"error": KEY}).encode(), LONG + KEY]
    with fake(*echo) as server:
        synth(folder, server, "--kinds=detail", "--retries=0", "--key_env=MY_KEY", rows=rows_of(6))
        assert set(server.keys) == {f"Bearer {KEY}"} and len(server.keys) == 6
        assert "(key)" in (folder / "made.jsonl").read_text() and "(key)" in (folder / "made_failed.jsonl").read_text()
        for code in (401, 403, 302):
            server.answers = [(code, {"Location": "http://127.0.0.1:9/steal"}, KEY.encode())]
            line = error(synth, folder, server, "--kinds=reasoning", "--key_env=MY_KEY")
            assert f"status {code}" in line and KEY not in line
    seen = capfd.readouterr()
    assert KEY not in seen.out + seen.err
    files = [p for p in folder.iterdir() if p.suffix == ".jsonl"]
    assert len(files) == 3 and not any(KEY in p.read_text() for p in files)


def test_the_key_goes_nowhere_else(folder, monkeypatch):
    assert "use https" in error(Endpoint, "http://example.org/v1", KEY)
    assert Endpoint("https://example.org/v1/", KEY).url == "https://example.org/v1"
    for url in ("ftp://x/v1", "http://me:secret@127.0.0.1/v1", "http://127.0.0.1/v1?key=secret", "127.0.0.1:8000/v1"):
        assert "secret" not in error(Endpoint, url)
    line = error(Endpoint, "https://example.org/v1", KEY + "\r\nX: y")
    assert "a character that a key cannot have" in line and KEY not in line
    monkeypatch.delenv("NO_KEY", raising=False)
    with fake() as server:
        assert "NO_KEY: this environment variable" in error(synth, folder, server, "--key_env=NO_KEY", rows=rows_of(1))
    assert not server.asked
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with fake(b"{}") as server, fake(b"{}") as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert Endpoint(server.url, KEY).call("/chat/completions", {}) == {}
        assert server.keys == [f"Bearer {KEY}"] and not proxy.keys


def test_our_own_server_is_asked(folder, bytes_folder):
    """tools/serve.py takes the requests; a random model gives no good answer"""
    from test_read_again import tiny_chat
    from test_serve import running
    chat = tiny_chat(Tokenizer(bytes_folder), max_position_embeddings=2000, vocab_size=700)
    with running(chat, max_new_tokens=4) as server:
        server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        made, failed = synth(folder, server, "--retries=0", "--max_tokens=3", "--kinds=conversation", rows=[
            {"id": 0, "image": "dog.png", "caption": "x"}])
    assert not made and failed[0]["reason"] in ("the reply is cut at max_tokens", "the reply is empty",
                                              "text before the first question")


def test_wrong_commands_are_one_line(capsys, tmp_path):
    assert "usage" in error(curate.main, []) and "usage" in error(curate.main, ["sift"])
    curate.main(["--help"])
    assert "curate synth FILE" in capsys.readouterr().out
    assert "none of conversation" in error(curate.main, ["synth", "x", "--out=y", "--kinds=poem"])
    assert "each kind once" in error(curate.main, ["synth", "x", "--out=y", "--kinds=detail,reasoning,detail"])
    rows = tmp_path / "x.jsonl"
    rows.write_text('{"id": 1}\n')
    assert "is the data itself" in error(curate.main, ["synth", str(rows), "--out=y", f"--failed={rows}"])
    assert rows.read_text() == '{"id": 1}\n'
