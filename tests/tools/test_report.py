"""The page of a model's answers: complete, harmless, worst first."""

import json
import re
import shutil

import pytest
from conftest import error
from PIL import Image

from config import Error
from metrics.certainty import paired
from tools import report
from tools.report import matched


def row(n, kind="a", score=0.0, text="no", **more):
    return {"question_id": n, "prompt": "Is it?", "text": text, "score": score, "answers": ["yes"], "image": "0.png",
            "type": kind} | more


def page_of(folder, rows):
    Image.new("RGB", (9, 12)).save(folder / "0.png")
    Image.new("RGB", (500, 300)).save(folder / "big.png")
    (folder / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report.main([str(folder / "answers.jsonl"), f"--images={folder}"])
    return (folder / "answers.html").read_text("utf-8")


def test_the_page_holds_its_images_and_runs_nothing(tmp_path):
    evil = "<script>alert('a')</script> & \"b\""
    page = page_of(tmp_path, [row(evil, evil, text=evil, answers=[evil], prompt=evil, image="big.png"),
                              row(2, "b", text="", prompt="", image="0.png")])
    harmless = "&lt;script&gt;alert(&#x27;a&#x27;)&lt;/script&gt; &amp; &quot;b&quot;"
    assert page.count("<script") == 1 and page.count(harmless) == 8   # filter; heading, question, expected, answer, id
    assert not re.search(r"https?:|\b(href|url|@import)\b", re.sub('base64,[^"]*', "", page))
    assert sorted(re.findall('src="(.*?),', page)) == ["data:image/jpeg;base64", "data:image/png;base64"]
    assert page.count("<img") == page.count("wrong;") == 2


def test_worst_types_and_worst_answers_come_first(tmp_path):
    rows = [row(i, "good", 1.0, "yes") for i in range(3)] + [row(9, "bad", 0.3)]
    rows += [row(20 + i, "middle", i / 20) for i in range(20)]
    page = page_of(tmp_path, rows)
    assert re.findall(r"<h2>(\w+)", page) == ["bad", "middle", "good"]
    assert re.findall(r"; (2\d|3\d)</small>", page) == [str(n) for n in (*range(20, 28), *range(36, 40))]
    assert "53.3% of 24 questions" in page and "30% right" in page and "0 of 3 not right" in page


def test_an_unreadable_question_is_on_the_page(tmp_path):
    page = page_of(tmp_path, [row(1, text=None, image="gone.png"), row(2, "\ud800", image=None, answers=["\ud800"])])
    assert re.search("gone.png.*missing|missing.*gone.png", page) and "1 could not be asked" in page
    assert "expected <b>\\ud800</b>" in page


def test_answers_without_scores_and_several_images(tmp_path):
    """A benchmark may publish its questions without their answers, and a question may have several images."""
    bare = {"score": None, "answers": []}
    page = page_of(tmp_path, [row(1, **bare, image=["0.png", "big.png"]), row(2, **bare)])
    assert "<h1>2 questions</h1>" in page and "not scored; 2 shown" in page and "%" not in page.split("</style>")[1]
    assert page.count("<img") == 3 and page.count("not scored; ") == 3 and page.count('class="card none"') == 2


@pytest.mark.parametrize("text", ["", "{\n", "[1]\n", '{"question_id": 1}\n', '{"type": "a", "score": "x"}\n'])
def test_another_file_ends_in_one_line(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text)
    assert "is not a file of answers" in error(report.main, [str(tmp_path / "x.jsonl")])
    for change in ({"text": 5}, {"answers": [1]}, {"answers": [["a"]]}, {"prompt": None}):
        (tmp_path / "x.jsonl").write_text(json.dumps(row(1) | change))
        assert "is not a file of answers" in error(report.main, [str(tmp_path / "x.jsonl")]), change
    (tmp_path / "x.jsonl").write_text(json.dumps(row(1)))
    two = [str(tmp_path / "x.jsonl")] * 2
    assert "no 'group', which task=mmbench reads" in error(report.main, [*two, "--task=mmbench"])
    assert "usage" in error(report.main, [])
    assert "gone.jsonl: No such file" in error(report.main, [str(tmp_path / "gone.jsonl")])


# ---- two files ------------------------------------------------------------------------------------------------------

def compared(folder, rows, others, *how):
    for name, of in (("old", others), ("answers", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in of))
    Image.new("RGB", (9, 12)).save(folder / "0.png")
    report.main([str(folder / "answers.jsonl"), str(folder / "old.jsonl"), f"--images={folder}", *how])
    return (folder / "answers_against.html").read_text("utf-8")


def test_two_files_show_what_flipped(tmp_path):
    """As `eval.py --score --against` computes it; unchanged answers are not shown. Rows are matched by id."""
    scores = [(1, 0), (0, 1), (1, 1), (0, 0), (0, 1), (0, 1)]
    rows = [row(i, "ab"[i % 2], a, f"new{i}") for i, (a, _) in enumerate(scores)]
    others = [row(i, "ab"[i % 2], b, f"old{i}") for i, (_, b) in enumerate(scores)]
    page = compared(tmp_path, rows, others[::-1])
    test = paired([a for a, _ in scores], [b for _, b in scores])
    assert f"p = {test['p']:.2g} (McNemar, exact)" in page and (test["better"], test["worse"]) == (1, 3)
    assert "33.3% of 6 questions" in page and "Before: 66.7%" in page and "Difference -33.3 points" in page
    assert "1 better</span>, <span class=down>3 worse" in page
    assert "<td>a<td>3<td>66.7%<td>66.7%<td class=up>1<td class=down>1" in page
    assert "<td>b<td>3<td>66.7%<td>0.0%<td class=up>0<td class=down>2" in page
    shown = re.findall(r'data-result="(\w+ \w+)".*?answered <b>(\w+)</b><br>before <b>(\w+)</b>', page, re.S)
    assert shown == [("wrong worse", "new1", "old1"), ("wrong worse", "new5", "old5"),       # type b: none is better
                     ("wrong worse", "new4", "old4"), ("right better", "new0", "old0")]
    limited = compared(tmp_path, rows, others, "--worst=1")
    assert limited.count("data-result") == 3 and "2 worse, 0 better; 1 shown" in limited


def test_questions_of_one_file_alone(tmp_path):
    """A question that the other file lacks is wrong there, as for eval.py; one that it has alone is an error."""
    page = compared(tmp_path, [row(1, score=1), row(1, score=0), row("2", score=1)], [row(1, score=1), row(1, score=0)])
    assert "1 better</span>, <span class=down>0 worse" in page and "before <i>could not be asked</i>" in page
    with pytest.raises(Error, match="question '3' is in the other file alone"):
        compared(tmp_path, [row(1)], [row(1), row(3)])
    with pytest.raises(Error, match="no scores to compare"):
        compared(tmp_path, [row(1, score=None)], [row(1, score=None)])


def test_ids_of_any_kind_are_matched(tmp_path):
    """1 and "1" are one id, asked twice; an id may be a list"""
    rows = [row(1, text="a"), row("1", text="b"), row(["x", 2], text="c")]
    pairs = matched(rows, [row("1", text="A"), row(1, text="B"), row(["x", 2], text="C")])
    assert [(r["text"], r["other"]["text"]) for r in pairs] == [("a", "A"), ("b", "B"), ("c", "C")]


def test_mmbench_tests_groups_of_questions(tmp_path):
    """A group is right if all its questions are."""
    rows = [row(i, score=1, group=i // 2) for i in range(8)]
    others = [row(i, score=int(i % 4 == 3), group=i // 2) for i in range(8)]
    p = {task: re.search(r"Before: ([\d.]+%).*?p = ([\d.]+)", compared(tmp_path, rows, others, f"--task={task}"))
         for task in ("exact", "mmbench")}
    assert p["exact"].groups() == ("25.0%", "0.031") and p["mmbench"].groups() == ("0.0%", "0.12")


def test_the_filters_work_on_a_phone(tmp_path):
    """In a browser of 360 pixels: nothing is wider, and the choices hide cards and headings."""
    sync_api, chromium = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium on this machine")
    rows = [row(f"{k}{i}" + "x" * 90 * (i == 0), "type of questions " * 3 + k, i % 2) for k in "ab" for i in range(3)]
    compared(tmp_path, rows, [r | {"score": 1 - r["score"]} for r in rows])
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 360, "height": 780})
        faults = []
        tab.on("pageerror", lambda e: faults.append(str(e)))
        tab.goto(f"file://{tmp_path}/answers_against.html")
        kind, result = tab.locator("nav select").all()
        found = []
        for of, how in (("", ""), (rows[0]["type"], ""), (rows[0]["type"], "worse"), ("", "better"), ("", "part")):
            kind.select_option(of)
            result.select_option(how)
            found.append((tab.locator(".card:visible").count(), tab.locator("section:visible").count()))
            assert tab.locator("nav small").inner_text() == f"{found[-1][0]} on this page"
        assert found == [(6, 2), (3, 1), (2, 1), (2, 2), (0, 0)] and not faults
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
        browser.close()
