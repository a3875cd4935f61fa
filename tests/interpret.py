"""Run tests of Triton kernels on a CPU, in their own process: TRITON_INTERPRET must be set before Triton is imported.

    def test_the_kernels():
        interpret("norm", "rope")  # pytest on these files of tests/kernels/interpreted/, which pytest does not collect

By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted/norm.py. Two errors of the interpreter limit what
can be tested: tl.dot of bf16 multiplies raw bits, and a cast from fp32 to bf16 truncates."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def interpret(*names):
    pytest.importorskip("triton", reason="no Triton on this system")
    files = [f"tests/kernels/interpreted/{name}.py" for name in names]
    got = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
                         cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert got.returncode == 0, got.stdout[-6000:] + got.stderr[-2000:]


def variant(module, right, wrong, folder):
    """The module with one piece of its source replaced, as a new module: a sabotage that a test must catch."""
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1, f"{source.count(right)} times in {module.__file__}: {right}"
    name = f"variant_of_{module.__name__.rpartition('.')[2]}_{abs(hash(wrong + right))}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(right, wrong).replace("pumice::", f"{name}::"))
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
