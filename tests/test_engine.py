"""The verbs of training, one by one."""

import hashlib
import math
import os
import signal

import pytest
import torch
from conftest import example, tiny_vlm, train_step

import engine
import lora
from config import Error
from data import pack
from loss import token_loss
from run.signals import record_signals

CPU = engine.World(0, 1, torch.device("cpu"), torch.float64)
TABLE = {"multi_modal_projector.*": 4e-3, "language_model.*": 1e-3}


def batch(*seeds):
    return pack([example(s) for s in seeds], 8)


# ---- learning rate --------------------------------------------------------------------------------------------------

def test_the_learning_rate_rises_and_falls_as_cosine():
    rates = [engine.lr_at(i, 110, 10, 2.0) for i in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)], rel=1e-12)
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.0, rel=1e-12)
    assert rates[109] == pytest.approx(1 + math.cos(math.pi * 99 / 100), rel=1e-12)
    assert engine.lr_at(110, 110, 10, 2.0) == 0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:])) and min(rates) > 0


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (3, 3), (2, 0)])
def test_the_learning_rate_is_never_zero(steps, warmup):
    assert all(0 < engine.lr_at(i, steps, warmup, 1.0) <= 1 for i in range(steps))


def test_every_group_follows_its_own_peak():
    model = tiny_vlm()
    optimizer = engine.adamw(model, engine.choose(model, TABLE), 0.1)
    assert engine.set_lr(optimizer, 1, 10, 0.4) == engine.set_lr(optimizer, 1, 10, 0.31) == 2e-3      # rounded up
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


def test_names_rates_and_decays_are_the_golden_table():
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


def test_frozen_weights_stay_and_trained_ones_move():
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
    for step in range(5):
        engine.set_lr(optimizer, step, 5, 0)
        train_step(model, optimizer, [batch(step)], token_loss, CPU, 1.0, check=step == 0)
        if step == 0:
            assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in lrs)
    assert digest(False) == frozen and len(optimizer.state) == len(lrs)


@pytest.mark.parametrize("table, trains", [
    ({"multi_modal_projector.*": 1e-3}, {"multi_modal_projector"}),
    (TABLE, {"multi_modal_projector", "language_model"}),
    ({"*.layers.1.mlp.fc1.*": 1e-3}, {"vision_tower"})])
def test_frozen_parts_stay_in_eval_mode(table, trains):
    model = tiny_vlm()
    engine.choose(model, table, torch.float64)
    for ask in (lambda: None, model.train, lambda: model.eval().train()):
        ask()
        assert {n for n, m in model.named_children() if m.training} == trains
        assert all(m.training == (n.split(".")[0] in trains) for n, m in model.named_modules() if n)
    model.eval()
    assert not any(m.training for m in model.modules())


def test_weights_move_to_the_device_one_by_one(monkeypatch):
    """Each tensor goes from the file it is mapped from to the device at once: CPU memory never holds all weights."""
    model, moved, to = tiny_vlm(dtype=torch.float32), [], torch.Tensor.to

    def noting(self, *args, **how):
        moved.append((self.data_ptr(), args[0]))
        return to(self, torch.float64, copy=True)                # this machine has no such device
    mapped, device = [p.data_ptr() for p in model.parameters()], torch.device("meta")
    with monkeypatch.context() as m:
        m.setattr(torch.Tensor, "to", noting)
        m.setattr(model, "to", lambda device: None)
        engine.choose(model, TABLE, torch.float64, device)
    assert moved == [(pointer, device) for pointer in mapped]


def test_no_weight_is_a_view_of_a_file():
    model = tiny_vlm(dtype=torch.float32)
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    engine.choose(model, {"multi_modal_projector.*": 1e-3}, torch.float32)
    assert not [n for n, p in model.named_parameters() if p.data_ptr() == before[n]]


def test_a_glob_that_fits_nothing_is_named():
    with pytest.raises(Error, match=r"'multi_modal_projektor\.\*'; the model has, for example, vision_tower"):
        engine.choose(tiny_vlm(), {"multi_modal_projektor.*": 1e-3})
    with pytest.raises(Error, match="nothing would be trained"):
        engine.choose(tiny_vlm(), {"*": 0.0})


def test_trained_weights_are_fp32_and_frozen_ones_bf16():
    """So small updates arrive."""
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


def test_adamw_is_that_of_the_paper():
    model = tiny_vlm()
    optimizer = engine.adamw(model, engine.choose(model, {"*": 3e-3}, torch.float64), 0.1)
    m, v = ({n: torch.zeros_like(p) for n, p in model.named_parameters()} for _ in range(2))
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    g = torch.Generator().manual_seed(0)
    for t in range(1, 21):
        lr = engine.set_lr(optimizer, t - 1, 20, 0.1)
        for n, p in model.named_parameters():                  # Loshchilov and Hutter 2019, algorithm 2
            p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
            decay = 0.1 if p.ndim > 1 and "embed" not in n else 0
            m[n] = 0.9 * m[n] + 0.1 * p.grad
            v[n] = 0.999 * v[n] + 0.001 * p.grad**2
            w[n] = w[n] * (1 - lr * decay) - lr * (m[n] / (1 - 0.9**t)) / ((v[n] / (1 - 0.999**t)).sqrt() + 1e-8)
        optimizer.step()
    assert max(((p - w[n]).norm() / w[n].norm()).item() for n, p in model.named_parameters()) < 1e-12


# ---- one step -------------------------------------------------------------------------------------------------------

def test_a_wrong_set_of_gradients_is_named():
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


def test_an_unreachable_weight_stops_the_first_step():
    model = tiny_vlm()
    lrs = engine.choose(model, {"vision_tower.*": 1e-3, "multi_modal_projector.*": 1e-3}, torch.float64)
    optimizer = engine.adamw(model, lrs, 0.0)
    model.image_features = lambda images: torch.zeros(len(images), 4, 32, dtype=torch.float64, requires_grad=True)
    with pytest.raises(Error, match="trained but got no gradient"):
        train_step(model, optimizer, [batch(0)], token_loss, CPU, check=True)


def test_gradients_are_as_large_in_any_precision():
    """They are not where a loss is scaled up for fp16 and never down again."""
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


def test_recomputation_changes_no_bit_of_a_gradient():
    """Of adapters behind frozen embeddings, with dropout on"""
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


@pytest.mark.parametrize("kind", ["decoder layer", "ViT block"])
def test_a_block_is_one_graph(kind):
    """torch.compile without a break, for the rows of a last layer, and for sequences of other spans and lengths"""
    model = tiny_vlm(qk_norm=True)
    vit = kind == "ViT block"
    block = model.vision_tower.vision_model.encoder.layers[0] if vit else model.language_model.model.layers[0]
    f = torch.compile(block, fullgraph=True, backend="eager")
    for seeds in ((0, 1), (2, 3, 4)):
        b = batch(*seeds)
        N = len(b.ids)
        x = torch.randn(N, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(N))
        angles = b.pos[:, None].double() * torch.ones(4)
        for rows in (None,) if vit else (None, torch.arange(1, N, 2)):
            args = (x, b.lo, b.hi) if vit else (x, angles.cos(), angles.sin(), b.lo, b.hi, rows)
            torch.testing.assert_close(f(*args), block(*args), rtol=1e-12, atol=1e-12)


def test_a_compiled_model_gives_the_same_gradients(monkeypatch):
    """Compiled, and recomputed in the backward pass. aot_eager has the graphs that a compiler gets, forward and
    backward, and runs them without one: C++ costs half a minute. bench/gpu.sh runs the compiler."""
    found, counters, plain = [], torch._dynamo.utils.counters["stats"], torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: plain(forward, backend="aot_eager"))
    for compile in (False, True):
        model = tiny_vlm(num_hidden_layers=1)
        engine.choose(model, TABLE, torch.float64)
        engine.parallelize(model, CPU, [*model.language_model.model.layers], recompute="block", compile=compile)
        before = counters["unique_graphs"]
        token_loss(model, batch(0, 1)).backward()
        assert counters["unique_graphs"] - before == compile
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, compiled = found
    assert all((compiled[n] - g).norm() <= 1e-12 * g.norm() for n, g in plain.items())


# ---- processes ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("device, dtype, words", [
    ("cuda", "auto", "no GPU"), ("cuda:7", "auto", "no GPU"), ("cpu", "fp8", "dtype=fp8"), ("cpu", "", "dtype=: auto"),
    *((d, "auto", f"device={d}: auto, cpu, cuda or cuda:N") for d in ("foo", "", "cuda:", "cuda:x", "cpu:0", "mps"))])
def test_what_a_machine_lacks_is_one_line(device, dtype, words):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("tests the message of a machine without a GPU; this one has one")
    with pytest.raises(Error) as e:
        engine.start(device, dtype)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Error, match=r"device=cuda:2, but this machine has 2 GPU\(s\)"):
        engine.start("cuda:2")


def test_a_second_ctrl_c_ends_the_process(tmp_path):
    got = record_signals()
    for name in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(os.getpid(), name)
    assert got == [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL


@pytest.mark.parametrize("parameters, there, threads", [(67_000, 64, 1), (29_000_000, 64, 2), (7_000_000_000, 64, 64)])
def test_a_small_model_gets_one_thread(parameters, there, threads, monkeypatch):
    model, found = torch.nn.Linear(parameters, 1, bias=False, device="meta"), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: there)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    engine.set_threads(model, CPU)
    assert not found, "OMP_NUM_THREADS decides"
    monkeypatch.delenv("OMP_NUM_THREADS")
    engine.set_threads(model, engine.World(0, 1, torch.device("cuda"), torch.float32))
    assert not found
    engine.set_threads(model, CPU)
    assert found == [threads]


def test_the_exit_code_is_handed_on(monkeypatch):
    for code in (None, 0, 1, 143):
        with pytest.raises(SystemExit) as e:
            engine.leave(code)
        assert e.value.code == code
