"""Pointing accuracy: does the map of a question have its largest cell where the asked thing is?

The toy world knows the place of each thing in its 3 x 3 cells. A question counts if it asks about one thing (its
colour, shape, size or place; whether it exists, where the answer is yes; the digit of the sign). The map is that of
the row which predicts the first token of the answer: the last token of the prompt. The map is summed over the tokens of
each of the 3 x 3 cells; the cell with the largest sum is the model's choice.

    relative    the map of tools/attention.py: attention divided by that of the neutral question
    raw         the attention itself
    shuffled    control: the map of another question, about another image
    any thing   control: the share of a random choice among the things of the image; of all nine cells it is 11.1 %

    I questions   L decoder layers   n side of an image's grid of tokens
"""

import torch

from config import stop
from demo import toy
from demo.variants import scenes
from formats.image_files import safe_path
from generate import with_marker
from tools.attention import on_images, ratio, read_again, why_no_map

KINDS = ("color", "shape", "size", "place", "exists", "read")           # types of questions about one thing
WORDS = {"color": [*toy.COLORS], "shape": toy.SHAPES, "row": toy.ROWS, "column": toy.COLUMNS}


def asked_thing(row, scene):
    """A row of the toy world's questions, its scene -> the thing {row, column, ...} that it asks about, or None"""
    if row["type"] not in KINDS or row["answer"] == "no":
        return None
    if row["type"] == "read":
        return scene["sign"]
    said = set(row["text"].splitlines()[0].strip("?").split())

    def fits(thing):
        """Does the thing have each colour, shape and place that the question names?"""
        own = {"color": thing["color"], "shape": thing["shape"], "row": toy.ROWS[thing["row"]],
               "column": toy.COLUMNS[thing["column"]]}
        return all(said & {*words} <= {own[k]} for k, words in WORDS.items())

    thing, = (thing for thing in scene["objects"] if fits(thing))
    return thing


def largest_cell(maps):
    """maps (..., n, n) -> (...): number of the cell with the largest sum, 3 * row + column"""
    n = maps.shape[-1]
    if n % 3:
        stop(f"pointing needs a grid of tokens that 3 x 3 cells divide, not {n} x {n}")
    return maps.unflatten(-1, (3, n // 3)).unflatten(-3, (3, n // 3)).sum((-3, -1)).flatten(-2).argmax(-1)


def pointing(chat, rows, images, neutral=""):
    """A Chat, rows of the toy world's questions, their folder of images -> dict of results. Its lists have one number
    per decoder layer."""
    if reason := why_no_map(chat.cfg):
        stop(reason)
    layers = range(len(chat.model.language_model.model.layers))
    drawn = {name: scene for name, scene, _ in scenes("test", toy.SCENES["test"])}
    rows = [r for r in rows if r.get("image") in drawn and asked_thing(r, drawn[r["image"]])]
    if not rows:
        stop("no question about one thing of a held-out scene: the questions are not the toy world's")

    def first_row(text, tiles, blocks):
        """-> a (L, n, n) of the last token of the prompt. The token after it does not change this row."""
        prompt = chat.prompt([(with_marker(text, 1), None)], blocks)
        return on_images(chat.cfg, prompt, read_again(chat, prompt, [0], tiles, layers)[1])[:, 0, 0]

    divisors, true, raw, relative, any_thing = {}, [], [], [], []
    for row in rows:
        scene, (tiles, blocks) = drawn[row["image"]], chat.look([safe_path(images, row["image"])])
        if row["image"] not in divisors:
            divisors[row["image"]] = first_row(neutral, tiles, blocks)
        a, thing = first_row(row["text"], tiles, blocks), asked_thing(row, scene)
        raw.append(largest_cell(a))                                                                        # (L,)
        relative.append(largest_cell(ratio(a, divisors[row["image"]])))
        true.append(3 * thing["row"] + thing["column"])
        any_thing.append(1 / len(toy.things(scene)))
    true = torch.tensor(true)[:, None]                                                              # (I, 1)
    other = [(i + len(rows) // 2) % len(rows) for i in range(len(rows))]
    if any(rows[i]["image"] == rows[j]["image"] for i, j in enumerate(other)):
        stop("the control needs questions about more images")

    def share(chosen):
        return (chosen == true).double().mean(0).tolist()                                           # (L,)

    raw, relative = torch.stack(raw), torch.stack(relative)                                         # (I, L)
    types = {k: [r["type"] == k for r in rows] for k in KINDS}
    return {"n": len(rows), "relative": share(relative), "raw": share(raw), "relative_shuffled": share(relative[other]),
            "raw_shuffled": share(raw[other]), "any_thing": sum(any_thing) / len(rows), "random_cell": 1 / 9,
            "types": {k: {"n": sum(at), "relative": (relative == true)[at].double().mean(0).tolist(),
                          "raw": (raw == true)[at].double().mean(0).tolist()} for k, at in types.items() if any(at)}}


def table_lines(result):
    """-> lines of text"""
    names = ("relative", "relative_shuffled", "raw", "raw_shuffled")
    lines = [f"{'layer':>5}" + "".join(f"{name.replace('_', ' '):>20}" for name in names)]
    for i, shares in enumerate(zip(*(result[name] for name in names)), 1):
        lines.append(f"{i:>5}" + "".join(f"{share:>20.1%}" for share in shares))
    return [*lines, f"{result['n']} questions; a random cell: {1 / 9:.1%}; a random thing of the image: "
                    f"{result['any_thing']:.1%}"]
