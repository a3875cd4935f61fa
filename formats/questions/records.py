"""Files of questions -> their records, as they are: dicts with the keys of the file."""

from pathlib import Path

from config import stop
from formats.configs import one_line
from formats.questions.tables import NEEDS, parquet_records, tsv_records
from formats.rows import Rows
from formats.strict_json import strict_json


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
