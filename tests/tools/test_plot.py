"""Curves from the logs of runs"""

import json
import sys

import pytest

from config import Error
from tools import plot


def make_run(folder, rows):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def runs(tmp_path):
    a = [{"step": i, "loss": 4 / i, "lr": 0.1, "grad_norm": 1.0, "mfu": None} for i in range(1, 6)]
    return [str(make_run(tmp_path / "a", a + [{"step": 5, "val_loss": 2.0}])), str(make_run(tmp_path / "b", a[:2]))]


def test_each_curve_holds_the_steps_that_logged_it(runs):
    log = plot.read_log(runs[0])
    assert log["loss"] == list(zip(range(1, 6), [4, 2, 4 / 3, 1, 0.8])) and log["val_loss"] == [(5, 2.0)]
    assert plot.read_log(runs[0] + "/log.jsonl") == log


def test_two_runs_make_one_figure(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from PIL import Image
    out = tmp_path / "curves.png"
    plot.main([*runs, f"--out={out}"])
    assert capsys.readouterr().out == f"{out}\n"
    assert min(Image.open(out).convert("RGB").getextrema()) == (0, 255)   # black on white


def test_without_matplotlib_one_line_says_so(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Error, match="needs matplotlib: pip install matplotlib$"):
        plot.main(runs)


@pytest.mark.parametrize("rows, complaint", [
    ([], "has no curve yet"), ([{"loss": 1}], "is not the log of a run: KeyError 'step'"), ([5], "is not the log")])
def test_a_log_without_curves_is_one_line(tmp_path, rows, complaint):
    with pytest.raises(Error, match=complaint):
        plot.main([str(make_run(tmp_path / "c", rows))])


def test_unreadable_logs_and_unwritable_files_are_one_line(runs, tmp_path):
    for out, complaint in (("none/x.png", "cannot write .*none/x.png"), ("x.foo", "cannot write .*x.foo: .*foo")):
        with pytest.raises(Error, match=complaint) as stopped:
            plot.main([runs[0], f"--out={tmp_path / out}"])
        assert "\n" not in str(stopped.value)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "log.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(Error, match="log.jsonl is not the log of a run: UnicodeDecodeError"):
        plot.main([str(tmp_path / "c")])


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(Error, match="is not a run"):
        plot.main([str(tmp_path)])
    with pytest.raises(Error, match="which run"):
        plot.main([])
