"""KTO: the loss by its formula and as trl's; z0 and the gradient for any micro-batches and ranks; rows; runs."""

import json

import pytest
import test_train_dpo
import torch
from conftest import ROOT, error, fork, tiny_vlm
from safetensors.torch import load_file, save_file
from test_train_dpo import GATE, PAIRS, in_step_3, killed, model_of, off, run, step, world
from tiny_runs import rows, state

import train_dpo
from config import BadSample
from data import pack
from formats.preferences import unpaired as read_unpaired
from formats.rows import open_rows
from formats.tokenizer import Tokenizer
from images import Layout
from loss import kto_loss
from run import unpaired
from run.preference import halves

tiny = test_train_dpo.tiny                       # the fixture
LAYOUTS = [[[*range(6)]], [[0, 1, 2], [3, 4, 5]], [[5, 0], [], [3, 1, 4, 2]]]
for n, (ids, _, _) in enumerate(PAIRS):
    ids.desirable = n % 3 != 1


def known(b):
    """Reference log-probabilities (P, 2) that the key decides. z0 is then above 0"""
    return torch.stack([-b.keys / 40.0, -b.keys / 28.0], 1).double()


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(test_train_dpo, "known", known)


def settings(**changes):
    return test_train_dpo.settings(loss="kto", desirable_weight=1.0, undesirable_weight=1.33, beta=0.3, **changes)


# ---- the loss -------------------------------------------------------------------------------------------------------

def test_the_loss_and_gradient_equal_those_of_trl():
    """trl 1.16: tests/golden/trl_preference.py recorded them"""
    golden = json.loads((ROOT / "tests/golden/trl/kto.json").read_text())
    zeros = []
    for case in golden["cases"]:
        policy, before, other, other_before = (torch.tensor(case[k], dtype=torch.float64) for k in (
            "policy", "reference", "other", "other_reference"))
        good, zero = torch.arange(len(policy)) < len(policy) // 2, max(0.0, float((other - other_before).mean()))
        losses = kto_loss(policy.requires_grad_(), before, zero, good, case["beta"], case["weights"])
        assert losses.mean().item() == pytest.approx(case["value"], rel=1e-10)
        slope, = torch.autograd.grad(losses.mean(), policy)
        torch.testing.assert_close(slope, torch.tensor(case["gradient"], dtype=torch.float64), rtol=1e-10, atol=1e-12)
        zeros.append(zero)
    assert 0.0 in zeros and max(zeros) > 0


def test_an_answer_as_the_reference_costs_one_half():
    same = torch.full((2,), -700.0, dtype=torch.float64)
    assert kto_loss(same, same, 0.0, torch.tensor([True, False]), 0.1, (1.0, 3.0)).tolist() == [0.5, 1.5]
    far = torch.tensor([1e5, -1e5], dtype=torch.float64)
    assert kto_loss(far, same, 0.0, torch.tensor([False, True]), 1.0, (1.0, 1.0)).tolist() == [1.0, 1.0], "no overflow"


# ---- one step, cut in any way ---------------------------------------------------------------------------------------

def definition(s):
    """Each document alone, through all logits -> gradients, mean loss, facts"""
    model, bare, found = model_of(s.lora_r), tiny_vlm(), []
    for sample in PAIRS:
        row = []
        for n, (ids, labels, images) in enumerate(halves(sample)):
            b = pack([(ids, labels, images)], 8)

            def log_p(model):
                logits = model(*b, head=lambda hidden, weight, *_: hidden @ weight.T).log_softmax(-1)
                each = logits.gather(1, b.labels[b.labels >= 0][:, None])[:, 0]
                return each.sum() / (len(each) if s.length_norm else 1), len(each)
            (now, count), before = log_p(model), log_p(bare)[0].detach()
            if not s.lora_r:
                before = known(type("", (), {"keys": torch.tensor([sample[0].key])}))[0, n] / (
                    count if s.length_norm else 1)
            row += [now, before]
        found.append(row)
    zero = max(0.0, sum((other - before).item() for _, _, other, before in found) / 6)
    losses, facts = [], []
    for (ids, _, _), (now, before, _, _) in zip(PAIRS, found):
        gain, sign = s.beta * (now - before - zero), 1 if ids.desirable else -1
        losses.append((1.0 if ids.desirable else 1.33) * (1 - torch.sigmoid(sign * gain)))
        facts.append([sign * gain.item(), float(sign * gain > 0), zero])
    value = sum(losses) / 6
    value.backward()
    means = dict(zip(("margin", "accuracy", "kl"), torch.tensor(facts).double().mean(0).tolist()))
    for name, kind in (("chosen", True), ("rejected", False)):
        own = [row[0].item() for (ids, _, _), row in zip(PAIRS, found) if ids.desirable == kind]
        means[name] = sum(own) / len(own)
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None and (not s.lora_r or "lora_" in k)}, \
        value.item(), means


def check(found, true, s):
    (gradients, result, means), (slopes, value, facts) = found, true
    assert (gradients is None or off(gradients, slopes) < GATE) and abs(result["loss"] / value - 1) < GATE
    for name in facts if not s.length_norm else ("margin", "accuracy", "kl"):
        assert means[name] == pytest.approx(facts[name], rel=1e-6 if name in ("margin", "kl") else 1e-11), name


@pytest.mark.parametrize("changes", [{}, dict(length_norm=True), dict(lora_r=2)], ids=str)
def test_packed_answers_equal_answers_one_by_one(changes):
    s = settings(**changes)
    true = definition(s)
    assert changes or 0.2 < true[2]["kl"] < 5, "z0 counts"
    for groups in LAYOUTS if not changes else LAYOUTS[2:]:
        check(step(s, groups, loss=unpaired.unpaired_loss), true, s)


@pytest.mark.parametrize("wrap, changes", [("ddp", {}), ("fsdp", dict(lora_r=2))])
def test_two_ranks_give_the_gradient_of_one(wrap, changes, tmp_path):
    s = settings(**changes)

    def rank(r):
        found, *result = step(s, [[[0, 5], [1, 2]], [[3, 4], []]][r], world(r, 2), wrap, loss=unpaired.unpaired_loss)
        save_file({k.removeprefix("module."): v.contiguous() for k, v in found.items()}, tmp_path / f"g{r}.safetensors")
        return result
    true = definition(s)
    for r, result in enumerate(fork(2, rank, tmp_path)):
        check((load_file(tmp_path / f"g{r}.safetensors"), *result), true, s)


@pytest.mark.parametrize("name", ["z0 of each micro-batch", "gradient through z0", "no z0", "labels swapped"])
def test_a_wrong_step_would_fail_by_far(name, monkeypatch):
    s = settings()
    true, _, _ = definition(s)
    right, measure = unpaired.unpaired_loss, unpaired.measure_zero

    def wrong(s, refers, model, b):
        if name == "z0 of each micro-batch":
            b, = measure(s, world(), refers, model, [b])
        if name == "gradient through z0":
            gap = unpaired.sequence_log_probs(model, b.other, len(b.keys))[0] - refers(model, b)[:, 1]
            b = b._replace(zero=gap.mean())
        if name == "labels swapped":
            b = b._replace(desirable=~b.desirable)
        return right(s, refers, model, b._replace(zero=0.0) if name == "no z0" else b)
    groups = [[*range(6)]] if name == "gradient through z0" else [[0, 1, 2, 3], [4, 5]]
    assert off(step(s, groups, loss=wrong)[0], true) > 1e-4


# ---- rows -----------------------------------------------------------------------------------------------------------

def test_an_answer_with_a_label_is_read():
    """trl's form: texts, messages, images"""
    one = {"prompt": "What?", "completion": "a cat", "label": True}
    assert read_unpaired(one) == ([("What?", None)], "a cat", True, [], None)
    talk = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}],
            "completion": [{"role": "assistant", "content": "a dog"}], "label": False, "image": "a.png"}
    assert read_unpaired(talk) == ([("<image>\nWhat?", None)], "a dog", False, ["a.png"], "Be brief.")
    for bad in ({"label": None}, {"label": "yes"}, {"completion": None}, {"prompt": ""}, {"completion": " "}):
        with pytest.raises(BadSample):
            read_unpaired(one | bad)


def test_each_answer_lends_itself_once(tmp_path, bytes_folder):
    """A pair becomes two samples. The other answer comes from another row, and has the same kind"""
    encode = unpaired.UnpairedEncoder(Tokenizer(bytes_folder), "vicuna_v1", Layout(3, 4), 60, "")
    pairs = [{"id": i, "prompt": f"Q{i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]
    alone = [{"prompt": f"Q{i}?", "completion": f"said {i}", "label": i < 3} for i in range(5)]
    for name, made, per_row in (("pairs", pairs, 2), ("alone", alone, 1)):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in made))
        answers = unpaired.Answers(open_rows(tmp_path / name))
        samples, own, other = [encode(answers[i]) for i in range(len(answers))], [], []
        for (ids, labels, _, cut) in samples:
            texts = [encode.tok.decode([i for i, y in zip(*half[:2]) if y >= 0][:-1]).strip()
                     for half in halves((ids, labels, []))]
            own, other = [*own, texts[0]], [*other, texts[1]]
            assert texts[0][-1] != texts[1][-1] and texts[0][:3] == texts[1][:3], "another row, the same kind"
        assert len(own) == 5 * per_row and sorted(own) == sorted(other) == sorted({*own})
        assert len({ids.key for ids, *_ in samples}) == len(samples)
        good = [x.startswith("good") for x in own] if per_row == 2 else [r["label"] for r in alone]
        assert [ids.desirable for ids, *_ in samples] == good
    same = {"id": 0, "which": 0, "row": alone[0], "other": {**alone[1], "completion": alone[0]["completion"]}}
    ids, *_ = encode(same)                          # of short answers, the other one is often equal
    assert ids[: ids.first] == ids[ids.first :]
    (tmp_path / "seen").write_text("".join(json.dumps(r) + "\n" for r in (pairs[0], pairs[1] | {"image": "x.png"})))
    seen = unpaired.Answers(open_rows(tmp_path / "seen"))
    assert seen.has_images().tolist() == [False, False, True, True], "order=by_modality"
    for name, first, second in (("ab", pairs, alone), ("ba", alone, pairs)):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in (first[0], second[1])))
        mixed = unpaired.Answers(open_rows(tmp_path / name))
        mixed[0]
        with pytest.raises(BadSample, match="two files"):
            mixed[len(mixed) - 1]
    (tmp_path / "one").write_text(json.dumps(pairs[0]) + "\n")
    assert "needs two rows" in error(unpaired.Answers, open_rows(tmp_path / "one"))


# ---- runs -----------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def two_tokens(short_answers):
    """Answers to the fixed questions are short"""


@pytest.mark.parametrize("changes", [{}, dict(lora_r=2, lora_dropout=0.5)], ids=str)
def test_the_first_loss_is_one_half(changes, tiny, tmp_path):
    """To the last bit; then it falls, good answers become more probable than bad ones"""
    assert run({**tiny, "dtype": "fp64", "loss": "kto", "eval_every": 4, **changes}, tmp_path / "run") is None
    logged = [r for r in rows(tmp_path / "run/log.jsonl") if "loss" in r]
    assert logged[0]["loss"] == 0.5 and logged[0]["margin"] == logged[0]["kl"] == logged[0]["accuracy"] == 0
    assert logged[-1]["loss"] < 0.5 and logged[-1]["margin"] > 0 <= logged[-1]["kl"]
    assert [r["step"] for r in rows(tmp_path / "run/log.jsonl") if "val_loss" in r] == [4]
    assert (tmp_path / "run/reference.safetensors").exists() == (not changes)


def test_a_killed_run_ends_with_the_same_bits(tiny, tmp_path):
    tiny = {**tiny, "loss": "kto", "val_data": "", "eval_every": 0, "steps": 3}
    run(tiny, tmp_path / "one")
    killed(in_step_3, tiny, tmp_path / "two")
    run(tiny, tmp_path / "two")
    assert state(tmp_path / "one", 3) == state(tmp_path / "two", 3)


def test_unusable_answers_are_counted(tiny, tmp_path):
    """A row that cannot be read costs its own sample and that to which it lends its answer"""
    made = [{"prompt": f"Q{i}", "completion": " " if i == 2 else f"a {i}", "label": i % 2 == 0} for i in range(8)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    run({**tiny, "loss": "kto", "data": str(tmp_path / "x.jsonl"), "val_data": "", "eval_every": 0, "steps": 2,
         "max_dropped": 0.5}, tmp_path / "run")
    done = json.loads((tmp_path / "run/finished.json").read_text())
    assert (done["samples"], done["dropped"]) == (8, 2)
