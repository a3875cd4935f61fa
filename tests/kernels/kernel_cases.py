"""Helpers for the kernel tests: random tensors, a forward and backward pass, error budgets, memory measurements.

The error budget. A result may err twice as much as plain torch does at that precision. Both errors are measured against
float64, computed from the same rounded inputs. No bound may rely on one BLAS: torch's own error changes with the order
in which a product adds its terms, and can be small by luck. So an absolute floor is added. A sum of `terms` terms makes
`terms` roundings, each of at most eps/2 of a partial sum. Rounding errors are independent, so their sum grows with the
square root: eps/2 * sqrt(terms) * size of the result, or of larger intermediate values. A mistake in precision (a
factor in bf16, fp16 or TF32 where fp32 is meant) errs by 2^12 times eps/2 or more and exceeds every such floor."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = 1, 15, 97, 129       # next to powers of two, so that the last tile of 16, 32 or 128 is partly filled
TIGHT = 1e-12                # float64: sums of at most 1,300 terms of size 1: 1300 * 2^-53 = 1.4e-13


def normal(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def with_gradients(f, *args, up=None):
    """-> [outputs..., gradients of all floating-point arguments...]; up: the incoming gradients, random if None"""
    args = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in args]
    out = f(*args)
    out = out if isinstance(out, tuple) else (out,)
    up = [normal(*o.shape, seed=7).to(o) for o in out] if up is None else up
    wanted = [t for t in args if t is not None and t.requires_grad]
    return [*(o.detach() for o in out), *torch.autograd.grad(out, wanted, up)]


def close(f, g, *args, up=None):
    """f equals g in float64: outputs and gradients."""
    ours, theirs = with_gradients(f, *args, up=up), with_gradients(g, *args, up=up)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=TIGHT, atol=TIGHT)


def check_error(ours, theirs, true, terms=1, largest=0.0):
    """The budget above, for the root mean square (RMS) over the tensor. The worst element may err four times as much as
    torch's worst, because a single element is a matter of luck. terms: length of the longest sum (1 if it is made in a
    wider dtype and rounded once); largest: size of intermediate values, if larger than the result."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == true.shape and ours.isfinite().all()
    if true.numel():
        def rms(t):
            return t.square().mean().sqrt()

        unit = torch.finfo(ours.dtype).eps / 2 * terms**0.5
        a, b = (t.double() - true for t in (ours, theirs))
        assert rms(a) <= 2 * rms(b) + unit * max(rms(true), largest), "RMS error above the budget"
        floor = 2 * unit * max(true.abs().max(), largest)
        assert a.abs().max() <= 4 * b.abs().max() + floor, "worst error above the budget"


def check_errors(f, g, *args, terms=1, largest=0.0):
    """check_error for outputs and gradients of f; args in low precision, g: the definition."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in args]
    for results in zip(with_gradients(f, *args), with_gradients(g, *args), with_gradients(g, *wide), strict=True):
        check_error(*results, terms, largest)


def strided(t):
    """The same values, with stride 2 in memory"""
    return torch.stack([t, -t], -1)[..., 0]


def saved(f, *args):
    """Bytes that autograd saves for the backward pass of f, beyond its arguments and outputs"""
    kept = {}
    args = [t.detach().requires_grad_() for t in args]

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = f(*args)
    out = out if isinstance(out, tuple) else (out,)
    return sum(n for at, n in kept.items() if at not in {t.untyped_storage().data_ptr() for t in (*args, *out)})


class NewTensors(TorchDispatchMode):
    """Records the bytes of each tensor that an operation allocates; views do not count."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values())
                 if isinstance(t, torch.Tensor)}
        self.bytes += [t.untyped_storage().nbytes() for t in (out if isinstance(out, (tuple, list)) else (out,))
                       if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given]
        return out


def allocations(f):
    """Bytes that torch allocates (+) and frees (-) during f, in order, inside its operators too"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def opcheck(op, args):
    """The operator's schema, autograd registration and shapes without data. The compile tests cover the rest."""
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
