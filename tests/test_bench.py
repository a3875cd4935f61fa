"""The benchmark compares what it says it compares."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_config

import bench
import data


def test_both_sides_get_the_same_words_pictures_and_labels():
    cfg = tiny_config()
    made = bench.conversations(cfg, 3, 0.7, step=2)
    packed, padded = data.pack(made, 8), bench.pad(cfg, made)
    real = padded["attention_mask"] == 1
    assert torch.equal(padded["input_ids"][real], packed.ids)
    assert len(set(real.sum(1).tolist())) == 3 and real.shape[1] == max(len(ids) for ids, _, _ in made)
    assert int((padded["labels"] >= 0).sum()) == int((packed.labels >= 0).sum())
    not_last = packed.pos.roll(-1) > 0                          # transformers shifts its labels itself
    assert torch.equal(padded["labels"][:, 1:][real[:, 1:]], packed.labels[not_last])
    assert padded["pixel_values"].shape == packed.images.shape and len(packed.images) == 3


@pytest.mark.parametrize("row", bench.ROWS)
def test_the_batches_are_as_ragged_and_as_seldom_learnt_as_real_ones(row):
    cfg, samples, spread = bench.system(row)
    batches = [bench.conversations(cfg, samples, spread, n) for n in range(1, 6)]
    real = sum(len(ids) for made in batches for ids, _, _ in made)
    padded = sum(len(made) * max(len(ids) for ids, _, _ in made) for made in batches)
    learnt = sum(i >= 0 for made in batches for _, labels, _ in made for i in labels)
    assert 1.3 < padded / real < 1.75 and 0.12 < learnt / real < 0.2


@pytest.mark.parametrize("stage", ["align", "sft"])
def test_transformers_takes_the_same_steps(stage):
    pytest.importorskip("transformers")
    text = dataclasses.replace(tiny_config().text, rms_norm_eps=1e-6)
    cfg = dataclasses.replace(tiny_config(), text=text)
    sides = [side(cfg, stage) for side in (bench.ours, bench.theirs)]
    made = [bench.conversations(cfg, 3, 0.5, n, words=20) for n in range(3)]
    mine, yours = ([step(prepare(m)) for m in made] for prepare, step in sides)
    # losses near log 512 = 6.2 in fp32, whose sums over a few hundred terms differ in the last bits; AdamW's first
    # steps are lr * sign(gradient), so a gradient that is off would move the later losses by far more than 1e-4
    assert mine == pytest.approx(yours, abs=1e-4) and abs(mine[2] - mine[0]) > 1e-3


def test_a_measurement_is_a_process_of_its_own_and_ends_in_json():
    p = subprocess.run([sys.executable, ROOT / "bench.py", "--row=toy_align", "--side=ours", "--steps=1"], text=True,
                       capture_output=True, cwd=ROOT, check=True)
    result = json.loads(p.stdout.splitlines()[-1])
    assert len(result["losses"]) == 2 and result["seconds"] > 0 and result["peak"] > result["imported"] > 2**20


def test_ratios_are_of_pairs_and_the_table_shows_them(monkeypatch, capsys):
    seconds = iter([1.0, 3.0, 5.0, 2.0, 1.0, 4.0])              # ours, theirs | theirs, ours | ours, theirs

    def child(row, side, steps):
        peak = {"ours": 2**30, "theirs": 2**31}[side]
        return {"losses": [7.0, 6.0], "seconds": next(seconds), "peak": peak, "imported": 2**20}
    monkeypatch.setattr(bench, "child", child)
    row = bench.compare("toy_sft", 3, 2)
    assert row["speed"] == 3 and row["speed_range"] == [2.5, 4] and row["memory"] == 0.5 and row["reached"]
    page = bench.table([row], bench.Settings(date="2026-01-02"), "a machine")
    assert "**3.00** (2.50 to 4.00)" in page and "2026-01-02" in page and "a machine" in page
    head, rule, cells = page.splitlines()[-3:]
    assert head.count("|") == rule.count("|") == cells.count("|")


def test_different_losses_stop_the_comparison(monkeypatch):
    monkeypatch.setattr(bench, "child", lambda row, side, steps: {"losses": [7.0 + (side == "ours")], "seconds": 1})
    with pytest.raises(AssertionError, match="not the same steps"):
        bench.compare("toy_sft", 1, 1)


@pytest.mark.parametrize("settings, complaint", [(dict(row="x"), "row=x"), (dict(device="cuda"), "only CPU rows"),
                                                 (dict(repeats=0), "at least 1"), (dict(side="x"), "ours or theirs")])
def test_wrong_settings_end_in_one_clear_line(settings, complaint):
    with pytest.raises(SystemExit, match=complaint):
        bench.main(bench.Settings(**settings))
