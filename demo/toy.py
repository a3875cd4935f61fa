"""The toy world: a small data set that the repository draws itself. Scenes are made from a seed; each scene has an
image, captions, questions and answers. They are written as ordinary LLaVA json and PNG files, so training treats them
like any other data.

    python demo/toy.py OUT [--align=N --sft=N --seed=N]    # OUT/{align,sft,val_align,val_sft}.json,
                                                           # OUT/questions.jsonl, OUT/images/

A scene has one to four objects (coloured shapes) on a 3 x 3 grid. No two objects share both colour and shape.
Some scenes also have a sign with a digit. An example:

    scene      large red circle top left, small blue star middle right, sign 7 bottom center
    caption    a red circle, a blue star and a sign
    detailed   top left: a large red circle; middle right: a small blue star; bottom center: a sign that says 7
    questions  What color is the circle? red      Where is the blue star? middle right      Is there a red star? no

Held-out combinations: there are 648 combinations of colour, shape, size and place. One sixth of them (`held_out`) never
occurs in training, neither in images nor in text. All objects of a test scene have held-out combinations. But each
single colour, shape, size and place occurs in training.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import one_line_errors, stop
from run.arguments import positional, read_value

COLORS = {"red": (220, 35, 35), "green": (35, 165, 50), "blue": (40, 60, 225), "yellow": (240, 220, 40),
          "purple": (190, 45, 200), "cyan": (50, 215, 225)}
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
SIZES = ["small", "large"]
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "center", "right"]
PAIRS = [(c, s) for c in COLORS for s in SHAPES]
SIDE, CELL = 72, 24                                       # sides of an image and of a grid cell, in pixels
SHORT = "Answer the question using a single word or phrase."
TYPES = ["color", "shape", "size", "count", "place", "relation", "exists", "read"]


# ---- the scene graph ------------------------------------------------------------------------------------------------

def held_out(color, shape, size, row, column):
    """Is this combination for test scenes only? One in six is. Any two attributes still occur together in training."""
    return ([*COLORS].index(color) + SHAPES.index(shape) + 3 * SIZES.index(size) + 2 * row + column) % 6 == 0


def make_scene(rng, test=False, signs=0.4):
    """Make a random scene -> {objects: [{color, shape, size, row, column}], sign: {digit, row, column} or None}.

    test     True: use only held-out combinations. False: use none of them
    signs    probability of a sign
    ->       the list of objects is sorted from top left to bottom right"""
    pairs = PAIRS
    if rng.random() < 0.5:                                 # similar objects: two often share a colour or a shape
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
                return make_scene(rng, test, signs)        # no free cell for this colour and shape: start again
        cells.remove((r, k))
        objects.append(dict(color=color, shape=shape, size=size, row=r, column=k))
    objects.sort(key=lambda o: (o["row"], o["column"]))
    r, k = rng.choice(cells)
    sign = dict(digit=rng.randint(0, 9), row=r, column=k) if rng.random() < signs else None
    return dict(objects=objects, sign=sign)


def place_name(o):
    return f"{ROWS[o['row']]} {COLUMNS[o['column']]}"


def pair_name(o):
    return f"{o['color']} {o['shape']}"


def things(scene):
    """-> the objects and the sign of a scene, from top left to bottom right."""
    everything = scene["objects"] + ([scene["sign"]] if scene["sign"] else [])
    return sorted(everything, key=lambda o: (o["row"], o["column"]))


# ---- the image ------------------------------------------------------------------------------------------------------

def draw_sign(d, x, y, digit, ups):
    """Draw a sign of 15 x 19 pixels. d: PIL.ImageDraw of an image `ups` times as large; x, y: centre in pixels"""
    from PIL import ImageFont
    w, h = 7.5, 9.5
    d.rectangle([(x - w) * ups, (y - h) * ups, (x + w) * ups, (y + h) * ups], fill=(250, 250, 250), outline=(0, 0, 0),
                width=ups)
    d.text((x * ups, y * ups), str(digit), fill=(0, 0, 0), font=ImageFont.load_default(size=17 * ups), anchor="mm")


def draw_scene(scene, seed, circles=None):
    """Draw a scene -> PIL image, SIDE x SIDE, RGB. The background has a colour gradient and a little noise.
    circles: a list to which the centre and the radius (x, y, r) of each object are appended, in pixels"""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    ups = 3                                                # draw at three times the size, then shrink, for smooth edges
    corners = rng.integers(0, 256, 3) * 0.35 + rng.choice([20, 145])   # background: dark or light, with a weak tint
    slope = rng.normal(0, 12, (2, 3))
    grid = np.linspace(-1, 1, SIDE)
    ground = corners + grid[:, None, None] * slope[0] + grid[None, :, None] * slope[1]
    image = Image.fromarray(ground.clip(0, 255).astype("uint8")).resize((SIDE * ups, SIDE * ups), Image.BILINEAR)
    d = ImageDraw.Draw(image)
    for o in things(scene):
        x, y = (CELL * (k + 0.5) + rng.uniform(-2, 2) for k in (o["column"], o["row"]))
        if "digit" in o:
            draw_sign(d, x, y, o["digit"], ups)
            continue
        r = (rng.uniform(9.0, 10.5) if o["size"] == "large" else rng.uniform(4.8, 6.0))
        if circles is not None:
            circles.append((x, y, r))
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


# ---- text -----------------------------------------------------------------------------------------------------------

def listing(words):
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def caption(scene, detailed):
    if not detailed:
        return listing([article("sign" if "digit" in o else pair_name(o)) for o in things(scene)])
    names = [f"a sign that says {o['digit']}" if "digit" in o else f"a {o['size']} {pair_name(o)}"
             for o in things(scene)]
    return "; ".join(f"{place_name(o)}: {name}" for o, name in zip(things(scene), names))


def scene_text(scene, rng=None):
    """Write the scene as text, which the LLM reads in place of the image. If rng is given, it shuffles the things."""
    names = [f"{place_name(o)}: " + (f"sign {o['digit']}" if "digit" in o else f"{o['size']} {pair_name(o)}")
             for o in things(scene)]
    if rng:
        rng.shuffle(names)
    return "; ".join(names)


def scene_questions(scene, rng):
    """Make one random question of each type that fits the scene -> [(type, question, short answer, sentence)].

    Each question has exactly one right answer. The sentence gives this answer, too. The type "exists" asks for a colour
    and a shape: "Is there a red star?" Yes and no are equally likely. If the answer is "no", the scene often has
    another red thing or another star. For about a third of the questions with the answer "no", it has both."""
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
        out.append(("color", f"What color is the shape at the {place_name(o)}?", o["color"],
                    f"The shape at the {place_name(o)} is {o['color']}."))
    single = [o for o in objects if count["color"][o["color"]] == 1]
    if single and rng.random() < 0.5:
        o = rng.choice(single)
        out.append(("shape", f"Which shape is {o['color']}?", o["shape"], f"The {o['shape']} is {o['color']}."))
    else:
        o = rng.choice(objects)
        out.append(("shape", f"Which shape is at the {place_name(o)}?", o["shape"],
                    f"There is a {o['shape']} at the {place_name(o)}."))
    o = rng.choice(objects)
    out.append(("size", f"What size is the {pair_name(o)}?", o["size"], f"The {pair_name(o)} is {o['size']}."))

    what, n = rng.choice([("shapes", len(objects))]
                         + [(f"{c} shapes", count["color"].get(c, 0))
                            for c in COLORS if c in count["color"] or rng.random() < 0.1]
                         + [(f"{s}s" if s != "cross" else "crosses", count["shape"].get(s, 0))
                            for s in SHAPES if s in count["shape"] or rng.random() < 0.1]
                         + [(f"{s} shapes", count["size"].get(s, 0)) for s in SIZES])
    out.append(("count", f"How many {what} are there?", str(n), f"The number of {what} is {n}."))
    o = rng.choice(objects)
    out.append(("place", f"Where is the {pair_name(o)}?", place_name(o),
                f"The {pair_name(o)} is at the {place_name(o)}."))
    two = [(a, b, axis) for a in objects for b in objects for axis in ("row", "column") if a[axis] != b[axis]]
    if two:
        a, b, axis = rng.choice(two)
        words = ("above", "below") if axis == "row" else ("left", "right")
        word = words[a[axis] > b[axis]]
        sentence = (f"The {pair_name(a)} is {word} the {pair_name(b)}." if axis == "row"
                    else f"The {pair_name(a)} is to the {word} of the {pair_name(b)}.")
        ask = " or ".join(words) if axis == "row" else "to the left or to the right of"
        out.append(("relation", f"Is the {pair_name(a)} {ask} the {pair_name(b)}?", word, sentence))
    if rng.random() < 0.5:
        o = rng.choice(objects)
        out.append(("exists", f"Is there {article(pair_name(o))}?", "yes", f"Yes, there is {article(pair_name(o))}."))
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


def general_questions():
    """Make questions that need no scene -> [(question, short answer, answer in a sentence)]."""
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
    """Write questions and answers as LLaVA turns.

    asked      [(question, short answer, answer in a sentence)]
    short      True: use short answers, and end the first turn with the instruction SHORT. False: use sentences
    opening    text at the beginning of the first turn: the image marker, or the text of a scene"""
    turns = []
    for i, (question, answer, sentence) in enumerate(asked):
        text = (opening if i == 0 else "") + question + (f"\n{SHORT}" if short and i == 0 else "")
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer if short else sentence}]
    return turns


def scene_conversation(scene, rng, opening, turns=8, short=None, tally=None):
    """Ask up to `turns` different questions about one scene -> LLaVA turns.

    Few of the possible objects exist, so more of these questions have the answer "no" than "yes". `tally` balances
    them. It counts the answers in the file so far: {"yes": n, "no": n}. A question is left out if its answer is
    already the more frequent one."""
    asked = {}
    while len(asked) < turns:
        before = len(asked)
        for _, q, a, s in scene_questions(scene, rng):
            asked.setdefault(q, (q, a, s))
        if len(asked) == before and rng.random() < 0.2:
            break                                          # no new question: a scene with one object has few
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

VERSION = 5  # increase it after a change of this code that changes the files: else write_world keeps the old files
SCENES = dict(align=4000, sft=8000, val_align=64, val_sft=64, test=240)


def write_world(out, split="all", seed=0, **sizes):
    """Write the toy world into the folder `out` -> names of the splits that were written.

    A split is one part of the data. Each split has a file out/SPLIT.json (the split "test": out/questions.jsonl). The
    images of all splits are in out/images/. A split that exists with the same size, seed and version is kept.

    split    "all" writes every split. "test" writes only the split "test". "align" or "sft" also writes its
             validation split ("val_align" or "val_sft") and "test"
    sizes    number of scenes of a split, where it is not that of SCENES: align=100"""
    out, sizes = Path(out), {**SCENES, **sizes}
    (out / "images").mkdir(parents=True, exist_ok=True)
    written = []
    for name in sizes:
        if split not in ("all", name) and name not in (f"val_{split}", "test"):
            continue
        file, stamp = out / ("questions.jsonl" if name == "test" else f"{name}.json"), out / f".{name}"
        numbers = json.dumps(dict(scenes=sizes[name], seed=seed, version=VERSION))
        if stamp.is_file() and stamp.read_text() == numbers:
            continue
        rows = {"align": caption_rows, "sft": conversation_rows, "test": question_rows}[name.removeprefix("val_")](
            draw_scenes(out, name, sizes[name], seed))
        text = "".join(json.dumps(r) + "\n" for r in rows) if name == "test" else json.dumps(rows)
        file.write_text(text)
        stamp.write_text(numbers)
        written.append(name)
    return written


def draw_scenes(out, split, n, seed):
    """Draw n scenes into out/images/, one by one. Yield (id, file name, scene, random generator of this scene)."""
    for i in range(n):
        rng = random.Random(f"{seed}/{split}/{i}")
        # models learn digits last, so training scenes have more signs (with digits) than test scenes
        scene = make_scene(rng, test=True) if split == "test" else make_scene(rng, signs=0.8)
        name = f"{split}_{i:05d}.png"
        draw_scene(scene, rng.getrandbits(32)).save(out / "images" / name, compress_level=1)
        yield f"{split}_{i}", name, scene, rng


def caption_rows(scenes):
    ask = ["Give a caption of the image.\n<image>", "<image>\nDescribe the image briefly.", "<image>\nWhat is this?"]
    return [{"id": i, "image": name, "conversations": [
        {"from": "human", "value": rng.choice(ask)}, {"from": "gpt", "value": caption(scene, rng.random() < 0.75)}]}
        for i, name, scene, rng in scenes]


def conversation_rows(scenes):
    rows, tally = [], {"yes": 0, "no": 0}
    for i, name, scene, rng in scenes:
        if rng.random() < 0.15:                             # ask for a long or short description
            long = rng.random() < 0.75
            ask = "Describe the image." if long else "Describe the image briefly."
            turns = dialogue([(ask, None, caption(scene, long))], False, "<image>\n")
        else:
            turns = scene_conversation(scene, rng, "<image>\n", tally=tally)
        rows.append({"id": i, "image": name, "conversations": turns})
        if rng.random() < 0.1:                              # a sample without an image
            if rng.random() < 0.8:
                other = make_scene(rng)
                turns = scene_conversation(other, rng, scene_text(other, rng) + "\n", tally=tally)
            else:
                turns = dialogue(rng.sample(general_questions(), 4), rng.random() < 0.7)
            rows.append({"id": f"{i}_text", "conversations": turns})
    return rows


def question_rows(scenes):
    return [{"question_id": f"{i}_{kind}", "image": name, "text": f"{q}\n{SHORT}", "answer": a, "type": kind}
            for i, name, scene, rng in scenes for kind, q, a, _ in scene_questions(scene, rng)]


def main(argv):
    known = [a for a in argv if a.startswith("--") and a[2:].partition("=")[0] in (*SCENES, "seed")]
    sizes = dict(a[2:].partition("=")[::2] for a in known)
    folders = positional([a for a in argv if a not in known], __doc__)
    if len(folders) != 1:
        stop("usage: python demo/toy.py OUT [--SPLIT=N --seed=N], SPLIT one of " + ", ".join(SCENES))
    try:
        written = write_world(folders[0], **{k: read_value(v, int, k) for k, v in sizes.items()})
    except OSError as e:
        stop(f"cannot write the toy world into {folders[0]}: {e.strerror or e}")
    print("wrote", *written or ["nothing: everything is already there"])


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
