"""Qwen-VL's resampler and tower against their formulas, written as loops. (No class of transformers has them.)

    n, m   places along a side: of the table, of the features
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import error, example
from part_checks import check_cache, check_flops, check_no_images, check_packed, config, random_model
from test_model import TIGHT, all_logits

import engine
from data import pack
from parts.build import build
from parts.init import init_new
from parts.qwen_vit import QwenViT, QwenViTConfig
from parts.resampler import Resampler, resized, sincos

TOWER = QwenViTConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=8,
                      patch_size=2, position_side=3)                           # 16 patches, a table of 9 places


def qwen_vl():
    cfg = config(connector="resampler", tokens=4, connector_args={"heads": 4})
    cfg.vision = TOWER
    return cfg


@pytest.fixture
def model():
    return random_model(qwen_vl())


def cubic(t):
    """Weight of a point at distance t in bicubic interpolation with a = -0.75"""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def stretched(grid, m):
    """grid (n, n, E) -> (m, m, E): centres of pixels stay in place; outside the grid, its border is repeated"""
    n, out = len(grid), grid.new_zeros(m, m, grid.shape[-1])
    for r in range(m):
        for c in range(m):
            y, x = ((i + 0.5) * n / m - 0.5 for i in (r, c))
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = grid[min(max(i, 0), n - 1), min(max(j, 0), n - 1)]
                    out[r, c] += cubic(y - i) * cubic(x - j) * value
    return out


def look(q, k, v, heads):
    """One softmax per query and head: q (N, C), k and v (M, C) -> (N, C)"""
    out, K = torch.zeros_like(q), q.shape[1] // heads
    for h in range(heads):
        part = slice(h * K, (h + 1) * K)
        for i in range(len(q)):
            p = torch.stack([(q[i, part] * k[j, part]).sum() / K**0.5 for j in range(len(k))]).softmax(0)
            out[i, part] = sum(p[j] * v[j, part] for j in range(len(k)))
    return out


def norm(x, layer):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-6)


@pytest.mark.parametrize(("n", "m"), [(4, 9), (16, 32), (5, 3), (4, 4)])
def test_a_table_is_resampled_as_by_loops(n, m):
    grid = torch.randn(n, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (resized(grid, m) - stretched(grid, m)).abs().max() < TIGHT


def test_positions_are_sines_and_cosines():
    p, C = sincos(5, 24), 24
    for row in range(5):
        for column in range(5):
            true = [f(place * 1e4 ** (-4 * i / C)) for place in (column, row) for f in (math.sin, math.cos)
                    for i in range(C // 4)]
            assert (p[row, column] - torch.tensor(true)).abs().max() < 1e-6


@pytest.mark.parametrize(("D", "side"), [(24, 2), (24, 5), (32, 3)])        # features on as many places, or more
def test_the_resampler_is_the_formula(D, side):
    torch.manual_seed(0)
    r = Resampler(D, 32, 4, heads=4)
    for n, t in r.named_parameters():
        torch.nn.init.normal_(t, mean=1.0 if "norm" in n and n.endswith("weight") else 0.0, std=0.2)
    r, x = r.double(), torch.randn(2, side * side, D, dtype=torch.float64)
    a, p = r.attention, r.pos_embed
    with torch.no_grad():
        got = r(x)
        for image, features in zip(got, x):
            keys = norm(features if D == 32 else features @ r.kv_proj.weight.T, r.norm_kv)
            q = a.q_proj(norm(r.query_embedding, r.norm_q) + p.flatten(0, 1))
            k = a.k_proj(keys + stretched(p, side).flatten(0, 1))
            true = norm(a.out_proj(look(q, k, a.v_proj(keys), 4)), r.norm) @ r.proj
            assert (image - true).abs().max() < TIGHT * true.abs().max()
        assert r(x[:0]).shape == (0, 4, 32)


@pytest.mark.parametrize("table", [3, 4])
def test_the_tower_is_the_formula(table):
    """Norm in front, no class token, GELU, eps 1e-6, no last norm. The published layer has one matrix for q, k and v,
    whose rows are (head, q k v, place in the head)"""
    cfg = QwenViTConfig(**vars(TOWER) | {"position_side": table})
    torch.manual_seed(1)
    tower = QwenViT(cfg)
    for n, t in tower.named_parameters():
        torch.nn.init.normal_(t, mean=1.0 if "norm" in n and n.endswith("weight") else 0.0, std=0.2)
    tower, D, H = tower.double(), 24, 3
    e, images = tower.vision_model.embeddings, torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (cfg.image_mean, cfg.image_std))
    with torch.no_grad():
        for image, got in zip(images, tower(images)):
            pixels = ((image.float() / 255 - mean) / std).double()
            x = [(e.patch_embedding.weight * pixels[:, r : r + 2, c : c + 2]).sum((1, 2, 3))
                 for r in range(0, 8, 2) for c in range(0, 8, 2)]
            x = torch.stack(x) + stretched(e.position_embedding.table.view(table, table, D), 4).flatten(0, 1)
            x = norm(x, tower.vision_model.pre_layrnorm)
            for block in tower.blocks:
                a = block.self_attn
                weight, bias = (torch.stack([getattr(f, t).unflatten(0, (H, -1)) for f in (a.q_proj, a.k_proj,
                                                                                           a.v_proj)], 1).flatten(0, 2)
                                for t in ("weight", "bias"))
                qkv = (norm(x, block.layer_norm1) @ weight.T + bias).view(-1, H, 3, D // H)
                q, k, v = (qkv[:, :, i].flatten(1) for i in range(3))
                x = x + a.out_proj(look(q, k, v, H))
                y = norm(x, block.layer_norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
                y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
                x = x + y @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
            assert (got - x).abs().max() < TIGHT * x.abs().max()


@pytest.mark.parametrize("check", [check_packed, check_flops, check_no_images, check_cache])
def test_all_that_parts_have_in_common(model, check):
    check(model)


def test_the_order_of_patches_matters(model):
    """Positions are live in the connector alone: the features of two patches exchanged give other tokens"""
    x = torch.randn(1, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        a, b = (model.multi_modal_projector(t) for t in (x, x[:, [1, 0, *range(2, 16)]]))
        assert (a - b).abs().max() > 1e-3
        model.multi_modal_projector.pos_embed.zero_()
        a, b = (model.multi_modal_projector(t) for t in (x, x[:, [1, 0, *range(2, 16)]]))
        assert (a - b).abs().max() < TIGHT


def test_published_positions_never_train(model):
    with torch.device("meta"):
        fresh = build(qwen_vl())
    new = {n for n in fresh.state_dict() if n.startswith("multi_modal")}
    assert "multi_modal_projector.pos_embed" in new
    fresh.load_state_dict({n: x for n, x in model.state_dict().items() if n not in new}, strict=False, assign=True)
    init_new(fresh, new)
    connector = fresh.multi_modal_projector
    assert torch.equal(connector.pos_embed, sincos(2, 32)) and connector.query_embedding.std() < 0.04
    fresh = fresh.double()
    lrs = engine.choose(fresh, {"multi_modal_projector.*": 1e-2}, torch.float64)
    before = connector.pos_embed.clone()
    optimizer = engine.adamw(fresh, lrs, weight_decay=0.1)
    fresh(*pack([example(1, model_patches=4)], 8)).backward()
    engine.check_gradients(fresh)
    optimizer.step()
    assert torch.equal(connector.pos_embed, before) and connector.proj.grad.any()


@pytest.mark.parametrize(("change", "says"), [
    (dict(tokens=5), "tokens=5: its queries form a square"),
    (dict(tokens=0), "tokens=0: its queries form a square"),
    (dict(connector_args={}), "width 32 with 0 heads"),
    (dict(connector_args={"heads": 3}), "width 32 with 3 heads"),
    (dict(connector_args={"depth": 3}), "unexpected keyword argument 'depth'"),
    (dict(connector="qformer"), "unexpected keyword argument 'heads'"),
    (dict(connector="qformer", connector_args={}, tokens=0), "a Q-Former of 0 queries")])
def test_a_connector_that_cannot_be_is_refused(change, says):
    cfg = qwen_vl()
    vars(cfg).update(change)
    assert says in error(build, cfg)


def test_a_class_token_is_refused():
    model = random_model(config(vision={"keep_class": True}, connector="resampler", tokens=4,
                                connector_args={"heads": 4}))
    assert "5 features per image are no square" in error(
        all_logits, model, pack([example(1, model_patches=4)], 8))
