"""Settings: what is read, and that every mistake ends in one line that says what to do."""

import dataclasses
import importlib
import io
import sys

import pytest
from conftest import error

import config
import engine
from config import Error, setting
from run.aliases import ALIASES
from run.arguments import parse


@dataclasses.dataclass
class Settings:
    lr: float = setting(1e-3, "peak learning rate", 0, group="optimisation")
    steps: int | None = None
    batch_size: int = setting(8, "samples per step", 1, 64)
    recompute: str = setting("none", "what is recomputed", choices=("none", "block"))
    system: str | None = None
    compile: bool = False
    llm: str = ""


def refused(argv):
    """The one line in which a mistake ends."""
    with pytest.raises(Error) as e:
        parse(Settings, argv)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="r.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


@pytest.mark.parametrize("arg, key, value", [
    ("--lr=1", "lr", 1.0), ("--lr=2e-5", "lr", 2e-5), ("--lr=inf", "lr", float("inf")), ("--steps=5", "steps", 5),
    ("--steps=none", "steps", None), ("--steps=-1", "steps", -1), ("--compile=true", "compile", True),
    ("--compile=False", "compile", False), ("--recompute=none", "recompute", "none"), ("--system=None", "system", None),
    ("--system=", "system", ""), ("--llm=a=b=c", "llm", "a=b=c"), ("--llm=--x", "llm", "--x"),
    ("--llm=a b", "llm", "a b")])
def test_a_value_is_read_by_the_annotated_type(arg, key, value):
    got = getattr(parse(Settings, [arg]), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("arg, message", [
    ("--lr=fast", "--lr=fast: expected float"), ("--lr=nan", "--lr=nan: expected float"),
    ("--lr=none", "--lr=none: expected float"), ("--lr=", "--lr=: expected float"),
    ("--batch_size=1.5", "--batch_size=1.5: expected int"),
    ("--steps=1e3", "--steps=1e3: expected int or none"),
    ("--compile=yes", "--compile=yes: expected true or false"),
    ("--compile=1", "--compile=1: expected true or false"),
    ("8", "8: expected a recipe file (*.py) or --key=value"),
    ("-lr=1", "-lr=1: expected a recipe file (*.py) or --key=value"), ("no.py", "no recipe no.py")])
def test_a_wrong_value_stops_with_what_was_expected(arg, message):
    assert refused([arg]) == message


@pytest.mark.parametrize("arg, hint", [
    ("--batchsize=8", "unknown setting 'batchsize'; did you mean batch_size?"), ("--step=5", "did you mean steps?"),
    ("--batch-size=5", "did you mean batch_size?"), ("--zzz=1", "unknown setting 'zzz'; --help lists them all"),
    ("--=1", "unknown setting ''"), ("--__class__=1", "unknown setting '__class__'"),
    ("--model_name_or_path=x", "model_name_or_path is llm here"), ("--max_steps=3", "max_steps is steps here"),
    ("--per_device_train_batch_size=4", "is batch_size (samples per step over all ranks) here"),
    ("--num_epochs=1", "unknown setting 'num_epochs'; --help lists them all")])             # no epochs in this class
def test_an_unknown_setting_stops_with_the_nearest_one(arg, hint):
    assert hint in refused([arg])


def test_every_alias_names_a_real_setting():
    import train_sft
    real = {f.name for f in dataclasses.fields(train_sft.Settings)}
    assert {name.split(" (")[0] for name in ALIASES.values()} <= real and not real & ALIASES.keys()


def test_later_values_win(recipe):
    a, b = recipe("lr = 1\nsteps = 3\n", "a.py"), recipe("lr = 2.5\ncompile = True\n", "b.py")
    s = parse(Settings, [a, b, "--steps=7", "--steps=8"])
    assert (s.lr, s.steps, s.compile, s.batch_size) == (2.5, 8, True, 8) and type(parse(Settings, [a]).lr) is float


def test_a_recipe_may_compute_and_import(recipe):
    text = "import math\n_half = 4\nbatch_size = 2 * _half\nlr = math.sqrt(4)\nsystem = None\nllm = 'none'\n"
    s = parse(Settings, [recipe(text)])
    assert (s.batch_size, s.lr, s.system, s.llm) == (8, 2.0, None, "none")


@pytest.mark.parametrize("text, message", [
    ("learning_rate = 1", "learning_rate is lr here"), ("half = 4", "unknown setting 'half'"),
    ("batch_size = '8'", "batch_size='8': expected int"), ("batch_size = 8.0", "batch_size=8.0: expected int"),
    ("batch_size = True", "batch_size=True: expected int"), ("llm = None", "llm=None: expected str"),
    ("llm = 5", "llm=5: expected str"), ("compile = 1", "compile=1: expected true or false"),
    ("lr = float('nan')", "lr=nan: expected float"), ("lr = [1]", "lr=[1]: expected float"),
    ("x = = 1", "line 1: SyntaxError"), ("\n\nlr = 1 / 0", "line 3: ZeroDivisionError: division by zero"),
    ("import nowhere", "line 1: ModuleNotFoundError")])
def test_a_recipe_mistake_stops_with_its_place(recipe, text, message):
    said = refused([recipe(text)])
    assert message in said and "r.py" in said


def test_help_shows_every_setting_and_what_it_is(capsys):
    with pytest.raises(SystemExit) as e:
        parse(Settings, ["--help"], "How to run it.\n")
    out = capsys.readouterr().out
    assert e.value.code == 0 and out.startswith("How to run it.") and "\n  optimisation\n    --lr=0.001 " in out
    assert "peak learning rate\n" in out and "what is recomputed (none, block)\n" in out
    assert all(f"--{f.name}=" in out for f in dataclasses.fields(Settings))


@pytest.mark.parametrize("script", ["train_align", "train_sft"])
def test_help_of_the_training_scripts_can_be_printed(script, capsys):
    with pytest.raises(SystemExit):
        parse(importlib.import_module(script).Settings, ["-h"], "")
    assert "--batch_size=16 " in capsys.readouterr().out


@pytest.mark.parametrize("wrong, line", [
    (dict(lr=-1.0), "lr=-1.0: expected at least 0 (peak learning rate)"),
    (dict(lr=float("inf")), "lr=inf: expected at least 0 (peak learning rate)"),
    (dict(batch_size=65), "batch_size=65: expected between 1 and 64 (samples per step)"),
    (dict(batch_size=0), "batch_size=0: expected between 1 and 64 (samples per step)"),
    (dict(recompute="some"), "recompute=some: one of none, block")])
def test_a_value_outside_its_range_stops(wrong, line):
    assert error(config.check_ranges, Settings(**wrong)) == line
    config.check_ranges(Settings(lr=0.0, batch_size=64))


def test_a_script_may_change_a_default_alone():
    @dataclasses.dataclass
    class Script(Settings):
        lr: float = 0.5
        own: int = setting(1, "its own", 1)
    facts = config.setting_facts(Script)
    assert facts["lr"]["about"] == "peak learning rate" and Script().lr == 0.5 and facts["own"]["least"] == 1
    assert error(config.check_ranges, Script(lr=-1.0)).startswith("lr=-1.0: expected at least 0")


def test_a_mistake_is_one_line_and_exit_1(capsys, monkeypatch):
    def main(settings):
        config.stop("what to do")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as e:
        engine.run_script(main, Settings, "")
    assert e.value.code == "error: what to do"                   # which Python prints to stderr, with exit code 1


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    parse(Settings, [])
    print("\ufffd \ud800", flush=True)
    assert narrow.buffer.getvalue() == b"\\ufffd \\ud800\n"
