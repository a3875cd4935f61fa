"""log.jsonl: rates and counts, torn lines, samples that cannot be used, updates that were skipped."""

import functools
import json
import math
import random
import shutil
import time

import pytest
import torch
from conftest import example
from PIL import Image
from tiny_runs import refusal, rows, run

import data
import engine
import train_align
from loss import token_loss
from run import log
from run.log import Log

CPU = engine.World(0, 1, torch.device("cpu"), torch.float64)


def step_data(tokens=50, answer=4, images=0, names=4, dropped=()):
    micro = [data.pack([example(0, tokens - 1 - 4 * images, answer, images)], 8)]
    return data.StepData(micro, [f"sample {i}" for i in range(names)], list(dropped), 0, 0)


def result(loss=1.5, norm=0.25, updated=True):
    return dict(loss=loss, grad_norm=norm, updated=updated)


def test_rates_are_those_since_the_row_before(tmp_path, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    books = Log(tmp_path, CPU, steps=100, start=10, flops=dict(tokens=1000, supervised=5000, images=30_000))
    books.peak = 1e6

    def slow():
        for i in range(11):
            now[0] += 0.25
            yield i
    batches = books.timed(slow())
    for _ in range(10):
        next(batches)
        now[0] += 1.75
        books.count(0, step_data(images=1), result())
    row = books.write(19, lr=1e-3)
    assert row == dict(step=20, loss=1.5, lr=1e-3, grad_norm=0.25, tokens=50, supervised_tokens=4, tokens_per_s=25.0,
                       samples_per_s=2.0, mfu=0.05, memory=row["memory"], data_wait_s=2.5, eta=160.0, dropped=0,
                       truncated=0, animated=0, flipped=0, skipped_updates=0, drawn={})
    now[0] += 1
    books.count(20, step_data(tokens=7, names=1), result(math.nan, math.inf))
    row = books.write(20, lr=1e-3)
    assert (row["tokens_per_s"], row["samples_per_s"], row["eta"]) == (7.0, 1.0, round(21 / 11 * 79, 1))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[1], parse_constant=pytest.fail)["loss"] is None, "nan is not json"
    said = capsys.readouterr().out
    assert "step  20/100  loss 1.5000  lr 1.00e-03  norm 0.250" in said and "left 0:02:40" in said
    assert log.peak_bytes() > 2**20


def test_an_unwritable_log_costs_one_line(tmp_path, capsys):
    Log(tmp_path / "gone", CPU, 1).append({"step": 1})
    assert "log.jsonl is lost: No such file" in capsys.readouterr().out


def test_lines_after_the_checkpoint_and_torn_ones_go(tmp_path):
    file = tmp_path / "log.jsonl"
    lines = ['{"step": 1, "loss": 3}', '{"step": 2, "val_loss": 2}', '{"step": 2, "loss": 2}', '{"step": 3, "loss": 1}']
    file.write_text("\n".join([*lines, "7", "[]", '{"loss": 5}', '{"step": 4, "lo']))
    log.trim(file, 2)
    assert file.read_text().splitlines() == lines[:3] and [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]
    log.trim(file, 0)
    assert file.read_text() == ""
    log.trim(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


# ---- samples that cannot be used ------------------------------------------------------------------------------------

@pytest.mark.parametrize("share, n, most", [(0.01, 10, 3), (0.01, 100, 4), (0.01, 1000, 19), (0.01, 10**6, 10_300),
                                            (0.0, 1000, 0), (1.0, 50, 50)])
def test_the_share_of_bad_samples_has_slack(share, n, most):
    """Both sides of the limit: `most` of n samples pass and one more does not."""
    assert most <= log.tolerated(share, n) and (min(n, most + 1) > log.tolerated(share, n) or share == 1)


def test_chance_stops_no_run_and_bad_data_do():
    """Half of the tolerated share never stops a run of 5,000 samples, four times that share always does."""
    rng = random.Random(0)

    def stopped(share):
        bad = 0
        for n in range(1, 5001):
            bad += rng.random() < share
            if bad > log.tolerated(0.01, n):
                return True
    assert not any(stopped(0.005) for _ in range(40)) and all(stopped(0.04) for _ in range(10))


def test_too_many_bad_samples_stop_with_their_reasons(world, tmp_path, capsys):
    lines = open(world["data"]).read().splitlines()
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    lines[3:5] = map(json.dumps, [{"conversations": []}, {"image": "gone.png", "conversations": turns}])
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    settings = {**world, "data": str(tmp_path / "bad.jsonl"), "batch_size": 11, "steps": 2}
    line = refusal("align", settings, tmp_path / "run", max_dropped=0.0)
    assert "max_dropped=0.0" in line and ("no conversations" in line or "gone.png" in line)
    run("align", settings, tmp_path / "few")
    assert "2 of 22 samples dropped" in capsys.readouterr().out
    assert rows(tmp_path / "few" / "log.jsonl")[-1]["dropped"] == 2
    lines[5:7] = ['{"conversations": []}'] * 2
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    line = refusal("align", settings, tmp_path / "run")                        # 4 > 0.22 + 3
    assert "4 of 22" in line and "max_dropped=0.01" in line and "no conversations" in line and "gone.png" in line


def test_animated_images_are_counted(world, tmp_path, capsys):
    shutil.copytree(world["images"], tmp_path / "images")
    for i in (0, 4, 5):
        frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
        frames[0].save(tmp_path / "images" / f"{i}.png", save_all=True, append_images=frames[1:])
    run("align", world, tmp_path / "run", images=str(tmp_path / "images"), batch_size=11, steps=2)
    assert "3 images are animated, only the first frame was used" in capsys.readouterr().out
    assert rows(tmp_path / "run" / "log.jsonl")[-1]["animated"] == 3


# ---- updates that were skipped --------------------------------------------------------------------------------------

def test_a_bad_gradient_is_skipped_and_ten_stop(world, tmp_path, monkeypatch, capsys):
    """Ten in a row"""
    calls = []

    def poisoned(bad, model, batch):
        calls.append(0)
        return token_loss(model, batch) * (torch.nan if bad(len(calls)) else 1)
    settings = {**world, "max_tokens": 1000, "log_every": 100, "steps": 20}    # one micro-batch per step
    monkeypatch.setattr(train_align, "token_loss", functools.partial(poisoned, lambda call: call == 3))
    run("align", settings, tmp_path / "once", steps=6)
    assert "step 3: gradient norm nan" in capsys.readouterr().out
    assert rows(tmp_path / "once" / "log.jsonl")[-1]["skipped_updates"] == 1
    calls.clear()
    monkeypatch.setattr(train_align, "token_loss", functools.partial(poisoned, lambda call: call == 2 or call > 4))
    line = refusal("align", settings, tmp_path / "ever")
    assert "10 updates in a row" in line and "step 14" in line and "train.jsonl[" in line
    assert "NaN" not in (tmp_path / "once" / "log.jsonl").read_text()


def test_counts_come_back_with_the_checkpoint(tmp_path):
    books = Log(tmp_path, CPU, steps=9, max_dropped=0.5)
    first = step_data(dropped=[("a[1]", "no image: x.png")])._replace(flipped=2, drawn={"a": 3, "b": 2})
    books.count(0, first, result(updated=False))
    kept = json.loads(json.dumps(books.state()))
    again = Log(tmp_path, CPU, steps=9, start=1, max_dropped=0.5, state=kept)
    again.count(1, step_data(dropped=[("a[7]", "no image: y.png")])._replace(flipped=1, drawn={"a": 5}), result())
    assert again.seen == dict(samples=10, dropped=2, truncated=0, animated=0, flipped=3, skipped_updates=1)
    assert again.drawn == dict(a=8, b=2)
    assert {k: tuple(v) for k, v in again.reasons.items()} == {"no image": (2, "a[1]: no image: x.png")}
    assert again.summary() == "; 2 of 10 samples dropped, 0 truncated"
