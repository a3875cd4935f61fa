"""Scores during a run, the best step, the early end: after a kill all are as in a run that was never stopped."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import LORA, files, refusal, rows, run, state, write_validation

import generate
from run import log
from run.best import Best
from run.checkpoint import steps_in


@pytest.fixture(scope="module")
def watched(world, tmp_path_factory):
    """Settings of six steps with an evaluation after each; the validation data have short answers"""
    file = write_validation(tmp_path_factory.mktemp("watched"), world, [("", f"a cat {i}") for i in range(6)])
    return {**world, "val_data": file, "eval_every": 1, "sample_every": 0, "save_every": 1, "keep_last": 1}


def scores(monkeypatch, values):
    """The validation loss of step i becomes values[i - 1]."""
    append = log.Log.append

    def changed(self, row, file=None):
        if "val_loss" in row:
            row = row | {"val_loss": values[row["step"] - 1]}
        append(self, row, file)
    monkeypatch.setattr(log.Log, "append", changed)


def val_rows(out):
    return [r for r in rows(out / "log.jsonl") if "val_loss" in r]


# ---- which step is the best -----------------------------------------------------------------------------------------

def seen(metric, patience, values):
    """-> Best after rows with these values, and after which of them it ended"""
    best, ended = Best(metric, patience), None
    for i, value in enumerate(values, 1):
        best.see({"step": i, "other": 5.0})
        best.see({"step": i, metric: value})
        ended = ended or (i if best.over else None)
    return best, ended


def test_the_first_of_equal_values_is_best():
    assert seen("val_loss", 0, [3.0, 2.0, 2.0, 2.5])[0].step == 2
    assert seen("val_exact", 0, [0.5, 0.7, 0.7, 0.1])[0].step == 2
    assert seen("val_loss", 0, [None, 3.0, None])[0].step == 2                  # nan and inf are null in log.jsonl
    assert seen("val_loss", 0, [None, None])[0].step == 0
    assert seen("val_loss", 0, [-1.0, -2.0])[0].step == 2                       # a loss may be negative


def test_patience_counts_evaluations_without_progress():
    values = [3.0, 2.0, 2.5, 2.0, 1.0, 1.0, 1.0, 1.0]
    assert [seen("val_loss", n, values)[1] for n in (0, 1, 2, 3, 4)] == [None, 3, 4, 8, None]
    assert seen("val_loss", 2, [None, None, 1.0])[1] == 2
    assert "val_loss was not better in 3 evaluations than 1.0000 at step 5" == seen("val_loss", 3, values)[0].why()
    assert "val_loss was not better in 2 evaluations" == seen("val_loss", 2, [None, None])[0].why()
    assert seen("reward", 1, [-2.0, -3.0])[0].why().endswith("than -2.0000 at step 1")


# ---- keep_best and patience in a run --------------------------------------------------------------------------------

def test_the_best_checkpoint_outlives_keep_last(watched, tmp_path, monkeypatch):
    """And best/ has its weights, model/ those of the last step; without keep_best training is the same."""
    scores(monkeypatch, [3.0, 1.0, 2.0, 1.0, 5.0, 4.0])
    how = {**watched, "save_every": 0}
    run("align", how, tmp_path / "plain")
    run("align", how, tmp_path / "best", keep_best="val_loss")
    assert [s for s, _ in steps_in(tmp_path / "plain")] == [6] and not (tmp_path / "plain/best").exists()
    assert [s for s, _ in steps_in(tmp_path / "best")] == [2, 6]
    assert state(tmp_path / "plain") == state(tmp_path / "best")
    for place, step in (("best/best/model", 2), ("best/model", 6), ("plain/model", 6)):
        published = load_file(tmp_path / place / "model.safetensors")
        for name, p in load_file(tmp_path / f"best/checkpoints/step_{step:07}/trained.safetensors").items():
            assert torch.equal(published[name], p.half()), (place, name)
    assert [r["step"] for r in val_rows(tmp_path / "best/best")] == [1, 2]
    card = (tmp_path / "best/best/model/README.md").read_text()
    assert "# best best" in card and "| steps | 2 |" in card and "| validation loss | 1.0 |" in card


def test_a_best_adapter_is_published_beside_the_last(watched, tmp_path, monkeypatch):
    scores(monkeypatch, [1.0, 2.0])
    run("sft", watched, tmp_path / "run", keep_best="val_loss", steps=2, eval_questions=0, **LORA)
    best, last = (load_file(tmp_path / "run" / p / "adapter/adapter_model.safetensors") for p in ("best", ""))
    assert best.keys() == last.keys() and any(not torch.equal(best[k], last[k]) for k in best)
    a, b = (generate.Chat(tmp_path / "run/best" / p, "cpu", "fp32").model.state_dict() for p in ("model", "adapter"))
    assert all(torch.equal(a[k], b[k].half().float()) for k in a)


def test_a_run_ends_early_and_publishes(watched, tmp_path, monkeypatch, capsys):
    scores(monkeypatch, [3.0, 1.0, 2.0, 1.0, 5.0, 4.0])
    how = {**watched, "save_every": 0, "sample_every": 100}
    out = tmp_path / "run"
    assert run("align", how, out, patience=2, keep_best="val_loss") is None
    said = capsys.readouterr().out
    assert "ended early after step 4/6: val_loss was not better in 2 evaluations than 1.0000 at step 2" in said
    assert [s for s, _ in steps_in(out)] == [2, 4] and {r["step"] for r in rows(out / "samples.jsonl")} == {4}
    assert json.loads((out / "finished.json").read_text())["steps"] == 4 == val_rows(out)[-1]["step"]
    before = files(out)
    run("align", how, out, patience=2, keep_best="val_loss")                   # the same command has nothing to do
    assert "is finished (4 steps): nothing to do" in capsys.readouterr().out and files(out) == before
    (out / "finished.json").unlink()                                           # killed before it was published
    shutil.rmtree(out / "model")
    run("align", how, out, patience=2, keep_best="val_loss")
    after = files(out)
    assert {k: v[0] for k, v in after.items()} == {k: v[0] for k, v in before.items()}
    run("align", how, out, patience=3, keep_best="val_loss")                   # more patience: the run goes on
    assert "ended early after step 5/6" in capsys.readouterr().out
    run("align", how, out, patience=0, keep_best="val_loss")
    run("align", how, tmp_path / "whole", keep_best="val_loss")
    assert state(out) == state(tmp_path / "whole")


LOSSES, WATCH = [3.0, 2.0, 4.0, 1.0, 1.0, 1.5], dict(keep_best="val_loss", patience=2, steps=9)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def reference(watched, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as m:
        scores(m, LOSSES)
        run("align", watched, out, **WATCH)
    return out


@pytest.mark.parametrize("at", [3, 4, 6])
def test_killed_and_resumed_decides_as_uninterrupted(at, watched, reference, tmp_path, monkeypatch):
    """Killed after the evaluation of a step, before its checkpoint: step 3 is worse than step 2, step 4 is the best,
    after step 6 patience is at its end. Kept steps, scores, published weights: all as if nothing had been"""
    scores(monkeypatch, LOSSES)
    with monkeypatch.context() as m:
        state_of = log.Log.state

        def killing(self):                                                     # called by every save
            if self.done == at:
                raise Killed
            return state_of(self)
        m.setattr(log.Log, "state", killing)
        with pytest.raises(Killed):
            run("align", watched, tmp_path, **WATCH)
    assert [r["step"] for r in val_rows(tmp_path)] == [*range(1, at + 1)]
    run("align", watched, tmp_path, **WATCH)
    assert [s for s, _ in steps_in(tmp_path)] == [s for s, _ in steps_in(reference)] == [4, 6]
    assert state(tmp_path) == state(reference)
    for kept in ("best/model/model.safetensors", "model/model.safetensors"):
        assert (tmp_path / kept).read_bytes() == (reference / kept).read_bytes()
    fixed = [[{k: r.get(k) for k in ("step", "loss", "val_loss")} for r in rows(p / "log.jsonl")]
             for p in (tmp_path, reference, tmp_path / "best", reference / "best")]
    assert fixed[0] == fixed[1] and fixed[2] == fixed[3]


def test_an_unknown_metric_stops_before_training(watched, world, tmp_path):
    line = refusal("align", watched, tmp_path / "run", keep_best="val_exact")
    assert line == "keep_best=val_exact is not logged by this run: it logs val_loss"
    line = refusal("align", world, tmp_path / "run", keep_best="val_loss")
    assert line == "keep_best=val_loss is not logged by this run: val_data is empty, so nothing is evaluated"
    assert "counts evaluations, but val_data is empty" in refusal("align", world, tmp_path / "run", patience=1)
    assert not (tmp_path / "run/log.jsonl").exists()
