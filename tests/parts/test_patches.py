"""Raw patches: the order of the pixels, packed and without images. (Parity with transformers: tests/formats.)"""

import pytest
import torch
from part_checks import check_flops, check_no_images, check_packed, config, random_model

from parts.patches import Patches, PatchesConfig

SIZES = dict(hidden_size=192, image_size=8, patch_size=8)


@pytest.fixture
def model():
    cfg = config(connector="patches")
    cfg.vision = PatchesConfig(**SIZES)
    return random_model(cfg)


@pytest.mark.parametrize("check", [check_packed, check_no_images, check_flops])
def test_all_that_parts_have_in_common(model, check):
    check(model)


def test_pixels_in_the_order_row_column_colour():
    images = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
    x = Patches(PatchesConfig(**SIZES, image_mean=(0.0, 0.25, 0.5), image_std=(1.0, 0.5, 0.25)))(images)
    assert x.shape == (1, 1, 192)
    for row, column, colour in ((0, 0, 0), (0, 1, 2), (3, 0, 1), (7, 7, 2)):
        true = (int(images[0, colour, row, column]) / 255 - 0.25 * colour) / 0.5**colour
        assert abs(float(x[0, 0, row * 24 + column * 3 + colour]) - true) < 1e-6


def test_one_patch_moves_one_token(model):
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    other = images.clone()
    other[2, 1, 5, 5] ^= 255
    with torch.no_grad():
        a, b = model.image_features(images), model.image_features(other)
    assert a.shape == (4, 1, 32) and (a != b).any(-1).flatten().tolist() == [False, False, True, False]
