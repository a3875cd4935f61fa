"""NF4: the bytes of bitsandbytes, the quantisation error; the kernel compiled. tests/kernels/interpreted runs it."""

import hashlib

import pytest
import torch
from compile_check import assert_fits, compile_for
from kernel_cases import normal, opcheck

from kernels import nf4

CASES = [((64, 64), torch.float32), ((512, 1000), torch.float32), ((300, 448), torch.bfloat16),
         ((300, 448), torch.float16), ((33, 50), torch.float32), ((3, 10), torch.float32)]  # the last: short blocks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape, dtype", CASES)
def test_bytes_equal_those_of_bitsandbytes(shape, dtype):
    """Block 64, nested 256, mean subtracted. For fp32 its CPU library looks up the nearest 8-bit value in a coarse
    table and is off by one now and then; for float64 it searches and finds our values."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    W = (normal(*shape) * 0.02).to(dtype)
    codes, absmax, nested, offset = nf4.quantize(W)
    packed, state = bnb.quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(nf4.DYNAMIC_MAP, bnb.create_dynamic_map()) and torch.equal(state.code, torch.tensor(nf4.LEVELS))
    assert torch.equal(codes.view(-1, 1), packed)
    assert torch.equal(nested, state.state2.absmax) and torch.equal(offset, state.offset)
    largest = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")[1].absmax
    if len(largest) > 1:                                                      # of one block it computes 0 / 0
        exact, _ = torch.ops.bitsandbytes.quantize_blockwise((largest - offset).double(), nf4.DYNAMIC_MAP, 256)
        assert torch.equal(absmax, exact)
        apart = (absmax.int() - state.absmax.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.005
    theirs = bnb.dequantize_4bit(packed, state)                               # both decode its bytes
    assert torch.equal(nf4.dequantize(codes, state.absmax, nested, offset, dtype), theirs)


def test_recorded_bytes_of_bitsandbytes_are_reproduced():
    """Digests of version 0.50.2, for machines without it; the values of W are exact on any machine."""
    i = torch.arange(33 * 250)
    W = ((i * 7919 % 1009 - 504) * (1 + i % 7) / 4096).view(33, 250)
    for part, digest in zip(nf4.quantize(W), ("d190fcec1b3edcd3", "8ed55d28e22b6aa6")):
        assert hashlib.sha256(bytes(part.flatten().tolist())).hexdigest()[:16] == digest
    some = torch.tensor([-0.99296874, -0.97890627, -0.09859375, -5.5e-7, 0, 5.5e-7, 3.25e-6, 0.23359375, 0.99296874, 1])
    torch.testing.assert_close(nf4.DYNAMIC_MAP[[0, 1, 64, 126, 127, 128, 129, 200, 254, 255]], some, rtol=1e-6, atol=0)


def test_errors_are_at_most_half_a_gap():
    levels = torch.tensor(nf4.LEVELS)
    W = torch.cat([levels, levels.flip(0), levels, levels]).repeat(4, 1)
    codes, absmax, nested, offset = nf4.quantize(W)
    assert torch.equal(codes[0, :8], torch.arange(0, 16, 2, dtype=torch.uint8) * 16 + torch.arange(1, 16, 2))
    assert torch.equal(nf4.dequantize(codes, absmax, nested, offset, torch.float32), W)      # absmax is 1 in all blocks
    W = normal(256, 512).float()
    got = nf4.dequantize(*nf4.quantize(W), torch.float32)
    absmax = W.view(-1, 64).abs().amax(1)
    gap = (levels[1:] - levels[:-1]).max() / 2
    step = 0.01 * absmax.max()                                                # of the 8-bit values, at most
    assert ((got - W).view(-1, 64).abs().amax(1) <= gap * absmax + step).all()
    assert 0.085 < (got - W).std() / W.std() < 0.1                            # 9.3 % for a normal distribution


def test_zeros_stay_zero():
    W = normal(8, 64).float()
    W[2], W[5, ::2] = 0, 0
    got = nf4.dequantize(*nf4.quantize(W), torch.float32)
    assert got.isfinite().all() and not got[2].any() and not got[5, ::2].any()


def test_scaling_the_weights_keeps_the_codes():
    W = normal(8, 64).float()
    for small in (2.0**-20, 2.0**-60):
        assert torch.equal(nf4.quantize(W * small)[0], nf4.quantize(W)[0])


def test_an_element_takes_about_half_a_byte():
    parts = nf4.quantize(normal(512, 1376))
    assert sum(t.nbytes for t in parts) <= 0.517 * 512 * 1376


def test_opcheck_and_compile():
    parts = nf4.quantize(normal(33, 50))
    opcheck(nf4.nf4_op, (*parts, torch.float32))
    whole = torch.compile(nf4.dequantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(*parts, torch.float32), nf4.dequantize(*parts, torch.float32))


def test_tables_are_copied_to_a_device_once():
    assert nf4.tables("cpu") is nf4.tables("cpu")


@pytest.mark.parametrize("arch, dtype", [(80, "*fp32"), (90, "*bf16"), (100, "*bf16")])
def test_the_kernel_fits_every_gpu(arch, dtype):
    table = dict.fromkeys(("NESTED_", "OFFSET", "LEVELS_", "VALUES"), "*fp32")
    arguments = {"CODES": "*u8", "ABSMAX": "*u8", "W": dtype, "n": "i32", "m": "i32"} | table
    found = compile_for(nf4.nf4_dequantize, arguments, {"BLOCK": nf4.BLOCK, "NESTED": nf4.NESTED, "ROWS": nf4.NF4_ROWS},
                        arch, nf4.NF4_WARPS, unaligned=["m"])
    assert_fits(found)
    assert found["wide"] >= 32 * 2 // 16                                      # 32 elements per thread
