"""NF4 (Dettmers et al. 2023, QLoRA): a frozen matrix in four bits a number, codes and bytes as bitsandbytes has them.

    O rows   C columns   n = O C numbers, taken row by row   m = n / 64 blocks, the last one may be short
    W (O, C)   ->   codes (O, C/2) uint8, two numbers a byte, the first one in the high half
                    absmax (m,) uint8   nested (m / 256,) fp32   offset () fp32

A block of 64 numbers is divided by the largest of them; each becomes the nearest of 16 levels, quantiles of a normal
distribution. The largest numbers themselves, less their mean `offset`, are kept in 8 bits: blocks of 256 of them are
again divided by the largest, `nested`, and each becomes the nearest of 256 numbers in STEPS. Blocks follow the numbers
as they lie in memory and do not mind where a row ends, so that any even width will do.

The argument in bytes. A number takes 1/2 + 1/64 + 4 / (64 * 256) = 0.516 bytes where bf16 takes 2: 6.5 billion weights
fit into 3.4 GB. No tensor core multiplies levels: the matrix is written out in bf16 before each product, which reads
n / 2 bytes and writes 2 n. At 4 TB/s that is a 35th of the product's own time for 8,192 tokens, so that the kernel is
kept apart from the product, and cuBLAS does what it does best. Plain torch would also write the codes out as int64.
"""

import functools

import torch

from kernels import on_its_device, tl, triton, use_triton

BLOCK, NESTED = 64, 256
LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
          -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
          0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
PARTS = "weight", "absmax", "nested", "offset"  # what a quantised layer keeps, in this order; weight: the codes
ROWS, WARPS = 64, 4                             # blocks of 64 that a program writes: 32 numbers per thread


def steps():
    """(256,) the 8-bit numbers of bitsandbytes' dynamic map: seven decades up to 1, each cut into twice as many parts
    as the one below it, with both signs, and 0 and 1."""
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        positive += (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return torch.tensor(sorted([*positive, *(-x for x in positive), 0.0, 1.0]))


STEPS = steps()


@functools.cache
def tables(device):
    """LEVELS and STEPS, once per device: a copy from the host in each of a step's hundreds of calls would wait for all
    that the device still has to do."""
    return torch.tensor(LEVELS).to(device), STEPS.to(device)


def nearest(x, size, numbers):
    """Blocks of `size` of x (n,), divided by their largest -> (n,) index of the nearest of `numbers`, (m,) largest"""
    blocks = torch.nn.functional.pad(x, (0, -len(x) % size)).view(-1, size)
    most = blocks.abs().amax(1)
    share = (blocks * (1 / most.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    edges = (numbers[:-1] + numbers[1:]) / 2
    return torch.bucketize(share, edges.to(x.device), out_int32=True).to(torch.uint8).flatten()[: len(x)], most


def quantize(W):
    """W (O, C), C even -> codes, absmax, nested, offset"""
    O, C = W.shape
    assert C % 2 == 0, f"rows of {C} numbers, which is odd: two numbers share a byte"
    codes, most = nearest(W.detach().float().flatten(), BLOCK, torch.tensor(LEVELS))
    offset = most.mean()
    absmax, nested = nearest(most - offset, NESTED, STEPS)
    return (codes[::2] << 4 | codes[1::2]).view(O, C // 2), absmax, nested, offset


def dequantize_ref(codes, absmax, nested, offset, dtype):
    """The definition: -> (O, C) in dtype, formed in fp32."""
    O, half = codes.shape
    levels, numbers = tables(codes.device)
    most = numbers[absmax.int()] * nested.repeat_interleave(NESTED)[: len(absmax)] + offset                      # (m,)
    w = levels[torch.stack([codes >> 4, codes & 15], -1).flatten().int()]                                        # (n,)
    w = torch.nn.functional.pad(w, (0, -len(w) % BLOCK)).view(-1, BLOCK) * most[:, None]
    return w.flatten()[: O * half * 2].view(O, half * 2).to(dtype)


# ---- the kernel -----------------------------------------------------------------------------------------------------

@triton.jit
def nf4_dequantize(CODES, ABSMAX, NESTED_, OFFSET, LEVELS_, STEPS_, W, n, m, BLOCK: tl.constexpr,
                   NESTED: tl.constexpr, ROWS: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)                          # my blocks
    most = tl.load(STEPS_ + tl.load(ABSMAX + r, r < m, 0).to(tl.int32)) * tl.load(NESTED_ + r // NESTED, r < m, 0)
    most = (most + tl.load(OFFSET))[:, None]
    at = r[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]                     # (ROWS, 32) bytes
    byte = tl.load(CODES + at, at < n // 2, 0).to(tl.int32)
    first, second = tl.load(LEVELS_ + (byte >> 4)) * most, tl.load(LEVELS_ + (byte & 15)) * most
    at = r[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]                                 # (ROWS, 64) numbers
    tl.store(W + at, tl.interleave(first, second), at < n)


# ---- what torch sees ------------------------------------------------------------------------------------------------

@torch.library.custom_op("pumice::nf4", mutates_args=())
@on_its_device
def nf4_op(codes: torch.Tensor, absmax: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor,
           dtype: torch.dtype) -> torch.Tensor:
    if not use_triton(codes):
        return dequantize_ref(codes, absmax, nested, offset, dtype)
    w = codes.new_empty(codes.shape[0], codes.shape[1] * 2, dtype=dtype)
    levels, numbers = tables(codes.device)
    grid = triton.cdiv(len(absmax), ROWS),
    nf4_dequantize[grid](codes, absmax, nested, offset, levels, numbers, w, w.numel(), len(absmax), BLOCK, NESTED,
                         ROWS, num_warps=WARPS, enable_fp_fusion=False)  # x y + z rounded twice, as in the definition
    return w


@nf4_op.register_fake
def _(codes, absmax, nested, offset, dtype):
    return codes.new_empty(codes.shape[0], codes.shape[1] * 2, dtype=dtype)


# ---- the choice -----------------------------------------------------------------------------------------------------

def dequantize(codes, absmax, nested, offset, dtype):
    """codes (O, C/2), absmax (m,) uint8, nested (m / 256,), offset () fp32 -> W (O, C) in dtype, without a gradient"""
    return nf4_op(codes, absmax, nested, offset, dtype)
