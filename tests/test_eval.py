"""Questions in, scores and answers out; with a tiny random model, or with a stub of its answers."""

import dataclasses
import json
import os

import pytest
import torch
from conftest import fork, make_tokenizer, tiny_vlm
from PIL import Image

import eval
import sample
from config import Error
from formats import llava, tokenizer
from formats.questions import read_questions
from generate import Chat

KINDS = ["color", "count", "exists"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A whole published folder around a random model, in fp64 so that no batch size changes the likeliest token."""
    root = tmp_path_factory.mktemp("run")
    tok = tokenizer.Tokenizer(make_tokenizer(root / "tok"))
    model = tiny_vlm()
    vision = {"model_type": "clip_vision_model", "hidden_size": 32}
    pre = {"crop_size": {"height": 8, "width": 8}, "size": {"shortest_edge": 8}, "image_mean": [0.5] * 3}
    folder = llava.Folder(tok, vision, {"model_type": "llama"}, pre, {}, {})
    llava.save_model(root / "model", model.state_dict(), model.cfg, folder, "vicuna_v1", None, "pad", torch.float64, "")
    return root


@pytest.fixture
def world(tmp_path):
    """Eleven questions of three types about five images; one has no image."""
    rows = []
    for i in range(5):
        Image.new("RGB", (9 + i, 12), (50 * i, 255 - 40 * i, 90)).save(tmp_path / f"{i}.png")
    for i in range(11):
        rows.append({"question_id": i, "image": f"{i % 5}.png", "text": "What is this?" + " Yes?" * (i % 4),
                     "answer": "a cat", "type": KINDS[i % 3]})
    rows[10]["image"] = ""                                       # none
    write(tmp_path / "q.jsonl", rows)
    return tmp_path


def write(file, rows):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))


def run(model_folder, world, capsys, **settings):
    """-> the JSON line, the rows of the answers file"""
    settings = dict(model=str(model_folder), data=str(world / "q.jsonl"), answers=str(world / "a.jsonl"),
                    device="cpu", dtype="fp64", max_new_tokens=5) | settings
    capsys.readouterr()
    assert not eval.main(eval.Settings(**settings))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result, [json.loads(line) for line in (world / "a.jsonl").read_text().splitlines()]


def always(text):
    """A stub of Chat.answers: the same answer to every question"""
    return lambda self, prompts, *rest: [text] * len(prompts)


def test_the_last_line_counts_all_questions(model_folder, world, capsys):
    result, rows = run(model_folder, world, capsys)
    assert (result["task"], result["n"], result["how"], result["unreadable"]) == ("exact", 11, "seeing", 0)
    assert result["counts"] == {"color": 4, "count": 4, "exists": 3} and set(result["types"]) == set(KINDS)
    assert [r["question_id"] for r in rows] == list(range(11))
    assert result["accuracy"] == sum(r["score"] for r in rows) / 11
    assert rows[1]["image"] == "1.png" and rows[10]["image"] is None and rows[0]["prompt"] == "What is this?"
    first, same = run(model_folder, world, capsys, limit=3)
    assert first["n"] == 3 and same == rows[:3]
    texts = [r["text"] for r in rows]
    assert [r["text"] for r in run(model_folder, world, capsys, batch_size=4)[1]] == texts and len(set(texts)) > 1


def test_the_score_is_that_of_the_answers(model_folder, world, capsys):
    _, answered = run(model_folder, world, capsys)
    rows = [json.loads(line) for line in (world / "q.jsonl").read_text().splitlines()]
    for row, answer in zip(rows, answered):
        row["answer"] = answer["text"] + "." if row["type"] == "count" else "never " + answer["text"]
    write(world / "q.jsonl", rows)
    result, _ = run(model_folder, world, capsys)
    assert result["types"] == {"color": 0, "count": 1, "exists": 0} and result["accuracy"] == 4 / 11


def test_two_processes_give_the_answers_of_one(model_folder, world, capsys, tmp_path):
    answered = run(model_folder, world, capsys)[1]
    (world / "a.jsonl").unlink()

    def rank(r):
        eval.main(eval.Settings(model=str(model_folder), data=str(world / "q.jsonl"), answers=str(world / "a.jsonl"),
                                device="cpu", dtype="fp64", max_new_tokens=5))
    fork(2, rank, tmp_path)
    assert [json.loads(line) for line in (world / "a.jsonl").read_text().splitlines()] == answered


def test_a_padded_vocabulary_entry_is_never_generated(model_folder):
    """The vocabulary is padded to 512 and the tokenizer has 500 entries; the image's is never generated either."""
    chat = Chat(model_folder, "cpu")
    n = len(chat.tok)
    assert n < 512 and chat.banned == {chat.cfg.image_token_index, *range(n, 512)}
    with torch.no_grad():
        chat.model.language_model.lm_head.weight[n:] *= 100      # would be the likeliest of all
    assert chat.answers([chat.prompt([("What?", None)])], [], 8, temperature=1.0) != [""]


def test_blind_hands_zeros_to_the_connector(model_folder, world, capsys, monkeypatch):
    seen, init = [], Chat.__init__

    def spied(self, *args):
        init(self, *args)
        self.model.multi_modal_projector.register_forward_pre_hook(lambda m, a: seen.append(float(a[0].abs().sum())))
    monkeypatch.setattr(Chat, "__init__", spied)
    run(model_folder, world, capsys)
    assert max(seen) > 0
    seen.clear()
    result, rows = run(model_folder, world, capsys, blind=True)
    assert seen and not any(seen) and result["how"] == "blind"
    assert rows[0]["text"] == rows[4]["text"] == rows[8]["text"]  # the same question about three images


def test_shuffled_never_shows_a_questions_own_image(model_folder, world, capsys):
    own = [f"{i % 5}.png" for i in range(10)]
    other = [r["image"] for r in run(model_folder, world, capsys, shuffled=True, max_new_tokens=1)[1]]
    assert all(a != b for a, b in zip(own, other)) and set(other[:10]) == set(own) and other[10] is None
    for n in range(2, 7):
        rows = [{"image": str(i % n)} for i in range(3 * n)]
        assert all(r["image"] != name for r, name in zip(rows, eval.other_images(rows)))
    with pytest.raises(Error, match="at least two different images"):
        eval.other_images([{"image": "a"}, {"image": "a"}, {"image": None}])


def test_an_unreadable_question_counts_as_wrong(model_folder, world, capsys, monkeypatch):
    """Otherwise 3 of 3 readable ones would be right, and a missing folder of images would make a better score."""
    monkeypatch.setattr(Chat, "answers", always("Yes"))
    rows = [{"question_id": i, "image": "gone.png" if i < 2 else "0.png", "text": "Is it?", "answer": "yes"}
            for i in range(5)]
    rows[1]["image"], rows[1]["text"] = "0.png", "Is it \ud800?"
    rows[2]["type"] = "\ud800"
    write(world / "q.jsonl", rows)
    for task in ("exact", "vqa", "pope"):
        result, answered = run(model_folder, world, capsys, task=task)
        assert result["unreadable"] == 2 and result["n"] == 5 and result["accuracy"] == 3 / 5
        assert result["types"] == {"all": 2 / 4, "\ud800": 1} and [r["score"] for r in answered] == [0, 0, 1, 1, 1]
        assert [r["text"] for r in answered] == [None, None, "Yes", "Yes", "Yes"]
    assert (result["precision"], result["recall"], result["f1"]) == (1, 3 / 5, 0.75)


def test_without_a_question_asked_there_is_no_score(model_folder, world, capsys):
    write(world / "q.jsonl", [{"question_id": 1, "image": "gone.png", "text": "Is it?", "answer": "yes"}] * 2)
    with pytest.raises(Error, match="^none of the 2 questions could be asked"):
        run(model_folder, world, capsys)
    out, err = capsys.readouterr()
    assert out == "" and "image is missing" in err and not (world / "a.jsonl").exists()


@pytest.mark.parametrize("text, complaint", [
    ("", "is empty"), ('{"question_id": 1, "answer": "a"}', "question 0 .*: it needs question_id, text"),
    ("[1]", "question 0 .*: not an object"), ('{"question_id": 1, "text": "a", "answer": 5}', "it needs"),
    ('{"question_id": 1, "text": "a", "answers": []}', "question 0 .*: it needs"),
    ('{"question_id": 1, "text": "a", "answer": "b", "image": [5]}', "image .a name, several or none."),
    ('\n{"question_id": 1, "text": "a", "answer": "b", "answer": "c"}', "0: duplicate key")])
def test_a_bad_question_file_ends_in_one_line(tmp_path, text, complaint):
    (tmp_path / "q.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(Error, match=complaint) as stopped:
        read_questions(str(tmp_path / "q.jsonl"), "exact")
    assert "\n" not in str(stopped.value)
    with pytest.raises(Error, match="no data file"):
        read_questions(str(tmp_path / "gone.jsonl"), "exact")


def test_pope_takes_only_yes_and_no(tmp_path):
    question = {"question_id": 1, "image": "a", "text": "Is it?", "label": "Yes", "category": "random"}
    write(tmp_path / "q.jsonl", [question])
    row, = read_questions(str(tmp_path / "q.jsonl"), "pope")
    assert row["answers"] == ["yes"] and row["type"] == "random"
    write(tmp_path / "q.jsonl", [{"question_id": 1, "text": "Is it?", "answer": "maybe"}])
    with pytest.raises(Error, match="yes or no, not 'maybe'"):
        read_questions(str(tmp_path / "q.jsonl"), "pope")


def test_pope_and_vqa_score_the_toy_questions(model_folder, world, capsys, monkeypatch):
    from demo import toy
    monkeypatch.chdir(world)
    monkeypatch.setitem(toy.SCENES, "test", 3)
    monkeypatch.setattr(Chat, "answers", always("no"))
    result, rows = run(model_folder, world, capsys, task="pope", data="")
    assert result["n"] == 3 and set(result["types"]) == {"exists"} and {*rows[0]["answers"]} <= {"yes", "no"}
    assert {"precision", "recall", "f1", "yes_ratio", "f1_types", "f1_mean"} <= set(result)
    assert result["yes_ratio"] == 0 and result["accuracy"] == sum(r["answers"] == ["no"] for r in rows) / 3
    result, rows = run(model_folder, world, capsys, task="vqa", data="")
    assert result["n"] == len(rows) > 15
    assert result["accuracy"] == sum(r["answers"] == ["no"] for r in rows) / len(rows)


@pytest.mark.parametrize("settings, complaint", [
    (dict(task="ocr"), "task=ocr: one of exact, vqa"), (dict(blind=True, shuffled=True), "choose one"),
    (dict(batch_size=0), "at least 1"),
    (dict(model="nowhere"), "nowhere holds no model"), (dict(model=""), "model is empty"),
    (dict(images="gone"), "images=gone is not a folder"), (dict(device="foo"), "device=foo: auto"),
    (dict(dtype="foo"), "dtype=foo: auto"), (dict(limit=-1), "limit=-1: expected"),
    (dict(max_new_tokens=0), "max_new_tokens=0: expected")])
def test_wrong_settings_end_in_one_clear_line(world, settings, complaint):
    with pytest.raises(Error, match=complaint):
        eval.main(dataclasses.replace(eval.Settings(data=str(world / "q.jsonl"), device="cpu"), **settings))


def test_answers_go_where_they_can_be_written(model_folder, world, capsys, monkeypatch):
    """Root may write everywhere, so that it may not is pretended."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(model_folder) and access(path, mode))
    monkeypatch.chdir(world)
    asked = dict(model=str(model_folder / "model"), answers="")
    eval.main(eval.Settings(data="q.jsonl", device="cpu", max_new_tokens=2, **asked))
    out, err = capsys.readouterr()
    place = world / "answers" / model_folder.name
    assert json.loads(out.splitlines()[-1])["n"] == 11
    assert {p.name for p in place.iterdir()} == {"answers_seeing.jsonl"}
    line = f"{model_folder} cannot be written to; the answers go to answers/{model_folder.name}"
    assert err.splitlines()[0] == line
    assert not list(model_folder.glob("answers*"))


def test_an_impossible_answers_file_stops_before_any_question(model_folder, world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(Chat, "answers", lambda *a: pytest.fail("asked"))
    os.mkfifo("pipe")                                             # a device would be replaced by a file: /dev/null, say
    for answers, complaint in (("q.jsonl/a.jsonl", "q.jsonl is not a folder"), (".", ". is not a file"),
                               ("pipe", "pipe is not a file")):
        with pytest.raises(Error, match=complaint) as stopped:
            eval.main(eval.Settings(model=str(model_folder), data="q.jsonl", answers=answers, device="cpu"))
        assert "\n" not in str(stopped.value)


def test_a_full_disk_does_not_cost_the_score(model_folder, world, capsys, monkeypatch):
    full = OSError(28, "No space left on device", "a.jsonl")
    monkeypatch.setattr(eval, "write_file", lambda *a: (_ for _ in ()).throw(full))
    with pytest.raises(Error, match="^a.jsonl could not be written: No space left on device"):
        eval.main(eval.Settings(model=str(model_folder), data=str(world / "q.jsonl"), answers=str(world / "a.jsonl"),
                                device="cpu", max_new_tokens=2))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 11


def test_answers_outlive_an_error_of_scoring(model_folder, world, capsys, monkeypatch):
    """They are written before, and can be scored later."""
    monkeypatch.setattr(Chat, "answers", always("yes"))
    with monkeypatch.context() as broken:
        broken.setattr(eval, "evaluate", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model_folder, world, capsys)
    rows = [json.loads(line) for line in (world / "a.jsonl").read_text().splitlines()]
    assert {(r["text"], r["score"]) for r in rows} <= {("yes", None), (None, None)} and len(rows) == 11
    capsys.readouterr()
    eval.main(eval.Settings(score=str(world / "a.jsonl")))
    again = json.loads(capsys.readouterr().out)
    result, whole = run(model_folder, world, capsys)
    assert again["accuracy"] == result["accuracy"] and [r | {"score": None} for r in whole] == rows


@pytest.mark.parametrize("settings, complaint", [
    (dict(device="foo"), "device=foo: auto"), (dict(dtype="foo"), "dtype=foo: auto"), (dict(seed=2**70), "seed="),
    (dict(temperature=-1.0), "temperature=-1.0"), (dict(temperature=float("inf")), "temperature=inf"),
    (dict(max_new_tokens=-1), "max_new_tokens=-1"), (dict(template="foo"), "unknown template 'foo'"),
    (dict(prompt="<image>\nWhat?"), "the prompt has an <image> marker, but --image= is empty"),
    (dict(model=""), "model is empty"), (dict(image="."), "image cannot be read: '.' (IsADirectoryError)")])
def test_wrong_settings_of_sample_end_in_one_line(model_folder, settings, complaint):
    with pytest.raises(Error) as stopped:
        sample.main(dataclasses.replace(sample.Settings(model=str(model_folder), prompt="q", device="cpu"), **settings))
    assert complaint in str(stopped.value) and "\n" not in str(stopped.value)


def test_sample_prints_the_answer_and_nothing_else(model_folder, world, capsys):
    run(model_folder, world, capsys)
    first = json.loads((world / "a.jsonl").read_text().splitlines()[0])
    s = sample.Settings(model=str(model_folder), image=str(world / "0.png"), prompt="What is this?", max_new_tokens=5,
                        device="cpu", dtype="fp64")
    sample.main(s)
    assert capsys.readouterr().out == first["text"] + "\n"      # the answer of eval.py
    with pytest.raises(Error, match="image cannot be read: 'gone.png'"):
        sample.main(dataclasses.replace(s, image=str(world / "gone.png")))


def test_a_conversation_keeps_its_turns(model_folder, world, capsys, monkeypatch):
    lines, asked, answers = iter(["What is this?", "Yes?", ""]), [], Chat.answers
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(Chat, "answers", lambda self, p, *a: (asked.append(p[0].tolist()), answers(self, p, *a))[1])
    sample.main(sample.Settings(model=str(model_folder), image=str(world / "0.png"), max_new_tokens=3, device="cpu"))
    assert len(asked) == 2 and asked[1][: len(asked[0])] == asked[0] and len(asked[1]) > len(asked[0]) + 3
    assert asked[0].count(3) == asked[1].count(3) == 4           # four placeholders for one image, once
