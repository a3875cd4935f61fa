"""The towers of the toy world: lessons are true and without held-out combinations; pretrain.py runs."""

import json
import random
import re

import pytest
from conftest import ROOT

from demo import lessons, pretrain, toy
from formats import llava
from formats.tokenizer import Tokenizer
from kernels.cross_entropy import IGNORE

WORDS = {"color": [*toy.COLORS], "shape": [*toy.SHAPES, "sign"], "size": toy.SIZES, "row": toy.ROWS,
         "column": toy.COLUMNS, "number": [*map(str, range(10))]}
KIND = {w: kind for kind, words in WORDS.items() for w in words}


@pytest.fixture(scope="module")
def tok():
    return Tokenizer(ROOT / "demo/llm")


def solve(lines, key):
    """The answer to a drill, worked out from its text alone"""
    things = [{KIND[w]: w for w in line.split()} for line in lines]
    words = [w for w in key.rstrip(":").split() if w not in lessons.FILLERS]
    asked = next((w for w in words if w in WORDS or w == "place"), "place")
    named = {KIND[w]: w for w in words if w in KIND}
    found = [t for t in things if named.items() <= t.items()]
    assert len(found) == 1, (lines, key)
    return f"{found[0]['row']} {found[0]['column']}" if asked == "place" else found[0][asked]


@pytest.mark.parametrize("easy", [True, False])
def test_a_drill_holds_its_own_answer(easy):
    seen, distances, orders = set(), set(), set()
    for i in range(200):
        lines, drills = lessons.drill(random.Random(i), easy)
        assert len(drills) == 4
        for key, answer in drills:
            assert solve(lines, key) == answer
            seen.add(next((w for w in key.rstrip(":").split() if w in WORDS), "place"))
            distances.add(sum(w in lessons.FILLERS for w in key.rstrip(":").split()))
            orders.add(tuple(KIND[w] for w in key.rstrip(":").split() if KIND.get(w) in ("color", "shape")))
    assert seen == ({"place"} if easy else {*WORDS, "place"}) and distances == {0, 1, 2, 4}
    assert {("color", "shape"), ("shape", "color"), ("color",), ("shape",)} <= orders


@pytest.mark.parametrize("name", ["pairs", "records", "questions"])
def test_no_lesson_shows_a_held_out_combination(name, tok, monkeypatch):
    scenes, make = [], toy.make_scene
    monkeypatch.setattr(toy, "make_scene", lambda *a, **k: scenes.append(make(*a, **k)) or scenes[-1])
    for i in range(100):
        lessons.lesson_document(name, tok, random.Random(i))
    assert len(scenes) > 80 and not any(toy.held_out(**o) for s in scenes for o in s["objects"])


def test_only_answers_are_supervised(tok):
    for name in ("pairs", "records"):
        ids, labels, images = lessons.lesson_document(name, tok, random.Random(0))
        text = tok.full.decode([i if y != IGNORE else tok.full.token_to_id("#") for i, y in zip(ids, labels)])
        supervised = [KIND[w] for w in re.sub("#+", " ", text).split()]
        assert images == [] and len(supervised) >= 4 and all(y in (IGNORE, i) for i, y in zip(ids, labels))
        if name == "pairs":
            assert supervised == ["row", "column"] * 4


def test_both_towers_train_and_load(tmp_path, monkeypatch, capsys):
    """A few steps of each; the folders load, and the same settings give the same weights."""
    train_tokenizer = pretrain.train_tokenizer
    monkeypatch.setattr(pretrain, "train_tokenizer", lambda folder: train_tokenizer(folder, 400, 30))
    for out in ("a", "b"):
        pretrain.main(["llm", "--pairs=1", "--records=1", "--questions=1", "--tokens=200", "--exam=9", "--depth=1",
                       f"--out={tmp_path / out}"])
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    made = json.loads((tmp_path / "a/training.json").read_text())
    assert made["settings"]["records"] == 1 and set(made["log"][-1]["exam"]) == {"all", *toy.TYPES}
    pretrain.main(["vit", "--steps=1", "--scenes=24", "--batch=8", "--exam=12", f"--out={tmp_path / 'vit'}"])
    model, folder = llava.load_model(vision=str(tmp_path / "vit"), llm=str(tmp_path / "a"))
    assert sum(p.numel() for p in model.parameters()) > 5e5


def test_the_readme_reports_the_recorded_scores():
    made = [json.loads((ROOT / "demo/vit" / name).read_text()) for name in ("training.json", "contrastive.json")]
    assert [m["settings"].pop("head") for m in made] == ["classes", "contrastive"]
    assert made[0]["settings"] == made[1]["settings"]
    text = (ROOT / "demo/README.md").read_text()
    for m in made:
        assert " | ".join(f"{100 * v:.1f}".removesuffix(".0") for v in m["log"][-1]["probe"]["-2"].values()) in text
    reading = json.loads((ROOT / "demo/llm/training.json").read_text())["log"][-1]
    assert f"{100 * reading['exam']['all']:.1f} %" in text and f"{reading['minutes']:.0f} minutes" in text
