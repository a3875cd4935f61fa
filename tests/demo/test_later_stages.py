"""The table of docs/training.md about demo/later_stages.py: the measured rows, all of them."""

import json
import re

from conftest import ROOT

from demo.later_stages import ARMS


def test_the_table_has_every_measured_row():
    text = (ROOT / "docs/training.md").read_text("utf-8")
    rows = [json.loads(line) for line in (ROOT / "demo/later_stages.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        cells = [f"{100 * row['accuracy']:.1f} %", *(f"{100 * row['types'][k]:.0f} %" for k in ("count", "read")),
                 f"{100 * row['yes']:.0f} %"]
        test = row["against"]
        cells.append(f"{test['better']}, {test['worse']}: p = {test['p']:.2f}" if test else "")
        want = " | ".join(["", *cells, f"`{row['arm']}` |\n"]).replace("|  |", "| |")
        assert want in text, want
    missing = ARMS.keys() - {row["arm"] for row in rows}
    assert {*re.findall(r"`(\w[\w.-]*)`", re.search(r"Not run: .*?\)", text, re.DOTALL)[0])} == missing
