"""Runs of the two training scripts on towers and data so small that one takes a few tenths of a second: fixtures for
`world` (settings) and `aligned` (a finished stage 1) are in conftest.py."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from conftest import make_tokenizer, tiny_vlm
from PIL import Image
from safetensors.torch import save_file

import train_align
import train_sft
from config import Error
from parts.features import FeatureTower

SCRIPTS = {"align": train_align, "sft": train_sft}
LORA = dict(lora_r=2, lora_dropout=0.5)


def write_towers(folder):
    """vision/ and llm/ as they would be downloaded -> folder"""
    model = tiny_vlm(dtype=torch.float32)
    v, t = model.cfg.vision, model.cfg.text
    make_tokenizer(folder / "llm")
    (folder / "vision").mkdir()
    for name, prefix, c in (("vision", "vision_tower.", v), ("llm", "language_model.", t)):
        state = {k.removeprefix(prefix): x for k, x in model.state_dict().items() if k.startswith(prefix)}
        save_file(state, folder / name / "model.safetensors")
        c = {k: x for k, x in vars(c).items() if k != "feature_layer"}
        (folder / name / "config.json").write_text(json.dumps(c))
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(dict(
        crop_size=v.image_size, size=v.image_size, resample=3, image_mean=v.image_mean, image_std=v.image_std)))
    return folder


def write_whole_tower(folder):
    """A vision tower with all its blocks and its last norm, as published -> folder"""
    cfg = dataclasses.replace(tiny_vlm().cfg.vision, feature_layer=-1, feature_norm=True)
    torch.manual_seed(0)
    tower = FeatureTower(cfg)
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.2)
    folder.mkdir()
    save_file(tower.state_dict(), folder / "model.safetensors")
    keep = {k: x for k, x in vars(cfg).items() if k not in ("feature_layer", "feature_norm", "keep_class")}
    (folder / "config.json").write_text(json.dumps(keep))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        crop_size=cfg.image_size, size=cfg.image_size, resample=3, image_mean=cfg.image_mean, image_std=cfg.image_std)))
    return folder


def write_data(folder, name, n, seed=0):
    """n samples about little coloured images, every fourth without one, in LLaVA form -> path"""
    colors, samples = ["black", "red", "white"], []
    (folder / "images").mkdir(exist_ok=True)
    for i in range(seed, seed + n):
        color, has_image = colors[i % 3], i % 4 != 3
        Image.new("RGB", (8 + i % 3, 8), color).save(folder / "images" / f"{i}.png")
        turns = [("human", ("<image>\n" if has_image else "") + "What is this?" + "?" * (i % 5)),
                 ("gpt", f"a {color} cat, {i}")]
        samples.append({"id": i, **({"image": f"{i}.png"} if has_image else {}),
                        "conversations": [{"from": who, "value": text} for who, text in turns]})
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in samples))
    return folder / name


def write_validation(folder, world, texts):
    """Validation data of a question and an answer per text; every fourth sample is without an image -> path"""
    file = write_data(folder, "val.jsonl", len(texts), 100)
    lines = rows(file)
    for row, (question, answer) in zip(lines, texts):
        row["conversations"][0]["value"] += question
        row["conversations"][1]["value"] = answer
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    shutil.copytree(folder / "images", world["images"], dirs_exist_ok=True)
    return str(file)


def run(kind, world, out, **changes):
    """-> what main returns"""
    script = SCRIPTS[kind]
    extra = {"init": ""} if kind == "sft" else {} if changes.get("train") else {"lr": 2e-3}
    extra |= {"vision": "", "llm": ""} if changes.get("init") else {}
    return script.main(script.Settings(**{**world, **extra, "out": str(out), **changes}))


def refusal(*args, **how):
    """The one line with which a run stops."""
    with pytest.raises(Error) as e:
        run(*args, **how)
    return str(e.value)


def files(folder):
    """-> {relative path: (digest, time of the last change)}"""
    return {str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
            for p in sorted(folder.rglob("*")) if p.is_file()}


def state(out, step=6):
    """Digests of weights, moments and random state after a step."""
    return {n: hashlib.sha256((out / f"checkpoints/step_{step:07}/{n}.safetensors").read_bytes()).hexdigest()
            for n in ("trained", "optimizer", "rng")}


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def halves_agree(ours, published):
    """The adapter merged here has the weights of model/, which is in fp16, to the last bit."""
    for (k, p), q in zip(ours.model.state_dict().items(), published.model.state_dict().values(), strict=True):
        assert torch.equal(p.half().float(), q), k
