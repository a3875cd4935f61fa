"""python data.py FILE: what it counts, what it shows, and that it checks as training does."""

import json
import random
import runpy
import sys
import tarfile
from collections import Counter

import pytest
from conftest import ROOT, error
from PIL import Image

import config
from tools import check_data

ANSWER = {"from": "gpt", "value": "It is 0."}
SAMPLE = {"id": "s0", "conversations": [{"from": "human", "value": "q"}, ANSWER]}
GOOD = [{"id": "s0", "image": "0.png", "conversations": [{"from": "human", "value": "<image>\nq"}, ANSWER]}, SAMPLE]


def write(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture
def folder(tmp_path, bytes_folder):
    """A run with a tokenizer, an image and a function that makes the arguments of a check."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    for f in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "run" / "model" / f).write_text((bytes_folder / f).read_text("utf-8"), "utf-8")
    (tmp_path / "run" / "model" / "config.json").write_text(json.dumps({"image_token_index": 3, "image_seq_length": 9}))
    Image.new("RGB", (9, 7)).save(tmp_path / "0.png")
    return tmp_path


def check(folder, rows, *args):
    file = write(folder / "x.json", rows)
    return check_data.main([file, f"--images={folder}", f"--model={folder / 'run'}", *args])


def test_a_good_file_is_counted_and_shown(folder, capsys):
    assert check(folder, GOOD * 2, "--show=2") == 0
    out = capsys.readouterr().out
    assert "--- sample 0, id 's0': " in out and "--- sample 1, id 's0': " in out and "--- sample 2" not in out
    assert "[9 x image]" in out and "It is 0." in out and "A chat between" in out
    assert ": 4 samples, 4 good, 0 dropped, 0 truncated to 512 tokens" in out and ", 2 images, 0 animated" in out


def test_bad_samples_are_counted_by_reason(folder, capsys):
    """The first of a kind is named; --bad=FILE lists each of them."""
    (folder / "1.png").write_bytes(b"<html>")
    rows = [GOOD[0] | {"image": name} for name in ("gone.png", "1.png", "0.png", "away.png")] + [{"id": 7}]
    assert check(folder, rows, f"--bad={folder / 'bad.jsonl'}", "--show=0") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("5 samples, 1 good, 4 dropped, 0 truncated to 512 tokens")
    assert lines[2] == "    json or jsonl: 4 x conversations (LLaVA, ShareGPT), 1 x unknown"
    assert lines[5:] == [
        "    2 x image is missing; first: sample 0 (counted from 0), id 's0': 'gone.png'",
        "    1 x image cannot be read; first: sample 1 (counted from 0), id 's0': '1.png' (UnidentifiedImageError)",
        "    1 x no conversations; first: sample 4 (counted from 0), id 7"]
    listed = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
    assert [b["index"] for b in listed] == [0, 1, 3, 4]
    assert listed[2] == {"index": 3, "id": "s0", "reason": "image is missing", "detail": "'away.png'"}


def test_the_numbers_are_those_of_the_samples(folder, capsys):
    """78 tokens with an image, and 68 without: of 100 samples, 99 have at most 78 or 68; a padded batch has 78"""
    for images, p99 in ((1, 68), (2, 78)):
        assert check(folder, GOOD[:1] * images + GOOD[1:] * (100 - images), "--show=0") == 0
        lines = capsys.readouterr().out.splitlines()
        total = 78 * images + 68 * (100 - images)
        assert lines[3].startswith(f"    {total:,} tokens ({500 / total:.1%} supervised), longest 78, "
                                   f"mean {total / 100:.0f}, p99 {p99}, {images} images")
        assert lines[4].endswith(f"batches of 16 would have {(68 * 84 + 78 * 16) / total:.2f} times as many tokens")


def test_preference_pairs_are_checked_by_their_choice(folder, capsys):
    pair = {"image": "0.png", "prompt": "q", "chosen": "It is 0.", "rejected": "No."}
    assert check(folder, [pair, pair | {"rejected": "It is 0."}], "--show=1") == 1
    out = capsys.readouterr().out
    assert "2 x preference pairs" in out and "It is 0." in out and "1 x chosen and rejected are equal" in out


def test_the_page_shows_samples_and_drops(folder):
    (folder / "1.png").write_bytes(b"<html>")
    hidden = {"conversations": [{"from": "human", "value": "<script>alert(1)</script>"}, ANSWER]}
    rows = [*GOOD * 20, hidden, *([GOOD[0] | {"image": "1.png"}] * 6), {"id": "\ud800", "text": 3}]
    assert check(folder, rows, "--show=0", f"--html={folder / 'page.html'}", "--cards=9") == 1
    text = (folder / "page.html").read_text("utf-8")
    assert text.count("<div class=card>") == 8 and text.count("<div class='card bad'>") == 4 + 1
    assert "<h2>Dropped: image cannot be read <small>6</small>" in text and text.count("class=document") == 8
    assert 0 < text.count("src=\"data:image/png;base64,") == text.count("<span class=chip>image, 9 tokens</span>")
    assert "<span class=supervised> It is 0.&lt;/s&gt;</span>" in text and "<script" not in text
    assert "http" not in text.replace("https://", "http").split("</style>")[1], "nothing is loaded"
    assert "html=/nowhere/x: No such file" in error(check, folder, rows, "--show=0", "--html=/nowhere/x")


DEFECTS = {  # what is wrong with a row -> the reason that is counted
    "image is missing": {"image": "gone.png"}, "image cannot be read": {"image": "1.png"},
    "image lies outside the image folder": {"image": "../x.png"},
    "image is a URL, and training downloads nothing": {"image": "https://example.org/0.png"},
    "image is not base64": {"image": "data:image/png;base64,?"}, "video is not supported": {"video": "a.mp4"},
    "an empty answer": {"conversations": [GOOD[0]["conversations"][0], {"from": "gpt", "value": " "}]},
    "the last question has no answer": {"conversations": GOOD[0]["conversations"][:1]},
    "unknown speaker": {"conversations": [{"from": "tool", "value": "x"}]},
    "not as many <image> markers as images": {"image": ["0.png", "0.png"]}, "no conversations": {"conversations": []}}


def test_a_dirty_file_is_counted_exactly(folder, capsys):
    """1,100 rows: 90 good ones, 90 of each of eleven defects, 20 lines that are not JSON"""
    (folder / "1.png").write_bytes(b"<html>")
    lines = [json.dumps(GOOD[0] | change) for change in ({}, *DEFECTS.values()) for _ in range(90)] + ['{"id": 1,'] * 20
    random.Random(0).shuffle(lines)
    (folder / "x.jsonl").write_text("\n".join(['{"text": "a document"}', *lines]))
    args = [str(folder / "x.jsonl"), f"--images={folder}", f"--model={folder / 'run'}", "--show=0"]
    assert check_data.main([*args, f"--bad={folder / 'bad.jsonl'}"]) == 1
    found = Counter(json.loads(line)["reason"] for line in (folder / "bad.jsonl").read_text().splitlines())
    assert found == dict.fromkeys(DEFECTS, 90) | {"not JSON": 20}
    assert ": 1101 samples, 91 good, 1010 dropped" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["json or jsonl", "tar", "several files"])
def test_the_kind_of_file_is_named(folder, capsys, kind):
    if kind == "tar":
        with tarfile.open(folder / "x.tar", "w") as tar:
            tar.add(folder / "0.png")
            (folder / "0.txt").write_text("A square.")
            tar.add(folder / "0.txt")
    (folder / "x.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    file = {"tar": "x.tar", "several files": "x.json*"}.get(kind, "x.jsonl")
    assert check_data.main([str(folder / file), f"--images={folder}", f"--model={folder / 'run'}", "--show=0"]) == 0
    assert f"    {kind}: 1 x {'captions' if kind == 'tar' else 'conversations'}" in capsys.readouterr().out


def test_max_len_is_that_of_training(folder, capsys):
    """Given, else the run's own, else the default of the training scripts; the output says which."""
    def first_line(*args):
        check(folder, GOOD, "--show=0", *args)
        return capsys.readouterr().out.splitlines()[0]
    assert f"max_len={config.Common.max_len} (the default of train_sft.py)" in first_line()
    (folder / "run" / "config.json").write_text(json.dumps({"settings": {"max_len": 77}}))
    assert f"max_len=77 (as {folder / 'run'} was trained)" in first_line()
    assert "max_len=77" in first_line(f"--model={folder / 'run' / 'model'}")
    assert "max_len=9 (as set)" in first_line("--max_len=9")


def test_the_template_is_that_of_training(folder, capsys):
    """As train_sft.py goes on from this model: stage 1's `plain` has no questions and is not inherited."""
    for about, shown in ((("chatml", "S"), "system\nS"), (("plain", ""), "USER: "), (("vicuna_v1", ""), "USER: ")):
        about = dict(zip(("template", "system"), about))
        (folder / "run" / "model" / "pumice.json").write_text(json.dumps(about))
        assert check(folder, GOOD) == 0
        out = capsys.readouterr().out
        assert shown in out and "A chat between" not in out
    assert check(folder, GOOD, "--template=mistral") == 0 and "[INST] " in capsys.readouterr().out


def test_progress_is_shown_on_stderr(folder, capsys, monkeypatch):
    times = iter(range(0, 10_000, 6))                            # seconds: it looks at the clock once a sample
    monkeypatch.setattr(check_data.time, "monotonic", lambda: next(times))
    assert check(folder, GOOD * 5, "--show=0") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1 of 10 samples, 108 s left" and len(lines) == 5


def test_the_command_exits_with_one_for_bad_samples(folder, capsys, monkeypatch):
    bad = write(folder / "bad.json", [SAMPLE, {"id": "\ud800"}])
    monkeypatch.setattr(sys, "argv", ["data.py", bad, f"--model={folder / 'run'}"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "data.py"), run_name="__main__")
    assert ended.value.code == 1 and "2 samples, 1 good, 1 dropped" in capsys.readouterr().out


def test_what_is_missing_stops_with_one_line(folder):
    good, tok = write(folder / "good.json", GOOD), f"--model={folder / 'run'}"
    for args, message in (
            ([], "usage: python data.py FILE"), (["x.json"], "usage:"), ([tok], "usage:"), (["x", "y", tok], "usage:"),
            (["x", tok, "--max_len=-1"], "max_len=-1: expected"), (["x", tok, "--image_tokens=0"], "image_tokens=0: "),
            (["none.json", tok], "no data file none.json"), (["x", "--model=nowhere"], "nowhere holds no tokenizer"),
            ([good, tok, "--images=gone"], "images=gone is not a folder"),
            ([good, tok, "--template=x"], "unknown templ"),
            ([good, tok, "--bad=/nowhere/x"], "bad=/nowhere/x: No such file")):
        assert message in error(check_data.main, args), args
    (folder / "run" / "model" / "config.json").write_text("{")
    assert "config.json: " in error(check_data.main, [good, tok])


def test_the_family_decides_the_tokens_per_image(folder, capsys):
    """InternVL: an image of 9 x 7 pixels is 4 x 3 tiles and a thumbnail, one of 64 x 32 is 2 x 1; 4 tokens each"""
    at = folder / "run" / "model"
    spec = json.loads((at / "tokenizer.json").read_text("utf-8"))
    spec["added_tokens"] += [spec["added_tokens"][0] | {"id": len(spec["model"]["vocab"]) + i, "content": t}
                             for i, t in enumerate(["<img>", "</img>"])]
    (at / "tokenizer.json").write_text(json.dumps(spec))
    (at / "config.json").write_text(json.dumps({
        "model_type": "internvl", "image_token_id": 3, "text_config": {"model_type": "llama"},
        "vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}}))
    Image.new("RGB", (64, 32)).save(folder / "1.png")
    assert check(folder, [GOOD[0], GOOD[0] | {"image": "1.png"}]) == 0
    out = capsys.readouterr().out
    assert "--- template internvl" in out and "<img>[52 x image]</img>" in out and "<img>[12 x image]</img>" in out
