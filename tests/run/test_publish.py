"""What a finished run leaves: model/ in save_dtype, adapter/ that answers alike, and a card that costs no run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import LORA, halves_agree, run

import generate
from run.publish import published_dtype

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


def test_an_adapter_answers_as_the_merged_model(world, aligned, tmp_path):
    out = tmp_path / "lora"
    run("sft", world, out, init=str(aligned), image_aspect="crop", **LORA)
    assert {p.name for p in (out / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors",
                                                             "tokenizer.json"}
    plain, merged = (load_file(folder / "model" / "model.safetensors") for folder in (aligned, out))
    assert merged.keys() == plain.keys()
    changed = {k for k in plain if not torch.equal(plain[k], merged[k])}
    assert any("q_proj" in k for k in changed) and not any("norm" in k or "embed" in k or "head" in k for k in changed)
    whole, ours = (generate.Chat(out / part, "cpu", "fp32") for part in ("model", "adapter"))
    halves_agree(ours, whole)
    assert (ours.template, ours.system, ours.spec) == ("vicuna_v1", "", whole.spec) and ours.spec.aspect == "crop"


@pytest.mark.parametrize("how", [{}, LORA], ids=["whole", "lora"])
def test_save_dtype_is_kept_and_named(how, world, tmp_path, capsys):
    """auto is fp16 for a model that was trained in fp32."""
    run("sft", world, tmp_path / "fp32", steps=1, save_dtype="fp32", **how)
    exact = load_file(tmp_path / "fp32" / "model/model.safetensors")
    if not how:
        trained = load_file(tmp_path / "fp32/checkpoints/step_0000001/trained.safetensors")
        assert all(torch.equal(exact[k], v) for k, v in trained.items())
    for name in ("bf16", "fp16", "auto"):
        capsys.readouterr()
        dtype, out = DTYPES.get(name, torch.float16), tmp_path / name
        run("sft", world, out, steps=1, save_dtype=name, resume=str(tmp_path / "fp32/checkpoints/step_0000001"), **how)
        assert capsys.readouterr().out.endswith(f"done: {out / 'model'}, in {str(dtype).removeprefix('torch.')}\n")
        found = load_file(out / "model/model.safetensors")
        assert found.keys() == exact.keys() and all(torch.equal(v, exact[k].to(dtype)) for k, v in found.items())
        assert json.loads((out / "model/config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_auto_saves_what_was_computed_with():
    class S:
        save_dtype = "auto"
    for computed, saved in ((torch.bfloat16,) * 2, (torch.float64,) * 2, (torch.float32, torch.float16)):
        class World:
            dtype = computed
        assert published_dtype(S, World) == saved


def test_a_damaged_init_costs_no_publish(world, aligned, tmp_path):
    """A torn last line of its log, lines that are no object, settings without `init`"""
    init = shutil.copytree(aligned, tmp_path / "init")
    with open(init / "log.jsonl", "a") as f:
        f.write('[]\n7\n{"step": 7, "lo')
    config = json.loads((init / "config.json").read_text())
    del config["settings"]["init"]
    for text in (json.dumps(config), "{}", "{", '{"settings": 7}'):
        (init / "config.json").write_text(text)
        out = tmp_path / f"run {len(text)}"
        run("sft", world, out, init=str(init / "model"), steps=1, **LORA)
        assert (out / "finished.json").is_file() and (out / "model/README.md").is_file()
    (out / "finished.json").unlink()                                           # its own log, torn by a kill
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 1, "lo')
    run("sft", world, out, init=str(init / "model"), steps=1, **LORA)
    assert (out / "finished.json").is_file()
