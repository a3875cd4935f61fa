"""The page of a model's answers: complete, harmless, worst first."""

import json
import re

import pytest
from conftest import error
from PIL import Image

from tools import report


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
    assert "<script" not in page and page.count(harmless) == 5    # heading, question, expected, answer, id
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
    assert page.count("<img") == 3 and page.count('class="card not scored"') == 2


@pytest.mark.parametrize("text", ["", "{\n", "[1]\n", '{"question_id": 1}\n', '{"type": "a", "score": "x"}\n'])
def test_another_file_ends_in_one_line(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text)
    assert "is not a file of answers" in error(report.main, [str(tmp_path / "x.jsonl")])
    assert "usage" in error(report.main, [])
    assert "gone.jsonl: No such file" in error(report.main, [str(tmp_path / "gone.jsonl")])
