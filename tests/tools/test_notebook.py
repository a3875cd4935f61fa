"""The notebook of the tour: written from docs/tour.py, and every cell runs."""

import ast
import json

import pytest
from conftest import ROOT, error
from PIL import Image

from tools import notebook

TEXT = (ROOT / "docs/tour.py").read_text("utf-8")


def test_the_notebook_is_up_to_date():
    """After a change of docs/tour.py: python -m tools.notebook docs/tour.py"""
    assert (ROOT / "docs/tour.ipynb").read_text("utf-8") == notebook.notebook(TEXT)
    cells = json.loads(notebook.notebook(TEXT))["cells"]
    assert {c["cell_type"] for c in cells} == {"code", "markdown"} and not any(c.get("outputs") for c in cells)
    assert "".join(cells[0]["source"]).startswith("# A tour of pumice")


def test_cells_are_what_percent_lines_divide(tmp_path, monkeypatch):
    assert notebook.notebook_cells("# %% [markdown]\n# # A\n#\n# b\n\n# %%\nx = 1\n# y\n\n# %%\nx\n") == [
        ("markdown", "# A\n\nb"), ("code", "x = 1\n# y"), ("code", "x")]
    assert "begins with # %%" in error(notebook.notebook_cells, "import os\n# %%\n")
    (tmp_path / "a.py").write_text("# %%\n1\n")
    notebook.main([str(tmp_path / "a.py")])
    assert json.loads((tmp_path / "a.ipynb").read_text())["cells"][0]["source"] == ["1"]
    assert "usage" in error(notebook.main, ["nope.py"])


@pytest.fixture(scope="module")
def tour():
    """Run all cells in one process -> their names, the value that each cell shows"""
    names, values = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT / "docs")                       # where Jupyter starts it
        patch.syspath_prepend(str(ROOT))
        for kind, source in notebook.notebook_cells(TEXT):
            if kind == "code":
                body = ast.parse(source).body
                last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
                exec(compile(ast.Module(body, []), "tour.py", "exec"), names)
                values.append(eval(compile(last, "tour.py", "eval"), names) if last else None)
    return names, values


def test_every_cell_runs_and_the_loss_falls(tour):
    names, values = tour
    assert sum(isinstance(v, Image.Image) for v in values) == 4
    assert len(names["losses"]) == 30 and sum(names["losses"][-5:]) / 5 < 0.5 * names["losses"][0]
    assert names["answer"] and "\n" not in names["answer"]


def test_the_pictures_of_the_tour_are_right(tour):
    names, _ = tour
    stream, seen = names["stream"], names["seen"]
    assert seen.sum(1).tolist() == (stream.pos + 1).tolist() and names["patches"].size == (288, 288)
    assert len(stream.images) == 3 and names["features"].shape[:2] == (3, 36)
