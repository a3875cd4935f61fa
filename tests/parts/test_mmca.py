"""MMCA against a loop over its formula, text alone against causal attention, and with rows, cache and packing."""

import copy

import pytest
import torch
from conftest import error, example
from part_checks import (
    check_cache,
    check_flops,
    check_groups,
    check_no_images,
    check_packed,
    check_rows,
    config,
    random_model,
)
from test_model import all_logits

from data import pack
from model import TextConfig
from parts.build import build
from parts.gemma import GemmaConfig
from parts.mmca import MMCAAttention, spans


@pytest.fixture
def model():
    return random_model(config(vision={"keep_class": True, "feature_layer": -1}, mask="mmca", tokens=5,
                               connector="linear_norm"))


def test_attention_is_the_formula():
    """Two documents with images, GQA. Reference: a loop over tokens with two softmaxes"""
    torch.manual_seed(0)
    cfg = TextConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    layer = MMCAAttention(cfg).double()
    image = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 0], dtype=torch.bool)
    lo = torch.tensor([0] * 8 + [8] * 4, dtype=torch.int32)
    hi = torch.arange(1, 13, dtype=torch.int32)
    x = torch.randn(12, 16, dtype=torch.float64)
    cos, sin = torch.ones(12, 2, dtype=torch.float64), torch.zeros(12, 2, dtype=torch.float64)      # no rotation
    q, k, v = (f(x).view(12, -1, 4) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))                                              # (12, 4, 4)
    out = torch.zeros(12, 4, 4, dtype=torch.float64)
    for i in range(12):
        if image[i]:
            out[i] = v[i]
            continue
        for kind in (False, True):
            seen = [j for j in range(int(lo[i]), i + 1) if bool(image[j]) == kind]
            if seen:
                p = (torch.einsum("hk,jhk->hj", q[i], k[seen]) / 2).softmax(-1)
                out[i] += torch.einsum("hj,jhk->hk", p, v[seen])
    rows = torch.tensor([1, 3, 4, 11])
    for chosen in (None, rows):
        mine = layer(x, cos, sin, spans(image, image, lo, hi, chosen), hi, chosen)
        true = layer.o_proj(out.flatten(1))
        assert (mine - (true if chosen is None else true[chosen])).abs().max() < 1e-13


def test_text_alone_is_causal_attention_bit_for_bit(model):
    plain = copy.deepcopy(model.cfg)
    plain.mask = "causal"
    causal = build(plain).double()
    causal.load_state_dict(model.state_dict())
    text = [example(2, images=0, text=14), example(5, images=0, text=30), example(6, images=0, text=3)]
    with torch.no_grad():
        a, b = (all_logits(m, pack(text, 8)) for m in (model, causal))
        mixed = all_logits(model, pack([example(1, model_patches=5), *text], 8))[15:]
        images = [all_logits(m, pack([example(1, model_patches=5)], 8)) for m in (model, causal)]
    assert torch.equal(a, b)
    assert (mixed - b).abs().max() < 1e-13 * b.abs().max()       # a stream with images cuts the work in another way
    assert (images[0] - images[1]).abs().max() > 1e-3            # with an image the two masks do differ


def test_image_tokens_see_nothing_else(model):
    """Other text and another image before an image move no hidden state of it"""
    images = example(3, images=2)[2]
    other = images.clone()
    other[0] = 255 - other[0]
    ids = [1, 20, *[3] * 5, 21, *[3] * 5, 22]
    with torch.no_grad():
        one, two = (all_logits(model, pack([(i, [-100] * len(i), x)], 8)) for i, x in
                    ((ids, images), ([1, 30, *ids[2:]], other)))
    assert torch.equal(one[8:13], two[8:13]) and not torch.equal(one[13], two[13])


@pytest.mark.parametrize("check", [check_packed, check_no_images, check_flops, check_rows, check_cache, check_groups])
def test_all_that_parts_have_in_common(model, check):
    check(model)


def test_decoders_without_mmca_stop():
    with torch.device("meta"):
        assert "gemma" in error(build, config(GemmaConfig(), mask="mmca"))
        assert "sliding_window=4" in error(build, config(TextConfig(sliding_window=4), mask="mmca"))
