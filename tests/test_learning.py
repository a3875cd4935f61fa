"""What a few dozen steps on three pictures must teach: to answer by the picture, and to stop. The sharpest sign that
something between data and answer is cut, for then the loss still falls."""

import json

import pytest
import torch
from PIL import Image
from test_stages import run, signals, world  # noqa: F401  (fixtures)

import chat
import data
import generate
import images
from generate import generate
from kernels import cross_entropy

COLORS = ["red", "black", "white"]


def learnt(world, folder):  # noqa: F811
    """Stage 2 on three pictures and one question -> [(the answer in words, its tokens)] for each of the pictures"""
    (folder / "images").mkdir()
    rows = []
    for c in COLORS:
        Image.new("RGB", (8, 8), c).save(folder / "images" / f"{c}.png")
        rows.append({"image": f"{c}.png", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                                            {"from": "gpt", "value": f"It is {c}."}]})
    (folder / "data.json").write_text(json.dumps(rows))
    run("sft", {**world, "val_data": ""}, folder / "run", data=str(folder / "data.json"), images=str(folder / "images"),
        batch_size=3, steps=60, lr=1e-2, log_every=100, save_every=0)
    speaker = generate.Chat(str(folder / "run"), "cpu")
    prompt = speaker.prompt([(rows[0]["conversations"][0]["value"], None)], 1)
    pictures = torch.stack([speaker.pixels(folder / "images" / f"{c}.png") for c in COLORS])
    said = generate(speaker.model, [prompt] * 3, pictures, speaker.stop_ids, 40, banned=speaker.banned)
    return [(speaker.tok.decode(ids).strip(), len(ids)) for ids in said]


def test_it_answers_by_the_picture_and_stops_by_itself(world, tmp_path):  # noqa: F811
    said = learnt(world, tmp_path)
    assert [text for text, _ in said] == [f"It is {c}." for c in COLORS]
    assert max(n for _, n in said) < 40


def test_a_model_whose_pictures_do_not_arrive_would_be_seen(world, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(images, "preprocess", lambda image, spec: torch.zeros(3, spec.side, spec.side, dtype=torch.uint8))
    said = learnt(world, tmp_path)
    assert sum(text == f"It is {c}." for (text, _), c in zip(said, COLORS)) <= 1, "chance"


def test_a_model_that_never_learnt_to_stop_would_be_seen(world, tmp_path, monkeypatch):  # noqa: F811
    encode = data.Encoder.__call__

    def endless(self, row):
        ids, labels, *more = encode(self, row)
        stop = chat.stop_ids(self.tok, self.template)
        return ids, [cross_entropy.IGNORE if y in stop else y for y in labels], *more
    monkeypatch.setattr(data.Encoder, "__call__", endless)
    said = learnt(world, tmp_path)
    assert all(text.startswith(f"It is {c}.") and n == 40 for (text, n), c in zip(said, COLORS))
