"""The kernels of kernels/norm.py, interpreted (tests/interpret.py)."""

import pytest
import torch
from interpret import variant
from kernel_cases import check_errors, close, normal, opcheck, strided, with_gradients

import kernels
from kernels import norm as module
from kernels.norm import layer_norm_ref, norm_backward_op, norm_op, rms_norm, rms_norm_ref

EPS = 1e-3  # large enough that its absence is measured
FORMS = {  # name -> function of (the module with the kernels, x, add, w, b), arguments of its definition
    "rms": (lambda m, x, w: m.rms_norm(x, w, EPS), lambda x, w: rms_norm_ref(x, w, EPS)),
    "rms add": (lambda m, x, w, add: m.rms_norm(x, w, EPS, add),
                lambda x, w, add: (x + add, rms_norm_ref(x + add, w, EPS))),
    "layer": (lambda m, x, w, b: m.layer_norm(x, w, b, EPS), lambda x, w, b: layer_norm_ref(x, w.shape, w, b, EPS)),
    "layer add": (lambda m, x, w, b, add: m.layer_norm(x, w, b, EPS, add),
                  lambda x, w, b, add: (x + add, layer_norm_ref(x + add, w.shape, w, b, EPS)))}


@pytest.fixture(autouse=True)
def use_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")


def case(name, N, C, dtype=torch.float64, m=module):
    """-> kernel, definition, arguments"""
    f, true = FORMS[name]
    args = [normal(N, C, dtype=dtype) + 0.3, *(normal(C, dtype=dtype, seed=i) for i in range(1 + ("layer" in name)))]
    return (lambda *a: f(m, *a)), true, args + ([normal(N, C, dtype=dtype, seed=1) + 0.3] if "add" in name else [])


@pytest.mark.parametrize("name", FORMS)
def test_outputs_and_gradients_equal_the_definition(name):
    for N, C in ((0, 17), (1, 1), (33, 129)):
        f, true, args = case(name, N, C)
        close(f, true, *args)


@pytest.mark.parametrize("name", FORMS)
def test_a_program_loops_over_many_tiles(name, monkeypatch):
    """Three programs, eleven tiles, the last one partly filled: each row counts once in the gradients of w and b."""
    monkeypatch.setattr(module, "NORM_PROGRAMS", 3)
    monkeypatch.setattr(module, "NORM_TILE", 64)
    f, true, args = case(name, 43, 15)
    close(f, true, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", FORMS)
def test_low_precision_errs_at_most_twice_as_much(name, dtype):
    f, true, args = case(name, 33, 129, dtype)
    check_errors(f, true, *args, terms=129 if dtype == torch.float32 else 1)


BROKEN = {
    "mean over the tile": ("[:, None] / C + eps)\n    w = ", "[:, None] / BLOCK + eps)\n    w = "),
    "no eps": ("x *= tl.rsqrt(tl.sum(x * x, 1)[:, None] / C + eps)", "x *= tl.rsqrt(tl.sum(x * x, 1)[:, None] / C)"),
    "masked lanes become -mean": ("C, 0)  #", "C, x - tl.sum(x, 1)[:, None] / C)  #"),
    "weight before the rounding": ("y = x.to(Y.dtype.element_ty).to(wide) * w", "y = x * w"),
    "component along x kept": ("dx = g - x * (tl.sum(g * x, 1)[:, None] / C)", "dx = g"),
    "residual's gradient forgotten": ("dx += tl.load(DS + at, mask, 0).to(wide)", "dx += 0"),
    "last row forgotten": ("(n < N) & (c < C)\n        x = ", "(n < N - 1) & (c < C)\n        x = "),
    "weight's gradient rounded per row": ("dw += dy * x", "dw += (dy * x).to(tl.float16).to(wide)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_fails(name, tmp_path):
    broken = variant(module, *BROKEN[name], tmp_path)
    with pytest.raises(AssertionError):
        if name == "weight before the rounding":    # one rounding less: the error is smaller, the bits differ
            f, true, args = case("rms", 97, 129, torch.float16, broken)
            assert (f(*args) != true(*args)).double().mean() < 0.01
        else:
            for form in ("rms add", "layer"):
                f, true, args = case(form, 33, 129, torch.float32, broken)
                args[0] /= 16                       # the mean square becomes comparable with EPS
                check_errors(f, true, *args, terms=129)


def test_the_published_order_of_roundings():
    f, true, args = case("rms", 97, 129, torch.float16)
    assert (f(*args) != true(*args)).double().mean() < 0.01    # rsqrt may differ in its last bit


@pytest.mark.parametrize("name", FORMS)
def test_strides_and_leading_dimensions_change_nothing(name):
    f, true, args = case(name, 24, 17)
    up = [strided(normal(24, 17, seed=3)) for _ in range(1 + ("add" in name))]
    close(f, true, *map(strided, args), up=up)
    close(f, true, *(t.view(2, 12, 17).transpose(0, 1) if t.dim() > 1 else t for t in args))


@pytest.mark.parametrize("name", ["rms add", "layer"])
def test_frozen_arguments_change_no_other_gradient(name):
    f, _, args = case(name, 17, 15)
    whole = with_gradients(f, *args)[-len(args):]
    for i in range(len(args)):
        leaves = [t.clone().requires_grad_(j != i) for j, t in enumerate(args)]
        out = f(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(out, [normal(*o.shape, seed=7) for o in out])
        assert leaves[i].grad is None
        assert all(torch.equal(t.grad, g) for j, (t, g) in enumerate(zip(leaves, whole)) if j != i)


def test_one_of_two_results_may_be_unused():
    f, true, args = case("rms add", 5, 15)
    for pick in (0, 1):
        ours, theirs = (lambda x, w, add, g=g: g(x, w, add)[pick] + 0 * w.sum() for g in (f, true))
        close(ours, theirs, *args)


def test_gradients_are_deterministic_and_summed_in_fp32():
    f, true, (x, w) = case("rms", 129, 97, torch.float32)
    assert all(map(torch.equal, *(with_gradients(f, x, w) for _ in range(2))))
    low, up = x.half(), normal(129, 97, dtype=torch.float16)
    y, dx, dw = with_gradients(f, low, w, up=[up])                          # an fp32 weight, as under autocast
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.float16, torch.float16, torch.float32)
    exact = with_gradients(true, low.double(), w.double(), up=[up.double()])[2]
    assert (dw - exact).norm() < 2e-6 * exact.norm()                        # sqrt(129) 2^-24, twice; in fp16: 3e-4
    s, y = rms_norm(low, w, EPS, x)                                         # a sum of two dtypes has the wider one
    assert s.dtype == y.dtype == torch.float32 and torch.equal(s, low + x)


@pytest.mark.parametrize("name", ["rms", "layer add"])
def test_operators_pass_opcheck(name):
    _, _, args = case(name, 5, 15, torch.float32)
    x, w, b, add = args if "add" in name else (*args, None, None)
    opcheck(norm_op, tuple(t if t is None else t.requires_grad_() for t in (x, add, w, b)) + (EPS,))
    x, w, layer = x.detach(), w.detach(), b is not None
    opcheck(norm_backward_op, (x, w, x, None if add is None else x, EPS, layer, True, layer))
