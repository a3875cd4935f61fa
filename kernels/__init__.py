"""This file imports Triton, if it is installed, and decides for each call: a Triton kernel, or plain torch.

Each file of this folder has the same order: the cost in bytes of memory traffic, the definition, the kernels, the
operators registered with torch, the function for other files. A name ending in _ref is a definition in plain torch.
To learn Triton, read in this order: norm, swiglu, rope, cross_entropy, attention."""

import functools
import os

import torch

from config import stop

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton, as on macOS: these stand-ins let the kernel files be imported, and plain torch runs
    from types import SimpleNamespace
    triton = SimpleNamespace(jit=lambda f=None, **options: f or (lambda f: f), next_power_of_2=None)
    tl = SimpleNamespace(constexpr=None)

has_triton = hasattr(tl, "load")
# Which code computes a call? "auto": Triton kernels for tensors on a GPU, plain torch for other tensors.
# "torch": always plain torch. "triton": always Triton kernels.
choice = "auto"


def choose_kernels(how, device):
    """Set `choice` to `how` for this process. If `how` is unknown or cannot run on `device`, stop with an error."""
    global choice
    if how not in ("auto", "torch", "triton"):
        stop(f"kernels={how}: auto, torch, triton")
    if how == "triton" and not has_triton:
        stop("kernels=triton, but Triton is not installed")
    if how == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        stop("kernels=triton needs a GPU; on a CPU TRITON_INTERPRET=1 interprets them, a thousand times slower")
    choice = how


def use_triton(x):
    """Return True if a Triton kernel computes a call, False if plain torch does. x: any tensor argument of the call"""
    return has_triton and x.is_cuda if choice == "auto" else choice == "triton"


def architecture(x):
    """Return 80 or 90, the key of the GPU of x in tables of tile sizes. 90 means Hopper. 80 means any other GPU, or a
    kernel that runs in Triton's interpreter. Tiles of key 80 fit in the 99 KiB of shared memory that smaller GPUs have.
    Data-centre Blackwell (capability 10) has key 80 too: compiled for it, attention's tiles of key 90 spill registers
    in both loops of the forward kernel for heads of 128 (Triton 3.7.1: 16 and 26 spills; tiles of key 80: none)."""
    return 90 if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9 else 80


def on_its_device(f):
    """Wrap f(x, ...): while f runs, the GPU of tensor x is the current device. Triton launches a kernel on the current
    device, which may be another GPU than that of x."""
    @functools.wraps(f)
    def wrapped(x, *rest):
        with torch.cuda.device_of(x):
            return f(x, *rest)
    return wrapped
