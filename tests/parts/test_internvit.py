"""InternViT's two kinds: packed, without images, and what each setting of the config adds. (Parity: tests/formats.)"""

import pytest
import torch
from part_checks import check_flops, check_no_images, check_packed, config, random_model

from parts.internvit import InternViT, InternViTConfig

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=8,
             patch_size=4)
KINDS = {"300m": dict(attention_bias=True), "6b": dict(use_qk_norm=True, norm_type="rms_norm", feature_norm=True)}


@pytest.fixture(params=KINDS)
def model(request):
    cfg = config(connector="shuffle", tokens=1)
    cfg.vision = InternViTConfig(**SIZES, **KINDS[request.param])
    return random_model(cfg)


@pytest.mark.parametrize("check", [check_packed, check_no_images, check_flops])
def test_all_that_parts_have_in_common(model, check):
    check(model)


def test_an_image_sees_itself_alone(model):
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        z = model.vision_tower(images)
        alone = torch.cat([model.vision_tower(image[None]) for image in images])
    assert z.shape == (3, 4, 32) and (z - alone).abs().max() < 1e-12 * z.abs().max()


def test_parameters_of_the_published_sizes():
    """5.5 billion in the 45 layers of InternViT-6B-448px-V1.5, 304 million in InternViT-300M-448px"""
    six = InternViTConfig(hidden_size=3200, intermediate_size=12800, num_hidden_layers=45, num_attention_heads=25,
                          use_qk_norm=True, norm_type="rms_norm")
    with torch.device("meta"):
        towers = InternViT(six), InternViT(InternViTConfig(attention_bias=True))
        counts = [sum(p.numel() for p in tower.parameters()) for tower in towers]
    assert round(counts[0] / 1e9, 1) == 5.5 and round(counts[1] / 1e6) == 304
