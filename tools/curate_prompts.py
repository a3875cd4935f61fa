"""What tools/curate.py synth asks for, and which replies it takes: the three kinds of data of LLaVA (Liu et al. 2023,
arXiv 2304.08485, section 3) from captions and boxes. The prompts are our own.

    conversation    several short questions and answers      detail    one long description
    reasoning       one question that needs several steps, and its answer"""

import random
import re
from typing import NamedTuple

from chat import IMAGE
from config import BadSample
from formats.rows import conversation

SYSTEM = """\
You write training data for a model that looks at images. You do not see the image. You get facts about it: sentences \
by people who saw it, and sometimes a list of objects with their left, top, right and bottom edges, as shares of the \
width and height of the image, from 0 to 1. Write as somebody who looks at the image. Write only what follows from the \
facts. Leave out what the facts do not say, and what they contradict. \
Never speak of the facts, sentences, captions, boxes or \
numbers of edges: write "on the left" or "in front of the door" instead."""
LINES = 'Begin each question with "Question:" and each answer with "Answer:", each on a new line. Write nothing else.'


class Kind(NamedTuple):
    ask: str                   # what is asked for
    pairs: tuple               # least and most questions with an answer
    question: tuple            # least and most characters of a question
    answer: tuple              # of an answer


KINDS = {
    "conversation": Kind(
        "Write four questions about the image that a curious person may ask, and an answer to each. The questions are "
        "about different things: what there is, how many, which colours, where, what is going on. Each has one clear "
        f"answer. An answer has one to three sentences. {LINES}", (2, 8), (4, 300), (1, 1000)),
    "detail": Kind(
        "Describe the image in one or two paragraphs: first what matters most, then the rest, and where things are "
        "relative to each other. Write the description alone.", (1, 1), (1, 300), (80, 4000)),
    "reasoning": Kind(
        "Write one question about the image whose answer is not seen at once, but follows from what is seen: why "
        "something is as it is, what may happen next, or what somebody should be careful about. Then write its answer: "
        f"what is seen, what follows from it, the conclusion. {LINES}", (1, 1), (10, 400), (60, 4000))}
DESCRIBE = (  # questions in front of a description; one is drawn for each row
    "What does this image show? Tell me all you see.", "Describe this image, leaving nothing out.",
    "What is in this image, and where is it?", "Write down everything that can be seen here.",
    "What is there to see in this image? Go into the details.", "Give a long and exact description of this image.")
REFUSAL = re.compile(r"(i'?m|i am) (very |so )?sorry\b|sorry, |i can(no|')t\b|"
                     r"i can not\b|"
                     r"(i'?m|i am) (unable|not able)\b|as an ai\b|unfortunately,? i\b|"
                     r"i (do not|don't) (see|have access)\b")
SOURCE = re.compile(r"\bcaption(s|ed|ing)?\b|\bbounding[ -]box|\bcoordinates?\b|"
                    r"\b(provided|given) (facts?|texts?|sentences?|descriptions?|information|list|objects?)\b|"
                    r"\bthe (facts|sentences|descriptions) (say|state|mention|tell|describe)|"
                    r"\b(0?\.\d+|0|1)\s*,\s*0?\.\d+\b", re.IGNORECASE)


# ---- a row -> the facts in the prompt -------------------------------------------------------------------------------

def row_facts(row):
    """-> the image of a row (a name or bytes), the text of its facts. captions: a list of texts, or `caption`, or the
    first answer. boxes: [{"label": text, "box": [left, top, right, bottom]}], as shares of the sides, or in pixels if
    the row has width and height"""
    captions = row.get("captions") or ([row["caption"]] if row.get("caption") else [])
    if isinstance(captions, list) and all(isinstance(c, str) and c.strip() for c in captions) and captions:
        row_of = {k: row[k] for k in ("image", "images", "image_bytes") if k in row}
        names = conversation(row_of | {"caption": "x"})[1]
    else:
        turns, names, _ = conversation(row)
        captions = [turns[0][1]]
    if len(names) != 1 or not captions[0].strip():
        raise BadSample("a row needs one image and a caption", f"{len(names)} image(s)")
    lines = ["What people wrote about the image:", *(f"- {' '.join(c.split())}" for c in captions)]
    boxes = [box_line(box, row) for box in row.get("boxes") or []]
    return names[0], "\n".join(lines + ["", "Objects and their edges:"] * bool(boxes) + boxes)


def box_line(item, row):
    """-> a line of the facts"""
    try:
        label, (x1, y1, x2, y2) = item["label"], item["box"]
        w, h = (row[k] if "width" in row else 1 for k in ("width", "height"))
        left, top, right, bottom = box = (x1 / w, y1 / h, x2 / w, y2 / h)
    except (TypeError, KeyError, ValueError, ZeroDivisionError):
        raise BadSample("a box is not {label, box: [left, top, right, bottom]}", f"{item!r:.80}") from None
    if not isinstance(label, str) or not label.strip() or not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise BadSample("a box lies outside the image; boxes in pixels need width and height", f"{item!r:.80}")
    return f"- {' '.join(label.split())}: " + ", ".join(
        f"{side} {x:.2f}" for side, x in zip(("left", "top", "right", "bottom"), box))


def prompt(kind, facts):
    """-> messages of OpenAI's protocol"""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{facts}\n\n{KINDS[kind].ask}"}]


# ---- a reply -> turns ------------------------------------------------------------------------------------------------

def read_reply(kind, text, name):
    """The reply of a model -> [(question, answer)]. Raise BadSample if it cannot be used. name: of the row; it draws
    the question in front of a description"""
    text = text.strip().replace("\u2019", "'")
    if REFUSAL.match(text.casefold()):
        raise BadSample("the model refuses", text[:200])
    parts = re.split(r"^[ \t*#]*(Question|Answer)[ \t]*\d*[ \t*]*:[ \t*]*", text, flags=re.MULTILINE | re.IGNORECASE)
    before, roles, said = parts[0], [r.lower() for r in parts[1::2]], [p.strip() for p in parts[2::2]]
    if kind == "detail":
        if roles:
            raise BadSample("a description has turns", text[:200])
        roles, said = ["question", "answer"], [random.Random(name).choice(DESCRIBE), before.strip()]
    elif before.strip():
        raise BadSample("text before the first question", before.strip()[:200])
    if roles != ["question", "answer"] * (len(roles) // 2) or not roles:
        raise BadSample("questions and answers do not alternate", ", ".join(roles))
    turns = [*zip(said[::2], said[1::2])]
    check_turns(turns, KINDS[kind])
    return turns


def check_turns(turns, kind):
    """Raise BadSample if turns have a wrong number or length, hold <image>, or name the facts of the prompt."""
    if not kind.pairs[0] <= len(turns) <= kind.pairs[1]:
        raise BadSample("a wrong number of questions", f"{len(turns)}, not {kind.pairs[0]} to {kind.pairs[1]}")
    for turn in turns:
        for text, role, (least, most) in zip(turn, ("question", "answer"), (kind.question, kind.answer)):
            if not text:
                raise BadSample(f"an empty {role}")
            if IMAGE in text:
                raise BadSample(f"{IMAGE} in a turn", text[:200])
            if found := SOURCE.search(text):
                raise BadSample("a turn names its source", f"{found[0]!r} in {text[:200]!r}")
            if role == "answer" and REFUSAL.match(text.casefold()):
                raise BadSample("the model refuses", text[:200])
            if not least <= len(text) <= most:
                raise BadSample(f"a wrong length of the {role}", f"{len(text)} characters, not {least} to {most}")
