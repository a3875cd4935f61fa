"""The Triton side of the linear cross-entropy: right when interpreted, and compiled for cards that are not here."""

import pytest
from compile_check import ARCHS, compile_for, fits
from interpret import interpret

from kernels.cross_entropy import TILES, _turn


def test_interpreted():
    interpret("cross_entropy")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("gradient", [True, False])
def test_compiled(arch, gradient):
    """No spills, and loads of 16 bytes where rows are aligned (32,000 words); 32,003 words still compile."""
    block, warps = TILES[arch]
    args = {"X": "*bf16", "LABELS": "*i64", "LOSS": "*fp32", "V": "i32", "stride": "i32"}
    for unaligned in ((), ("V", "stride")):
        found = compile_for(_turn, args, {"GRADIENT": gradient, "BLOCK": block}, arch, warps, unaligned=unaligned)
        fits(found)
        assert (found["wide"] > 0) == (not unaligned)
