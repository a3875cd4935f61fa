"""Read the arguments of a script: recipe files and --key=value -> its settings. The last value of a setting counts.

A recipe is a Python file whose module-level names are settings; names that begin with _ are ignored. A value must have
the annotated type: 1 is a valid float, `yes` is not a valid bool, and `none` means None only if the annotation allows
None."""

import dataclasses
import difflib
import math
import runpy
import sys
import traceback
import types
import typing
from pathlib import Path

from config import setting_facts, stop
from run.aliases import ALIASES


def kinds(annotation):
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def wrong_type(annotation, key, value):
    names = {types.NoneType: "none", bool: "true or false"}
    stop(f"{key}={value}: expected {' or '.join(names.get(k, k.__name__) for k in kinds(annotation))}")


def read_value(text, annotation, key):
    """The text of a setting on the command line -> a value of the annotated type."""
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
    wrong_type(annotation, f"--{key}", text)


def checked(value, annotation, where):
    """Stop if a recipe's value does not have the annotated type; an int becomes a float where a float is expected."""
    if type(value) is int and int not in kinds(annotation) and float in kinds(annotation):
        return float(value)
    if type(value) not in kinds(annotation) or value != value:
        wrong_type(annotation, where, repr(value))
    return value


def run_recipe(file, given={}):
    """Run a recipe file -> {name: value} of its settings. given: names that the recipe may read (stage, toy)"""
    if not Path(file).is_file():
        stop(f"no recipe {file}")
    try:
        out = runpy.run_path(file, given)
    except Exception as e:
        line = e.lineno if isinstance(e, SyntaxError) else traceback.extract_tb(e.__traceback__)[-1].lineno
        stop(f"{file}, line {line}: {type(e).__name__}: {e}")
    return {k: v for k, v in out.items() if k[0] != "_" and k not in given and type(v) not in (types.ModuleType, type)}


def show_help(Settings, doc):
    print(f"{doc.strip()}\n\nsettings, as --key=value:")
    for f in dataclasses.fields(Settings):
        fact = setting_facts(Settings)[f.name]
        if fact.get("group"):
            print(f"\n  {fact['group']}")
        choices = f" ({', '.join(map(str, fact['choices']))})" if fact.get("choices") else ""
        value = "none" if f.default is None else str(f.default).lower() if f.type is bool else f.default
        print(f"    --{f'{f.name}={value}':28}  {fact.get('about', '')}{choices}")


def check_known(key, fields, where):
    """Stop if no field is called `key`; the message names the setting that is probably meant."""
    if key not in fields:
        near = difflib.get_close_matches(key, fields, 1, cutoff=0.75)
        hint = (f"{key} is {ALIASES[key]} here" if ALIASES.get(key, "").split(" ")[0] in fields
                else f"did you mean {near[0]}?" if near else "--help lists them all")
        stop(f"{where}: unknown setting {key!r}; {hint}")


def positional(argv, doc):
    """The arguments of a script without settings, as they are. --help prints its docstring and ends."""
    for arg in argv:
        if arg in ("-h", "--help"):
            print(doc.strip())
            raise SystemExit(0)
        if arg.startswith("-"):
            stop(f"{arg}: this script has no such setting; --help says more")
    return argv


def parse(Settings, argv, doc=""):
    """Command-line arguments (without the script's name) -> an instance of Settings."""
    for stream in (sys.stdout, sys.stderr):                # a character missing in the output encoding is escaped
        if hasattr(stream, "reconfigure"):                 # the output streams of a notebook have no such method
            stream.reconfigure(errors="backslashreplace")
    hints = typing.get_type_hints(Settings)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(Settings)}

    values = {}
    for arg in argv:
        if arg in ("-h", "--help"):
            show_help(Settings, doc)
            raise SystemExit(0)
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            check_known(key, fields, arg)
            if not equals and fields[key] is not bool:
                stop(f"{arg}: write --{key}=value")
            values[key] = read_value(text, fields[key], key) if equals else True   # --blind means --blind=true
        elif arg.endswith(".py"):
            given = {"stage": getattr(Settings, "stage", ""), "toy": "--data=toy" in argv}
            for key, value in run_recipe(arg, given).items():
                check_known(key, fields, arg)
                values[key] = checked(value, fields[key], f"{arg}: {key}")
        else:
            stop(f"{arg}: expected a recipe file (*.py) or --key=value")
    return Settings(**values)
