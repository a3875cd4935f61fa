"""What all kernels have in common when they are launched, interpreted (tests/interpret.py)."""

import pytest
import torch
from kernel_cases import normal, with_gradients

import kernels
from kernels import nf4
from kernels.attention import attention
from kernels.cross_entropy import linear_cross_entropy, turn_triton
from kernels.norm import layer_norm, rms_norm
from kernels.rope import rope_qk
from kernels.swiglu import swiglu


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")


N, C = 5, 16
LO, HI = torch.zeros(N, dtype=torch.int32), torch.arange(1, N + 1, dtype=torch.int32)
COS, SIN = torch.ones(N, C // 2), torch.zeros(N, C // 2)
CALLS = {"attention": (lambda q, k: attention(q, k, k, LO, HI), (N, 2, C), (N, 1, C)),
         "cross-entropy": (lambda h, w: linear_cross_entropy(h, w, torch.arange(N)), (N, C), (7, C)),
         "RMSNorm": (lambda x, w: rms_norm(x, w, 1e-5), (N, C), (C,)),
         "LayerNorm": (lambda x, w: layer_norm(x, w, w, 1e-5, x), (N, C), (C,)),
         "rope": (lambda q, k: rope_qk(q, k, COS, SIN), (N, 2, C), (N, 1, C)),
         "swiglu": (swiglu, (N, C), (N, C))}


@pytest.mark.parametrize("name", CALLS)
def test_every_launch_is_on_the_device_of_its_tensors(name, monkeypatch):
    """Triton takes the current device. Forward and backward, each operator says which one it means."""
    f, *shapes = CALLS[name]
    asked, guard = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: asked.append(x) or guard(x))
    with_gradients(f, *(normal(*s, dtype=torch.float32, seed=i) for i, s in enumerate(shapes)))
    assert len(asked) == (1 if name == "cross-entropy" else 2) and all(torch.is_tensor(x) for x in asked)


def test_so_is_that_of_four_bits(monkeypatch):
    asked, guard = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: asked.append(x) or guard(x))
    parts = nf4.quantize(normal(4, 64))
    nf4.dequantize(*parts, torch.float32)
    assert asked == [parts[0]]


@pytest.mark.parametrize("f, shapes, says", [
    (lambda q, k, v: attention(q, k, v, LO, HI), [(N, 2, C), (N, 2, C), (N, 2, 8)], "v .5, 2, 8"),
    (lambda q, k: attention(q, k, k, LO, HI), [(N, 2, C), (N, 2, 8)], "q .5, 2, 16"),
    (lambda x, w: rms_norm(x, w, 1e-5), [(N, C), (C - 1,)], "weight .15,"),
    (lambda x, w, a: rms_norm(x, w, 1e-5, a), [(N, C), (C,), (1, C)], "add .1, 16"),
    (lambda x, w: layer_norm(x, w, w, 1e-5), [(N, C), (C + 1,)], "weight .17,"),
    (swiglu, [(N, C), (1, C)], "up .1, 16")])
def test_shapes_that_do_not_fit_are_named_and_not_read_beyond(f, shapes, says):
    with pytest.raises(AssertionError, match=says):
        f(*(torch.ones(s) for s in shapes))


def test_rows_may_have_a_stride():
    q, k, at = normal(3, 2, C), normal(N, 1, C), torch.tensor([0, 9, 2, 9, 4, 9])[::2]
    angles = normal(N, C // 2)
    ours, theirs = (with_gradients(lambda q, k: rope_qk(q, k, angles.cos(), angles.sin(), rows), q, k)
                    for rows in (at, at.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_heads_may_lie_further_apart_than_31_bits_count():
    """Head by head in memory, as a cache may have them: the third begins 2**31 numbers behind the first. Nothing but
    the pages that are touched is ever there."""
    far = torch.empty(2**31 + 2**16, dtype=torch.float16)
    q = far.as_strided((N, 3, C), (C, 2**30, 1))
    near = normal(N, 3, C, dtype=torch.float16)
    q.copy_(near)
    assert torch.equal(attention(q, q, q, LO, HI), attention(near, near, near, LO, HI))
    up = far.as_strided((N, 3, C), (C, 2**30, 1))
    for a, b in zip(with_gradients(lambda *t: attention(*t, LO, HI), q, q, q, up=[up]),
                    with_gradients(lambda *t: attention(*t, LO, HI), near, near, near, up=[near])):
        assert torch.equal(a, b)


@pytest.mark.parametrize("N, stride", [(17, 2**27), (257, 2**23)], ids=["within a tile", "from the first tile on"])
def test_so_may_rows(N, stride):
    """The last lies 2**31 numbers behind the first, which is more than int32 counts."""
    far = torch.empty(2**31 + 2**16, dtype=torch.float16).as_strided((N, 2, C), (stride, C, 1))
    near, spans = normal(N, 2, C, dtype=torch.float16), (torch.zeros(N).int(), torch.full((N,), N).int())
    far.copy_(near)
    for a, b in zip(*(with_gradients(lambda *x: attention(*x, *spans), t, t, t, up=[t]) for t in (far, near))):
        assert torch.equal(a, b)


def test_so_may_rows_of_logits():
    far = torch.empty(2**31 + 2**16, dtype=torch.float16).as_strided((3, 200), (2**30, 1))
    near, labels = normal(3, 200, dtype=torch.float16), torch.tensor([5, -100, 199])
    far.copy_(near)
    for a, b in zip(turn_triton(far, labels, True), turn_triton(near, labels, True)):
        assert torch.equal(a, b)
