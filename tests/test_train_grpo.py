"""GRPO: advantages and losses by their formulas; one gradient for any micro-batches and ranks; train_grpo.py."""

import json
import math
import os
import signal
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp  # before the forks: else each rank imports it
from conftest import ROOT, error, example, fork, step_of_the_loop, tiny_vlm
from conftest import cpu_world as world
from safetensors.torch import load_file, save_file
from test_distributed import Spy
from test_train import split
from tiny_runs import rows, state, write_data, write_towers

import engine
import train_align
import train_grpo
from data import pack
from loss import clipped_loss, group_advantages, kl_estimate
from metrics.rewards import REWARDS, read_reward
from run import rollout
from run.log import Log

GATE = 1e-12


# ---- the formulas ---------------------------------------------------------------------------------------------------

def test_advantages_compare_with_the_group():
    rewards = torch.tensor([[1.0, 0, 0, 1], [3, 3, 3, 3], [0, 0, 0, 8]], dtype=torch.float64)
    for scaled in (True, False):
        ours = group_advantages(rewards, scaled)
        for row, found in zip(rewards.tolist(), ours.tolist()):
            mean = sum(row) / 4
            std = math.sqrt(sum((r - mean) ** 2 for r in row) / 3)
            true = [(r - mean) / (std + 1e-4 if scaled else 1) for r in row]
            assert found == pytest.approx(true, rel=1e-12)
        assert not ours[1].any(), "equal rewards: exactly 0"


def test_the_ratio_is_clipped_on_one_side():
    """A ratio beyond the limit has no gradient, unless the answer should become less probable"""
    for advantage, ratio, slope in ((2.0, 1.5, 0.0), (2.0, 0.5, -1.0), (-2.0, 0.5, 0.0), (-2.0, 1.5, 3.0),
                                    (2.0, 1.25, -2.5), (2.0, 1.0, -2.0)):
        log_p = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
        value = clipped_loss(log_p, torch.zeros(1), torch.tensor([advantage], dtype=torch.float64), 0.2, 0.3)
        limited = min(max(ratio, 0.8), 1.3)
        assert value.item() == pytest.approx(-min(ratio * advantage, limited * advantage), rel=1e-12)
        assert torch.autograd.grad(value, log_p)[0].item() == pytest.approx(slope, rel=1e-12)


def test_kl_is_never_negative():
    a, b = -5 * torch.rand(2, 100, dtype=torch.float64)
    assert (kl_estimate(a, b) >= 0).all() and kl_estimate(a, a).abs().max() == 0
    torch.testing.assert_close(kl_estimate(a, b), (b - a).exp() - (b - a) - 1, rtol=1e-10, atol=1e-12)


def test_losses_and_gradients_equal_those_of_trl():
    """trl 1.16: tests/golden/trl_rewards.py recorded them"""
    golden = json.loads((ROOT / "tests/golden/trl/rewards.json").read_text())
    lengths = golden["lengths"]
    assert [case["normalise"] for case in golden["cases"]] == ["grpo", "dapo", "dr_grpo"]
    for case in golden["cases"]:
        log_p, old, reference, slope = (torch.tensor(case[k], dtype=torch.float64)
                                        for k in ("log_p", "old", "reference", "gradient"))
        s = settings(**{k: case[k] for k in ("normalise", "clip_low", "clip_high", "kl")})
        model = torch.nn.Parameter(log_p)
        n = {"grpo": len(lengths), "dapo": sum(lengths), "dr_grpo": len(lengths) * golden["longest"]}[s.normalise]
        advantage, weight = (torch.tensor(v, dtype=torch.float64).repeat_interleave(torch.tensor(lengths))
                             for v in (case["advantage"], [1 / k if s.normalise == "grpo" else 1.0 for k in lengths]))
        with pytest.MonkeyPatch.context() as m:
            m.setattr(rollout, "token_log_probs", lambda model, *_: model * 1)
            value = rollout.rolled_loss(s, model, rollout.Rolled(None, advantage, weight, old, reference)) / n
        assert value.item() == pytest.approx(case["value"], rel=1e-10)
        torch.testing.assert_close(torch.autograd.grad(value, model)[0], slope, rtol=1e-10, atol=1e-12)


def test_rewards():
    assert [REWARDS["exact"]("?", a, "2") for a in ("2", " 2. ", "3", "")] == [1, 1, 0, 0]
    assert [REWARDS["format"]("?", a, "2") for a in ("7", "two", "2 2", "")] == [1, 0, 0, 0]
    assert [REWARDS["iou"]("?", a, "[0, 0, 1, 1]") for a in ("[0, 0, 1, 0.5]", "x")] == [0.5, 0]
    assert REWARDS["length"]("?", "a b c", "x") == 0.3


def test_a_reward_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def reward(question, answer, reference):\n    return len(answer)\nnumber = 3\n")
    assert read_reward(f"{file}:reward")("", "abc", "") == 3
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "fails.py").write_text("import nothing_like_this\n")
    for name, says in (("foo", "exact, iou"), (f"{file}:number", "no function"), ("no.py:f", "FILE.py:FUNCTION"),
                       (f"{tmp_path}/broken.py:f", "broken.py cannot be run: SyntaxError"),
                       (f"{tmp_path}/fails.py:f", "cannot be run: ModuleNotFoundError: No module named")):
        assert says in error(read_reward, name)


# ---- one step, cut in any way ---------------------------------------------------------------------------------------

ANSWERS = [3, 1, 5, 2, 4, 6]
SAMPLES = [example(i, 8 + n, n, i % 3) for i, n in enumerate(ANSWERS)]
ADVANTAGE = torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0, 0.7], dtype=torch.float64)
OLD = [torch.linspace(-7, -5, n, dtype=torch.float64) for n in ANSWERS]


def settings(**changes):
    return train_grpo.Settings(**{"grad_clip": 0.0, "clip_high": 0.28, "updates": 2, **changes})


def weights(s):
    return [1 / n if s.normalise == "grpo" else 1.0 for n in ANSWERS]


def rolled(s, group):
    def per_token(values):
        return torch.cat([torch.full((ANSWERS[i],), float(values[i]), dtype=torch.float64) for i in group] or
                         [torch.zeros(0, dtype=torch.float64)])
    old = torch.cat([OLD[i] for i in group] or [torch.zeros(0, dtype=torch.float64)])
    return rollout.Rolled(pack([SAMPLES[i] for i in group], 8), per_token(ADVANTAGE), per_token(weights(s)), old,
                          old - 0.5 if s.kl else old[:0])


def step(s, groups, w=None, wrap="ddp"):
    w, model = w or world(), tiny_vlm()
    engine.choose(model, {"*": 1e-2}, torch.float64)
    model = engine.parallelize(model, w, model.blocks, wrap)
    spy = Spy(model)
    names = dict(model=model, optimizer=spy, micro=[rolled(s, g) for g in groups], world=w, s=s, step=0, start=0, n=6.0,
                 engine=engine, answer_loss=partial(rollout.rolled_loss, s))
    exec(step_of_the_loop("train_grpo.py", "total = 0.0"), names)
    return spy.seen, names["result"]


def definition(s):
    """Each answer alone, through all logits"""
    model, total = tiny_vlm(), 0.0
    for i, sample in enumerate(SAMPLES):
        b = pack([sample], 8)
        logits = model(*b, head=lambda hidden, weight, *_: hidden @ weight.T) / s.temperature
        log_p = logits.log_softmax(-1).gather(1, b.labels[b.labels >= 0][:, None])[:, 0]
        r, A = (log_p - OLD[i]).exp(), ADVANTAGE[i]
        value = -torch.minimum(r * A, r.clamp(1 - s.clip_low, 1 + s.clip_high) * A)
        if s.kl:
            d = OLD[i] - 0.5 - log_p
            value = value + s.kl * (d.exp() - d - 1)
        total = total + value.sum() * weights(s)[i] / 6
    total.backward()
    return {k: p.grad for k, p in model.named_parameters()}, total.item()


def off(found, true):
    return max(((found[k] - true[k]).norm() / true[k].norm()).item() for k in true if not k.endswith("k_proj.bias"))


@pytest.mark.parametrize("changes", [{}, dict(normalise="dapo", kl=0.1), dict(temperature=0.7)], ids=str)
def test_packed_answers_equal_answers_one_by_one(changes):
    s = settings(**changes)
    true, value = definition(s)
    for groups in ([[*range(6)]], [[5, 0], [], [3, 1, 4, 2]]):
        found, result = step(s, groups)
        assert off(found, true) < GATE and abs(result["loss"] / value - 1) < GATE


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_two_ranks_update_as_one(wrap, tmp_path):
    s = settings()
    true, value = definition(s)

    def rank(r):
        found, result = step(s, [[[0, 5], [1, 2]], [[3, 4], []]][r], world(r, 2), wrap)
        save_file({k: v.contiguous() for k, v in found.items()}, tmp_path / f"g{r}.safetensors")
        return result
    for r, result in enumerate(fork(2, rank, tmp_path)):
        assert off(load_file(tmp_path / f"g{r}.safetensors"), true) < GATE and abs(result["loss"] / value - 1) < GATE


@pytest.mark.parametrize("advantages, elsewhere, documents", [
    ([0, 0, 0, 0, 0, 0], 0, [0]), ([0, 0, 0, 0, 0, 0], 3, [0, 0, 0]), ([1, 0, 0, -1, 0, 0], 2, [2, 0])])
def test_ranks_get_equally_many_packed_answers(advantages, elsewhere, documents):
    """Answers without advantage are not packed. Another rank has `elsewhere` sequences. All weights get a gradient"""
    w, x = world(), types.SimpleNamespace(image_spec=types.SimpleNamespace(side=8), span_ends=None,
                                          encode=types.SimpleNamespace(reader=None))
    w.sum = lambda counts: [*counts, elsewhere]
    model, roller = tiny_vlm(), types.SimpleNamespace(s=settings(updates=1), samples=x, world=w)
    prompts, answers = zip(*((torch.tensor(ids[:-n]), ids[-n:]) for n, (ids, *_) in zip(ANSWERS, SAMPLES)))
    micro = rollout.Roller.packed(roller, model, prompts, [i for *_, i in SAMPLES], answers,
                                  torch.tensor(advantages, dtype=torch.float64), torch.ones(6, dtype=torch.float64))
    assert [int((b.batch.pos == 0).sum()) for b in micro] == documents
    assert sorted(micro[0].advantage.tolist()) == [-1.0] * (2 * any(advantages)) + [1.0] * (3 * any(advantages))
    for b in micro:
        rollout.rolled_loss(roller.s, model, b).backward()
    assert all(p.grad is not None and bool(p.grad.any()) <= any(advantages) for p in model.parameters())


# ---- the script -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Settings of a run of two steps of three questions with four answers each"""
    at = write_towers(tmp_path_factory.mktemp("grpo"))
    file = write_data(at, "train.jsonl", 12)
    questions = [{"question_id": r["id"], "image": r.get("image"), "type": "any", "text": "What is this?",
                  "answer": "cat"} for r in rows(file)]
    (at / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return dict(data=str(at / "questions.jsonl"), images=str(at / "images"), init="", vision=str(at / "vision"),
                llm=str(at / "llm"), template="vicuna_v1", system="", device="cpu", batch_size=3, max_len=40,
                max_tokens=200, steps=2, save_every=2, log_every=1, sample_every=1, lr=2e-3, group=4, max_new_tokens=6,
                reward="length")


def run(settings, out, **changes):
    return train_grpo.main(train_grpo.Settings(**{**settings, "out": str(out), **changes}))


@pytest.mark.parametrize("changes", [{}, dict(updates=2, normalise="dapo", clip_high=0.28), dict(lora_r=2, kl=0.04),
                                     dict(normalise="dr_grpo")], ids=str)
def test_a_run_logs_rewards_and_answers(changes, tiny, tmp_path):
    assert run(tiny, tmp_path / "run", **changes) is None
    logged = rows(tmp_path / "run/log.jsonl")
    assert len(logged) == 2 and {*rollout.FACTS, "generated_per_s", "generate_s"} < set(logged[0])
    assert all(0 < r["answer_tokens"] <= 6 and 0 <= r["finished"] <= 1 for r in logged)
    shown = rows(tmp_path / "run/samples.jsonl")
    assert len(shown) == 24 and {r["step"] for r in shown} == {1, 2}
    assert {"question_id", "prompt", "text", "score", "answers", "image", "type"} < set(shown[0])
    assert (tmp_path / "run/model/model.safetensors").exists()
    from tools import report
    report.main([str(tmp_path / "run/samples.jsonl"), f"--images={tiny['images']}"])
    assert "What is this?" in (tmp_path / "run/samples.html").read_text()


def test_the_first_update_is_on_policy(tiny, tmp_path, monkeypatch):
    """The ratio is 1 to the last bit, and in the second update of a roll-out it is not"""
    seen, right = [], rollout.clipped_loss
    monkeypatch.setattr(rollout, "clipped_loss", lambda log_p, old, *rest: (seen.append(torch.equal(log_p, old)),
                                                                            right(log_p, old, *rest))[1])
    run({**tiny, "dtype": "fp64", "max_tokens": 2000}, tmp_path / "run", updates=2)
    assert seen == [True, False] * 2


def test_equal_rewards_change_nothing(tiny, tmp_path):
    file = tmp_path / "flat.py"
    file.write_text("def flat(question, answer, reference):\n    return 1.0\n")
    for normalise in ("grpo", "dapo"):
        run(tiny, tmp_path / normalise, reward=f"{file}:flat", normalise=normalise, steps=1)
        logged = rows(tmp_path / normalise / "log.jsonl")
        assert all(r["grad_norm"] == 0 and r["equal_groups"] == 1 and r["reward"] == 1 for r in logged)


def test_answers_without_advantage_are_not_read(tiny, tmp_path, monkeypatch):
    """Their gradient is 0: a run that reads them, too, has the same weights. Whatever is drawn, every second group of
    four has equal rewards, and the others have 0 and 1."""
    file, right = tmp_path / "few.py", rollout.group_advantages
    file.write_text("import itertools\ncalls = itertools.count()\n\n\ndef few(question, answer, reference):\n"
                    "    n = next(calls)\n    return float(n // 4 % 2 or n % 2)\n")
    settings = {**tiny, "dtype": "fp64", "reward": f"{file}:few", "grad_clip": 0.0}
    run(settings, tmp_path / "few")
    monkeypatch.setattr(rollout, "group_advantages", lambda *a: right(*a).where(right(*a) != 0, 1e-300))
    run(settings, tmp_path / "all")
    few, every = (rows(tmp_path / name / "log.jsonl") for name in ("few", "all"))
    assert [r["equal_groups"] for r in few] == [r["equal_groups"] for r in every] == pytest.approx([1 / 3, 2 / 3])
    assert all(x["tokens"] < y["tokens"] for x, y in zip(few, every, strict=True))
    few, every = (load_file(tmp_path / name / "checkpoints/step_0000002/trained.safetensors")
                  for name in ("few", "all"))
    assert off(few, every) < 1e-9


def test_bad_questions_are_counted(tiny, tmp_path):
    """No true answer, no image, too long: each is dropped with its whole group"""
    good = rows(Path(tiny["data"]))[:3]
    bad = [good[0] | change for change in ({"answer": " "}, {"image": "nowhere.png"}, {"text": "?" * 200})]
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in good + bad))
    run({**tiny, "data": str(file), "batch_size": 6, "steps": 1}, tmp_path / "run", max_dropped=0.5)
    assert json.loads((tmp_path / "run/finished.json").read_text())["dropped"] == 3
    assert len(rows(tmp_path / "run/samples.jsonl")) == 3 * 4


def killed(*args, **how):
    """Run in a child process that kills itself in step 3, behind the checkpoint of step 2."""
    if not (child := os.fork()):
        try:
            count = Log.count
            Log.count = lambda log, step, *rest: (os.kill(os.getpid(), signal.SIGKILL) if step == 2 else
                                                  count(log, step, *rest))
            run(*args, **how)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_a_killed_run_ends_with_the_same_bits(tiny, tmp_path):
    tiny = {**tiny, "steps": 3, "updates": 2, "group": 2}
    run(tiny, tmp_path / "one")
    killed(tiny, tmp_path / "two")
    run(tiny, tmp_path / "two")
    assert state(tmp_path / "one", 3) == state(tmp_path / "two", 3)
    one, two = (rows(tmp_path / name / "samples.jsonl") for name in ("one", "two"))
    assert one == two


def test_a_length_reward_is_exploited(tiny, tmp_path):
    """Answers become longer, whatever they say: the lesson about rewards"""
    file = tmp_path / "long.py"
    file.write_text("def characters(question, answer, reference):\n    return len(answer)\n")
    run(tiny, tmp_path / "run", reward=f"{file}:characters", steps=8, group=8, lr=3e-2, sample_every=0, save_every=0)
    rewards = [r["reward"] for r in rows(tmp_path / "run/log.jsonl")]
    assert sum(rewards[-3:]) > 1.2 * sum(rewards[:3])


@pytest.mark.parametrize("changes, says", [
    (dict(reward="foo"), "exact, iou, format, length"), (dict(kl=0.1), "needs lora_r"), (dict(group=1), "group=1"),
    (dict(overfit=True), "no batch can be fitted"), (dict(val_data="x"), "eval.py"),
    (dict(max_tokens=42), "one answer must fit"), (dict(data="nowhere.jsonl"), "no data file"),
    (dict(temperature=0.0), "temperature=0.0"), (dict(normalise="foo"), "normalise=foo")])
def test_a_contradiction_ends_in_one_line(changes, says, tiny, tmp_path):
    assert says in error(run, tiny, tmp_path / "run", **changes)


def test_a_loader_changes_nothing(tiny, tmp_path):
    for workers in (0, 1):
        run(tiny, tmp_path / str(workers), group=2, workers=workers)
    assert state(tmp_path / "0", 2) == state(tmp_path / "1", 2)


def test_two_processes_train_on_their_own_questions(tiny, tmp_path, monkeypatch):
    """With FSDP, weights are gathered for the answers: these and the training are those of DDP. Three questions on two
    ranks, and answers that end early, so ranks need unequal numbers of forward passes"""
    passes, right = [], rollout.generate
    monkeypatch.setattr(rollout, "generate", lambda *a: passes.append(a[0].register_forward_hook(
        lambda *_: passes.append(0))) or right(*a))
    monkeypatch.setattr(rollout.chat, "stop_ids", lambda *_: set(range(0, 300, 2)))

    def both(rank):
        for wrap in ("ddp", "fsdp"):
            run({**tiny, "dtype": "fp64", "rollout_size": 4}, tmp_path / wrap, parallel=wrap, updates=2)
        return len(passes)
    counts = fork(2, both, tmp_path)
    one, two = (load_file(tmp_path / wrap / "checkpoints/step_0000002/trained.safetensors") for wrap in ("ddp", "fsdp"))
    assert off(two, one) < GATE and counts[0] != counts[1]
    one, two = (rows(tmp_path / wrap / "samples.jsonl") for wrap in ("ddp", "fsdp"))
    assert one == two and len({r["text"] for r in one}) > 2 and (tmp_path / "fsdp/model").is_dir()


def test_the_loop_is_that_of_every_stage():
    """Those of stage 1 that are missing: a count of tokens and the validation; the lines of an update are indented"""
    one, two = (split(Path(script.__file__).read_text())[0] for script in (train_align, train_grpo))
    one, two = ([line.strip() for line in lines] for lines in (one, two))
    assert len([line for line in two if line not in one]) <= 9 and len([line for line in one if line not in two]) <= 10


def test_a_dry_run_shows_a_question(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path / "run", dry_run=True) is None
    assert "3 questions, 4 answers each" in capsys.readouterr().out and not (tmp_path / "run").exists()
