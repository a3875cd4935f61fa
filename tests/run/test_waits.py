"""No forward or backward pass makes the CPU wait for a GPU. The meta device stands in for the GPU: its tensors have no
values, so an operator to whose result the CPU must wait raises an error. Kernels' operators tell torch the shapes of
their results. test_gpu_steps.py asks a GPU itself."""

import contextlib
import dataclasses

import pytest
import test_blip2_pairs
import test_train_dpo
import test_train_grpo
import test_train_pairs
import test_unpaired
import torch
from conftest import ROOT, example, tiny_config, tiny_vlm
from test_blip2_pairs import tiny, tower  # noqa: F401  (fixtures)
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import lora
import train_dpo
from data import pack
from kernels.linear import add_into_grad
from loss import token_loss
from model import VLM
from parts import blip2, pairs
from parts.build import build
from parts.spans import span_ends
from run import preference, rollout, unpaired
from run.arguments import run_recipe

META = engine.World(0, 1, torch.device("meta"), torch.float32)
WAITS = NotImplementedError, RuntimeError
BATCH = pack([example(1), example(2, images=0), example(3, text=30)], 8)


class Copies(TorchDispatchMode):
    """Copies from the CPU to the stand-in for which the CPU waits"""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        if f.__name__.startswith("_to_copy") and args[0].device.type != out.device.type and args[0].ndim:
            self.waits += [(f.__name__, args[0].shape)] * (not (kwargs or {}).get("non_blocking"))
        return out


@pytest.fixture(autouse=True)
def copies(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)           # autocast does not know this device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with Copies() as found:
        yield found
    assert not found.waits


def there(model):
    """The model on the stand-in; there is no copy to look at"""
    with torch.utils._python_dispatch._disable_current_modes():
        return model.float().to(META.device)


@pytest.mark.parametrize("stage", ["align", "sft", "lora", "qlora", "recomputed", "into grad"])
def test_stages_of_llava(stage):
    with torch.utils._python_dispatch._disable_current_modes():
        model = tiny_vlm(dtype=torch.float32)
        if stage == "qlora":
            lora.quantize_base(model)
        if "lora" in stage:
            lora.add_adapters(model, 4, 8, 0.25, "all-linear")
    table = {"align": {}, "lora": {"*.lora_*": 1e-3}, "qlora": {"*.lora_*": 1e-3}}
    table = {"multi_modal_projector.*": 1e-3} | table.get(stage, {"language_model.*": 1e-3})
    engine.choose(model, table, torch.float32)
    engine.parallelize(model, META, model.blocks, recompute="block" if stage == "recomputed" else "none")
    model = there(model)
    if stage == "into grad":
        add_into_grad(model)
    for b in (BATCH, pack([example(5)], 8)):
        token_loss(model, b.to(META.device)).backward()
    engine.check_gradients(model)


@pytest.mark.parametrize("kind", train_dpo.METHODS)
def test_preferences(kind, copies):
    """KTO waits once in a step, after the last forward pass that measures z0."""
    s, model = test_train_dpo.settings(loss=kind), there(tiny_vlm())
    if kind != "kto":
        b = preference.pack_pairs(test_train_dpo.PAIRS, 8).to(META.device)
        loss, facts = train_dpo.preference_loss(s, preference.no_reference, model, b)
    else:
        s = test_unpaired.settings()
        micro, seen = [unpaired.pack_unpaired(test_train_dpo.PAIRS[i:j], 8) for i, j in ((0, 4), (4, 6))], []

        def known(model, b):
            seen.append(b)
            return torch.zeros(len(b.keys), 2, device=META.device)
        with pytest.raises(WAITS, match="item"):
            unpaired.measure_zero(s, META, known, model, micro)
        assert len(seen) == 2
        loss, facts = unpaired.unpaired_loss(s, known, model, micro[0].to(META.device))
    loss.backward()
    assert facts.shape == (2, 5)


def test_a_reference_table_is_read_without_waiting():
    table = object.__new__(preference.Table)
    table.world, table.keys, table.values = META, torch.tensor([3, 5, 9]), torch.zeros(3, 2)
    b = preference.pack_pairs([], 8).to(META.device)._replace(keys=torch.tensor([9, 3]))
    assert table(None, b).shape == (2, 2) and table(None, b).device == META.device


def test_rewards():
    s, model = test_train_grpo.settings(kl=0.1), there(tiny_vlm())
    b = test_train_grpo.rolled(s, [*range(6)])
    batch, *others = b
    rollout.rolled_loss(s, model, rollout.Rolled(batch.to(META.device), *(t.to("meta", non_blocking=True)
                                                                         for t in others))).backward()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("groups", [[range(8)], [range(3), range(3, 8)]])
def test_pairs(kind, groups):
    with torch.utils._python_dispatch._disable_current_modes():
        model, folder = test_train_pairs.tiny(kind)
        micro = test_train_pairs.batches(folder, model.cfg, groups)
    model = there(model)
    compared, accuracy = pairs.compare_pairs(model, micro, META, test_train_pairs.METHODS[kind][2], (0, 0))
    for b in compared:
        pairs.pair_loss(model, b).backward()
    assert accuracy.device == META.device


def test_image_text_matching(tiny):  # noqa: F811
    """BLIP-2 draws wrong pairs on the CPU, for which it waits. Its forward and backward passes do not wait."""
    with torch.utils._python_dispatch._disable_current_modes():
        model, folder = tiny()
        b, = test_blip2_pairs.pairs(folder, [range(8)])
        one, = blip2.compare_blip2(model, [b], test_blip2_pairs.world(), blip2.itc_loss, (0, 1))[0]
        tensors = {k: v.float().to(META.device) for k, v in one._asdict().items() if isinstance(v, torch.Tensor)}
        wrong = blip2.Texts(*(t.to(META.device) for t in one.wrong_texts))
    model, one = there(model), one._replace(batch=b.to(META.device), wrong_texts=wrong, **tensors)
    model(one.batch)
    blip2.blip2_loss(model, one).backward()


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "recipes").glob("*.py") if "llava15" not in p.name))
def test_systems_of_the_paper(name):
    """Their widths, with few layers"""
    cfg = run_recipe(ROOT / f"recipes/{name}.py", {"stage": "sft", "toy": False})["paper"]["model"]
    text = dataclasses.replace(cfg.text, num_hidden_layers=4)
    vision = cfg.vision if cfg.second else dataclasses.replace(cfg.vision, num_hidden_layers=3)
    cfg = dataclasses.replace(cfg, vision=vision, text=text)
    with META.device:
        model = build(cfg)
    Q, S = cfg.image_tokens, cfg.vision.image_size
    ids, pixels = [1] + [cfg.image_token_index] * Q + [*range(5, 30)], torch.zeros(1, 3, S, S, dtype=torch.uint8)
    b = pack([(ids, [-100] * (len(ids) - 9) + ids[-9:], pixels)] * 2, S, span_ends(cfg))
    token_loss(model, b.to(META.device)).backward()


@pytest.mark.parametrize("wait", [
    lambda x: x.cpu(), lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: torch.equal(x, x),
    lambda x: bool(x.any()), lambda x: x.tolist(), lambda x: x.long().bincount(), lambda x: x.unique(),
    lambda x: x.repeat_interleave(x.long())])
def test_the_stand_in_shows_waits(wait):
    with pytest.raises(WAITS):
        wait(torch.ones(3, device=META.device))


def test_the_stand_in_shows_copies(copies):
    torch.ones(3).to(META.device)
    assert len(copies.waits) == 1
    copies.waits.clear()


def test_without_rows_the_model_waits():
    with META.device:
        model = VLM(tiny_config())
    with pytest.raises(WAITS, match="nonzero"):
        token_loss(model, BATCH.to(META.device)._replace(rows=()))
