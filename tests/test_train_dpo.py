"""Preference: losses by their formulas; one gradient for any micro-batches and ranks; the reference; train_dpo.py."""

import gc
import json
import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.fsdp  # before the forks: else each rank imports it
from conftest import ROOT, error, example, fork, step_of_the_loop, tiny_vlm
from conftest import cpu_world as world
from safetensors.torch import load_file, save_file
from test_distributed import Spy
from test_train import split
from tiny_runs import rows, state, write_data

import engine
import lora
import loss
import train_align
import train_dpo
from config import BadSample, Error
from data import StepData, pack
from formats.tokenizer import Tokenizer
from images import Layout
from model import VLM
from run import preference, reference
from run.log import Log
from tools import pairs

GATE = 1e-12


# ---- the losses -----------------------------------------------------------------------------------------------------

def log_ps(P=7):
    """policy, reference (P, 2): log p between -8 and 0"""
    g = torch.Generator().manual_seed(0)
    return [-8 * torch.rand(P, 2, generator=g, dtype=torch.float64) for _ in range(2)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def odds(log_p):
    return math.exp(log_p) / (1 - math.exp(log_p))


FORMULAS = {"dpo": lambda c, r, c0, r0, beta, gamma: -math.log(sigmoid(beta * (c - c0) - beta * (r - r0))),
            "ipo": lambda c, r, c0, r0, beta, gamma: (math.log(math.exp(c - r) * math.exp(r0 - c0)) - 0.5 / beta) ** 2,
            "simpo": lambda c, r, c0, r0, beta, gamma: -math.log(sigmoid(beta * c - beta * r - gamma)),
            "orpo": lambda c, r, c0, r0, beta, gamma: -beta * math.log(sigmoid(math.log(odds(c) / odds(r))))}


@pytest.mark.parametrize("kind", FORMULAS)
def test_losses_equal_the_formulas(kind):
    policy, before = log_ps()
    for beta, gamma in ((0.1, 0.5), (2.0, 1.4)):
        ours = train_dpo.METHODS[kind].loss(policy, before, beta, gamma)
        true = [FORMULAS[kind](*p, *q, beta, gamma) for p, q in zip(policy.tolist(), before.tolist())]
        torch.testing.assert_close(ours, torch.tensor(true, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_losses_and_gradients_equal_those_of_trl():
    """trl 1.16: tests/golden/trl_preference.py recorded them. Its ORPO rounds to float32."""
    golden = json.loads((ROOT / "tests/golden/trl/preference.json").read_text())
    lengths, before = (torch.tensor(golden[k], dtype=torch.float64) for k in ("lengths", "reference"))
    assert {case["loss"] for case in golden["cases"]} == set(FORMULAS)
    for case in golden["cases"]:
        policy = torch.tensor(golden["policy"], dtype=torch.float64, requires_grad=True)
        method = train_dpo.METHODS[case["loss"]]
        unit = lengths if case["length_norm"] else 1
        value = method.loss(policy / unit, before / unit, case["beta"], case["gamma"]).mean()
        slope, = torch.autograd.grad(value, policy)
        gate = 1e-6 if case["loss"] == "orpo" else 1e-10
        assert value.item() == pytest.approx(case["value"], rel=gate), case
        torch.testing.assert_close(slope, torch.tensor(case["gradient"], dtype=torch.float64), rtol=gate, atol=gate)


def test_edges_of_the_losses():
    policy, before = log_ps()
    assert loss.dpo_loss(policy, policy, 0.1, 0)[0].item() == math.log(2), "to the last bit"
    policy.requires_grad_()
    for beta in (1e-9, 0.1, 3.0):                                    # at the reference the gradient is beta / 2
        slope, = torch.autograd.grad(loss.dpo_loss(policy, policy.detach(), beta, 0).sum(), policy)
        assert (slope == torch.tensor([-beta / 2, beta / 2], dtype=torch.float64)).all()
    slopes = [torch.autograd.grad(loss.dpo_loss(policy, before, beta, 0).sum(), policy)[0] for beta in (1e-8, 1e-7)]
    assert slopes[1].abs().max() < 1e-7 and (slopes[1] / slopes[0] - 10).abs().max() < 1e-5, "beta -> 0 does nothing"
    certain = torch.zeros(1, 2).requires_grad_()                     # p = 1 to the last bit
    value = loss.orpo_loss(certain, before[:1], 1.0, 0)
    assert value.isfinite().all() and torch.autograd.grad(value.sum(), certain)[0].isfinite().all()
    far = torch.tensor([[-3000.0, 0.0]], dtype=torch.float64)
    assert loss.dpo_loss(far, 0 * far, 1.0, 0).item() == 3000.0, "no overflow"


# ---- one step, cut in any way ---------------------------------------------------------------------------------------

def pair(seed):
    """ids (TwoDocuments), labels, images: two answers of different length to one question, about 0 to 2 images"""
    images = seed % 3
    chosen, labels, pixels = example(seed, 9 + seed, 2 + seed, images)
    other, more, _ = example(seed + 50, 12, 5, images)
    ids = preference.TwoDocuments(chosen + other)
    ids.first, ids.key = len(chosen), 1000 - seed
    return ids, labels + more, pixels


PAIRS = [pair(seed) for seed in range(6)]
LAYOUTS = [[[*range(6)]], [[0, 1, 2], [3, 4, 5]], [[i] for i in range(6)], [[5, 0], [], [3, 1, 4, 2]]]


def settings(**changes):
    return train_dpo.Settings(**{"loss": "dpo", "lora_r": 0, "grad_clip": 0.0, **changes})


def model_of(lora_r=0):
    """A model whose reference differs from it; with lora_r, by its adapters"""
    model = tiny_vlm()
    if lora_r:
        lora.add_adapters(model, lora_r, 8.0, 0.0, "all-linear")
        torch.manual_seed(1)
        for n, p in model.double().named_parameters():
            if "lora_" in n:
                torch.nn.init.normal_(p, std=0.1)
    return model


def known(b):
    """Reference log-probabilities (P, 2) that the key decides"""
    return torch.stack([-b.keys / 40.0, -b.keys / 50.0], 1).double()


def step(s, groups, w=None, wrap=None, samples=PAIRS, loss=None):
    """-> gradients by name, result, facts: one step by the lines of the script"""
    w, model = w or world(), model_of(s.lora_r)
    engine.choose(model, {"*.lora_*": 1e-2} if s.lora_r else {"*": 1e-2}, torch.float64)
    model = engine.parallelize(model, w, model.blocks, wrap)
    refers = reference.without_adapters if s.lora_r else lambda model, b: known(b)
    form = train_dpo.METHODS[s.loss].form
    micro = [form.steps.pack([samples[i] for i in group], 8) for group in groups]
    spy = Spy(model)
    names = dict(model=model, optimizer=spy, batch=StepData(micro, [], [], 0, 0), world=w, s=s, step=0, start=0,
                 engine=engine, pair_loss=partial(loss or train_dpo.preference_loss, s, refers),
                 measured=partial(form.measured, s, w, refers))
    exec(step_of_the_loop("train_dpo.py"), names)
    return spy.seen, names["result"], preference.means(names["facts"], names["n"], w)


def definition(s):
    """Each document alone, through all logits -> gradients, mean loss, facts"""
    model, losses, facts = model_of(s.lora_r), [], []
    bare, method = tiny_vlm(), train_dpo.METHODS[s.loss]
    for ids, labels, images in PAIRS:
        halves = [(ids[: ids.first], labels[: ids.first]), (ids[ids.first :], labels[ids.first :])]

        def log_ps_of(model):
            out = []
            for i, y in halves:
                b = pack([(i, y, images)], 8)
                logits = model(*b, head=lambda hidden, weight, *_: hidden @ weight.T).log_softmax(-1)
                out.append(logits.gather(1, b.labels[b.labels >= 0][:, None])[:, 0])
            return out
        parts = log_ps_of(model)
        with torch.no_grad():
            before = (torch.stack([x.sum() for x in log_ps_of(bare)]) if s.lora_r else
                      known(SimpleNamespace(keys=torch.tensor([ids.key])))[0])
        n = torch.tensor([float(len(x)) for x in parts])
        policy = torch.stack([x.sum() for x in parts])
        unit = n if s.length_norm or method.per_token else 1.0
        value = method.loss((policy / unit)[None], (before / unit)[None], s.beta, s.gamma)[0]
        value = value - (method.sft if s.sft < 0 else s.sft) * parts[0].mean()
        reward = s.beta * (policy - before) / unit
        losses.append(value)
        facts.append([(reward[0] - reward[1]).item(), float(reward[0] > reward[1]),
                      ((policy - before) ** 2 / 2).mean().item(), *policy.tolist()])
    total = sum(losses) / len(PAIRS)
    total.backward()
    means = dict(zip(preference.FACTS, torch.tensor(facts, dtype=torch.float64).mean(0).tolist()))
    return {k: p.grad for k, p in model.named_parameters() if not s.lora_r or "lora_" in k}, total.item(), means


def off(found, true):
    assert found.keys() == true.keys()
    return max(((found[k] - true[k]).norm() / true[k].norm()).item() for k in true
               if not k.endswith("k_proj.bias") and true[k].norm() > 0)


VARIANTS = [dict(), dict(length_norm=True, sft=0.3), dict(loss="ipo", beta=0.5), dict(loss="simpo", beta=2.0),
            dict(loss="orpo"), dict(lora_r=2), dict(lora_r=2, loss="ipo", length_norm=True)]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_packed_pairs_equal_pairs_one_by_one(changes):
    s = settings(**changes)
    true, value, facts = definition(s)
    for groups in LAYOUTS if not changes else LAYOUTS[3:]:
        found, result, means = step(s, groups)
        assert off(found, true) < GATE and abs(result["loss"] / value - 1) < GATE
        for name in facts if train_dpo.METHODS[s.loss].refers else ("chosen", "rejected"):
            assert means[name] == pytest.approx(facts[name], rel=1e-11), name


@pytest.mark.parametrize("wrap, changes, groups", [
    ("ddp", {}, [[[0, 5], [1, 2]], [[3, 4], []]]), ("fsdp", dict(sft=0.3), [[[0, 5], [1, 2]], [[3, 4], []]]),
    ("fsdp", dict(lora_r=2), [[[0, 1, 2, 3]], [[4, 5]]])])
def test_two_ranks_give_the_gradient_of_one(wrap, changes, groups, tmp_path):
    s = settings(**changes)

    def rank(r):
        found, *result = step(s, groups[r], world(r, 2), wrap)
        save_file({k.removeprefix("module."): v.contiguous() for k, v in found.items()},
                  tmp_path / f"g{r}.safetensors")
        return result
    true, value, facts = definition(s)
    for r, (result, means) in enumerate(fork(2, rank, tmp_path)):
        assert off(load_file(tmp_path / f"g{r}.safetensors"), true) < GATE and abs(result["loss"] / value - 1) < GATE
        assert all(means[name] == pytest.approx(facts[name], rel=1e-11) for name in facts)


@pytest.mark.parametrize("name", ["mean of means", "answers that read each other", "swapped", "reference trained"])
def test_a_wrong_pair_would_fail_by_far(name, monkeypatch):
    true, value, _ = definition(settings())
    right = train_dpo.preference_loss

    def wrong(s, before, model, b):
        if name == "mean of means":
            return tuple(x / len(b.keys) * 3 for x in right(s, before, model, b))
        if name == "answers that read each other":
            first = b.batch.pos == 0
            document = first.cumsum(0) - 1
            start = first.nonzero()[:, 0].int()
            b = b._replace(batch=b.batch._replace(lo=start[document - document % 2]))
        return right(s, (lambda m, b: known(b).flip(1)) if name == "swapped" else
                     (lambda m, b: 0 * known(b)) if name == "reference trained" else before, model, b)
    monkeypatch.setattr(train_dpo, "preference_loss", wrong)
    assert off(step(settings(), [[0, 1, 2, 3], [4, 5]])[0], true) > 1e-4


def test_adamw_hides_a_small_beta():
    """Gradients fall with beta, to 0. AdamW divides by their size: steps shrink only if it is below its eps, 1e-8"""
    slopes = {beta: step(settings(beta=beta), [[*range(6)]])[0] for beta in (1e-1, 1e-4, 1e-7, 1e-12)}
    assert off({k: 1e5 * g for k, g in slopes[1e-12].items()}, slopes[1e-7]) < 1e-5, "in proportion to beta"
    moved = {}
    for beta, gradients in slopes.items():
        model = tiny_vlm()
        optimizer = engine.adamw(model, engine.choose(model, {"*": 1e-2}, torch.float64), 0.0)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            p.grad = gradients[n]
        optimizer.step()
        moved[beta] = sum((p - before[n]).abs().sum().item() for n, p in model.named_parameters())
    assert moved[1e-4] > 0.9 * moved[0.1] and moved[1e-12] < 1e-3 * moved[0.1]


def test_there_is_one_model(tiny, tmp_path, monkeypatch):
    """The reference needs no second copy of the weights"""
    def models():
        return sum(type(x) is VLM for x in gc.get_objects())
    seen, right = [], train_dpo.preference.means
    monkeypatch.setattr(train_dpo.preference, "means", lambda *a: seen.append(models()) or right(*a))
    gc.collect()
    there = models()
    run({**tiny, "steps": 1, "eval_every": 0, "save_every": 0}, tmp_path / "run")
    assert seen == [there + 1]


def test_adapters_are_back_after_the_reference():
    model = model_of(2)
    b = preference.pack_pairs(PAIRS, 8)
    before = loss.sequence_log_probs(model, b.batch, 2 * len(PAIRS))[0]
    bare = loss.sequence_log_probs(tiny_vlm(), b.batch, 2 * len(PAIRS))[0].view(-1, 2)
    rng = torch.get_rng_state()
    with reference.adapters_off(model), pytest.raises(KeyError):
        raise KeyError
    assert torch.equal(reference.without_adapters(model, b), bare), "to the last bit"
    after = loss.sequence_log_probs(model, b.batch, 2 * len(PAIRS))[0]
    assert torch.equal(after, before) and torch.equal(torch.get_rng_state(), rng)


# ---- rows -----------------------------------------------------------------------------------------------------------

def row(chosen="a cat", rejected="a dog", **more):
    return {"prompt": "What is this?", "chosen": chosen, "rejected": rejected, **more}


@pytest.fixture
def encode(bytes_folder):
    return preference.PreferenceEncoder(Tokenizer(bytes_folder), "vicuna_v1", Layout(3, 4), 30, "")


def test_only_the_compared_answer_is_supervised(encode):
    ids, labels, _, cut = encode({"messages": [
        {"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "?!"}],
        "chosen": {"role": "assistant", "content": "cat"}, "rejected": {"role": "assistant", "content": "dogs"}})
    for part, marks, answer in ((ids[: ids.first], labels[: ids.first], "cat"), (ids[ids.first :], labels[ids.first :],
                                                                                "dogs")):
        prompt, _ = encode.encode([("?", "Yes"), ("?!", None)])
        own = part[len(prompt):]
        assert part[: len(prompt)] == prompt and encode.tok.decode(own[:-1]).strip() == answer and cut == 0
        assert marks == [-100] * len(prompt) + own, "the answer and its EOS"


def test_pairs_that_cannot_be_used(encode):
    for bad, says in ((row("a cat", " a cat "), "equal"), (row(rejected=""), "empty"),
                      (row("x" * 90, "x" * 91), "equal"),
                      ({"prompt": "?" * 90, "chosen": "a", "rejected": "b"}, "longer than max_len"),
                      ({"prompt": "?", "chosen": "a"}, "no pair"),
                      (row(image="x.png", prompt="<image> <image>"), "markers")):
        with pytest.raises(BadSample, match=says):
            encode(bad)
    ids, labels, _, cut = encode(row("cat " * 30))
    assert ids.first == 30 and cut > 0


def test_keys_tell_pairs_apart(encode):
    """By answers, their order, question and image"""
    one = [row(), row(rejected="a cow"), row("a dog", "a cat"), row(image="a.png"), row(image="b.png"),
           row(prompt="What is that?")]
    keys = [encode(r)[0].key for r in one]
    assert len(set(keys)) == len(one) and keys == [encode(r | {"id": 1})[0].key for r in one]


# ---- the script -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Settings of a run of four steps of four pairs. From towers that were never trained together"""
    from tiny_runs import write_towers
    at = write_towers(tmp_path_factory.mktemp("dpo"))
    for name, n, seed in (("train.jsonl", 18, 0), ("val.jsonl", 5, 100)):
        found = []
        for r in rows(write_data(at, name, n, seed)):
            human, gpt = (turn["value"] for turn in r.pop("conversations"))
            found.append(r | {"prompt": human, "chosen": gpt, "rejected": gpt.replace("cat", "dog")})
        (at / name).write_text("".join(json.dumps(r) + "\n" for r in found))
    return dict(data=str(at / "train.jsonl"), images=str(at / "images"), val_data=str(at / "val.jsonl"), init="",
                vision=str(at / "vision"), llm=str(at / "llm"), template="vicuna_v1", system="", device="cpu",
                batch_size=4, max_len=48, max_tokens=200, steps=4, save_every=2, log_every=1, eval_every=2,
                sample_every=0, lr=2e-3)


def run(settings, out, **changes):
    return train_dpo.main(train_dpo.Settings(**{**settings, "out": str(out), **changes}))


@pytest.fixture(autouse=True)
def two_tokens(short_answers):
    """Answers to the fixed questions are short"""


@pytest.mark.parametrize("changes", [{}, dict(lora_r=2, lora_dropout=0.5), dict(lora_r=2, connector_lr=1e-3)], ids=str)
def test_the_first_loss_is_log_2(changes, tiny, tmp_path):
    """To the last bit; then it falls, and the log says why"""
    assert run({**tiny, "dtype": "fp64", "eval_every": 4, **changes}, tmp_path / "run") is None
    logged = [r for r in rows(tmp_path / "run/log.jsonl") if "loss" in r]
    assert logged[0]["loss"] == math.log(2) and logged[0]["margin"] == logged[0]["kl"] == logged[0]["accuracy"] == 0
    assert logged[-1]["loss"] < math.log(2) and logged[-1]["margin"] > 0 < logged[-1]["kl"]
    assert set(preference.FACTS) < set(logged[0]) and logged[0]["chosen"] < 0
    seen = [r for r in rows(tmp_path / "run/log.jsonl") if "val_loss" in r]
    assert [r["step"] for r in seen] == [4] and 0 <= seen[0]["val_accuracy"] <= 1
    alone = changes == dict(lora_r=2, lora_dropout=0.5)
    assert (tmp_path / "run/reference.safetensors").exists() != alone, "adapters alone need no pass"
    assert (tmp_path / "run/model/model.safetensors").exists() and (tmp_path / "run/samples.jsonl").exists()


def killed(when, *args, **how):
    """Run in a child process that kills itself where `when` says"""
    if not (child := os.fork()):
        try:
            when()
            run(*args, **how)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def in_step_3():
    count = Log.count
    Log.count = lambda log, step, *rest: os.kill(os.getpid(), signal.SIGKILL) if step == 2 else count(log, step, *rest)


def in_the_pass():
    """Behind the first file that the pass wrote"""
    write, reference.EVERY = reference.Table.write, 1
    reference.Table.write = lambda table: (write(table), table.done == 2 and os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("when, changes", [(in_step_3, {}), (in_step_3, dict(lora_r=2, lora_dropout=0.5)),
                                           (in_the_pass, {})])
def test_a_killed_run_ends_with_the_same_bits(when, changes, tiny, tmp_path):
    changes = {**changes, "steps": 3, "eval_every": 0}
    run(tiny, tmp_path / "one", **changes)
    killed(when, tiny, tmp_path / "two", **changes)
    left = tmp_path / "two/reference.safetensors"
    assert "lora_r" in changes or left.exists()
    run(tiny, tmp_path / "two", **changes)
    assert state(tmp_path / "one", 3) == state(tmp_path / "two", 3)
    if "lora_r" not in changes:
        one, two = (load_file(p / "reference.safetensors") for p in (tmp_path / "one", tmp_path / "two"))
        assert all(torch.equal(one[k], two[k]) for k in one) and len(one["keys"]) == 12 + 5


def test_a_table_is_computed_once(tiny, tmp_path, monkeypatch, capsys):
    """Again only if it is damaged, or if the model is another"""
    tiny = {**tiny, "steps": 1, "eval_every": 0}
    run(tiny, tmp_path / "run")
    passes, file = [], tmp_path / "run/reference.safetensors"
    read = preference.PreferenceBatch.log_probs
    monkeypatch.setattr(preference.PreferenceBatch, "log_probs", lambda *a: passes.append(1) or read(*a))
    shutil.rmtree(tmp_path / "run/checkpoints"), (tmp_path / "run/finished.json").unlink()
    run(tiny, tmp_path / "run")
    assert not passes
    blob = file.read_bytes()
    for changes, broken in (({}, blob[:-8] + b"\0" * 8), ({}, blob[:100]), (dict(seed=1, resume="none"), blob)):
        file.write_bytes(broken)
        passes.clear(), shutil.rmtree(tmp_path / "run/checkpoints"), (tmp_path / "run/finished.json").unlink()
        run(tiny, tmp_path / "run", **changes)
        assert passes and "computed again" in capsys.readouterr().out


def test_two_processes_train_what_one_does(tiny, tmp_path):
    for name, changes in (("ddp", dict(lora_r=2)), ("fsdp", {})):
        settings = {**tiny, "dtype": "fp64", "steps": 2, "save_every": 2, **changes}
        run(settings, tmp_path / name / "one")
        fork(2, lambda rank: run(settings, tmp_path / name / "two", parallel=name), tmp_path / name)
        one, two = (load_file(tmp_path / name / p / "checkpoints/step_0000002/trained.safetensors")
                    for p in ("one", "two"))
        assert off(two, one) < 1e-9
        for x, y in zip(*(rows(tmp_path / name / p / "log.jsonl") for p in ("one", "two")), strict=True):
            for key in ("loss", "val_loss", "val_accuracy", *preference.FACTS):
                assert x.get(key, 0) == pytest.approx(y.get(key, 0), rel=1e-8, abs=1e-12), key


@pytest.mark.parametrize("kind", ["ipo", "simpo", "orpo"])
def test_other_losses_fall(kind, tiny, tmp_path):
    run(tiny, tmp_path / "run", loss=kind, eval_every=0, save_every=0)
    logged = [r for r in rows(tmp_path / "run/log.jsonl") if "loss" in r]
    assert logged[-1]["loss"] < logged[0]["loss"] and logged[-1]["margin"] > logged[0]["margin"]
    assert (logged[0]["kl"] is None) == (kind != "ipo") == (not (tmp_path / "run/reference.safetensors").exists())


def test_bad_pairs_are_counted(tiny, tmp_path):
    bad = [row("a", "a"), row(rejected=" "), row(image="nowhere.png"), row(prompt="")]
    file = tmp_path / "bad.jsonl"
    file.write_text(Path(tiny["data"]).read_text() + "".join(json.dumps(r) + "\n" for r in bad))
    run({**tiny, "data": str(file), "steps": 0, "epochs": 1.0, "max_dropped": 0.5}, tmp_path / "run")
    done = json.loads((tmp_path / "run/finished.json").read_text())
    assert done["dropped"] in (4, 5, 6) and done["samples"] == 24, "six steps of four draw two of the 22 rows twice"
    with pytest.raises(Error, match="over max_dropped=0.0"):
        run({**tiny, "data": str(file), "max_dropped": 0.0, "steps": 6}, tmp_path / "x")


@pytest.mark.parametrize("changes, says", [
    (dict(loss="foo"), "loss=foo: one of dpo, ipo, simpo, orpo, kto"), (dict(beta=0.0), "beta=0.0"),
    (dict(max_tokens=60), "a pair must fit into a stream"), (dict(data="nowhere.jsonl"), "no data file"),
    (dict(data="toy", val_data=""), "would not be read"), (dict(data="toy", val_data="", images="."), "tools.pairs"),
    (dict(lora_alpha=8.0), "lora_r is 0"), (dict(gamma=-1.0), "gamma=-1.0")])
def test_a_contradiction_ends_in_one_line(changes, says, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in error(run, tiny, tmp_path / "run", **changes)


def test_weights_of_files_are_refused(tiny, tmp_path):
    assert "every pair counts 1" in error(run, {**tiny, "data": tiny["data"] + ":1:0.2"}, tmp_path / "run")


def test_a_dry_run_shows_a_pair(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path / "run", dry_run=True) is None
    assert "its loss mask" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_one_batch_is_fitted(tiny, tmp_path):
    assert run(tiny, tmp_path / "run", overfit=True, steps=8, eval_every=0) == 0
    assert run(tiny, tmp_path / "run", overfit=True, steps=1, eval_every=0, lr=1e-9) == 1


@pytest.mark.parametrize("changes", [dict(lora_r=2, bits=4), dict(lora_r=2, recompute="block"), dict(workers=1)],
                         ids=str)
def test_ways_of_computing_start_at_log_2(changes, tiny, tmp_path):
    run(tiny, tmp_path / "run", steps=2, eval_every=0, **changes)
    logged = [r["loss"] for r in rows(tmp_path / "run/log.jsonl") if "loss" in r]
    assert logged[0] == torch.tensor(2.0).log().item() > logged[1]


def test_the_loop_is_that_of_every_stage():
    one, two = (split(Path(script.__file__).read_text())[0] for script in (train_align, train_dpo))
    one, two = ([line.strip() for line in lines] for lines in (one, two))
    assert len([line for line in two if line not in one]) <= 7 and len([line for line in one if line not in two]) <= 6


# ---- pairs of wrong answers -----------------------------------------------------------------------------------------

def test_pairs_of_wrong_answers(tmp_path, capsys):
    base = {"prompt": "How many?", "answers": ["2"], "image": "a.png", "type": "count"}
    answers = [("3", 0.0, {}), ("2", 1.0, {}), (None, 0.0, {}), ("", 0.0, {}), ("blue", 0.0, {"type": "color"}),
               ("4", 0.3, {"answers": ["2", "3", "3"], "image": None})]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"question_id": i, "text": text, "score": score, **base, **more}) + "\n"
                            for i, (text, score, more) in enumerate(answers)))
    pairs.main([str(file), f"--out={tmp_path / 'pairs.jsonl'}", "--types=count"])
    made = [{"id": 0, "image": "a.png", "prompt": "How many?", "chosen": "2", "rejected": "3"},
            {"id": 5, "prompt": "How many?", "chosen": "3", "rejected": "4"}]
    assert sorted(rows(tmp_path / "pairs.jsonl"), key=lambda r: r["id"]) == made
    seen = json.loads(capsys.readouterr().out)
    assert {k: seen[k] for k in ("wrong", "pairs", "right", "missing", "empty", "other type")} == {
        "wrong": 2, "pairs": 2, "right": 1, "missing": 1, "empty": 1, "other type": 1}
    pairs.main([str(file), f"--out={tmp_path / 'more.jsonl'}", "--types=count", "--right=3"])
    more = sorted(rows(tmp_path / "more.jsonl"), key=lambda r: r["id"])
    assert [more[0], more[2]] == made and more[1]["chosen"] == "2" and more[1]["rejected"] in ("3", "4")
    assert "no wrong answer" in error(pairs.main, [str(file), "--out=x", "--types=place"])
    assert "usage" in error(pairs.main, [str(file)])
    file.write_text('{"question_id": 1, "text": "a"}\n')
    assert "written by eval.py" in error(pairs.main, [str(file), "--out=x"])
