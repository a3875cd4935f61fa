"""The recomputed attention is the model's own; its probabilities are those that generation chose from."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image

import tools.attention
from config import BadSample
from formats import llava
from formats.tokenizer import Tokenizer
from generate import Chat
from parts.build import build
from parts.cross_attention import FlamingoConfig
from parts.gemma import GemmaConfig
from parts.opt import OptConfig
from parts.persimmon import PersimmonConfig
from tools.attention import attention_over_keys, image_maps, read_again, why_no_map

TIGHT = 1e-12
PRE = {"crop_size": {"height": 8, "width": 8}, "size": {"shortest_edge": 8}, "image_mean": [0.5] * 3}
SIZES = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, head_dim=8)
PERCEIVER = dict(latents=3, depth=2, heads=2, head_dim=6)
QFORMER = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40)
MODELS = {"llama": {}, "window": {"sliding_window": 5}, "qwen3": {"qk_norm": True, "qkv_bias": True},
          "prefix": {"mask": "prefix"}, "gemma": {"kind": GemmaConfig}, "opt": {"kind": OptConfig},
          "persimmon": {"kind": PersimmonConfig}}


def tiny_chat(tok, template="chatml", kind=None, vision=(), fields=(), **text):
    """-> Chat of a random model in float64. kind: class of the decoder's config; fields: of VLMConfig"""
    torch.manual_seed(0)
    mask = text.pop("mask", "causal")
    cfg = dataclasses.replace(tiny_config(**text), mask=mask, **dict(fields))
    cfg.text = kind(**SIZES | text) if kind else cfg.text
    cfg.vision = dataclasses.replace(cfg.vision, **dict(vision))
    model = build(cfg)
    for n, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in n and n.endswith("weight") else 0.0, std=0.2)
    return Chat.of(model.double(), llava.Folder(tok, {}, {}, PRE, {}, {}), template, "Be brief.", "pad")


def noise(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (14, 9, 3), dtype=np.uint8))


def asked(chat, images=1, text="What is this?", n=6):
    """-> prompt, ids of the answer, tiles, blocks"""
    tiles, blocks = chat.look([noise(i) for i in range(images)])
    prompt, steps = chat.prompt([("<image>\n" * images + text, None)], blocks), []
    chat.answers([prompt], tiles, n, each=steps.append)
    return prompt, steps[-1][0], tiles, blocks


@pytest.fixture(scope="module")
def tok(bytes_folder):
    return Tokenizer(bytes_folder)


@pytest.mark.parametrize("name", MODELS)
def test_softmax_times_values_enters_the_output_projection(tok, name, monkeypatch):
    chat = tiny_chat(tok, **MODELS[name])
    prompt, answer, tiles, _ = asked(chat, 2)
    seen, into = [], []

    def spy(attn, x, cos, sin, lo, hi, rows):
        p = attention_over_keys(attn, x, cos, sin, lo, hi, rows)
        v = attn.v_proj(x).unflatten(-1, (-1, attn.K))
        v = v.repeat_interleave(p.shape[1] // v.shape[1], 1)
        still = attention_over_keys(attn, x, torch.ones_like(cos), torch.zeros_like(sin), lo, hi, rows)
        seen.append((rows, torch.einsum("rhn,nhk->rhk", p, v).flatten(1), (p - still).abs().max(), p))
        return p

    monkeypatch.setattr(tools.attention, "attention_over_keys", spy)
    layers = chat.model.language_model.model.layers
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: into.append(args[0])) for layer in layers]
    _, found = read_again(chat, prompt, answer, tiles, range(2))
    for h in hooks:
        h.remove()
    assert len(seen) == len(into) == len(found) == 2
    for (rows, ours, moved, p), whole, mean in zip(seen, into, found.values()):
        whole = whole if len(whole) == len(rows) else whole[rows]          # the last layer has only these queries
        torch.testing.assert_close(ours, whole, rtol=TIGHT, atol=TIGHT)
        torch.testing.assert_close(mean.sum(1), torch.ones(len(rows)).double(), rtol=TIGHT, atol=TIGHT)
        torch.testing.assert_close(mean, p.mean(1), rtol=0, atol=0)
        assert (moved > 1e-3) == (name != "opt"), "OPT does not rotate; for the others, the rotation matters"


@pytest.mark.parametrize("name", ["llama", "prefix"])
@pytest.mark.parametrize("images", [0, 2])
def test_probabilities_are_those_of_generation(tok, name, images, monkeypatch):
    """The logits of each step of generation, through the cache, give the same softmax."""
    chat = tiny_chat(tok, **MODELS[name])
    steps, forward = [], type(chat.model).forward
    monkeypatch.setattr(type(chat.model), "forward", lambda *a, **k: steps.append(forward(*a, **k)) or steps[-1])
    prompt, answer, tiles, _ = asked(chat, images)
    monkeypatch.undo()
    true = torch.cat(steps)
    true[:, sorted(chat.banned)] = -torch.inf
    p, _ = read_again(chat, prompt, answer, tiles)
    torch.testing.assert_close(p, true.softmax(-1), rtol=1e-6, atol=TIGHT)
    assert p.argmax(1).tolist() == answer and not p[:, 3].any() and p.shape == (6, 512)
    torch.testing.assert_close(read_again(chat, prompt, answer[:2], tiles)[0], p[:2], rtol=TIGHT, atol=TIGHT)


def test_the_neutral_question_itself_gives_one(tok):
    """a / b: row 0 of the neutral question is the divisor. Another question moves the map."""
    chat = tiny_chat(tok)
    prompt, answer, tiles, blocks = asked(chat, 2, "")
    p, ratio, a = image_maps(chat, prompt, answer, tiles, blocks, "", [0, 1])
    assert ratio.shape == a.shape == (2, 6, 2, 2, 2) and p.shape == (6, 512)
    torch.testing.assert_close(ratio[:, 0], torch.ones(2, 2, 2, 2).double(), rtol=1e-10, atol=1e-10)
    assert (ratio[:, 1:] - 1).abs().amax((2, 3, 4)).min() > 1e-3
    whole = read_again(chat, prompt, answer, tiles, [1])[1][1]
    keys = (prompt == 3).nonzero()[:, 0]
    assert torch.equal(a[1].flatten(1), whole[:, keys]) and len(keys) == 8
    other = image_maps(chat, prompt, answer, tiles, blocks, "Yes!", [0, 1])[1]
    assert (other[:, 0] - 1).abs().amax((1, 2, 3)).min() > 1e-3


def test_modes_and_hooks_are_left_behind(tok):
    chat = tiny_chat(tok)
    prompt, answer, tiles, _ = asked(chat)
    chat.model.train()
    read_again(chat, prompt, answer, tiles, [0])
    assert chat.model.language_model.training
    with pytest.raises(IndexError):
        read_again(chat, torch.tensor([9999]), answer, [], [0])
    assert chat.model.language_model.training
    assert not any(layer.self_attn._forward_pre_hooks for layer in chat.model.language_model.model.layers)


@pytest.mark.parametrize("reason, how", [
    ("cross-attention", dict(kind=lambda **k: FlamingoConfig(**k, cross_width=32), vision={"keep_class": True}.items(),
                             fields=dict(connector="perceiver", tokens=1, connector_args=PERCEIVER).items())),
    ("MMCA", dict(mask="mmca")),
    ("qformer", dict(fields=dict(connector="qformer", tokens=4, connector_args=QFORMER).items())),
    ("tiles", dict(fields=dict(layout={"kind": "grid", "most": 2}).items()))],
    ids=["flamingo", "mmca", "qformer", "tiles"])
def test_images_without_a_grid_are_refused(tok, reason, how):
    """In one line; the probabilities are there"""
    chat = tiny_chat(tok, **how)
    prompt, answer, tiles, blocks = asked(chat)
    with pytest.raises(BadSample) as e:
        image_maps(chat, prompt, answer, tiles, blocks, "", [0])
    assert reason in str(e.value) and str(e.value).startswith("no heat map") and "\n" not in str(e.value)
    p, _ = read_again(chat, prompt, answer, tiles)
    assert p.argmax(1).tolist() == answer


def test_a_text_alone_has_no_map(tok):
    chat = tiny_chat(tok)
    assert why_no_map(chat.cfg) is None
    prompt, answer, tiles, blocks = asked(chat, 0)
    with pytest.raises(BadSample, match="no heat map: no image"):
        image_maps(chat, prompt, answer, tiles, blocks, "", [0])
