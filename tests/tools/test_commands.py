"""Every command, as it is started: --help, an unknown setting, a file or a folder that cannot be used."""

import re
import runpy
import sys

import pytest
from conftest import ROOT

OTHERS = ("tools.harness_lmms", "tools.harness_vlmeval")       # they begin another program, which is not installed
MAIN = re.compile(r'^if __name__ == "__main__":', re.M)
COMMANDS = sorted({".".join(p.relative_to(ROOT).with_suffix("").parts) for folder in (".", "tools", "demo") for p in
                   (ROOT / folder).glob("*.py") if MAIN.search(p.read_text("utf-8"))} - {*OTHERS})
FILES = {  # command: its arguments; * is a file or a folder that cannot be used
    "data": "* --model=none", "eval": "--data=here.jsonl --score=*", "tools.curate": "filter * --out=new.jsonl",
    "tools.pairs": "* --out=new.jsonl", "tools.plot": "*", "tools.report": "*", "tools.notebook": "*",
    "demo.boxes": "*", "demo.variants": "*", "demo.sheet": "* new.png", "tools.retrieval": "--data=* --model=none",
    "tools.export_gguf": "*", "sample": "--model=* --prompt=?", "tools.look": "--model=* --prompt=?",
    "tools.serve": "--model=*", "train_align": "--data=here.jsonl --vision=* --llm=*", "train_sft": "*.py",
    "train_dpo": "--data=* --init=none", "train_grpo": "--data=here.jsonl --init=*", "train_pairs": "--data=*"}


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """-> function: start a command with arguments -> exit code, stdout"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").write_text('{"question_id": 1, "text": "?", "answer": "a"}\n')
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "noise").write_bytes(bytes(range(256)))

    def started(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *args])
        with pytest.raises(SystemExit) as e:
            runpy.run_path(str(ROOT / f"{name.replace('.', '/')}.py"), run_name="__main__")
        return e.value.code, capsys.readouterr().out
    return started


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_unknown_settings_are_answered(call, name):
    """tools.curate has commands of its own, and demo.pretrain needs the name of a tower first."""
    words = {"tools.curate": [["filter"], ["synth"]], "demo.pretrain": [["llm"]]}.get(name, [[]])
    for first in words:
        code, out = call(name, *first, "--help")
        assert not code and len(out.splitlines()) > 2
        for given in ("--nonsense=1", "--nonsense", "-x"):
            code, out = call(name, *first, given)
            assert re.match(f"error: ({re.escape(given)}|usage: .|.*--help says more$)", code), code
            assert "\n" not in code and out == ""


@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_read_is_one_line(call, name, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    for given in ("missing", "empty", "folder", "noise"):
        code, out = call(name, *FILES[name].replace("*", given).split())
        assert code.startswith("error: ") and "\n" not in code and out == "", (given, code)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
