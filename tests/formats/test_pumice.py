"""Models that only we can read: trained from towers with parts, written, read back, and resumed."""

import json
import shutil

import pytest
import torch
from conftest import error
from tiny_runs import LORA, halves_agree, refusal, run, state, write_whole_tower

from formats import families, llava
from formats.gguf import export
from generate import Chat
from model import TextConfig, VisionConfig, VLMConfig

PREFIX = "mask=prefix vision.feature_layer=-1 vision.feature_norm=true text.first_position=1"


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_whole_tower(tmp_path_factory.mktemp("tower") / "vision")


@pytest.fixture(scope="module")
def prefix_run(world, tower, tmp_path_factory):
    out = tmp_path_factory.mktemp("prefix") / "align"
    assert run("align", world, out, parts=PREFIX, connector="linear", vision=str(tower)) is None
    return out


def test_the_folder_says_that_only_we_read_it(prefix_run):
    c = json.loads((prefix_run / "model" / "config.json").read_text())
    assert c["model_type"] == "pumice" and c["mask"] == "prefix" and c["vision"]["feature_norm"] is True


def test_it_returns_as_it_left(prefix_run, tmp_path):
    model, folder = llava.load_model(init=prefix_run, dtype=torch.float32)
    assert model.cfg.mask == "prefix" and model.cfg.text.first_position == 1
    llava.save_model(tmp_path / "out", model.state_dict(), model.cfg, folder, "plain", "", "pad", torch.float32)
    again, _ = llava.load_model(init=tmp_path / "out", dtype=torch.float32)
    assert again.cfg == model.cfg
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_the_next_stage_keeps_the_parts(prefix_run, world, tmp_path):
    assert run("sft", world, tmp_path / "sft", init=str(prefix_run), template="vicuna_v1") is None
    asked = Chat(tmp_path / "sft", "cpu")
    assert asked.cfg.mask == "prefix" and isinstance(asked.ask(None, "What?", 4), str)


def test_parts_of_a_whole_model_are_refused(prefix_run, world, tmp_path):
    assert "brings its own parts" in refusal("sft", world, tmp_path / "x", init=str(prefix_run), parts="mask=causal")


def test_a_resumed_run_ends_bit_equal(prefix_run, world, tower, tmp_path):
    assert run("align", world, tmp_path / "again", parts=PREFIX, connector="linear", vision=str(tower),
               resume=str(prefix_run / "checkpoints" / "step_0000004")) is None
    assert state(tmp_path / "again") == state(prefix_run)


def test_llava_stays_llava(aligned):
    model, _ = llava.load_model(init=aligned)
    assert families.family_of(model.cfg) is None
    model.cfg.mask = "prefix"
    assert families.family_of(model.cfg).model_type == "pumice"


def test_an_unknown_key_is_refused(prefix_run, tmp_path):
    shutil.copytree(prefix_run / "model", tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    c = json.loads(file.read_text())
    for place in (c, c["vision"]):
        place["colour"] = "red"
        file.write_text(json.dumps(c))
        assert "unknown key 'colour'" in error(llava.load_model, init=tmp_path / "m")
        del place["colour"]


@pytest.mark.parametrize("parts", [PREFIX, "connector=resampler tokens=1 connector_args.heads=4"])
def test_adapters_bring_their_parts(parts, world, tower, tmp_path):
    """Over two towers: the adapter names them and the parts. Over a whole model: the base has them."""
    out = tmp_path / "lora"
    assert run("sft", world, out, parts=parts, vision=str(tower), template="vicuna_v1", **LORA) is None
    a, b = Chat(out / "adapter", "cpu", "fp32"), Chat(out / "model", "cpu", "fp32")
    assert a.cfg == b.cfg and a.cfg.mask == ("prefix" if "prefix" in parts else "causal")
    halves_agree(a, b)
    assert run("align", world, tmp_path / "whole", parts=parts, vision=str(tower)) is None
    assert run("sft", world, tmp_path / "again", init=str(tmp_path / "whole"), template="vicuna_v1", **LORA) is None
    halves_agree(*(Chat(tmp_path / "again" / kind, "cpu", "fp32") for kind in ("adapter", "model")))


@pytest.mark.parametrize("change", [
    {"layout": {"kind": "grid"}}, {"second": VisionConfig()}, {"tokens": 3}, {"mask": "causal"}, {"connector": "mlp"},
    {"vision.keep_class": True}, {"vision.feature_norm": False}, {"vision.feature_layer": -2},
    {"text.first_position": 0}, {"vision.model_type": "clip_vision_model"}])
def test_a_family_refuses_what_its_class_lacks(change):
    cfg = VLMConfig(VisionConfig("siglip_vision_model", feature_layer=-1, feature_norm=True),
                    TextConfig(first_position=1), "linear", mask="prefix")
    assert families.family_of(cfg).model_type == "paligemma"
    (name, value), = change.items()
    *path, field = name.split(".")
    setattr(getattr(cfg, path[0]) if path else cfg, field, value)
    assert families.family_of(cfg).model_type == "pumice"


def test_llama_cpp_is_refused_in_one_line(prefix_run, tmp_path):
    assert "llama.cpp's LLaVA cannot hold this model (a pumice folder)" in error(export, prefix_run, tmp_path, "f16")
