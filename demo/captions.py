"""Score the captions that a model gives to the held-out images of the toy world.

    python demo/captions.py [--model=runs/align] [--device=cpu]    # after train_align.py; prints JSON at the end

A caption is a list of things: "top left: a large red circle; bottom right: a sign that says 7". Each thing states
facts of several kinds: a place, and the shape, colour, size or digit at this place. For each kind, the score is F1
between the facts in the model's captions and the facts in the true captions. A thing without a place states no facts.
f1_shuffled is a control: it compares each true caption with the model's caption of another image. So it shows what a
model can reach without looking at the image.
"""

import dataclasses
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
from config import setting
from demo import toy
from generate import Chat
from run.arguments import parse

THING = re.compile(r"(top|middle|bottom) (left|center|right): a (?:(small|large) )?(\w+)(?: that says (\d)| (\w+))?")


@dataclasses.dataclass
class Settings:
    model: str = setting("runs/align", "a run, its model/, or any LLaVA folder")
    device: str = setting("auto", "auto, cpu, cuda")


def caption_facts(caption):
    """Find the facts that a caption states -> {kind: set of facts}. A fact of the kind "place" is a place: "top left".
    A fact of another kind is (place, value): ("top left", "red")."""
    found = {"place": set(), "shape": set(), "color": set(), "size": set(), "read": set()}
    for row, column, size, first, digit, second in THING.findall(caption):
        place, shape = f"{row} {column}", second or first
        found["place"].add(place)
        found["shape"].add((place, shape))
        for kind, value in (("color", first if second else ""), ("size", size), ("read", digit)):
            if value:
                found[kind].add((place, value))
    return found


def facts_f1(answers, truths):
    """Compare the model's captions with the true captions of the same images -> {kind of fact: F1 over all images}"""
    total = {}
    for a, b in zip(map(caption_facts, answers), map(caption_facts, truths)):
        for kind in a:
            both, sizes = total.get(kind, (0, 0))
            total[kind] = both + len(a[kind] & b[kind]), sizes + len(a[kind]) + len(b[kind])
    return {kind: round(2 * both / max(1, sizes), 3) for kind, (both, sizes) in total.items()}


def scene_seed(name):
    """Return the random seed of the scene in an image file. test_00012.png was drawn with the seed "0/test/12"."""
    split, number = Path(name).stem.split("_")
    return f"0/{split}/{int(number)}"


def main(s):
    toy.write_world("runs/toy", "test")
    rows = map(json.loads, Path("runs/toy/questions.jsonl").read_text("utf-8").splitlines())
    names = sorted({row["image"] for row in rows})
    truths = [toy.caption(toy.make_scene(random.Random(scene_seed(n)), test=True), True) for n in names]
    chat, answers = Chat(s.model, s.device), []
    prompt = chat.prompt([("<image>\nDescribe the image.", None)], [chat.layout.block()])
    for i in range(0, len(names), 60):
        pixels, _ = chat.look(f"runs/toy/images/{n}" for n in names[i : i + 60])
        answers += chat.answers([prompt] * len(pixels), pixels, 80)
    for truth, answer in list(zip(truths, answers))[:6]:
        print(f"truth   {truth}\nanswer  {answer}\n")
    print(json.dumps({"f1": facts_f1(answers, truths), "f1_shuffled": facts_f1(answers[1:] + answers[:1], truths),
                      "word_for_word": sum(a == b for a, b in zip(answers, truths)) / len(truths), "n": len(truths)}))


if __name__ == "__main__":
    with config.one_line_errors():
        main(parse(Settings, sys.argv[1:], __doc__))
