"""How much of a held-out picture is in the caption that a model gives of it.

    python demo/captions.py [--model=runs/align] [--device=cpu]    # after train_align.py; the last line is JSON

A caption counts as a list of things: "top left: a large red circle; bottom right: a sign that says 7". The things of
the scene and of the caption are matched by place, and of each match the colour, shape, size and digit are compared. All
shares are F1: of what is there and what is said, how much is both; a thing without a place does not count. Beside them
the same with the captions of other pictures, which is what knowing the language alone would give.
"""

import dataclasses
import json
import random
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import generate
import config
import toy

THING = re.compile(r"(top|middle|bottom) (left|center|right): a (?:(small|large) )?(\w+)(?: that says (\d)| (\w+))?")


@dataclasses.dataclass
class Settings:
    model: str = "runs/align"      # a run, its model/, or any LLaVA folder
    device: str = "auto"


def facts(caption):
    """A caption -> {what kind of fact: a set of them}; a fact about a thing names the thing's place."""
    found = {"place": set(), "shape": set(), "color": set(), "size": set(), "read": set()}
    for row, column, size, first, digit, second in THING.findall(caption):
        place, shape = f"{row} {column}", second or first
        found["place"].add(place)
        found["shape"].add((place, shape))
        for kind, value in (("color", first if second else ""), ("size", size), ("read", digit)):
            if value:
                found[kind].add((place, value))
    return found


def f1(said, there):
    """Two lists of captions -> {kind: F1 over all pictures}"""
    total = {}
    for a, b in zip(map(facts, said), map(facts, there)):
        for kind in a:
            both, sizes = total.get(kind, (0, 0))
            total[kind] = both + len(a[kind] & b[kind]), sizes + len(a[kind]) + len(b[kind])
    return {kind: round(2 * both / max(1, sizes), 3) for kind, (both, sizes) in total.items()}


def seed(name):
    """Of the scene in a picture file: test_00012.png was drawn from "0/test/12"."""
    split, number = Path(name).stem.split("_")
    return f"0/{split}/{int(number)}"


def main(s):
    toy.write("runs/toy", "test")
    rows = map(json.loads, Path("runs/toy/questions.jsonl").read_text("utf-8").splitlines())
    names = sorted({row["image"] for row in rows})
    scenes = [toy.make_scene(random.Random(seed(n)), test=True) for n in names]
    speaker = generate.Chat(s.model, s.device)
    pictures = [speaker.pixels(f"runs/toy/images/{n}") for n in names]
    prompt = speaker.prompt([("<image>\nDescribe the image.", None)], 1)
    said = sum((speaker.answers([prompt] * len(some), some, 80) for some in
                (pictures[i : i + 60] for i in range(0, len(pictures), 60))), [])
    there = [toy.caption(scene, True) for scene in scenes]
    for one, other in list(zip(there, said))[:6]:
        print(f"there  {one}\nsaid   {other}\n")
    print(json.dumps({"f1": f1(said, there), "f1_shuffled": f1(said[1:] + said[:1], there),
                      "word_for_word": sum(a == b for a, b in zip(said, there)) / len(said), "n": len(said)}))


if __name__ == "__main__":
    with config.one_line_errors():
        main(config.parse(Settings, sys.argv[1:], __doc__))
