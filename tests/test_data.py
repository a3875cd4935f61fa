"""Files -> rows -> steps -> streams: no sample is lost, doubled or mixed with another."""

import gc
import json
import pickle
import re
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, example, fork
from PIL import Image

import data
from config import BadSample, Error
from data import Encoder, Steps, best_fit, pack, share_out
from formats.rows import Rows, conversation, open_mixture
from formats.tokenizer import Tokenizer
from images import ImageSpec, Layout
from kernels.cross_entropy import IGNORE
from run.loader import loader
from run.validate import level

I, Q, S = 3, 4, 8  # conftest's <image>; a short image; a small side
ROW = {"id": 1, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


def write(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


def colour(i):
    """A colour that names sample i, and that no rounding takes for another's."""
    return (i % 5 * 60, i // 5 % 5 * 60, i // 25 * 60)


@pytest.fixture
def world(tmp_path, bytes_folder):
    """100 samples; every third without an image. -> a function that makes Steps"""
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(100):
        turns = [{"from": "human", "value": f"number {i} " + "long " * (i * 7 % 23)},
                 {"from": "gpt", "value": f"it is {i}."}]
        rows.append({"id": f"s{i}", "conversations": turns})
        if i % 3:
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            rows[-1]["image"] = f"{i}.png"
            Image.new("RGB", (9, 7), colour(i)).save(tmp_path / "images" / f"{i}.png")
    write(tmp_path / "a.json", rows)
    encode = Encoder(Tokenizer(bytes_folder), "vicuna_v1", Layout(I, Q), 120, "")

    def make(spec=str(tmp_path / "a.json"), batch_size=10, max_tokens=120, seed=0, rank=0, world=1):
        return Steps(spec, str(tmp_path / "images"), encode, ImageSpec(S, "squash"), batch_size, max_tokens, seed,
                     rank, world)
    make.folder, make.rows, make.encode = tmp_path, rows, encode
    return make


def documents(batch):
    """The packed documents of a batch, each with its images: [(ids, labels, images)]"""
    starts = [n for n in range(len(batch.ids)) if batch.pos[n] == 0] + [len(batch.ids)]
    out, image = [], 0
    for a, b in zip(starts, starts[1:]):
        n = int((batch.ids[a:b] == I).sum()) // Q
        out.append((batch.ids[a:b], batch.labels[a:b], batch.images[image:image + n]))
        image += n
    assert image == len(batch.images)
    return out


def number(steps, ids):
    return int(re.search(r"number (\d+)", steps.encode.tok.decode(ids.tolist()))[1])


# ---- rows -----------------------------------------------------------------------------------------------------------

GOOD = json.dumps(ROW)


@pytest.mark.parametrize("text", [
    f"[{GOOD},{GOOD}]", f"{GOOD}\n{GOOD}", f"{GOOD}\n\n  \n{GOOD}\n", f"{GOOD}\r\n{GOOD}\r\n", f"\ufeff{GOOD}\n{GOOD}",
    f"\ufeff[{GOOD},{GOOD}]", f" \n\t[\n{GOOD}\n,\n{GOOD}]\n", "\n" * 100 + f"{GOOD}\n{GOOD}",
    json.dumps([ROW, ROW], indent=4)])
def test_json_and_jsonl_are_read_alike(tmp_path, text):
    (tmp_path / "x").write_bytes(text.encode())
    rows = Rows(tmp_path / "x")
    assert [rows[i] for i in range(len(rows))] == [ROW, ROW]


@pytest.mark.parametrize("text, message", [
    (b"", "is empty"), (b"\n \n", "neither a json list"), (b"\xef\xbb\xbf", "neither a json list"),
    (b"[]", "holds no samples"), (b"[ ]\n", "holds no samples"), (b"5", "neither a json list"),
    (b'"rows"', "neither a json list"), (b"null", "neither a json list"), (b"true", "neither a json list"),
    (b'{\n  "a": 1\n}', "neither a json list"), (b"id,image\n1,2", "pandas converts"),
    (b"[{'id': 1}]", "line 1 column 3"), (f"[{GOOD},]".encode(), r"line 1 column \d+"),
    (f"[{GOOD},\n{GOOD[:-9]}".encode(), r"cut off\?\): .*line 2 column \d+"),
    (f"[{GOOD}]\n[{GOOD}]".encode(), "Extra data"), (f'[{GOOD}, {{"id": NaN}}]'.encode(), "sample 1: NaN is not JSON"),
    (b'[{"id": 1, "id": 2}]', "sample 0: duplicate key 'id'"), (b"[" * 100_000, "sample 0: .*recursion"),
    (b"[" + b"9" * 5000 + b"]", "limit"), (f"[{GOOD},".encode() + b"\xff]", f"position {len(GOOD) + 2}:"),
    (f"[,{GOOD}]".encode(), "line 1 column 2"),
    (f"[{GOOD}]".encode("utf-16"), "neither a json list"), (bytes(100), "neither a json list"),
    (b"\x1f\x8b\x08" + bytes(50), "neither a json list"), (f"{GOOD},\n{GOOD}".encode(), "neither a json list"),
    *((json.dumps(about | {"data": [ROW, ROW]}, indent=n).encode(),
       r"one object.* the list 'data'.*json.load\(open\('.*x.json'\)\)\['data'\]")
      for about in ({}, {"version": 1, "info": {"n": 2}}, {"list": [1, {"a": 2}]}) for n in (None, 2)),
    (json.dumps({"data": [{"meta": {"n": 1}, **ROW}]}).encode(), "the list 'data'"),
    (json.dumps({"rows": [{"id": 1, "images": ["a"], "messages": [{}]}]}).encode(), "the list 'rows'"),
    (b'{"annotations": [{"image_id": 1, "caption": "A cat."}]}', "the list 'annotations'")])
def test_another_kind_of_file_stops_with_one_line(tmp_path, text, message):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(Error, match=message) as e:
        Rows(tmp_path / "x.json")
    assert "x.json" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("row", [
    ROW, {**ROW, "pairs": [{"question": "?"}]}, {"text": "a"}, {"id": 1, "pairs": [{"a": 1}], "caption": "A cat."},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    {"id": 1, "texts": [{"user": "?", "assistant": "!"}]}, {"data": json.dumps([ROW])},
    {"ocr": [{"text": "STOP"}], **ROW}, {"regions": [{"caption": "a"}], "image": "a", "caption": "b"},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "chosen": "b", "rejected": "c"}])
def test_one_row_is_no_list_of_samples(tmp_path, row):
    (tmp_path / "x").write_text(json.dumps(row))
    assert [*Rows(tmp_path / "x")] == [row]


def test_a_missing_file_stops_with_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(Error, match="no data file"):
            Rows(path)


@pytest.mark.parametrize("name", ["a:b.jsonl", "a,b.jsonl"])
def test_a_name_that_means_a_mixture_is_refused(tmp_path, name):
    (tmp_path / name).write_text(GOOD)
    with pytest.raises(Error, match="a comma or a colon in a name is read as a list of files or as a share: rename"):
        open_mixture(str(tmp_path / name))


@pytest.mark.parametrize("line, reason", [
    (GOOD[:-5], "not JSON"), ('{"id": NaN}', "not JSON"), ('{"id": 1, "id": 1}', "not JSON"), ("{'id': 1}", "not JSON"),
    (GOOD + ",", "not JSON"), ('{"id": ' + "9" * 5000 + "}", "not JSON"), ('{"a":' * 100_000, "not JSON"),
    ("[1]", "not an object"), ("5", "not an object"), ("null", "not an object"), ('"s"', "not an object"),
    ("\x00", "not JSON")])
def test_a_bad_line_costs_one_sample(tmp_path, line, reason):
    (tmp_path / "x.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    rows = Rows(tmp_path / "x.jsonl")
    assert len(rows) == 3 and rows[0] == rows[2] == ROW
    with pytest.raises(BadSample) as e:
        rows[1]
    assert e.value.reason == reason


def test_bytes_that_are_not_utf8_cost_one_sample(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(GOOD.encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(BadSample, match="not JSON"):
        Rows(tmp_path / "x.jsonl")[1]


def test_a_long_blank_line_takes_linear_time(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(GOOD.encode() + b"\n" + b" " * 5_000_000 + b"\n" + GOOD.encode())
    began = time.process_time()
    assert len(Rows(tmp_path / "x.jsonl")) == 2
    assert time.process_time() - began < 60  # seconds of CPU: 0.01 here, some hours if it were quadratic


@pytest.mark.parametrize("text", [f"[{GOOD},{GOOD}]", f"{GOOD}\n{GOOD}\n"])
def test_a_file_that_shrinks_costs_samples_only(tmp_path, text):
    (tmp_path / "x").write_text(text + " " * 20_000)

    def rank(_):
        rows = Rows(tmp_path / "x")
        (tmp_path / "x").write_text(text[:-len(GOOD) // 2])
        with pytest.raises(BadSample, match="has become shorter"):
            rows[1]
        return rows[0]
    assert fork(1, rank, tmp_path) == [ROW]


def test_a_json_list_is_split_into_its_values(tmp_path):
    """And where it is broken, line and column are those that json itself finds in the whole text."""
    rows = [0.5, -1.5e-3, 12, "x", None, *({"id": i, "text": "é👩" * (i % 5) + "[{,\\\"" * (i % 3),
                                            "more": [[], {"a": 1.5e3}]} for i in range(20))]
    for indent, ascii in ((None, True), (None, False), (3, False)):
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
        (tmp_path / "x").write_text(text, "utf-8")
        read = Rows(tmp_path / "x")
        assert [json.loads(read.blob[a:b]) for a, b in read.spans] == rows
        no_comma = text.replace("}, {", "} {").replace("},\n", "}\n")
        for broken in (text[:-1], text[: len(text) // 2], no_comma, text + "]"):
            with pytest.raises(json.JSONDecodeError) as e:
                json.loads(broken)
            (tmp_path / "x").write_text(broken, "utf-8")
            with pytest.raises(Error, match="line [0-9]+ column [0-9]+ ") as stopped:
                Rows(tmp_path / "x")
            assert f"line {e.value.lineno} " in str(stopped.value)


def test_reading_a_json_list_needs_its_text_once(tmp_path):
    rows = [{**ROW, "id": i, "more": "x" * 2000} for i in range(2000)]            # 4 MB
    (tmp_path / "x").write_text(json.dumps(rows))
    tracemalloc.start()
    try:
        assert len(Rows(tmp_path / "x")) == 2000
        assert tracemalloc.get_traced_memory()[1] < 1.4 * (tmp_path / "x").stat().st_size
    finally:
        tracemalloc.stop()


def test_rows_and_steps_can_be_pickled(world):
    steps = pickle.loads(pickle.dumps(world()))
    assert steps.files[0][7] == world.rows[7] and steps.samples(3) == world().samples(3)


# ---- dialogues ------------------------------------------------------------------------------------------------------

def dialogue(*turns):
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


H, G = ("human", "q"), ("gpt", "a")
COUNT = "not as many <image> markers as images"
FIXTURES = {  # A13: each has one stated outcome
    "starts with gpt": (dialogue(G, H, G), "an answer without a question"),
    "two humans in a row": (dialogue(H, H, G), "two questions in a row"),
    "two gpts in a row": (dialogue(H, G, G), "an answer without a question"),
    "ends with a human": (dialogue(H, G, H), "the last question has no answer"),
    "empty answer": (dialogue(H, ("gpt", " \n")), "an empty answer"),
    "unknown role": (dialogue(H, ("bing", "a")), "unknown speaker"),
    "system in the middle": (dialogue(H, G, ("system", "s"), H, G), "unknown speaker"),
    "system alone": (dialogue(("system", "s")), "the last question has no answer"),
    "role is a list": ({"conversations": [{"from": ["human"], "value": "q"}]}, "unknown speaker"),
    "missing value": ({"conversations": [{"from": "human"}]}, "a turn has no text"),
    "value is a number": (dialogue(H, ("gpt", 5)), "a turn has no text"),
    "no parts": (dialogue(H, ("gpt", [])), "a turn has no text"),
    "unknown part": (dialogue(("human", [{"type": "tool", "text": "a"}]), G), "a turn has no text"),
    "video part": (dialogue(("human", [{"type": "video", "video": "x"}]), G), "video is not supported"),
    "video": ({**dialogue(("human", "<image>\nq"), G), "video": "x.mp4"}, "video is not supported"),
    "video marker": (dialogue(("human", "<video>\nq"), G), "video is not supported"),
    "audio marker": ({**dialogue(("human", "<image>\nq <audio>"), G), "image": "x"}, "audio is not supported"),
    "answer holds an image": (dialogue(H, ("gpt", [{"type": "image", "image": "x"}])), "an answer holds an image"),
    "system is a number": ({**dialogue(H, G), "system": 5}, "the system text is not a string"),
    "two system texts": ({**dialogue(("system", "s"), H, G), "system": "t"}, "two system texts"),
    "many images": ({**dialogue(H, G), "image": ["x"] * 257}, "too many images"),
    "turn is a string": ({"conversations": ["q", "a"]}, "a turn has no text"),
    "no conversations": ({"id": 1}, "no conversations"),
    "empty conversations": ({"conversations": []}, "no conversations"),
    "conversations is an object": ({"conversations": {}}, "no conversations"),
    "image is a number": ({**dialogue(H, G), "image": 5}, "image is neither a name nor a list of names"),
    "image is false": ({**dialogue(H, G), "image": False}, "image is neither a name nor a list of names"),
    "images are numbers": ({**dialogue(H, G), "image": [1]}, "image is neither a name nor a list of names"),
    "image without marker": ({**dialogue(H, G), "image": "x.png"}, COUNT),
    "marker without image": (dialogue(("human", "<image>\nq"), G), COUNT),
    "marker at the end without image": (dialogue(H, G, ("human", "q\n<image> "), G), COUNT),
    "image list is empty": ({**dialogue(("human", "<image>\nq"), G), "image": []}, COUNT),
    "three images, one marker": ({**dialogue(("human", "<image>\nq"), G), "image": ["a", "b", "c"]}, COUNT),
    "surrogate": (dialogue(H, ("gpt", "\ud800")), "a text holds a lone surrogate, which no encoding allows"),
    "too long": (dialogue(("human", "word " * 500), G), "the question is longer than max_len"),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_a_malformed_row_is_refused_with_its_reason(world, name):
    row, reason = FIXTURES[name]
    with pytest.raises(BadSample) as e:
        world.encode(row)
    assert e.value.reason == reason


def test_all_spellings_of_a_row_mean_the_same():
    turns = [("q", "a"), ("r", "b")]
    llava = dialogue(("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b"))
    openai = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                           {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]}
    for row in (llava, openai):
        for images in ({}, {"image": None}, {"image": []}, {"images": []}, {"image": ""}, {"images": [""]}):
            assert conversation(row | images) == (turns, [], None)
        for images in ({"image": "x"}, {"image": ["x"]}, {"images": ["x"]}):
            assert conversation(row | images) == (turns, ["x"], None)
    for row in (dialogue(("system", "s"), H, G), dialogue(H, G) | {"system": "s"},
                dialogue(("system", "s"), H, G) | {"system": "s"}):
        assert conversation(row) == ([("q", "a")], [], "s")
    assert conversation(dialogue(H, G) | {"system": ""}) == ([("q", "a")], [], None)


def test_content_parts_become_text_and_markers():
    """As OpenAI, transformers and Qwen write them: the row or the part names the image; tables fill up with null."""
    text = {"type": "text", "text": "q", "image": None}
    for parts, more in (([{"type": "image"}, text], {"images": ["x"]}),
                        ([{"type": "image", "text": None, "image": "x"}, text], {}),
                        ([{"type": "image", "path": "x"}, text], {"image": None})):
        row = {"messages": [{"role": "system", "content": [{"type": "text", "text": "s"}]},
                            {"role": "user", "content": parts},
                            {"role": "assistant", "content": [{"type": "text", "text": "a"}]}], **more}
        assert conversation(row) == ([("<image>\nq", "a")], ["x"], "s")
    two = [{"type": "image", "image": "x"}, {"type": "image", "image": "y"}, text]
    assert conversation(dialogue(("human", two), G)) == ([("<image>\n<image>\nq", "a")], ["x", "y"], None)


def test_a_marker_inside_a_sentence_is_text():
    turns, names, _ = conversation(dialogue(("human", "What do <image> and <video> mean in HTML?"), G))
    assert turns[0][0].count("<video>") == 1 and names == []


def test_a_rows_system_text_reaches_the_ids(world):
    """Its own turn or key goes before the encoder's; without one the encoder's is used."""
    encode = Encoder(world.encode.tok, "vicuna_v1", Layout(I, Q), 120, "default")

    def text(row):
        return encode.tok.decode(encode(row)[0])
    assert "own USER:" in text(dialogue(("system", "own"), H, G))
    assert "own USER:" in text(dialogue(H, G) | {"system": "own"})
    assert "default USER:" in text(dialogue(H, G)) and "default" not in text(dialogue(("system", "own"), H, G))


def test_ten_thousand_turns_are_cut_not_refused(world):
    ids, labels, names, cut = world.encode(dialogue(*[H, G] * 10_000))
    assert len(ids) == 120 and cut > 50_000


def test_one_row_cannot_cost_a_worker_much(world, tmp_path):
    """8 MB of text took 25 s and 1.2 GB, 100,000 images 0.9 GB. Both are refused before the tokenizer sees them."""
    (tmp_path / "x.jsonl").write_text(json.dumps(dialogue(H, ("gpt", "a " * 4_000_000))) + f"\n{GOOD}\n")
    rows = Rows(tmp_path / "x.jsonl")
    with pytest.raises(BadSample, match="a row is too large: 8,000,.* bytes, the limit is 8,000,000"):
        rows[0]
    assert rows[1] == ROW
    with pytest.raises(BadSample, match="far longer than max_len: 200,.* characters"):
        world.encode(dialogue(H, ("gpt", "a " * 100_000)))
    with pytest.raises(BadSample, match="too many images: 100,000, the limit is 256"):
        world.encode(dialogue(("human", "<image>" * 100_000), G) | {"image": ["x"] * 100_000})


# ---- order ----------------------------------------------------------------------------------------------------------

def test_every_epoch_has_every_sample_once(world):
    steps = world(batch_size=7)  # 7 does not divide 100: steps run over the edges of epochs
    drawn = [d for s in range(100) for d in steps.samples(s)]
    epochs = [drawn[e * 100:(e + 1) * 100] for e in range(7)]
    assert all(sorted(e) == [(0, i) for i in range(100)] for e in epochs)
    assert len({tuple(e) for e in epochs}) == 7


def test_the_order_depends_on_seed_and_step_alone(world):
    steps = world()
    wild = {s: steps.samples(s) for s in (13, 2, 99, 0, 13, 57)}
    assert all(world(max_tokens=1000).samples(s) == d for s, d in wild.items())
    assert world(seed=1).samples(0) != wild[0]
    assert world(batch_size=5).samples(26) + world(batch_size=5).samples(27) == wild[13], "one order, cut elsewhere"


def test_the_mixture_of_files_follows_seed_and_epoch(world, tmp_path):
    """Not only the order within each file: which file comes when."""
    small = write(tmp_path / "b.json", [{**ROW, "id": i} for i in range(10)])
    files = [[f for s in range(11) for f, _ in world(f"{tmp_path / 'a.json'},{small}", seed=seed).samples(s + first)]
             for seed, first in ((0, 0), (0, 0), (1, 0), (0, 11))]
    assert files[0] == files[1] and all(sum(f) == 10 for f in files)
    assert files[0] != files[2] and files[0] != files[3]


def test_a_step_may_be_larger_than_the_data(world):
    steps = world(batch_size=250)
    assert Counter(steps.samples(0) + steps.samples(1)) == {(0, i): 5 for i in range(100)}


def test_files_are_mixed_by_weight(world, tmp_path):
    small = write(tmp_path / "b.json", [{**ROW, "id": i} for i in range(10)])
    steps = world(f"{tmp_path / 'a.json'}:0.75,{small}:0.25", batch_size=1)
    assert steps.total == 110
    drawn = [steps.samples(s)[0] for s in range(1100)]
    of = [[i for f, i in drawn if f == k] for k in (0, 1)]
    assert len(of[1]) == pytest.approx(275, abs=5)  # a quarter, rounded once per epoch
    assert Counter(of[1]).keys() == set(range(10)) and max(Counter(of[1]).values()) - min(Counter(of[1]).values()) <= 2
    assert Counter(of[0]).most_common()[0][1] - Counter(of[0]).most_common()[-1][1] <= 2
    assert len({tuple(f for f, _ in drawn[e * 110:(e + 1) * 110]) for e in range(10)}) == 10, "files alternate anew"
    half = world(f"{tmp_path / 'a.json'}:50,{small}:60", batch_size=110)  # an epoch is half of a, six times b
    seen = [{i for f, i in half.samples(e) if f == 0} for e in range(4)]
    assert seen[0] | seen[1] == seen[2] | seen[3] == set(range(100)) and seen[0] != seen[2], "shuffled for every lap"
    for share in (f"{tmp_path / 'a.json'},{small}", f"{small},{tmp_path / 'a.json'}"):
        assert len(set(sum((world(share).samples(s) for s in range(11)), []))) == 110
    assert {f for s in range(11) for f, _ in world(f"{tmp_path / 'a.json'}:1,{small}:0").samples(s)} == {0}


@pytest.mark.parametrize("kwargs, message", [
    (dict(spec="{a}:x"), "needs a share after a colon"), (dict(spec="{a}:0"), "needs a share"),
    (dict(spec="{a}:-1,{a}:2"), "needs a share"), (dict(spec="{a}:nan"), "needs a share"),
    (dict(spec="{a}:inf"), "needs a share"), (dict(spec="{a}:1:0"), "weight of its loss, above 0"),
    (dict(spec="{a}:1:x"), "weight of its loss"), (dict(spec="{a}:1:inf"), "weight of its loss"),
    (dict(spec="{a}:1:-1"), "weight of its loss"), (dict(spec="{a}:1:2:3"), "weight of its loss"),
    (dict(spec="{a}:0.7,{a}"), "or none does"),
    (dict(spec="{a},"), "no data file"), (dict(spec=""), "no data file"),
    (dict(max_tokens=119), "max_tokens=119 is less than max_len=120")])
def test_an_impossible_setting_stops_with_one_line(world, kwargs, message):
    kwargs = {k: v.format(a=world.folder / "a.json") if k == "spec" else v for k, v in kwargs.items()}
    with pytest.raises(Error, match=message):
        world(**kwargs)


def test_a_template_that_does_not_fit_stops(bytes_folder):
    tok = Tokenizer(bytes_folder)
    tok.eos = None
    with pytest.raises(Error, match="needs a BOS and an EOS token"):
        Encoder(tok, "vicuna_v1", Layout(I, Q), 100)


# ---- steps ----------------------------------------------------------------------------------------------------------

def canonical(steps, micro):
    return sorted((number(steps, ids), ids.tolist(), labels.tolist(), images.tolist())
                  for batch in micro for ids, labels, images in documents(batch))


def levelled(steps, parts):
    """-> the StepData of all ranks after run.validate.level"""
    counts = [len(p.micro) for p in parts]
    world = [SimpleNamespace(rank=r, size=len(parts), sum=lambda _: counts) for r in range(len(parts))]
    return [next(level(*x)) for x in zip(steps, [[p] for p in parts], world)]


@pytest.mark.parametrize("size, max_tokens", [(1, 120), (2, 300), (3, 120), (4, 10_000)])
def test_ranks_and_stream_length_change_no_sample(world, size, max_tokens):
    ref = world(max_tokens=10_000)
    for step in (0, 9):
        parts = [world(max_tokens=max_tokens, rank=r, world=size)[step] for r in range(size)]
        level_parts = levelled([world(rank=r, world=size) for r in range(size)], parts)
        assert len({len(p.micro) for p in level_parts}) == 1, "as many micro-batches on every rank"
        assert [b for p in level_parts for b in p.micro if len(b.ids)] == [b for p in parts for b in p.micro]
        assert all(len(b.ids) <= max_tokens for p in parts for b in p.micro)
        assert canonical(ref, [b for p in parts for b in p.micro]) == canonical(ref, ref[step].micro)
        assert sorted(n for p in parts for n in p.names) == sorted(ref[step].names) and len(ref[step].names) == 10


def test_the_number_of_workers_changes_no_step(world):
    order = [3, 0, 7, 7, 1]
    for a, b in zip(loader(world(), order, 0), loader(world(), order, 2), strict=True):
        assert a.names == b.names and a.dropped == b.dropped
        assert all(torch.equal(x, y) for m, n in zip(a.micro, b.micro, strict=True) for x, y in zip(m, n))


def test_copies_to_a_gpu_use_pinned_memory(world, monkeypatch):
    """Two ways: the loader's thread pins a step, with everything else in it as it was; Batch.to pins what is not."""
    from torch.utils.data._utils.pin_memory import pin_memory
    pinned, step = [], world()[0]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t, *_: pinned.append(t.data_ptr()) or t.clone())
    again = pin_memory(step)
    assert type(again) is type(step) and all(type(b) is data.Batch for b in again.micro) and step.micro
    assert again[1:] == step[1:] and len(pinned) == sum(map(len, step.micro))
    assert all(torch.equal(x, y) for m, n in zip(step.micro, again.micro, strict=True) for x, y in zip(m, n))
    where = []
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *device, non_blocking: where.append((*device, non_blocking)) or t)
    del pinned[:]
    on = step.micro[0].to("cuda")
    assert where == [("cuda", True)] * len(on) and len(pinned) == len(on)
    assert torch.equal(on.rows, (on.labels != -100).nonzero()[:, 0]) and len(on.rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_dropouts_generator_alone(world, workers):
    before = torch.get_rng_state()
    list(loader(world(), [0, 1], workers))
    assert torch.equal(torch.get_rng_state(), before)


def corrupt(world, numbers):
    for i in numbers:
        (world.folder / "images" / f"{i}.png").write_bytes(b"<html>")


def test_broken_images_shift_no_other_image(world):
    broken = {1, 10, 22, 34, 46, 58, 70, 82, 94, 98}
    corrupt(world, broken)
    seen = set()
    for step in range(10):
        parts = [world(max_tokens=300, rank=r, world=2)[step] for r in range(2)]
        for part in parts:
            for batch in part.micro:
                for ids, labels, images in documents(batch):
                    i = number(world(), ids)
                    seen.add(i)
                    assert f"it is {i}." in world.encode.tok.decode(labels[labels >= 0].tolist())
                    assert len(images) == (i % 3 > 0)
                    assert (images == torch.tensor(colour(i))[:, None, None]).all()
    assert seen == set(range(100)) - broken


def test_images_of_a_sample_keep_their_order(world):
    numbers = [70, 4, 98, 1]
    world.rows[0] = {"id": 0, "image": [f"{i}.png" for i in numbers], "conversations": [
        {"from": "human", "value": "<image><image> number 0"}, {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "<image> and <image>"}, {"from": "gpt", "value": "no"}]}
    write(world.folder / "a.json", world.rows)
    steps = world()
    step = next(s for s in range(10) if (0, 0) in steps.samples(s))
    found, = [images for batch in steps[step].micro for ids, _, images in documents(batch) if number(steps, ids) == 0]
    assert (found == torch.tensor([colour(i) for i in numbers])[..., None, None]).all()


def test_every_dropped_sample_is_counted_once(world):
    corrupt(world, [1, 2])
    (world.folder / "images" / "4.png").unlink()
    world.rows[5]["image"] = "../secret.png"
    world.rows[6]["conversations"].reverse()
    world.rows[7]["conversations"][0]["value"] = "no marker"
    world.rows[9]["conversations"][0]["value"] = "long " * 200
    write(world.folder / "a.json", world.rows)
    for size in (1, 2, 4):
        parts = [world(rank=r, world=size)[s] for r in range(size) for s in range(10)]
        assert sum(len(p.names) for p in parts) == 93 and sum(p.truncated for p in parts) == 0
        dropped = sorted(d for p in parts for d in p.dropped)
        assert dropped == [
            ("a.json[1] id='s1'", "image cannot be read: '1.png' (UnidentifiedImageError)"),
            ("a.json[2] id='s2'", "image cannot be read: '2.png' (UnidentifiedImageError)"),
            ("a.json[4] id='s4'", "image is missing: '4.png'"),
            ("a.json[5] id='s5'", "image lies outside the image folder: '../secret.png'"),
            ("a.json[6] id='s6'", "an answer without a question: turn 0"),
            ("a.json[7] id='s7'", "not as many <image> markers as images: 1 image(s) but 0 marker(s)"),
            ("a.json[9] id='s9'", "the question is longer than max_len: 805 tokens before the answer, max_len=120")]


def test_truncated_samples_are_counted_and_lose_images(world):
    world.rows[0] = {"id": 0, "image": ["1.png", "2.png"], "conversations": [
        {"from": "human", "value": "<image>\nnumber 0"}, {"from": "gpt", "value": "it is 0."},
        {"from": "human", "value": "and <image> " + "long " * 200}, {"from": "gpt", "value": "never seen"}]}
    write(world.folder / "a.json", world.rows)
    ids, labels, names, cut = world.encode(world.rows[0])
    assert len(ids) == 120 and cut > 0 and names == ["1.png", "2.png"] and ids.count(I) == 2 * Q
    for size in (1, 4):
        assert sum(world(rank=r, world=size)[s].truncated for r in range(size) for s in range(10)) == 1
    short = Encoder(world.encode.tok, "vicuna_v1", Layout(I, Q), ids.index(I, ids.index(I) + Q) + Q - 1, "")
    ids, labels, names, cut = short(world.rows[0])
    assert names == ["1.png"] and ids.count(I) == Q


def test_a_step_of_bad_samples_is_empty(world, tmp_path):
    bad = write(tmp_path / "bad.json", [{"id": "\ud800", "conversations": "\ud800"}] * 3)
    step = world(bad, batch_size=3)[0]
    assert sum(len(b.ids) for b in step.micro) == 0 and len(step.dropped) == 3
    str(step.dropped).encode("utf-8"), "whatever the row holds, its name can be printed"


ENDINGS = """
import json, multiprocessing, os, select, signal, sys, time
import torch
from run.loader import loader

torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 1000       # s between torch's own looks at the trainer

class Slow(torch.utils.data.Dataset):
    def __getitem__(self, step):
        time.sleep(0.01)
        return step

def train(how, workers):
    got = []
    batches = loader(Slow(), range(1000), workers)
    for step in range(100):
        assert next(batches) == step
        loaders = [p.pid for p in multiprocessing.active_children()]
        assert len(loaders) == workers
        if step == 3 and how == "exception":
            raise RuntimeError("a trainer's own")
        if step == 3 and how == "loader killed":
            os.kill(loaders[0], signal.SIGKILL)
        if step == 3 and how == "trainer interrupted":
            signal.signal(signal.SIGINT, signal.default_int_handler)         # a shell may have started us to ignore it
            os.kill(os.getpid(), signal.SIGINT)
        if step == 3 and how == "trainer killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 3 and how == "signals to all":
            for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(name, lambda number, frame: got.append(number))
                os.killpg(0, name)

for how, workers in json.loads(sys.argv[1]):
    alive, end = os.pipe()                                     # the trainer and its loaders hold its other end
    trainer = os.fork()
    if not trainer:
        os.setpgrp()
        train(how, workers)
        sys.exit()
    os.close(end)
    gone = bool(select.select([alive], [], [], 60)[0])
    if not gone:
        os.killpg(trainer, signal.SIGKILL)
    print(gone, os.waitstatus_to_exitcode(os.waitpid(trainer, 0)[1]), flush=True)
"""


def test_however_a_trainer_ends_its_loaders_end():
    endings = [(how, 2) for how in ("exception", "loader killed", "trainer killed", "trainer interrupted",
                                    "signals to all")]
    codes = {"trainer killed": -9, "trainer interrupted": -2, "signals to all": 0}
    done = subprocess.run([sys.executable, "-c", ENDINGS, json.dumps(endings)], cwd=ROOT, capture_output=True,
                          text=True)
    ended = [line.split() for line in done.stdout.splitlines()]
    assert ended == [["True", str(codes.get(how, 1))] for how, _ in endings], done.stderr
    assert done.stderr.count("RuntimeError: a trainer's own") == 1
    assert done.stderr.count("RuntimeError: DataLoader worker (pid") >= 1


@pytest.mark.parametrize("broken", [ConnectionResetError(104, "reset by peer"), EOFError()])
def test_a_broken_connection_is_reported_as_worker_death(broken, monkeypatch):
    def batches(*args, **how):
        yield 1
        raise broken
    monkeypatch.setattr(torch.utils.data, "DataLoader", batches)
    got = loader(None, [0, 1], 0)
    assert next(got) == 1
    with pytest.raises(RuntimeError, match="DataLoader worker exited unexpectedly"):
        next(got)


class Objects(Rows):
    def __init__(self, file):
        super().__init__(file)
        self.rows = [json.loads(self.blob[a:b]) for a, b in self.spans]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_no_process_holds_a_copy_of_the_data(name, tmp_path):
    """A worker shares what its parent has mapped. Objects would be copied: reading one writes its reference count."""
    lines = [json.dumps({**ROW, "id": i, "more": [{"from": "human", "value": "q"}] * 100}) for i in range(300)]
    file = tmp_path / name
    file.write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]")

    def held(kind):
        """Bytes of Python objects and arrays that stay after all rows were read, as a share of the file"""
        gc.collect()
        tracemalloc.start()
        rows = kind(file)
        for i in range(len(rows)):
            rows[i]
        gc.collect()
        share = tracemalloc.get_traced_memory()[0] / file.stat().st_size
        tracemalloc.stop()
        return share
    assert held(Rows) < 0.05 and held(Objects) > 1


# ---- packing --------------------------------------------------------------------------------------------------------

def test_a_packed_stream_keeps_its_samples_apart():
    made = [example(0, images=1), example(1, images=0, text=1, answer=1), example(2, images=3), example(3, images=0)]
    b, at, image = pack(made, 8), 0, 0
    for ids, labels, images in made:
        end = at + len(ids)
        assert b.ids[at:end].tolist() == ids and b.pos[at:end].tolist() == list(range(len(ids)))
        assert b.labels[at:end].tolist() == labels[1:] + [IGNORE], "a document's last token predicts nothing"
        assert b.lo[at:end].tolist() == [at] * len(ids) and b.hi[at:end].tolist() == list(range(at + 1, end + 1))
        assert torch.equal(b.images[image:image + len(images)], images)
        at, image = end, image + len(images)
    assert at == len(b.ids) and image == len(b.images)
    assert int((b.labels >= 0).sum()) == sum(int((pack([m], 8).labels >= 0).sum()) for m in made)
    dtypes = [torch.int64] * 3 + [torch.int32] * 2 + [torch.uint8, torch.float32, torch.int64]
    assert [t.dtype for t in b] == dtypes


def test_the_first_token_is_never_supervised(bytes_folder, tmp_path):
    """No token comes before it and could predict it. Here: a tokenizer without BOS, no image."""
    for f in ("tokenizer.json", "tokenizer_config.json"):
        text = (bytes_folder / f).read_text("utf-8")
        (tmp_path / f).write_text(text if f == "tokenizer.json" else json.dumps({"eos_token": "</s>"}), "utf-8")
    encoder = Encoder(Tokenizer(tmp_path), "plain", Layout(3, 4), 1)
    with pytest.raises(BadSample, match="1 tokens before the answer, max_len=1"):
        encoder({"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "a cat"}]})
    ids, labels, _, _ = Encoder(encoder.tok, "plain", Layout(3, 4), 9)(
        {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "a cat"}]})
    assert labels == ids, "all is marked, the first token too"
    stream = pack([(ids, labels, [])] * 2, 8)
    n = len(ids)
    assert stream.labels.tolist() == ([*ids[1:], IGNORE]) * 2 and stream.labels[n - 1] == IGNORE


def test_no_samples_pack_into_an_empty_stream():
    b = pack([], 8)
    assert [t.dtype for t in b] == [t.dtype for t in pack([example(0)], 8)]
    assert [tuple(t.shape) for t in b] == [(0,)] * 5 + [(0, 3, 8, 8), (0,), (0,)]


@pytest.mark.parametrize("seed", range(8))
def test_ranks_share_the_work_and_streams_fill(seed):
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 1000, rng.integers(1, 200)).tolist()
    n, room = int(rng.integers(1, 9)), 1000
    groups = share_out(costs, n)
    assert len(groups) == n and sorted(sum(groups, [])) == list(range(len(costs)))
    loads = [sum(costs[i] for i in g) for g in groups]
    assert max(loads) - min(loads) <= max(costs), "no exchange of one sample could help the most loaded by more"
    for g in groups:
        streams = best_fit(g, costs, room)
        assert sorted(sum(streams, [])) == sorted(g) and all(0 < sum(costs[i] for i in s) <= room for s in streams)
        least = -(-sum(costs[i] for i in g) // room)
        assert len(streams) <= least * 1.7 + 1  # the bound of best fit, sorted or not, where `least` is the best
        sums = sorted(sum(costs[i] for i in s) for s in streams)
        assert len(sums) < 2 or sums[0] + sums[1] > room, "no two streams fit into one"


def test_ranks_share_images_as_well_as_tokens(world, monkeypatch):
    """Two samples with an image and two without, of equal length: by tokens alone one rank would get both images."""
    ids = [1] + [I] * Q + [9]

    class Encode:
        layout, max_len, reader = Layout(I, Q), 120, None

        def __call__(self, row, size):
            return (ids, [IGNORE, *ids[1:]], [row["image"]], 0) if "image" in row else ([9] * len(ids), ids, [], 0)
    monkeypatch.setattr(Rows, "guess", lambda self, i: (2, 1) if i % 3 else (2 + Q, 0))
    for order in ([1, 3, 2, 6], [3, 1, 6, 2], [1, 2, 3, 6]):                     # images: all that 3 does not divide
        counts = []
        for rank in range(2):
            steps = world(batch_size=4, rank=rank, world=2)
            steps.encode, steps.samples = Encode(), lambda step: [(0, i) for i in order]
            steps.rates = [(1024, 1024 * Q)]
            counts.append(sum(len(b.images) for b in steps[0].micro))
        assert counts == [1, 1], order


def test_the_fullest_stream_with_room_comes_first():
    assert sorted(best_fit(range(5), [7, 6, 3, 2, 2], 10)) == [[0, 2], [1, 3, 4]]  # the emptiest first needs three


def test_a_sample_longer_than_a_stream_stays_alone():
    assert sorted(best_fit([0, 1, 2], [5, 50, 5], 10)) == [[0, 2], [1]] and best_fit([], [], 10) == []
