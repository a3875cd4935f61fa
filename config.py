"""Settings: the defaults of a script <- recipe files, in order <- --key=value.

A script's settings are a dataclass. A recipe is plain Python whose module-level names are settings; a name that begins
with _ is its own. Values are read by the annotated type: 1 is a good float, yes is not a bool, none is None only where
the annotation allows it."""

import contextlib
import dataclasses
import difflib
import inspect
import math
import runpy
import sys
import traceback
import types
import typing
from pathlib import Path

LLAVA = {  # what people who come from LLaVA type
    "model_name_or_path": "llm", "data_path": "data", "image_folder": "images", "vision_tower": "vision",
    "output_dir": "out", "pretrain_mm_mlp_adapter": "init", "mm_projector_type": "connector",
    "image_aspect_ratio": "image_aspect",
    "version": "template", "model_max_length": "max_len", "num_train_epochs": "epochs", "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size (samples per step over all ranks)",
    "gradient_accumulation_steps": "max_tokens (how much one micro-batch may hold)", "warmup_ratio": "warmup",
    "lora_enable": "lora_r", "gradient_checkpointing": "recompute", "bf16": "dtype",
    "dataloader_num_workers": "workers"}


class Error(Exception):
    """A mistake of the user's, told in one line. Scripts end with that line, without a traceback (one_line_errors)."""


def stop(message):
    raise Error(message)


@contextlib.contextmanager
def one_line_errors():
    """Around a script's main: an Error ends the process with its one line on stderr and exit code 1."""
    try:
        yield
    except Error as e:
        raise SystemExit(f"error: {e}") from None


class BadSample(ValueError):
    """A sample that cannot be used. Whoever reads data counts these by `reason`, worded alike for like samples; str()
    adds the detail after a colon."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def within(s, ranges):
    """Stop at a setting outside its range. ranges: name -> (least, most), and what it counts if that is often
    mistaken; most None = anything finite."""
    for key, (low, high, *what) in ranges.items():
        value = getattr(s, key, low)
        if not low <= value <= (sys.float_info.max if high is None else high):
            stop(f"{key}={value}: expected {'at least' if high is None else 'between'} {low}"
                 + ("" if high is None else f" and {high}") + "".join(f", {w}" for w in what))


def kinds(annotation):
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def wrong(annotation, key, value):
    names = {types.NoneType: "none", bool: "true or false"}
    stop(f"{key}={value}: expected {' or '.join(names.get(k, k.__name__) for k in kinds(annotation))}")


def read_value(text, annotation, key):
    """Text -> a value of the annotated type."""
    if types.NoneType in kinds(annotation) and text.lower() == "none":
        return None
    for kind in kinds(annotation):
        try:
            if kind is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if kind is str or kind is int or kind is float and not math.isnan(float(text)):
                return kind(text)
        except ValueError:
            pass
    wrong(annotation, f"--{key}", text)


def checked(value, annotation, where):
    """A value from a recipe, if it has the annotated type; an int is a good float."""
    if type(value) is int and int not in kinds(annotation) and float in kinds(annotation):
        return float(value)
    if type(value) not in kinds(annotation) or value != value:
        wrong(annotation, where, repr(value))
    return value


def run(recipe):
    """The module-level names of a recipe file that are settings."""
    if not Path(recipe).is_file():
        stop(f"no recipe {recipe}")
    try:
        found = runpy.run_path(recipe)
    except Exception as e:
        line = e.lineno if isinstance(e, SyntaxError) else traceback.extract_tb(e.__traceback__)[-1].lineno
        stop(f"{recipe}, line {line}: {type(e).__name__}: {e}")
    return {k: v for k, v in found.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}


def parse(Settings, argv, doc=""):
    """argv without the script's name -> an instance of Settings."""
    for stream in (sys.stdout, sys.stderr):                # what a terminal cannot show is escaped and ends nothing
        if hasattr(stream, "reconfigure"):                 # a notebook's has none
            stream.reconfigure(errors="backslashreplace")
    hints = typing.get_type_hints(Settings)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(Settings)}

    def known(key, where):
        if key in fields:
            return
        near = difflib.get_close_matches(key, fields, 1)
        hint = (f"LLaVA's {key} is {LLAVA[key]} here" if key in LLAVA else f"did you mean {near[0]}?" if near
                else "--help lists them all")
        stop(f"{where}: unknown setting {key!r}; {hint}")

    values = {}
    for arg in argv:
        if arg in ("-h", "--help"):
            print(f"{doc.strip()}\n\nsettings, as --key=value:\n{inspect.getsource(Settings).split(chr(10), 2)[2]}")
            raise SystemExit(0)
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            known(key, arg)
            if not equals and fields[key] is not bool:
                stop(f"{arg}: write --{key}=value")
            values[key] = read_value(text, fields[key], key) if equals else True   # --blind is --blind=true
        elif arg.endswith(".py"):
            for key, value in run(arg).items():
                known(key, arg)
                values[key] = checked(value, fields[key], f"{arg}: {key}")
        else:
            stop(f"{arg}: expected a recipe file (*.py) or --key=value")
    return Settings(**values)


