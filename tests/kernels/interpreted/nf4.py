"""The kernel of kernels/nf4.py, interpreted (tests/interpret.py)."""

import pytest
import torch
from interpret import variant
from kernel_cases import normal

import kernels
from kernels import nf4

SHAPES = (1, 2), (3, 10), (17, 30), (1, 64), (97, 130), (64, 256), (300, 448)  # one byte; blocks and programs hang over


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_it_is_the_definition_to_the_last_bit(dtype):
    assert 97 * 130 % nf4.BLOCK and 300 * 448 > 2 * nf4.ROWS * nf4.BLOCK and 300 * 448 > nf4.BLOCK * nf4.NESTED
    for shape in SHAPES:
        parts = nf4.quantize(normal(*shape))
        got = nf4.dequantize(*parts, dtype)
        assert got.dtype == dtype and got.shape == shape and torch.equal(got, nf4.dequantize_ref(*parts, dtype))


@pytest.mark.parametrize("right, wrong", [
    ("tl.interleave(first, second)", "tl.interleave(second, first)"),             # the halves of a byte
    ("(most + tl.load(OFFSET))", "(most)"), ("r // NESTED", "r // BLOCK"),
    ("at < n // 2, 0)", "at < n // 2 - 1, 0)"), ("(byte & 15)", "(byte & 7)")])
def test_a_kernel_that_is_wrong_would_be_seen(right, wrong, tmp_path):
    parts = nf4.quantize(normal(300, 448))
    got = variant(nf4, right, wrong, tmp_path).dequantize(*parts, torch.float32)
    assert not torch.equal(got, nf4.dequantize_ref(*parts, torch.float32))
