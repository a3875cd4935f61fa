"""What transformers makes of a folder that llava.save_model wrote, alone; older versions: older_transformers.sh."""

import gc
import json
import shutil
from pathlib import Path

import clients
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import engine
from config import Error
from formats import llava, tensors


@pytest.mark.parametrize("case", clients.SOME)
def test_transformers_reads_our_folders(case, tmp_path, bytes_folder):
    pytest.importorskip("transformers")
    folder = clients.write(case, tmp_path, bytes_folder)
    assert clients.read(folder).startswith("all keys")
    assert (folder / "model.safetensors.index.json").is_file() == case.endswith("linear")
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt"}


def test_a_tower_without_its_last_block_is_shorter(tmp_path, bytes_folder):
    pytest.importorskip("transformers")
    case = "dinov2-llama-mlp"
    folder = clients.write(case, tmp_path, bytes_folder, unused={})
    assert clients.read(folder).startswith("all keys")
    (whole, _), made = llava.load_model(init=folder), clients.make(case, bytes_folder)[0]
    assert (whole.cfg.vision.num_hidden_layers, whole.cfg.vision.depth, made.cfg.vision.num_hidden_layers) == (2, 2, 3)


def configure(folder, name, **new):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | new))


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bytes_folder):
    return clients.write("siglip-llama-mlp", tmp_path_factory.mktemp("clients"), bytes_folder)


@pytest.mark.parametrize("change", [
    lambda f: damage(f, lambda t: t.pop("multi_modal_projector.linear_2.bias")),
    lambda f: damage(f, lambda t: t.update({"vision_tower.more": torch.ones(1)})),
    lambda f: damage(f, lambda t: t["multi_modal_projector.linear_1.bias"].mul_(1.1)),
    lambda f: configure(f, "processor_config.json", num_additional_image_tokens=0),
    lambda f: configure(f, "preprocessor_config.json", image_mean=[0.5, 0.4, 0.31]),
    lambda f: configure(f, "chat_template.json", chat_template="{{ bos_token }}USER: {{ messages[0]['content'] }}"),
    lambda f: (f / "chat_template.jinja").write_text("{{ bos_token }}"),
])
def test_the_reading_half_notices(change, folder, tmp_path):
    pytest.importorskip("transformers")
    folder = shutil.copytree(folder, tmp_path / folder.name)
    change(folder)
    with pytest.raises((AssertionError, ValueError)):
        clients.read(folder)


def test_transformers_refuses_register_tokens(tmp_path, bytes_folder):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        clients.read(clients.write("registers-llama-mlp", tmp_path, bytes_folder))


def test_a_linear_connector_comes_back_as_one_matrix(tmp_path, bytes_folder):
    """On disk it is two, the second the unit matrix; with another second one it would be another connector."""
    folder = clients.write("clip-llama-linear", tmp_path, bytes_folder)
    model, _ = llava.load_model(init=folder)
    made, *_ = clients.make("clip-llama-linear", bytes_folder)
    assert model.cfg.connector == "linear" and model.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(x, made.state_dict()[k]) for k, x in model.state_dict().items())
    shard = next(f for f in folder.glob("*.safetensors") if "multi_modal_projector.linear_2.bias" in load_file(f))
    save_file(load_file(shard) | {"multi_modal_projector.linear_2.bias": torch.ones(32)}, shard)
    with pytest.raises(Error, match="a linear connector of two matrices is not supported"):
        llava.load_model(init=folder)


# ---- host memory: a model of 7B has 14 GB in half precision, once per process ----------------------------------------

def resident(what):
    """MB of this process: RssAnon = its own now, VmHWM = its peak since `forget`"""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(f"{what}:")) / 1e3


def forget():
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def test_a_model_is_loaded_once(tmp_path, bytes_folder):
    model, folder, *_ = clients.make("clip-llama-mlp", bytes_folder)
    state, model.cfg.text.vocab_size = model.state_dict(), 600_000
    for name in ("model.embed_tokens", "lm_head"):
        state[f"language_model.{name}.weight"] = torch.ones(600_000, 32)
    llava.save_model(tmp_path / "big", state, model.cfg, folder, "vicuna_v1", "", "pad", torch.float16)
    del state
    gc.collect()
    half, before = 2 * 600_000 * 32 * 2 / 1e6, resident("RssAnon")            # 76.8 MB
    model, _ = llava.load_model(init=tmp_path / "big", dtype=None)
    seen = resident("RssAnon") - before
    engine.choose(model, {"multi_modal_projector.*": 1e-3}, torch.bfloat16)
    kept = resident("RssAnon") - before
    assert seen < 0.6 * half and kept < 1.6 * half, (seen, kept, half)       # a copy too many is 1.0 more, at least


def test_a_digest_makes_no_copy_in_fp32():
    big = torch.ones(32_000_000, dtype=torch.bfloat16)                        # 64 MB, 128 in fp32
    forget()
    before = resident("VmHWM")
    tensors.tensor_digest(big)
    assert resident("VmHWM") - before < 80, resident("VmHWM") - before       # what malloc keeps of 4 MB pieces: to 32


def test_saving_copies_one_shard_at_a_time(tmp_path, bytes_folder, monkeypatch):
    monkeypatch.setattr(tensors, "SHARD", 4_000_000)
    model, folder, *_ = clients.make("clip-llama-mlp", bytes_folder)
    many = {f"vision_tower.{i}": torch.ones(2_000_000) for i in range(16)}    # 128 MB, 64 in half precision
    llava.save_model(tmp_path / "warm", model.state_dict(), model.cfg, folder, "vicuna_v1", "", "pad")
    forget()
    before = resident("VmHWM")
    llava.save_model(tmp_path / "many", model.state_dict() | many, model.cfg, folder, "vicuna_v1", "", "pad")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) >= 16
    assert resident("VmHWM") - before < 45, resident("VmHWM") - before       # the model twice would be 64 more
