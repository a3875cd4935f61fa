"""May a run write here? Is this folder a run of ours?"""

import os
from pathlib import Path

from formats.strict_json import read_json


def unwritable(folder):
    """Why no file can be made in a folder, which need not exist yet -> a reason, or None. Nothing is written."""
    at = os.path.abspath(folder)
    while not os.path.lexists(at):
        at = os.path.dirname(at)
    if not os.path.isdir(at):
        return f"{at} is not a folder"
    return None if os.access(at, os.W_OK | os.X_OK) else f"{at} cannot be written to"


def foreign(folder, own):
    """Does a folder that no run has made hold something under a name in `own`? -> a reason, or None. To write there
    would cost somebody a model."""
    about, there = Path(folder, "config.json"), [n for n in own if os.path.lexists(os.path.join(folder, n))]
    if there and not (about.is_file() and "settings" in read_json(about)):
        return f"it is no run, and its {there[0]} would be lost"
