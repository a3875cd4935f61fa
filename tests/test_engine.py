"""The verbs of training, one by one."""

import hashlib
import json
import math
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import example, tiny_vlm, train_step

import engine
import lora
from config import Error
from data import pack
from kernels.cross_entropy import linear_cross_entropy_ref
from loss import token_loss
from run import plan
from run.log import Log, Spikes, append, clock, rss

CPU = engine.World(0, 1, torch.device("cpu"), torch.float64)
TABLE = {"multi_modal_projector.*": 4e-3, "language_model.*": 1e-3}


def batch(*seeds):
    return pack([example(s) for s in seeds], 8)


# ---- learning rate --------------------------------------------------------------------------------------------------

def test_the_learning_rate_rises_in_a_line_and_falls_as_half_a_cosine():
    rates = [engine.lr_at(i, 110, 10, 2.0) for i in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)], rel=1e-12)
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.0, rel=1e-12)
    assert rates[109] == pytest.approx(1 + math.cos(math.pi * 99 / 100), rel=1e-12)
    assert engine.lr_at(110, 110, 10, 2.0) == 0 and engine.lr_at(110, 110, 10, 2.0, floor=0.1) == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:])) and min(rates) > 0


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (3, 3), (2, 0)])
def test_the_learning_rate_is_never_zero_in_the_shortest_runs(steps, warmup):
    assert all(0 < engine.lr_at(i, steps, warmup, 1.0) <= 1 for i in range(steps))


def test_every_group_follows_its_own_peak():
    model = tiny_vlm()
    optimizer = engine.adamw(model, engine.choose(model, TABLE), 0.1)
    assert engine.set_lr(optimizer, 1, 10, 4) == 2e-3
    assert {g["lr"] for g in optimizer.param_groups} == {2e-3, 5e-4}


# ---- who trains -----------------------------------------------------------------------------------------------------

GOLDEN = """\
multi_modal_projector.linear_1.weight 0.004 0.1
multi_modal_projector.linear_1.bias 0.004 0
multi_modal_projector.linear_2.weight 0.004 0.1
multi_modal_projector.linear_2.bias 0.004 0
language_model.model.embed_tokens.weight 0.001 0
language_model.model.layers.0.self_attn.q_proj.weight 0.001 0.1
language_model.model.layers.0.self_attn.k_proj.weight 0.001 0.1
language_model.model.layers.0.self_attn.v_proj.weight 0.001 0.1
language_model.model.layers.0.self_attn.o_proj.weight 0.001 0.1
language_model.model.layers.0.mlp.gate_proj.weight 0.001 0.1
language_model.model.layers.0.mlp.up_proj.weight 0.001 0.1
language_model.model.layers.0.mlp.down_proj.weight 0.001 0.1
language_model.model.layers.0.input_layernorm.weight 0.001 0
language_model.model.layers.0.post_attention_layernorm.weight 0.001 0
language_model.model.norm.weight 0.001 0
language_model.lm_head.weight 0.001 0.1"""
TOWER = {"embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"}


def test_the_table_of_names_rates_and_decays_is_the_golden_one():
    model = tiny_vlm(num_hidden_layers=1)
    optimizer = engine.adamw(model, engine.choose(model, TABLE), 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    found = [(names[id(p)], g["peak"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    assert all(names[id(p)] == n for g in optimizer.param_groups for p, n in zip(g["params"], g["names"], strict=True))
    order = list(names.values())
    lines = [f"{n} {lr:g} {wd:g}" for n, lr, wd in sorted(found, key=lambda f: order.index(f[0]))]
    assert "\n".join(lines) == GOLDEN
    assert len(found) == len(set(found)) == sum(p.requires_grad for p in model.parameters())


def test_only_matrices_shrink_under_a_gradient_of_zero():
    model = tiny_vlm()
    optimizer = engine.adamw(model, engine.choose(model, {"*": 1e-2}, torch.float64), 0.5)
    engine.set_lr(optimizer, 0, 1, 0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    kept = {n for n in before if n.endswith("bias") or "norm" in n or "embed" in n}
    assert moved == set(before) - kept and all(any(t in n for n in kept) for t in TOWER)
    name = "language_model.lm_head.weight"
    assert torch.allclose(dict(model.named_parameters())[name], before[name] * (1 - 0.5e-2), rtol=1e-12)


def test_frozen_weights_keep_their_bits_and_every_trained_one_moves_in_its_first_step():
    model = tiny_vlm(dtype=torch.float32)
    table = {"multi_modal_projector.*": 1e-3, "*.layers.1.*": 1e-3, "vision_tower.*": 0}
    lrs = engine.choose(model, table, torch.float32)
    assert not any(n.startswith("vision_tower") for n in lrs), "the last glob decides"
    optimizer = engine.adamw(model, lrs, 0.1)

    def digest(trained):
        h = hashlib.sha256()
        for n, p in model.named_parameters():
            if (n in lrs) == trained:
                h.update(p.detach().numpy().tobytes())
        return h.hexdigest()

    frozen, before = digest(False), {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(20):
        engine.set_lr(optimizer, step, 20, 0)
        train_step(model, optimizer, [batch(step)], token_loss, CPU, 1.0, check=step == 0)
        if step == 0:
            assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in lrs)
    assert digest(False) == frozen and len(optimizer.state) == len(lrs)


@pytest.mark.parametrize("table, trains", [
    ({"multi_modal_projector.*": 1e-3}, {"multi_modal_projector"}),
    (TABLE, {"multi_modal_projector", "language_model"}),
    ({"*.layers.1.mlp.fc1.*": 1e-3}, {"vision_tower"})])
def test_what_is_frozen_as_a_whole_is_in_eval_mode_whatever_is_asked_for(table, trains):
    model = tiny_vlm()
    engine.choose(model, table, torch.float64)
    for ask in (lambda: None, model.train, lambda: model.eval().train()):
        ask()
        assert {n for n, m in model.named_children() if m.training} == trains
        assert all(m.training == (n.split(".")[0] in trains) for n, m in model.named_modules() if n)
    model.eval()
    assert not any(m.training for m in model.modules())


def test_no_weight_is_a_view_of_what_was_loaded():
    model = tiny_vlm(dtype=torch.float32)
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    engine.choose(model, {"multi_modal_projector.*": 1e-3}, torch.float32)
    assert not [n for n, p in model.named_parameters() if p.data_ptr() == before[n]]


def test_a_glob_that_fits_nothing_is_named_and_so_is_a_table_that_trains_nothing():
    with pytest.raises(Error, match=r"'multi_modal_projektor\.\*'; the model has, for example, vision_tower"):
        engine.choose(tiny_vlm(), {"multi_modal_projektor.*": 1e-3})
    with pytest.raises(Error, match="nothing would be trained"):
        engine.choose(tiny_vlm(), {"*": 0.0})


def test_trained_weights_and_moments_are_fp32_while_frozen_ones_are_bf16_and_small_updates_arrive():
    model = tiny_vlm(dtype=torch.float32)
    lrs = engine.choose(model, {"language_model.model.layers.*": 1e-6}, torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if n in lrs} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in lrs} == {torch.bfloat16}
    world, optimizer = engine.World(0, 1, torch.device("cpu"), torch.bfloat16), engine.adamw(model, lrs, 0.0)
    engine.set_lr(optimizer, 0, 1, 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in lrs}
    train_step(model, optimizer, [batch(1)], token_loss, world, 1.0, check=True)
    assert {v.dtype for s in optimizer.state.values() for v in s.values()} == {torch.float32}
    before, after = (torch.cat([d[n].flatten() for n in lrs]) for d in (before, dict(model.named_parameters())))
    moved, in_bf16 = ((after.to(d) != before.to(d)).float().mean() for d in (torch.float32, torch.bfloat16))
    assert moved > 0.9 > 0.1 > in_bf16, "stored in bf16, hardly a weight would have moved"


def test_adamw_is_torchs_over_fifty_steps():
    model = tiny_vlm()
    optimizer = engine.adamw(model, engine.choose(model, {"*": 3e-3}, torch.float64), 0.1)
    m, v = ({n: torch.zeros_like(p) for n, p in model.named_parameters()} for _ in range(2))
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    g = torch.Generator().manual_seed(0)
    for t in range(1, 51):
        lr = engine.set_lr(optimizer, t - 1, 50, 5)
        for n, p in model.named_parameters():                  # Loshchilov and Hutter 2019, algorithm 2
            p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
            decay = 0.1 if p.ndim > 1 and "embed" not in n else 0
            m[n] = 0.9 * m[n] + 0.1 * p.grad
            v[n] = 0.999 * v[n] + 0.001 * p.grad**2
            w[n] = w[n] * (1 - lr * decay) - lr * (m[n] / (1 - 0.9**t)) / ((v[n] / (1 - 0.999**t)).sqrt() + 1e-8)
        optimizer.step()
    assert max(((p - w[n]).norm() / w[n].norm()).item() for n, p in model.named_parameters()) < 1e-12


# ---- one step -------------------------------------------------------------------------------------------------------

def test_a_trained_weight_without_gradient_and_a_frozen_one_with_it_are_both_named():
    model = tiny_vlm()
    engine.choose(model, {"multi_modal_projector.*": 1e-3}, torch.float64)
    token_loss(model, batch(0)).backward()
    engine.check_gradients(model)
    weight = model.multi_modal_projector.linear_2.weight
    kept, weight.grad = weight.grad, None
    with pytest.raises(Error, match="linear_2.weight is trained but got no gradient"):
        engine.check_gradients(model)
    weight.grad = kept
    head = model.language_model.lm_head.weight
    head.grad = torch.zeros_like(head)
    with pytest.raises(Error, match="lm_head.weight is frozen but got a gradient"):
        engine.check_gradients(model)


def test_an_adapter_that_the_loss_cannot_reach_stops_the_first_step():
    model = tiny_vlm()
    lrs = engine.choose(model, {"vision_tower.*": 1e-3, "multi_modal_projector.*": 1e-3}, torch.float64)
    optimizer = engine.adamw(model, lrs, 0.0)
    model.see = lambda images: torch.zeros(len(images), 4, 32, dtype=torch.float64, requires_grad=True)
    with pytest.raises(Error, match="trained but got no gradient"):
        train_step(model, optimizer, [batch(0)], token_loss, CPU, check=True)


def test_the_size_of_gradients_does_not_hang_on_the_precision():
    """As it would with a loss that is scaled up for fp16 and never down again."""
    norms = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, w = tiny_vlm(), engine.World(0, 1, torch.device("cpu"), dtype)
        optimizer = engine.adamw(model, engine.choose(model, TABLE, dtype), 0.0)
        norms.append(train_step(model, optimizer, [batch(*range(6))], token_loss, w)["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5) and norms[2] == pytest.approx(norms[0], rel=1e-2)


def test_gradients_do_not_leak_into_the_next_step():
    model = tiny_vlm()
    optimizer = engine.adamw(model, engine.choose(model, {"*": 1e-300}, torch.float64), 0.0)
    norms = [train_step(model, optimizer, [batch(0)], token_loss, CPU)["grad_norm"] for _ in range(2)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("parallel, recompute", [("both", "none"), ("auto", "some")])
def test_an_unknown_way_to_parallelize_is_named(parallel, recompute):
    with pytest.raises(Error, match="both: one of auto, ddp, fsdp|some: one of none, block"):
        engine.parallelize(tiny_vlm(), CPU, [], parallel, recompute)


def test_recomputation_changes_no_bit_of_the_gradient_of_adapters_behind_frozen_embeddings_with_dropout_on():
    found = []
    for recompute in ("none", "block"):
        model = tiny_vlm()
        lora.add_adapters(model, 2, 4, 0.5, "all-linear")
        engine.choose(model, {"multi_modal_projector.*": 1e-3, "*.lora_*": 1e-3}, torch.float64)
        for n, p in model.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.1)
        engine.parallelize(model, CPU, [*model.language_model.model.layers], recompute=recompute)
        torch.manual_seed(3)
        token_loss(model, batch(0, 1)).backward()
        engine.check_gradients(model)
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *found)) and all(g.abs().sum() > 0 for g in found[0])


def gradients(f, module, *args):
    """-> [output, gradients of x and of every trained parameter]"""
    x = args[0].detach().requires_grad_()
    out = f(x, *args[1:])
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    up = torch.linspace(-1, 2, out.numel(), dtype=x.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, wanted, up)]


@pytest.mark.parametrize("kind", ["decoder layer", "rows of a decoder layer", "ViT block"])
def test_a_block_is_one_graph_with_the_same_values_and_gradients(kind):
    """torch.compile without a break, for streams of other spans and lengths too."""
    model = tiny_vlm(qk_norm=True)
    vit = kind == "ViT block"
    block = model.vision_tower.vision_model.encoder.layers[0] if vit else model.language_model.model.layers[0]
    f = torch.compile(block, fullgraph=True, backend="aot_eager")
    for seeds in ((0, 1), (2, 3, 4)):
        b = batch(*seeds)
        N = len(b.ids)
        x = torch.randn(N, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(N))
        angles = b.pos[:, None].double() * torch.ones(4)
        rows = torch.arange(1, N, 2) if kind.startswith("rows") else None
        args = (x, b.lo, b.hi) if vit else (x, angles.cos(), angles.sin(), b.lo, b.hi, rows)
        for ours, theirs in zip(gradients(f, block, *args), gradients(block, block, *args)):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU writes C++")
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_compiled_model_gives_the_same_gradients(recompute):
    found, counters = [], torch._dynamo.utils.counters["stats"]
    for compile in (False, True):
        model = tiny_vlm(num_hidden_layers=1)
        engine.choose(model, TABLE, torch.float64)
        engine.parallelize(model, CPU, [*model.language_model.model.layers], recompute=recompute, compile=compile)
        before = counters["unique_graphs"]
        token_loss(model, batch(0, 1)).backward()
        assert counters["unique_graphs"] - before == compile
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, compiled = found
    assert all((compiled[n] - g).norm() <= 1e-12 * g.norm() for n, g in plain.items())


# ---- counting -------------------------------------------------------------------------------------------------------

def test_flops_are_those_counted_by_hand():
    model = tiny_vlm()
    engine.choose(model, {"multi_modal_projector.*": 1e-3}, torch.float64)
    D, F, C, M, V, P, T = 32, 48, 32, 48, 512, 4, 5                       # T: patches and the class token
    vit = P * D * 48 + 2 * T * (4 * D * D + 2 * D * F)                    # frozen, nothing before it trains
    qo, kv, mlp = 2 * C * C, 2 * C * C // 2, 3 * C * M                    # two of four heads share keys
    assert plan.flops(model, plan.rows(model.cfg)) == {
        "images": 2 * vit + P * (4 * D * C + 6 * C * C),                  # the first matrix need not look below itself
        "tokens": 4 * (qo + kv + mlp) + 4 * kv,                           # in the last layer a token makes keys alone
        "supervised": 4 * (qo + mlp + V * C)}
    engine.choose(model, {"multi_modal_projector.*": 1e-3, "language_model.*": 1e-3}, torch.float64)
    assert plan.flops(model, plan.rows(model.cfg))["tokens"] == 6 * (qo + 2 * kv + mlp)


def test_flops_agree_with_torchs_own_counter_but_for_attention():
    from torch.utils.flop_counter import FlopCounterMode
    model, b = tiny_vlm(vocab_size=8192), batch(0, 1, 2)
    engine.choose(model, {"multi_modal_projector.*": 1e-3, "language_model.*": 1e-3}, torch.float64)
    units = dict(tokens=len(b.ids), supervised=int((b.labels >= 0).sum()), images=len(b.images))
    ours = sum(f * units[u] for u, f in plan.flops(model, plan.rows(model.cfg)).items())
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}  # of these it must be told, and
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:   # into attention it does not look
        model(*b, head=linear_cross_entropy_ref).backward()
    assert ours == counter.get_total_flops()


def test_log_rows_hold_rates_since_the_last_row_and_the_time_left(tmp_path, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    log = Log(tmp_path, CPU, steps=100, start=10)
    log.peak = 1e6
    for _ in range(10):
        now[0] += 2
        log.count(tokens=50, samples=4, flops=1e5, wait=0.25)
    row = log.write(20, loss=1.5, lr=1e-3, grad_norm=0.25, tokens=50)
    assert row == dict(step=20, loss=1.5, lr=1e-3, grad_norm=0.25, tokens=50, tokens_per_s=25.0, samples_per_s=2.0,
                       mfu=0.05, memory=row["memory"], data_wait_s=2.5, eta=160.0)
    now[0] += 1
    log.count(tokens=7, samples=1, flops=0, wait=0)
    row = log.write(21, loss=math.nan, lr=1e-3, grad_norm=math.inf)
    assert (row["tokens_per_s"], row["samples_per_s"], row["eta"]) == (7.0, 1.0, round(21 / 11 * 79, 1))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[1], parse_constant=pytest.fail)["loss"] is None, "nan is not json"
    said = capsys.readouterr().out
    assert "step  20/100  loss 1.5000  lr 1.00e-03  norm 0.250" in said and "left 2:40" in said
    assert clock(3725) == "1:02:05" and rss() > 2**20


def test_a_spike_is_seen_once_and_no_clean_step_is_taken_for_one():
    g = torch.Generator().manual_seed(0)
    clean = (2 + 3 * torch.exp(-torch.arange(10_000) / 300) + 0.1 * torch.randn(10_000, generator=g)).tolist()
    spikes = Spikes()
    assert not any(spikes.look(x) for x in clean)
    spike = spikes.look(clean[-1] + 0.8)
    assert 6 < spike < 10
    assert not any(spikes.look(x) for x in clean[-500:]) and len(spikes.losses) == 128
    assert sum(bool(spikes.look(x + 5)) for x in clean[-500:]) < 6           # a new level is soon the usual one
    young = Spikes()
    assert not any(young.look(x) for x in [1.0, 1.1] * 15 + [9.0])           # too few to say what is usual
    constant = Spikes([1.0] * 40)
    assert constant.look(1.0) is None and constant.look(1.5) is None     # nor by how many deviations of zero


def test_a_log_that_cannot_be_written_costs_the_line_and_not_the_run(tmp_path, capsys):
    append(tmp_path / "gone" / "log.jsonl", {"step": 1})
    assert "log.jsonl is lost: No such file" in capsys.readouterr().out


def test_the_plan_says_what_trains_at_which_rate_and_what_the_first_step_holds():
    model = tiny_vlm()
    lrs = engine.choose(model, {"multi_modal_projector.*": 2e-3, "language_model.*": 1e-5}, torch.float64)
    settings = SimpleNamespace(batch_size=3, recompute="none", parallel="auto")
    text = "\n".join(plan.lines(model, lrs, CPU, [batch(0, 1), batch(2)], 7, settings))
    connector = 32 * 32 * 2 + 32 * 2
    for words in (f"multi_modal_projector {connector:,} 0", "lr 0.002: 4 tensors", "lr 1e-05: 21 tensors",
                  "7 steps of 3 samples; the first one, on this rank: 42 tokens in 2 stream(s), 12 supervised, 3 im",
                  "MiB activations", "1 x cpu, torch.float64"):
        assert words in " ".join(text.split()), text


# ---- processes ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("device, dtype, words", [
    ("cuda", "auto", "no GPU"), ("cuda:7", "auto", "no GPU"), ("cpu", "fp8", "dtype=fp8"), ("cpu", "", "dtype=: auto"),
    *((d, "auto", f"device={d}: auto, cpu, cuda or cuda:N") for d in ("foo", "", "cuda:", "cuda:x", "cpu:0", "mps"))])
def test_a_machine_that_cannot_is_told_in_one_line(device, dtype, words):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("tests the message of a machine without a GPU; this one has one")
    with pytest.raises(Error) as e:
        engine.start(device, dtype)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_gpu_that_is_not_there_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Error, match=r"device=cuda:2, but this machine has 2 GPU\(s\)"):
        engine.start("cuda:2")


def test_sigterm_is_heard_and_ends_nothing():
    kept = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        got = engine.record_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert got == [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1]
    finally:
        for s, handler in kept.items():
            signal.signal(s, handler)


def test_finish_hands_the_exit_code_on():
    assert engine.finish() == 0 and engine.finish(143) == 143
