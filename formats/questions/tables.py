"""Tables of questions in tsv, as VLMEvalKit writes them; what the cells of a table hold."""

import ast
import csv

from config import stop

NEEDS = ("it needs question_id, text (or question), image (a name, several or none), answer or a list of answers; "
         "docs/evaluation.md has the forms that are read")


def tsv_records(file):
    """Read a table with a header, as pandas writes it: an empty cell or nan is a missing value"""
    csv.field_size_limit(2**31 - 1)                              # an image is one field
    with open(file, encoding="utf-8-sig", newline="") as f:
        try:
            rows = [*csv.DictReader(f, delimiter="\t", strict=True)]
        except (csv.Error, UnicodeDecodeError) as e:
            stop(f"{file} cannot be read as a tsv table: {e}")
    if not rows or "question" not in rows[0]:
        stop(f"{file}: no tsv table with a column question; {NEEDS}")
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            stop(f"{file}, question {i} (counted from 0): not as many cells as the header has names")
    rows = [without_missing(row) for row in rows]
    images = {row.get("index"): row.get("image", "") for row in rows}
    for row in rows:                                             # a short image is the index of the row that has it
        if "image" in row:
            image = row.pop("image")
            row["base64"] = images.get(image, image) if len(image) <= 64 else image
    return rows


def without_missing(row):
    """Remove the missing values of a table: None, an empty string, NaN and what pandas made of NaN, "nan" """
    return {k: v for k, v in row.items() if v is not None and v == v and v not in ("", "nan")}


def literal(s):
    """Read a Python list that stands in a cell as text -> list; any other text -> [the text]"""
    try:
        found = ast.literal_eval(s) if s.lstrip().startswith("[") else s
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = s
    return [*map(str, found)] if isinstance(found, list) else [s]
