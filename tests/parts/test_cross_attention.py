"""Gated cross-attention: who sees which image, closed gates, cache, packing, both forms of the block."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
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
from formats.configs import typed
from model import Llama
from parts.build import build
from parts.cross_attention import FlamingoConfig, GatedBlock, IdeficsConfig, last_image
from parts.init import init_new

SIZES = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, cross_width=32, cross_every=2)
PERCEIVER = dict(latents=3, depth=2, heads=2, head_dim=6)
KINDS = {"flamingo": FlamingoConfig(**SIZES), "idefics": IdeficsConfig(**SIZES, cross_qk_norm=True, gate_width=32)}


def flamingo(kind="flamingo"):
    return config(copy.deepcopy(KINDS[kind]), {"keep_class": True}, connector="perceiver", tokens=1,
                  connector_args=PERCEIVER)


@pytest.fixture(params=KINDS)
def model(request):
    return random_model(flamingo(request.param))


def test_spans_of_the_last_image():
    """Two documents: text, image, text, image, text | text, image. Latents per image: 3"""
    marker = torch.tensor([0, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
    lo, hi = last_image(marker, torch.tensor([0, 1, 2, 3, 4, 0, 1]), 3)
    assert lo.tolist() == [0, 0, 0, 3, 3, 6, 6] and hi.tolist() == [0, 3, 3, 6, 6, 6, 9]
    assert [len(t) for t in last_image(marker[:0], torch.zeros(0, dtype=torch.long), 3)] == [0, 0]


def test_a_token_sees_the_last_image_alone(model):
    """BOS, image, 3 words, image, 3 words. Another first image moves tokens 1 to 4 through its latents, later ones only
    through earlier tokens: with self-attention switched off, tokens 5 to 8 stay."""
    ids, images = [1, 3, 7, 8, 9, 3, 7, 8, 9], example(1, images=2)[2]
    for layer in model.language_model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    other = images.clone()
    other[0] = 255 - other[0]
    with torch.no_grad():
        a, b = (all_logits(model, pack([(ids, [-100] * 9, x)], 8)) for x in (images, other))
    moved = (a != b).any(1).tolist()
    assert moved == [False] + [True] * 4 + [False] * 4


def test_the_papers_block_is_the_formula():
    """x + tanh(a) attention(norm(x), z), x + tanh(b) relu(norm(x) A)^2 B; two latents per image, token 0 sees none"""
    torch.manual_seed(0)
    block = GatedBlock(FlamingoConfig(**SIZES)).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, z = torch.randn(4, 32, dtype=torch.float64), torch.randn(4, 32, dtype=torch.float64)
    seen = [(0, 0), (0, 2), (2, 4), (2, 4)]
    a, y = block.cross_attn, F.layer_norm(x, (32,), block.input_layernorm.weight, block.input_layernorm.bias)
    q, k, v = ((w.weight @ t.T).T.view(4, 4, 8) for w, t in ((a.q_proj, y), (a.k_proj, z), (a.v_proj, z)))
    out = torch.zeros(4, 4, 8, dtype=torch.float64)
    for i, (lo, hi) in enumerate(seen):
        p = (torch.einsum("hk,jhk->hj", q[i], k[lo:hi]) / 8**0.5).softmax(-1)
        out[i] = torch.einsum("hj,jhk->hk", p, v[lo:hi])
    true = x + block.alpha_cross_attn.tanh() * (out.flatten(1) @ a.o_proj.weight.T)
    y = F.layer_norm(true, (32,), block.post_attention_layernorm.weight, block.post_attention_layernorm.bias)
    h = F.relu(y @ block.mlp.up_proj.weight.T) ** 2 @ block.mlp.down_proj.weight.T
    true = true + block.alpha_dense.tanh() * h
    lo, hi = torch.tensor(seen, dtype=torch.int32).T.contiguous()
    assert (block(x, z, lo, hi) - true).abs().max() < 1e-13


def test_closed_gates_give_the_bare_language_model(model):
    for n, p in model.named_parameters():
        if "alpha_" in n:
            p.data.zero_()
    bare = Llama(model.cfg.text).double()
    bare.load_state_dict({k: x for k, x in model.language_model.state_dict().items() if not k.startswith("gated")})
    batch = pack([example(1, model_patches=1), example(2, images=0), example(3, images=3, model_patches=1)], 8)
    with torch.no_grad():
        hidden = bare(bare.embed(batch.ids), batch.pos, batch.lo, batch.hi)
        assert torch.equal(all_logits(model, batch), hidden @ bare.head_weight.T)


def test_without_gates_blocks_are_open(model):
    """gate_width=0 is the model whose gates are tanh(20) = 1, without their parameters, bit for bit"""
    bare = config(dataclasses.replace(model.cfg.text, gate_width=0), {"keep_class": True}, connector="perceiver",
                  tokens=1, connector_args=PERCEIVER)
    bare = build(bare).double()
    state = {n: p for n, p in model.state_dict().items() if "alpha_" not in n}
    bare.load_state_dict(state)
    for n, p in model.named_parameters():
        if "alpha_" in n:
            p.data.fill_(20)
    batch = pack([example(1, model_patches=1), example(2, images=0)], 8)
    with torch.no_grad():
        assert torch.equal(all_logits(model, batch), all_logits(bare, batch))
    init_new(bare, {n for n in state if "gated_layers" in n})
    text = bare.cfg.text
    assert typed(type(text), "a folder", dataclasses.asdict(text)) == text, "config.json of such a model is read again"


def test_new_blocks_begin_closed_and_learn(model):
    """parts.init.init_new: gates 0, norms 1; the gates get a gradient, and after they open, all else does"""
    cfg = model.cfg
    with torch.device("meta"):
        fresh = build(cfg)
    new = {n for n, _ in fresh.named_parameters() if "gated_layers" in n or n.startswith("multi_modal")}
    fresh.load_state_dict({n: x for n, x in model.state_dict().items() if n not in new}, strict=False, assign=True)
    init_new(fresh, new)
    fresh = fresh.double()
    values = {n: p for n, p in fresh.named_parameters() if n in new}
    assert len(values) == len(new)
    for n, p in values.items():
        if "alpha_" in n:
            assert not p.any()
        elif "norm" in n:
            assert (p == (0 if n.endswith("bias") else 1)).all(), n
        else:
            assert 0 < p.std() < 1, n
    fresh(*pack([example(1, model_patches=1)], 8)).backward()
    for n, p in values.items():
        assert p.grad.any() == ("alpha_" in n), n


@pytest.mark.parametrize("check", [check_packed, check_no_images, check_flops, check_rows, check_cache, check_groups])
def test_all_that_parts_have_in_common(model, check):
    check(model)


def test_blocks_are_listed_for_sharding(model):
    assert {id(b) for b in model.blocks} >= {id(b) for b in model.language_model.gated_layers}
    assert len(model.language_model.gated_layers) == 2


def test_wrong_settings_stop():
    cfg = flamingo()
    cfg.tokens = 3
    assert "tokens=1" in error(build, cfg)
    cfg.tokens, cfg.connector, cfg.connector_args = 1, "mlp", {}
    assert "connector=perceiver" in error(build, cfg)
    cfg = flamingo()
    cfg.text.cross_width = 5
    assert error(build, cfg) == "image features of width 32 need text.cross_width=32, not 5"


def test_a_lost_marker_is_an_error(model):
    ids, labels, images = example(1, model_patches=1)
    with pytest.raises(RuntimeError, match="as many image tokens as images"):
        model(*pack([([7 if i == 3 else i for i in ids], labels, images)], 8))
