"""NF4 (Dettmers et al. 2023, QLoRA): a frozen weight matrix in four bits per element, in the format of bitsandbytes.

    O rows   C columns, even   n = O * C elements, row by row   m = n / 64 blocks; the last one may be short
    W (O, C)   ->   codes (O, C/2) uint8: two elements per byte, the first in the high half
                    absmax (m,) uint8   nested (m / 256,) fp32   offset () fp32

Each block of 64 elements is divided by its largest absolute value, absmax. Each element is replaced by the index of the
nearest of 16 levels (quantiles of a normal distribution). Blocks follow the memory order and may cross the end of a
row, so any even width C works.

The absmax values are quantised too ("double quantisation"). Their mean `offset` is subtracted. Each block of 256 absmax
values is divided by its largest absolute value, `nested`. Each value is replaced by the index of the nearest of the 256
values in DYNAMIC_MAP.

The cost in bytes. An element takes 1/2 + 1/64 + 4 / (64 * 256) = 0.516 bytes; in bf16 it takes 2. So 6.5 billion
weights fit in 3.4 GB. Tensor cores cannot multiply codes, so W is dequantized to bf16 before each matrix product. The
kernel that does this reads n / 2 bytes and writes 2 n. At 4 TB/s it takes 1/35 of the time that cuBLAS needs to
multiply W by 8,192 tokens.
"""

import functools

import torch

from kernels import on_its_device, tl, triton, use_triton

BLOCK, NESTED = 64, 256
LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
          -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
          0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
PARTS = "weight", "absmax", "nested", "offset"  # names of the buffers of a quantised layer; "weight" holds the codes
NF4_ROWS, NF4_WARPS = 64, 4                     # a program dequantizes 64 blocks: 32 elements per thread


def dynamic_map():
    """Return the 256 values of the 8-bit dynamic map of bitsandbytes, ascending (256,). They are 0, 1, and positive and
    negative values in seven decades below 1. Each decade has twice as many values as the next smaller decade."""
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        positive += (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return torch.tensor(sorted([*positive, *(-x for x in positive), 0.0, 1.0]))


DYNAMIC_MAP = dynamic_map()


@functools.cache
def tables(device):
    """Return LEVELS (16,) and DYNAMIC_MAP (256,) as tensors on `device`. They are cached: a copy makes the CPU wait."""
    return torch.tensor(LEVELS).to(device), DYNAMIC_MAP.to(device)


def nearest(x, size, values):
    """Divide each block of `size` elements of x (n,) by its largest absolute value. Return two tensors:
    (n,) uint8: for each divided element, the index of the nearest of `values`, which are in ascending order
    (m,): the largest absolute value of each of the m blocks"""
    blocks = torch.nn.functional.pad(x, (0, -len(x) % size)).view(-1, size)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    edges = (values[:-1] + values[1:]) / 2
    return torch.bucketize(scaled, edges.to(x.device), out_int32=True).to(torch.uint8).flatten()[: len(x)], absmax


def quantize(W):
    """Return codes, absmax, nested, offset: the NF4 tensors of W (O, C), C even. The top of this file explains them."""
    O, C = W.shape
    assert C % 2 == 0, f"rows of {C} elements, an odd number: two elements share a byte"
    codes, wide = nearest(W.detach().float().flatten(), BLOCK, torch.tensor(LEVELS))  # wide (m,): absmax, unquantised
    offset = wide.mean()
    absmax, nested = nearest(wide - offset, NESTED, DYNAMIC_MAP)
    return (codes[::2] << 4 | codes[1::2]).view(O, C // 2), absmax, nested, offset


def dequantize_ref(codes, absmax, nested, offset, dtype):
    """Return W (O, C) by its definition in plain torch, computed in fp32, then cast to `dtype`."""
    O, half = codes.shape
    levels, values = tables(codes.device)
    scale = values[absmax.int()] * nested.repeat_interleave(NESTED)[: len(absmax)] + offset                      # (m,)
    w = levels[torch.stack([codes >> 4, codes & 15], -1).flatten().int()]                                        # (n,)
    w = torch.nn.functional.pad(w, (0, -len(w) % BLOCK)).view(-1, BLOCK) * scale[:, None]
    return w.flatten()[: O * half * 2].view(O, half * 2).to(dtype)


# ---- the kernel -----------------------------------------------------------------------------------------------------

@triton.jit
def nf4_dequantize(CODES, ABSMAX, NESTED_, OFFSET, LEVELS_, VALUES, W, n, m, BLOCK: tl.constexpr,
                   NESTED: tl.constexpr, ROWS: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)                          # (ROWS,) block indices
    scale = tl.load(VALUES + tl.load(ABSMAX + r, r < m, 0).to(tl.int32)) * tl.load(NESTED_ + r // NESTED, r < m, 0)
    scale = (scale + tl.load(OFFSET))[:, None]
    at = r[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]                     # (ROWS, 32) bytes
    byte = tl.load(CODES + at, at < n // 2, 0).to(tl.int32)
    first, second = tl.load(LEVELS_ + (byte >> 4)) * scale, tl.load(LEVELS_ + (byte & 15)) * scale
    at = r[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]                                 # (ROWS, 64) elements
    tl.store(W + at, tl.interleave(first, second), at < n)


# ---- the operator registered with torch -----------------------------------------------------------------------------

@torch.library.custom_op("pumice::nf4", mutates_args=())
@on_its_device
def nf4_op(codes: torch.Tensor, absmax: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor,
           dtype: torch.dtype) -> torch.Tensor:
    if not use_triton(codes):
        return dequantize_ref(codes, absmax, nested, offset, dtype)
    w = codes.new_empty(codes.shape[0], codes.shape[1] * 2, dtype=dtype)
    levels, values = tables(codes.device)
    grid = triton.cdiv(len(absmax), NF4_ROWS),
    # enable_fp_fusion=False: a product is rounded before it is added to another number, as in torch
    nf4_dequantize[grid](codes, absmax, nested, offset, levels, values, w, w.numel(), len(absmax), BLOCK, NESTED,
                         NF4_ROWS, num_warps=NF4_WARPS, enable_fp_fusion=False)
    return w


nf4_op.register_fake(lambda codes, absmax, nested, offset, dtype:
                     codes.new_empty(codes.shape[0], codes.shape[1] * 2, dtype=dtype))


def dequantize(codes, absmax, nested, offset, dtype):
    """Return W (O, C) in `dtype`, without a gradient. The top of this file describes the four tensors that store W."""
    return nf4_op(codes, absmax, nested, offset, dtype)
