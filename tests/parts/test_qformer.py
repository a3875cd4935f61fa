"""The Q-Former with BLIP-2's tower: who sees whom, packed, without images. (Parity: tests/formats.)"""

import pytest
import torch
from part_checks import check_cache, check_flops, check_no_images, check_packed, config, random_model

from parts.build import build
from parts.eva import EvaConfig
from parts.init import init_new

SIZES = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40)


def blip2():
    vision = EvaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=8,
                       patch_size=4)
    cfg = config(connector="qformer", tokens=3, connector_args=SIZES)
    cfg.vision = vision
    return cfg


@pytest.fixture
def model():
    return random_model(blip2())


@pytest.mark.parametrize("check", [check_packed, check_flops, check_no_images, check_cache])
def test_all_that_parts_have_in_common(model, check):
    check(model)


def test_queries_see_their_own_image(model):
    """Three images: other features of the second one move its three queries, and no other"""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    other = x.clone()
    other[1, 4] += 1
    with torch.no_grad():
        a, b = (model.multi_modal_projector(t) for t in (x, other))
    moved = (a != b).any(-1)
    assert a.shape == (3, 3, 32) and moved.tolist() == [[False] * 3, [True] * 3, [False] * 3]


def test_every_second_layer_sees_the_image(model):
    """Layers 0 and 2 do. If these two see nothing, the image changes nothing: so layer 1 does not see it"""
    former = model.multi_modal_projector
    assert [layer.cross is not None for layer in former.layers] == [True, False, True]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        assert (former(x)[0] - former(x)[1]).abs().max() > 0.1
        for layer in former.layers[::2]:
            layer.cross.out_proj.weight.zero_()
        assert (former(x)[0] - former(x)[1]).abs().max() < 1e-12


def test_a_new_one_begins_with_different_small_queries():
    """Equal queries would stay equal for ever"""
    with torch.device("meta"):
        model = build(blip2())
    names = {n for n, _ in model.named_parameters() if n.startswith("multi_modal")}
    init_new(model, names)
    former = model.multi_modal_projector
    query = former.query_embedding
    assert 0.01 < query.std() < 0.03 and len(set(query[:, 0].tolist())) == len(query)
    assert (former.norm.weight == 1).all()
    k = former.layers[0].cross.k_proj                              # its input has 32 channels
    assert k.weight.std().item() == pytest.approx(32**-0.5, rel=0.1) and not k.bias.any()


def test_self_attention_begins_by_adding_nothing():
    """Else each new query sees a mean of all from the first step, and training makes them equal"""
    with torch.device("meta"):
        model = build(blip2())
    init_new(model, {n for n, _ in model.named_parameters() if n.startswith("multi_modal")})
    attention = model.multi_modal_projector.layers[1].attention
    x, span = torch.randn(3, 24), (torch.zeros(3, dtype=torch.int32), torch.full((3,), 3, dtype=torch.int32))
    assert attention.q_proj.weight.any() and not attention(x, x, x, *span).any()
