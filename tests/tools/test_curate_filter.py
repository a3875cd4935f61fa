"""tools/curate.py filter: what goes, by which reason, in which order; the three files appear together or not at all."""

import base64
import json
import random

import numpy as np
import pytest
import torch
from conftest import ROOT, error
from PIL import Image

from formats.image_files import load_image
from formats.pairs import load_pairs, save_pairs
from formats.rows import Rows, conversation, open_rows
from images import preprocess
from tools import curate_filter
from tools.image_hash import image_hash
from tools.retrieval import Towers

TINY = ("vision.hidden_size=32 vision.intermediate_size=48 vision.num_hidden_layers=1 vision.image_size=16 "
        "vision.patch_size=8 text.hidden_size=16 text.intermediate_size=24 text.num_hidden_layers=1 "
        "text.max_position_embeddings=16 width=32")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two random towers, as train_pairs.py would leave them"""
    out = tmp_path_factory.mktemp("pair") / "model"
    model, folder = load_pairs(kind="clip", tokenizer=ROOT / "demo/llm", parts=TINY, seed=1)
    save_pairs(out, model.state_dict(), model.cfg, folder, torch.float32)
    return out


def picture(seed):
    """A smooth random image: images of different seeds differ in far more than 16 bits"""
    small = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    return Image.fromarray(small).resize((64, 64), Image.BICUBIC)


def row(i, image, caption, **more):
    return {"id": i, "image": image, "conversations": [{"from": "human", "value": "<image>"},
                                                       {"from": "gpt", "value": caption}]} | more


def write(file, rows):
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(file)


def read(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def run(folder, data, *args, capsys=None):
    curate_filter.main([data, f"--images={folder}", f"--out={folder / 'kept.jsonl'}", *args])
    return read(folder / "kept.jsonl"), read(folder / "kept_removed.jsonl")


@pytest.fixture
def folder(tmp_path):
    for k in range(6):
        picture(k).save(tmp_path / f"{k}.png")
    picture(0).save(tmp_path / "0.jpg", quality=95)
    picture(0).resize((40, 40), Image.BICUBIC).save(tmp_path / "0s.png")
    (tmp_path / "broken.png").write_bytes(b"<html>")
    return tmp_path


def test_the_first_of_two_duplicates_stays(folder, capsys):
    data = write(folder / "d.jsonl", [
        row("a", "0.png", "one"), row("b", "1.png", "two"), row("c", "0.jpg", "three"), row("d", "2.png", "ONE \n"),
        row("e", "0s.png", "four"), row("f", "3.png", "ﬁve"), row("g", "4.png", "Five"),
        row("h", "broken.png", "six"),
        '{"id": "i",', row("j", "gone.png", "seven"), {"id": "k", "text": "a document"},
        {"id": "l", "text": "A document"}])
    kept, removed = run(folder, data, "--max_distance=16", "--same_text", "--batch_size=3")
    assert kept == [Rows(data)[i] for i in (0, 1, 5, 10)]
    assert [(r["id"], r["reason"], r["twin"]) for r in removed] == [
        ("c", "near-duplicate images", 0), ("d", "the same text", 0), ("e", "near-duplicate images", 0),
        ("g", "the same text", 5), ("h", "image cannot be read", None), (None, "not JSON", None),
        ("j", "image is missing", None), ("l", "the same text", 10)]
    assert [r["index"] for r in removed] == [2, 3, 4, 6, 7, 8, 9, 11] and removed[0]["row"] == Rows(data)[2]
    near = int(np.bitwise_count(image_hash(picture(0)) ^ image_hash(Image.open(folder / "0.jpg").convert("RGB"))).sum())
    assert removed[0]["value"] == near <= 16 and removed[1]["value"] is None
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["rows"], last["kept"], last["removed"]["the same text"]) == (12, 4, 3)
    text = (folder / "kept_removed.html").read_text()
    assert text.count("<div class='card bad'>") == 8 and "near-duplicate images <small>2</small>" in text
    assert text.count("src=\"data:image/") == 2 * 4 and "<script" not in text              # the four with a twin


def test_both_needs_image_and_text(folder):
    """VQA data: several questions about an image, and the same question about several images"""
    data = write(folder / "d.jsonl", [
        row(0, "0.png", "yes"), row(1, "1.png", "yes"), row(2, "0.jpg", "no"), row(3, "1.png", "no"),
        row(4, "0s.png", "No"),
        row(5, "1.png", " YES"), {"id": 6, "text": "yes"}, {"id": 7, "text": "yes"}])
    kept, removed = run(folder, data, "--max_distance=16", "--same_text", "--both")
    assert [r["id"] for r in kept] == [0, 1, 2, 3, 6]
    assert [(r["id"], r["twin"]) for r in removed] == [(4, 2), (5, 1), (7, 6)]
    assert "--both needs" in error(curate_filter.main, [data, f"--out={folder}/o", "--both", "--same_text"])


def test_greedy_removal_equals_all_pairs(folder):
    """90 rows with slightly changed images: the same rows stay as by comparing each with all that stay"""
    rng, rows, hashes = np.random.default_rng(5), [], []
    for i in range(90):
        x = np.asarray(picture(100 + i % 15), np.int16) + rng.normal(0, rng.integers(1, 200), (64, 64, 3))
        Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(folder / f"n{i}.png")
        hashes.append(image_hash(Image.open(folder / f"n{i}.png")))
        rows.append(row(i, f"n{i}.png", f"text {i}"))
    stay, twins = [], {}
    for i, h in enumerate(hashes):
        near = [j for j in stay if int(np.bitwise_count(h ^ hashes[j]).sum()) <= 12]
        twins.update({i: near[0]} if near else {})
        stay += [] if near else [i]
    kept, removed = run(folder, write(folder / "d.jsonl", rows), "--max_distance=12")
    assert [r["id"] for r in kept] == stay and {r["index"]: r["twin"] for r in removed} == twins
    assert len(twins) > 20 and len(stay) > 20


def test_similarity_is_that_of_the_towers(folder, pair):
    """Rows below the limit go. What is not an image with a caption is not measured. A removed row has no twin."""
    rows = [row(i, f"{i}.png", f"a red circle at the {place}") for i, place in enumerate(("top", "left", "center"))]
    rows += [row(3, ["0.png", "1.png"], "two"), {"id": 4, "text": "text"}, rows[0] | {"id": 5}]
    rows[3]["conversations"][0]["value"] = "<image><image>"
    towers = Towers(pair)
    pixels = torch.stack([preprocess(load_image(folder / f"{i}.png"), towers.spec) for i in range(3)])
    with torch.no_grad():
        captions = [r["conversations"][1]["value"] for r in rows[:3]]
        true = (towers.encode(pixels) * towers.texts(captions)).sum(1).tolist()
    limit = sorted(true)[1] - 1e-5
    data = write(folder / "d.jsonl", rows)
    kept, removed = run(folder, data, f"--pair={pair}", f"--min_similarity={limit}", "--batch_size=2", "--same_text")
    gone = [i for i, x in enumerate(true) if x < limit]
    assert len(gone) == 1 and [r["index"] for r in removed] == ([*gone, 5])
    assert all(abs(r["value"] - true[r["index"]]) < 1e-4 for r in removed if r["index"] < 3)
    assert ("similarity" if gone == [0] else "same text") in removed[-1]["reason"]
    assert "needs --pair" in error(curate_filter.main, [data, f"--out={folder}/o", "--min_similarity=0.1"])


def test_a_removed_row_is_no_twin(folder):
    """The first row goes for its rating, so the second, with the same text, stays."""
    names = ("relevance_min", "visual_dependency_min", "image_correspondence_min", "formatting_min")
    rated = [row(i, f"{i}.png", "same") | dict(zip(names, r)) for i, r in enumerate(
        ([5, 5, 5, 2], [3, 4, 5, 3], [5, None, 5, 5], [5, 5, 5, 5]))]
    kept, removed = run(folder, write(folder / "d.jsonl", [*rated, row(4, "4.png", "no ratings")]), "--same_text",
                        "--min_rating=3")
    assert [r["id"] for r in kept] == [1, 4]
    assert [(r["id"], r["reason"], r["value"]) for r in removed] == [
        (0, "a rating is below 3", 2), (2, "a rating is below 3", None), (3, "the same text", None)]


def test_tables_and_tar_become_jsonl(folder):
    """Images as bytes become data: URLs, or files with --out_images; the samples stay the same to the bit."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    blobs = [(folder / f"{k}.png").read_bytes() for k in range(3)]
    table = [{"images": [{"bytes": b, "path": None}], "texts": [{"user": "What?", "assistant": f"it {k}"}],
              "score": float("nan"), "scores": [float("nan")]} for k, b in enumerate([*blobs, blobs[0]])]
    pq.write_table(pa.Table.from_pylist(table), folder / "t.parquet", row_group_size=2)
    rows = open_rows(folder / "t.parquet")
    kept, removed = run(folder, str(folder / "t.parquet"), "--max_distance=0")
    assert [conversation(r) for r in kept] == [conversation(rows[i]) for i in range(3)] and removed[0]["twin"] == 0
    assert kept[0]["images"][0]["bytes"].startswith("data:image/png;base64,") and kept[0]["scores"] == [None]
    kept, removed = run(folder, str(folder / "t.parquet"), "--max_distance=0", f"--out_images={folder / 'out'}")
    assert [(folder / "out" / conversation(r)[1][0]).read_bytes() for r in kept] == blobs
    assert len([*(folder / "out").iterdir()]) == 3 and all(len(json.dumps(r)) < 300 for r in kept)
    assert base64.b64encode(blobs[0]).decode() in json.dumps(removed), "a removed row is whole"


def test_a_long_row_asks_for_a_folder(folder, monkeypatch):
    monkeypatch.setattr("tools.curate_rows.MAX_BYTES", 400)
    data = write(folder / "d.jsonl", [row(0, "0.png", "x"), row(1, "1.png", "y" * 400)])
    assert "--out_images=DIR" in error(run, folder, data)
    assert not [p for p in folder.iterdir() if "kept" in p.name], "nothing is left"


def test_a_stopped_run_leaves_the_old_files(folder, monkeypatch):
    data = write(folder / "d.jsonl", [row(i, f"{i % 6}.png", f"{i % 9}") for i in range(12)])
    run(folder, data, "--same_text")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    class Killed(BaseException):
        pass

    def die(*args):
        raise Killed
    monkeypatch.setattr(curate_filter, "filter_page", die)
    with pytest.raises(Killed):
        run(folder, data)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.undo()
    (folder / ".tmp-kept.jsonl").write_text("half a li")         # of a run that was killed by SIGKILL
    run(folder, data, "--same_text")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before, "the same bytes again"


def test_examples_are_drawn_evenly():
    from tools.curate_page import EXAMPLES, keep_some
    hits = np.zeros(40)
    for seed in range(400):
        some, draw = [], random.Random(seed)
        for n in range(40):
            keep_some(some, n, n + 1, draw)
        assert len({*some}) == EXAMPLES
        hits[some] += 1
    assert abs(hits - 400 * EXAMPLES / 40).max() < 5 * (400 * 0.2 * 0.8) ** 0.5


def test_wrong_arguments_are_one_line(folder):
    data = write(folder / "d.jsonl", [row(0, "0.png", "x")])
    assert "one data file" in error(curate_filter.main, [f"--out={folder / 'o'}"])
    for setting in ("out", "removed", "html"):
        line = error(curate_filter.main, [data, f"--out={folder}/o", f"--{setting}={folder}/./d.jsonl"])
        assert line == f"{setting}={folder}/d.jsonl is the data itself"
    (folder / "link.jsonl").hardlink_to(data)
    assert "is the data itself" in error(curate_filter.main, [data, f"--out={folder / 'link.jsonl'}"])
    line = error(curate_filter.main, [data, f"--out={folder}/o", f"--removed={folder}/p", f"--html={folder}/p"])
    assert line.endswith("p is the file of --removed, too")
    assert "is not a folder" in error(curate_filter.main, [data, f"--out={folder}/o", "--images=nowhere"])
    assert "could not be written" in error(curate_filter.main, [data, f"--images={folder}", f"--out={data}/x/o.jsonl"])
