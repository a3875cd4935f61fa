"""Pixel shuffle with InternVL's MLP: the order of the channels, packed and without images."""

import pytest
import torch
import torch.nn.functional as F
from conftest import error
from part_checks import check_flops, check_no_images, check_packed, config, random_model

from parts.build import build
from parts.shuffle import pixel_shuffle


@pytest.fixture
def model():
    return random_model(config(connector="shuffle", tokens=1))


@pytest.mark.parametrize("check", [check_packed, check_no_images, check_flops])
def test_all_that_parts_have_in_common(model, check):
    check(model)


@pytest.mark.parametrize("n, r", [(4, 2), (6, 3), (6, 2), (3, 1)])
def test_a_token_is_a_group_of_patches(n, r):
    """Group by group, by loops. F.pixel_unshuffle puts the channel first: another order"""
    x = torch.randn(2, n * n, 5)
    grid = x.view(2, n, n, 5)
    out = [torch.cat([grid[:, i + a, j + b] for a in range(r) for b in range(r)], -1)
           for i in range(0, n, r) for j in range(0, n, r)]
    assert torch.equal(pixel_shuffle(x, r), torch.stack(out, 1))
    other = F.pixel_unshuffle(grid.permute(0, 3, 1, 2), r).flatten(2).mT
    assert torch.equal(other, pixel_shuffle(x, r)) == (r == 1)
    assert pixel_shuffle(x[:0], r).shape == (0, (n // r) ** 2, r * r * 5)


@pytest.mark.parametrize("tokens", [0, 2, 3, 9])
def test_token_counts_that_do_not_fit(tokens):
    assert f"4 patches into tokens={tokens}" in error(build, config(connector="shuffle", tokens=tokens))
