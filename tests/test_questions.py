"""Files of questions in each published form, written by hand, small and awkward; answers that exist; examples."""

import base64
import gc
import io
import json
import random
import tracemalloc

import pytest
import torch
from conftest import make_tokenizer, tiny_config, tiny_vlm
from PIL import Image
from test_eval import always, run, write

import data
import eval
from config import BadSample, Error
from formats import llava, tokenizer
from formats.answers import answered_questions, plain_row, read_answers
from formats.questions import choose_examples, example_answer, image_bytes, read_questions
from formats.questions.variants import rotations
from formats.rows.parquet import group, opened
from generate import Chat
from metrics.yes_no import mme_totals
from model import VLMConfig
from parts.build import build
from parts.cross_attention import FlamingoConfig

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."


def picture(colour, side=8):
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "png")
    return file.getvalue()


RED, BLUE, GREEN = picture("red"), picture("blue", 9), picture((0, 99, 0), 10)


def read(tmp_path, rows, task, name="q.json"):
    (tmp_path / name).write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return read_questions(str(tmp_path / name), task)


# ---- json -----------------------------------------------------------------------------------------------------------

def test_llava_jsonl_is_asked_as_it_is(tmp_path):
    """LLaVA's question files end in the instruction already; POPE's own ones have none, and get none."""
    write(tmp_path / "q.jsonl", [
        {"question_id": 7, "image": "a.jpg", "text": f"Is it?\n{SHORT}", "category": "adversarial", "label": "no"},
        {"question_id": "8", "image": "", "text": "Is it so?", "label": "YES. "}])
    first, second = read_questions(tmp_path / "q.jsonl", "pope")
    assert first == dict(question_id=7, image="a.jpg", text=f"Is it?\n{SHORT}", type="adversarial", answers=["no"])
    assert second == dict(question_id="8", image=None, text="Is it so?", type="all", answers=["yes"])


def test_letters_of_llava_come_from_the_text(tmp_path):
    """llava-seed-bench.jsonl: the options are lines of the text"""
    row, = read(tmp_path, [{"question_id": "v1", "image": "a.jpg", "category": "image", "answer": "B",
                            "text": f"What?\nA. A cat\nB. A dog. Or two\nC. 3\n{LETTER}"}], "seed")
    assert row["options"] == {"A": "A cat", "B": "A dog. Or two", "C": "3"} and row["answers"] == ["B"]
    row, = read(tmp_path, [{"question_id": 1, "text": "Options: A: x, B: y", "answer": "E"}], "mmstar")
    assert row["options"] == dict.fromkeys("ABCDE", "")          # nowhere said: A to D, and up to the true one


def test_vqa_joins_two_files(tmp_path):
    questions = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "license": {},
                 "questions": [{"image_id": 42, "question": "What?", "question_id": 42000},
                               {"image_id": 262148, "question": "Where?", "question_id": 262148001}]}
    answers = {"annotations": [{"question_id": q, "image_id": i, "question_type": "what is", "answer_type": "other",
                                "multiple_choice_answer": "sky", "answers": [
                                    {"answer": a, "answer_confidence": "yes", "answer_id": 1} for a in "abc"]}
                               for q, i in ((262148001, 262148), (42000, 42))]}
    (tmp_path / "q.json").write_text(json.dumps(questions, indent=1))
    (tmp_path / "a.json").write_text(json.dumps(answers))
    first, second = read_questions(f"{tmp_path}/q.json,{tmp_path}/a.json", "vqav2")
    assert first == dict(question_id=42000, image="COCO_val2014_000000000042.jpg", text=f"What?\n{SHORT}", type="other",
                         answers=["a", "b", "c"])
    assert second["image"] == "COCO_val2014_000000262148.jpg"
    questions["data_subtype"] = "test-dev2015"                  # whose images are those of test2015; no annotations
    first, second = read(tmp_path, questions, "vqav2")
    assert first["image"] == "COCO_test2015_000000000042.jpg" and first["answers"] == second["answers"] == []
    with pytest.raises(Error, match="no VQAv2 annotations"):
        read_questions(f"{tmp_path}/q.json,{tmp_path}/q.json", "vqav2")


def test_textvqa_docvqa_and_vizwiz_are_read(tmp_path):
    row, = read(tmp_path, {"dataset_type": "val", "data": [
        {"question": "what?", "image_id": "0a4", "image_width": 9, "question_id": 34602, "answers": ["a"] * 9 + ["b"],
         "set_name": "val", "image_classes": ["Car"]}]}, "textvqa")
    assert (row["image"], row["text"], len(row["answers"])) == ("0a4.jpg", f"what?\n{SHORT}", 10)
    row, = read(tmp_path, {"dataset_name": "docvqa", "data": [
        {"questionId": 49153, "question": "Date?", "image": "documents/x_1.png", "docId": 5, "answers": ["8.8", "8/8"],
         "data_split": "val"}]}, "docvqa")
    assert (row["question_id"], row["image"], row["answers"]) == (49153, "documents/x_1.png", ["8.8", "8/8"])
    file = {"data": [{"questionId": 1, "question": "?", "image_local_name": "7.jpeg", "answers": ["x"]}]}
    row, = read(tmp_path, file, "infovqa")
    assert row["image"] == "7.jpeg"
    row, = read(tmp_path, [{"image": "VizWiz_val_0.jpg", "question": "What?", "answers": [
        {"answer": "unanswerable", "answer_confidence": "yes"}], "answer_type": "unanswerable"}], "vizwiz")
    assert row["text"].endswith(f"respond with 'Unanswerable'.\n{SHORT}") and row["question_id"] == 0
    assert row["type"] == "unanswerable" and row["answers"] == ["unanswerable"]


def test_gqa_keeps_balanced_questions(tmp_path):
    file = {"05515938": {"semantic": [], "question": "Is it?", "imageId": "n1", "isBalanced": True, "answer": "yes"},
            "2": {"question": "Is it not?", "imageId": "n2", "isBalanced": False, "answer": "no"}}
    row, = read(tmp_path, file, "gqa")
    assert row == dict(question_id="05515938", image="n1.jpg", text=f"Is it?\n{SHORT}", type="all", answers=["yes"])


def test_scienceqa_is_read_in_both_forms(tmp_path):
    problem = {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "hint": "Look.", "image": "image.png",
               "subject": "natural science", "split": "test"}
    rows = read(tmp_path, {"5": problem, "6": problem | {"split": "train"}, "7": problem | {"image": None, "hint": ""}},
                "scienceqa")
    assert [r["question_id"] for r in rows] == ["5", "7"] and [r["image"] for r in rows] == ["5/image.png", None]
    assert rows[0]["text"] == f"Context: Look.\nWhich?\nA. cat\nB. dog\n{LETTER}" and rows[0]["answers"] == ["B"]
    assert rows[1]["text"] == f"Which?\nA. cat\nB. dog\n{LETTER}" and rows[1]["type"] == "natural science"
    row, = read(tmp_path, [{"id": "5", "image": "5/image.png", "conversations": [
        {"from": "human", "value": "Which?\nContext: Look.\nA. cat\nB. dog\n<image>"},
        {"from": "gpt", "value": "The answer is B."}]}], "scienceqa")
    assert row["text"] == f"Which?\nContext: Look.\nA. cat\nB. dog\n{LETTER}"
    assert row["options"] == {"A": "cat", "B": "dog"} and row["answers"] == ["B"]


def test_seed_leaves_videos_out(tmp_path):
    question = {"answer": "B", "choice_a": "x", "choice_b": "y", "choice_c": "z", "choice_d": "w", "data_id": "145_2",
                "data_type": "image", "question": "What?", "question_id": "101669", "question_type_id": 1}
    file = {"question_type": {"Scene": 1}, "questions": [question, question | {"data_type": "video"}]}
    row, = read(tmp_path, file, "seed")
    assert (row["image"], row["type"], row["text"]) == ("145_2", "1", f"What?\nA. x\nB. y\nC. z\nD. w\n{LETTER}")


def test_charts_and_signs_are_read(tmp_path):
    row, = read(tmp_path, [{"imgname": "4.png", "query": "How many?", "label": "14"}], "chartqa")
    assert row["image"] == "4.png" and row["answers"] == ["14"]
    assert row["text"] == "How many?\nAnswer the question with a single word."
    row, = read(tmp_path, [{"dataset_name": "HME100k", "type": "Formula", "question": "Write it.",
                            "image_path": "a/4.jpg", "answers": ["\\frac"], "id": 3}], "ocrbench")
    assert (row["dataset"], row["type"], row["text"], row["image"]) == ("HME100k", "Formula", "Write it.", "a/4.jpg")


def test_captions_gather_their_references(tmp_path):
    file = {"images": [{"id": 9, "file_name": "9.jpg"}, {"id": 4, "file_name": "4.jpg"}], "annotations": [
        {"image_id": i, "id": n, "caption": c} for n, (i, c) in enumerate([(4, "a"), (9, "b"), (4, "c")])]}
    nine, four = read(tmp_path, file, "coco")
    assert four == dict(question_id=4, image="4.jpg", type="all", answers=["a", "c"],
                        text="Provide a one-sentence caption for the provided image.")
    assert nine["answers"] == ["b"]


def test_boxes_in_pixels_become_shares(tmp_path):
    """Qwen-VL's and Shikra's files have corners; a ready text keeps its own box."""
    row, = read(tmp_path, [{"image": "a.jpg", "sent": "left cat", "bbox": [10, 20, 30, 40], "height": 80, "width": 40}],
                "refcoco")
    assert json.loads(row["answers"][0]) == [0.25, 0.25, 0.75, 0.5] and row["size"] == [40, 80]
    assert row["text"].endswith("describes: left cat")
    shikra = {"img_path": "b.jpg", "expression": "it", "bbox": [0, 0, 40, 80], "height": 80, "width": 40}
    row, = read(tmp_path, [shikra], "refcoco_padded")
    assert json.loads(row["answers"][0]) == [0, 0, 1, 1] and row["image"] == "b.jpg"
    row, = read(tmp_path, [{"question_id": 1, "text": "Where?", "answer": "<box>(1,2),(3,4)</box>"}], "refcoco")
    assert row["answers"] == ["<box>(1,2),(3,4)</box>"]
    for bad, reason in ((dict(text="Where?", answer="left"), "the answer 'left' is not a box"),
                        (dict(sent="it", bbox=[0, 0, 1, 1]), "needs the width and height")):
        with pytest.raises(Error, match=reason):
            read(tmp_path, [{"question_id": 1} | bad], "refcoco")


@pytest.mark.parametrize("change", [{"bbox": [1, 2, 3]}, {"bbox": "x"}, {"width": 0}, {"bbox": [1, 2, "a", 4]}])
def test_a_box_that_is_none_is_one_line(tmp_path, change):
    good = {"image": "a.jpg", "width": 64, "height": 64, "sent": "man", "bbox": [1, 2, 33, 40]}
    assert read(tmp_path, [good, good], "refcoco")[1]["question_id"] == 1
    with pytest.raises(Error, match="question 1 .* cannot be read"):
        read(tmp_path, [good, good | change], "refcoco")


def test_several_images_stand_where_they_are_mentioned(tmp_path):
    row, = read(tmp_path, [{"id": "validation_Art_Theory_12", "question": "Is <image 2> after <image 1>? <image 2>!",
                            "options": "['yes, <image 3>', \"no\"]", "answer": "B", "image_1": "a.png",
                            "image_2": "b.png", "image_3": "c.png", "image_4": None}],
                "mmmu")
    assert row["text"] == f"Is <image> after <image>? <image 2>!\n(A) yes, <image>\n(B) no\n\n{LETTER}"
    assert row["image"] == ("b.png", "a.png", "c.png") and row["type"] == "Art_Theory"
    assert row["options"] == {"A": "yes, <image 3>", "B": "no"}
    row, = read(tmp_path, [{"question_id": 1, "image": ["a", "b"], "text": "Compare <image 2> with the other.",
                            "answer": "c"}], "exact")
    assert row["text"] == "<image>\nCompare <image> with the other." and row["image"] == ("a", "b")
    row, = read(tmp_path, [{"id": "validation_Math_3", "question": "x? <image 1>", "options": "[]", "image_1": "a",
                            "answer": "['0.5', '1/2']", "question_type": "open"}], "mmmu")
    assert row["answers"] == ["0.5", "1/2"] and row["options"] == {} and row["text"] == f"x? <image>\n{SHORT}"
    row, = read(tmp_path, [{"id": "test_Math_3", "question": "x?", "options": "['a']", "answer": "?"}], "mmmu")
    assert row["answers"] == []


# ---- tables ---------------------------------------------------------------------------------------------------------

def tsv(*rows):
    def cell(c):
        return '"' + str(c).replace('"', '""') + '"' if set(str(c)) & set('"\t\n') else str(c)
    return "".join("\t".join(map(cell, row)) + "\n" for row in rows)


def test_vlmevalkit_tables_hold_their_images(tmp_path):
    """Quotes, line breaks and tabs in cells; an image that is another row's; missing options, hints that are nan"""
    red, blue = (base64.b64encode(image).decode() for image in (RED, BLUE))
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]
    file = tsv(head, [3, 'Which "one"?\nOr\tboth', "nan", "x", "y", "", "", "B", "kind", red, "two"],
               [1000003, 'Which "one"?\nOr\tboth', "", "y", "x", "", "", "A", "kind", "3", "two"],
               [8, "Q?", "Look", "1.0", "None", "", "c", "D", "kind", f"['{blue}', '{red}']", "two"],
               [1000008, "Q?", "Look", "None", "c", "", "1.0", "B", "kind", "8", "two"])
    rows = read(tmp_path, file, "mmbench", "q.tsv")
    assert [r["group"] for r in rows] == [3, 3, 8, 8] and [r["question_id"] for r in rows] == [3, 1000003, 8, 1000008]
    assert rows[0]["image"] == rows[1]["image"] == RED and rows[2]["image"] == rows[3]["image"] == (BLUE, RED)
    assert rows[0]["text"] == f'Which "one"?\nOr\tboth\nA. x\nB. y\n{LETTER}' and rows[0]["type"] == "kind"
    assert rows[2]["options"] == {"A": "1.0", "B": "None", "D": "c"}
    assert rows[2]["text"].startswith("Look\nQ?\nA. 1.0\nB. None\nD. c\n")
    file = tsv(["index", "question", "answer", "image"], [0, "Date?", "['8.8', '8/8']", red])
    rows = read(tmp_path, file, "docvqa", "q.tsv")
    assert rows[0]["answers"] == ["8.8", "8/8"]


@pytest.mark.parametrize("text, complaint", [
    (tsv(["index", "name"], [1, 2]), "no tsv table with a column question"), ("", "is empty"),
    (tsv(["index", "question", "image", "answer"], [1, "q", "!!" * 40, "A"]), "question 0 .*: image is not base64"),
    (tsv(["index", "question", "answer"], [1, "q", "A"]) + "2\tq\n", "question 1 .*: not as many cells"),
    (tsv(["index", "question", "A", "B", "answer"], [1, "q", "x", "y", "C"]), "'C' is not the letter of an option"),
    ('index\tquestion\n1\t"open', "cannot be read as a tsv table")])
def test_a_bad_table_ends_in_one_clear_line(tmp_path, text, complaint):
    with pytest.raises(Error, match=complaint) as stopped:
        read(tmp_path, text, "mmbench", "q.tsv")
    assert "\n" not in str(stopped.value)


def test_mme_pairs_the_questions_of_an_image(tmp_path):
    """LLaVA's ids repeat and name the image; VLMEvalKit's do not: there, the image says it."""
    same = [{"question_id": "OCR/1.png", "image": f"{n}.png", "text": "Is it?", "answer": a, "category": "OCR"}
            for n, a in enumerate(("Yes", "No"))]
    assert [r["group"] for r in read(tmp_path, same, "mme")] == ["OCR/1.png"] * 2
    red, blue = (base64.b64encode(image).decode() for image in (RED, BLUE))
    rows = read(tmp_path, tsv(["index", "question", "answer", "category", "image"],
                              *[[n, "Is it? Please answer yes or no.", a, "OCR", image] for n, (a, image) in enumerate(
                                  [("Yes", red), ("Yes", blue), ("No", red)])]), "mme", "q.tsv")
    assert rows[0]["group"] == rows[2]["group"] != rows[1]["group"] and rows[0]["text"] == f"Is it?\n{SHORT}"
    json.dumps([plain_row(r) for r in rows])


@pytest.fixture
def mme_folder(tmp_path):
    """MME as published: one category with folders of its own, one without; a blank line, a period, a file of macOS"""
    for category, texts, images in (("count", "questions_answers_YN", "images"), ("OCR", "", "")):
        for name, colour in (("0001", RED), ("0002", BLUE)):
            text, image = tmp_path / category / texts / f"{name}.txt", tmp_path / category / images / f"{name}.jpg"
            for file in (text, image):
                file.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(colour)
            text.write_text("Is it? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n\n")
            (text.parent / f"._{name}.txt").write_bytes(b"\xff")
    (tmp_path / "readme.txt").write_text("MME")
    return tmp_path


def test_mme_is_read_from_its_folder(mme_folder):
    rows = read_questions(str(mme_folder), "mme")
    assert [r["question_id"] for r in rows[::2]] == ["OCR/0001.jpg", "OCR/0002.jpg", "count/0001.jpg", "count/0002.jpg"]
    assert rows[0] == dict(question_id="OCR/0001.jpg", type="OCR", image="OCR/0001.jpg", answers=["yes"],
                           group="OCR/0001.jpg", text=f"Is it?\n{SHORT}")
    assert rows[5]["image"] == "count/images/0001.jpg" and rows[5]["answers"] == ["no"] and len(rows) == 8
    assert mme_totals(["yes"], rows, [1.0] * 8)["subtasks"] == {"OCR": 200, "count": 200}
    assert eval.images_of(str(mme_folder)) == str(mme_folder) and eval.images_of("a/q.json,b/a.json") == "a"


@pytest.mark.parametrize("file, text, complaint", [
    ("OCR/0001.txt", "Is it?\tYes\nIs it? No", "OCR/0001.txt, line 2: expected QUESTION, a tab, .* not 'Is it[?] No'"),
    ("OCR/0001.txt", "Is it?\tMaybe", "line 1: expected QUESTION, a tab, Yes or No, and not 'Is it"),
    ("OCR/0001.txt", "a\tb\tYes", "line 1: expected QUESTION"), ("OCR/0001.txt", b"\xff", "0001.txt cannot be read: U"),
    ("OCR/0003.txt", "Is it?\tYes", "OCR/0003.txt: 0 images are named 0003"),
    ("OCR/0001.png", "", "OCR/0001.txt: 2 images are named 0001")])
def test_a_bad_file_of_mme_is_named(mme_folder, file, text, complaint):
    (mme_folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Error, match=complaint) as stopped:
        read_questions(str(mme_folder), "mme")
    assert "\n" not in str(stopped.value)


def test_a_folder_without_mme_is_refused(tmp_path):
    (tmp_path / "sub").mkdir()
    with pytest.raises(Error, match="is a folder, but not MME's"):
        read_questions(str(tmp_path), "mme")


def test_parquet_of_lmms_lab_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in requirements-test.txt")
    import pyarrow.parquet as pq

    def table(name, rows):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        return str(tmp_path / name)

    def seen(row):
        image = row["image"]
        return tuple(map(image_bytes, image)) if isinstance(image, tuple) else image_bytes(image)
    mmmu = [{"id": "validation_Math_1", "question": "<image 1> or <image 2>?", "options": "['a', 'b']", "answer": "A",
             "image_1": {"bytes": RED, "path": None}, "image_2": {"bytes": BLUE, "path": None}, "image_3": None,
             "question_type": "multiple-choice"}]
    row, = read_questions(table("mmmu.parquet", mmmu), "mmmu")
    assert seen(row) == (RED, BLUE) and row["type"] == "Math"
    assert row["text"].startswith("<image> or <image>?\n(A) a")
    star = [{"index": 0, "question": "What? Options: A: x, B: y", "image": {"bytes": RED, "path": "0.png"},
             "answer": "A", "category": "math", "l2_category": "geometry", "meta_info": {"source": "x"}}]
    row, = read_questions(table("star.parquet", star), "mmstar")
    assert row["text"] == f"What? Options: A: x, B: y\n{LETTER}" and row["type"] == "geometry" and seen(row) == RED
    bench = [{"index": 1, "question": "Q?", "hint": "nan", "answer": "A", "A": "x", "B": "y", "C": "nan", "D": "nan",
              "category": "c", "image": {"bytes": RED, "path": None}, "L2-category": "d"}]
    rows = read_questions(table("bench.parquet", bench), "mmbench")
    assert [(r["question_id"], r["answers"]) for r in rows] == [(1, ["A"]), (1000001, ["B"])]
    ai2d = [{"question": "Q?", "options": ["x", "y", "z"], "answer": "2", "image": {"bytes": RED, "path": None}}]
    row, = read_questions(table("ai2d.parquet", ai2d), "ai2d")
    assert row["answers"] == ["C"] and row["question_id"] == 0
    region = [{"question_id": "5", "image": {"bytes": BLUE, "path": None}, "question": "Please",
               "answer": ["cat", "pet"], "bbox": [0.0, 3.0, 9.0, 3.0], "file_name": "x.jpg"}]
    first, second = read_questions(table("ref.parquet", region), "refcoco")
    assert json.loads(first["answers"][0]) == pytest.approx([0, 1 / 3, 1, 2 / 3]) and second["question_id"] == "5_1"
    assert first["text"].endswith(": cat") and second["text"].endswith(": pet") and first["size"] == [9, 9]
    (tmp_path / "bad.parquet").write_text("PAR1")
    with pytest.raises(Error, match="cannot be read as parquet"):
        read_questions(str(tmp_path / "bad.parquet"), "mmmu")


@pytest.fixture
def gqa_tables(tmp_path):
    """GQA as lmms-lab publishes it: questions and images apart; groups of two rows"""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in requirements-test.txt")
    import pyarrow.parquet as pq

    def write_tables(questions, images):
        for name, rows in (("q", questions), ("i", images)):
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet", row_group_size=2)
        return f"{tmp_path}/q.parquet,{tmp_path}/i.parquet"
    questions = [{"id": f"20{n}", "imageId": f"n{n % 3}", "question": "Is it?", "answer": "yes", "isBalanced": n != 3,
                  "fullAnswer": "Yes, it is.", "types": {"structural": "verify"}} for n in range(5)]
    images = [{"id": f"n{n}", "image": {"bytes": image, "path": None}} for n, image in enumerate((RED, BLUE, GREEN))]
    return write_tables, questions, images


def test_gqa_joins_questions_and_images(gqa_tables):
    write_tables, questions, images = gqa_tables
    rows = read_questions(write_tables(questions, images), "gqa")
    assert [(r["question_id"], image_bytes(r["image"])) for r in rows] == [
        ("200", RED), ("201", BLUE), ("202", GREEN), ("204", BLUE)]
    assert rows[1]["image"] == rows[3]["image"] != rows[0]["image"] and rows[0]["text"] == f"Is it?\n{SHORT}"
    assert [image_bytes(image) for image in eval.other_images(rows)] == [BLUE, GREEN, RED, GREEN]
    assert [q["question_id"] for q in choose_examples(rows[1], rows, 2)] in (["200", "202"], ["202", "200"])
    assert b"PNG" not in repr(rows).encode(), "no question holds the bytes of an image"


@pytest.mark.parametrize("place, change, complaint", [
    (0, {"imageId": "n9"}, r"q.parquet, row 0 .*i.parquet has no image with the id 'n9'"),
    (1, {"id": "n0"}, r"i.parquet, row 1 .*: it needs `image`, and an `id` that no other row has"),
    (1, {"image": None}, r"i.parquet, row 1 .*: it needs `image`")])
def test_tables_that_do_not_join_are_refused(gqa_tables, place, change, complaint):
    write_tables, questions, images = gqa_tables
    (images if place else questions)[place] |= change
    with pytest.raises(Error, match=complaint) as stopped:
        read_questions(write_tables(questions, images), "gqa")
    assert "\n" not in str(stopped.value)


def test_two_row_groups_are_held_at_most(gqa_tables, tmp_path):
    """Questions of many row groups, in a pattern of files; a changed table is refused."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    noise = [bytes(random.Random(n).randbytes(500_000)) for n in range(24)]
    for k in (0, 1):
        rows = [{"question": "Is it?", "answer": "yes", "image": {"bytes": b}} for b in noise[k * 12 :][:12]]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"test-{k}.parquet", row_group_size=2)
    del rows
    gc.collect()
    group.cache_clear()
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    questions = read_questions(f"{tmp_path}/test-*.parquet", "exact")
    assert tracemalloc.get_traced_memory()[1] < 2e6 and pa.total_allocated_bytes() - before < 2.5e6
    tracemalloc.stop()
    assert [image_bytes(q["image"]) for q in questions] == noise and questions[12]["question_id"] == 12
    group.cache_clear()
    for image, problem in (([{"bytes": b"x"}], "changed"), ([{"bytes": None}], "changed"), ([], "IndexError|Value")):
        pq.write_table(pa.table({"image": image}), tmp_path / "test-1.parquet")
        opened.cache_clear()
        group.cache_clear()
        with pytest.raises(BadSample, match=f"cannot be read from its table: .*test-1.parquet.*({problem})"):
            image_bytes(questions[12]["image"])
    with pytest.raises(Error, match="no file is named like"):
        read_questions(f"{tmp_path}/dev-*.parquet", "exact")


def test_parquet_without_pyarrow_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "q.parquet").write_text("PAR1")
    with pytest.raises(Error, match="needs the package pyarrow"):
        read_questions(str(tmp_path / "q.parquet"), "mmmu")


@pytest.mark.parametrize("rows, complaint", [
    ({"a": 1}, "an object of unknown form"), ([{"question": ["x"]}], "question 0 [^:]*: it needs"),
    ([{"question_id": 1, "text": "a", "answer": "b"}, {"question_id": 2, "text": "a"}], "question 2 and 0 more have"),
    ([{"question_id": 1, "text": "a", "answer": "b", "image": "data:image/png;base64,%%"}], "image is not base64"),
    ([{"question_id": 1, "text": "a", "answer": "b", "image": {"url": "x"}}], "question 0 [^:]*: it needs"),
    ([{"id": 1, "conversations": []}], "question 0 .* cannot be read: ValueError"),
    ([{"id": 1, "conversations": [{"from": "human"}, {"from": "gpt"}]}], "question 0 .* cannot be read: KeyError"),
    ({"images": [{"id": 1}], "annotations": []}, "cannot be read: KeyError: 'file_name'"),
    ({"data": [5]}, "cannot be read: AttributeError")])
def test_a_file_of_unknown_form_is_refused(tmp_path, rows, complaint):
    with pytest.raises(Error, match=complaint) as stopped:
        read(tmp_path, rows, "exact")
    assert "\n" not in str(stopped.value)


def test_rotations_move_options_and_answer(tmp_path):
    one, = read(tmp_path, [{"question_id": 5, "text": f"Q?\nA. x\nB. y\nC. z\n{LETTER}", "answer": "A"}], "mmstar")
    turned = rotations(one | {"group": 5})
    assert [q["question_id"] for q in turned] == [5, 1000005, 2000005] and turned[0]["text"] == one["text"]
    assert turned[1]["text"] == f"Q?\nA. y\nB. z\nC. x\n{LETTER}" and turned[1]["answers"] == ["C"]
    for q in turned:
        assert q["options"][q["answers"][0]] == "x" and q["group"] == 5
    with pytest.raises(Error, match="needs the texts of its options"):
        read(tmp_path, [{"question_id": 5, "text": "Q?", "answer": "A"}], "mmbench")
    with pytest.raises(Error, match="needs its options as lines, 'A. x"):
        read(tmp_path, [{"question_id": 5, "text": "Q?\n(A) x\n(B) y", "answer": "A"}], "mmbench")


# ---- asking ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    tok, model = tokenizer.Tokenizer(make_tokenizer(root / "tok")), tiny_vlm()
    pre = {"crop_size": {"height": 8, "width": 8}, "size": {"shortest_edge": 8}, "image_mean": [0.5] * 3}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32}
    folder = llava.Folder(tok, vision, {"model_type": "llama"}, pre, {}, {})
    llava.save_model(root / "model", model.state_dict(), model.cfg, folder, "vicuna_v1", None, "pad", torch.float64, "")
    return root


@pytest.fixture
def world(tmp_path):
    for i in range(4):
        Image.new("RGB", (9 + i, 12), (50 * i, 255 - 40 * i, 90)).save(tmp_path / f"{i}.png")
    write(tmp_path / "q.jsonl", [{"question_id": i, "image": f"{i % 4}.png", "text": f"Is it {i}?", "answer": "yes",
                                  "type": "ab"[i % 2]} for i in range(8)])
    return tmp_path


def test_images_in_the_file_are_seen(model_folder, world, capsys, monkeypatch):
    """The same pixels as from a file; several images; shuffled ones are other images, as many as before."""
    images = [base64.b64encode((world / f"{i}.png").read_bytes()).decode() for i in range(3)]
    (world / "q.tsv").write_text(tsv(["index", "question", "A", "B", "answer", "image"],
                                     [1, "Q?", "x", "y", "A", images[0]],
                                     [2, "Is <image 1> like <image 2>?", "x", "y", "B", str(images[1:])]))
    seen, look = [], Chat.look
    monkeypatch.setattr(Chat, "look", lambda self, sources: (seen.append(look(self, sources)), seen[-1])[1])
    monkeypatch.setattr(Chat, "answers", always("A"))
    result, rows = run(model_folder, world, capsys, task="mmstar", data=str(world / "q.tsv"))
    assert result["accuracy"] == 0.5 and rows[1]["image"] == ["(bytes in the data file)"] * 2
    pixels = [look(Chat(model_folder, "cpu"), [str(world / f"{i}.png")])[0][0] for i in range(3)]
    assert [len(tiles) for tiles, _ in seen] == [1, 2]
    assert all(a.equal(b) for a, b in zip(seen[0][0] + seen[1][0], pixels))
    seen.clear()
    run(model_folder, world, capsys, task="mmstar", data=str(world / "q.tsv"), shuffled=True)
    assert [len(tiles) for tiles, _ in seen] == [1, 2]
    assert not any(a.equal(b) for a, b in zip(seen[0][0] + seen[1][0], pixels))


@pytest.mark.parametrize("n, template", [
    (2, "vicuna_v1"), (4, "vicuna_v1"), (2, "chatml"), (2, "mistral"), (4, "flamingo"), (2, "paligemma"), (2, "blip"),
    (2, "visualchat")])
def test_examples_are_turns_as_in_training(model_folder, world, capsys, monkeypatch, n, template):
    """The ids of a few-shot prompt begin a training conversation with the same turns and images, bit for bit."""
    prompts, pixels = [], []

    def answers(self, some, shown, *rest):
        prompts.extend(some)
        pixels.extend(shown)
        return ["yes"] * len(some)
    monkeypatch.setattr(Chat, "answers", answers)
    write(world / "shots.jsonl", [{"question_id": f"s{i}", "image": f"{i % 4}.png", "text": f"Shot {i}?", "answers":
                                   ["no", f"answer {i}", f"answer {i}"]} for i in range(12)])
    result, _ = run(model_folder, world, capsys, shots=n, shots_data=str(world / "shots.jsonl"), template=template)
    assert result["shots"] == n and len(prompts) == 8 and len(pixels) == 8 * (n + 1)
    chat = Chat(model_folder, "cpu", template=template)
    encode = data.Encoder(chat.tok, chat.template, chat.layout, 9999, chat.system)
    pool, questions = (read_questions(world / f, "exact") for f in ("shots.jsonl", "q.jsonl"))
    for i, question in enumerate(questions):
        chosen = choose_examples(question, pool, n)
        assert all(q["image"] != question["image"] for q in chosen) and len({q["question_id"] for q in chosen}) == n
        turns = [(q["text"], f"answer {q['question_id'][1:]}") for q in chosen] + [(question["text"], "yes")]
        messages = [{"from": who, "value": text} for user, answer in turns
                    for who, text in (("human", f"<image>\n{user}"), ("gpt", answer))]
        row = {"image": [q["image"] for q in chosen + [question]], "conversations": messages}
        ids, labels, names, _ = encode(row, world)
        prompt = prompts[i].tolist()
        assert ids[: len(prompt)] == prompt and names == row["image"]
        assert {*labels[: len(prompt)]} != {data.IGNORE} and chat.tok.decode(ids[len(prompt):]).strip() == "yes"
        assert all(a.equal(chat.look([str(world / name)])[0][0])
                   for a, name in zip(pixels[i * (n + 1) : (i + 1) * (n + 1)], names))


def test_examples_beyond_the_positions_are_not_asked(model_folder, world, capsys, monkeypatch):
    """The model was trained for so many positions: beyond them, its answers would mean nothing."""
    longest = max(len(p) for p in (Chat(model_folder, "cpu").prompt([(f"<image>\n{q['text']}", None)], [[3] * 4])
                                   for q in read_questions(world / "q.jsonl", "exact")))
    monkeypatch.setattr(eval, "positions", lambda text: longest + 5)
    assert run(model_folder, world, capsys, max_new_tokens=5)[0]["unreadable"] == 0
    for more in (dict(max_new_tokens=6), dict(max_new_tokens=5, shots=2)):
        with pytest.raises(Error, match="none of the 8 questions could be asked"):
            run(model_folder, world, capsys, **more)
    assert "longer than the model's positions" in capsys.readouterr().err


def test_flamingo_answers_after_examples(model_folder, world):
    """Each image is one marker token, and every text has its own image before it: the last one for its tokens."""
    tok, spec = tokenizer.Tokenizer(model_folder / "model"), {"size": {"shortest_edge": 8}, "crop_size": 8}
    text = FlamingoConfig(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                          num_attention_heads=4, num_key_value_heads=2, cross_width=32, cross_every=1)
    torch.manual_seed(0)
    cfg = VLMConfig(tiny_config().vision, text, "perceiver", tokens=1, image_token_index=3,
                    connector_args=dict(latents=3, depth=1, heads=2, head_dim=6))
    model = build(cfg).double()
    chat = Chat.of(model, llava.Folder(tok, {}, {}, spec, {}, {}), "flamingo", "", "squash")
    questions = read_questions(world / "q.jsonl", "exact")
    asked, answers = [], chat.answers
    chat.answers = lambda prompts, *rest: (asked.extend(prompts), answers(prompts, *rest))[1]

    def examples(row):
        chosen = choose_examples(row, questions, 4)
        return [(q["text"], example_answer(q), eval.image_sources(q["image"], world)) for q in chosen]
    given = eval.ask(chat, questions[:2], [q["image"] for q in questions[:2]], world, 3, examples)
    assert len(given) == 2 and None not in given and [int((p == 3).sum()) for p in asked] == [5, 5]


def test_examples_never_show_the_question(world):
    questions = read_questions(world / "q.jsonl", "exact")
    for question in questions:
        assert choose_examples(question, questions, 0) == []
        chosen = choose_examples(question, questions, 4)
        assert chosen == choose_examples(question, questions, 4) and question not in chosen
        assert question["image"] not in [q["image"] for q in chosen]
    assert len({str(choose_examples(q, questions, 2)) for q in questions}) > 4
    turned = [{"question_id": n + r * 10**6, "group": n, "image": None, "text": f"{n} {r}"} for r in range(9)
              for n in range(4)]                                 # options in another order make another text
    assert all(sorted(q["group"] for q in choose_examples(one, turned, 3)) == [n for n in range(4) if n != one["group"]]
               for one in turned)
    with pytest.raises(Error, match="shots=7: too few examples"):
        choose_examples(questions[0], questions, 7)
    with pytest.raises(Error, match="an example needs an answer"):
        example_answer(questions[0] | {"answers": []})
    assert example_answer({"answers": ["b", "a", "c", "a"]}) == "a"
    assert example_answer({"answers": ["[0.015625, 0.5, 0.75, 1.0]"], "size": [64, 64]}) == "[0.02, 0.50, 0.75, 1.00]"


def test_questions_without_answers_are_only_answered(model_folder, world, capsys, monkeypatch):
    monkeypatch.setattr(Chat, "answers", always("yes"))
    write(world / "q.jsonl", [{"question_id": i, "image": "0.png", "text": "Is it?"} for i in range(3)])
    result, rows = run(model_folder, world, capsys, task="vqav2")
    assert result["accuracy"] is None and result["n"] == 3 and result["unreadable"] == 0
    assert [(r["text"], r["score"], r["answers"]) for r in rows] == [("yes", None, [])] * 3


# ---- scoring without a model ----------------------------------------------------------------------------------------

def scored(capsys, **settings):
    capsys.readouterr()
    eval.main(eval.Settings(**{k: str(v) for k, v in settings.items()}))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_answers_are_scored_again_without_a_model(model_folder, world, capsys, monkeypatch):
    monkeypatch.setattr(Chat, "answers", lambda self, prompts, *rest: ["yes", "no"] * (len(prompts) // 2))
    asked, _ = run(model_folder, world, capsys)
    monkeypatch.setattr(Chat, "__init__", lambda *a: pytest.fail("a model was loaded"))
    for more in ({}, {"data": world / "q.jsonl"}):
        again = scored(capsys, score=world / "a.jsonl", **more)
        assert {k: again[k] for k in ("n", "accuracy", "ci95", "types", "counts", "task")} == {
            k: asked[k] for k in ("n", "accuracy", "ci95", "types", "counts", "task")}
    assert asked["accuracy"] == 0.5 and asked["ci95"][0] < 0.5 < asked["ci95"][1] and asked["types"] == {"a": 1, "b": 0}
    write(world / "llava.jsonl", [{"question_id": i, "prompt": "x", "text": "yes", "answer_id": "q", "model_id": "m",
                                   "metadata": {}} for i in range(7)])
    result = scored(capsys, score=world / "llava.jsonl", data=world / "q.jsonl", against=world / "a.jsonl")
    assert result["accuracy"] == 7 / 8 and result["unreadable"] == 1
    assert result["against"]["accuracy"] == 0.5 and (result["against"]["better"], result["against"]["worse"]) == (3, 0)
    assert result["against"]["p"] == 0.25 and result["against"]["test"] == "McNemar, exact"


def test_letters_are_scored_again_without_the_questions(model_folder, world, capsys, monkeypatch):
    """The file of answers keeps options and groups: MMBench's groups are known without its table."""
    monkeypatch.setattr(Chat, "answers", lambda self, prompts, *rest: ["A", "B", "a cat", "x"][: len(prompts)])
    write(world / "q.jsonl", [{"question_id": i, "image": "0.png", "text": "Q?\nA. a cat\nB. x", "answer": "A"}
                              for i in (1, 2)])
    asked, rows = run(model_folder, world, capsys, task="mmbench")
    assert (asked["n"], asked["groups"], asked["accuracy"], asked["vanilla"]) == (4, 2, 0.5, 1)
    again = scored(capsys, score=world / "a.jsonl", task="mmbench")
    assert {k: again[k] for k in ("n", "groups", "accuracy", "vanilla", "types")} == {
        k: asked[k] for k in ("n", "groups", "accuracy", "vanilla", "types")}


@pytest.mark.parametrize("task, key", [("mmbench", "options"), ("mme", "group"), ("ocrbench", "dataset")])
def test_answers_to_another_task_are_refused(tmp_path, task, key):
    write(tmp_path / "a.jsonl", [{"question_id": 1, "text": "A", "answers": ["A"], "type": "all"}])
    with pytest.raises(Error, match=f"no '{key}', which task={task} reads; --data=FILE"):
        eval.main(eval.Settings(score=str(tmp_path / "a.jsonl"), task=task))


@pytest.mark.parametrize("change", [{"type": None}, {"answers": [1]}])
def test_answers_of_another_kind_are_one_line(tmp_path, change):
    write(tmp_path / "a.jsonl", [{"question_id": 1, "text": "A", "answers": ["A"], "type": "all"} | change])
    with pytest.raises(Error, match="answer 0 .*`type` is a string"):
        eval.main(eval.Settings(score=str(tmp_path / "a.jsonl"), task="docvqa"))


def test_a_limit_keeps_groups_whole():
    """VLMEvalKit's tables list all questions first, then all of them with rotated options."""
    rows = [{"question_id": n + r * 10**6, "group": n} for r in range(4) for n in range(5)]
    assert eval.limited(rows, 2) == [row for row in rows if row["group"] < 2] and eval.limited(rows, 0) == rows
    assert eval.limited(rows, 9) == rows and eval.limited([{"question_id": 1}] * 3, 2) == [{"question_id": 1}] * 2


def test_answers_of_other_programs_are_read(tmp_path):
    questions = [{"question_id": n} for n in (1, 2, 2, "x")]
    for rows in ([{"question_id": 2, "text": "b"}, {"question_id": 1, "text": "a"}, {"question_id": "2", "text": "c"}],
                 [{"question_id": n, "answer": a} for n, a in ((1, "a"), (2, "b"), (2, "c"))],
                 [{"questionId": "1", "prediction": "a"}, {"questionId": "2", "prediction": "b"},
                  {"questionId": "2", "prediction": "c"}]):
        (tmp_path / "a.json").write_text(json.dumps(rows))
        assert read_answers(tmp_path / "a.json", questions) == ["a", "b", "c", None]
    head = ["index", "question", "prediction"]
    (tmp_path / "a.tsv").write_text(tsv(head, [1, "q", "a"], [2, "q", ""], [2, "q", "c"]))
    assert read_answers(tmp_path / "a.tsv", questions) == ["a", "", "c", None]
    for rows, complaint in (([{"question_id": 9, "text": "a"}], "'9', which is asked 0 times"),
                            ([{"text": "a"}], "it needs"), ([{"question_id": 1}], "it needs"), ([5], "not an object")):
        (tmp_path / "a.json").write_text(json.dumps(rows))
        with pytest.raises(Error, match=complaint):
            read_answers(tmp_path / "a.json", questions)
    (tmp_path / "a.json").write_text('[{"question_id": 1, "text": "a"}]')
    with pytest.raises(Error, match="no true answer beside it; --data=FILE"):
        answered_questions(tmp_path / "a.json")


def test_a_task_without_toy_questions_needs_data():
    with pytest.raises(Error, match="task=mmmu needs --data=FILE"):
        eval.main(eval.Settings(task="mmmu"))
    with pytest.raises(BadSample, match="not a path"):
        eval.image_sources("\0", ".")
