"""Validation on the way: its loss, its questions, and that looking changes nothing; --overfit."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_runs import LORA, files, refusal, rows, run, state

import data
from formats import configs, llava
from images import Layout
from loss import supervised, token_loss
from run.log import Log


def test_looking_leaves_the_weights_bit_equal(world, validated, tmp_path, short_answers):
    """Validation, questions and a loader process; with dropout, so that one more random number would show"""
    run("sft", validated, tmp_path / "looked", **LORA)
    run("sft", world, tmp_path / "blind", **LORA)
    run("sft", world, tmp_path / "worker", workers=1, **LORA)
    looked, blind, worker = (state(tmp_path / n) for n in ("looked", "blind", "worker"))
    assert looked == blind == worker


def test_the_validation_loss_counts_every_sample_once(validated, aligned):
    model, folder = llava.load_model(validated["vision"], validated["llm"])
    model.multi_modal_projector.load_state_dict({k.removeprefix("multi_modal_projector."): v for k, v in load_file(
        aligned / "checkpoints/step_0000006/trained.safetensors").items()})
    encode = data.Encoder(folder.tok, "plain", Layout(model.cfg.image_token_index, 4), 48, "")
    spec = configs.image_spec(folder.pre, "pad")

    def mean(steps, indices):
        micro = [b for i in indices for b in steps[i].micro]
        with torch.no_grad():
            return sum(token_loss(model, b).item() for b in micro) / sum(supervised(b.labels) for b in micro)
    truth = mean(data.Steps(validated["val_data"], validated["images"], encode, spec, 1, 96, 0), range(5))
    wraps = mean(data.Steps(validated["val_data"], validated["images"], encode, spec, 4, 96, 0), range(2))
    found = rows(aligned / "log.jsonl")[-1]
    assert found["step"] == 6 and abs(found["val_loss"] / truth - 1) < 2e-6 < 1e-4 < abs(wraps / truth - 1)


def test_questions_that_cannot_be_asked_are_left_out(validated, tmp_path, capsys, short_answers):
    val = rows(Path(validated["val_data"]))
    val[0]["conversations"][0]["value"] += "\ud800"
    val[1]["conversations"][1]["value"] += "\ud800"
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in val))
    run("sft", {**validated, "val_data": str(tmp_path / "val.jsonl")}, tmp_path / "run", steps=3)
    assert "(2 of 5 samples could not be used)" in capsys.readouterr().out
    assert [r["id"] for r in rows(tmp_path / "run" / "samples.jsonl")] == [102, 104]


def test_data_of_bad_samples_alone_make_no_model(world, tmp_path):
    """Validation data stop at the start, whatever eval_every says; training data at the end, where all may be bad."""
    (tmp_path / "bad.jsonl").write_text("{}\n" * 9)
    how = {**world, "eval_every": 0, "sample_every": 0, "val_data": str(tmp_path / "bad.jsonl")}
    line = refusal("align", how, tmp_path / "run")
    assert line.startswith(f"{tmp_path / 'bad.jsonl'}: no sample can be used; bad.jsonl[") and "\n" not in line
    assert not (tmp_path / "run").exists()
    how |= {"val_data": "", "data": str(tmp_path / "bad.jsonl"), "max_dropped": 1.0, "save_every": 0}
    for _ in range(2):                                                         # also where it goes on
        line = refusal("align", how, tmp_path / "run")
        assert line == "no update was made in 6 steps (24 of 24 samples dropped), so no model is written"
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "finished.json").exists()


def test_validation_images_may_go_while_training(validated, tmp_path, monkeypatch, capsys):
    shutil.copytree(validated["images"], tmp_path / "images")
    lines = [r for r in open(validated["val_data"]) if '"image"' in r]
    (tmp_path / "val.jsonl").write_text("".join(lines))
    count = Log.count

    def vanishing(self, *args):
        for r in lines:
            (tmp_path / "images" / json.loads(r)["image"]).unlink(missing_ok=True)
        count(self, *args)
    monkeypatch.setattr(Log, "count", vanishing)
    how = {**validated, "images": str(tmp_path / "images"), "val_data": str(tmp_path / "val.jsonl"), "eval_every": 1}
    run("align", how, tmp_path / "run", steps=2)
    assert "validation loss nan (4 of 4 samples could not be used)" in capsys.readouterr().out
    assert [r["val_loss"] for r in rows(tmp_path / "run" / "log.jsonl") if "val_loss" in r] == [None, None]


def test_overfitting_says_yes_and_leaves_the_run_alone(world, tmp_path, capsys):
    out = tmp_path / "run"
    run("sft", world, out, steps=1)
    before = files(out)
    how = dict(overfit=True, lr=1e-2, batch_size=2, log_every=100)
    assert run("sft", world, out, steps=40, **how) == 0
    assert "overfit: yes (" in capsys.readouterr().out
    assert {k: v for k, v in files(out).items() if not k.startswith("overfit")} == before
    assert not (out / "overfit" / "checkpoints").exists()
    assert run("sft", world, out, steps=1, **how) == 1
    assert "overfit: no (" in capsys.readouterr().out
    (tmp_path / "bad.jsonl").write_text("{}\n" * 9)
    assert run("sft", world, out, data=str(tmp_path / "bad.jsonl"), max_dropped=1.0, steps=1, overfit=True) == 1
    assert "overfit: no (0 of 0 " in capsys.readouterr().out
