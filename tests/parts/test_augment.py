"""Augmentation: which samples it may change, that it needs no state, and that evaluation has none."""

import json

import numpy as np
import pytest
import torch
from conftest import error
from PIL import Image
from tiny_runs import rows, run

from data import Encoder, Steps
from formats.tokenizer import Tokenizer
from images import ImageSpec, Layout
from parts.augment import KINDS, Change, allowed, augment_kinds, draw_change
from run.loader import loader

ALL = {*KINDS}


def asked(question, answer="A red cat.", **row):
    return {"id": "left 5", "image": "right_7.png", "letters": False,
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **row}


@pytest.mark.parametrize("row, kinds", [
    (asked("<image>\nWhat is this?"), ALL), (asked("Is it bright and upright?"), ALL),
    (asked("What?", letters=None), {"crop", "jitter"}), (asked("What?", letters=True), {"crop", "jitter"}),
    (asked("What?", letters="false"), {"crop", "jitter"}), (asked("What?", letters=0), {"crop", "jitter"}),
    (asked("What is left of it?"), {"crop", "jitter"}), (asked("What?", "It is on the RIGHT."), {"crop", "jitter"}),
    (asked("Is it the rightmost?"), {"crop", "jitter"}), (asked("Does it turn counterclockwise?"), {"crop", "jitter"}),
    (asked("He left the room."), {"crop", "jitter"}), (asked("What?", "rechts"), {"crop", "jitter"}),
    (asked("What?", "a derecha"), {"crop", "jitter"}), (asked("What?", "linker Schuh"), {"crop", "jitter"}),
    (asked("Où est le café ?"), {"jitter"}), (asked("左に何がありますか"), {"jitter"}),
    (asked("三艘船"), {"jitter"}),
    (asked("Сколько лодок?", "три"), {"jitter"}), (asked("What?", "a caf\u00e9"), {"jitter"}),
    (asked("How?", "\u0664"), {"jitter"}),                                            # a digit in Arabic script
    *((asked(text, "gut"), {"jitter"}) for text in (
        "Was ist das?", "Drei Boote", "Que voit-on dans cette image ?", "trois bateaux", "tres barcos",
        "Que hay en la imagen?", "Che cosa vedi?", "tre barche", "O que tem na foto? uma casa", "duas casas",
        "Wat is dit voor een dier?", "twee honden", "Welche Farbe hat dieser Kreis?", "Welke kleur heeft deze kat?",
        "Describe esta imagen.", "Qual a cor do gato?", "Quanti gatti?", "Quantos gatos?")),
    *((asked("What?", text), {"flip", "jitter"}) for text in (
        "thousands of birds", "a single cat", "a duo", "a quarter", "twice as large", "zero cats", "the final boat")),
    (asked("Is it on the starboard side?"), {"crop", "jitter"}), (asked("The reverse?"), {"crop", "jitter"}),
    (asked("What?", "The third boat"), {"flip", "jitter"}), (asked("The last car?"), {"flip", "jitter"}),
    (asked("What?", "the whole car"), {"flip", "jitter"}), (asked("What?", "forty birds"), {"flip", "jitter"}),
    (asked("What?", "the sixth and seventh"), {"flip", "jitter"}), (asked("What?", "health and width, truth"), ALL),
    (asked("Is the dog on a white van at the dam, or in a den, or on the mat?"), ALL),
    (asked("What does the sign say?"), {"jitter"}), (asked("Read it."), {"jitter"}), (asked("How?", "42"), {"jitter"}),
    (asked("Which letters?"), {"jitter"}), (asked("How many cats?"), {"flip", "jitter"}),
    (asked("What is at the edge?"), {"flip", "jitter"}), (asked("What?", "Three boats."), {"flip", "jitter"}),
    (asked("What?", "A pair of ducks"), {"flip", "jitter"}), (asked("Only this one?"), {"flip", "jitter"}),
    (asked("What?", "fourteen cups"), {"flip", "jitter"}), (asked("What?", "An oneness of weighty, lonely tents"), ALL),
    (asked("Where?", "[0.1, 0.2, 0.5, 0.6]"), {"jitter"}), (asked("Where?", "(x, y) < [ .5 , .25]"), {"jitter"}),
    (asked("Where?", "<loc_top>"), {"jitter"}), (asked("Where?", "<box>a</box>"), {"jitter"}),
    (asked("Where?", bbox=[1.0, 2.0]), {"jitter"}), (asked("Where?", objects=[{"box": {"x": 1}}]), {"jitter"}),
    (asked("What?", bbox=None), ALL), (asked("What?", images=[{"bytes": b"x", "path": "left.png"}]), ALL),
    ({"image": "x", "caption": "a cat, left"}, {"crop", "jitter"}), ({"text": "a cat", "letters": False}, ALL),
    ({"letters": False, "messages": [{"role": "user", "content": [{"type": "image", "image_url": {"url": "data:5,5"}},
                                                                   {"type": "text", "text": "What?"}]}]}, ALL),
    ({"letters": False, "messages": [{"role": "user", "content": [{"type": "text", "text": "left?"}]}]},
     {"crop", "jitter"}),
    ({"letters": False, "prompt": "What?", "chosen": "on the left", "rejected": "no"}, {"crop", "jitter"})])
def test_texts_decide_what_may_change(row, kinds):
    assert allowed(row) == kinds


def test_a_change_keeps_the_size_and_moves_pixels():
    x, y = np.meshgrid(np.arange(60), np.arange(40))
    image = Image.fromarray(np.stack([4 * x, 6 * y, 0 * x + 100], 2).astype(np.uint8))
    same = np.asarray(Change()(image))
    assert Change()(image) is image
    assert (np.asarray(Change(flip=True)(image)) == same[:, ::-1]).all()
    cut = np.asarray(Change(corner=(0, 1), size=.9)(image)).astype(int)                  # left and bottom are kept
    assert cut.shape == same.shape and cut[0, 0, 0] < 3 and abs(cut[-1, 0, 1] - 6 * 39) < 3
    assert abs(cut[0, -1, 0] - 4 * 59 * .9) < 4 and abs(cut[0, 0, 1] - 6 * 39 * .1) < 6
    bright = np.asarray(Change(factors=(1.1, 1, 1))(image)).astype(int)
    assert abs(bright - (same * 1.1).clip(0, 255)).max() <= 1
    assert (np.asarray(Change(factors=(1, 1, 1))(image)) == same).all()


def test_changes_are_mild_and_cover_their_range():
    some = [draw_change(KINDS, asked("What?"), 0, step, n) for step in range(40) for n in range(25)]
    sizes, corners = [c.size for c in some], np.array([c.corner for c in some])
    factors = np.array([c.factors for c in some])
    assert .9 <= min(sizes) < .902 and .998 < max(sizes) <= 1 and .46 < np.mean([c.flip for c in some]) < .54
    assert 0 <= corners.min() < .01 and .99 < corners.max() <= 1
    assert .9 <= factors.min() < .902 and 1.098 < factors.max() <= 1.1
    assert abs(np.corrcoef(factors.T) - np.eye(3)).max() < .1, "drawn one by one"
    assert len({*some}) == 1000 and some[26] == draw_change(KINDS, asked("What?"), 0, 1, 1)
    assert draw_change(["jitter"], asked("What?"), 0, 1, 1) == Change(factors=some[26].factors), "alone or with others"
    assert draw_change(KINDS, asked("What?"), 1, 1, 1) != some[26]
    assert draw_change([], asked("What?"), 0, 1, 1) == Change()


def test_an_unknown_augmentation_is_refused():
    assert augment_kinds("") == [] and augment_kinds("jitter, flip") == ["jitter", "flip"]
    for names in ("mixup", "crop,", "crop;flip"):
        assert f"augment={names}: expected some of crop, jitter, flip" in error(augment_kinds, names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve samples with different images; every second may be flipped"""
    folder, out = tmp_path_factory.mktemp("augment"), []
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 255, (9, 12, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        out.append(asked("<image>\nWhat?" + "?" * i, letters=bool(i % 2), image=f"{i}.png", id="abcdefghijkl"[i]))
    (folder / "rows.json").write_text(json.dumps(out))
    return folder


def steps_of(folder, tok, augment, rank=0, size=1):
    encode = Encoder(Tokenizer(tok), "vicuna_v1", Layout(3, 4), 80, "")
    return Steps(str(folder / "rows.json"), str(folder), encode, ImageSpec(12, "squash"), 6, 160, 0, rank, size,
                 augment=augment)


def images(parts):
    """-> {ids of a sample: its image}"""
    out = {}
    for b in (b for part in parts for b in part.micro):
        starts = [*(b.pos == 0).nonzero().flatten().tolist(), len(b.ids)]
        out |= {tuple(b.ids[a:z].tolist()): image for a, z, image in zip(starts, starts[1:], b.images)}
    return out


def test_ranks_workers_and_resume_see_the_same_pixels(folder, bytes_folder):
    whole = steps_of(folder, bytes_folder, "crop,jitter,flip")
    first, second, third = (whole[step] for step in (0, 1, 2))
    by_worker = [*loader(whole, [2, 1], 2)]
    again = steps_of(folder, bytes_folder, "crop,jitter,flip")[0]
    for one, other in ((third, by_worker[0]), (second, by_worker[1]), (first, again)):
        assert all(torch.equal(a, b) for x, y in zip(one.micro, other.micro, strict=True) for a, b in zip(x, y))
    parts = [steps_of(folder, bytes_folder, "crop,jitter,flip", rank, 3)[1] for rank in range(3)]
    one, three = images([second]), images(parts)
    assert one.keys() == three.keys() and len(one) == 6 and all(torch.equal(one[k], three[k]) for k in one)
    assert sum(p.flipped for p in parts) == second.flipped
    plain = images([steps_of(folder, bytes_folder, "")[step] for step in (0, 1)])
    changed = images([first, second])
    assert len(plain) == 12 and not any(torch.equal(plain[k], changed[k]) for k in plain)


def test_flipped_samples_are_counted(folder, bytes_folder):
    plain, flips = steps_of(folder, bytes_folder, ""), steps_of(folder, bytes_folder, "flip")
    total = 0
    for step in range(8):
        before, after = images([plain[step]]), images([flips[step]])
        moved = [k for k in before if not torch.equal(before[k], after[k])]
        assert all(torch.equal(before[k].flip(-1), after[k]) for k in moved) and flips[step].flipped == len(moved)
        total += len(moved)
    assert 4 <= total <= 20, "about half of the 24 samples that may be flipped"


def test_validation_and_a_run_without_it_are_plain(folder, validated, short_answers, tmp_path):
    """A run logs its flips; its validation loss, of weights that do not move, is that of a plain run"""
    how = {**validated, "data": str(folder / "rows.json"), "images": str(folder), "val_data": str(folder / "rows.json"),
           "max_len": 80, "steps": 4, "eval_every": 4, "sample_every": 0}
    run("align", how, tmp_path / "plain", lr=1e-30, augment="")
    run("align", how, tmp_path / "changed", lr=1e-30, augment="crop,jitter,flip")
    plain, changed = (rows(tmp_path / f"{name}/log.jsonl") for name in ("plain", "changed"))
    losses = [[row["val_loss"] for row in log if "val_loss" in row] for log in (plain, changed)]
    assert losses[0] == losses[1] and len(losses[0]) == 1
    assert [row["loss"] for row in plain if "lr" in row] != [row["loss"] for row in changed if "lr" in row]
    assert [row["flipped"] for row in plain if "lr" in row] == [0] * 4
    assert sum(row["flipped"] for row in changed if "lr" in row) > 0
