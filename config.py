"""Settings: the defaults of a script <- recipe files, in order <- --key=value.

A script's settings are a dataclass. A recipe is plain Python whose module-level names are settings. Values from the command line
are read by the annotated type: 1 is a good float, yes is not a bool, none is None only where the annotation allows it."""

import dataclasses
import difflib
import inspect
import json
import runpy
import types
import typing
from pathlib import Path

LLAVA = {"model_name_or_path": "llm", "data_path": "data", "image_folder": "images", "vision_tower": "vision", "learning_rate": "lr",
         "per_device_train_batch_size": "batch_size (samples per step over all ranks)", "pretrain_mm_mlp_adapter": "init", "output_dir": "out",
         "gradient_accumulation_steps": "max_tokens (how much one micro-batch may hold)", "num_train_epochs": "epochs",
         "model_max_length": "max_len", "version": "template", "image_aspect_ratio": "image_aspect", "mm_projector_type": "connector",
         "lora_enable": "lora_r", "gradient_checkpointing": "recompute", "bf16": "dtype", "warmup_ratio": "warmup", "dataloader_num_workers": "workers"}


def stop(message):
    """A mistake of the user's: one line, no traceback."""
    raise SystemExit(f"error: {message}")


def read(text, kind, key):
    """Text -> a value of the annotated type."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    for k in kinds:
        try:
            if k is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if k in (int, float):
                return k(text)
            if k is str:
                return text
        except ValueError:
            pass
    stop(f"--{key}={text}: expected {' or '.join('none' if k is types.NoneType else 'true or false' if k is bool else k.__name__ for k in kinds)}")


def load(Settings, argv, doc=""):
    """argv without the script's name -> an instance of Settings."""
    fields = {f.name: typing.get_type_hints(Settings)[f.name] for f in dataclasses.fields(Settings)}

    def known(key, where):
        if key in fields:
            return
        near = difflib.get_close_matches(key, fields, 1)
        hint = f"; LLaVA's {key} is {LLAVA[key]} here" if key in LLAVA else f"; did you mean {near[0]}?" if near else "; --help lists them all"
        stop(f"{where}: unknown setting {key!r}{hint}")

    values = {}
    for arg in argv:
        if arg in ("-h", "--help"):
            print(doc.strip() + "\n\n" + inspect.getsource(Settings).split("\n", 1)[1])
            raise SystemExit(0)
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            known(key, arg)
            if not equals:
                stop(f"{arg}: write --{key}=value")
            values[key] = read(text, fields[key], key)
        elif arg.endswith(".py"):
            if not Path(arg).is_file():
                stop(f"no recipe {arg}")
            for key, value in runpy.run_path(arg).items():
                if not key.startswith("_") and not isinstance(value, types.ModuleType):
                    known(key, arg)
                    values[key] = read(str(value), fields[key], key) if not isinstance(value, str) else value
        else:
            stop(f"{arg}: expected a recipe file (*.py) or --key=value")
    return Settings(**values)


def strict_json(text, where):
    """json.loads without what Python forgives: NaN, duplicate keys."""
    def pairs(items):
        d = dict(items)
        if len(d) < len(items):
            raise ValueError(f"duplicate key {next(k for i, (k, _) in enumerate(items) if k in dict(items[:i]))!r}")
        return d

    def constant(name):
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: {e}") from None
