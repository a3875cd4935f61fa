"""What transformers makes of a folder that hf.save wrote, alone and to the end; older versions: older_transformers.sh."""

import clients
import pytest
import torch
from safetensors import safe_open

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


def test_a_check_that_finds_nothing_equal_says_so(tmp_path, bytes_folder):
    """One broken thing at a time: each must be noticed."""
    pytest.importorskip("transformers")


def test_register_tokens_are_refused_by_transformers_and_never_taken_for_patches(tmp_path, bytes_folder):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        clients.read(clients.write("registers-llama-mlp", tmp_path, bytes_folder))


def test_a_linear_connector_comes_back_as_one_matrix(tmp_path, bytes_folder):
    """On disk it is two, the second the unit matrix; another second one would be another connector."""
    folder = clients.write("clip-llama-linear", tmp_path, bytes_folder)
    model, _ = hf.load(init=folder)
    made, *_ = clients.make("clip-llama-linear", bytes_folder)
    assert model.cfg.connector == "linear" and model.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(x, made.state_dict()[k]) for k, x in model.state_dict().items())
