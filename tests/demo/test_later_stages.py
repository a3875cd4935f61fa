"""The table of docs/training.md about demo/later_stages.py: the measured rows, all of them."""

import json
import xml.etree.ElementTree as ET

import pytest
from conftest import ROOT, error

import config
import train_dpo
import train_grpo
import train_sft
from demo.later_stages import ARMS, as_conversation
from formats.rows import conversation
from run.arguments import parse
from tools import draw_later_stages

SCRIPTS = {"train_sft.py": train_sft, "train_dpo.py": train_dpo, "train_grpo.py": train_grpo}
KINDS = "count", "read", "exists"


def p_value(p):
    return "p < .001" if p < 0.001 else f"p = {p:.2f}"


def test_the_table_has_every_measured_row():
    text = (ROOT / "docs/training.md").read_text("utf-8")
    rows = [json.loads(line) for line in (ROOT / "demo/later_stages.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        cells = [f"{100 * row['accuracy']:.1f} %", *(f"{100 * row['types'][k]:.0f} %" for k in KINDS),
                 *(f"{100 * row[k]:.0f} %" for k in ("yes", "neither"))]
        test = row["against"]
        cells.append(f"{test['better']}, {test['worse']}: {p_value(test['p'])}" if test else "")
        want = " | ".join(["", *cells, f"`{row['arm']}` |\n"]).replace("|  |", "| |")
        assert want in text, want
        assert row["command"] == " ".join(ARMS[row["arm"]]), "it was measured with other settings"
    missing = ARMS.keys() - {row["arm"] for row in rows}
    assert not missing, "an arm that was not run"


@pytest.mark.parametrize("arm", [arm for arm in ARMS if ARMS[arm]])
def test_an_arm_has_settings_of_its_script(arm):
    script, *settings = ARMS[arm]
    config.check_ranges(parse(SCRIPTS[script].Settings, settings))


def test_a_question_becomes_a_conversation():
    q = {"question_id": "more_0_count", "image": "a.png", "text": "How many?", "answer": "2", "type": "count"}
    assert conversation(as_conversation(q)) == ([("<image>\nHow many?", "2")], ["a.png"], None)


def test_the_picture_is_up_to_date():
    """After a new row: python -m tools.draw_later_stages"""
    rows = [json.loads(line) for line in (ROOT / "demo/later_stages.jsonl").read_text("utf-8").splitlines()]
    text = draw_later_stages.reward_picture(rows)
    assert draw_later_stages.PAGE.read_text("utf-8") == text
    lines = [e for e in ET.fromstring(text).iter() if e.get("fill") == "none"]
    assert len(lines) == 4 and [e.get("d").count("L") + 1 for e in lines] == [200, 200, 200, 60]
    assert draw_later_stages.running_means([1.0, 2.0, 6.0], 2) == [1.0, 1.5, 4.0]
    assert "usage" in error(draw_later_stages.main, ["--help"])
