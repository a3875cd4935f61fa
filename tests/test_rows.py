"""Files of data in every form: json, parquet, tar, shards. The same rows, the same samples, one line for the rest."""

import base64
import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import random
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, fork
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import run, state

import formats.rows.index as kept
from config import BadSample, Error
from data import Encoder, Steps
from formats.image_files import load_image, safe_path
from formats.rows import Rows, conversation, open_mixture, open_rows
from formats.rows.lines import elements, line_spans
from formats.rows.shards import Shards
from formats.rows.tar import members, sum_of
from formats.tokenizer import Tokenizer
from images import ImageSpec, Layout
from run.loader import loader

NAMES = ["a.png", "b.png"]
TURNS = [("<image>\n<image>\nWhat is it?", "A cat."), ("And then?", "A dog.")]


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE = png("red"), png("blue")


def url(blob):
    return "data:image/png;base64," + base64.b64encode(blob).decode()


def turns_as(speaker, text, names=("human", "gpt"), turns=TURNS):
    return [{speaker: name, text: words} for turn in turns for name, words in zip(names, turn)]


def message_parts(*images):
    first, *rest = turns_as("role", "content", ("user", "assistant"))
    return [{"role": "user", "content": [*images, {"type": "text", "text": "What is it?"}]}, *rest]


def write_tar(path, members, **how):
    with tarfile.open(path, "w", **how) as tar:
        for name, blob in members:
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    return path


@pytest.fixture
def pq():
    pytest.importorskip("pyarrow", reason="pyarrow is in requirements-test.txt")
    import pyarrow as pa
    import pyarrow.parquet

    def write(path, rows, group=2):
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
        return path
    return write


# ---- what a row says ------------------------------------------------------------------------------------------------

TEXTS = [{"user": "What is it? <image>", "assistant": "A cat."}, {"user": "And then?", "assistant": "A dog."}]
ROWS = {
    "LLaVA": {"image": NAMES, "conversations": turns_as("from", "value")},
    "ShareGPT, roles": {"images": NAMES, "conversations": turns_as("from", "value", ("user", "assistant"))},
    "messages": {"images": NAMES, "messages": turns_as("role", "content", ("user", "assistant"))},
    "tables": {"images": [{"bytes": None, "path": n} for n in NAMES], "conversations": turns_as("from", "value")},
    "FineVision": {"images": NAMES, "texts": TEXTS, "source": "x", "relevance_ratings": [5, 4], "relevance_min": 4},
    "Cauldron": {"images": NAMES, "texts": [{**t, "source": "x"} for t in TEXTS]},
    "a list in columns": {"image": NAMES, "conversations": {
        key: [turn[key] for turn in turns_as("from", "value")] for key in ("from", "value")}},
    "a table in columns": {"images": NAMES, "texts": {key: [t[key] for t in TEXTS] for key in ("user", "assistant")}},
    "minimind": {"image_bytes": NAMES, "conversations": json.dumps(turns_as("role", "content", ("user", "assistant")))},
    "parts, images in the row": {"images": NAMES, "messages": message_parts({"type": "image"}, {"type": "image"})},
    "parts with names": {"messages": message_parts(*({"type": "image", "image": n} for n in NAMES))},
    "parts with paths": {"messages": message_parts(*({"type": "image_url", "image_url": {"url": n}} for n in NAMES))},
}


@pytest.mark.parametrize("form", ROWS)
def test_every_form_becomes_the_same_conversation(form):
    turns, names, system = conversation(ROWS[form])
    turns = [(re.sub(r"<image>\s*", "#", question), answer) for question, answer in turns]
    assert turns == [("##What is it?", "A cat."), ("And then?", "A dog.")]
    assert names == NAMES and system is None


@pytest.mark.parametrize("image", [RED, {"bytes": RED, "path": "x.png"}, url(RED), {"url": url(RED)},
                                   base64.b64encode(png("red") + bytes(5000)).decode()])
def test_an_image_in_a_row_becomes_bytes(image, tmp_path):
    row = {"image": image, "conversations": turns_as("from", "value", turns=[("<image>", "A.")])}
    _, (found,), _ = conversation(row)
    assert isinstance(found, bytes) and load_image(safe_path(tmp_path, found)).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("change, reason", [
    ({"image": "https://example.org/a.png"}, "image is a URL, and training downloads nothing"),
    ({"image": "HTTP://example.org/a.png"}, "image is a URL"),
    ({"image": {"url": "http://example.org/a.png"}}, "image is a URL"),
    ({"image": "data:image/png;base64,###"}, "image is not base64"),
    ({"image": "?" * 5000}, "image is not base64"),
    ({"image": {"path": None}}, "image is neither a name nor a list of names"),
    ({"conversations": "[{"}, "not JSON"),
    ({"conversations": None, "texts": [{"user": "Q", "assistant": 3}]}, "a turn has no text"),
    ({"conversations": None, "texts": []}, "no conversations"),
    ({"conversations": {"from": ["human"], "value": []}}, "conversations is an object, but not of lists of the same"),
    ({"conversations": {"from": "human", "value": "Q"}}, "conversations is an object, but not of lists of the same"),
    ({"conversations": None, "caption": ["a", "b"]}, "a caption is not one text; several captions need a row each"),
    ({"conversations": None, "caption": b"a"}, "a caption is not one text; several captions need a row each"),
    ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A", "loss": False}]},
     "an answer without loss is not supported"),
])
def test_a_row_that_cannot_be_used_says_why(change, reason):
    with pytest.raises(BadSample, match=reason):
        conversation({"image": "a.png", "conversations": turns_as("from", "value"), **change})


def test_a_caption_is_an_answer_to_its_image():
    assert conversation({"image": "a.png", "caption": "A cat."}) == ([("<image>\n", "A cat.")], ["a.png"], None)
    assert conversation({"texts": [{"user": "Hi", "assistant": "Ho"}]}) == ([("Hi", "Ho")], [], None), "text alone"


def test_the_page_of_formats_shows_true_examples():
    block = (ROOT / "docs" / "formats.md").read_text().split("```jsonl\n")[1].split("```")[0]
    rows = [json.loads(line) for line in block.splitlines()]
    assert len(rows) >= 6
    for row in rows:
        turns, names, _ = conversation(row)
        assert turns[0][0].replace("<image>", "").strip() in ("What is this?", "", "A photo  of a cat.")
        assert turns[0][1] in ("A cat.", "") and names == ["cat.jpg"]


# ---- parquet --------------------------------------------------------------------------------------------------------

def table(n=7):
    return [{"id": str(i), "image": {"bytes": png((i, 0, 0)), "path": None} if i % 3 else None,
             "conversations": turns_as("from", "value", turns=[("<image>\nHow many?" if i % 3 else "How?", f"{i}.")]),
             "data_source": "x"} for i in range(n)]


def test_a_parquet_table_gives_its_rows(pq, tmp_path):
    rows = open_rows(pq(tmp_path / "a.parquet", table()))
    assert len(rows) == 7
    for i in (6, 0, 3, 2, 1, 5, 4):
        turns, names, _ = conversation(rows[i])
        assert turns[0][1] == f"{i}." and rows[i]["id"] == str(i)
        assert [load_image(safe_path(".", x)).getpixel((0, 0)) for x in names] == [(i, 0, 0)] * (i % 3 > 0)
    again = pickle.loads(pickle.dumps(rows))
    assert again[5] == rows[5] and len(again) == 7


def test_only_one_row_group_is_read(pq, tmp_path, monkeypatch):
    import formats.rows.parquet as module
    rows, read = open_rows(pq(tmp_path / "a.parquet", table())), []
    real = module.opened

    class Spy:
        def read_row_group(self, g, **how):
            read.append(g)
            return real(rows.file, os.getpid()).read_row_group(g, **how)
    monkeypatch.setattr(module, "opened", lambda *_: Spy())
    module.group.cache_clear()
    assert [rows[i]["id"] for i in (5, 4, 5, 0, 4)] == ["5", "4", "5", "0", "4"]
    assert read == [2, 0], "a group is read once, and kept"
    module.group.cache_clear()


def test_ratings_choose_rows(pq, tmp_path):
    rated = [{"images": [{"bytes": RED, "path": None}], "texts": [{"user": "Q", "assistant": str(i)}],
              "relevance_min": 5, "visual_dependency_min": i % 5 + 1, "image_correspondence_min": 4 if i else None,
              "formatting_min": 5} for i in range(10)]
    file = pq(tmp_path / "a.parquet", rated, 3)
    assert len(open_rows(file)) == 10 and len(open_rows(file, 1)) == 9, "a row without a rating is not used"
    rows = open_rows(file, 4)
    assert [conversation(rows[i])[0][0][1] for i in range(len(rows))] == ["3", "4", "8", "9"]
    assert len(pickle.loads(pickle.dumps(rows))) == 4
    with pytest.raises(Error, match="no samples with ratings of 5 or more"):
        open_rows(file, 5)
    assert len(open_rows(pq(tmp_path / "b.parquet", table()), 4)) == 7, "no ratings: used whole"


def test_a_table_of_unknown_form_is_refused(pq, tmp_path):
    with pytest.raises(Error, match="has columns picture, words, but none of conversations.*rename"):
        open_rows(pq(tmp_path / "a.parquet", [{"picture": "x", "words": "y"}]))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(Error, match="cannot be read as parquet"):
        open_rows(tmp_path / "b.parquet")
    whole = pq(tmp_path / "c.parquet", table()).read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[:4] + bytes(len(whole) - 2000) + whole[-1996:])
    with pytest.raises((BadSample, Error)):
        conversation(open_rows(tmp_path / "c.parquet")[0])


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(Error, match="pip install pyarrow"):
        open_rows(tmp_path / "a.parquet")


# ---- tar ------------------------------------------------------------------------------------------------------------

MESSAGES = json.dumps(turns_as("role", "content", ("user", "assistant"))).encode()
PLAIN = json.dumps(turns_as("role", "content", ("user", "assistant"), [("What is it?", "A cat.")])).encode()
PACKED = {"prompts": ["One?", ["Two?", "Three?"]], "captions": ["1.", ["2.", "3."]],
          "images": ["img0.jpg", ["img1.jpg", "img0.jpg"]]}
SAMPLES = {  # members, and for each row: the turns with # for a marker, and the images
    "two images": ([("x/1.img0.png", RED), ("x/1.img1.png", BLUE), ("x/1.json", MESSAGES)],
                   [("##What is it?|A cat.|And then?|A dog.", [RED, BLUE])]),
    "no marker": ([("1.png", RED), ("1.json", PLAIN)], [("#What is it?|A cat.", [RED])]),
    "caption": ([("1.png", RED), ("1.txt", b"A cat.")], [("#|A cat.", [RED])]),
    "row": ([("1.json", json.dumps({"image": "whatever.png", "conversations": turns_as(
        "from", "value", turns=[("<image>\nQ", "A")])}).encode()), ("1.PNG", BLUE)], [("#Q|A", [BLUE])]),
    "by name": ([("1.image_i.0_b.png", BLUE), ("1.image_i.1_a.png", RED), ("1.json", json.dumps(
        {"texts": turns_as("role", "content", ("user", "assistant"), [("<image><image>Q", "A")]), "media": "image",
         "name": ["image_i.1_a.png", "image_i.0_b.png"]}).encode())], [("##Q|A", [RED, BLUE])]),
    "in parts": ([("1.a.png", RED), ("1.b.png", BLUE), ("1.json", json.dumps(message_parts(
        {"type": "image", "image": "1.b.png"}, {"type": "image", "image": "a.png"})).encode())],
        [("##What is it?|A cat.|And then?|A dog.", [BLUE, RED])]),
    "packed": ([("ps_1.img0.jpg", RED), ("ps_1.img1.jpg", BLUE), ("ps_1.json", json.dumps(PACKED).encode())],
               [("#One?|1.", [RED]), ("##Two?|2.|Three?|3.", [BLUE, RED])]),
    "packed, without its image": ([("1.img0.jpg", RED), ("1.json", json.dumps(
        {"prompts": ["One?", "Two?"], "captions": ["1.", "2."], "images": [[], "img7.jpg"]}).encode())],
        [("One?|1.", []), ("#Two?|2.", ["img7.jpg"])]),
    "names of files": ([("1.json", json.dumps(ROWS["LLaVA"]).encode())],
                       [("##What is it?|A cat.|And then?|A dog.", NAMES)]),
    "text alone": ([("1.json", PLAIN)], [("What is it?|A cat.", [])]),
}


def said(row):
    turns, names, _ = conversation(row)
    return "|".join(re.sub(r"<image>\s*", "#", text) for turn in turns for text in turn), names


@pytest.mark.parametrize("form", SAMPLES)
def test_a_tar_sample_becomes_rows(form, tmp_path):
    members, expected = SAMPLES[form]
    other = [("0.txt", b"before"), *members, (".hidden.json", b"{"), ("9.txt", b"after")]
    rows = open_rows(write_tar(tmp_path / "a.tar", other))
    assert [said(rows[i]) for i in range(len(rows))] == [("|before", []), *expected, ("|after", [])] or \
        [said(rows[i]) for i in range(1, len(rows) - 1)] == expected
    assert [said(pickle.loads(pickle.dumps(rows))[i]) for i in range(1, len(rows) - 1)] == expected


@pytest.mark.parametrize("how", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_keep_their_samples(how, tmp_path):
    folder = "a/" * 40 if how == tarfile.USTAR_FORMAT else "a/" * 150 + "ü"
    members = [(f"{folder}{i}.{end}", blob) for i in range(20) for end, blob in (("png", png((i, 0, 0))),
                                                                                ("txt", b"%d" % i))]
    rows = open_rows(write_tar(tmp_path / "a.tar", members, format=how))
    assert [said(rows[i]) for i in range(len(rows))] == [(f"#|{i}", [png((i, 0, 0))]) for i in range(20)]


def test_headers_are_read_as_tarfile_reads_them(tmp_path):
    """Folders, links, long names, a global header, numbers in binary; in the three formats"""
    rng = random.Random(0)
    for how in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=how, pax_headers={"comment": "x"}) as tar:
            for i in range(60):
                info = tarfile.TarInfo("é" * rng.randrange(20) + "/d" * rng.randrange(45) + f"/{i}.txt")
                info.type = rng.choice([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
                info.linkname, info.mtime = "x" * rng.randrange(90), -1 if how == tarfile.GNU_FORMAT else 2.5
                info.size = rng.choice([0, 1, 511, 512, 513, 2000]) if info.isfile() else 0
                tar.addfile(info, io.BytesIO(bytes(info.size)))
        with tarfile.open(tmp_path / "a.tar", "r:") as tar:
            true = [(m.name, m.offset_data, m.offset_data + m.size) for m in tar if m.isfile()]
        found = [(name, data, end) for name, _, data, end in members((tmp_path / "a.tar").read_bytes())]
        assert found == true and len(true) > 20


def test_each_byte_of_a_header_counts(tmp_path):
    """A header with one changed byte is refused. With a true checksum: a sparse file (GNU) is refused, and a size
    below 0, which would be read again and again."""
    blob = write_tar(tmp_path / "a.tar", [("0.txt", b"\xff" * 512)], format=tarfile.USTAR_FORMAT).read_bytes()
    assert [name for name, *_ in members(blob)] == ["0.txt"] and sum_of(b"\xff" * 256) == sum(b"\xff" * 256)
    for i in range(512):
        with pytest.raises(ValueError, match="no header at byte 0"):
            [*members(blob[:i] + bytes([blob[i] + 1]) + blob[i + 1 :])]
    for at, new, reason in ((156, b"S", "a member of kind b'S'"), (124, b"-0000002000", "a size below 0")):
        changed = blob[:at] + new + blob[at + len(new) :]
        check = int(blob[148:154], 8) + sum(changed[:148] + changed[156:512]) - sum(blob[:148] + blob[156:512])
        with pytest.raises(ValueError, match=f"{reason} at byte 0"):
            [*members(changed[:148] + b"%06o" % check + changed[154:])]


def test_a_bad_tar_sample_costs_one_sample(tmp_path):
    rows = open_rows(write_tar(tmp_path / "a.tar", [
        ("0.json", b"{"), ("1.png", RED), ("2.mp4", b""), ("2.txt", b"x"), ("3.json", b"3"), ("4.txt", b"fine"),
        ("5.json", json.dumps({**PACKED, "captions": ["1."]}).encode()),
        ("6.json", b'{"prompts": [], "captions": [], "images": []}')]))
    reasons = []
    for i in range(len(rows)):
        try:
            reasons.append(said(rows[i]))
        except BadSample as e:
            reasons.append(e.reason)
    assert reasons == ["not JSON", "no json and no txt in a sample of a tar file", "video is not supported",
                       "not an object", ("|fine", []),
                       *["prompts, captions and images are not lists of the same length"] * 2,
                       "a packed sample without this prompt"]


def test_a_cut_or_empty_tar_is_refused(tmp_path):
    blob = write_tar(tmp_path / "a.tar", [(f"{i}.txt", bytes(2000)) for i in range(20)]).read_bytes()
    for damaged in (blob[:21000], blob[:21504], blob[:3000] + b"\1" * 100 + blob[3100:]):
        (tmp_path / "b.tar").write_bytes(damaged)
        with pytest.raises(Error, match="cannot be read as a tar file: (cut off|no header) at byte"):
            open_rows(tmp_path / "b.tar")
    with pytest.raises(Error, match="holds no samples: a sample is KEY.json"):
        open_rows(write_tar(tmp_path / "c.tar", [(".nv-meta/x.yaml", b"x")]))


# ---- files of another kind ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("begin, message", [
    (gzip.compress(b"{}", mtime=0), "is compressed: convert it first, as in gunzip FILE"),
    (bz2.compress(b"{}"), "as in bunzip2 FILE"), (lzma.compress(b"{}"), "as in unxz FILE"),
    (bytes.fromhex("28b52ffd"), "as in zstd -d FILE"), (bytes.fromhex("04224d18"), "as in lz4 -d FILE"),
    (b"PK\x03\x04", "is a zip file"), (b"ARROW1\0\0", r"is an arrow file.*to_parquet"),
    (b"\xff\xff\xff\xff\xa0\0\0\0", r"is an arrow file.*to_parquet"),
    (b"id,image,text\n", "neither a json list of samples nor jsonl.*read_csv"),
    (b"\x80\x04\x95", "neither a json list"),
])
def test_an_unknown_file_says_how_to_convert(begin, message, tmp_path):
    (tmp_path / "a.bin").write_bytes(begin + bytes(100))
    with pytest.raises(Error, match=message):
        open_rows(tmp_path / "a.bin")


# ---- shards ---------------------------------------------------------------------------------------------------------

def write_lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_pattern_is_one_file(pq, tmp_path, monkeypatch):
    monkeypatch.setattr("formats.rows.shards.OPEN", 2)
    for k, n in enumerate((3, 1, 4, 2)):
        write_lines(tmp_path / f"s{k}.jsonl", [{"text": f"{k}.{i}"} for i in range(n)])
    rows = open_rows(str(tmp_path / "s*.jsonl"))
    assert isinstance(rows, Shards) and len(rows) == 10
    assert rows.bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    assert " ".join(rows[i]["text"] for i in range(10)) == "0.0 0.1 0.2 1.0 2.0 2.1 2.2 2.3 3.0 3.1"
    assert [pickle.loads(pickle.dumps(rows))[i]["text"] for i in (9, 3)] == ["3.1", "1.0"]
    assert rows.shard.cache_info().currsize == 2
    files, counts, weights = open_mixture(f"{tmp_path / 's*.jsonl'}:0.25,{tmp_path / 's2.jsonl'}:0.75:0.5")
    assert [len(f) for f in files] == [10, 4] and counts.tolist() == [4, 10] and weights == [1, 0.5]
    with pytest.raises(Error, match="no file is named like"):
        open_rows(str(tmp_path / "t*.jsonl"))
    pq(tmp_path / "s4.parquet", table(3))
    assert len(open_rows(str(tmp_path / "s[34]*"))) == 5, "files of several kinds"
    open_large(monkeypatch)
    assert [len(open_rows(str(tmp_path / "s*"))) for _ in range(2)] == [13, 13], "an index is not a shard"
    assert len([*tmp_path.glob("*.index.npy")]) == 4


# ---- training reads them --------------------------------------------------------------------------------------------

@pytest.fixture
def forms(pq, tmp_path):
    """The same 24 samples as jsonl with files, parquet, tar, and three shards of each"""
    rows = []
    (tmp_path / "images").mkdir()
    for i in range(24):
        (tmp_path / "images" / f"{i}.png").write_bytes(png((i, 9, 9)))
        turns = turns_as("from", "value", turns=[("<image>\nQ?", f"A {i}")])
        rows.append({"image": f"{i}.png", "conversations": turns})
    whole = [{**r, "image": {"bytes": png((i, 9, 9)), "path": r["image"]}} for i, r in enumerate(rows)]
    members = [(f"{i:02}.{end}", blob) for i, r in enumerate(rows)
               for end, blob in (("png", png((i, 9, 9))), ("json", json.dumps(r).encode()))]
    write_lines(tmp_path / "all.jsonl", rows)
    pq(tmp_path / "all.parquet", whole, 5)
    write_tar(tmp_path / "all.tar", members)
    for k in range(3):
        write_lines(tmp_path / f"part{k}.jsonl", rows[8 * k : 8 * k + 8])
        pq(tmp_path / f"part{k}.parquet", whole[8 * k : 8 * k + 8], 3)
        write_tar(tmp_path / f"part{k}.tar", members[16 * k : 16 * k + 16])
    return tmp_path


def steps_of(folder, data, tok, **how):
    encode = Encoder(Tokenizer(tok), "vicuna_v1", Layout(3, 4), 120, "")
    return Steps(str(folder / data), str(folder / "images"), encode, ImageSpec(8), 6, 300, 0, **how)


def stream(parts):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for p in parts for b in p.micro for t in b)).hexdigest()


@pytest.mark.parametrize("data", ["all.parquet", "all.tar", "part*.jsonl", "part*.parquet", "part*.tar"])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_the_same_bytes(forms, data, workers, bytes_folder):
    expected = [steps_of(forms, "all.jsonl", bytes_folder)[s] for s in range(6)]
    found = [*loader(steps_of(forms, data, bytes_folder), range(6), workers)]
    assert not any(p.dropped for p in found) and stream(found) == stream(expected)


@pytest.mark.parametrize("data", ["all.jsonl", "part*.parquet", "part*.tar"])
def test_a_copy_of_steps_opens_its_own_files(forms, data, bytes_folder):
    steps = steps_of(forms, data, bytes_folder)
    assert stream([pickle.loads(pickle.dumps(steps))[3]]) == stream([steps[3]])


@pytest.mark.parametrize("data", ["all.jsonl", "all.parquet", "part*.tar"])
def test_ranks_draw_every_sample_once(forms, data, bytes_folder):
    whole = steps_of(forms, data, bytes_folder)
    for world in (2, 3, 8):
        for s in (0, 5):
            parts = [steps_of(forms, data, bytes_folder, rank=r, world=world)[s] for r in range(world)]
            names = [n for p in parts for n in p.names]
            assert sorted(names) == sorted(whole[s].names) and len(set(names)) == 6
            ids = sorted(b.ids[b.pos == 0].numel() for p in parts for b in p.micro)
            assert sum(ids) == 6 and sum(len(b.images) for p in parts for b in p.micro) == 6


def test_a_rank_reads_only_its_rows(forms, bytes_folder, monkeypatch):
    steps = steps_of(forms, "all.jsonl", bytes_folder, rank=1, world=3)
    read, real = [], Rows.__getitem__
    monkeypatch.setattr(Rows, "__getitem__", lambda self, i: read.append(i) or real(self, i))
    part = steps[0]
    assert len(read) == len(part.names) == 2


def published(rows, images):
    """A row as tables and tar files have it: the image is in the row"""
    blob = (images / rows["image"]).read_bytes() if "image" in rows else None
    return {**rows, "image": blob and {"bytes": blob, "path": rows["image"]}}, blob


@pytest.mark.parametrize("kind", ["tar", "shards"])
def test_a_run_from_every_kind_is_the_same(kind, world, pq, tmp_path, tmp_path_factory):
    """Six steps, also when resumed after two, give the weights of jsonl with a folder of images."""
    images = Path(world["images"])
    rows = [json.loads(line) for line in Path(world["data"]).read_text().splitlines()]
    whole = [published(row, images) for row in rows]
    data = tmp_path / f"train.{kind}"
    if kind == "tar":
        write_tar(data, [(f"{i:02}.{end}", blob) for i, (row, (_, image)) in enumerate(zip(rows, whole))
                         for end, blob in (("png", image), ("json", json.dumps(row).encode())) if blob])
    else:
        (tmp_path / "parts").mkdir()
        for k in range(3):
            pq(tmp_path / "parts" / f"{k}.parquet", [row for row, _ in whole[8 * k : 8 * k + 8]], 3)
        pq(data, [row for row, _ in whole], 5)
    data = tmp_path / "parts/*.parquet" if kind == "shards" else data
    how = {**world, "keep_last": 9}
    run("sft", how, tmp_path / "one")
    run("sft", how, tmp_path / "two", data=str(data), images=".")
    assert state(tmp_path / "two") == state(tmp_path / "one")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"two/checkpoints/step_{step:07}")
    (tmp_path / "two/finished.json").unlink()
    run("sft", how, tmp_path / "two", data=str(data), images=".", workers=2)
    assert state(tmp_path / "two") == state(tmp_path / "one")


def test_ranks_with_unequal_work_train_alike(world, bytes_folder, tmp_path):
    """The ranks need different numbers of micro-batches. Weights equal those of one process."""
    how = {**world, "batch_size": 6, "max_tokens": 48, "steps": 3, "save_every": 3, "dtype": "fp64"}
    encode = Encoder(Tokenizer(bytes_folder), "vicuna_v1", Layout(3, 4), 48, "")
    ranks = [Steps(how["data"], how["images"], encode, ImageSpec(8), 6, 48, 0, rank, 2) for rank in (0, 1)]
    counts = [[len(steps[s].micro) for steps in ranks] for s in range(3)]
    assert any(a != b for a, b in counts), counts
    run("sft", how, tmp_path / "one")
    one = load_file(tmp_path / "one/checkpoints/step_0000003/trained.safetensors")
    for parallel in ("ddp", "fsdp"):
        (tmp_path / parallel).mkdir()
        fork(2, lambda rank: run("sft", how, tmp_path / parallel / "run", parallel=parallel), tmp_path / parallel)
        two = load_file(tmp_path / parallel / "run/checkpoints/step_0000003/trained.safetensors")
        assert max(((one[k] - two[k]).norm() / one[k].norm()).item() for k in one) < 1e-10


# ---- index and digest -----------------------------------------------------------------------------------------------

def test_lines_are_those_of_a_plain_reader():
    rng = np.random.default_rng(0)
    for n in range(200):
        blob = bytes(rng.choice(list(b"\n\n \t{}ab\r"), rng.integers(1, 60)).astype(np.uint8))
        true = [m.span() for m in re.finditer(rb"[^\n]+", blob) if m[0].strip()]
        for chunk in (1, 7, 2**24):
            assert line_spans(blob, chunk).tolist() == [[*s] for s in true], blob


def open_large(monkeypatch):
    """From here on, every file is a large one"""
    monkeypatch.setattr(kept, "KEPT", 0)


@pytest.mark.parametrize("data", ["all.jsonl", "all.tar"])
def test_an_index_is_made_once(forms, data, monkeypatch):
    small = open_rows(forms / data)
    assert not [*forms.glob("*.index.npy")], "a small file gets none"
    open_large(monkeypatch)
    first = open_rows(forms / data)
    assert (first.spans == small.spans).all() and (forms / f"{data}.index.npy").is_file()
    for name in ("formats.rows.lines.line_spans", "formats.rows.tar.sample_spans"):
        monkeypatch.setattr(name, lambda *_: 1 / 0)
    again = open_rows(forms / data)
    assert isinstance(again.spans, np.memmap) and (again.spans == small.spans).all() and again[3] == small[3]
    assert [f.name for f in forms.glob(".index*")] == []


@pytest.mark.parametrize("damage", ["cut", "other", "pickle", "older", "empty"])
def test_a_damaged_or_old_index_is_made_again(forms, damage, monkeypatch):
    open_large(monkeypatch)
    file, index = forms / "all.jsonl", forms / "all.jsonl.index.npy"
    true = open_rows(file).spans.tolist()
    if damage == "cut":
        index.write_bytes(index.read_bytes()[:-100])
    elif damage == "other":
        np.save(index, np.zeros((9, 2)))
    elif damage == "pickle":
        np.save(index, np.array([{}]), allow_pickle=True)
    elif damage == "empty":
        index.write_bytes(b"")
    else:
        row = file.read_text().splitlines()
        file.write_text("\n".join([*row[1:], row[0]]) + "\n")
        os.utime(file, (1, 1))
        true = line_spans(file.read_bytes()).tolist()
    assert open_rows(file).spans.tolist() == true and (np.load(index)[2:] == true).all()


def test_a_full_disk_leaves_no_index(forms, tmp_path, monkeypatch):
    """An index that cannot be written is made in memory, and no part file stays beside the data"""
    open_large(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    true = line_spans((forms / "all.jsonl").read_bytes())

    def full(file, array):
        file.write(b"x" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.np, "save", full)
    assert (open_rows(forms / "all.jsonl").spans == true).all()
    assert (tmp_path / "cache/pumice").is_dir() and not [f for f in tmp_path.rglob("*index*") if f.is_file()]


def test_a_read_only_folder_is_no_obstacle(forms, tmp_path, monkeypatch):
    open_large(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = kept.tempfile.NamedTemporaryFile
    refused = {str(forms)}

    def refuse(*args, dir=None, **how):
        if str(dir) in refused:
            raise PermissionError
        return real(*args, dir=dir, **how)
    monkeypatch.setattr(kept.tempfile, "NamedTemporaryFile", refuse)
    true = line_spans((forms / "all.jsonl").read_bytes()).tolist()
    assert open_rows(forms / "all.jsonl").spans.tolist() == true
    assert [f.suffix for f in (tmp_path / "cache" / "pumice").iterdir()] == [".npy"]
    assert isinstance(open_rows(forms / "all.jsonl").spans, np.memmap)
    refused.add(str(tmp_path / "cache" / "pumice"))
    assert open_rows(forms / "all.tar")[0]["id"] == "00", "neither folder: in memory"


def digest_of(rows):
    h = hashlib.sha256()
    rows.digest(h)
    return h.hexdigest()


@pytest.mark.parametrize("data", ["all.jsonl", "all.tar", "all.parquet", "part*.jsonl"])
def test_a_small_file_is_digested_whole(forms, data):
    whole = b"".join(f.read_bytes() for f in sorted(forms.glob(data)))
    assert digest_of(open_rows(str(forms / data))) == hashlib.sha256(whole).hexdigest()


def test_a_large_file_is_digested_in_part(tmp_path, monkeypatch):
    """The digest notices a row of another length, and a byte in a block; it misses a byte between the blocks."""
    monkeypatch.setattr(kept, "EXACT", 1000)
    monkeypatch.setattr(kept, "BLOCKS", 4)
    monkeypatch.setattr(kept, "BLOCK", 64)
    file = write_lines(tmp_path / "a.jsonl", [{"text": f"{i:90}"} for i in range(100)])
    blob = file.read_bytes()
    true = digest_of(open_rows(file))
    covered = {i for at in np.linspace(0, len(blob) - 64, 4, dtype=int).tolist() for i in range(at, at + 64)}
    assert {0, len(blob) - 1} <= covered
    for at in (20, len(blob) - 20, *sorted(covered)[70:250:30]):
        if blob[at : at + 1] == b" ":
            file.write_bytes(blob[:at] + b"x" + blob[at + 1 :])
            assert digest_of(open_rows(file)) != true
    outside = next(i for i in range(200, len(blob)) if i not in covered and blob[i : i + 1] == b" ")
    file.write_bytes(blob[:outside] + b"x" + blob[outside + 1 :])
    assert digest_of(open_rows(file)) == true, "this is what the docstring of digest() says"
    moved = blob[:outside] + blob[outside + 1 :]                # one row shorter, another longer by one
    later = next(i for i in range(outside + 500, len(moved)) if i not in covered and moved[i : i + 1] == b" ")
    file.write_bytes(moved[:later] + b" " + moved[later:])
    assert file.stat().st_size == len(blob) and digest_of(open_rows(file)) != true


def test_elements_of_a_list_are_spans():
    blob = b'[{"a": "\xc3\xbc"}, 2 ,"x"]'
    assert [blob[a:b] for a, b in elements(blob)] == [b'{"a": "\xc3\xbc"}', b"2", b'"x"']
    assert elements(b"[]").shape == (0, 2)
