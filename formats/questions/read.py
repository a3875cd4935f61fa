"""Records -> questions: which key of a record says what, and how LLaVA-1.5 asks a question."""

import hashlib
import io
import re

from PIL import Image

from chat import IMAGE
from config import BadSample, stop
from formats.configs import one_line
from formats.image_files import FORMATS
from formats.questions.images import place_images, question_image
from formats.questions.parquet import Stored, image_bytes
from formats.questions.records import question_records
from formats.questions.tables import NEEDS, literal
from formats.questions.variants import rotations
from metrics.boxes import read_box
from metrics.tasks import SHORT, TASKS

ID = ("question_id", "questionId", "index", "id")
QUESTION = ("question", "query", "sent", "expression")
ANSWERS = ("answers", "answer", "label", "annotations_captions")
TYPE = ("type", "l2_category", "subject", "category", "answer_type", "question_type_id", "question_type")
REGION = "Please provide the bounding box coordinate of the region this sentence describes: "   # as in LLaVA-1.5's data


def read_questions(file, task):
    """Read the questions of a file for a task of metrics.TASKS -> list of questions"""
    questions, records = [], question_records(file)
    for i in range(len(records)):
        with one_line(f"{file}, question {i} (counted from 0)"):
            try:
                questions += questions_of(records[i], i, task)
            except BadSample as e:
                stop(f"{file}, question {i} (counted from 0): {e}")
    without = [q["question_id"] for q in questions if not q["answers"]]
    if without and len(without) < len(questions):
        stop(f"{file}: question {without[0]!r} and {len(without) - 1} more have no answer, but others have one")
    if task.startswith("mme"):                                   # the two questions of an image share an id or an image
        same = len({q["question_id"] for q in questions}) < len(questions)
        questions = [q | {"group": str(q["question_id"]) if same else q["group"]} for q in questions]
    if TASKS[task].circular and all(q["question_id"] == q["group"] for q in questions):
        questions = [r for q in questions for r in rotations(q)]
    return questions


def pick(record, keys):
    """-> the first value in `record` under one of `keys` that is not missing, or None"""
    return next((record[k] for k in keys if record.get(k) is not None), None)


def questions_of(record, i, task):
    """Turn record number i into questions -> list: one; for RefCOCO, one for each sentence about a box"""
    question, text, kind = pick(record, QUESTION), record.get("text"), TASKS[task].kind
    number, said = pick(record, ID), pick(record, ANSWERS)
    if "conversations" in record:                                # ScienceQA as LLaVA converted it
        human, answer = (turn["value"] for turn in record["conversations"][:2])
        text = f"{human.replace(IMAGE, '').strip()}\n{TASKS[task].suffix}"
        said = (re.findall(r"The answer is ([A-Z])", answer) or [answer])[0]
    options, image = read_options(record, text, said, task) if kind == "letter" else {}, question_image(record)
    if number is None and question is not None:
        number = i                                               # AI2D and ScienceQA on the hub have no ids
    if number is None or not isinstance(text if question is None else question, str) or said == []:
        raise BadSample(NEEDS)
    number = int(number) if isinstance(number, str) and number.isdigit() and "index" in record else number
    kinds = (record[k] for k in TYPE if record.get(k))
    base = dict(question_id=number, type=str(next(kinds, "all")), image=image)
    if task.startswith("mmmu"):
        base["type"] = (re.findall(r"^[a-z]+_(.+)_\d+$", str(number)) or [base["type"]])[0]
    if kind == "box" and text is None:
        return region_questions(record, base, question, said)
    base["answers"] = read_truth(said, options, task, listed="index" in record)
    if kind == "letter":
        base["options"] = options
    if task.startswith("mme"):
        key = record.get("image_path", image)
        key = hashlib.sha256(key).hexdigest() if isinstance(key, bytes) else key
        base["group"] = key.digest if isinstance(key, Stored) else str(key)
    if task.startswith("mmbench"):
        base["group"] = number % 10**6 if isinstance(number, int) else number
    if task.startswith("ocrbench"):
        base["dataset"] = str(record.get("dataset_name") or record.get("dataset") or "")
    if task == "refcoco_padded":
        base["size"] = size_of_image(record, image)
    if text is None:
        text = written(question, options, record.get("hint"), task)
    return [base | place_images(text, image)]


def written(question, options, hint, task):
    """Write a prompt as LLaVA-1.5 asks it: hint, question, options, instruction; each on its own lines"""
    suffix = TASKS[task].suffix
    question = question.replace(" Please answer yes or no.", "") if task.startswith("mme") else question
    hint = f"{'Context: ' if task.startswith('scienceqa') else ''}{hint}" if hint else ""
    if task.startswith("mmmu"):                                  # mmmu/configs/llava1.5.yaml
        lines = [f"({c}) {o}" for c, o in options.items()] + [""] * bool(options)
        suffix = suffix if options else SHORT
    else:
        lines = [f"{c}. {o}" for c, o in options.items() if o]
    lines = [line for line in (hint, question) if line] + lines + [suffix] * bool(suffix)
    return "\n".join(lines)


def read_options(record, text, said, task):
    """-> {letter: text} of the options: columns A, B ..., choice_a ..., a list `options` or `choices`, or the lines
    "A. ..." of a ready text. If a file says them nowhere: A to D, or up to the true letter, without texts."""
    listed = pick(record, ("options", "choices"))
    if isinstance(listed, str):
        listed = literal(listed) if listed.strip() != "[]" else []
    if isinstance(listed, list):
        listed = {chr(65 + i): o for i, o in enumerate(listed)}
    if not isinstance(listed, dict):
        listed = {c: pick(record, (c, f"choice_{c.lower()}")) for c in "ABCDEFGHIJ"}
    options = {c: str(o) for c, o in listed.items() if o is not None} or dict(
        re.findall(r"^\(?([A-J])[.)] (.*)$", text or "", re.MULTILINE))
    if options or task.startswith("mmmu"):
        return options
    last = max("D", said) if isinstance(said, str) and re.fullmatch("[A-J]", said) else "D"
    return {chr(c): "" for c in range(ord("A"), ord(last) + 1)}


def read_truth(said, options, task, listed):
    """Turn the true answer of a record into a list of strings, empty if it has none. listed: may a text be the text of
    a list?"""
    kind = TASKS[task].kind
    if isinstance(said, list):
        said = [a["answer"] if isinstance(a, dict) and "answer" in a else a for a in said]        # VQAv2, VizWiz
    elif isinstance(said, str):
        said = literal(said) if listed and kind in ("text", "captions") or task.startswith("mmmu") else [said]
    elif isinstance(said, int) and kind == "letter":
        said = [said]
    if said is None or said == ["?"]:                            # MMMU's test questions have "?"
        return []
    if kind == "letter" and options:                             # an index, 0 for A
        said = [[*options][int(a)] if str(a).isdigit() and int(a) < len(options) and str(a) not in options else a
                for a in said]
    if not isinstance(said, list) or not all(isinstance(a, str) for a in said):
        raise BadSample(NEEDS)
    if kind == "yes or no" and (said := [a.strip().lower().removesuffix(".") for a in said]) not in (["yes"], ["no"]):
        raise BadSample(f"the answer of {task} is yes or no, not {said[0]!r}")
    if kind == "letter" and options and not set(said) <= {*options}:
        raise BadSample(f"the answer {said[0]!r} is not the letter of an option")
    if kind == "box" and not all(map(read_box, said)):
        raise BadSample(f"the answer {said[0]!r} is not a box")
    return said


def region_questions(record, base, sentence, said):
    """RefCOCO: a box in pixels, and one or several sentences that describe its region -> list of questions. Qwen-VL's
    and Shikra's files have corners (x1, y1, x2, y2), width and height; lmms-lab's have COCO's x, y, width, height."""
    bbox, box, size = record.get("bbox"), [], None
    if bbox is not None:
        corners = "sent" in record or "expression" in record
        size = size_of_image(record, base["image"])
        x, y, a, b = bbox
        a, b = (a, b) if corners else (x + a, y + b)
        box = [str([x / size[0], y / size[1], a / size[0], b / size[1]])]
    sentences = said if isinstance(said, list) and bbox is not None else [sentence]
    number, many = base["question_id"], len(sentences) > 1
    ids = [f"{number}_{k}" if many else number for k in range(len(sentences))]
    return [base | dict(question_id=n, text=REGION + s, answers=box, size=size) for n, s in zip(ids, sentences)]


def size_of_image(record, image):
    """-> [width, height] of the image of a record, which boxes in pixels need"""
    if isinstance(record.get("width"), int) and isinstance(record.get("height"), int):
        return [record["width"], record["height"]]
    try:
        return [*Image.open(io.BytesIO(image_bytes(image)), formats=FORMATS).size]
    except Exception:                                            # no bytes; Pillow raises many types on a broken image
        raise BadSample("a box needs the width and height of its image", "keys width and height") from None
