"""RMSNorm and LayerNorm: the definition's own Function here, the kernels interpreted and compiled."""

import pytest
import torch
from compile_check import ARCHS, compile_for, fits
from interpret import interpret
from kernel_cases import SIZES, close, normal, saved, with_gradients

import kernels.norm
from kernels.norm import layer_norm, layer_norm_ref, norm_backward, norm_forward, rms_norm, rms_norm_ref

EPS = 1e-3


def test_the_kernels_interpreted():
    interpret("norm")


@pytest.mark.parametrize("C", SIZES)
@pytest.mark.parametrize("shape", [(1,), (17,), (4, 5)])
def test_the_function_is_the_definition_and_so_are_its_gradients(shape, C):
    x, add, w, b = normal(*shape, C), normal(*shape, C, seed=1), normal(C), normal(C, seed=1)
    close(lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm_ref(x, w, EPS), x, w)
    close(lambda x, a, w: rms_norm(x, w, EPS, a), lambda x, a, w: (x + a, rms_norm_ref(x + a, w, EPS)), x, add, w)
    close(lambda x, a, w, b: layer_norm(x, w, b, EPS, a),
          lambda x, a, w, b: (x + a, layer_norm_ref(x + a, w.shape, w, b, EPS)), x, add, w, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_gives_the_bits_of_the_definition_and_no_larger_errors(dtype):
    x, w = normal(97, 129, dtype=dtype), normal(129, dtype=dtype)
    ours, theirs, true = (with_gradients(f, *args) for f, args in (
        (lambda x, w: rms_norm(x, w, EPS), (x, w)), (lambda x, w: rms_norm_ref(x, w, EPS), (x, w)),
        (lambda x, w: rms_norm_ref(x, w, EPS), (x.double(), w.double()))))
    assert torch.equal(ours[0], theirs[0])
    for a, b, t in zip(ours[1:], theirs[1:], true[1:]):
        assert a.dtype == dtype and (a - t).square().mean() <= 1.25**2 * (b - t).square().mean()


def test_it_passes_a_finite_difference_check():
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (normal(3, 5).requires_grad_(),
                                                                      normal(5).requires_grad_()))


def test_it_keeps_its_input_and_one_number_per_row():
    x, w = normal(50, 64, dtype=torch.float32), normal(64, dtype=torch.float32)
    assert saved(lambda x, w: rms_norm(x, w, EPS), x, w) == 50 * 4
    assert saved(lambda x, w: rms_norm_ref(x, w, EPS), x, w) >= x.nbytes   # what the same check says of the definition


def test_a_frozen_side_gets_no_gradient():
    x, w = normal(5, 7), normal(7)
    rms_norm(x, w.requires_grad_(), EPS).sum().backward()
    assert x.grad is None and w.grad is not None
    x, w = x.requires_grad_(), w.detach()
    rms_norm(x, w, EPS).sum().backward()
    assert x.grad is not None and w.grad is None


def test_it_compiles_as_one_graph_and_is_recomputed():
    from torch.utils.checkpoint import checkpoint
    f = lambda x, w: rms_norm(x, w, EPS)  # noqa: E731
    args = normal(17, 15), normal(15)
    close(torch.compile(f, fullgraph=True, backend="aot_eager"), f, *args)
    close(lambda *a: checkpoint(f, *a, use_reentrant=False), f, *args)


WIDTHS = {"*bf16": (1, 72, 128, 1152, 4096, 8192), "*fp32": (4096, 8192)}  # one number, heads, a ViT, 7B, 70B


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", WIDTHS)
def test_the_kernels_fit_every_card(arch, dtype):
    """At every width, with everything switched on: no spills. Wide loads, and in the backward pass the next tile on its
    way (LDGSTS) while this one is worked on, at the widths of models."""
    for C in WIDTHS[dtype]:
        tile, how, stages = kernels.norm.tiles(C, {"*bf16": 2, "*fp32": 4}[dtype])
        found = compile_for(norm_forward, dict.fromkeys("XHWBSY", dtype) | {"N": "i32"}, {"C": C, "eps": EPS, **tile},
                            arch, **how, unaligned=["N"])
        fits(found)
        assert found["wide"] or C % 8
        found = compile_for(norm_backward, dict.fromkeys(("X", "W", "DY", "DS", "DX"), dtype) |
                            {"DW": "*fp32", "DB": "*fp32", "N": "i32"},
                            {"C": C, "eps": EPS, "LAYER": True, "STAGES": stages, **tile}, arch, **how, unaligned=["N"])
        fits(found)
        assert (found["wide"] and (found["LDGSTS"] or stages == 1)) or C % 8


def test_a_tile_that_is_too_large_would_be_seen(monkeypatch):
    """Four times the numbers per thread spill; the checks above would fail."""
    found = compile_for(norm_backward, dict.fromkeys(("X", "W", "DY", "DS", "DX"), "*bf16") |
                        {"DW": "*fp32", "DB": "*fp32", "N": "i32"},
                        {"C": 4096, "eps": EPS, "LAYER": True, "STAGES": 2, "ROWS": 2, "BLOCK": 4096}, 90, 4)
    with pytest.raises(AssertionError, match="spills"):
        fits(found)
