"""Connectors with a LayerNorm: their formulas, packed and without images. (VipLlava's parity: tests/formats.)"""

import pytest
import torch
import torch.nn.functional as F
from part_checks import check_flops, check_no_images, check_packed, config, random_model

from parts.norm_connectors import LinearNorm


@pytest.fixture(params=("norm_mlp", "linear_norm"))
def model(request):
    return random_model(config(vision={"feature_layer": (-2, 1, -1)}, connector=request.param))


@pytest.mark.parametrize("check", [check_packed, check_no_images, check_flops])
def test_all_that_parts_have_in_common(model, check):
    check(model)


def test_the_eps_of_visualchat():
    """Rows so small that another eps would change the result"""
    connector, x = LinearNorm(4, 6).double(), 1e-5 * torch.randn(3, 4, dtype=torch.float64)
    connector.linear_1.bias.data.zero_()
    assert torch.equal(connector(x), F.layer_norm(connector.linear_1(x), (6,), eps=1e-12))
    assert (connector(x) - F.layer_norm(connector.linear_1(x), (6,), eps=1e-5)).abs().max() > 0.1
