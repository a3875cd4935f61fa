"""Flamingo, COMM and DeepSpeed-VisualChat from published towers: trained, read back, asked, resumed."""

import json

import pytest
import torch
from test_llava import random
from test_model import pixels
from tiny_runs import run, state, write_whole_tower

from formats import llava
from generate import Chat

GATED = "text.model_type={} text.cross_width=32 connector=perceiver tokens=1 vision.keep_class=true " \
        "connector_args.latents=3 connector_args.depth=1 connector_args.heads=2 connector_args.head_dim=8"
NEW = "multi_modal_projector.*=2e-3 "
SYSTEMS = {  # parts, what trains
    "flamingo": (GATED.format("flamingo"), NEW + "language_model.gated_layers.*=2e-3"),
    "idefics": (GATED.format("idefics") + " connector_args.act=relu text.cross_every=2",
                NEW + "language_model.gated_layers.*=2e-3"),
    "comm": ("connector=comm second={second} vision.feature_layer=[1,2] second.feature_layer=[2,3]", NEW),
    "mmca": ("mask=mmca connector=linear_norm tokens=5 vision.keep_class=true", NEW + "*.embed_tokens.*=1e-3")}


def dinov2(folder):
    """A DINOv2 as transformers writes it, trained on images of 12 pixels -> folder"""
    T = pytest.importorskip("transformers")
    c = T.Dinov2Config(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=12, patch_size=4)
    random(T.Dinov2Model(c)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        crop_size={"height": 12, "width": 12}, size={"shortest_edge": 12}, image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225])))
    return folder


def test_dinov2_as_second_tower(world, tmp_path):
    """Its own names, normalisation and last norm; its positions are resampled to the side of the first tower"""
    second = dinov2(tmp_path / "second")
    parts = f"connector=comm second={second} vision.feature_layer=[1,2] second.feature_layer=[2,3] " \
            "second.feature_norm=true"
    model, folder = llava.load_model(world["vision"], world["llm"], parts=parts)
    assert model.cfg.second.image_mean == (0.485, 0.456, 0.406) and model.cfg.second.image_size == 8
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    theirs = pytest.importorskip("transformers").Dinov2Model.from_pretrained(second).eval()
    with torch.no_grad():
        mine = model.vision_tower(images)[..., -16:]
        true = theirs(pixels(images, model.cfg.second)).last_hidden_state[:, 1:]
    assert (mine - true).abs().max() < 1e-5 * true.abs().max()
    llava.save_model(tmp_path / "out", model.state_dict(), model.cfg, folder, "plain", "", "pad", torch.float32)
    again, _ = llava.load_model(init=tmp_path / "out", dtype=torch.float32)
    assert again.cfg == model.cfg
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.fixture(params=SYSTEMS)
def system(request, world, tmp_path):
    """-> name, settings, folder of a finished run"""
    parts, train = SYSTEMS[request.param]
    settings = dict(parts=parts.format(second=write_whole_tower(tmp_path / "second")), train=train)
    assert run("align", world, tmp_path / "align", **settings) is None
    return request.param, settings, tmp_path / "align"


def test_trained_read_back_and_resumed(system, world, tmp_path):
    name, settings, out = system
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["model_type"] == "pumice"
    model, folder = llava.load_model(init=out, dtype=torch.float32)
    llava.save_model(tmp_path / "copy", model.state_dict(), model.cfg, folder, "plain", "", "pad", torch.float32)
    again, _ = llava.load_model(init=tmp_path / "copy", dtype=torch.float32)
    assert again.cfg == model.cfg
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    moved = [p for n, p in model.named_parameters() if "alpha_" in n or "level_weights" in n]
    assert all(p.any() for p in moved) and bool(moved) == (name != "mmca")
    asked = Chat(tmp_path / "align", "cpu")
    image = f"{world['images']}/0.png"
    assert isinstance(asked.ask([image, image], "What?", 4), str) and isinstance(asked.ask(None, "What?", 4), str)
    assert run("align", world, tmp_path / "resumed", **settings,
               resume=str(out / "checkpoints" / "step_0000004")) is None
    assert state(tmp_path / "resumed") == state(out)
