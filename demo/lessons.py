"""What the tongue reads at school: three lessons, each a stream of documents (ids, labels, no images).

    pairs       red circle top left; star blue middle right         then:  circle red now -> top left
    records     red top small left circle; 7 sign bottom center     then:  row circle red -> top   left top color -> red
    questions   top left: small red circle; ... USER: Where is the red circle? ASSISTANT: top left

To answer "where is the red circle" from a text, a transformer has to bring two words of the question to the place where
it answers, two words of each thing to the place where it reads, and compare both. No part helps without the others, so
a model that is only asked such questions guesses for as long as we cared to watch (6,000 steps): it names the place of
any thing that is there. The first two lessons build the parts, one after the other. What seemed to matter, in short
runs of one seed each, so hints and not findings:

    distance    the answer follows the key at once in some drills, and after one to four words in others. With a fixed
                distance of two or of five fillers (sequences without meaning) nothing was learnt in 500 steps; mixed,
                all distances came together within 400
    order       "red circle" and "circle red", in the list and in the drill, and one word as key where it suffices.
                Without these two only the word next to the answer was compared, and two red things stayed confused
    in turn     all three lessons mixed from the start: nothing for 2,000 steps. One after the other: pairs within 600
"""

import toy
from chat import encode, Script

FILLERS = ["is", "now", "there", "then", "and", "so"]


def asked(tok, opening, questions, short):
    """[(question, short answer, sentence)] behind an opening -> a document (ids, labels, no images)"""
    c = toy.dialogue(questions, short, opening)
    turns = [(u["value"], a["value"]) for u, a in zip(c[::2], c[1::2])]
    return (*encode(tok, "vicuna_v1", turns, 0, 3, 0, system=""), [])


def shuffled(rng, words):
    return rng.sample(words, len(words))


def records(scene, rng, easy):
    """-> things as {attribute: word}, in random order, and a line of words for each, also in random order"""
    things, lines = [], []
    for o in shuffled(rng, scene["objects"] if easy else toy.things(scene)):
        name = ({"shape": "sign", "number": str(o["digit"])} if "digit" in o else
                {k: o[k] for k in ("color", "shape", "size")[:2 if easy else 3]})
        where = {"row": toy.ROWS[o["row"]], "column": toy.COLUMNS[o["column"]]}
        things.append(name | where)
        parts = [shuffled(rng, [*name.values()]), [*where.values()]]
        if not easy:
            parts = [shuffled(rng, sum(parts, []))] if rng.random() < 0.5 else shuffled(rng, parts)
        lines.append(" ".join(sum(parts, [])))
    return things, lines


def drill(rng, easy):
    """-> a list of things in words, and four drills [(key in words, answer)]; easy: the lesson `pairs`. A key names one
    thing and no other. The same drill may come twice: what is left over is no hint."""
    things, lines = records(toy.make_scene(rng), rng, easy)
    keys = ([("color", "shape")] * 2 + [("color",), ("shape",)]
            + ([] if easy else [("row", "column")] * 2 + [("row",), ("column",)]))
    drills = []
    while len(drills) < 4:
        a, key = rng.choice(things), rng.choice(keys)
        if sum(all(b.get(k) == a.get(k) for k in key) for b in things) > 1 or not all(k in a for k in key):
            continue
        asks = [] if easy else [k for k in a if k not in key and a[k] != "sign"]
        if not {"row", "column"} & set(key):
            asks.append("place")
        ask, words = rng.choice(asks), [" ".join(shuffled(rng, [a[k] for k in key]))]
        if not easy:
            words.insert(0 if rng.random() < 0.7 else 1, ask)
        words += rng.choices(FILLERS, k=rng.choice([0, 0, 1, 2, 4]))
        drills.append((" ".join(words) + ("" if easy else rng.choice(["", "", ":"])),
                       f"{a['row']} {a['column']}" if ask == "place" else a[ask]))
    return lines, drills


def drilled(tok, rng, easy):
    lines, drills = drill(rng, easy)
    w = Script(tok, 0)
    w.control(tok.bos)
    w.text(" " + "; ".join(lines) + "\n")
    for key, answer in drills:                            # a blank before each word: " red" is another token than "red"
        w.text(" " + key)
        w.text(" " + answer, learn=True)
        w.text("\n")
    return (*w.ids(3, 0), [])


def caption(tok, rng):
    """A caption, mostly of a written scene."""
    scene, w = toy.make_scene(rng), Script(tok, 0)
    w.control(tok.bos)
    w.text(toy.written(scene) + "\n" if rng.random() < 0.8 else "")
    w.text(toy.caption(scene, rng.random() < 0.75) + "\n", learn=True)
    return (*w.ids(3, 0), [])


def questions(tok, rng):
    """Two questions about a written scene. The draws may repeat a question, and are few: with many different questions
    about one scene a reader may answer by elimination, without looking."""
    scene = toy.make_scene(rng)
    pool = sum((toy.questions(scene, rng) for _ in range(3)), [])
    opening = toy.written(scene, rng) if rng.random() < 0.7 else "; ".join(records(scene, rng, False)[1])
    return asked(tok, opening + "\n", [q[1:] for q in rng.sample(pool, 2)], rng.random() < 0.7)


def lesson(name, tok, rng):
    """One document. Only answers are learnt: a random scene cannot be foretold. Old lessons are not forgotten."""
    draw = rng.random()
    if name == "pairs" or name == "records" and draw < 1 / 3:
        return drilled(tok, rng, easy=True)
    if name == "records" or draw < 0.25:
        return drilled(tok, rng, easy=False)
    if draw < 0.30:
        return asked(tok, "", rng.sample(toy.facts(), 4), rng.random() < 0.7)
    return caption(tok, rng) if draw < 0.37 else questions(tok, rng)
