"""Questions in, scores, answers and a page out; with a tiny model that knows nothing."""

import dataclasses
import json
import os
import re

import pytest
import torch
from conftest import fork, make_tokenizer, tiny_vlm
from PIL import Image

import eval
import generate
import sample
from config import Error
from formats import llava, tokenizer

KINDS = ["color", "count", "exists"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A whole published folder around a random model, in fp64 so that no batch size can tip a choice of words."""
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
    """Eleven questions of three types about five pictures; one has no picture."""
    rows = []
    for i in range(5):
        Image.new("RGB", (9 + i, 12), (50 * i, 255 - 40 * i, 90)).save(tmp_path / f"{i}.png")
    for i in range(11):
        rows.append({"question_id": i, "image": f"{i % 5}.png", "text": "What is this?" + " Yes?" * (i % 4),
                     "answer": "a cat", "type": KINDS[i % 3]})
    rows[10]["image"] = ""                                       # as none, which other tests leave out
    write(tmp_path / "q.jsonl", rows)
    return tmp_path


def write(file, rows):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))


def run(model_folder, world, capsys, **settings):
    """-> the JSON line, the answers file's rows, the page"""
    settings = dict(model=str(model_folder), data=str(world / "q.jsonl"), answers=str(world / "a.jsonl"),
                    device="cpu", dtype="fp64", max_new_tokens=5) | settings
    capsys.readouterr()
    eval.main(eval.Settings(**settings))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    name = result["how"] if result["task"] == "exact" else f"{result['task']}_{result['how']}"
    return result, [json.loads(l) for l in (world / "a.jsonl").read_text().splitlines()], world / f"report_{name}.html"


def test_the_last_line_counts_and_the_answers_file_repeats_every_question(model_folder, world, capsys):
    result, rows, page = run(model_folder, world, capsys)
    assert (result["task"], result["n"], result["how"], result["unreadable"]) == ("exact", 11, "seeing", 0)
    assert result["counts"] == {"color": 4, "count": 4, "exists": 3} and set(result["types"]) == set(KINDS)
    assert [r["question_id"] for r in rows] == list(range(11))
    assert result["accuracy"] == sum(r["score"] for r in rows) / 11
    assert rows[1]["image"] == "1.png" and rows[10]["image"] is None and rows[0]["prompt"] == "What is this?"
    assert page.is_file()
    first, same, _ = run(model_folder, world, capsys, limit=3)
    assert first["n"] == 3 and same == rows[:3]


def test_the_score_is_that_of_the_answers_that_were_given(model_folder, world, capsys):
    _, said, _ = run(model_folder, world, capsys)
    rows = [json.loads(l) for l in (world / "q.jsonl").read_text().splitlines()]
    for row, answered in zip(rows, said):
        row["answer"] = answered["text"] + "." if row["type"] == "count" else "never " + answered["text"]
    write(world / "q.jsonl", rows)
    result, _, page = run(model_folder, world, capsys)
    assert result["types"] == {"color": 0, "count": 1, "exists": 0} and result["accuracy"] == 4 / 11
    order = re.findall(r"<h2>(\w+)", page.read_text())
    assert order[-1] == "count"                                  # the worst types come first


def test_the_batch_size_does_not_change_an_answer(model_folder, world, capsys):
    said = [[r["text"] for r in run(model_folder, world, capsys, batch_size=b)[1]] for b in (1, 4, 64)]
    assert said[0] == said[1] == said[2] and len(set(said[0])) > 1


def test_two_processes_give_the_answers_of_one_in_the_order_of_the_questions(model_folder, world, capsys, tmp_path):
    said = run(model_folder, world, capsys)[1]
    (world / "a.jsonl").unlink()

    def rank(r):
        eval.main(eval.Settings(model=str(model_folder), data=str(world / "q.jsonl"), answers=str(world / "a.jsonl"),
                                device="cpu", dtype="fp64", max_new_tokens=5))
    fork(2, rank, tmp_path)
    assert [json.loads(line) for line in (world / "a.jsonl").read_text().splitlines()] == said


def test_a_row_of_the_vocabulary_without_a_word_is_never_said(model_folder):
    """The vocabulary is padded to 512; the tokenizer has 500 words, and the picture's is none to say."""
    speaker = generate.Chat(model_folder, "cpu")
    n = len(speaker.tok)
    assert n < 512 and speaker.banned == {speaker.cfg.image_token_index, *range(n, 512)}
    with torch.no_grad():
        speaker.model.language_model.lm_head.weight[n:] *= 100     # what it would like to say best
    ids = speaker.answers([speaker.prompt([("What?", None)], 0)], [], 8, temperature=1.0)
    assert ids != [""]


def test_blind_hands_zeros_to_the_connector(model_folder, world, capsys, monkeypatch):
    seen, load = [], generate.Chat

    def spied(*args):
        speaker = load(*args)
        speaker.model.multi_modal_projector.register_forward_pre_hook(lambda m, a: seen.append(float(a[0].abs().sum())))
        return speaker
    monkeypatch.setattr(generate, "Chat", spied)
    run(model_folder, world, capsys)
    assert max(seen) > 0
    seen.clear()
    result, rows, page = run(model_folder, world, capsys, blind=True)
    assert seen and not any(seen) and result["how"] == "blind" and "set to zero" in page.read_text()
    assert rows[0]["text"] == rows[4]["text"] == rows[8]["text"]  # the same words about three pictures: the same answer


def test_shuffled_never_shows_a_questions_own_picture(model_folder, world, capsys):
    own = [r["image"] for r in run(model_folder, world, capsys)[1]]
    other = [r["image"] for r in run(model_folder, world, capsys, shuffled=True)[1]]
    assert all(a != b for a, b in zip(own[:10], other)) and set(other[:10]) == set(own[:10]) and other[10] is None
    for n in range(2, 7):
        rows = [{"image": str(i % n)} for i in range(3 * n)]
        assert all(r["image"] != name for r, name in zip(rows, eval.other_pictures(rows)))
    with pytest.raises(Error, match="at least two different pictures"):
        eval.other_pictures([{"image": "a"}, {"image": "a"}, {"image": None}])


@pytest.mark.parametrize("task", ["exact", "pope"])
def test_a_question_without_its_picture_is_counted_and_wrong(model_folder, world, capsys, task):
    rows = [{"question_id": i, "image": "gone.png", "text": "Is it?", "answer": a} for i, a in enumerate(["yes", "no"])]
    write(world / "q.jsonl", [*rows, {**rows[0], "image": "0.png"}])
    result, said, page = run(model_folder, world, capsys, task=task)
    assert result["unreadable"] == 2 and [r["score"] for r in said[:2]] == [0, 0]
    assert [r["text"] for r in said[:2]] == [None, None] and said[2]["text"] is not None
    assert re.search("gone.png.*missing|missing.*gone.png", page.read_text()) and "2 could not be" in page.read_text()


def test_where_no_question_can_be_asked_there_is_no_score(model_folder, world, capsys):
    write(world / "q.jsonl", [{"question_id": 1, "image": "gone.png", "text": "Is it?", "answer": "yes"}] * 2)
    with pytest.raises(Error, match="^none of the 2 questions could be asked"):
        run(model_folder, world, capsys)
    out, err = capsys.readouterr()
    assert out == "" and "image is missing" in err and not (world / "a.jsonl").exists()


def test_the_page_needs_nothing_else_and_runs_nothing(model_folder, world, capsys):
    evil = "<script>alert('a')</script> & \"b\""
    Image.new("RGB", (500, 300)).save(world / "big.png")
    rows = [{"question_id": evil, "image": "big.png", "text": evil, "answer": evil, "type": evil},
            {"question_id": 2, "image": "0.png", "text": "", "answer": "x", "type": None}]
    write(world / "q.jsonl", rows)
    page = run(model_folder, world, capsys)[2].read_text()
    harmless = "&lt;script&gt;alert(&#x27;a&#x27;)&lt;/script&gt; &amp; &quot;b&quot;"
    assert "<script" not in page and page.count(harmless) == 5   # in table, heading, question, expected, id
    assert not re.search(r"https?:|\b(href|url|@import)\b", re.sub('base64,[^"]*', "", page))
    assert sorted(re.findall('src="(.*?),', page)) == ["data:image/jpeg;base64", "data:image/png;base64"]
    assert page.count("<img") == page.count("wrong;") == 2


@pytest.mark.parametrize("text, complaint", [
    ("", "holds no questions"), ("{\n", "line 1"), ('{"question_id": 1, "text": "a"}', "line 1: a question needs"),
    ("[1]", "line 1: a question needs"), ('{"question_id": 1, "text": "a", "answer": 5}', "all strings"),
    ('{"question_id": 1, "text": "a", "answers": []}', "line 1: a question needs"),
    ('{"question_id": 1, "text": "a", "answer": "b", "image": ["c"]}', "image is the name of one file"),
    ('\n{"question_id": 1, "text": "a", "answer": "b", "answer": "c"}', "line 2.*duplicate key"), ("\xff", "utf-8")])
def test_a_bad_question_file_ends_in_one_clear_line(tmp_path, text, complaint):
    (tmp_path / "q.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(Error, match=complaint) as stopped:
        eval.read_questions(str(tmp_path / "q.jsonl"), "exact")
    assert "\n" not in str(stopped.value)
    with pytest.raises(Error, match="no question file"):
        eval.read_questions(str(tmp_path / "gone.jsonl"), "exact")


def test_what_no_encoding_knows_costs_one_question_and_neither_score_nor_page(model_folder, world, capsys):
    write(world / "q.jsonl", [{"question_id": 1, "image": "0.png", "text": "What\ud800?", "answer": "a cat"},
                              {"question_id": 2, "image": "1.png", "text": "What?", "answer": "\ud800", "type": "\ud800"}])
    result, rows, page = run(model_folder, world, capsys)
    assert result["n"] == 2 and result["unreadable"] == 1 and rows[1]["answers"] == ["\ud800"]
    assert "expected <b>\\ud800</b>" in page.read_text("utf-8")


def test_pope_takes_popes_own_files_and_nothing_but_yes_and_no(tmp_path):
    question = {"question_id": 1, "image": "a", "text": "Is it?", "label": "Yes", "category": "random"}
    write(tmp_path / "q.jsonl", [question])
    row, = eval.read_questions(str(tmp_path / "q.jsonl"), "pope")
    assert row["answers"] == ["yes"] and row["type"] == "random"
    write(tmp_path / "q.jsonl", [{"question_id": 1, "text": "Is it?", "answer": "maybe"}])
    with pytest.raises(Error, match="yes or no, not 'maybe'"):
        eval.read_questions(str(tmp_path / "q.jsonl"), "pope")


def test_pope_and_vqa_work_on_the_toy_worlds_own_questions(model_folder, world, capsys, monkeypatch):
    import toy
    monkeypatch.chdir(world)
    monkeypatch.setitem(toy.SCENES, "test", 3)
    result, rows, _ = run(model_folder, world, capsys, task="pope", data="")
    assert result["n"] == 3 and set(result["types"]) == {"exists"} and {*rows[0]["answers"]} <= {"yes", "no"}
    assert {"precision", "recall", "f1", "yes_ratio", "f1_types", "f1_mean"} <= set(result)
    result, rows, _ = run(model_folder, world, capsys, task="vqa", data="")
    assert result["n"] == len(rows) > 15 and 0 <= result["accuracy"] <= 1


@pytest.mark.parametrize("settings, complaint", [
    (dict(task="ocr"), "task=ocr"), (dict(blind=True, shuffled=True), "choose one"),
    (dict(batch_size=0), "at least 1"),
    (dict(model="nowhere"), "nowhere holds no model"), (dict(model=""), "model is empty"),
    (dict(images="gone"), "images=gone is no folder"), (dict(device="foo"), "device=foo: auto"),
    (dict(dtype="foo"), "dtype=foo: auto"), (dict(limit=-1), "limit=-1: expected"),
    (dict(max_new_tokens=0), "max_new_tokens=0: expected")])
def test_wrong_settings_end_in_one_clear_line(world, settings, complaint):
    with pytest.raises(Error, match=complaint):
        eval.main(dataclasses.replace(eval.Settings(data=str(world / "q.jsonl"), device="cpu"), **settings))


def test_answers_go_where_they_can_be_written_and_a_line_says_where(model_folder, world, capsys, monkeypatch):
    """Root may write everywhere, so that it may not is pretended."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(model_folder) and access(path, mode))
    monkeypatch.chdir(world)
    asked = dict(model=str(model_folder / "model"), answers="")
    eval.main(eval.Settings(data="q.jsonl", device="cpu", max_new_tokens=2, **asked))
    out, err = capsys.readouterr()
    place = world / "answers" / model_folder.name
    assert json.loads(out.splitlines()[-1])["n"] == 11
    assert {p.name for p in place.iterdir()} == {"answers_seeing.jsonl", "report_seeing.html"}
    line = f"{model_folder} cannot be written to; the answers go to answers/{model_folder.name}"
    assert err.splitlines()[0] == line
    assert not list(model_folder.glob("answers*"))


@pytest.mark.parametrize("answers, complaint", [("q.jsonl/a.jsonl", "q.jsonl is not a folder"), (".", ". is no file"),
                                                ("pipe", "pipe is no file")])
def test_an_answers_file_that_cannot_be_is_one_line_before_any_question(model_folder, world, monkeypatch, answers,
                                                                        complaint):
    monkeypatch.chdir(world)
    monkeypatch.setattr(generate.Chat, "answers", lambda *a: pytest.fail("asked"))
    os.mkfifo("pipe")                                             # a device would be replaced by a file: /dev/null, say
    with pytest.raises(Error, match=complaint) as stopped:
        eval.main(eval.Settings(model=str(model_folder), data="q.jsonl", answers=answers, device="cpu"))
    assert "\n" not in str(stopped.value)


def test_a_full_disk_does_not_cost_the_score(model_folder, world, capsys, monkeypatch):
    full = OSError(28, "No space left on device", "a.jsonl")
    monkeypatch.setattr(eval, "write", lambda *a: (_ for _ in ()).throw(full))
    code = eval.main(eval.Settings(model=str(model_folder), data=str(world / "q.jsonl"), answers=str(world / "a.jsonl"),
                                   device="cpu", max_new_tokens=2))
    out, err = capsys.readouterr()
    assert code == 1 and json.loads(out.splitlines()[-1])["n"] == 11
    assert "error: a.jsonl could not be written: No space left on device" in err


@pytest.mark.parametrize("settings, complaint", [
    (dict(device="foo"), "device=foo: auto"), (dict(dtype="foo"), "dtype=foo: auto"), (dict(seed=2**70), "seed="),
    (dict(temperature=-1.0), "temperature=-1.0"), (dict(temperature=float("inf")), "temperature=inf"),
    (dict(max_new_tokens=-1), "max_new_tokens=-1"), (dict(template="foo"), "unknown template 'foo'"),
    (dict(model=""), "model is empty"), (dict(image="."), "there is no image file .")])
def test_wrong_settings_of_sample_end_in_one_clear_line(model_folder, settings, complaint):
    with pytest.raises(Error) as stopped:
        sample.main(dataclasses.replace(sample.Settings(model=str(model_folder), prompt="q", device="cpu"), **settings))
    assert complaint in str(stopped.value) and "\n" not in str(stopped.value)


def test_sample_prints_the_answer_and_nothing_else(model_folder, world, capsys):
    run(model_folder, world, capsys)
    first = json.loads((world / "a.jsonl").read_text().splitlines()[0])
    s = sample.Settings(model=str(model_folder), image=str(world / "0.png"), prompt="What is this?", max_new_tokens=5,
                        device="cpu", dtype="fp64")
    sample.main(s)
    assert capsys.readouterr().out == first["text"] + "\n"      # which is what eval.py was told
    with pytest.raises(Error, match="there is no image file .*gone.png"):
        sample.main(dataclasses.replace(s, image=str(world / "gone.png")))


def test_a_chat_remembers_what_was_said_and_ends_with_an_empty_line(model_folder, world, capsys, monkeypatch):
    lines, asked, say = iter(["What is this?", "Yes?", ""]), [], generate.Chat.answers
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(generate.Chat, "answers", lambda self, p, *a: (asked.append(p[0].tolist()), say(self, p, *a))[1])
    sample.main(sample.Settings(model=str(model_folder), image=str(world / "0.png"), max_new_tokens=3, device="cpu"))
    assert len(asked) == 2 and asked[1][: len(asked[0])] == asked[0] and len(asked[1]) > len(asked[0]) + 3
    assert asked[0].count(3) == asked[1].count(3) == 4           # four holes for one picture, once
