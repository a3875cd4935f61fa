"""Images of another size than the vision tower was trained on: positions are resampled as transformers does it."""

import json

import pytest
import torch
from test_llava import PRE, add_files, random, towers  # noqa: F401
from test_model import VISION

from formats import configs, llava

SIZES = [4, 12, 14, 20]                      # of a tower of 12 x 12 pixels, 3 x 3 patches: smaller, its own, larger


def write_tower(kind, folder):
    """A tiny random vision tower as transformers writes it"""
    T = pytest.importorskip("transformers")
    how = VISION | dict(image_size=12)
    if kind.startswith("Dinov2"):
        how.pop("intermediate_size")
        how |= dict(mlp_ratio=2) | ({"num_register_tokens": 4} if "Registers" in kind else {})
        model = random(getattr(T, f"{kind}Model")(getattr(T, f"{kind}Config")(**how)))
    else:
        model = random(getattr(T, f"{kind}VisionModel")(getattr(T, f"{kind}VisionConfig")(**how)))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "Dinov2", "Dinov2WithRegisters"])
@pytest.mark.parametrize("side", SIZES)
@torch.no_grad()
def test_resampled_features_are_those_of_transformers(kind, side, towers, tmp_path):  # noqa: F811
    theirs = write_tower(kind, tmp_path / "tower")
    cut = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    model, folder = llava.load_model(add_files(tmp_path / "tower", pre=PRE | cut), towers[1])
    assert model.cfg.vision.image_size == side and model.cfg.vision.patches == (side // 4) ** 2
    assert [n for n in folder.notes if "resampled" in n] == ([] if side == 12 else [
        f"images of side {side}, the tower was trained on 12: its positions are resampled"])
    table = model.vision_tower.vision_model.embeddings.position_embedding.weight
    found = next(m for m in theirs.modules() if hasattr(m, "interpolate_pos_encoding"))
    patches = torch.zeros(1, (side // 4) ** 2 + (kind != "Siglip"), 32)
    if side in (12, 14):                     # as many patches
        assert len(table) == 9 + (kind != "Siglip")
    else:
        assert torch.equal(table, found.interpolate_pos_encoding(patches, side, side)[0])
    images = torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (torch.tensor(PRE[k]).view(1, 3, 1, 1) for k in ("image_mean", "image_std"))
    ask = {} if kind.startswith("Dinov2") else {"interpolate_pos_encoding": True}
    want = theirs(pixel_values=(images / 255 - mean) / std, output_hidden_states=True, **ask).hidden_states[-2]
    mine = model.vision_tower.vision_model(images)
    assert (mine - want).abs().max() <= 2e-5 * want.abs().max()


def test_a_resampled_tower_keeps_its_new_size(towers, tmp_path):  # noqa: F811
    write_tower("CLIP", tmp_path / "tower")
    pre = PRE | {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}}
    model, folder = llava.load_model(add_files(tmp_path / "tower", pre=pre), towers[1])
    llava.save_model(tmp_path / "out", model.state_dict(), model.cfg, folder, "vicuna_v1", "", "crop", torch.float32)
    again, source = llava.load_model(init=tmp_path / "out")
    assert again.cfg == model.cfg and all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))
    spec = configs.image_spec(source.pre, "crop")
    assert spec == configs.image_spec(pre, "crop") and spec.short == 24
    c = json.loads((tmp_path / "out" / "config.json").read_text())
    assert c["vision_config"]["image_size"] == 20 and c["image_seq_length"] == 25
