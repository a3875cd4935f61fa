"""Trained linear layers whose backward adds to .grad: the gradients are those of autograd, and no rounded copy is kept.

    N tokens   C input width   O output width
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import example, tiny_vlm
from kernel_cases import TIGHT, NewTensors, normal, saved
from torch.utils.checkpoint import checkpoint

import engine
import kernels.linear as module
import lora
from data import pack
from kernels.linear import TrainedLinear, add_into_grad, add_product
from loss import supervised, token_loss

CPU = engine.World(0, 1, torch.device("cpu"), torch.float64)


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    """Uninitialised memory holds NaN, which the first product must not read."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def layer(C=24, O=16, bias=True, dtype=torch.float64, into_grad=True):
    torch.manual_seed(0)
    found = torch.nn.Sequential(torch.nn.Linear(C, O, bias=bias, dtype=dtype))
    if into_grad:
        add_into_grad(found)
    return found[0]


def gradients(f, call=lambda f, x: f(x), shapes=((17, 24), (0, 24), (2, 5, 24)), needs=True, dtype=torch.float64):
    """Three micro-batches -> gradients of the weights of f, after the last, and of each x. dtype: of x; the incoming
    gradients are rounded to it"""
    found = []
    for i, shape in enumerate(shapes):
        x = normal(*shape, seed=i).to(dtype).requires_grad_(needs)
        y = call(f, x)
        y.backward(normal(*y.shape, seed=9 + i).to(dtype).to(y.dtype))
        found += [x.grad] * needs
    return [p.grad for p in f.parameters()] + found


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs", [True, False])
def test_micro_batches_add_as_autograd_does(bias, needs):
    """With leading dimensions and without rows, too"""
    f = layer(bias=bias)
    assert type(f) is TrainedLinear
    ours = gradients(f, needs=needs)
    same(ours, gradients(layer(bias=bias, into_grad=False), needs=needs))
    assert ours[0].any() and ours[0].dtype == f.weight.dtype


def test_an_input_without_gradient_costs_no_product(monkeypatch):
    """Forward and backward cast W once each; without a gradient of x, only forward does."""
    dense, calls = module.dense, []
    monkeypatch.setattr(module, "dense", lambda *a: calls.append(a) or dense(*a))
    for needs, casts in ((True, 2), (False, 1)):
        gradients(layer(), shapes=[(3, 24)], needs=needs)
        assert len(calls) == casts and not calls.clear()


def test_without_rows_the_gradient_is_zero():
    f = layer()
    f(torch.zeros(0, 24, dtype=torch.float64)).sum().backward()
    assert f.weight.grad.shape == (16, 24) and not f.weight.grad.any()         # not None, and not NaN


def test_a_weight_may_have_several_uses():
    """Twice in the layer, once in a layer that shares it, once by autograd"""
    def call(f, x):
        other = copy.copy(f)                                                    # another layer, the same parameters
        y = F.linear(f(torch.relu(f(x))), f.weight, f.bias)
        return other(y) + f(x)
    same(*(gradients(layer(16, 16, into_grad=on), call, ((7, 16), (3, 16))) for on in (True, False)))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_part_frozen_later_gets_no_gradient(frozen):
    """Else the norm of all gradients, by which they are clipped, would count it."""
    found = []
    for on in (True, False):
        f = layer(into_grad=on)
        getattr(f, frozen).requires_grad_(False)
        found.append(gradients(f))
    assert [g is None for g in found[0][:2]] == [frozen == "weight", frozen == "bias"]
    same(*([g for g in some if g is not None] for some in found))


def test_recomputed_layers_add_once():
    def call(f, x):
        return checkpoint(f, torch.relu(x), use_reentrant=False)
    same(*(gradients(layer(into_grad=on), call) for on in (True, False)))


def step(model, lrs, world, grad_clip=1.0, check=True):
    """Three micro-batches -> gradients by name, what engine.update returns, the weights after it"""
    optimizer = engine.adamw(model, lrs, 0.1)
    micro = [pack([example(i), example(i + 9, images=0)], 8) for i in range(3)]
    n, total = sum(supervised(b.labels) for b in micro), 0.0
    for b in micro:
        loss = token_loss(model, b)
        (loss / n).backward()
        total += loss.detach()
    if check:
        engine.check_gradients(model)
    found = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return found, engine.update(model, optimizer, total, n, world, grad_clip), model.state_dict()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_step_of_the_model_is_the_same(tied, recompute):
    """Gradients, norm, clipped update. A second step finds no gradient, as after a skipped one."""
    found = []
    for on in (True, False):
        model = tiny_vlm(tie_word_embeddings=tied)
        lrs = engine.choose(model, {"multi_modal_projector.*": 1e-3, "language_model.*": 1e-3}, torch.float64)
        engine.parallelize(model, CPU, model.blocks, recompute=recompute)
        if on:
            add_into_grad(model)
            assert sum(type(m) is TrainedLinear for m in model.modules()) == 2 + 2 * 7 + (not tied)
        found.append([*step(model, lrs, CPU), *step(model, lrs, CPU, 0.0)])
        assert all(p.grad is None for p in model.parameters())
    for a, b in zip(*found):
        assert a.keys() == b.keys()
        same([torch.as_tensor(x) for x in a.values()], [torch.as_tensor(x) for x in b.values()])


@pytest.mark.parametrize("bits", [16, 4])
def test_frozen_layers_and_adapters_stay_as_they_are(bits):
    def made(on):
        model = tiny_vlm()
        if bits == 4:
            lora.quantize_base(model)
        lora.add_adapters(model, 4, 8, 0.0, "all-linear")
        lrs = engine.choose(model, {"multi_modal_projector.*": 1e-3, "*.lora_*": 1e-3}, torch.float64)
        if on:
            add_into_grad(model)
        return model, lrs
    model, lrs = made(True)
    kinds = {type(m) for m in model.language_model.model.layers.modules() if isinstance(m, torch.nn.Linear)}
    assert lora.LoRALinear in kinds and type(model.multi_modal_projector.linear_1) is TrainedLinear
    assert all(type(m) is torch.nn.Linear for m in model.vision_tower.modules() if isinstance(m, torch.nn.Linear))
    ours, theirs = step(model, lrs, CPU)[0], step(*made(False), CPU)[0]
    assert ours.keys() == theirs.keys() == lrs.keys()
    same(ours.values(), theirs.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision_err_less(dtype):
    """fp32 weights under autocast, three micro-batches: autograd rounds each gradient of W and b, then adds."""
    def call(f, x):
        with torch.autocast("cpu", dtype):
            return f(x)
    shapes = [(300, 24)] * 3
    wide = [call(layer(dtype=torch.float32), torch.zeros(1, 24)).dtype, *(
        g.dtype for g in gradients(layer(dtype=torch.float32), call, shapes, dtype=torch.float32))]
    assert wide == [dtype] + [torch.float32] * 5
    low = layer(dtype=torch.float32)                                            # weights that rounding does not change
    low.weight.data, low.bias.data = (p.to(dtype).float() for p in (low.weight.data, low.bias.data))
    ours, theirs = copy.deepcopy(low), copy.deepcopy(low)
    theirs.__class__ = torch.nn.Linear
    true = copy.deepcopy(theirs).double()
    ours, theirs = (gradients(f, call, shapes, dtype=dtype) for f in (ours, theirs))
    true = gradients(true, lambda f, x: f(x.double()), shapes, dtype=dtype)
    assert all(map(torch.equal, ours[2:], theirs[2:]))                          # the gradients of x: the same products
    for a, b, t in zip(ours[:2], theirs[:2], true[:2]):
        assert (a.double() - t).norm() < (b.double() - t).norm() / 100


def test_no_weight_is_kept_in_half_precision():
    def bytes_kept(f):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return f(x)
        return saved(call, normal(5, 24, dtype=torch.bfloat16))
    parameters = sum(p.nbytes for p in layer(dtype=torch.float32).parameters())
    assert bytes_kept(layer(dtype=torch.float32)) == 0
    assert 0 < bytes_kept(layer(dtype=torch.float32, into_grad=False)) < parameters


def test_answers_cast_a_weight_once():
    """Without gradients, autocast keeps the cast weight for the next token; the outputs are those of training."""
    f, x = layer(128, 64, dtype=torch.float32), normal(3, 128, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        trained = f(x)
        with torch.no_grad(), NewTensors() as new:
            answers = [f(x) for _ in range(4)]
    assert new.bytes.count(64 * 128 * 2) == 1 and all(torch.equal(y, trained) for y in answers)


# ---- the product that adds ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("M, K, N", [(2500, 3, 5), (4, 0, 5), (1, 7, 1)])
def test_the_product_adds_in_the_wider_dtype(M, K, N, beta):
    """In bf16, fp16: no product is rounded, however the rows are divided. With beta = 0 the sum is not read."""
    for low in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (normal(*shape, dtype=low) for shape in ((K, M), (K, N)))
        total = normal(M, N, dtype=torch.float32) if beta else torch.full((M, N), torch.nan)
        true = a.double().T @ b.double() + (total.double() if beta else 0)
        at = total.data_ptr()
        add_product(total, a.T, b, beta)
        assert total.data_ptr() == at
        torch.testing.assert_close(total.double(), true, rtol=1e-5, atol=1e-5)


def test_a_cpu_converts_few_rows_at_a_time():
    """a (16,384, 8) is 512 KiB in fp32, the product 1 MiB"""
    a, b, total = torch.ones(8, 2**14).bfloat16(), torch.ones(8, 16).bfloat16(), torch.zeros(2**14, 16)
    with NewTensors() as new:
        add_product(total, a.T, b)
    assert (total == 8).all() and max(new.bytes) == module.ROWS * 8 * 4


class OnAGPU(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0, 1])
def test_a_gpu_adds_in_one_call(dtype, beta, monkeypatch):
    """A CPU does not have this operator, but its signature is the same on all devices."""
    calls = []

    def product(total, a, b, beta, out_dtype, out):
        meta = [t.as_subclass(torch.Tensor).to("meta") for t in (total, a, b, out)]
        torch.addmm(*meta[:3], beta=beta, out_dtype=out_dtype, out=meta[3])
        calls.append((total is out, out_dtype, beta, a.shape, b.shape))
    fake = type("torch", (), {"__getattr__": lambda _, name: product if name == "addmm" else getattr(torch, name)})()
    monkeypatch.setattr(module, "torch", fake)
    a, b = torch.ones(3, 2000, dtype=dtype).as_subclass(OnAGPU), torch.ones(3, 5, dtype=dtype)
    add_product(torch.zeros(2000, 5), a.T, b, beta)
    assert calls == [(True, torch.float32, beta, (2000, 3), (3, 5))]
