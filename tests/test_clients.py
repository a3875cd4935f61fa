"""What transformers makes of a folder that hf.save wrote, alone; older versions: older_transformers.sh."""

import json

import clients
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hf


@pytest.mark.parametrize("case", clients.CASES)
def test_transformers_reads_every_combination_without_us(case, tmp_path, bytes_folder):
    pytest.importorskip("transformers")
    folder = clients.write(case, tmp_path, bytes_folder)
    assert clients.read(folder).startswith("all keys")
    assert (folder / "model.safetensors.index.json").is_file() == case.endswith("linear")
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt"}


def configure(folder, name, **new):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | new))


def spoil(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", [
    lambda f: spoil(f, lambda t: t.pop("multi_modal_projector.linear_2.bias")),
    lambda f: spoil(f, lambda t: t.update({"vision_tower.more": torch.ones(1)})),
    lambda f: spoil(f, lambda t: t["multi_modal_projector.linear_1.bias"].mul_(1.1)),
    lambda f: configure(f, "processor_config.json", num_additional_image_tokens=0),
    lambda f: configure(f, "preprocessor_config.json", image_mean=[0.5, 0.4, 0.31]),
    lambda f: configure(f, "chat_template.json", chat_template="{{ bos_token }}USER: {{ messages[0]['content'] }}"),
    lambda f: (f / "chat_template.jinja").write_text("{{ bos_token }}"),
])
def test_the_reading_half_notices(change, tmp_path, bytes_folder):
    pytest.importorskip("transformers")
    folder = clients.write("siglip-llama-mlp", tmp_path, bytes_folder)
    change(folder)
    with pytest.raises((AssertionError, ValueError)):
        clients.read(folder)


def test_register_tokens_are_refused_by_transformers_and_never_taken_for_patches(tmp_path, bytes_folder):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        clients.read(clients.write("registers-llama-mlp", tmp_path, bytes_folder))


def test_a_linear_connector_comes_back_as_one_matrix(tmp_path, bytes_folder):
    """On disk it is two, the second the unit matrix; with another second one it would be another connector."""
    folder = clients.write("clip-llama-linear", tmp_path, bytes_folder)
    model, _ = hf.load(init=folder)
    made, *_ = clients.make("clip-llama-linear", bytes_folder)
    assert model.cfg.connector == "linear" and model.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(x, made.state_dict()[k]) for k, x in model.state_dict().items())
    shard = next(f for f in folder.glob("*.safetensors") if "multi_modal_projector.linear_2.bias" in load_file(f))
    save_file(load_file(shard) | {"multi_modal_projector.linear_2.bias": torch.ones(32)}, shard)
    with pytest.raises(SystemExit, match="a linear connector of two matrices is not known here"):
        hf.load(init=folder)
