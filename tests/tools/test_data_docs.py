"""The commands of docs/data.md run as they are written, on small files with the names they say; what it says of their
files is true; its settings exist."""

import importlib.util
import json
import re
import shlex

import pytest
from conftest import ROOT
from test_curate_filter import pair, picture, read, row, write  # noqa: F401  (pair is a fixture)
from test_curate_synth import KINDS, fake

from formats.rows import open_rows
from tools import curate, curate_filter, curate_synth

TEXT = (ROOT / "docs/data.md").read_text("utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
PYARROW = importlib.util.find_spec("pyarrow") is not None


@pytest.fixture
def place(tmp_path, monkeypatch, pair):  # noqa: F811
    """A folder with every file that the commands name: three rows about two images; runs/pairs has random towers"""
    monkeypatch.chdir(tmp_path)
    for name in ("DIR", "shards", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "runs/pairs").symlink_to(pair)
    for k in (0, 1):
        picture(k).save(tmp_path / f"DIR/{k}.png")
    rows = [row(n, f"{n % 2}.png", "a dog") for n in range(3)]
    write(tmp_path / "FILE", rows)
    if PYARROW:
        import pyarrow.parquet
        ratings = dict.fromkeys(curate_filter.RATINGS, 4) | {curate_filter.RATINGS[0]: 3}
        image = {"bytes": (tmp_path / "DIR/0.png").read_bytes(), "path": None}
        rows = [{"images": [image], "texts": [{"user": "What?", "assistant": "A dog."}]} | ratings,
                {"images": [image], "texts": [{"user": "Who?", "assistant": "A cat."}]} | dict.fromkeys(ratings, 5)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "shards/a.parquet")
    return tmp_path


def run(command, *more):
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "tools.curate"]
    curate.main([*words[3:], *more])


def test_filters_of_the_page_run(place, capsys):
    similar, near, rated = [c for c in COMMANDS if "curate filter" in c]
    run(similar)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["measured"] == 3 and result["kept"] + sum(result["removed"].values()) == 3
    assert {p.name for p in (place / "runs").iterdir()} == {"pairs", "kept.jsonl", "kept_removed.jsonl",
                                                            "kept_removed.html"}
    run(near)
    assert [r["id"] for r in read(place / "runs/kept.jsonl")] == [0, 1]
    assert [(r["twin"], r["id"]) for r in read(place / "runs/kept_removed.jsonl")] == [(0, 2)]
    if PYARROW:
        run(rated)
        assert [r["texts"][0]["user"] for r in open_rows(place / "runs/kept.jsonl")] == ["Who?"]
        assert len([*(place / "runs/kept_images").iterdir()]) == 1


def test_synth_of_the_page_runs(place, capsys):
    command, = (c for c in COMMANDS if "curate synth" in c)
    with fake() as server:
        run(command, f"--url={server.url}", "--per_minute=6000")
        assert [r["id"] for r in read(place / "runs/made.jsonl")] == [f"{n}_{k}" for n in range(3) for k in KINDS]
        assert read(place / "runs/made_failed.jsonl") == [] and len(server.asked) == 9
        run(command, f"--url={server.url}", "--per_minute=6000")
        assert len(server.asked) == 9, "the same command goes on"


def test_settings_of_the_page_exist():
    known = {*curate_filter.Settings.__dataclass_fields__, *curate_synth.Settings.__dataclass_fields__}
    named = re.findall(r"--(\w+)", TEXT.replace("--help", ""))
    assert len(named) > 15 and {*named} <= known
    for name, default in re.findall(r"`--(\w+)=(\d+)`", TEXT):    # a value in the text is the default, or in a command
        shown = any(f"--{name}={default}" in c for c in COMMANDS)
        assert shown or str(curate_synth.Settings.__dataclass_fields__[name].default) == default, name
