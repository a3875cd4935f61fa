"""Folders of models that no class of transformers can hold. Tensors have our names and config.json is our VLMConfig,
so only this repository can read such a folder."""

import dataclasses

from config import stop
from formats.configs import CLASSES, typed
from formats.family import Family
from model import TextConfig, VisionConfig, VLMConfig

# keys of config.json beside those of VLMConfig
HEAD = {"architectures", "model_type", "torch_dtype", "pad_token_id"}


def as_tuples(d):
    """JSON has no tuples: a list in config.json -> a tuple"""
    return {k: tuple(x) if isinstance(x, list) else x for k, x in d.items()}


def part(d, Usual):
    """A part of config.json -> a config of the class of its model_type"""
    Config = CLASSES.get(d.get("model_type"), Usual)
    if unknown := d.keys() - {f.name for f in dataclasses.fields(Config)}:
        stop(f"config.json: unknown key {sorted(unknown)[0]!r} for {d.get('model_type')!r}")
    return typed(Config, "model", as_tuples(d))


def pumice_config(c, pre):
    second = c.get("second") and part(c["second"], VisionConfig)
    if unknown := c.keys() - {f.name for f in dataclasses.fields(VLMConfig)} - HEAD:
        stop(f"config.json: unknown key {sorted(unknown)[0]!r}")
    made = {"vision": part(c["vision"], VisionConfig), "text": part(c["text"], TextConfig), "second": second}
    return typed(VLMConfig, "model", {k: x for k, x in c.items() if k != "model_type"} | made)


def pumice_files(folder, cfg):
    return {"config.json": {"architectures": ["pumice.VLM"], "model_type": "pumice", **dataclasses.asdict(cfg)},
            "preprocessor_config.json": folder.pre | {"processor_class": "none"}}


PUMICE = Family("pumice", "vicuna_v1", pumice_config, lambda cfg: True, lambda cfg: [], pumice_files)
