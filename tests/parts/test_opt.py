"""OPT as a decoder: packed, without images, rows, cache, learned positions. (Parity: tests/formats.)"""

import pytest
import torch
from conftest import example
from part_checks import check_cache, check_flops, check_no_images, check_packed, check_rows, config, random_model
from test_model import all_logits

from data import pack
from parts.opt import OptConfig

SIZES = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, head_dim=8, max_position_embeddings=40)


@pytest.fixture
def model():
    return random_model(config(OptConfig(**SIZES)))


def test_packed(model):
    """All parameters but two rows of the position table, which no position reads"""
    check_packed(model)
    table = model.language_model.model.embed_positions.weight
    assert len(table) == 42 and not table.grad[:2].any() and table.grad[2:20].any(1).all()


@pytest.mark.parametrize("check", [check_flops, check_no_images, check_rows, check_cache])
def test_all_that_parts_have_in_common(model, check):
    check(model)


def test_a_position_moves_only_what_follows_it(model):
    """Another vector for position 3 of every document moves the logits from position 3 on"""
    batch = pack([example(2, images=0, text=6), example(5, images=0, text=4)], 8)
    with torch.no_grad():
        before = all_logits(model, batch)
        model.language_model.model.embed_positions.weight[2 + 3] += 1
        moved = (all_logits(model, batch) != before).any(1)
    assert torch.equal(moved, batch.pos >= 3)


def test_a_conversation_longer_than_the_table_is_refused(model):
    with pytest.raises(RuntimeError, match="longer than the 40 positions of this OPT"):
        all_logits(model, pack([example(2, images=0, text=40)], 8))
