"""The commands of docs/training.md that train more and more weights: in each run, exactly the named weights move."""

import dataclasses
import fnmatch
import importlib
import re
import shlex

import pytest
import torch
from conftest import ROOT
from tiny_runs import refusal

from formats import llava
from run.arguments import parse

TEXT = (ROOT / "docs/training.md").read_text("utf-8")
COMMANDS = [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()
            if "runs/grow" in line]


def weights(init):
    return llava.load_model(init=init, dtype=None)[0].state_dict()


def moved(before, after):
    assert before.keys() == after.keys()
    return {k for k in before if not torch.equal(before[k].float(), after[k].float())}


@pytest.fixture(scope="module")
def grown(world, tmp_path_factory):
    """The three commands as they are written, with the toy's towers, but two steps on tiny data -> weights before and
    after each, and its settings"""
    folder, out = tmp_path_factory.mktemp("grow"), []
    at = {f"runs/grow{n}": str(folder / f"grow{n}") for n in (1, 2, 3)}
    for launcher, file, *words in COMMANDS:
        script = importlib.import_module(file.removesuffix(".py"))
        s = parse(script.Settings, words)
        small = {**world, "vision": s.vision, "llm": s.llm, "steps": 2, "batch_size": 2, "max_len": 64, "save_every": 0,
                 "save_dtype": "fp32"}                             # fp16 would round a step of 1e-4 to nothing
        given = {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if f.name not in small}
        given |= {"init": at.get(s.init, ""), "out": at[s.out]}
        if s.init:
            before = weights(at[s.init])
        else:
            before = llava.load_model(s.vision, s.llm, connector=s.connector, dtype=None)[0].state_dict()
        assert launcher == "torchrun" and script.main(script.Settings(**small | given)) is None
        out.append((before, weights(at[s.out]), s))
    return out


def test_more_weights_train_in_every_run(grown):
    """Exactly those that the command names; all others keep their bits, through three folders."""
    counts = []
    for before, after, s in grown:
        table = dict(item.rpartition("=")[::2] for item in s.train.split())
        named = {k for k in before if any(fnmatch.fnmatchcase(k, glob) for glob in table)}
        assert moved(before, after) == named, s.train
        counts.append(len(named))
    assert counts[0] < counts[1] < counts[2] == len(grown[0][0])
    assert {k.split(".")[0] for k in moved(*grown[0][:2])} == {"multi_modal_projector"}
    layers = {re.search(r"layers\.(\d+)", k)[1] for k in moved(*grown[1][:2]) if k.startswith("language_model")}
    there = {k.split(".")[3] for k in grown[0][0] if k.startswith("language_model.model.layers")}
    assert (layers, there) == ({"2", "3"}, {"0", "1", "2", "3"}), "the last two of four"


def test_every_run_goes_on_where_one_ended(grown):
    for (_, after, _), (before, _, _) in zip(grown, grown[1:]):
        assert not moved(after, before)


def test_a_glob_that_names_nothing_is_refused(world, tmp_path):
    assert "no parameter is called" in refusal("sft", world, tmp_path / "x", lr=3e-3,
                                               train="language_model.model.layers.9.*=1e-3")
