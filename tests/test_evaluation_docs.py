"""The commands of docs/evaluation.md run as they are written, on small files with the names they say; its table names
every task."""

import base64
import importlib.util
import json
import re
import shlex

import pytest
from conftest import ROOT
from PIL import Image
from test_questions import model_folder, picture, tsv, write  # noqa: F401  (model_folder is a fixture)

import eval
import train_align
import train_sft
from demo import boxes, toy
from generate import Chat
from metrics.tasks import TASKS
from run.arguments import parse

TEXT = (ROOT / "docs/evaluation.md").read_text("utf-8")
COMMANDS = [line.split(" #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
            for line in block.splitlines()]
PYARROW = importlib.util.find_spec("pyarrow") is not None
ASKED = [c for c in COMMANDS if c.startswith("python eval.py") and (PYARROW or ".parquet" not in c)]


@pytest.fixture
def place(tmp_path, model_folder, monkeypatch):  # noqa: F811
    """A folder with every file that the commands name; runs/sft and runs/boxes are a tiny random model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("sft", "boxes"):
        (tmp_path / "runs" / name).symlink_to(model_folder)
    for folder, names in (("val2014", ["a.png", "COCO_val2014_000000000007.jpg"]),
                          ("train_images", [f"i{n}.jpg" for n in range(6)])):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.new("RGB", (9, 9), "red").save(tmp_path / folder / name)
    image = base64.b64encode(picture("blue")).decode()
    (tmp_path / "MMStar.tsv").write_text(tsv(["index", "question", "answer", "A", "B", "l2_category", "image"],
                                             [0, "Which?", "A", "x", "y", "geometry", image]))
    write(tmp_path / "llava_pope_test.jsonl", [{"question_id": n, "image": "a.png", "text": "Is it?", "label": a,
                                                "category": "random"} for n, a in enumerate(("yes", "no"))])
    for file, text in (("answers.jsonl", "Yes"), ("others.jsonl", "No")):
        write(tmp_path / file, [{"question_id": n, "text": text} for n in (0, 1)])
    (tmp_path / "questions.json").write_text(json.dumps({"data_subtype": "val2014", "questions": [
        {"question_id": 7000, "image_id": 7, "question": "What?"}]}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": [
        {"question_id": 7000, "image_id": 7, "answer_type": "other", "answers": [{"answer": "sky"}] * 10}]}))
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [
        {"question_id": n, "image_id": f"i{n}", "question": "What?", "answers": ["sky"] * 10} for n in range(6)]}))
    for folder in ("images", "questions_answers_YN"):
        (tmp_path / "MME_Benchmark/count" / folder).mkdir(parents=True)
    (tmp_path / "MME_Benchmark/count/images/1.jpg").write_bytes(picture("red"))
    (tmp_path / "MME_Benchmark/count/questions_answers_YN/1.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
    for name, row in (("questions", {"id": "1", "imageId": "n1", "question": "What?", "answer": "sky"}),
                      ("images", {"id": "n1", "image": {"bytes": picture("blue"), "path": None}})):
        if PYARROW:
            import pyarrow.parquet
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), f"{name}.parquet")
    toy.write_world(tmp_path / "runs/toy", "all", align=2, sft=2, val_align=1, val_sft=1, test=2)
    for name, n in (("sft", 2), ("test", 2)):
        monkeypatch.setitem(toy.SCENES, name, n)
    boxes.main([next(c for c in COMMANDS if "demo/boxes.py" in c).split()[-1]])
    return tmp_path


def test_the_commands_of_the_page_run(place, capsys, monkeypatch):
    results, answers = [], Chat.answers
    monkeypatch.setattr(Chat, "answers", lambda self, prompts, pixels, n: answers(self, prompts, pixels, 2))
    for command in ASKED:
        capsys.readouterr()
        eval.main(parse(eval.Settings, [*shlex.split(command)[2:], "--device=cpu", "--kernels=torch"], ""))
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        assert results[-1]["n"] > 0 and results[-1]["unreadable"] == 0 and 0 <= results[-1]["accuracy"] <= 1
    by = {c: r for c, r in zip(ASKED, results)}
    assert len(ASKED) == 8 + PYARROW
    assert {r["task"] for r in results} | {"gqa"} == {"mmstar", "pope", "vqav2", "textvqa", "refcoco", "mme", "gqa"}
    assert next(r for c, r in by.items() if "--shots" in c)["shots"] == 4
    against = next(r for c, r in by.items() if "--against" in c)["against"]
    assert (against["better"], against["worse"], against["p"]) == (1, 1, 1)


def test_training_commands_name_real_settings():
    known = {f for s in (train_align, train_sft) for f in s.Settings.__dataclass_fields__}
    words = " ".join(c for c in COMMANDS if c.startswith("torchrun train_")).split()
    assert {w.partition("=")[0][2:] for w in words if w.startswith("--")} <= known and "recipes/qwen_vl.py" in words


def test_the_table_names_every_task():
    named = re.findall(r"`(\w+)`", "".join(line for line in TEXT.splitlines() if line.startswith("| `")))
    assert {*TASKS} <= {*named}
    for word in named:
        assert word in TASKS or word in ("A", "option", "with_image"), word


def test_named_files_of_the_page_exist():
    names = re.findall(r"`((?:formats|metrics|tests|demo|docs)/[\w/.-]+)`", TEXT)
    assert len(names) > 3 and all((ROOT / name).exists() for name in names)
