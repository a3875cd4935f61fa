"""The training data of the toy world's LLM: three lessons. A lesson is a series of documents (ids, labels, no images).
Most documents begin with the text of a scene. Drills, or questions, about this text follow:

    pairs       red circle top left; blue star middle right        drill    circle red now -> top left
    records     red top small left circle; 7 sign bottom center    drills   row circle red -> top; left top color -> red
    questions   top left: small red circle; ... USER: Where is the red circle? ASSISTANT: top left

A drill is a key and its answer. The key names a thing of the scene. In `records`, another word of the key says what is
asked: "row" asks for the row of the thing.

To answer "where is the red circle" from a text, the model needs three skills: it copies "red circle" to the position
of the answer, combines the words of each thing in the text, and compares. One skill without the others does not lower
the loss: with questions only, the model still guessed after 6,000 steps. So the first two lessons train one skill after
the other. These choices mattered in short runs (one seed, so no proof):

    distance    Between key and answer are 0, 1, 2 or 4 filler words. With always two or always five fillers, the loss
                did not fall within 500 steps. With mixed distances, it fell for each of them within 400 steps.
    order       A key is "red circle" or "circle red", or one word if only one thing has it. Without these variants, the
                model compared only the word next to the answer, and so it confused two red things.
    sequence    With all lessons mixed from the start, the model learned nothing in 2,000 steps. With the lessons one
                after the other, `pairs` took at most 600 steps.
"""

from chat import Parts, encode
from demo import toy

FILLERS = ["is", "now", "there", "then", "and", "so"]


def dialogue_document(tok, opening, questions, short):
    """Make a document of an opening text and questions about it -> (ids, labels, []).

    questions    [(question, short answer, answer in a sentence)]
    short        True: the document has the short answers. False: it has the sentences"""
    c = toy.dialogue(questions, short, opening)
    turns = [(u["value"], a["value"]) for u, a in zip(c[::2], c[1::2])]
    return (*encode(tok, "vicuna_v1", turns, system=""), [])


def shuffled(rng, items):
    return rng.sample(items, len(items))


def records(scene, rng, easy):
    """Return a scene's things in random order, as two lists: [{attribute: word}] and [text]. easy: the sign and the
    sizes are left out, and each text ends with the place."""
    things, texts = [], []
    for o in shuffled(rng, scene["objects"] if easy else toy.things(scene)):
        name = ({"shape": "sign", "number": str(o["digit"])} if "digit" in o else
                {k: o[k] for k in ("color", "shape", "size")[:2 if easy else 3]})
        where = {"row": toy.ROWS[o["row"]], "column": toy.COLUMNS[o["column"]]}
        things.append(name | where)
        parts = [shuffled(rng, [*name.values()]), [*where.values()]]
        if not easy:
            parts = [shuffled(rng, sum(parts, []))] if rng.random() < 0.5 else shuffled(rng, parts)
        texts.append(" ".join(sum(parts, [])))
    return things, texts


def drill(rng, easy):
    """Make four drills about a random scene -> two lists: [text of a thing], [(key, answer)].

    A key fits only one thing. A drill may occur twice, so the model cannot guess by excluding earlier answers.
    easy    True: drills of the lesson `pairs`. False: drills of the lesson `records`"""
    things, texts = records(toy.make_scene(rng), rng, easy)
    keys = ([("color", "shape")] * 2 + [("color",), ("shape",)]
            + ([] if easy else [("row", "column")] * 2 + [("row",), ("column",)]))
    drills = []
    while len(drills) < 4:
        a, key = rng.choice(things), rng.choice(keys)
        if sum(all(b.get(k) == a.get(k) for k in key) for b in things) > 1 or not all(k in a for k in key):
            continue
        attributes = [] if easy else [k for k in a if k not in key and a[k] != "sign"]
        if not {"row", "column"} & set(key):
            attributes.append("place")
        wanted, words = rng.choice(attributes), [" ".join(shuffled(rng, [a[k] for k in key]))]
        if not easy:
            words.insert(0 if rng.random() < 0.7 else 1, wanted)
        words += rng.choices(FILLERS, k=rng.choice([0, 0, 1, 2, 4]))
        drills.append((" ".join(words) + ("" if easy else rng.choice(["", "", ":"])),
                       f"{a['row']} {a['column']}" if wanted == "place" else a[wanted]))
    return texts, drills


def drill_document(tok, rng, easy):
    texts, drills = drill(rng, easy)
    p = Parts(tok, ())
    p.control(tok.bos)
    p.text(" " + "; ".join(texts) + "\n")
    for key, answer in drills:                     # put a space before each word: " red" and "red" are different tokens
        p.text(" " + key)
        p.text(" " + answer, supervised=True)
        p.text("\n")
    return (*p.tokenise(), [])


def caption_document(tok, rng):
    """Make a document with the caption of a scene. In 80 % of the documents, the text of the scene comes first."""
    scene, p = toy.make_scene(rng), Parts(tok, ())
    p.control(tok.bos)
    p.text(toy.scene_text(scene) + "\n" if rng.random() < 0.8 else "")
    p.text(toy.caption(scene, rng.random() < 0.75) + "\n", supervised=True)
    return (*p.tokenise(), [])


def question_document(tok, rng):
    """Make a document with the text of a scene and two questions about it. With many different questions, the model
    could exclude earlier answers without reading the text."""
    scene = toy.make_scene(rng)
    pool = sum((toy.scene_questions(scene, rng) for _ in range(3)), [])
    opening = toy.scene_text(scene, rng) if rng.random() < 0.7 else "; ".join(records(scene, rng, False)[1])
    return dialogue_document(tok, opening + "\n", [q[1:] for q in rng.sample(pool, 2)], rng.random() < 0.7)


def lesson_document(name, tok, rng):
    """Make a random document of the lesson `name`. Only answers and captions are supervised: the text of a scene is
    random, so it cannot be predicted. In later lessons, some documents are drills of the lesson before."""
    draw = rng.random()
    if name == "pairs" or name == "records" and draw < 1 / 3:
        return drill_document(tok, rng, easy=True)
    if name == "records" or draw < 0.25:
        return drill_document(tok, rng, easy=False)
    if draw < 0.30:
        return dialogue_document(tok, "", rng.sample(toy.general_questions(), 4), rng.random() < 0.7)
    return caption_document(tok, rng) if draw < 0.37 else question_document(tok, rng)
