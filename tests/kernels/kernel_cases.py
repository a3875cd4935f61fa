"""What the tests of kernels share: sizes, a pass with gradients, and budgets for errors.

A kernel may err a quarter more than plain torch does at that precision, as root of the mean square, and in its worst
number by at most four times the worst of torch's: both against the same thing in float64, from the rounded inputs. Of a
single number luck decides, so that a rounding of the largest number is granted in any case."""

import torch

SIZES = 1, 15, 17, 97, 129   # one, and beside powers of two: tiles of 16, 32, 128 hang over
TIGHT = 1e-12                # float64: sums of at most 200 terms of size about 1, and products of a few of them


def normal(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def with_gradients(f, *args, up=None):
    """-> [outputs..., gradients of all floating-point arguments...] for an uneven gradient from above"""
    args = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in args]
    out = f(*args)
    out = out if isinstance(out, tuple) else (out,)
    up = [normal(*o.shape, seed=7).to(o) for o in out] if up is None else up
    wanted = [t for t in args if t is not None and t.requires_grad]
    return [*(o.detach() for o in out), *torch.autograd.grad(out, wanted, up)]


def close(f, g, *args, up=None):
    """f is g in float64, outputs and gradients."""
    ours, theirs = with_gradients(f, *args, up=up), with_gradients(g, *args, up=up)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=TIGHT, atol=TIGHT)


def within_budget(f, g, *args):
    """Are the errors of f those of g, within the budget above? args in low precision; the definition g also runs on
    them in float64."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in args]
    for ours, theirs, true in zip(with_gradients(f, *args), with_gradients(g, *args), with_gradients(g, *wide)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.isfinite().all()
        a, b = (ours.double() - true).abs(), (theirs.double() - true).abs()
        luck = torch.finfo(ours.dtype).eps * true.abs().max()
        a_rms, b_rms = (t.square().mean().sqrt() for t in (a, b))
        if not (a_rms <= 1.25 * b_rms + luck / 8 and a.max() <= 4 * b.max() + luck):
            return False
    return True


def odd(t):
    """The same numbers, every other one in memory"""
    return torch.stack([t, -t], -1)[..., 0]


def saved(f, *args):
    """Bytes that autograd keeps of f beyond its arguments and outputs"""
    kept = {}
    args = [t.detach().requires_grad_() for t in args]

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = f(*args)
    out = out if isinstance(out, tuple) else (out,)
    return sum(n for at, n in kept.items() if at not in {t.untyped_storage().data_ptr() for t in (*args, *out)})
