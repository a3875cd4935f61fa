"""The plan that is printed before anything is spent: who trains, memory, disk and operations."""

import types

import pytest
import torch
from conftest import example, tiny_config, tiny_vlm, train_step
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

import engine
import kernels
import lora
from data import Batch, pack
from kernels.cross_entropy import CHUNK_ROWS, linear_cross_entropy_ref, logits_bytes
from kernels.linear import add_into_grad
from loss import supervised, token_loss
from model import VLM, TextConfig, VisionConfig, VLMConfig
from parts.build import build
from parts.init import init_weights
from run import plan

CPU = engine.World(0, 1, torch.device("cpu"), torch.float64)


def settings(recompute="none"):
    return types.SimpleNamespace(parallel="auto", recompute=recompute, batch_size=3, image_aspect="pad", compile=False)


def batch(*seeds):
    return pack([example(s) for s in seeds], 8)


def test_the_plan_names_what_trains_at_which_rate():
    model = tiny_vlm()
    lrs = engine.choose(model, {"multi_modal_projector.*": 2e-3, "language_model.*": 1e-5}, torch.float64)
    text = "\n".join(plan.lines(model, lrs, CPU, [batch(0, 1), batch(2)], 7, settings()))
    connector = 32 * 32 * 2 + 32 * 2
    for words in (f"multi_modal_projector {connector:,} 0", "lr 0.002: 4 tensors", "lr 1e-05: 21 tensors",
                  "7 steps of 3 samples; the first one, on this rank: 42 tokens in 2 packed sequence(s), 12 supervised",
                  "MiB activations", "1 x cpu, torch.float64"):
        assert words in " ".join(text.split()), text


# ---- operations -----------------------------------------------------------------------------------------------------

def test_flops_are_those_counted_by_hand():
    model = tiny_vlm()
    engine.choose(model, {"multi_modal_projector.*": 1e-3}, torch.float64)
    D, F, C, M, V, P, T = 32, 48, 32, 48, 512, 4, 5                       # T: patches and the class token
    vit = P * D * 48 + 2 * T * (4 * D * D + 2 * D * F)                    # frozen, nothing before it trains
    qo, kv, mlp = 2 * C * C, 2 * C * C // 2, 3 * C * M                    # two of four heads share keys
    assert plan.flops(model, plan.rows(model.cfg)) == {
        "images": 2 * vit + P * (4 * D * C + 6 * C * C),                  # nothing before the first one trains
        "tokens": 4 * (qo + kv + mlp) + 4 * kv,                           # in the last layer a token makes keys alone
        "supervised": 4 * (qo + mlp + V * C)}
    engine.choose(model, {"multi_modal_projector.*": 1e-3, "language_model.*": 1e-3}, torch.float64)
    assert plan.flops(model, plan.rows(model.cfg))["tokens"] == 6 * (qo + 2 * kv + mlp)


def test_flops_agree_with_the_counter_of_torch():
    """But for attention"""
    from torch.utils.flop_counter import FlopCounterMode
    model, b = tiny_vlm(vocab_size=8192), batch(0, 1, 2)
    engine.choose(model, {"multi_modal_projector.*": 1e-3, "language_model.*": 1e-3}, torch.float64)
    units = dict(tokens=len(b.ids), supervised=supervised(b.labels), images=len(b.images))
    ours = sum(f * units[u] for u, f in plan.flops(model, plan.rows(model.cfg)).items())
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}  # the counter does not know these
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(*b, head=linear_cross_entropy_ref).backward()
    assert ours == counter.get_total_flops()


# ---- memory ---------------------------------------------------------------------------------------------------------

class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes that tensors made in here held at once."""

    def __init__(self):
        super().__init__()
        self.most, self.now, self.known = 0, 0, {}                    # now: an upper bound, as tensors are freed

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.known:
                self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.now += storage.nbytes()
        if self.now > self.most:
            self.known = {k: v for k, v in self.known.items() if not v[0].expired()}
            self.now = sum(size for _, size in self.known.values())
            self.most = max(self.most, self.now)
        return out


@pytest.mark.parametrize("also, lora_r, recompute", [([], 0, "none"), (["language_model.*"], 0, "none"),
                                                     (["language_model.*"], 0, "block"), (["*.lora_*"], 8, "none")])
def test_the_plan_guesses_memory_within_twofold(also, lora_r, recompute):
    guess, measured = guessed_and_measured(also, lora_r, recompute)
    assert measured / 2 < guess < measured * 2, f"guess {guess / 2**20:.1f} MiB, measured {measured / 2**20:.1f}"


@pytest.mark.parametrize("recompute", ("none", "block"))
def test_a_tower_that_trains_keeps_its_activations(recompute):
    """What it adds to the memory of a step, within twofold"""
    frozen, trained = (guessed_and_measured(also, 0, recompute) for also in ([], ["vision_tower.*"]))
    guess, measured = (b - a for a, b in zip(frozen, trained))
    assert measured / 2 < guess < measured * 2, f"guess {guess / 2**20:.1f} MiB, measured {measured / 2**20:.1f}"


def test_each_tower_that_trains_counts_itself():
    """COMM has two. Elements of fp32 per image: tokens x blocks x (7 widths + 2 MLP widths)"""
    def work(*train):
        with torch.device("meta"):
            model = build(cfg)
        engine.choose(model, dict.fromkeys(["multi_modal_projector.*", *train], 1e-3), torch.float32)
        return plan.memory(model, w, [micro], settings())[1]
    w, micro = engine.World(0, 1, torch.device("cpu"), torch.float32), batch(0, 1)
    cfg = tiny_config()
    cfg.connector, cfg.vision.feature_layer = "comm", (1, 2)
    cfg.second = VisionConfig("dinov2", 64, 80, 4, 4, 8, 4, feature_layer=(1, 3))
    first, second = (4 * len(micro.images) * 5 * n for n in (2 * (7 * 32 + 2 * 48), 3 * (7 * 64 + 2 * 80)))
    assert work("vision_tower.second.*") - work() == second
    assert work("vision_tower.vision_model.*") - work() == first
    assert work("vision_tower.*") - work() == first + second


def guessed_and_measured(also, lora_r, recompute):
    """-> two numbers of bytes: what the plan says of two steps of stage 1 in which `also` trains, and what they take"""
    torch.manual_seed(0)
    model = VLM(VLMConfig(VisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                                       num_attention_heads=4, image_size=48, patch_size=8),
                          TextConfig(vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=4,
                                     num_attention_heads=4, num_key_value_heads=4, head_dim=16), image_token_index=3))
    init_weights(model)
    if lora_r:
        lora.add_adapters(model, lora_r, 16, 0.0, "all-linear")
    w = engine.World(0, 1, torch.device("cpu"), torch.float32)
    lrs = engine.choose(model, dict.fromkeys(["multi_modal_projector.*", *also], 1e-3), torch.float32)
    micro = [pack([example(i, 30 + i % 50, 10, 1, 36, 48) for i in range(20)], 48)]
    guess = sum(plan.memory(model, w, micro, settings(recompute)))
    engine.parallelize(model, w, model.blocks, recompute=recompute)
    optimizer = engine.adamw(model, lrs, 0.0)
    with Peak() as peak:
        for _ in range(2):                                             # moments exist after the first step
            train_step(model, optimizer, micro, token_loss, w)
    return guess, peak.most + sum(p.nbytes for p in model.parameters())


def seven_b(stage, layers, device):
    """A model of the widths of a 7B, with few layers, and two packed sequences
    -> function(device): the model, its learning rates; the plan's memory in bytes; the micro-batches"""
    cfg = VLMConfig(VisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16,
                                 image_size=336, patch_size=14), TextConfig(num_hidden_layers=layers),
                    image_token_index=3)
    table = {"multi_modal_projector.*": 1e-3} | {"align": {}, "lora": {"*.lora_*": 1e-3},
                                                 "sft": {"language_model.*": 1e-3}}[stage]
    # half of the tokens are supervised: the plan counts the last layer, of which only these pass, as any other
    micro = [pack([example(i, 600, 590, 1, 576, 336) for i in range(n)], 336) for n in (2, 4)]

    def built(device):
        with torch.device(device):
            model = VLM(cfg)
            if stage == "lora":
                lora.add_adapters(model, 128, 256, 0.0, "all-linear")
        lrs = engine.choose(model, table, torch.bfloat16)
        if plan.adds_into_grad(w, False):
            add_into_grad(model)
        return model, lrs
    w = engine.World(0, 1, torch.device(device), torch.bfloat16)
    return built, sum(plan.memory(built("meta")[0], w, micro, settings())), micro


def two_steps(model, lrs, micro, world, forget):
    """forget: called before the second step; moments exist after the first one"""
    optimizer = engine.adamw(model, lrs, 0.0)
    for _ in range(2):
        forget()
        for b in micro:
            with world.autocast():
                loss = token_loss(model, b)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("stage, layers", [("align", 4), ("lora", 6), ("sft", 2)])
def test_the_plan_is_the_memory_of_a_gpu(stage, layers, monkeypatch):
    """Within 10 %. No tensor has memory here: the kernels' operators tell torch the shapes of their results. The chunk
    of logits is inside an operator. test_gpu_steps.py compares the plan with the allocator of a GPU."""
    monkeypatch.setattr(kernels, "choice", "triton")
    built, guess, micro = seven_b(stage, layers, "cpu")
    micro, w = [b.to("cpu") for b in micro], engine.World(0, 1, torch.device("cpu"), torch.bfloat16)
    with FakeTensorMode(), Peak() as peak:
        fake = [Batch(*(torch.empty(t.shape, dtype=t.dtype) for t in b)) for b in micro]
        two_steps(*built("cpu"), fake, w, lambda: setattr(peak, "most", 0))
    measured = peak.most + logits_bytes(supervised(micro[1].labels), 32000, torch.empty(0, dtype=w.dtype))
    print(f"{stage}: guess {guess / 2**30:.3f} GiB, counted {measured / 2**30:.3f} GiB, {guess / measured:.3f}")
    assert 0.9 < guess / measured < 1.1


def test_only_one_eager_process_adds_to_grad(monkeypatch):
    """Then the plan counts no 16-bit copies of trained weights: 2 bytes for each."""
    model, s = tiny_vlm(dtype=torch.float32), settings()
    states = {}
    cases = ("triton", 1, False), ("torch", 1, False), ("triton", 2, False), ("triton", 1, True)
    for choice, size, compiled in cases:
        monkeypatch.setattr(kernels, "choice", choice)
        s.compile = compiled
        w = engine.World(0, size, torch.device("cpu"), torch.bfloat16)
        assert plan.adds_into_grad(w, compiled) == ((choice, size, compiled) == ("triton", 1, False))
        states[choice, size, compiled] = plan.memory(model, w, [batch(0)], s)[0]
    copies = 2 * sum(p.numel() for p in model.parameters())
    least = states.pop(("triton", 1, False))
    assert set(states.values()) == {least + copies}


@pytest.mark.parametrize("R, rows", [(100, 100), (5000, CHUNK_ROWS)])
def test_the_plan_counts_the_logits_of_the_loss(R, rows):
    """With a vocabulary of 128k, a chunk of logits is bounded by its rows: 2 GB in fp32."""
    with torch.device("meta"):
        model = VLM(tiny_config(vocab_size=128256)).requires_grad_(False)
    w = engine.World(0, 1, torch.device("cpu"), torch.float32)
    ids, spans = torch.zeros(R, dtype=torch.long), torch.arange(R)
    micro = [types.SimpleNamespace(ids=ids, labels=ids, lo=spans, hi=spans + 1, images=())]
    work = plan.memory(model, w, micro, settings("block"))[1]
    assert rows * 128256 * 8 <= work < 1.05 * rows * 128256 * 8


def test_disk_space_is_that_of_the_files_written(aligned):
    """A checkpoint is trained weights and two moments in fp32; model/ is all weights in fp16."""
    model = tiny_vlm(dtype=torch.float32)
    engine.choose(model, {"multi_modal_projector.*": 1e-3}, torch.float32)
    checkpoint, published = plan.disk(model, torch.float16)
    found = sum(p.stat().st_size for p in (aligned / "checkpoints/step_0000006").glob("[to]*.safetensors"))
    assert 0 < found - checkpoint < 3000                                       # headers
    weights = (aligned / "model/model.safetensors").stat().st_size
    assert abs(weights - published) < 20_000
