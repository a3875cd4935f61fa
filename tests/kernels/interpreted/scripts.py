"""--kernels=triton in the scripts: a training step and an answer, interpreted (tests/interpret.py)."""

import pytest
from tiny_runs import rows, run

import kernels.swiglu
import sample


def test_with_kernels_a_script_does_what_it_does_without(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kernels.choice", "auto")
    found, said, calls, op = {}, {}, [], kernels.swiglu.swiglu_op
    monkeypatch.setattr("kernels.swiglu.swiglu_op", lambda *a: (calls.append(a), op(*a))[1])
    for how in ("torch", "triton", "auto"):
        out = tmp_path / how
        run("sft", {**world, "val_data": ""}, out, kernels=how, steps=1, save_every=0)
        assert bool(calls) == (how == "triton")
        row, = rows(out / "log.jsonl")
        found[how] = row["loss"], row["grad_norm"]
        assert ("Triton kernels" if how == "triton" else "plain torch") in capsys.readouterr().out
        sample.main(sample.Settings(model=str(tmp_path / "torch"), image=f"{world['images']}/0.png", kernels=how,
                                    prompt="What is this?", device="cpu", max_new_tokens=3))
        said[how] = capsys.readouterr().out
        calls.clear()
    assert found["auto"] == found["torch"] == pytest.approx(found["triton"], rel=1e-5)
    assert said["triton"] == said["auto"] == said["torch"] != ""
