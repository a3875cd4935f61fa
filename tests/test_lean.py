"""What a decoder layer keeps for its backward pass, byte by byte, and that its gradients are those of the naive one."""

import pytest
import torch
import torch.nn.functional as F
from conftest import example, tiny_vlm
from kernel_cases import normal
from torch.utils.checkpoint import checkpoint

import kernels.linear
import lora
import model
from kernels.norm import rms_norm_ref
from kernels.rope import rope_ref

TIGHT = 1e-12
N, R = 23, 7
H, G, K, C, M = 4, 2, 8, 32, 48      # conftest.tiny_config
KINDS = ["trained", "frozen", "adapters", "adapters with dropout", "q_proj alone", "biases"]


def layer(kind, dtype=torch.float64):
    m = tiny_vlm(dtype=dtype, num_hidden_layers=1, qkv_bias=kind == "biases", mlp_bias=kind == "biases").train()
    if kind.startswith("adapters"):
        lora.add_adapters(m, 2, 4, 0.5 if "dropout" in kind else 0.0, "all-linear")
        for n, p in m.named_parameters():
            p.requires_grad_("lora_" in n)
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.2)
        m.to(dtype)
    elif kind in ("frozen", "q_proj alone"):
        for n, p in m.named_parameters():
            p.requires_grad_("q_proj" in n and kind != "frozen")
    return m.language_model.model.layers[0]


def stream(dtype=torch.float64):
    angles = torch.arange(N)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    lo, hi = torch.zeros(N, dtype=torch.int32), torch.arange(1, N + 1, dtype=torch.int32)
    return normal(N, C, dtype=dtype), angles.cos().to(dtype), angles.sin().to(dtype), lo, hi


def gradients(f, block, args, rows):
    x = args[0].detach().requires_grad_()
    torch.manual_seed(5)                                                             # of dropout
    out = f(x, *args[1:], rows)
    wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad(out, wanted, normal(*out.shape, seed=3).to(out.dtype))]


def naive(block, kind):
    """The layer as a textbook writes it: nothing but matrices of the block is used, with autograd's own gradients."""
    a, m = block.self_attn, block.mlp

    def call(f, x):
        y = F.linear(x, f.weight, f.bias)
        return y + f.scale * (x @ f.lora_A.weight.T @ f.lora_B.weight.T) if hasattr(f, "lora_A") else y

    def forward(x, cos, sin, lo, hi, rows):
        y = rms_norm_ref(x, block.input_layernorm.weight, block.input_layernorm.eps)
        q, k, v = (call(f, y).unflatten(-1, (-1, K)) for f in (a.q_proj, a.k_proj, a.v_proj))
        q, k = rope_ref(q, cos, sin), rope_ref(k, cos, sin)
        k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
        o = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True).transpose(0, 1)
        x = x + call(a.o_proj, o.flatten(1))
        y = rms_norm_ref(x, block.post_attention_layernorm.weight, block.post_attention_layernorm.eps)
        x = x + call(m.down_proj, F.silu(call(m.gate_proj, y)) * call(m.up_proj, y))
        return x if rows is None else x[rows]
    return forward


@pytest.mark.parametrize("rows", [None, torch.arange(N - R, N)], ids=["all", "rows"])
@pytest.mark.parametrize("kind", [k for k in KINDS if "dropout" not in k])
def test_gradients_are_those_of_the_naive_layer(kind, rows):
    block, args = layer(kind), stream()
    for ours, theirs in zip(gradients(block, block, args, rows), gradients(naive(block, kind), block, args, rows)):
        torch.testing.assert_close(ours, theirs, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_and_compiled_layers_give_the_same(kind):
    block, args = layer(kind), stream()
    plain = gradients(block, block, args, None)
    again = gradients(lambda *a: checkpoint(block, *a, use_reentrant=False), block, args, None)
    assert all(map(torch.equal, plain, again))
    if kind in ("trained", "adapters"):
        whole = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)  # one graph for all lengths
        for some in (args, [t[:11] for t in args]):
            for ours, theirs in zip(gradients(whole, block, some, None), gradients(block, block, some, None)):
                torch.testing.assert_close(ours, theirs, rtol=TIGHT, atol=TIGHT)


def kept(block, args, call=None):
    """Bytes that autograd keeps of one pass through a layer, each storage once, but for the parameters and for what
    all layers share: angles and spans."""
    seen = {}
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *args[1:])}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = (call or block)(args[0].detach().requires_grad_(), *args[1:])
    assert out.shape == (N, C)                                                       # alive until here
    return sum(n for at, n in seen.items() if at not in own)


x, r, q, kv, o, gate_up, y, act = C, 1, H * K, 2 * G * K, H * K, 2 * M, C, M         # numbers per token
LEAN = 2 * x + 2 * r + q + kv + gate_up                                              # of every layer, trained or not
FORMULA = {"trained": LEAN + o, "biases": LEAN + o, "frozen": LEAN,
           "adapters": LEAN + o + 7 * 2, "q_proj alone": LEAN + y}                   # 7 products with A, of rank 2


@pytest.mark.parametrize("kind", FORMULA)
def test_a_layer_keeps_these_bytes_and_no_other(kind):
    """x, statistics, q, k, v, what attention gave, gate and up. A frozen linear layer keeps nothing; one that learns
    beside frozen ones keeps its input."""
    assert kept(layer(kind), stream()) == N * 8 * FORMULA[kind]


def test_without_it_norms_and_the_product_of_gate_and_up_are_kept_too(monkeypatch):
    together = model.together
    monkeypatch.setattr(model, "together", lambda x, *layers, made=None: together(x, *layers))
    assert kept(layer("trained"), stream()) == N * 8 * (FORMULA["trained"] + 2 * y + act)


class Asked(torch.utils._python_dispatch.TorchDispatchMode):
    """Operators whose results have a size, or are a number, that only the device knows: there the host has to wait"""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.__name__.partition(".")[0]
        if name in ("nonzero", "masked_select", "masked_scatter_backward", "_local_scalar_dense", "_unique2", "equal"):
            self.names.append(name)
        return f(*args, **kwargs or {})


@pytest.mark.parametrize("stage", ["align", "whole"])
def test_the_host_waits_once_for_the_device_in_forward_and_backward(stage):
    """For how many rows carry a label, before anything else was asked for"""
    from data import pack
    m = tiny_vlm().train()
    for n, p in m.named_parameters():
        p.requires_grad_(stage == "whole" or "multi_modal" in n)
    batch = pack([example(1), example(2, images=0), example(3, text=30)], 8)
    with Asked() as asked:
        m(*batch).backward()
    assert asked.names == ["nonzero"]


def test_a_7b_layer_keeps_what_was_promised():
    """2.98 MB per token in bf16, 4.21 without, over 32 layers; and the row statistics, 2 numbers of 4 bytes."""
    C, F = 4096, 11008
    lean = 32 * 2 * (2 * C + 3 * C + C + 2 * F)
    assert round(lean / 1e6, 2) == 2.98 and round((lean + 32 * 2 * (2 * C + F)) / 1e6, 2) == 4.21


def test_low_copies_of_weights_are_not_kept_under_autocast():
    block, args = layer("trained", torch.float32), stream(torch.bfloat16)

    def call(*a):
        with torch.autocast("cpu", torch.bfloat16):
            return block(*a)
    low = kept(block, args, call)
    matrix = C * H * K * 2                                                           # o_proj's, alone
    assert low - matrix == N * (2 * (FORMULA["trained"] - 2 * r) + 2 * 4)


def test_gradients_of_biases_are_sums_in_fp32():
    """97 numbers in bf16 whose sum bf16 would miss by 1e-3"""
    f, x, up = torch.nn.Linear(4, 3), normal(97, 4, dtype=torch.bfloat16), normal(97, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, = kernels.linear.linears(x, lambda z: z, (x,), [f])
    y.backward(up)
    torch.testing.assert_close(f.bias.grad.double(), up.double().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("broken", ["made of something else", "bias forgotten"])
def test_a_wrong_recipe_would_be_seen(broken, monkeypatch):
    block, args = layer("biases"), stream()
    true = gradients(block, block, args, None)
    linears = kernels.linear.linears

    def wrong(x, make, sources, layers):
        if broken == "made of something else":
            return linears(x, lambda *s: make(*s) * 1.001, sources, layers)
        return [y.detach() + 0 * y if f.bias is not None else y for f, y in
                zip(layers, linears(x, make, sources, layers))]
    monkeypatch.setattr(model, "linears", wrong)
    ours = gradients(block, block, args, None)
    assert torch.equal(ours[0], true[0])
    assert not all(torch.allclose(a, b, rtol=TIGHT, atol=TIGHT) for a, b in zip(ours, true))


def test_a_stream_in_fp32_under_autocast_is_multiplied_in_bf16_as_torch_would():
    """The results, and the gradients to the last bit of bf16, of linear layers left to themselves."""
    block, args = layer("trained", torch.float32), stream(torch.float32)
    seen = []
    block.self_attn.k_proj.register_forward_hook(lambda f, x, y: seen.append(y.dtype))

    def run(x, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return block(x, *args)

    lean = gradients(run, block, args, None)
    saved, model.linears = model.linears, lambda x, make, sources, layers: [f(x) for f in layers]
    try:
        plain = gradients(run, block, args, None)
    finally:
        model.linears = saved
    assert seen == [torch.bfloat16]                                                  # of the plain run: low indeed
    assert torch.equal(lean[0], plain[0])
    for a, b in zip(lean, plain, strict=True):
        assert a.dtype == b.dtype == torch.float32 and (a - b).norm() <= 0.01 * b.norm()
