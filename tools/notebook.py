"""Write a Jupyter notebook from a Python file in percent format. It has no outputs: its reader runs it.

    python -m tools.notebook docs/tour.py        # writes docs/tour.ipynb

A line `# %%` begins a cell of code, `# %% [markdown]` a cell of text in comments. The last value of a cell of code is
shown, as in any notebook.
"""

import json
import sys
from pathlib import Path

from config import one_line_errors, stop
from run.arguments import positional

META = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}}


def notebook_cells(text):
    """Text of a percent file -> [(kind, source)], kind: code or markdown"""
    cells = []
    for line in text.splitlines():
        if line.startswith("# %%"):
            cells.append(("markdown" if line.endswith("[markdown]") else "code", []))
        elif cells:
            kind, lines = cells[-1]
            lines.append(line.removeprefix("#").removeprefix(" ") if kind == "markdown" else line)
        elif line.strip():
            stop(f"a percent file begins with # %%, not with {line!r}")
    return [(kind, "\n".join(lines).strip("\n")) for kind, lines in cells]


def notebook(text):
    """Text of a percent file -> text of the notebook (nbformat 4.5)"""
    cells = []
    for n, (kind, source) in enumerate(notebook_cells(text)):
        cell = {"cell_type": kind, "id": f"cell-{n}", "metadata": {}, "source": source.splitlines(keepends=True)}
        cells.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    return json.dumps({"cells": cells, "metadata": META, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def main(argv):
    if len(argv) != 1 or not argv[0].endswith(".py") or not Path(argv[0]).is_file():
        stop("usage: python -m tools.notebook FILE.py, a Python file in percent format")
    Path(argv[0]).with_suffix(".ipynb").write_text(notebook(Path(argv[0]).read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main(positional(sys.argv[1:], __doc__))
