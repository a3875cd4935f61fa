"""The toy world: its promises, counted."""

import hashlib
import json
import random
from collections import Counter

import pytest
from conftest import ROOT, error
from PIL import Image

from data import Encoder
from demo import captions, pretrain, sheet, toy
from formats.image_files import load_image
from formats.rows import conversation
from formats.tokenizer import Tokenizer
from images import Layout


def worlds(n, test=False):
    for i in range(n):
        rng = random.Random(f"test/{i}")
        yield toy.make_scene(rng, test), rng


def combinations(scene):
    return {(o["color"], o["shape"], o["size"], o["row"], o["column"]) for o in scene["objects"]}


def test_a_seed_draws_the_same_scene_and_pixels():
    scene, rng = next(worlds(1))
    again, _ = next(worlds(1))

    def draw(seed, scene=scene):
        return toy.draw_scene(scene, seed).tobytes()
    assert scene == again and draw(7) == draw(7, again) != draw(8)


def test_held_out_combinations_never_occur_in_training():
    train = set().union(*(combinations(s) for s, _ in worlds(3000)))
    test = set().union(*(combinations(s) for s, _ in worlds(1000, test=True)))
    assert not train & test
    assert len(train) == 540 and len(test) == 108  # all of them occur: a sixth of 648 is held out


def test_any_two_attributes_occur_together_in_training():
    pairs = Counter()
    for scene, _ in worlds(3000):
        for c in combinations(scene):
            pairs.update((i, j, c[i], c[j]) for i in range(5) for j in range(i))
    values = (6, 6, 2, 3, 3)
    assert len(pairs) == sum(values[i] * values[j] for i in range(5) for j in range(i))


def test_scenes_have_different_shapes_in_different_cells():
    counts = Counter()
    for scene, _ in worlds(2000):
        cells = [(o["row"], o["column"]) for o in toy.things(scene)]
        assert len(set(cells)) == len(cells)
        assert len({toy.pair_name(o) for o in scene["objects"]}) == len(scene["objects"])
        counts[len(scene["objects"])] += 1
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 300


def test_yes_and_no_are_equally_frequent():
    answers, crossed = Counter(), 0
    for scene, rng in worlds(3000):
        for kind, q, a, _ in toy.scene_questions(scene, rng):
            if kind == "exists":
                answers[a] += 1
                color, shape = q.rstrip("?").split()[-2:]
                colors, shapes = ({o[k] for o in scene["objects"]} for k in ("color", "shape"))
                crossed += a == "no" and color in colors and shape in shapes
    assert abs(answers["yes"] / 3000 - 0.5) < 0.03    # 3 standard deviations of 3,000 fair coins
    assert crossed > 0.2 * answers["no"]


def answer_from(scene, question):
    """The answer to a question, worked out independently from the scene graph."""
    words = question.rstrip("?").replace(",", "").split()
    by_pair = {toy.pair_name(o): o for o in scene["objects"]}
    by_place = {toy.place_name(o): o for o in scene["objects"]}
    if question.startswith("How many"):
        what = words[2]
        if what == "shapes":
            return str(len(scene["objects"]))
        kind = next((k for k in ("color", "size") if what in {"color": toy.COLORS, "size": toy.SIZES}[k]), "shape")
        what = what if kind != "shape" else "cross" if what == "crosses" else what[:-1]
        return str(sum(o[kind] == what for o in scene["objects"]))
    if question.startswith("Where"):
        return toy.place_name(by_pair[" ".join(words[-2:])])
    if question.startswith("Is there"):
        return "yes" if " ".join(words[-2:]) in by_pair else "no"
    if question.startswith("What size"):
        return by_pair[" ".join(words[-2:])]["size"]
    if question.startswith("Is the"):
        a, b = by_pair[" ".join(words[2:4])], by_pair[" ".join(words[-2:])]
        axis, names = ("row", ("above", "below")) if "above" in words else ("column", ("left", "right"))
        return names[a[axis] > b[axis]]
    if question.startswith("What number"):
        return str(scene["sign"]["digit"])
    kind = "color" if question.startswith("What color") else "shape"
    if " at the " in question:
        return by_place[" ".join(words[-2:])][kind]
    other, value = ("shape", words[-1]) if kind == "color" else ("color", words[-1])
    found = [o[kind] for o in scene["objects"] if o[other] == value]
    assert len(found) == 1, "the question must have one answer"
    return found[0]


@pytest.mark.parametrize("test", [False, True])
def test_every_answer_follows_from_the_scene_graph(test):
    for scene, rng in worlds(1000, test):
        for _, question, answer, sentence in toy.scene_questions(scene, rng):
            assert answer_from(scene, question) == answer
            assert answer in sentence.lower().rstrip(".").split() or answer in sentence.lower()


def test_a_scene_text_names_each_thing_once():
    for scene, rng in worlds(200):
        text = toy.scene_text(scene, rng)
        assert len(text.split("; ")) == len(toy.things(scene))
        for o in toy.things(scene):
            assert f"{toy.place_name(o)}: " in text


def test_files_are_llava_files_and_written_once(tmp_path):
    sizes = dict(align=6, sft=40, val_align=2, val_sft=2, test=4)
    assert toy.write_world(tmp_path, **sizes) == list(sizes)
    assert toy.write_world(tmp_path, **sizes) == []
    for name in ("align", "sft"):
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        for row in rows:
            turns, names, system = conversation(row)
            assert all(load_image(tmp_path / "images" / n).size == (toy.SIDE, toy.SIDE) for n in names)
            assert sum(u.count("<image>") for u, _ in turns) == len(names)
        template = "plain" if name == "align" else "vicuna_v1"
        encode = Encoder(Tokenizer(ROOT / "demo/llm"), template, Layout(3, 36), 512, "")
        assert all(encode(row)[3] == 0 for row in rows), "no sample is dropped or cut"
    assert any("image" not in r for r in rows), "some samples have no image"
    assert any(len(r["conversations"]) > 8 for r in rows)
    short = [toy.SHORT in r["conversations"][0]["value"] for r in rows]
    assert any(short) and not all(short)
    questions = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert {q["type"] for q in questions} <= set(toy.TYPES)
    assert len({q["question_id"] for q in questions}) == len(questions)


def test_conversations_have_equal_yes_and_no():
    scenes = [(f"s_{i}", f"{i}.png", s, rng) for i, (s, rng) in enumerate(worlds(1500))]
    rows = toy.conversation_rows(scenes)
    answers = Counter(m["value"].split(",")[0].lower() for r in rows
                   for q, m in zip(r["conversations"][::2], r["conversations"][1::2]) if "Is there" in q["value"])
    assert answers.keys() == {"yes", "no"} and abs(answers["yes"] - answers["no"]) <= 1 and answers["yes"] > 300
    described = sum("Describe the image" in r["conversations"][0]["value"] for r in rows)
    assert 0.12 < described / 1500 < 0.18


def test_captions_are_scored_by_the_facts_in_them():
    """A caption agrees with itself; a wrong word lowers the score of its own kind alone."""
    true = "top left: a large red circle; middle center: a sign that says 7; bottom right: a small blue star"
    assert captions.caption_facts(true) == {
        "place": {"top left", "middle center", "bottom right"},
        "size": {("top left", "large"), ("bottom right", "small")},
        "shape": {("top left", "circle"), ("middle center", "sign"), ("bottom right", "star")},
        "color": {("top left", "red"), ("bottom right", "blue")}, "read": {("middle center", "7")}}
    perfect = dict.fromkeys(["place", "shape", "color", "size", "read"], 1.0)
    assert captions.facts_f1([true], [true]) == perfect
    for old, new, kind, score in (("circle", "ring", "shape", 0.667), ("red", "green", "color", 0.5),
                                  ("large", "small", "size", 0.5), ("7", "8", "read", 0.0)):
        assert captions.facts_f1([true.replace(old, new)], [true]) == perfect | {kind: score}
    assert captions.facts_f1(["a red circle, a sign and a blue star"], [true])["shape"] == 0  # no places, no facts
    for scene, _ in worlds(50):
        facts = captions.caption_facts(toy.caption(scene, True))
        assert len(facts["shape"]) == len(facts["place"]) == len(toy.things(scene))


def test_file_names_lead_to_scenes(tmp_path):
    (tmp_path / "images").mkdir()
    names = {name: scene for _, name, scene, _ in toy.draw_scenes(tmp_path, "test", 3, 0)}
    assert {n: toy.make_scene(random.Random(captions.scene_seed(n)), test=True) for n in names} == names


@pytest.mark.parametrize("main, args, complaint", [
    (sheet.main, [], "usage: python demo/sheet.py"), (sheet.main, ["gone.jsonl", "x.png"], "gone.jsonl, or an image"),
    (sheet.main, [".", "x.png"], "., or an image"), (sheet.main, ["row.jsonl", "x.png"], "no image with 7 q"),
    (toy.main, ["--seed=1"], "usage: python demo/toy.py OUT"), (toy.main, ["out", "--align"], "--align=: expected int"),
    (toy.main, ["row.jsonl/out", "--align=1"], "the toy world into row.jsonl/out: Not a directory"),
    (pretrain.main, ["eyes"], "which tower?"), (pretrain.main, ["vit", "--steps=x"], "--steps=x: expected int"),
    (pretrain.main, ["vit", "--step=1"], "unknown setting"), (pretrain.main, ["llm", "--depth=0"], "depth=0: ex"),
    (pretrain.main, ["llm", "--out=row.jsonl"], "out=row.js")])
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, main, args, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "row.jsonl").write_text('{"image": "x.png"}\n')
    assert complaint in error(main, args)
    assert [p.name for p in tmp_path.iterdir()] == ["row.jsonl"]


def test_the_files_are_the_same_bytes_as_always(monkeypatch):
    """The results in README.md are of these data: a change needs a new toy.VERSION."""
    monkeypatch.setattr(toy, "draw_scene", lambda scene, seed: Image.new("RGB", (1, 1)))
    monkeypatch.setattr(Image.Image, "save", lambda *a, **k: None)
    digest = hashlib.sha256()
    for name, rows in (("align", toy.caption_rows), ("sft", toy.conversation_rows), ("test", toy.question_rows)):
        digest.update(json.dumps(rows(toy.draw_scenes(ROOT, name, 100, 0))).encode())
    assert (toy.VERSION, digest.hexdigest()[:16]) == (5, "03c2de3dd6f03480")
