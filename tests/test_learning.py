"""Some dozens of steps on three images must teach to answer by the image and to stop. Where something between data and
answer is cut, the loss still falls; only this shows it."""

import json

import pytest
import torch
from PIL import Image
from tiny_runs import run

import chat
import data
import generate
from kernels.cross_entropy import IGNORE

COLORS = ["red", "black", "white"]
QUESTION = "<image>\nWhat is this?"


@pytest.fixture
def trained(world, tmp_path):
    """() -> the answer to one question, and its number of tokens, for each of three images after stage 2 on them"""
    def go():
        (tmp_path / "images").mkdir()
        rows = []
        for c in COLORS:
            Image.new("RGB", (8, 8), c).save(tmp_path / "images" / f"{c}.png")
            rows.append({"image": f"{c}.png", "conversations": [{"from": "human", "value": QUESTION},
                                                                {"from": "gpt", "value": f"It is {c}."}]})
        (tmp_path / "data.json").write_text(json.dumps(rows))
        run("sft", world, tmp_path / "run", data=str(tmp_path / "data.json"), images=str(tmp_path / "images"),
            batch_size=3, steps=60, lr=1e-2, log_every=100, save_every=0)
        asked = generate.Chat(tmp_path / "run", "cpu")
        prompt = asked.prompt([(QUESTION, None)], [asked.layout.block()])
        pixels = torch.cat(asked.look(tmp_path / "images" / f"{c}.png" for c in COLORS)[0])
        answers = generate.generate(asked.model, [prompt] * 3, pixels, asked.stop_ids, 24, banned=asked.banned)
        return [(asked.tok.decode(ids).strip(), len(ids)) for ids in answers]
    return go


def test_it_answers_by_the_image_and_stops(trained):
    answers = trained()
    assert [text for text, _ in answers] == [f"It is {c}." for c in COLORS]
    assert max(n for _, n in answers) < 24


def test_a_model_without_its_images_would_be_seen(trained, monkeypatch):
    for module in (data, generate):
        monkeypatch.setattr(module, "preprocess", lambda image, spec: torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert sum(text == f"It is {c}." for (text, _), c in zip(trained(), COLORS)) <= 1, "chance"


def test_a_model_that_cannot_stop_would_be_seen(trained, monkeypatch):
    encode = data.Encoder.__call__

    def endless(self, *row):
        ids, labels, *more = encode(self, *row)
        stop = chat.stop_ids(self.tok, self.template)
        return ids, [IGNORE if y in stop else y for y in labels], *more
    monkeypatch.setattr(data.Encoder, "__call__", endless)
    assert all(text.startswith(f"It is {c}.") and n == 24 for (text, n), c in zip(trained(), COLORS))
