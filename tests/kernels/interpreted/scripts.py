"""kernels=triton in the scripts: one training step and one answer, interpreted (tests/interpret.py)."""

import pytest
from tiny_runs import rows, run

import kernels.linear
import kernels.swiglu
import sample


def test_scripts_compute_the_same_with_kernels(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kernels.choice", "auto")
    found, answers, calls, op, add = {}, {}, [], kernels.swiglu.swiglu_op, kernels.linear.add_product
    added = []
    monkeypatch.setattr("kernels.linear.add_product", lambda *a, **how: (added.append(a), add(*a, **how)))
    monkeypatch.setattr("kernels.swiglu.swiglu_op", lambda *a: (calls.append(a), op(*a))[1])
    for choice in ("torch", "triton", "auto"):
        out = tmp_path / choice
        run("sft", world, out, kernels=choice, steps=1, save_every=0, batch_size=1)
        assert bool(calls) == bool(added) == (choice == "triton")
        row, = rows(out / "log.jsonl")
        found[choice] = row["loss"], row["grad_norm"]
        assert ("Triton kernels" if choice == "triton" else "plain torch") in capsys.readouterr().out
        sample.main(sample.Settings(model=str(tmp_path / "torch"), image=f"{world['images']}/0.png", kernels=choice,
                                    prompt="What is this?", device="cpu", max_new_tokens=1))
        answers[choice] = capsys.readouterr().out
        calls.clear()
        added.clear()
    assert found["auto"] == found["torch"] == pytest.approx(found["triton"], rel=1e-5)
    assert answers["triton"] == answers["auto"] == answers["torch"] != ""
