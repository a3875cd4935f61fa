"""Boxes of the toy world: they bound what is drawn, rows and questions are true, a perfect answer scores 1."""

import json
import random

import numpy as np
import pytest
from conftest import error

import eval
from formats.rows import conversation
from demo import boxes, toy
from demo.variants import scenes
from metrics.boxes import iou, read_box


@pytest.mark.parametrize("shape", toy.SHAPES)
def test_a_box_bounds_its_shape(shape):
    """The coloured pixels of a lone large object reach to its box, but for the last pixel of a thin tip"""
    for seed in range(4):
        color, rng = ("red", "blue", "green", "purple")[seed], random.Random(seed)
        o = dict(color=color, shape=shape, size="large", row=rng.randrange(3), column=rng.randrange(3))
        scene = dict(objects=[o], sign=None)
        (name, box), = boxes.object_boxes(scene, seed).items()
        pixels = np.asarray(toy.draw_scene(scene, seed), float)
        near = np.abs(pixels - np.array(toy.COLORS[color])).max(-1) < 45
        ys, xs = np.nonzero(near)
        seen = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert name == f"{color} {shape}" and np.abs(seen - np.array(box) * toy.SIDE).max() < 1.6, (seed, seen, box)


def test_drawing_tells_circles_without_change():
    for _, scene, rng in scenes("test", 5):
        seed, circles = rng.getrandbits(32), []
        assert toy.draw_scene(scene, seed).tobytes() == toy.draw_scene(scene, seed, circles).tobytes()
        assert len(circles) == len(scene["objects"])
        for o, (x, y, r) in zip(scene["objects"], circles):
            assert (int(x // toy.CELL), int(y // toy.CELL)) == (o["column"], o["row"])
            assert (r > 7) == (o["size"] == "large")


def test_questions_about_boxes_have_true_answers(tmp_path, capsys):
    """Every row is a conversation that training takes; perfect answers score 1; the boxes of other things do not."""
    sizes = dict(sft=12, test=8)
    toy.write_world(tmp_path, "test", test=8)
    assert boxes.write_boxes(tmp_path, sizes) == (12, sum(len(s["objects"]) for _, s, _ in scenes("test", 8)))
    for row in json.loads((tmp_path / "boxes_sft.json").read_text()):
        turns, names, _ = conversation(row)
        assert names == [row["image"]] and all(read_box(answer) for _, answer in turns)
        assert turns[0][0].startswith("<image>\nGive the box of the ") and not turns[0][0].endswith(toy.SHORT)
    questions = [json.loads(line) for line in (tmp_path / "boxes.jsonl").read_text().splitlines()]
    assert all((tmp_path / "images" / q["image"]).is_file() for q in questions)
    for answers, accuracy in (([q["answer"] for q in questions], 1), (["somewhere"] * len(questions), 0)):
        (tmp_path / "a.jsonl").write_text("".join(
            json.dumps({"question_id": q["question_id"], "text": a}) + "\n" for q, a in zip(questions, answers)))
        eval.main(eval.Settings(score=str(tmp_path / "a.jsonl"), data=str(tmp_path / "boxes.jsonl"), task="refcoco"))
        result = json.loads(capsys.readouterr().out)
        assert result["accuracy"] == accuracy and result["iou"] == accuracy and set(result["types"]) == {*toy.SIZES}
    by_image = {}
    for q in questions:
        by_image.setdefault(q["image"], []).append(read_box(q["answer"]))
    assert all(iou(a, b) < 0.3 for found in by_image.values() for a in found for b in found if a != b)


def test_boxes_need_a_toy_world(tmp_path):
    assert "holds no toy world" in error(boxes.main, [str(tmp_path)])
    assert "usage: python demo/boxes.py" in error(boxes.main, ["a", "b"])
