"""The perceiver resampler against that of transformers, and its squared ReLU against a loop."""

import pytest
import torch
import torch.nn.functional as F

from parts.perceiver import Perceiver

NAMES = (("latent_embedding", "latents"), ("layers.", "blocks."), ("norm_features", "0.context_layer_norm"),
         ("norm_latents", "0.latents_layer_norm"), ("linear_q", "0.q_proj"), ("linear_k", "0.k_proj"),
         ("linear_v", "0.v_proj"), ("linear_out", "0.output_proj"), (".q_norm", ".0.q_layer_norm"),
         (".k_norm", ".0.k_layer_norm"), ("norm_mlp", "1.ln"), ("linear_1", "1.fc"), ("linear_2", "1.c_proj"))


def random(module):
    torch.manual_seed(0)
    for n, p in module.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in n and n.endswith("weight") else 0.0, std=0.2)
    return module.double()


@pytest.mark.parametrize("qk_norm", (False, True))
def test_as_in_transformers(qk_norm):
    perceiver = pytest.importorskip("transformers.models.idefics.perceiver")
    from transformers import IdeficsConfig
    mine = random(Perceiver(32, latents=5, depth=3, heads=4, head_dim=6, act="relu", qk_norm=qk_norm))
    cfg = IdeficsConfig(vision_config={"embed_dim": 32}, perceiver_config={"qk_layer_norms_perceiver": qk_norm})
    theirs = perceiver.IdeficsPerceiverResampler(cfg, 32, 3, 4, 6, 5).double()

    def name(k):
        for ours, other in NAMES:
            k = k.replace(ours, other)
        return "layer_norm" + k[4:] if k.startswith("norm.") else k

    theirs.load_state_dict({name(k): x for k, x in mine.state_dict().items()})
    x = torch.randn(4, 7, 32, dtype=torch.float64)
    with torch.no_grad():
        assert (mine(x) - theirs(x)).abs().max() < 1e-13
        assert mine(x[:0]).shape == (0, 5, 32)


def test_the_papers_mlp_squares():
    """Without what attention writes, a layer is x + relu(norm(x) A)^2 B"""
    model = random(Perceiver(8, latents=3, depth=1, heads=2, head_dim=4))
    layer = model.layers[0]
    layer.linear_out.weight.data.zero_()
    x = model.latent_embedding
    y = F.layer_norm(x, (8,), layer.norm_mlp.weight, layer.norm_mlp.bias)
    x = x + F.relu(y @ layer.linear_1.weight.T) ** 2 @ layer.linear_2.weight.T
    x = F.layer_norm(x, (8,), model.norm.weight, model.norm.bias)
    assert (model(torch.randn(2, 5, 8, dtype=torch.float64)) - x).abs().max() < 1e-13
