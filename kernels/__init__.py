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
choice = "auto"  # auto: kernels for tensors on a GPU; torch: no kernels; triton: always kernels


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
    """True if a Triton kernel computes a call, False if plain torch does. x: any tensor argument of the call."""
    return has_triton and x.is_cuda if choice == "auto" else choice == "triton"


def architecture(x):
    """-> key of a table of tile sizes: 90 for Hopper and data-centre Blackwell GPUs; 80 for all other GPUs and for
    kernels that run in Triton's interpreter. Tiles of key 80 fit in the 99 KiB of shared memory of smaller GPUs."""
    return 90 if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10) else 80


def on_its_device(f):
    """Make the device of x current while f runs, because Triton launches a kernel on the current device."""
    @functools.wraps(f)
    def wrapped(x, *rest):
        with torch.cuda.device_of(x):
            return f(x, *rest)
    return wrapped
