"""Files of questions, in the forms in which benchmarks are published. All become one list of questions.

    jsonl or a json list        LLaVA's question_id, image, text and, if known, answer, answers or label; or names like
                                question, options, answer ... (OCRBench, ChartQA, VizWiz, RefCOCO)
    json with all in an object  VQAv2 (QUESTIONS.json,ANNOTATIONS.json), TextVQA, DocVQA, InfoVQA, SEED-Bench (without
                                its videos), GQA (balanced ones), ScienceQA (test), COCO and NoCaps captions
    tsv                         VLMEvalKit's: index, image in base64, question, hint, A to D, answer, category
    parquet                     lmms-lab's and the benchmarks' own on the Hugging Face hub (needs pyarrow)

A question is a dict:

    question_id, text     text is the whole prompt: hint, question, options and the instruction of LLaVA-1.5
    image                 None, a file name, bytes, or a tuple of these: then text has an <image> marker for each
    answers               list of true answers; empty if the file has none
    type, options, group, dataset, size        as metrics/tasks.py says; only where the task needs them

A `text` is asked as it is. A `question` gets its options and the instruction of the task."""

import ast
import base64
import binascii
import csv
import hashlib
import io
import random
import re
from collections import Counter
from pathlib import Path

from PIL import Image

from chat import IMAGE
from config import BadSample, stop
from formats.configs import one_line
from formats.rows import Rows
from formats.strict_json import strict_json
from images import FORMATS
from metrics.boxes import read_box
from metrics.tasks import SHORT, TASKS

ID = ("question_id", "questionId", "index", "id")
QUESTION = ("question", "query", "sent", "expression")
PICTURE = ("image", "image_path", "img_path", "imgname", "file_name", "image_local_name", "image_id",
           "imageId", "data_id")
ANSWERS = ("answers", "answer", "label", "annotations_captions")
TYPE = ("type", "l2_category", "subject", "category", "answer_type", "question_type_id", "question_type")
REGION = "Please provide the bounding box coordinate of the region this sentence describes: "   # as in LLaVA-1.5's data
NEEDS = ("it needs question_id, text (or question), image (a name, several or none), answer or a list of answers; "
         "docs/evaluation.md has the forms that are read")


# ---- where the records are ------------------------------------------------------------------------------------------

def question_records(file):
    """Read the records of a file, as they are -> a sequence of dicts"""
    first, _, second = str(file).partition(",")
    for name in (first, second)[: 1 + bool(second)]:
        if not Path(name).is_file() or Path(name).stat().st_size == 0:
            Rows(name)                                           # stops with one line
    suffix = Path(first).suffix.lower()
    if suffix == ".tsv":
        return tsv_records(first)
    if suffix == ".parquet":
        return parquet_records(first)
    whole = whole_object(first)
    if whole is None:
        return Rows(first)
    with one_line(file):
        return object_records(first, whole, second)


def tsv_records(file):
    """Read a table with a header, as pandas writes it: an empty cell or nan is a missing value"""
    csv.field_size_limit(2**31 - 1)                              # an image is one field
    with open(file, encoding="utf-8-sig", newline="") as f:
        try:
            rows = [*csv.DictReader(f, delimiter="\t", strict=True)]
        except (csv.Error, UnicodeDecodeError) as e:
            stop(f"{file} cannot be read as a tsv table: {e}")
    if not rows or "question" not in rows[0]:
        stop(f"{file}: no tsv table with a column question; {NEEDS}")
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            stop(f"{file}, question {i} (counted from 0): not as many cells as the header has names")
    rows = [without_missing(row) for row in rows]
    images = {row.get("index"): row.get("image", "") for row in rows}
    for row in rows:                                             # a short image is the index of the row that has it
        if "image" in row:
            image = row.pop("image")
            row["base64"] = images.get(image, image) if len(image) <= 64 else image
    return rows


def without_missing(row):
    """Remove the missing values of a table: None, an empty string, NaN and what pandas made of NaN, "nan" """
    return {k: v for k, v in row.items() if v is not None and v == v and v not in ("", "nan")}


def embedded(cell):
    """An image cell of a tsv: base64, or the text of a list of base64 -> bytes, or a tuple of bytes"""
    if cell.startswith("["):
        return tuple(map(embedded, literal(cell)))
    try:
        return base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError):
        raise BadSample("image is not base64", f"{cell[:40]!r}") from None


def parquet_records(file):
    try:
        import pyarrow.parquet as pq
    except ImportError:
        stop(f"{file}: reading parquet needs the package pyarrow (pip install pyarrow); or pandas converts it without "
             "its images: read_parquet(FILE).to_json('questions.jsonl', orient='records', lines=True)")
    try:
        return [without_missing(row) for row in pq.read_table(file).to_pylist()]
    except Exception as e:                                       # pyarrow raises many exception types on a broken file
        stop(f"{file} cannot be read as parquet: {type(e).__name__}: {e}".splitlines()[0])


def whole_object(file):
    """-> the object in a json file that holds one object; None if it is a list or jsonl, which Rows reads"""
    blob = Path(file).read_bytes()
    if blob.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
        return None
    try:
        whole = strict_json(blob.decode("utf-8-sig"), str(file))
    except ValueError:                                           # several objects: jsonl
        return None
    return None if {"question_id", "text", "question", "conversations"} & whole.keys() else whole


def object_records(file, whole, annotations=""):
    """Take the records out of one json object. annotations: VQAv2's second file"""
    if isinstance(whole.get("annotations"), list) and isinstance(whole.get("images"), list):     # COCO, NoCaps captions
        captions = {}
        for a in whole["annotations"]:
            captions.setdefault(a.get("image_id"), []).append(a.get("caption"))
        return [{"question_id": i["id"], "file_name": i["file_name"], "question": "", "answers": captions.get(i["id"])}
                for i in whole["images"]]
    if isinstance(rows := whole.get("questions", whole.get("data")), list):
        known = {}
        if annotations:
            known = {a["question_id"]: a for a in (whole_object(annotations) or {}).get("annotations", [])}
            if not known:
                stop(f"{annotations}: no VQAv2 annotations, an object with a list `annotations`")
        subtype = whole.get("data_subtype")                      # val2014: COCO_val2014_000000000042.jpg
        named = [{"image": f"COCO_{str(subtype).replace('test-dev', 'test')}_{row['image_id']:012d}.jpg"}
                 if subtype and isinstance(row.get("image_id"), int) else {} for row in rows]
        return [row | name | known.get(row.get("question_id"), {}) for row, name in zip(rows, named)
                if row.get("data_type") != "video"]
    if whole and all(isinstance(v, dict) and "question" in v for v in whole.values()):             # GQA, ScienceQA
        return [{"question_id": k} | v | ({"image": f"{k}/{v['image']}"} if v.get("image") and "choices" in v else {})
                for k, v in whole.items() if v.get("isBalanced", True) and v.get("split", "test") == "test"]
    stop(f"{file}: an object of unknown form; {NEEDS}")


# ---- what a record says ---------------------------------------------------------------------------------------------

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
        base["group"] = hashlib.sha256(key).hexdigest()[:16] if isinstance(key, bytes) else str(key)
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


def literal(s):
    """Read a Python list that stands in a cell as text -> list; a text that is no list -> [the text]"""
    try:
        found = ast.literal_eval(s) if s.lstrip().startswith("[") else s
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = s
    return [*map(str, found)] if isinstance(found, list) else [s]


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
        return [*Image.open(io.BytesIO(image), formats=FORMATS).size]
    except Exception:                                            # no bytes; Pillow raises many types on a broken image
        raise BadSample("a box needs the width and height of its image", "keys width and height") from None


# ---- images ---------------------------------------------------------------------------------------------------------

def question_image(record):
    """-> None, a name, bytes or a tuple of these. MMMU has image_1 ... image_7."""
    numbered = [record[k] for k in (f"image_{n}" for n in range(1, 10)) if record.get(k) is not None]
    key = next((k for k in PICTURE if record.get(k) not in (None, "")), None)
    found = numbered or (record[key] if key else None)
    if key in ("image_id", "imageId", "data_id") and not numbered:
        found = str(found) + ".jpg" * (key != "data_id")         # GQA, TextVQA; SEED-Bench's names have no suffix
    if "base64" in record:
        found = embedded(record["base64"])
    if isinstance(found, str) and found.startswith("["):         # VLMEvalKit's image_path
        found = literal(found)
    if not isinstance(found, list | tuple):
        return one_image(found)
    found = tuple(map(one_image, found))
    return found if len(found) > 1 else found[0] if found else None


def one_image(value):
    """A name, bytes, a data: URL, or the struct {bytes, path} of the hub's parquet files -> a name or bytes"""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value               # a struct without both is refused
    if isinstance(value, str) and value.startswith("data:"):
        return embedded(value.partition(",")[2])
    if value is not None and not isinstance(value, str | bytes):
        raise BadSample(NEEDS)
    return value


def place_images(text, image):
    """Put <image> markers where a text says <image 1>, <image 2> ... (MMMU) -> dict of text and image; the images are
    in the order of their markers. A second mention stays text. Images that are not mentioned come first."""
    sources = image if isinstance(image, tuple) else (image,)
    mentioned = []
    for n in map(int, re.findall(r"<image (\d)>", text)):
        if n not in mentioned and 1 <= n <= len(sources) and image is not None:
            mentioned.append(n)
            text = text.replace(f"<image {n}>", IMAGE, 1)
    if not mentioned:
        return {"text": text, "image": image}
    rest = [n for n in range(1, len(sources) + 1) if n not in mentioned]
    chosen = tuple(sources[n - 1] for n in rest + mentioned)
    return {"text": f"{IMAGE}\n" * len(rest) + text, "image": chosen if len(chosen) > 1 else chosen[0]}


# ---- more questions out of questions --------------------------------------------------------------------------------

def rotations(question):
    """MMBench's circular evaluation: ask a question once for each of its options, with the options moved by one letter
    each time -> list of questions. Their ids are VLMEvalKit's: 1,000,000 more each time."""
    out, letters = [], [*question["options"]]
    if "" in question["options"].values():
        stop(f"question {question['question_id']!r}: circular evaluation needs the texts of its options")
    lines = "\n".join(f"{c}. {o}" for c, o in question["options"].items())
    if lines not in question["text"]:
        stop(f"question {question['question_id']!r}: circular evaluation needs its options as lines, {lines[:40]!r}")
    for r in range(len(letters)):
        turned = {c: question["options"][letters[(k + r) % len(letters)]] for k, c in enumerate(letters)}
        text = question["text"].replace(lines, "\n".join(f"{c}. {o}" for c, o in turned.items()))
        answers = [letters[(letters.index(a) - r) % len(letters)] for a in question["answers"]]
        number = question["question_id"]
        number = number + r * 10**6 if isinstance(number, int) else f"{number}_{r}"
        out.append(question | dict(question_id=number, text=text, options=turned, answers=answers))
    return out


def choose_examples(question, pool, n):
    """Choose n questions of `pool` as examples for a question -> list; always the same for the same question. Neither
    the question itself is chosen, nor another question about its image, nor one of its group, nor two of one group."""
    def other(q):
        return q["text"] != question["text"] if question["image"] is None else q["image"] != question["image"]

    def group(q):
        return q.get("group", q["question_id"])
    rng, chosen, seen = random.Random(f"shots of {question['question_id']}"), [], {group(question)}
    for q in rng.sample(pool, min(len(pool), 1000)):
        if len(chosen) < n and other(q) and group(q) not in seen:
            chosen.append(q)
            seen.add(group(q))
    if len(chosen) < n:
        stop(f"shots={n}: too few examples about other images for question {question['question_id']!r}")
    return chosen


def example_answer(question):
    """-> the answer that an example shows: the most frequent of its true answers, the first of equal ones. A box that
    was computed from pixels has two decimals, as in LLaVA-1.5's data."""
    if not question["answers"]:
        stop(f"an example needs an answer; question {question['question_id']!r} has none")
    answer = Counter(question["answers"]).most_common(1)[0][0]
    return f"[{', '.join(f'{v:.2f}' for v in read_box(answer))}]" if question.get("size") else answer
