"""The toy world: what it promises is counted."""

import json
import random
import subprocess
import sys
from collections import Counter

import pytest
import toy
from conftest import ROOT, error

from data import Encoder, conversation
from formats.tokenizer import Tokenizer
from images import load_image


def worlds(n, test=False):
    for i in range(n):
        rng = random.Random(f"test/{i}")
        yield toy.make_scene(rng, test), rng


def combinations(scene):
    return {(o["color"], o["shape"], o["size"], o["row"], o["column"]) for o in scene["objects"]}


def test_a_seed_draws_the_same_scene_and_the_same_pixels():
    scene, rng = next(worlds(1))
    again, rng2 = next(worlds(1))
    assert scene == again and toy.draw(scene, 7).tobytes() == toy.draw(again, 7).tobytes() != toy.draw(scene, 8).tobytes()


def test_no_combination_of_a_test_scene_ever_occurs_in_training():
    train = set().union(*(combinations(s) for s, _ in worlds(3000)))
    test = set().union(*(combinations(s) for s, _ in worlds(1000, test=True)))
    assert not train & test
    assert len(train) == 540 and len(test) == 108  # all of them occur: a sixth of 648 is held out


def test_any_two_words_of_a_thing_still_meet_in_training():
    pairs = Counter()
    for scene, _ in worlds(3000):
        for c in combinations(scene):
            pairs.update((i, j, c[i], c[j]) for i in range(5) for j in range(i))
    values = (6, 6, 2, 3, 3)
    assert len(pairs) == sum(values[i] * values[j] for i in range(5) for j in range(i))


def test_scenes_hold_one_to_four_different_shapes_in_different_cells():
    counts = Counter()
    for scene, _ in worlds(2000):
        cells = [(o["row"], o["column"]) for o in toy.things(scene)]
        assert len(set(cells)) == len(cells)
        assert len({toy.pair(o) for o in scene["objects"]}) == len(scene["objects"])
        counts[len(scene["objects"])] += 1
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 300


def test_half_of_the_yes_no_questions_are_no_and_many_noes_are_adversarial():
    said, crossed = Counter(), 0
    for scene, rng in worlds(3000):
        for kind, q, a, _ in toy.questions(scene, rng):
            if kind == "exists":
                said[a] += 1
                color, shape = q.rstrip("?").split()[-2:]
                crossed += a == "no" and color in {o["color"] for o in scene["objects"]} and shape in {o["shape"] for o in scene["objects"]}
    assert abs(said["yes"] / 3000 - 0.5) < 0.03    # 3 standard deviations of 3,000 fair coins
    assert crossed > 0.2 * said["no"]


def answer_from(scene, question):
    """An independent reader of the scene graph: the answer to a question, from its words."""
    words = question.rstrip("?").replace(",", "").split()
    by_pair = {toy.pair(o): o for o in scene["objects"]}
    by_place = {toy.place(o): o for o in scene["objects"]}
    if question.startswith("How many"):
        what = words[2]
        if what == "shapes":
            return str(len(scene["objects"]))
        kind = next((k for k in ("color", "size") if what in {"color": toy.COLORS, "size": toy.SIZES}[k]), "shape")
        what = what if kind != "shape" else "cross" if what == "crosses" else what[:-1]
        return str(sum(o[kind] == what for o in scene["objects"]))
    if question.startswith("Where"):
        return toy.place(by_pair[" ".join(words[-2:])])
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
        for _, question, answer, sentence in toy.questions(scene, rng):
            assert answer_from(scene, question) == answer
            assert answer in sentence.lower().rstrip(".").split() or answer in sentence.lower()


def test_a_written_scene_names_every_thing_once():
    for scene, rng in worlds(200):
        text = toy.written(scene, rng)
        assert len(text.split("; ")) == len(toy.things(scene))
        for o in toy.things(scene):
            assert f"{toy.place(o)}: " in text


def test_files_are_llava_files_and_drawn_once(tmp_path):
    sizes = dict(align=6, sft=40, val_align=2, val_sft=2, test=4)
    assert toy.write(tmp_path, **sizes) == list(sizes)
    assert toy.write(tmp_path, **sizes) == []
    for name in ("align", "sft"):
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        for row in rows:
            turns, names, system = conversation(row)
            assert all(load_image(tmp_path / "images" / n).size == (toy.SIDE, toy.SIDE) for n in names)
            assert sum(u.count("<image>") for u, _ in turns) == len(names)
        encode = Encoder(Tokenizer(ROOT / "demo/llm"), "plain" if name == "align" else "vicuna_v1", 3, 36, 512, "")
        assert all(encode(row)[3] == 0 for row in rows), "none is dropped, none is cut"
    assert any("image" not in r for r in rows), "some conversations are text alone"
    assert any(len(r["conversations"]) > 8 for r in rows)
    short = [toy.SHORT in r["conversations"][0]["value"] for r in rows]
    assert any(short) and not all(short)
    questions = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert {q["type"] for q in questions} <= set(toy.TYPES) and len({q["question_id"] for q in questions}) == len(questions)


def test_a_file_of_conversations_has_as_many_yes_as_no_and_some_descriptions():
    scenes = [(f"s_{i}", f"{i}.png", s, rng) for i, (s, rng) in enumerate(worlds(1500))]
    rows = toy.conversations(scenes)
    said = Counter(m["value"].split(",")[0].lower() for r in rows
                   for q, m in zip(r["conversations"][::2], r["conversations"][1::2]) if "Is there" in q["value"])
    assert said.keys() == {"yes", "no"} and abs(said["yes"] - said["no"]) <= 1 and said["yes"] > 300
    described = sum("Describe the image" in r["conversations"][0]["value"] for r in rows)
    assert 0.12 < described / 1500 < 0.18


def test_captions_are_scored_by_the_facts_in_them():
    """A caption agrees with itself, each wrong word costs its own kind alone, and the file names lead to the scenes."""
    import captions
    true = "top left: a large red circle; middle center: a sign that says 7; bottom right: a small blue star"
    assert captions.facts(true) == {
        "place": {"top left", "middle center", "bottom right"}, "size": {("top left", "large"), ("bottom right", "small")},
        "shape": {("top left", "circle"), ("middle center", "sign"), ("bottom right", "star")},
        "color": {("top left", "red"), ("bottom right", "blue")}, "read": {("middle center", "7")}}
    perfect = dict.fromkeys(["place", "shape", "color", "size", "read"], 1.0)
    assert captions.f1([true], [true]) == perfect
    for old, new, kind, score in (("circle", "ring", "shape", 0.667), ("red", "green", "color", 0.5),
                                  ("large", "small", "size", 0.5), ("7", "8", "read", 0.0)):
        assert captions.f1([true.replace(old, new)], [true]) == perfect | {kind: score}
    assert captions.f1(["a red circle, a sign and a blue star"], [true])["shape"] == 0  # without places it says nothing
    for scene, _ in worlds(50):
        caption, things = toy.caption(scene, True), toy.things(scene)
        assert len(captions.facts(caption)["shape"]) == len(things) == len(captions.facts(caption)["place"])


def test_the_scene_of_a_test_picture_is_found_by_its_name(tmp_path):
    import captions
    (tmp_path / "images").mkdir()
    names = {name: scene for _, name, scene, _ in toy.scenes(tmp_path, "test", 3, 0)}
    assert {n: toy.make_scene(random.Random(captions.seed(n)), test=True) for n in names} == names


@pytest.mark.parametrize("words, complaint", [
    (["sheet.py"], "python demo/sheet.py"), (["sheet.py", "gone.jsonl", "x.png"], "gone.jsonl, or a picture in it"),
    (["sheet.py", ".", "x.png"], "error: ., or a picture"), (["sheet.py", "row.jsonl", "x.png"], "no picture with 7 q"),
    (["toy.py", "--seed=1"], "python demo/toy.py OUT"), (["toy.py", "out", "--align"], "--align=: expected int"),
    (["toy.py", "row.jsonl/out", "--align=1"], "cannot be drawn in row.jsonl/out: Not a directory")])
def test_a_demo_that_is_asked_wrongly_says_so_in_one_line(tmp_path, words, complaint):
    (tmp_path / "row.jsonl").write_text('{"image": "x.png"}\n')
    done = subprocess.run([sys.executable, ROOT / "demo" / words[0], *words[1:]], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 1 and complaint in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["row.jsonl"]


def test_a_wrong_setting_of_the_schooling_is_one_line(monkeypatch):
    import pretrain
    for word, complaint in (("--steps=x", "--steps=x: expected int"), ("--step=1", "unknown setting 'step'"),
                            ("--steps=0", "steps=0: expected at least 1"), ("--out=/dev/null", "/dev/null is not a fo")):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", "eyes", word])
        assert complaint in error(pretrain.settings, steps=1, out="x")
