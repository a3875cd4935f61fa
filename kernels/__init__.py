"""Triton, if it is installed, and the choice between a kernel and its plain-torch definition.

Each file is read from top to bottom: the cost in bytes, the definition, the kernels, the operators registered with
torch, and the function that model.py calls. A name ending in _ref is a definition in plain torch.
To learn Triton, read in this order: norm, swiglu, rope, cross_entropy, attention."""

import functools
import os

import torch

from config import stop

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the files can still be imported; plain torch runs
    from types import SimpleNamespace
    triton = SimpleNamespace(jit=lambda f=None, **options: f or (lambda f: f), next_power_of_2=None)
    tl = SimpleNamespace(constexpr=None)

has_triton = hasattr(tl, "load")
choice = "auto"  # auto: kernels for tensors on a GPU; torch: no kernels; triton: always kernels


def choose_kernels(how, device):
    """Apply the setting `kernels` to the whole process. Stops with one line if the machine cannot run the kernels."""
    global choice
    if how not in ("auto", "torch", "triton"):
        stop(f"kernels={how}: auto, torch, triton")
    if how == "triton" and not has_triton:
        stop("kernels=triton, but Triton is not installed")
    if how == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        stop("kernels=triton needs a GPU; on a CPU TRITON_INTERPRET=1 interprets them, a thousand times slower")
    choice = how


def use_triton(x):
    """Does a kernel compute this call? x: any tensor of the call."""
    return has_triton and x.is_cuda if choice == "auto" else choice == "triton"


def architecture(x):
    """The key in a table of tile sizes: 90 for Hopper and data-centre Blackwell; 80 for all other GPUs and for
    interpreted kernels. The tiles of 80 fit in the 99 KiB of shared memory that smaller GPUs have."""
    return 90 if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10) else 80


def on_its_device(f):
    """Run f on the device of its first argument. Triton launches on the current device, even if x is on another."""
    @functools.wraps(f)
    def wrapped(x, *rest):
        with torch.cuda.device_of(x):
            return f(x, *rest)
    return wrapped
