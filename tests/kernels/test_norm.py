"""RMSNorm, LayerNorm: plain torch against the definition; the kernels compiled. tests/kernels/interpreted runs them."""

import pytest
import torch
from compile_check import assert_fits, compile_for
from interpret import variant
from kernel_cases import SIZES, check_error, close, normal, saved, with_gradients

from kernels import norm as module
from kernels.norm import layer_norm, layer_norm_ref, norm_backward, norm_forward, rms_norm, rms_norm_ref

EPS = 1e-3  # large enough that its absence is measured


@pytest.mark.parametrize("C", SIZES)
def test_function_and_gradients_equal_the_definition(C):
    for shape in ((17, C), (4, 5, C)):
        x, add, w, b = normal(*shape), normal(*shape, seed=1), normal(C), normal(C, seed=1)
        close(lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_ref(x, w, EPS), x, w)
        close(lambda x, a, w: rms_norm(x, w, EPS, a), lambda x, a, w: (x + a, rms_norm_ref(x + a, w, EPS)), x, add, w)
        close(lambda x, a, w, b: layer_norm(x, w, b, EPS, a),
              lambda x, a, w, b: (x + a, layer_norm_ref(x + a, w.shape, w, b, EPS)), x, add, w, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_has_the_bits_of_the_definition(dtype):
    x, w = normal(97, 129, dtype=dtype), normal(129, dtype=dtype)
    ours, theirs, true = (with_gradients(f, *args) for f, args in (
        (lambda x, w: rms_norm(x, w, EPS), (x, w)), (lambda x, w: rms_norm_ref(x, w, EPS), (x, w)),
        (lambda x, w: rms_norm_ref(x, w, EPS), (x.double(), w.double()))))
    with torch.no_grad():
        assert torch.equal(ours[0], theirs[0]) and torch.equal(rms_norm(x, w, EPS), theirs[0])
    for results in zip(ours[1:], theirs[1:], true[1:]):
        check_error(*results, terms=129)


@pytest.mark.parametrize("wrong", ["", ".bfloat16().float()"])
def test_the_weight_gradient_is_summed_in_fp32(wrong, tmp_path):
    """bf16 activations, against float64. 97 products, each rounded by at most 2^-24, twice: 2 sqrt(97) 2^-24 = 1.2e-6.
    Rounding each row's product to bf16 gives 2e-3. For a bf16 weight the sum is rounded once: only if the fp32 sum lies
    within its own error of the middle of two bf16 values (a share of 1.2e-6 / 2^-8) is it not the nearest one."""
    f = variant(module, "dw = (dy * xhat)", f"dw = (dy * xhat){wrong}", tmp_path).rms_norm
    x, up = (normal(97, 129, dtype=torch.bfloat16, seed=i) for i in range(2))
    for dtype in (torch.float32, torch.bfloat16):
        w = normal(129, dtype=dtype)
        dw = with_gradients(lambda x, w: f(x, w, EPS), x, w, up=[up])[2]
        true = with_gradients(lambda x, w: rms_norm_ref(x, w, EPS), x.double(), w.double(), up=[up.double()])[2]
        assert dw.dtype == dtype
        if dtype == torch.float32:
            assert ((dw - true).norm() < 2e-6 * true.norm()) == (not wrong)
        else:
            assert ((dw != true.bfloat16()).sum() <= 2) == (not wrong)


def test_gradients_equal_finite_differences():
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (normal(3, 5).requires_grad_(),
                                                                      normal(5).requires_grad_()))


def test_one_value_per_row_is_saved():
    x, w = normal(50, 64, dtype=torch.float32), normal(64, dtype=torch.float32)
    assert saved(lambda x, w: rms_norm(x, w, EPS), x, w) == 50 * 4
    assert saved(lambda x, w: rms_norm_ref(x, w, EPS), x, w) >= x.nbytes   # the definition alone saves more


def test_a_frozen_side_gets_no_gradient():
    x, w = normal(5, 7), normal(7)
    rms_norm(x, w.requires_grad_(), EPS).sum().backward()
    assert x.grad is None and w.grad is not None
    x, w = x.requires_grad_(), w.detach()
    rms_norm(x, w, EPS).sum().backward()
    assert x.grad is not None and w.grad is None


def test_it_compiles_and_can_be_recomputed():
    from torch.utils.checkpoint import checkpoint
    f = lambda x, w: rms_norm(x, w, EPS)  # noqa: E731
    args = normal(17, 15), normal(15)
    close(torch.compile(f, fullgraph=True, backend="aot_eager"), f, *args)
    close(lambda *a: checkpoint(f, *a, use_reentrant=False), f, *args)


NORM_BACKWARD = "X", "W", "DY", "DS", "DX"


@pytest.mark.parametrize("C, dtype, arch", [(4096, "*bf16", 90), (8192, "*fp32", 80), (4096, "*bf16", 100)])
def test_kernels_fit_every_gpu(C, dtype, arch):
    """With every option on: no spills, 16-byte loads, and in backward asynchronous loads (LDGSTS) of the next tile."""
    tile, how, stages = module.norm_tile(C, {"*bf16": 2, "*fp32": 4}[dtype])
    found = compile_for(norm_forward, dict.fromkeys(("X", "ADD", "W", "B", "S", "Y"), dtype) | {"N": "i32"},
                        {"C": C, "eps": EPS, **tile}, arch, **how, unaligned=["N"])
    assert_fits(found)
    assert found["wide"]
    found = compile_for(norm_backward, dict.fromkeys(NORM_BACKWARD, dtype) |
                        {"DW": "*fp32", "DB": "*fp32", "N": "i32"},
                        {"C": C, "eps": EPS, "LAYER": True, "STAGES": stages, **tile}, arch, **how, unaligned=["N"])
    assert_fits(found)
    assert found["wide"] and (found["LDGSTS"] or stages == 1)


def test_a_tile_that_is_too_large_spills():
    """Four times the elements per thread: the checks above fail."""
    found = compile_for(norm_backward, dict.fromkeys(NORM_BACKWARD, "*bf16") |
                        {"DW": "*fp32", "DB": "*fp32", "N": "i32"},
                        {"C": 4096, "eps": EPS, "LAYER": True, "STAGES": 2, "ROWS": 2, "BLOCK": 4096}, 90, 4)
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(found)
