"""Files of questions -> their records, as they are: dicts with the keys of the file."""

from pathlib import Path

from config import stop
from formats.configs import one_line
from formats.questions.parquet import joined_records, parquet_records
from formats.questions.tables import NEEDS, tsv_records
from formats.rows import Rows
from formats.rows.tar import IMAGES
from formats.strict_json import strict_json


def question_records(file):
    """Read the records of a file, as they are -> a sequence of dicts"""
    first, _, second = str(file).partition(",")
    if Path(first).is_dir():
        return mme_records(Path(first))
    if first.endswith(".parquet"):
        return joined_records(first, second) if second else parquet_records(first)
    for name in (first, second)[: 1 + bool(second)]:
        if not Path(name).is_file() or Path(name).stat().st_size == 0:
            Rows(name)                                           # stops with one line
    if Path(first).suffix.lower() == ".tsv":
        return tsv_records(first)
    whole = whole_object(first)
    if whole is None:
        return Rows(first)
    with one_line(file):
        return object_records(first, whole, second)


def mme_records(folder):
    """MME's folder: CATEGORY/questions_answers_YN/NAME.txt and CATEGORY/images/NAME.jpg, or both kinds of files beside
    each other in CATEGORY. A line of a text is QUESTION, a tab, Yes or No."""
    records = []
    for category in sorted(p for p in folder.iterdir() if p.is_dir()):
        apart = (category / "images").is_dir()
        texts, images = (category / "questions_answers_YN", category / "images") if apart else (category, category)
        names = [p for p in images.iterdir() if p.suffix.lower() in IMAGES]
        for file in sorted(texts.glob("[!.]*.txt")):
            found = [p for p in names if p.stem == file.stem]
            if len(found) != 1:
                stop(f"{file}: {len(found)} images are named {file.stem} in {images}, expected 1")
            with one_line(file):
                text = file.read_text("utf-8-sig")
            for n, line in enumerate(text.split("\n"), 1):
                question, tab, answer = line.strip().partition("\t")
                if tab and answer.strip().lower() in ("yes", "no"):
                    records.append({"question_id": f"{category.name}/{found[0].name}", "category": category.name,
                                    "question": question, "answer": answer, "image": str(found[0].relative_to(folder))})
                elif line.strip():
                    stop(f"{file}, line {n}: expected QUESTION, a tab, Yes or No, and not {line!r:.80}")
    return records or stop(f"{folder} is a folder, but not MME's: it has no CATEGORY/questions_answers_YN/*.txt and no "
                           "CATEGORY/*.txt beside images")


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
