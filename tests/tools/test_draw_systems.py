"""The pictures of the systems and the page that shows them."""

import re
import xml.etree.ElementTree as ET

import pytest
from conftest import error

from demo import systems
from tools import draw_systems
from tools.draw_systems import CODE, code, files, mask, paper_size, with_score


def test_page_and_pictures_are_up_to_date():
    """After a change of a part, a recipe or a row: python -m tools.draw_systems"""
    for file, text in files().items():
        assert file.read_text() == text, f"{file} is old"
        if file.suffix == ".svg":
            ET.fromstring(text)


def test_settings_are_refused(monkeypatch):
    monkeypatch.setattr(draw_systems, "files", lambda: pytest.fail("drawn"))
    assert error(draw_systems.main, ["--name=fuyu"]).startswith("usage: python -m tools.draw_systems")


def rows(name):
    """-> the mask as strings: the letter of a key that is seen, or a dot"""
    _, keys, seen = mask(name, paper_size(name)[0])
    return ["".join(k if on else "." for k, on in zip(keys, row)) for row in seen.tolist()]


def test_masks_are_those_of_the_papers():
    assert rows("llava15") == ["biiiiqqqaaa"[: n + 1].ljust(11, ".") for n in range(11)]
    prefix = ["iiiibqqq..."] * 8 + ["iiiibqqqa..", "iiiibqqqaa.", "iiiibqqqaaa"]
    assert rows("paligemma") == rows("pali3") == prefix
    chat = rows("visualchat")
    assert chat[1] == ".i..........." and chat[8] == "........i....", "an image token sees itself alone"
    assert chat[3] == "biiq........." and chat[12] == "biiqqaaiiqqaa"
    flamingo = rows("flamingo")
    assert flamingo[0] == "......b..........", "no image before the first marker"
    assert flamingo[1] == "zzz...bi........." and flamingo[6] == "...zzzbiqqaai....", "the last image alone"


@pytest.mark.parametrize("name, stages", [
    ("llava15", [{"connector"}, {"connector", "llm"}]), ("blip2", [{"connector"}] * 2),
    ("flamingo", [{"connector", "gated"}] * 2), ("visualchat", [{"connector", "embeddings"}] * 2),
    ("internvl15", [{"tower", "connector"}, {"tower", "connector", "llm", "embeddings", "gated"}])])
def test_who_trains_is_read_from_the_recipe(name, stages):
    assert paper_size(name)[1] == stages


def test_ten_lines_are_code_of_the_repository():
    for name, (file, what) in CODE.items():
        lines = code(file, what)
        source = (draw_systems.ROOT / file).read_text()
        assert 2 <= len(lines) <= 15 and all(line.strip() in source for line in lines), name
        assert '"""' not in "\n".join(lines)
    assert {*CODE} == {*systems.SYSTEMS}


def test_a_picture_has_the_numbers_of_the_paper():
    text = " ".join(re.findall(r">([^<]+)</text>", draw_systems.draw("blip2")))
    for fact in ("EVA ViT", "224 px, 39 x 1408", "257 features, last layer", "32 tokens per image", "32 x 2560"):
        assert fact in text


def test_a_recipe_states_the_mean_of_its_rows():
    """Above its commands, in place of an older score; a system without rows has none"""
    text = '"""Name.{}\n\n    python train_sft.py recipes/x.py --dry_run\n"""\nlr = 1.0  # Toy world: .\n'
    rows = [{"seeing": 0.5, "blind": 0.1}, {"seeing": 0.7, "blind": 0.1}]
    new = text.format("\nToy world, one epoch per stage: 60.0 ± 14.1 % seeing, 10.0 ± 0.0 % blind, 2 seeds "
                      "(demo/systems.jsonl).")
    assert with_score(text.format(""), rows, []) == with_score(new, rows, []) == new != with_score(new, rows[:1], [])
    both = new.replace("jsonl).", "jsonl).\nToy world, this length: 50.0 % seeing, 10.0 % blind, 1 seed "
                       "(demo/systems.jsonl).")
    assert with_score(new, rows, rows[:1]) == with_score(both, rows, rows[:1]) == both
    assert with_score(both, [], []) == text.format("")
