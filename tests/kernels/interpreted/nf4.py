"""The kernel of kernels/nf4.py, interpreted (tests/interpret.py)."""

import pytest
import torch
from interpret import variant
from kernel_cases import normal

import kernels
from kernels import nf4

SHAPES = (1, 2), (17, 30), (97, 130), (150, 112)  # one byte; short last blocks; several programs, several nested blocks


@pytest.fixture(autouse=True)
def use_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_it_has_the_bits_of_the_definition(dtype):
    assert 97 * 130 % nf4.BLOCK and 150 * 112 > nf4.BLOCK * nf4.NESTED > 2 * nf4.NF4_ROWS * nf4.BLOCK
    for shape in SHAPES:
        parts = nf4.quantize(normal(*shape))
        got = nf4.dequantize(*parts, dtype)
        assert got.dtype == dtype and got.shape == shape and torch.equal(got, nf4.dequantize_ref(*parts, dtype))


BROKEN = {
    "halves of a byte swapped": ("tl.interleave(first, second)", "tl.interleave(second, first)"),
    "offset forgotten": ("(scale + tl.load(OFFSET))", "(scale)"), "wrong nested block": ("r // NESTED", "r // BLOCK"),
    "last byte forgotten": ("at < n // 2, 0)", "at < n // 2 - 1, 0)"), "three bits": ("(byte & 15)", "(byte & 7)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_fails(name, tmp_path):
    parts = nf4.quantize(normal(150, 112))
    got = variant(nf4, *BROKEN[name], tmp_path).dequantize(*parts, torch.float32)
    assert not torch.equal(got, nf4.dequantize_ref(*parts, torch.float32))
