"""The toy world: scenes drawn from a seed, written to disk as ordinary LLaVA json and PNG files, so that training
cannot tell it from the world. Answers are computed from the scene graph.

    python demo/toy.py OUT [--align=N --sft=N --seed=N]    # OUT/{align,sft,val_align,val_sft}.json,
                                                           # OUT/questions.jsonl, OUT/images/

One to four shapes stand on a 3 x 3 grid, no two alike in colour and shape; in some scenes a sign shows a digit. An
example:

    scene      large red circle top left, small blue star middle right, sign 7 bottom center
    caption    a red circle, a blue star and a sign
    detailed   top left: a large red circle; middle right: a small blue star; bottom center: a sign that says 7
    questions  What color is the circle? red      Where is the blue star? middle right      Is there a red star? no

What is held out: a thing is a colour, a shape, a size and a place, 648 combinations. A sixth of them (`held_out`)
never occurs in any training scene, drawn or written; every shape in a test scene is one of those. So nothing in a test
scene has been seen before, though each of its words has.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import read_value, stop

COLORS = {"red": (220, 35, 35), "green": (35, 165, 50), "blue": (40, 60, 225), "yellow": (240, 220, 40),
          "purple": (190, 45, 200), "cyan": (50, 215, 225)}
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
SIZES = ["small", "large"]
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "center", "right"]
PAIRS = [(c, s) for c in COLORS for s in SHAPES]
SIDE, CELL = 72, 24                                       # pixels
SHORT = "Answer the question using a single word or phrase."
TYPES = ["color", "shape", "size", "count", "place", "relation", "exists", "read"]


# ---- the scene graph ------------------------------------------------------------------------------------------------

def held_out(color, shape, size, row, column):
    """Is this combination kept for testing? One in six, spread so that any two words of a thing meet in training."""
    return ([*COLORS].index(color) + SHAPES.index(shape) + 3 * SIZES.index(size) + 2 * row + column) % 6 == 0


def make_scene(rng, test=False, signs=0.4):
    """{objects: [{color, shape, size, row, column}], sign: {digit, row, column} or None}, objects in reading order."""
    pairs = PAIRS
    if rng.random() < 0.5:                                 # alike on purpose: neither colour nor shape tells them apart
        few, kinds = rng.sample([*COLORS], 2), rng.sample(SHAPES, 3)
        pairs = [p for p in PAIRS if p[0] in few and p[1] in kinds]
    cells = [(r, k) for r in range(3) for k in range(3)]
    objects = []
    for color, shape in rng.sample(pairs, rng.randint(1, 4)):
        while True:
            r, k = rng.choice(cells)
            size = rng.choice(SIZES)
            if held_out(color, shape, size, r, k) == test:
                break
            if not any(held_out(color, shape, z, *c) == test for c in cells for z in SIZES):
                return make_scene(rng, test, signs)        # a dead end: no cell is left that suits the last shape
        cells.remove((r, k))
        objects.append(dict(color=color, shape=shape, size=size, row=r, column=k))
    objects.sort(key=lambda o: (o["row"], o["column"]))
    r, k = rng.choice(cells)
    sign = dict(digit=rng.randint(0, 9), row=r, column=k) if rng.random() < signs else None
    return dict(objects=objects, sign=sign)


def place(o):
    return f"{ROWS[o['row']]} {COLUMNS[o['column']]}"


def pair(o):
    return f"{o['color']} {o['shape']}"


def things(scene):
    """Objects and sign in reading order."""
    everything = scene["objects"] + ([scene["sign"]] if scene["sign"] else [])
    return sorted(everything, key=lambda o: (o["row"], o["column"]))


# ---- the picture ----------------------------------------------------------------------------------------------------

def draw(scene, seed):
    """-> PIL image, SIDE x SIDE RGB, on a shaded and slightly noisy ground."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(seed)
    ups = 3                                                # drawn three times too large, then shrunk: smooth edges
    corners = rng.integers(0, 256, 3) * 0.35 + rng.choice([20, 145])   # one dim tint, dark or light
    slope = rng.normal(0, 12, (2, 3))
    grid = np.linspace(-1, 1, SIDE)
    ground = corners + grid[:, None, None] * slope[0] + grid[None, :, None] * slope[1]
    image = Image.fromarray(ground.clip(0, 255).astype("uint8")).resize((SIDE * ups, SIDE * ups), Image.BILINEAR)
    d = ImageDraw.Draw(image)
    for o in things(scene):
        x, y = (CELL * (k + 0.5) + rng.uniform(-2, 2) for k in (o["column"], o["row"]))
        if "digit" in o:
            w, h = 7.5, 9.5
            d.rectangle([(x - w) * ups, (y - h) * ups, (x + w) * ups, (y + h) * ups], fill=(250, 250, 250),
                        outline=(0, 0, 0), width=ups)
            d.text((x * ups, y * ups), str(o["digit"]), fill=(0, 0, 0), font=ImageFont.load_default(size=17 * ups),
                   anchor="mm")
            continue
        r = (rng.uniform(9.0, 10.5) if o["size"] == "large" else rng.uniform(4.8, 6.0))
        fill = tuple(int(v) for v in (np.array(COLORS[o["color"]]) + rng.integers(-14, 15, 3)).clip(0, 255))

        def points(angles, radii):
            return [((x + r * k * np.sin(a)) * ups, (y - r * k * np.cos(a)) * ups) for a, k in zip(angles, radii)]

        box = [(x - r) * ups, (y - r) * ups, (x + r) * ups, (y + r) * ups]
        if o["shape"] == "circle":
            d.ellipse(box, fill=fill)
        elif o["shape"] == "ring":
            d.ellipse(box, outline=fill, width=int(r * 0.4 * ups))
        elif o["shape"] == "square":
            k = r * 0.95
            d.rectangle([(x - k) * ups, (y - k) * ups, (x + k) * ups, (y + k) * ups], fill=fill)
        elif o["shape"] == "triangle":
            d.polygon(points(np.array([0, 2, 4]) * np.pi / 3, [1.1] * 3), fill=fill)
        elif o["shape"] == "star":
            d.polygon(points(np.arange(10) * np.pi / 5, [1.1, 0.45] * 5), fill=fill)
        else:
            k = r * 0.36
            d.rectangle([(x - k) * ups, (y - r) * ups, (x + k) * ups, (y + r) * ups], fill=fill)
            d.rectangle([(x - r) * ups, (y - k) * ups, (x + r) * ups, (y + k) * ups], fill=fill)
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.BOX), dtype="float32")
    return Image.fromarray((pixels + rng.normal(0, 5, pixels.shape)).clip(0, 255).astype("uint8"))


# ---- words ----------------------------------------------------------------------------------------------------------

def listing(words):
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def caption(scene, detailed):
    if not detailed:
        return listing([article("sign" if "digit" in o else pair(o)) for o in things(scene)])
    names = [f"a sign that says {o['digit']}" if "digit" in o else f"a {o['size']} {pair(o)}" for o in things(scene)]
    return "; ".join(f"{place(o)}: {name}" for o, name in zip(things(scene), names))


def written(scene, rng=None):
    """The scene in words, in reading order or shuffled by rng: what a language model reads instead of the picture."""
    names = [f"{place(o)}: " + (f"sign {o['digit']}" if "digit" in o else f"{o['size']} {pair(o)}")
             for o in things(scene)]
    if rng:
        rng.shuffle(names)
    return "; ".join(names)


def questions(scene, rng):
    """All kinds of questions whose answer is certain: a list of (type, question, short answer, answer in a sentence),
    one draw per kind and scene. Yes and no are equally likely; a "no" prefers a colour and a shape that are there, but
    not together."""
    objects, out = scene["objects"], []
    count = {k: {} for k in ("color", "shape", "size")}
    for o in objects:
        for k in count:
            count[k][o[k]] = count[k].get(o[k], 0) + 1
    there = {(o["color"], o["shape"]) for o in objects}
    single = [o for o in objects if count["shape"][o["shape"]] == 1]
    if single and rng.random() < 0.5:
        o = rng.choice(single)
        out.append(("color", f"What color is the {o['shape']}?", o["color"], f"The {o['shape']} is {o['color']}."))
    else:
        o = rng.choice(objects)
        out.append(("color", f"What color is the shape at the {place(o)}?", o["color"],
                    f"The shape at the {place(o)} is {o['color']}."))
    single = [o for o in objects if count["color"][o["color"]] == 1]
    if single and rng.random() < 0.5:
        o = rng.choice(single)
        out.append(("shape", f"Which shape is {o['color']}?", o["shape"], f"The {o['shape']} is {o['color']}."))
    else:
        o = rng.choice(objects)
        out.append(("shape", f"Which shape is at the {place(o)}?", o["shape"],
                    f"There is a {o['shape']} at the {place(o)}."))
    o = rng.choice(objects)
    out.append(("size", f"What size is the {pair(o)}?", o["size"], f"The {pair(o)} is {o['size']}."))

    what, n = rng.choice([("shapes", len(objects))]
                         + [(f"{c} shapes", count["color"].get(c, 0))
                            for c in COLORS if c in count["color"] or rng.random() < 0.1]
                         + [(f"{s}s" if s != "cross" else "crosses", count["shape"].get(s, 0))
                            for s in SHAPES if s in count["shape"] or rng.random() < 0.1]
                         + [(f"{s} shapes", count["size"].get(s, 0)) for s in SIZES])
    out.append(("count", f"How many {what} are there?", str(n), f"The number of {what} is {n}."))
    o = rng.choice(objects)
    out.append(("place", f"Where is the {pair(o)}?", place(o), f"The {pair(o)} is at the {place(o)}."))
    two = [(a, b, axis) for a in objects for b in objects for axis in ("row", "column") if a[axis] != b[axis]]
    if two:
        a, b, axis = rng.choice(two)
        words = ("above", "below") if axis == "row" else ("left", "right")
        word = words[a[axis] > b[axis]]
        sentence = (f"The {pair(a)} is {word} the {pair(b)}." if axis == "row"
                    else f"The {pair(a)} is to the {word} of the {pair(b)}.")
        ask = " or ".join(words) if axis == "row" else "to the left or to the right of"
        out.append(("relation", f"Is the {pair(a)} {ask} the {pair(b)}?", word, sentence))
    if rng.random() < 0.5:
        o = rng.choice(objects)
        out.append(("exists", f"Is there {article(pair(o))}?", "yes", f"Yes, there is {article(pair(o))}."))
    else:
        absent = [p for p in PAIRS if p not in there]
        crossed = [p for p in absent if p[0] in count["color"] and p[1] in count["shape"]]
        half = [p for p in absent if p[0] in count["color"] or p[1] in count["shape"]]
        kind = rng.random()
        c, s = rng.choice(crossed if crossed and kind < 0.5 else half if half and kind < 0.8 else absent)
        out.append(("exists", f"Is there {article(c)} {s}?", "no", f"No, there is no {c} {s}."))
    if scene["sign"]:
        digit = str(scene["sign"]["digit"])
        out.append(("read", "What number is on the sign?", digit, f"The number on the sign is {digit}."))
    return out


def facts():
    """Small talk that needs no scene: (question, short answer, sentence)."""
    out = []
    for i in range(9):
        out.append((f"Which number comes after {i}?", str(i + 1), f"The number after {i} is {i + 1}."))
        out.append((f"Which number comes before {i + 1}?", str(i), f"The number before {i + 1} is {i}."))
    for a, b in [("left", "right"), ("top", "bottom"), ("small", "large"), ("above", "below"), ("yes", "no")]:
        out += [(f"What is the opposite of {x}?", y, f"The opposite of {x} is {y}.") for x, y in ((a, b), (b, a))]
    for s, n in [("triangle", 3), ("square", 4)]:
        out.append((f"How many sides has a {s}?", str(n), f"A {s} has {n} sides."))
    return out


def dialogue(asked, short, opening=""):
    """[(question, short, sentence)] -> LLaVA turns; the opening (a picture, a written scene) and the instruction stand
    in the first."""
    turns = []
    for i, (question, answer, sentence) in enumerate(asked):
        text = (opening if i == 0 else "") + question + (f"\n{SHORT}" if short and i == 0 else "")
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer if short else sentence}]
    return turns


def conversation(scene, rng, opening, turns=8, short=None, tally=None):
    """Questions about one scene, drawn several times over, none twice. That leaves more "no" than "yes", since fewer
    things are there than could be; tally, {"yes": n, "no": n} over all conversations of a file, evens it out: the
    answer that leads is not asked for."""
    asked = {}
    while len(asked) < turns:
        before = len(asked)
        for _, q, a, s in questions(scene, rng):
            asked.setdefault(q, (q, a, s))
        if len(asked) == before and rng.random() < 0.2:
            break                                          # a scene with one shape has only so many questions
    asked = list(asked.values())
    rng.shuffle(asked)
    asked = asked[:turns]
    for row in [r for r in asked if tally and r[1] in tally]:
        if tally[row[1]] > min(tally.values()):
            asked.remove(row)
        else:
            tally[row[1]] += 1
    return dialogue(asked, rng.random() < 0.7 if short is None else short, opening)


# ---- files ----------------------------------------------------------------------------------------------------------

VERSION = 5  # of what is written: raise it when the same numbers would draw other files
SCENES = dict(align=4000, sft=8000, val_align=64, val_sft=64, test=240)


def write(out, split="all", seed=0, **sizes):
    """Write the world below the folder `out`: OUT/SPLIT.json (test: OUT/questions.jsonl) and OUT/images/. split: align
    or sft, each with its validation file and the test questions, or all. What is there already, in the same size,
    stays. -> splits drawn"""
    out, sizes = Path(out), {**SCENES, **sizes}
    (out / "images").mkdir(parents=True, exist_ok=True)
    drawn = []
    for name in sizes:
        if split not in ("all", name) and name not in (f"val_{split}", "test"):
            continue
        file, mark = out / ("questions.jsonl" if name == "test" else f"{name}.json"), out / f".{name}"
        numbers = json.dumps(dict(scenes=sizes[name], seed=seed, version=VERSION))
        if mark.is_file() and mark.read_text() == numbers:
            continue
        rows = {"align": captions, "sft": conversations, "test": exam}[name.removeprefix("val_")](
            scenes(out, name, sizes[name], seed))
        text = "".join(json.dumps(r) + "\n" for r in rows) if name == "test" else json.dumps(rows)
        file.write_text(text)
        mark.write_text(numbers)
        drawn.append(name)
    return drawn


def scenes(out, split, n, seed):
    """Draw n scenes -> id, file name, scene, and the scene's own random numbers"""
    for i in range(n):
        rng = random.Random(f"{seed}/{split}/{i}")
        # ten digits on a sign are learnt last, and more of them sooner
        scene = make_scene(rng, test=True) if split == "test" else make_scene(rng, signs=0.8)
        name = f"{split}_{i:05d}.png"
        draw(scene, rng.getrandbits(32)).save(out / "images" / name, compress_level=1)
        yield f"{split}_{i}", name, scene, rng


def captions(scenes):
    ask = ["Give a caption of the image.\n<image>", "<image>\nDescribe the image briefly.", "<image>\nWhat is this?"]
    return [{"id": i, "image": name, "conversations": [
        {"from": "human", "value": rng.choice(ask)}, {"from": "gpt", "value": caption(scene, rng.random() < 0.75)}]}
        for i, name, scene, rng in scenes]


def conversations(scenes):
    rows, tally = [], {"yes": 0, "no": 0}
    for i, name, scene, rng in scenes:
        if rng.random() < 0.15:                             # a description, long or short
            long = rng.random() < 0.75
            ask = "Describe the image." if long else "Describe the image briefly."
            turns = dialogue([(ask, None, caption(scene, long))], False, "<image>\n")
        else:
            turns = conversation(scene, rng, "<image>\n", tally=tally)
        rows.append({"id": i, "image": name, "conversations": turns})
        if rng.random() < 0.1:                              # text alone: a written scene, or small talk
            if rng.random() < 0.8:
                other = make_scene(rng)
                turns = conversation(other, rng, written(other, rng) + "\n", tally=tally)
            else:
                turns = dialogue(rng.sample(facts(), 4), rng.random() < 0.7)
            rows.append({"id": f"{i}_text", "conversations": turns})
    return rows


def exam(scenes):
    return [{"question_id": f"{i}_{kind}", "image": name, "text": f"{q}\n{SHORT}", "answer": a, "type": kind}
            for i, name, scene, rng in scenes for kind, q, a, _ in questions(scene, rng)]


if __name__ == "__main__":
    folders = [a for a in sys.argv[1:] if not a.startswith("--")]
    sizes = dict(a[2:].partition("=")[::2] for a in sys.argv[1:] if a.startswith("--"))
    if len(folders) != 1 or set(sizes) - {*SCENES, "seed"}:
        raise SystemExit(__doc__.split("\n\n")[1])
    try:
        drawn = write(folders[0], **{k: read_value(v, int, k) for k, v in sizes.items()})
    except OSError as e:
        stop(f"the toy world cannot be drawn in {folders[0]}: {e.strerror or e}")
    print("drew", *drawn or ["nothing: it is all there"])
