"""Persimmon: packed, rows, cache, and what its rotation leaves alone. (Parity with transformers: tests/formats.)"""

import pytest
import torch
from part_checks import check_cache, check_flops, check_no_images, check_packed, check_rows, config, random_model

from parts.persimmon import Persimmon, PersimmonConfig

SIZES = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, head_dim=8)


@pytest.fixture
def model():
    return random_model(config(PersimmonConfig(**SIZES)))


@pytest.mark.parametrize("check", [check_packed, check_no_images, check_rows, check_cache, check_flops])
def test_all_that_parts_have_in_common(model, check):
    check(model)


def test_only_the_first_part_is_rotated(model):
    """With the weights of q for that part at 0, positions change nothing: each key has the same score anywhere"""
    for layer in model.language_model.blocks:
        for name in ("weight", "bias"):
            getattr(layer.self_attn.q_norm, name).data[:4] = 0
    x, at = torch.randn(5, 32, dtype=torch.float64), torch.arange(5)
    lo, hi = torch.zeros(5, dtype=torch.int32), torch.full((5,), 5, dtype=torch.int32)
    with torch.no_grad():
        a, b = (model.language_model(x, pos, lo, hi) for pos in (at, 7 * at.flip(0)))
        assert torch.equal(a, b)
        model.language_model.blocks[0].self_attn.q_norm.bias[:4] = 1.0
        a, b = (model.language_model(x, pos, lo, hi) for pos in (at, 7 * at.flip(0)))
        assert (a - b).abs().max() > 1e-3


def test_parameters_of_the_published_size():
    """Fuyu-8B: 9.4 billion parameters, of which its two tables of 262,144 words are 2.1 billion (a config of one patch
    side S = 30 adds 11 million)"""
    with torch.device("meta"):
        model = Persimmon(PersimmonConfig())
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 9.40
