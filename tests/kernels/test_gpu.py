"""The Triton kernels on a GPU: bf16, fp16 and fp32 against float64, sizes of many tiles, the same bits 250 times,
tensors of more than 2**31 elements, no host-device sync. All other tests run without a GPU. Without one, these run
interpreted and small in tests/kernels/interpreted/gpu.py, so that they themselves are correct."""

import fcntl
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import example, tiny_config
from kernel_cases import check_error, normal, with_gradients
from span_cases import CASES, documents, images

import kernels
from kernels import nf4
from kernels.attention import attention, attention_ref
from kernels.cross_entropy import IGNORE, linear_cross_entropy, linear_cross_entropy_ref
from kernels.norm import layer_norm, layer_norm_ref, rms_norm, rms_norm_ref
from kernels.rope import rope_qk, rope_ref
from kernels.swiglu import swiglu, swiglu_ref

DEVICE = "cuda"
LOW = [torch.bfloat16, torch.float16, torch.float32]
REPEATS, BEYOND, HEADS, VOCABULARY = 250, 2**31, 32, 128256
LONG = {"packed": documents(700, 1, 129, 1170), "images": images(577, 577, 577), "one": documents(2048)}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.fixture(autouse=True)
def full_precision_products():
    """The plain-torch definitions must not use TF32 (10 bits) or reduce in half precision."""
    how = torch.backends.cuda.matmul
    names = "allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"
    before = [getattr(how, name) for name in names]
    for name in names:
        setattr(how, name, False)
    yield
    for name, value in zip(names, before):
        setattr(how, name, value)


def data(*shape, dtype, seed=0):
    return normal(*shape, dtype=dtype, seed=seed).to(DEVICE)


def on(*tensors):
    return [t.to(DEVICE) for t in tensors]


def check(f, g, *args):
    """Outputs and gradients of f within the error budget of kernel_cases; g: the definition. A sum has at most as many
    terms as the longest dimension of a tensor; inputs count as values that occur on the way."""
    assert kernels.use_triton(args[0])
    wide = [t.double() if t.is_floating_point() else t for t in args]
    largest = max(t.abs().max().item() for t in wide if t.numel() and t.is_floating_point())
    terms = max(n for t in args for n in t.shape) if args[0].dtype == torch.float32 else 1
    for results in zip(with_gradients(f, *args), with_gradients(g, *args), with_gradients(g, *wide), strict=True):
        check_error(*results, terms, largest)


def attend(spans):
    lo, hi = on(*spans)
    return lambda q, k, v: attention(q, k, v, lo, hi), lambda q, k, v: attention_ref(q, k, v, lo, hi)


def heads(spans, M, H, G, K, dtype):
    return [data(n, h, K, dtype=dtype, seed=i) for i, (n, h) in enumerate(((len(spans[0]), H), (M, G), (M, G)))]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", CASES)
def test_attention_with_every_mask(name, dtype):
    spans, M = CASES[name]
    check(*attend(spans), *heads(spans, M, 4, 2, 64, dtype))


@pytest.mark.parametrize("K, dtype", [*((K, torch.bfloat16) for K in (32, 64, 72, 80, 96, 128)),
                                      *((K, dtype) for K in (64, 128) for dtype in LOW[1:])])
@pytest.mark.parametrize("name", LONG)
def test_attention_over_many_tiles(name, K, dtype):
    spans = LONG[name]
    check(*attend(spans), *heads(spans, len(spans[0]), 4, 2, K, dtype))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("R, C, V", [(1, 64, 500), (97, 129, 32003), (300, 256, 128256)])
def test_cross_entropy(R, C, V, dtype):
    y = torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(0))
    y = y.masked_fill(torch.arange(R) % 5 == 3, IGNORE).to(DEVICE)
    check(lambda h, w: linear_cross_entropy(h, w, y, chunk=128), lambda h, w: linear_cross_entropy_ref(h, w, y),
          data(R, C, dtype=dtype), data(V, C, dtype=dtype, seed=1) * C**-0.5)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("N, C", [(1, 15), (129, 129), (1000, 960), (700, 4096), (65, 5120)])
def test_norms(N, C, dtype):
    x, add, w, b = (data(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((N, C), (N, C), (C,), (C,))))
    check(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_ref(x, w, 1e-5), x, w)
    check(lambda x, w, b: layer_norm(x, w, b, 1e-5), lambda x, w, b: layer_norm_ref(x, (C,), w, b, 1e-5), x, w, b)
    check(lambda x, a, w: rms_norm(x, w, 1e-5, a), lambda x, a, w: (x + a, rms_norm_ref(x + a, w, 1e-5)), x, add, w)
    check(lambda x, a, w, b: layer_norm(x, w, b, 1e-5, a),
          lambda x, a, w, b: (x + a, layer_norm_ref(x + a, (C,), w, b, 1e-5)), x, add, w, b)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("N, H, G, K", [(1, 1, 1, 32), (97, 15, 5, 64), (300, 32, 8, 128)])
def test_rope(N, H, G, K, dtype):
    angles = 10 * data(N, K // 2, dtype=torch.float32)
    cos, sin, rows = angles.cos(), angles.sin(), torch.arange(0, N, 3, device=DEVICE)
    check(lambda q, k: rope_qk(q, k, cos, sin, rows),
          lambda q, k: (rope_ref(q, cos[rows], sin[rows]), rope_ref(k, cos, sin)),
          data(len(rows), H, K, dtype=dtype), data(N, G, K, dtype=dtype, seed=1))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(1, 2), (97, 130), (4096, 4096)])
def test_nf4(shape, dtype):
    parts = nf4.quantize(data(*shape, dtype=torch.float32))
    assert torch.equal(nf4.dequantize(*parts, dtype), nf4.dequantize_ref(*parts, dtype))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("N, C", [(1, 1), (97, 129), (500, 11008)])
def test_swiglu(N, C, dtype):
    check(swiglu, swiglu_ref, data(N, C, dtype=dtype), data(N, C, dtype=dtype, seed=1))


def everything(dtype=torch.bfloat16, N=2000, V=8000):
    """-> {name: function without arguments -> outputs and gradients}, each kernel at a size that fills the GPU"""
    spans = on(*documents(N // 3, N // 7, N - N // 3 - N // 7))
    q, k, v = (data(N, h, 128, dtype=dtype, seed=h) for h in (8, 2, 2))
    h, w = data(N, 256, dtype=dtype), data(V, 256, dtype=dtype, seed=1)
    y, c = torch.arange(N, device=DEVICE), data(256, dtype=dtype, seed=2)
    ups = {name: [data(*shape, dtype=dtype, seed=9)] for name, shape in
           (("attention", q.shape), ("norm", h.shape), ("swiglu", h.shape))}
    ups["norm"] = 2 * ups["norm"]
    angles, at, parts = 10 * data(N, 64, dtype=torch.float32), torch.arange(N, device=DEVICE)[::2], nf4.quantize(w)
    cos, sin = angles.cos(), angles.sin()
    ups["cross-entropy"] = [torch.ones((), device=DEVICE)]
    return {"attention": lambda: with_gradients(lambda *t: attention(*t, *spans), q, k, v, up=ups["attention"]),
            "cross-entropy": lambda: with_gradients(lambda h, w: linear_cross_entropy(h, w, y, chunk=512), h, w,
                                                    up=ups["cross-entropy"]),
            "norm": lambda: with_gradients(lambda x, c: rms_norm(x, c, 1e-5, h), h, c, up=ups["norm"]),
            "swiglu": lambda: with_gradients(swiglu, h, h + 1, up=ups["swiglu"]),
            "rope": lambda: with_gradients(lambda q, k: rope_qk(q, k, cos, sin, at), q[::2], k, up=[q[::2], k]),
            "nf4": lambda: [nf4.dequantize(*parts, dtype)]}


NAMES = ["attention", "cross-entropy", "norm", "swiglu", "rope", "nf4"]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_every_time(name):
    f = everything()[name]
    first = f()
    for n in range(REPEATS):
        for a, b in zip(first, f()):
            assert torch.equal(a, b), f"run {n + 2} differs from the first"


@pytest.mark.parametrize("name", NAMES)
def test_no_kernel_causes_a_sync(name):
    f = everything()[name]
    f()                                                             # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        f()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def room():
    """Memory for the largest tests: nine tensors of 4 GiB. A file lock runs them one at a time across processes."""
    with open(Path(tempfile.gettempdir()) / "pumice_largest_tests", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if torch.cuda.mem_get_info()[0] < 60 << 30:
            pytest.skip("less than 60 GiB free on this GPU")
        yield
        torch.cuda.empty_cache()


def flat(*shape):
    return torch.randn(shape, device=DEVICE, dtype=torch.float16)


def test_attention_beyond_31_bits(room):
    """q has more than 2**31 elements; the last document gets the same result as alone."""
    n, H, K = 128, HEADS, 128
    docs = BEYOND // (n * H * K) + 2
    lo, hi = on(*documents(*[n] * docs))
    q, k, v, up = (flat(docs * n, h, K) for h in (H, H, 1, H))
    v = v.expand(-1, H, -1)                                         # a stride of 0: copied for the kernel
    whole = with_gradients(lambda *t: attention(*t, lo, hi), q, k, v, up=[up])
    alone = with_gradients(lambda *t: attention(*t, lo[:n], hi[:n]), *(t[-n:] for t in (q, k, v)), up=[up[-n:]])
    for a, b in zip(whole, alone):                                  # other tiles add in another order
        torch.testing.assert_close(a[-n:], b, rtol=2e-2, atol=2e-3)


def test_cross_entropy_beyond_31_bits(room):
    V, C = VOCABULARY, 64
    R = BEYOND // V + 40
    h, w, y = flat(R, C), flat(V, C) / 8, torch.arange(R, device=DEVICE)
    whole = with_gradients(lambda h: linear_cross_entropy(h, w, y, chunk=R), h)[1]
    alone = with_gradients(lambda h: linear_cross_entropy(h, w, y[-40:], chunk=40), h[-40:])[1]
    torch.testing.assert_close(whole[-40:], alone, rtol=2e-2, atol=2e-3)   # so does cuBLAS


def test_elementwise_beyond_31_bits(room):
    C = 4096
    N = BEYOND // C + 3
    x, up, w = flat(N, C), flat(N, C), flat(C)
    for f in (lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: layer_norm(x, w, w, 1e-5)):
        whole, alone = (with_gradients(f, t, w, up=[u])[:2] for t, u in ((x, up), (x[-3:], up[-3:])))
        for a, b in zip(whole, alone):
            assert torch.equal(a[-3:], b)
        del whole
    whole, alone = (with_gradients(swiglu, t, u, up=[u])[:2] for t, u in ((x, up), (x[-3:], up[-3:])))
    for a, b in zip(whole, alone):
        assert torch.equal(a[-3:], b)
    del whole
    q, dq = (t.view(N, HEADS, -1) for t in (x, up))
    angles = torch.arange(N, device=DEVICE)[:, None] / torch.arange(1, q.shape[2] // 2 + 1, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    whole, alone = (with_gradients(lambda q, k: rope_qk(q, k, cos[at], sin[at]), q[at], q[at, :1],
                                   up=[dq[at], dq[at, :1]]) for at in (slice(None), slice(-3, None)))
    for a, b in zip(whole, alone):
        assert torch.equal(a[-3:], b)


def test_a_batch_without_images_or_labels():
    """The model on the GPU with no placeholder, and with no supervised row"""
    from data import pack
    from model import VLM
    from parts.init import init_weights
    model = VLM(tiny_config(head_dim=32))
    init_weights(model)
    model.to(DEVICE)
    for made in ([example(3, images=0)], [example(1, 9, 0)]):
        loss = model(*pack(made, 8).to(DEVICE))
        loss.backward()
        assert loss.isfinite() and (loss == 0) == (made[0][2].shape[0] > 0)


@pytest.mark.parametrize("dtype", LOW)
def test_a_whole_model_equals_plain_torch(dtype, monkeypatch):
    from data import pack
    from loss import token_loss
    from model import VLM
    from parts.init import init_weights
    model = VLM(tiny_config(head_dim=32, qk_norm=True))
    init_weights(model)
    model, batch = model.to(DEVICE, dtype), pack([example(1), example(2, images=0)], 8).to(DEVICE)
    got = []
    for which in ("triton", "torch"):
        monkeypatch.setattr(kernels, "choice", which)
        loss = token_loss(model, batch)
        got.append([loss.detach(), *torch.autograd.grad(loss, [*model.parameters()])])
    eps = torch.finfo(dtype).eps
    for a, b in zip(*got):
        assert (a - b).double().norm() <= 30 * eps * (b.double().norm() + eps)  # some tens of roundings
