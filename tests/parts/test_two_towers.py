"""COMM: two towers side by side, and the merge of their levels."""

import pytest
import torch
import torch.nn.functional as F
from conftest import error
from part_checks import check_cache, check_flops, check_no_images, check_packed, config, random_model

from model import VisionConfig
from parts.build import build
from parts.features import FeatureTower
from parts.init import init_new
from parts.two_towers import CommConnector, Levels

DINO = dict(model_type="dinov2", hidden_size=16, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            image_size=8, patch_size=4, feature_layer=(2, 3), feature_norm=True, image_mean=(0.485, 0.456, 0.406))


def comm():
    return config(vision={"feature_layer": (1, 2, 3)}, connector="comm", second=VisionConfig(**DINO))


@pytest.fixture
def model():
    return random_model(comm())


def test_both_towers_see_the_same_pixels(model):
    """The features are those of each tower alone, with its own mean and standard deviation, side by side"""
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    towers = [FeatureTower(v).double() for v in (model.cfg.vision, model.cfg.second)]
    state = model.vision_tower.state_dict()
    towers[0].load_state_dict({k: x for k, x in state.items() if not k.startswith("second.")})
    towers[1].load_state_dict({k[7:]: x for k, x in state.items() if k.startswith("second.")})
    with torch.no_grad():
        z = model.vision_tower(images)
        assert z.shape == (2, 4, 3 * 32 + 2 * 16)
        assert torch.equal(z, torch.cat([t(images) for t in towers], -1))
    assert len(model.vision_tower.blocks) == 6


def test_one_hot_weights_are_one_level():
    torch.manual_seed(0)
    levels, x = Levels(3, 8), torch.randn(2, 4, 24)
    levels.level_weights.data = torch.tensor([0.0, 1.0, 0.0])
    norm = levels.norms[1]
    one = levels.linears[1](F.layer_norm(x[..., 8:16], (8,), norm.weight, norm.bias))
    assert (levels(x) - one).abs().max() < 1e-6


def test_the_merge_is_the_formula():
    torch.manual_seed(0)
    merge, x = CommConnector(8, 3, 6, 2, 10, 2).double(), torch.randn(2, 4, 36, dtype=torch.float64)
    v = []
    for levels, part, n in ((merge.first, x[..., :24], 3), (merge.second, x[..., 24:], 2)):
        torch.nn.init.normal_(levels.level_weights)
        D = part.shape[-1] // n
        v.append(sum(levels.level_weights[m] * levels.linears[m](F.layer_norm(part[..., m * D:(m + 1) * D], (D,)))
                     for m in range(n)))
    out = merge.linear_3(torch.cat([v[0], merge.linear_2(F.gelu(merge.linear_1(v[1])))], -1))
    assert (merge(x) - out).abs().max() < 1e-14


def test_a_new_merge_begins_as_the_mean():
    with torch.device("meta"):
        model = build(comm())
    names = {n for n, _ in model.named_parameters() if n.startswith("multi_modal")}
    init_new(model, names)
    merge = model.multi_modal_projector
    assert merge.first.level_weights.tolist() == pytest.approx([1 / 3] * 3)
    assert merge.second.level_weights.tolist() == [0.5, 0.5]
    assert all((norm.weight == 1).all() for norm in merge.first.norms)


@pytest.mark.parametrize("check", [check_packed, check_no_images, check_flops, check_cache])
def test_all_that_parts_have_in_common(model, check):
    check(model)


def test_wrong_settings_stop():
    cfg = comm()
    cfg.second.patch_size = 2
    assert error(build, cfg) == ("two towers need images of one size and the same patches: 4 patches of 8 pixels and "
                                 "16 of 8")
    assert "needs a second vision tower" in error(build, config(connector="comm"))
