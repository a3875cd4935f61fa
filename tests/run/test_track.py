"""--track: fake packages record their calls; what they get are the numbers of log.jsonl."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
from conftest import fork
from tiny_runs import SCRIPTS, refusal, rows, run

from run import track

KINDS = "trackio", "wandb", "tensorboard"


@pytest.fixture
def calls(monkeypatch):
    """Fake packages -> [how each run of a tracker began], [(numbers, step)], [functions that the end of the process
    calls]. add_scalar of one step is one entry."""
    began, sent, ends = [], [], []
    monkeypatch.setattr(track, "atexit", SimpleNamespace(register=ends.append))
    for kind in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, kind, SimpleNamespace(
            init=lambda kind=kind, **how: began.append((kind, how)), finish=f"finish {kind}",
            log=lambda values, step: sent.append((values, step))))

    class SummaryWriter:
        close = "close"

        def __init__(self, folder, purge_step):
            began.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            if not sent or sent[-1][1] != step or name in sent[-1][0] or name == "val_loss":
                sent.append(({}, step))
            sent[-1][0][name] = value
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    return began, sent, ends


def numbers(out):
    return [({k: v for k, v in r.items() if isinstance(v, int | float) and k != "step"}, r["step"])
            for r in rows(out / "log.jsonl")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracker_gets_the_numbers_of_the_log(kind, validated, tmp_path, calls, monkeypatch, short_answers):
    """Killed and resumed: the second run of the tracker gets all lines, those of the steps before, too."""
    began, sent, ends = calls
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    out = tmp_path / "run"
    run("align", {**validated, "steps": 4}, out, track=kind)
    assert sent == numbers(out) and [step for _, step in sent] == [1, 2, 3, 3, 4, 4]
    assert "val_loss" in sent[3][0] and sent[0][0]["loss"] > 0
    del sent[:]
    run("align", validated, out, track=kind)
    assert sent == numbers(out) and [step for _, step in sent] == [1, 2, 3, 3, 4, 4, 5, 6, 6]
    settings = SCRIPTS["align"].Settings(**{**validated, "lr": 2e-3, "steps": 4, "track": kind, "out": str(out)})
    if kind == "tensorboard":
        assert began == [(str(out / "tensorboard"), 0)] * 2 and len(ends) == 2
    else:
        assert [(k, how["project"], how["name"]) for k, how in began] == [
            (kind, "mine" if kind == "wandb" else "pumice", "run")] * 2 and ends == [f"finish {kind}"] * 2
        assert began[0][1]["config"] | {"template": "plain"} == dataclasses.asdict(settings) | {"image_aspect": "pad"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_one_line(kind, world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if kind == "tensorboard" else kind, None)
    line = refusal("align", world, tmp_path / "run", track=kind)
    assert line.startswith(f"track={kind}: ") and line.endswith(f"(pip install {kind})") and "\n" not in line
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_without_track_nothing_is_imported(world, tmp_path, monkeypatch):
    for kind in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, kind, None)
    run("align", world, tmp_path / "run", steps=1)


def test_only_rank_0_sends(world, tmp_path, calls):
    def rank(number):
        run("align", world, tmp_path / "run", steps=2, track="wandb")
        return [len(x) for x in calls[:2]]
    assert fork(2, rank, tmp_path) == [[1, 2], [0, 0]]


@pytest.mark.parametrize("place", ["init", "log"])
def test_an_error_of_a_tracker_ends_it_alone(place, world, tmp_path, calls, monkeypatch, capsys):
    """One warning; training goes on, and its log is that of a run without a tracker."""
    began, sent, _ = calls

    def fail(*args, **how):
        sent.append("failed")
        raise ConnectionError("no network\nsecond line")
    monkeypatch.setattr(sys.modules["wandb"], place, fail)
    run("align", world, tmp_path / "run", steps=3, track="wandb")
    run("align", world, tmp_path / "plain", steps=3)
    assert sent == ["failed"] and len(began) == (place == "log")
    assert capsys.readouterr().err.count("track=wandb ends here: ConnectionError: no network\n") == 1
    losses = [[r["loss"] for r in rows(tmp_path / name / "log.jsonl") if "loss" in r] for name in ("run", "plain")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_line_that_is_lost_is_not_sent(tmp_path, calls):
    """A full disk has cut a line, or the file is missing"""
    send = track.tracker("wandb", tmp_path, {})
    send()
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "mfu": null, "drawn": {}}\n{"step": 2, "lo\n')
    send()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1.0}\n')
    send()
    assert calls[1] == [({"loss": 2.0}, 1), ({"loss": 1.0}, 3)] and len(calls[0]) == 1
