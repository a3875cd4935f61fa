"""Triton, where there is one, and the choice between a kernel and its definition in plain torch.

A kernel file reads from top to bottom: the argument in bytes, the definition, the kernels, the operators that torch
sees, the function that model.py calls. To learn Triton, read norm, swiglu, rope, cross_entropy, attention."""

import functools
import os

import torch

from config import stop

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the files are read all the same, and the definitions serve
    from types import SimpleNamespace
    triton = SimpleNamespace(jit=lambda f=None, **how: f or (lambda f: f), next_power_of_2=None)
    tl = SimpleNamespace(constexpr=None)

here = hasattr(tl, "load")
choice = "auto"  # auto: kernels for tensors on a GPU; torch, triton: always the one or the other


def choose_kernels(how, device):
    """The setting `kernels` of the scripts, for the whole process. One line where it cannot be meant."""
    global choice
    if how not in ("auto", "torch", "triton"):
        stop(f"kernels={how}: auto, torch, triton")
    if how == "triton" and not here:
        stop("kernels=triton, but Triton is not installed")
    if how == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        stop("kernels=triton needs a GPU; on a CPU TRITON_INTERPRET=1 interprets them, a thousand times slower")
    choice = how


def use_triton(x):
    return here and x.is_cuda if choice == "auto" else choice == "triton"


def architecture(x):
    """Which row of a table of block sizes holds: 90 for Hopper and the large Blackwells, 80 for all others (and for
    interpreted kernels), whose rows stay below the 99 KiB of shared memory that the smaller cards have."""
    return 90 if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10) else 80


def on_its_device(f):
    """Triton launches on the current device, whatever it is given: f, made to run on that of its first argument."""
    @functools.wraps(f)
    def there(x, *rest):
        with torch.cuda.device_of(x):
            return f(x, *rest)
    return there
