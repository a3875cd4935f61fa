"""MM1's poolings: windows as torch's, blocks as RegNet's, packed and without images."""

import pytest
import torch
import torch.nn.functional as F
from conftest import error
from part_checks import check_flops, check_no_images, check_packed, config, random_model

from parts.build import build
from parts.pool import ConvBlock, pool

CASES = {"pool": {}, "abstractor": {"width": 12, "depth": 2}}


@pytest.fixture(params=CASES)
def model(request):
    return random_model(config(vision={"image_size": 8, "patch_size": 2}, connector=request.param, tokens=9,
                               connector_args=CASES[request.param]))


@pytest.mark.parametrize("check", [check_packed, check_no_images])
def test_all_that_parts_have_in_common(model, check):
    check(model)


def test_flops(model):
    check_flops(model, most=1.014)                             # the gradient of pixels and of images' gates


@pytest.mark.parametrize("n, m", [(4, 2), (6, 3), (5, 3), (7, 4), (24, 12), (27, 12), (3, 3), (5, 1)])
def test_windows_are_those_of_adaptive_pooling(n, m):
    x = torch.randn(2, n, n, 5, dtype=torch.float64)
    true = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), m).permute(0, 2, 3, 1)
    assert (pool(x, m) - true).abs().max() < 1e-14
    assert pool(x[:0], m).shape == (0, m, m, 5)


def test_tokens_are_in_the_order_of_the_grid():
    """A patch moves its own token alone: Q = 4 of 16 patches"""
    model = random_model(config(vision={"patch_size": 2}, connector="pool", tokens=4))
    x = torch.zeros(1, 16, 32, dtype=torch.float64)
    still = model.multi_modal_projector(x)
    for patch, token in ((0, 0), (5, 0), (2, 1), (7, 1), (8, 2), (13, 2), (10, 3), (15, 3)):
        y = x.clone()
        y[0, patch] = 1
        moved = (model.multi_modal_projector(y) != still).any(-1)[0]
        assert moved.tolist() == [t == token for t in range(4)]


@pytest.mark.parametrize("D, W", [(16, 12), (12, 12)])
def test_a_block_is_that_of_honeybee(D, W):
    """RegNet's block on (I, channels, rows, columns) by convolutions. Honeybee takes it from timm. (Compared by hand:
    timm's block and ours agree to 2e-16.)"""
    torch.manual_seed(0)
    block = ConvBlock(D, W).double()
    w = {n: torch.nn.init.normal_(p.data) for n, p in block.named_parameters()}

    def conv(x, name):
        return F.conv2d(x, w[f"linear_{name}.weight"][:, :, None, None], w.get(f"linear_{name}.bias"))

    def norm(x, name):
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        scale, shift = (w[f"norm_{name}.{k}"][:, None, None] for k in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = torch.randn(3, D, 5, 5, dtype=torch.float64)
    y = F.silu(norm(conv(x, "in"), "in"))
    y = F.silu(norm(F.conv2d(y, w["conv.weight"], padding=1, groups=W), "conv"))
    y = y * conv(F.silu(conv(F.adaptive_avg_pool2d(y, 1), "squeeze")), "excite").sigmoid()
    true = F.silu(norm(conv(y, "out"), "out") + (x if D == W else norm(conv(x, "skip"), "skip")))
    with torch.no_grad():
        mine = block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert (mine - true).abs().max() < 1e-12 * true.abs().max()


@pytest.mark.parametrize("connector", CASES)
@pytest.mark.parametrize("tokens", [0, 3, 16])
def test_token_counts_that_do_not_fit(connector, tokens):
    assert f"4 patches into tokens={tokens}" in error(build, config(connector=connector, tokens=tokens))
