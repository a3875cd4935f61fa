"""What all kernels share when they are launched, interpreted (tests/interpret.py): device, shapes, large strides."""

import pytest
import torch
from kernel_cases import normal, with_gradients

import kernels
from kernels import nf4
from kernels.attention import attention
from kernels.cross_entropy import IGNORE, linear_cross_entropy, logits_to_gradient_triton
from kernels.norm import layer_norm, rms_norm
from kernels.rope import rope_qk
from kernels.swiglu import swiglu


@pytest.fixture(autouse=True)
def use_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")


N, C = 5, 16
LO, HI = torch.zeros(N, dtype=torch.int32), torch.arange(1, N + 1, dtype=torch.int32)
COS, SIN, ROWS = torch.ones(N, C // 2), torch.zeros(N, C // 2), torch.tensor([0, 2, 4])
CALLS = {"attention": (lambda q, k: attention(q, k, k, LO, HI), (N, 2, C), (N, 1, C)),
         "cross-entropy": (lambda h, w: linear_cross_entropy(h, w, torch.arange(N)), (N, C), (7, C)),
         "RMSNorm": (lambda x, w: rms_norm(x, w, 1e-5), (N, C), (C,)),
         "LayerNorm": (lambda x, w: layer_norm(x, w, w, 1e-5, x), (N, C), (C,)),
         "rope": (lambda q, k: rope_qk(q, k, COS, SIN, ROWS), (3, 2, C), (N, 1, C)),
         "swiglu": (swiglu, (N, C), (N, C))}


@pytest.mark.parametrize("name", CALLS)
def test_kernels_launch_on_their_tensors_device(name, monkeypatch):
    """Triton uses the current device, so each operator, forward and backward, sets it."""
    f, *shapes = CALLS[name]
    asked, guard = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: asked.append(x) or guard(x))
    with_gradients(f, *(normal(*s, dtype=torch.float32, seed=i) for i, s in enumerate(shapes)))
    assert len(asked) == (1 if name == "cross-entropy" else 2) and all(torch.is_tensor(x) for x in asked)


def test_nf4_launches_on_its_tensors_device(monkeypatch):
    asked, guard = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: asked.append(x) or guard(x))
    parts = nf4.quantize(normal(4, 64))
    nf4.dequantize(*parts, torch.float32)
    assert asked == [parts[0]]


def test_all_kernels_compile_as_one_graph():
    """And torch.compile computes the same bits."""
    args = [normal(*s, dtype=torch.float32, seed=i) for f, *shapes in CALLS.values() for i, s in enumerate(shapes)]

    def f(*args):
        out = [g(*args[2 * i : 2 * i + 2]) for i, (g, *_) in enumerate(CALLS.values())]
        return tuple(t for o in out for t in (o if isinstance(o, tuple) else (o,)))
    whole = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, *(with_gradients(g, *args) for g in (whole, f))))


@pytest.mark.parametrize("f, shapes, says", [
    (lambda q, k, v: attention(q, k, v, LO, HI), [(N, 2, C), (N, 2, C), (N, 2, 8)], "v .5, 2, 8"),
    (lambda q, k: attention(q, k, k, LO, HI), [(N, 2, C), (N, 2, 8)], "q .5, 2, 16"),
    (lambda x, w: rms_norm(x, w, 1e-5), [(N, C), (C - 1,)], "weight .15,"),
    (lambda x, w, a: rms_norm(x, w, 1e-5, a), [(N, C), (C,), (1, C)], "add .1, 16"),
    (lambda x, w: layer_norm(x, w, w, 1e-5), [(N, C), (C + 1,)], "weight .17,"),
    (swiglu, [(N, C), (1, C)], "up .1, 16")])
def test_wrong_shapes_are_refused(f, shapes, says):
    with pytest.raises(AssertionError, match=says):
        f(*(torch.ones(s) for s in shapes))


def test_the_index_of_rows_may_be_strided():
    q, k, at = normal(3, 2, C), normal(N, 1, C), torch.tensor([0, 9, 2, 9, 4, 9])[::2]
    angles = normal(N, C // 2)
    ours, theirs = (with_gradients(lambda q, k: rope_qk(q, k, angles.cos(), angles.sin(), rows), q, k)
                    for rows in (at, at.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_head_strides_may_exceed_31_bits():
    """Heads as the outer dimension in memory: the third starts 2**31 elements after the first. Only touched pages
    take memory."""
    far = torch.empty(2**31 + 2**16, dtype=torch.float16)
    q = far.as_strided((N, 3, C), (C, 2**30, 1))
    near = normal(N, 3, C, dtype=torch.float16)
    q.copy_(near)
    assert torch.equal(attention(q, q, q, LO, HI), attention(near, near, near, LO, HI))
    up = far.as_strided((N, 3, C), (C, 2**30, 1))
    for a, b in zip(with_gradients(lambda *t: attention(*t, LO, HI), q, q, q, up=[up]),
                    with_gradients(lambda *t: attention(*t, LO, HI), near, near, near, up=[near])):
        assert torch.equal(a, b)


@pytest.mark.parametrize("N, stride", [(17, 2**27), (257, 2**23)], ids=["within a tile", "across tiles"])
def test_row_strides_may_exceed_31_bits(N, stride):
    """The last row starts 2**31 elements after the first, which int32 cannot count."""
    far = torch.empty(2**31 + 2**16, dtype=torch.float16).as_strided((N, 1, C), (stride, C, 1))
    near, spans = normal(N, 1, C, dtype=torch.float16), (torch.zeros(N).int(), torch.full((N,), N).int())
    far.copy_(near)
    for a, b in zip(*(with_gradients(lambda *x: attention(*x, *spans), t, t, t, up=[t]) for t in (far, near))):
        assert torch.equal(a, b)


def test_logit_rows_may_exceed_31_bits():
    far = torch.empty(2**31 + 2**16, dtype=torch.float16).as_strided((3, 200), (2**30, 1))
    near, labels = normal(3, 200, dtype=torch.float16), torch.tensor([5, IGNORE, 199])
    far.copy_(near)
    for a, b in zip(*(logits_to_gradient_triton(t, labels, True) for t in (far, near))):
        assert torch.equal(a, b)
