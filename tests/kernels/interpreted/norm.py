"""The kernels of kernels/norm.py, interpreted (tests/interpret.py)."""

import pytest
import torch
from conftest import tiny_vlm
from kernel_cases import SIZES, close, normal, odd, with_gradients, within_budget

import kernels
from kernels.norm import PROGRAMS, TILE, layer_norm, layer_norm_ref, norm_backward_op, norm_op, rms_norm, rms_norm_ref

EPS = 1e-3  # large enough to be seen


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")


def rms(x, w):
    return rms_norm(x, w, EPS)


def rms_add(x, add, w):
    return rms_norm(x, w, EPS, add)


def layer(x, w, b):
    return layer_norm(x, w, b, EPS)


def layer_add(x, add, w, b):
    return layer_norm(x, w, b, EPS, add)


def rms_true(x, w):
    return rms_norm_ref(x, w, EPS)


def rms_add_true(x, add, w):
    return x + add, rms_norm_ref(x + add, w, EPS)


def layer_true(x, w, b):
    return layer_norm_ref(x, w.shape, w, b, EPS)


def layer_add_true(x, add, w, b):
    return x + add, layer_norm_ref(x + add, w.shape, w, b, EPS)


FORMS = {"rms": (rms, rms_true, 1, 1), "rms add": (rms_add, rms_add_true, 2, 1),     # kernel, definition, how many
         "layer": (layer, layer_true, 1, 2), "layer add": (layer_add, layer_add_true, 2, 2)}  # (N, C) and (C,) it takes


def case(name, N, C, dtype=torch.float64):
    f, true, rows, vectors = FORMS[name]
    return f, true, [*(normal(N, C, dtype=dtype, seed=i) + 0.3 for i in range(rows)),
                     *(normal(C, dtype=dtype, seed=i) for i in range(vectors))]


@pytest.mark.parametrize("C", SIZES)
@pytest.mark.parametrize("name", FORMS)
def test_it_is_the_definition_and_so_are_the_gradients(name, C):
    for N in (1, 129):
        f, true, args = case(name, N, C)
        close(f, true, *args)


@pytest.mark.parametrize("name", FORMS)
def test_more_rows_than_one_round_of_the_programs(name, monkeypatch):
    """Three programs walk over eleven tiles, the last one a part: every row counts once in the gradients of w and b."""
    monkeypatch.setattr(kernels.norm, "PROGRAMS", 3)
    monkeypatch.setattr(kernels.norm, "TILE", 64)
    f, true, args = case(name, 43, 15)
    close(f, true, *args)
    assert PROGRAMS > 3 and TILE > 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", FORMS)
def test_low_precision_errs_little_more_than_torch_does(name, dtype):
    f, true, args = case(name, 97, 129, dtype)
    assert within_budget(f, true, *args)


@pytest.mark.parametrize("broken", ["mean over the tile", "no eps", "no mean taken out", "weight first"])
def test_a_kernel_that_is_wrong_would_be_seen(broken):
    """The same budgets refuse an RMSNorm with the mistakes that are easy to make; `weight first` rounds once less, so
    it is refused by the bits of the published order, not by its error."""
    _, true, (x, w) = case("rms", 97, 129, torch.float16)
    x = x / 16                                                              # so that EPS is a fourth of the mean square
    assert within_budget(rms, true, x, w)

    def wrong(x, w):
        wide = x if x.dtype == torch.float64 else x.float()
        s = wide.square().sum(-1, keepdim=True) / (256 if broken == "mean over the tile" else 129)
        r = torch.rsqrt(s + (0 if broken == "no eps" else EPS))
        r = r.detach() if broken == "no mean taken out" else r
        return (wide * r * w).to(x.dtype) if broken == "weight first" else (wide * r).to(x.dtype) * w
    if broken == "weight first":
        ours, theirs = ((f(x, w) != true(x, w)).double().mean() for f in (rms, wrong))
        assert ours < 0.01 and theirs > 0.1                                 # rsqrt may differ in its last bit
    else:
        assert not within_budget(wrong, true, x, w)


@pytest.mark.parametrize("name", FORMS)
def test_strides_and_leading_dimensions_do_not_matter(name):
    f, true, args = case(name, 24, 17)
    up = [odd(normal(24, 17, seed=3)) for _ in range(1 + ("add" in name))]
    assert not up[0].is_contiguous()
    close(f, true, *(odd(t) for t in args), up=up)
    close(f, true, *(t.view(2, 12, 17).transpose(0, 1) if t.dim() > 1 else t for t in args))


@pytest.mark.parametrize("name", FORMS)
def test_no_rows_give_no_rows_and_gradients_of_zero(name):
    f, true, args = case(name, 0, 17)
    close(f, true, *args)


@pytest.mark.parametrize("name", FORMS)
def test_it_passes_a_finite_difference_check(name):
    f, _, args = case(name, 3, 5)
    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in args])


def test_what_is_frozen_gets_no_gradient_and_changes_no_other():
    for name in FORMS:
        f, _, args = case(name, 17, 15)
        whole = with_gradients(f, *args)[-len(args):]
        for i in range(len(args)):
            leaves = [t.clone().requires_grad_(j != i) for j, t in enumerate(args)]
            out = f(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(out, [normal(*o.shape, seed=7) for o in out])
            assert leaves[i].grad is None
            assert all(torch.equal(t.grad, g) for j, (t, g) in enumerate(zip(leaves, whole)) if j != i)


def test_one_of_two_results_may_go_unused():
    _, _, (x, add, w) = case("rms add", 5, 15)
    for pick in (0, 1):
        ours, theirs = (lambda *a, f=f: f(*a)[pick] + 0 * a[2].sum() for f in (rms_add, rms_add_true))
        close(ours, theirs, x, add, w)


def test_the_same_gradients_every_time_and_weights_of_another_dtype():
    f, true, args = case("rms", 129, 97, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(f, *args), with_gradients(f, *args)))
    x, w = args[0].half(), args[1]                                          # a weight in fp32, as under autocast
    y, dx, dw = with_gradients(f, x, w)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.float16, torch.float16, torch.float32)
    up = normal(129, 97, dtype=torch.float16)                               # sums over rows are not kept in fp16
    dw, exact = with_gradients(f, x, w, up=[up])[2], with_gradients(true, x.double(), w.double(), up=[up.double()])[2]
    assert (dw - exact).norm() < 1e-5 * exact.norm()
    s, y = rms_norm(x, w, EPS, args[0])                                     # the sum of two dtypes is the wider one
    assert s.dtype == y.dtype == torch.float32 and torch.equal(s, x + args[0])


@pytest.mark.parametrize("name", FORMS)
def test_opcheck(name):
    _, _, args = case(name, 5, 15, torch.float32)
    args = [t.requires_grad_() for t in args]
    x, add, (w, b) = args[0], args[1] if "add" in name else None, (args[-2:] if "layer" in name else (args[-1], None))
    torch.library.opcheck(norm_op, (x, add, w, b, EPS))
    x, w, layer = x.detach(), w.detach(), b is not None
    for needed in (True, False):
        torch.library.opcheck(norm_backward_op, (x, w, x, None if add is None else x, EPS, layer, needed,
                                                 needed and layer))


@pytest.mark.parametrize("name", FORMS)
def test_it_compiles_as_one_graph(name):
    f, _, args = case(name, 17, 15, torch.float32)
    whole = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(whole, *args), with_gradients(f, *args)))


def test_the_model_with_all_its_kernels_is_the_model_without(monkeypatch):
    """Loss and gradients of a VLM in float64: everything that model.py calls has the shape that the kernels take."""
    from conftest import example

    from data import pack
    batch, got = pack([example(1), example(2, text=17, learnt=9), example(3, images=0)], 8), {}
    for choice in ("torch", "triton"):
        monkeypatch.setattr(kernels, "choice", choice)
        model = tiny_vlm(qk_norm=True)
        loss = model(*batch)
        loss.backward()
        got[choice] = [loss.detach(), *(p.grad for p in model.parameters())]
    for a, b in zip(got["torch"], got["triton"]):  # the angles are fp32, and only theirs are cast before the product
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
