"""What engine and lora put around a model, for the systems whose decoder or tower is their own: two ranks (one without
an image), recomputation, torch.compile, 16-bit autocast, LoRA, NF4."""

import pytest
import torch
from conftest import fork, train_step
from part_checks import config, random_model, samples
from safetensors.torch import load_file, save_file
from test_cross_attention import flamingo
from test_distributed import Spy
from test_instruct import instructblip, read
from test_internvit import KINDS as INTERNVIT_KINDS
from test_internvit import SIZES as INTERNVIT
from test_model import Syncs, all_logits, gradients
from test_opt import SIZES as OPT
from test_patches import SIZES as PATCHES
from test_persimmon import SIZES as PERSIMMON
from test_pool import CASES as POOLS
from test_qformer import blip2
from test_resampler import qwen_vl
from test_two_towers import comm

import engine
import lora
from data import pack
from loss import token_loss
from parts.gemma import GemmaConfig
from parts.idefics3_vit import Idefics3ViTConfig
from parts.internvit import InternViTConfig
from parts.opt import OptConfig
from parts.patches import PatchesConfig
from parts.persimmon import PersimmonConfig
from parts.spans import span_ends


def blip2_opt():
    cfg = blip2()
    cfg.text = OptConfig(**OPT)
    return cfg


def internvit(name):
    cfg = config(connector="shuffle", tokens=1)
    cfg.vision = InternViTConfig(**INTERNVIT, **INTERNVIT_KINDS[name])
    return cfg


def fuyu():
    cfg = config(PersimmonConfig(**PERSIMMON), connector="patches")
    cfg.vision = PatchesConfig(**PATCHES)
    return cfg


def pooled(name):
    return config(vision={"patch_size": 2}, connector=name, tokens=9, connector_args=POOLS[name])


def smolvlm():
    cfg = config(connector="shuffle_linear", tokens=1)
    cfg.vision = Idefics3ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                                   image_size=8, patch_size=4)
    return cfg


CPU = engine.World(0, 1, torch.device("cpu"), torch.float64)
MODELS = {"flamingo": flamingo, "idefics": lambda: flamingo("idefics"), "comm": comm,
          "mmca": lambda: config(mask="mmca", connector="linear_norm"), "blip2": blip2_opt, "qwen_vl": qwen_vl,
          "instructblip": instructblip, "internvit": lambda: internvit("6b"), "fuyu": fuyu,
          "gemma": lambda: config(GemmaConfig(**PERSIMMON), mask="prefix"), "pool": lambda: pooled("pool"),
          "abstractor": lambda: pooled("abstractor"),
          "anyres": lambda: config(connector="anyres", layout={"kind": "anyres"}), "smolvlm": smolvlm}


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def batch(cfg, chosen=lambda sample: True):
    reader = read(12) if cfg.connector == "instruct" else None
    return pack([s for s in samples(cfg) if chosen(s)], 8, span_ends(cfg), reader)


def worst(found, truth):
    """Largest error relative to the largest gradient of its tensor; the true gradient of a key bias is 0"""
    assert found.keys() == truth.keys()
    return max(float((found[n] - g).abs().max() / g.abs().max().clamp(min=1e-99)) for n, g in truth.items()
               if not n.endswith("k_proj.bias"))


@pytest.mark.parametrize("wrap", ("ddp", "fsdp"))
def test_two_ranks_are_one(kind, wrap, tmp_path):
    """Rank 1 has text alone"""
    def rank_step(rank):
        model = random_model(MODELS[kind]())
        world = engine.World(rank, 2, torch.device("cpu"), torch.float64)
        engine.choose(model, {"*": 1e-2}, torch.float64)
        mine = batch(model.cfg, lambda sample: bool(len(sample[2])) == (rank == 0))
        model = engine.parallelize(model, world, model.blocks, wrap)
        spy = Spy(model)
        result = train_step(model, spy, [mine], token_loss, world, check=True)
        if rank == 0:
            save_file({k: g.contiguous() for k, g in spy.seen.items()}, tmp_path / "grads")
        return result["loss"]

    losses = fork(2, rank_step, tmp_path)
    model = random_model(MODELS[kind]())
    total, truth = gradients(model, [batch(model.cfg)])
    n = int((batch(model.cfg).labels >= 0).sum())
    assert abs(losses[0] / (total / n) - 1) < 1e-13 and losses[0] == losses[1]
    assert worst(load_file(tmp_path / "grads"), {k: g / n for k, g in truth.items()}) < 1e-12


def same_when(kind, blocks, **how):
    """Are loss and gradients the same when engine.parallelize changes the blocks that blocks(model) gives?"""
    model, again = (random_model(MODELS[kind]()) for _ in range(2))
    loss, truth = gradients(model, [batch(model.cfg)])
    engine.parallelize(again, CPU, blocks(again), **how)
    other, found = gradients(again, [batch(model.cfg)])
    return abs(other / loss - 1) < 1e-13 and worst(found, truth) < 1e-12


def test_recomputed(kind):
    assert same_when(kind, lambda model: model.blocks, recompute="block")


def last_blocks(model):
    """-> the last block of the tower and of the language model, and a gated block: one of each class that trains"""
    gated = getattr(model.language_model, "gated_layers", ())
    several = model.vision_tower.blocks, model.language_model.model.layers, gated
    return [blocks[-1] for blocks in several if len(blocks)]


@pytest.mark.parametrize("kind", ("flamingo", "idefics", "mmca", "blip2", "qwen_vl", "internvit", "fuyu", "gemma",
                                  "smolvlm"))
def test_compiled(kind, monkeypatch):
    """Every block becomes one graph, without a break. The other systems have blocks of LLaVA (tests/test_engine.py)"""
    plain, counters = torch.compile, torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(torch, "compile", lambda forward: plain(forward, backend="aot_eager", fullgraph=True))
    before = counters["unique_graphs"]
    assert same_when(kind, last_blocks, recompute="block", compile=True)
    assert counters["unique_graphs"] - before >= len(last_blocks(random_model(MODELS[kind]())))


@pytest.mark.parametrize("kind", ("blip2", "qwen_vl", "instructblip"))
def test_a_step_has_one_host_device_sync(kind):
    model = random_model(MODELS[kind]())
    stream = batch(model.cfg)
    with Syncs() as syncs:
        model(*stream).backward()
    assert syncs.names == ["nonzero"]


def test_autocast(kind):
    """bf16 stays near float32"""
    model = random_model(MODELS[kind]()).float()
    for p in model.parameters():
        p.data *= 0.5
    with torch.no_grad():
        exact = all_logits(model, batch(model.cfg))
        with torch.autocast("cpu", torch.bfloat16):
            rough = all_logits(model, batch(model.cfg))
    assert rough.dtype == torch.bfloat16 and (rough - exact).norm() < 0.1 * exact.norm()


def test_adapters(kind):
    """New adapters change nothing, and only they get a gradient. NF4 leaves the gated blocks as they are"""
    model = random_model(MODELS[kind]())
    with torch.no_grad():
        plain = all_logits(model, batch(model.cfg))
    names = lora.add_adapters(model, 2, 4, 0.0, "all-linear")
    assert len(names) == (6 if kind in ("blip2", "fuyu") else 7) * model.cfg.text.num_hidden_layers
    with torch.no_grad():
        assert torch.equal(all_logits(model, batch(model.cfg)), plain)
    engine.choose(model, {"*.lora_*": 1e-3}, torch.float64)
    _, grads = gradients(model, [batch(model.cfg)])
    assert len(grads) == 2 * len(names)
    other = random_model(MODELS[kind]()).float()
    for p in other.parameters():
        p.data *= 0.5
    with torch.no_grad():
        plain = all_logits(other, batch(model.cfg))
    assert lora.quantize_base(other) == names
    with torch.no_grad():
        rough = all_logits(other, batch(model.cfg))
    assert 0 < (rough - plain).norm() < 0.5 * plain.norm()
