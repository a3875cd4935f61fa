"""Settings: what is read, and that every mistake ends in one line that says what to do."""

import dataclasses
import io
import subprocess
import sys

import pytest
from conftest import ROOT

import config
from config import Error, parse
from formats import strict_json
from formats.strict_json import strict_json
from run import folder


@dataclasses.dataclass
class Settings:
    lr: float = 1e-3               # a comment that --help shows
    steps: int | None = None
    batch_size: int = 8
    recompute: str = "none"
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
    ("--model_name_or_path=x", "LLaVA's model_name_or_path is llm here"),
    ("--learning_rate=1", "LLaVA's learning_rate is lr here"),
    ("--per_device_train_batch_size=4", "is batch_size (samples per step over all ranks) here"),
    ("--lora_enable", "LLaVA's lora_enable is lora_r here")])
def test_an_unknown_setting_stops_with_the_nearest_one(arg, hint):
    assert hint in refused([arg])


def test_every_hint_to_those_who_know_llava_names_a_real_setting():
    import train_sft
    real = {f.name for f in dataclasses.fields(train_sft.Settings)}
    assert {name.split(" (")[0] for name in config.LLAVA.values()} <= real


def test_later_wins_over_earlier_and_the_command_line_over_a_recipe_before_it(recipe):
    a, b = recipe("lr = 1\nsteps = 3\n", "a.py"), recipe("lr = 2.5\ncompile = True\n", "b.py")
    s = parse(Settings, [a, b, "--steps=7", "--steps=8"])
    assert (s.lr, s.steps, s.compile, s.batch_size) == (2.5, 8, True, 8) and type(parse(Settings, [a]).lr) is float


def test_a_recipe_may_compute_import_and_keep_names_of_its_own(recipe):
    text = "import math\n_half = 4\nbatch_size = 2 * _half\nlr = math.sqrt(4)\nsystem = None\nllm = 'none'\n"
    s = parse(Settings, [recipe(text)])
    assert (s.batch_size, s.lr, s.system, s.llm) == (8, 2.0, None, "none")


@pytest.mark.parametrize("text, message", [
    ("learning_rate = 1", "LLaVA's learning_rate is lr here"), ("half = 4", "unknown setting 'half'"),
    ("batch_size = '8'", "batch_size='8': expected int"), ("batch_size = 8.0", "batch_size=8.0: expected int"),
    ("batch_size = True", "batch_size=True: expected int"), ("llm = None", "llm=None: expected str"),
    ("llm = 5", "llm=5: expected str"), ("compile = 1", "compile=1: expected true or false"),
    ("lr = float('nan')", "lr=nan: expected float"), ("lr = [1]", "lr=[1]: expected float"),
    ("x = = 1", "line 1: SyntaxError"), ("\n\nlr = 1 / 0", "line 3: ZeroDivisionError: division by zero"),
    ("import nowhere", "line 1: ModuleNotFoundError")])
def test_a_mistake_in_a_recipe_stops_with_its_place(recipe, text, message):
    said = refused([recipe(text)])
    assert message in said and "r.py" in said


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_how_to_run_and_every_setting_with_its_comment(capsys, flag):
    with pytest.raises(Error) as e:
        parse(Settings, [flag], "How to run it.\n")
    out = capsys.readouterr().out
    assert e.value.code == 0 and out.startswith("How to run it.") and "# a comment that --help shows" in out
    assert all(f.name in out for f in dataclasses.fields(Settings))


@pytest.mark.parametrize("text, message", [
    (None, "is missing"), ("folder", "cannot be read: Is a directory"), (b"\xff", "is not text in utf-8"),
    (b"[1]", "is not a json object"), (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
    (b'{"a": NaN}', "NaN is not JSON"), (b"{", "line 1 column 2")])
def test_a_json_file_that_is_no_object_ends_in_one_line_that_names_it(tmp_path, text, message):
    file = tmp_path / "x.json"
    if text == "folder":
        file.mkdir()
    elif text is not None:
        file.write_bytes(text)
    with pytest.raises(Error) as e:
        strict_json.read_json(file)
    line = str(e.value)
    assert line.startswith(f"{file}") and message in line and "\n" not in line


def test_the_nearest_folder_that_exists_says_whether_a_folder_can_be_written(tmp_path, monkeypatch):
    assert folder.unwritable(tmp_path / "a" / "b") is None and not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    assert folder.unwritable(tmp_path / "file" / "b") == f"{tmp_path / 'file'} is not a folder"
    monkeypatch.setattr("os.access", lambda path, mode: False)            # root may write everywhere
    assert folder.unwritable(tmp_path / "a" / "b") == f"{tmp_path} cannot be written to"


@pytest.mark.parametrize("text, message", [
    ('{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'"), ('[NaN]', "NaN is not JSON"),
    ('[-Infinity]', "-Infinity is not JSON"), ('[1,', "line 1 column"), ("{'a': 1}", "line 1 column 2"),
    ("[1]]", "Extra data"), ("[" * 100_000, "recursion"), ("9" * 5000, "limit"), ("", "line 1 column 1")])
def test_strict_json_refuses_what_python_forgives_and_says_where(text, message):
    with pytest.raises(ValueError, match=message) as e:
        strict_json(text, "x.json")
    assert str(e.value).startswith("x.json: ")


def test_many_keys_of_which_the_last_is_double_are_refused_quickly():
    import time
    text = "{" + ",".join(f'"{i}": 0' for i in range(200_000)) + ', "199999": 1}'
    began = time.process_time()
    with pytest.raises(ValueError, match="duplicate key '199999'"):
        strict_json(text, "x")
    assert time.process_time() - began < 100  # quadratic: hours


def test_on_the_command_line_a_mistake_is_one_line_on_stderr_and_exit_code_one():
    done = subprocess.run([sys.executable, "-c", "import config; config.stop('what to do')"], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: what to do\n")


def test_what_a_terminal_cannot_show_is_escaped_and_ends_nothing(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    parse(Settings, [])
    print("\ufffd \ud800", flush=True)
    assert narrow.buffer.getvalue() == b"\\ufffd \\ud800\n"
