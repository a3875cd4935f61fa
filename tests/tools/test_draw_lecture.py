"""The pictures of the lecture: up to date, readable, and true."""

import re
import xml.etree.ElementTree as ET

from conftest import ROOT, error

from tools.draw_lecture import WIDTH, lecture_pictures, main, masked_stream, stage_rows


def test_pictures_are_up_to_date():
    """After a change of chat.py, data.py, a mask or who trains: python -m tools.draw_lecture"""
    for file, text in lecture_pictures().items():
        assert file.read_text("utf-8") == text, f"{file} is old"


def test_settings_are_refused_before_drawing():
    assert "usage" in error(main, ["--help"])


def test_text_is_large_and_stays_inside():
    for text in lecture_pictures().values():
        root = ET.fromstring(text)
        height, classes = float(root.get("height")), {m for m in re.findall(r"\.(\w+)[ ,{]", text)}
        assert root.get("width") == str(WIDTH) and min(map(int, re.findall(r"font-size: (\d+)px", text))) >= 12
        for e in root.iter():
            assert {*(e.get("class") or "").split()} <= classes
            x, y = float(e.get("x") or 0), float(e.get("y") or 0)
            assert x + float(e.get("width", 0)) <= WIDTH and y + float(e.get("height", 0)) <= height
            if e.tag.endswith("text") and "end" not in e.get("class") and "mid" not in e.get("class"):
                assert x + len(e.text) * 6.8 <= WIDTH, f"{e.text!r} is too wide"


def test_stages_are_those_of_the_scripts():
    assert [[*who.values()] for *_, who in stage_rows()] == [
        ["frozen", "trains", "frozen"], ["frozen", "trains", "trains"], ["trains"] * 3,
        ["frozen", "trains", "adapters"], ["frozen", "trains", "trains"]]
    assert 'training_table(s, {"multi_modal_projector.*": s.lr})' in (ROOT / "train_align.py").read_text()
    for script in ("train_dpo.py", "train_grpo.py"):
        assert "training_table(s, who_prefers(s, model))" in (ROOT / script).read_text()


def test_spans_are_those_of_the_papers():
    b, ends = masked_stream()
    assert b.lo.tolist() == [0] * 8 + [8] * 6 and ends["causal"].tolist() == [*range(1, 15)]
    assert ends["prefix"].tolist() == [6] * 6 + [7, 8] + [11] * 3 + [12, 13, 14]
    assert ends["image"].tolist() == [1, 4, 4, 4, 5, 6, 7, 8, *range(9, 15)]
