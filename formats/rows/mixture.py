"""Several data files with shares, "a.json:0.7,b.json:0.3", or without, "a.json,b.json". A second number is the weight
of a file's loss: "a.json:0.7:0.2"."""

import math
import os

import numpy as np

from config import BadSample, stop
from formats.rows.shards import open_rows


def open_mixture(spec, min_rating=0, view=lambda rows: rows):
    """-> the files (open_rows), samples of each file in an epoch, weight of the loss of each file. An epoch has as many
    samples as all files together. view: function of a file's rows that gives them in another form"""
    if os.path.isfile(spec) and {",", ":"} & {*spec}:
        stop(f"data={spec}: a comma or a colon in a name is read as a list of files or as a share: rename the file")
    files, shares, weights = zip(*((part.split(":", 2) + ["", ""])[:3] for part in spec.split(",")))
    files = [view(open_rows(f, min_rating)) for f in files]
    total = sum(len(r) for r in files)
    try:
        shares = np.array([float(x) for x in shares] if any(shares) else [len(r) for r in files])
        weights = [float(w or 1) for w in weights]
    except ValueError:
        shares, weights = np.array([math.nan]), []
    if not (shares.min() >= 0 and 0 < shares.sum() < math.inf and all(0 < w < math.inf for w in weights)):
        stop(f"data={spec}: each file needs a share after a colon, as in a.json:0.7,b.json:0.3, or none does; a "
             "second colon may give the weight of its loss, above 0")
    ends = np.cumsum([0, *shares]) / shares.sum() * total
    return files, np.diff(np.round(ends)).astype(int), weights


def token_rates(rows, encode, images, n=32):
    """Measure on the first n rows of a file -> 1024 x tokens of text for each byte of rows.guess(), 1024 x placeholders
    for each image. They are integers, so that all ranks compute the same. encode: data.Encoder; images: its folder"""
    text, size, placeholders, count = 0, 0, 0, 0
    for i in range(min(n, len(rows))):
        try:
            ids, _, names, _ = encode(rows[i], images)
        except BadSample:
            continue
        inside = ids.count(encode.layout.image_id)
        text, size = text + len(ids) - inside, size + rows.guess(i)[0]
        placeholders, count = placeholders + inside, count + len(names)
    return 1024 * text // max(1, size), 1024 * placeholders // max(1, count)
