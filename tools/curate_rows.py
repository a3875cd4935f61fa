"""What tools/curate.py's commands share: rows as lines of json, and the name of an image."""

import hashlib
import io
import json
import os
from base64 import b64encode
from pathlib import Path

from PIL import Image

from config import stop
from formats.image_files import FORMATS
from formats.rows import open_rows
from formats.rows.lines import MAX_BYTES


def open_input(argv, s):
    """Check the arguments of a command: one data file, --out -> its rows"""
    files = [a for a in argv if not a.startswith("--")]
    if len(files) != 1 or not s.out:
        stop("one data file, or a pattern in quotes, and --out=FILE.jsonl are needed; --help says more")
    return open_rows(files[0])


def check_written(rows, **files):
    """Stop if a file that will be written is the data, or if two of them are one file. files: {setting: path}"""
    def place(file):
        return os.stat(file)[1:3] if os.path.exists(file) else os.path.realpath(file)               # inode, device
    taken = {place(file): "the data itself" for file in getattr(rows, "files", [rows.file])}
    for name, file in files.items():
        if place(file) in taken:
            stop(f"{name}={file} is {taken[place(file)]}")
        taken[place(file)] = f"the file of --{name}, too"


def row_line(row, folder=""):
    """-> the row as a line of json. Images that the row holds as bytes become data: URLs, or with a folder, files in
    it, and the row has their names."""
    def plain(x):
        if not isinstance(x, bytes):
            return str(x)                                      # a date of a table
        try:
            kind = Image.open(io.BytesIO(x), formats=FORMATS).format.lower()
        except Exception:                                      # Pillow raises many types on a broken image
            kind = "unknown"
        if not folder:
            return f"data:image/{kind};base64,{b64encode(x).decode()}"
        name = f"{hashlib.sha256(x).hexdigest()[:32]}.{kind}"
        if not (file := Path(folder, name)).exists():
            tmp = file.with_name(f".tmp-{name}")
            tmp.write_bytes(x)
            os.replace(tmp, file)
        return name
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=plain)
    except ValueError:                                         # NaN, which JSON has not: a missing number of a table
        row = json.loads(json.dumps(row, default=plain), parse_constant=lambda name: None)
        line = json.dumps(row, ensure_ascii=False)
    return line.encode("utf-8", "backslashreplace").decode() + "\n"


def check_length(line, name):
    """-> the line of a row; stop if the row with its images is longer than formats/rows reads."""
    if len(line) > MAX_BYTES // 4 and len(line.encode()) > MAX_BYTES:
        stop(f"row {name} and its images are {len(line):,} bytes, and a line may have {MAX_BYTES:,}: "
             "--out_images=DIR writes the images of such rows to files")
    return line
