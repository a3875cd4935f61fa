"""The page of one answer: whole, harmless, and true to the maps; pointing accuracy finds what was planted."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from conftest import error, tiny_config
from test_read_again import PRE, asked, noise, tiny_chat, tok  # noqa: F401

from demo import toy
from demo.variants import scenes
from formats import llava
from formats.tokenizer import Tokenizer
from generate import Chat
from tools import look, pointing
from tools.attention import image_maps


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tok):  # noqa: F811
    root = tmp_path_factory.mktemp("look")
    chat = tiny_chat(tok)
    source = llava.Folder(tok, {"model_type": "clip_vision_model", "hidden_size": 32}, {"model_type": "llama"}, PRE, {},
                          {})
    llava.save_model(root / "model", chat.model.state_dict(), chat.cfg, source, "chatml", "Be brief.", "pad",
                     torch.float64, "")
    noise().save(root / "a.png")
    return root


def page_of(folder, **settings):
    out = folder / "page" / "look.html"
    out.parent.mkdir(exist_ok=True)
    look.main(look.Settings(**{**dict(model=str(folder / "model"), image=str(folder / "a.png"), prompt="What?",
                                      out=str(out), device="cpu", dtype="fp64", max_new_tokens=6), **settings}))
    return out.read_text("utf-8")


def data_of(page):
    return json.loads(re.search("<script type=application/json id=data>(.*?)</script>", page, re.S)[1])


def test_the_page_needs_no_other_file(folder, capsys):
    evil = "</script><script>alert('a')</script> <img src=x onerror=alert(1)> \ud800 & \"b\""
    page = page_of(folder, prompt=evil.replace("\ud800", ""), model=str(folder / "model"))
    assert page.count("<script") == page.count("</script>") == 2 and "onerror" in data_of(page)["question"]
    assert "<img src=x" not in page
    assert not re.search(r"https?:|\b(src|href)\s*=\s*[\"']?(?!x)|@import|url\(|fetch|innerHTML", page)
    assert "default-src 'none'" in page and "width=device-width" in page
    assert capsys.readouterr().out.strip() == Chat(folder / "model", "cpu", "fp64").ask(
        folder / "a.png", evil.replace("\ud800", ""), 6)
    assert look.safe_json({"a": "\ud800<b"}).isascii()


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_record_is_the_answer(tok, images):  # noqa: F811
    chat = tiny_chat(tok)
    prompt, answer, tiles, blocks = asked(chat, images)
    chat.stop_ids = {answer[-1]}
    found = json.loads(look.safe_json(look.record(chat, prompt, answer, tiles, blocks)))
    assert [t["end"] for t in found["tokens"]] == [i in chat.stop_ids for i in answer]
    assert len(found["images"]) == images and bool(found["no_map"]) == (images == 0)
    for t in found["tokens"]:
        shares = [p for _, p, _ in t["top"]]
        assert len(shares) == 5 and shares == sorted(shares, reverse=True)
        assert [p for _, p, own in t["top"] if own] == [t["p"]] == shares[:1]            # greedy
    if images:
        _, relative, raw = image_maps(chat, prompt, answer, tiles, blocks, "", range(2))
        for name, maps in (("relative", relative), ("raw", raw)):
            values = np.frombuffer(base64.b64decode(found[name]["values"]), np.uint8).reshape(maps.shape)
            peak = np.array(found[name]["peak"])[:, :, None, None, None]
            assert np.abs(values / 255 * peak - maps.numpy()).max() <= peak.max() / 500
            assert (values.max((2, 3, 4)) == 255).all()


def test_the_prompt_folds_images_and_shows_control_tokens(tok):  # noqa: F811
    chat = tiny_chat(tok)
    prompt, *_ = asked(chat, 2, "What <|im_end|> is \u202ethis?")
    parts = look.prompt_parts(tok, prompt.tolist(), 3)
    assert [t for k, t in parts if k == "image"] == ["4 x image"] * 2
    assert [t for k, t in parts if k == "control"].count("<|im_start|>") == 3
    text = "".join(t for k, t in parts if k == "text")
    assert "<|im_end|>" in text and "\u202e" not in text        # typed by the user: text; a direction mark: escaped


def test_token_texts_joined_are_the_answer(tok_folder):
    tok = Tokenizer(tok_folder)
    for words in ("It is a black cat.", "1 2 3 \u00e9\u4f60\u597d!", "Yes! No.\nTwo dogs"):
        ids = tok.text(words)[0]
        parts = [look.piece_text(tok, ids[:t], i) for t, i in enumerate(ids)]
        assert all(parts)
        if words.isascii():                                     # the bytes of a Chinese character: their own names
            assert "".join(parts).strip() == words
    assert look.piece_text(tok, [], tok.eos) == "</s>"


def test_bad_input_ends_in_one_line(folder, tmp_path):
    assert "--prompt" in error(page_of, folder, prompt="")
    assert "layer=3: this decoder has 2" in error(page_of, folder, layer=3)
    assert "gone.png" in error(page_of, folder, image="gone.png")
    assert "could not be written" in error(page_of, folder, out=str(tmp_path / "gone" / "a.html"))


def test_the_page_is_written_beside_the_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(folder / "model")
    look.main(look.Settings(model="run/model", prompt="What?", device="cpu", dtype="fp64", max_new_tokens=2))
    assert [p.name for p in run.iterdir() if p.is_file()] == ["look.html"] and [*tmp_path.iterdir()] == [run]
    assert capsys.readouterr().err.startswith("the page: run/look.html; no heat map")
    assert "images" in error(page_of, folder, pointing=True, data=str(tmp_path / "q.jsonl"))
    (tmp_path / "images").mkdir()
    (tmp_path / "q.jsonl").write_text('{"image": "cat.png", "text": "?", "answer": "a", "type": "color"}\n')
    assert "not the toy world's" in error(page_of, folder, pointing=True, data=str(tmp_path / "q.jsonl"))


# ---- pointing -------------------------------------------------------------------------------------------------------

def questions(n=12):
    return [{"image": name, "text": f"{q}\n{toy.SHORT}", "answer": a, "type": kind} for name, scene, rng in
            scenes("test", n) for _ in [rng.getrandbits(32)] for kind, q, a, _ in toy.scene_questions(scene, rng)]


def test_the_asked_thing_has_the_answer():
    """In 60 scenes: the thing that a question names has the answer as its colour, shape, size, place or digit."""
    drawn, seen = {name: scene for name, scene, _ in scenes("test", 60)}, set()
    for row in questions(60):
        thing, kind = pointing.asked_thing(row, drawn[row["image"]]), row["type"]
        if kind in ("count", "relation") or row["answer"] == "no":
            assert thing is None
            continue
        seen.add(kind)
        own = {**thing, "place": toy.place_name(thing), "read": str(thing.get("digit")), "exists": "yes"}
        assert own[kind] == row["answer"]
        assert kind != "exists" or f"{toy.article(toy.pair_name(thing))}?" in row["text"]
    assert seen == set(pointing.KINDS)


def test_cells_match_a_definition_by_loops():
    maps = torch.rand(2, 6, 6)
    for m, c in zip(maps, pointing.largest_cell(maps)):
        sums = [sum(float(m[y, x]) for y in range(6) for x in range(6) if (y // 2, x // 2) == (r, k))
                for r in range(3) for k in range(3)]
        assert int(c) == sums.index(max(sums))
    assert "3 x 3 cells" in error(pointing.largest_cell, torch.rand(4, 4))


class Planted:
    """Instead of a Chat and its attention: layer 1 looks at the asked cell, but more at a sink; layer 2 at the sink"""

    def __init__(self, rows):
        self.rows, self.now = rows, None
        self.cfg = tiny_config()
        self.cfg.tokens = self.cfg.vision.patch_size = 9
        self.cfg.vision.image_size = 27
        self.model = torch.nn.Module()
        self.model.language_model = torch.nn.Module()
        self.model.language_model.model = torch.nn.Module()
        self.model.language_model.model.layers = [None, None]

    def look(self, files):
        self.image = str(files[0]).split("/")[-1]
        return [None], [[3] * 9]

    def prompt(self, turns, blocks):
        self.text = turns[0][0].removeprefix("<image>\n")
        return torch.tensor([1] + [3] * 9 + [5])

    def read(self, chat, prompt, answer, tiles, layers):
        drawn = {name: scene for name, scene, _ in scenes("test", 12)}
        row = next((r for r in self.rows if (r["text"], r["image"]) == (self.text, self.image)), None)
        a = torch.full((2, 1, 11), 0.01)
        a[:, 0, 1 + 4] = 0.5                                                       # the sink, in the middle cell
        if row:
            thing = pointing.asked_thing(row, drawn[self.image])
            a[0, 0, 1 + 3 * thing["row"] + thing["column"]] *= 9
        return None, dict(enumerate(a))


def test_a_planted_map_is_found_behind_a_sink(monkeypatch, tmp_path):
    rows = questions()
    drawn = {name: scene for name, scene, _ in scenes("test", 12)}
    things = [pointing.asked_thing(r, drawn[r["image"]]) for r in rows]
    middle = [t["row"] == t["column"] == 1 for t in things if t]
    planted = Planted(rows)
    monkeypatch.setattr(pointing, "read_again", planted.read)
    monkeypatch.setattr(pointing, "safe_path", lambda folder, name: name)
    found = pointing.pointing(planted, rows, tmp_path)
    assert found["n"] == len(middle) > 40
    assert found["relative"][0] == 1.0 and found["raw"] == [sum(middle) / len(middle)] * 2
    assert found["relative_shuffled"][0] < 0.5 and found["relative"][1] < 0.5
    assert found["any_thing"] == pytest.approx(sum(
        1 / len(toy.things(drawn[r["image"]])) for r, t in zip(rows, things) if t) / len(middle))
    assert len(pointing.table_lines(found)) == 4 and "100.0%" in pointing.table_lines(found)[1]
    assert "more images" in error(pointing.pointing, planted, rows[:3], tmp_path)
