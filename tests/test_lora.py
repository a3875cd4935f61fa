"""LoRA: a new adapter changes nothing, gradients and merging are exact, PEFT reads and writes the same files.

    N tokens   C input width   r rank   p probability of dropout
"""

import copy
import json
import shutil

import pytest
import torch
from conftest import example, tiny_vlm
from kernel_cases import TIGHT, normal
from safetensors.torch import load_file, save_file
from test_llava import EXAMPLES, error
from test_model import all_logits, exact_norms, gradients, ours, their_logits, theirs
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import kernels.linear
import lora
from data import pack
from formats import adapter_config, peft as our_peft, tensors

BATCH = pack([example(1), example(2, images=2, text=14)], 8)
LEAVES = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]


def wrapped(r=4, alpha=8.0, dropout=0.0, pattern="all-linear", moved=True, dtype=torch.float64):
    """A tiny model with adapters; B is zero as at the start unless `moved`"""
    model = tiny_vlm()
    names = lora.add_adapters(model, r, alpha, dropout, pattern)
    if moved:
        for n, p in model.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.1)
    return model.to(dtype), names


def trained(model):
    """Adapters and connector by name: what stage 2 with LoRA trains"""
    return {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n or "projector" in n}


def digest_of(model, without=None):
    """The digest of all weights outside the adapter's file"""
    without = without or trained(model)
    base = {n: p for n, p in model.named_parameters() if n not in without and "lora_" not in n}
    return tensors.base_digest({n: tensors.tensor_digest(p) for n, p in base.items()})


def logits(model, batch=BATCH):
    with torch.no_grad():
        return all_logits(model, batch)


def test_a_new_adapter_changes_no_bit():
    model, _ = wrapped(moved=False)
    assert torch.equal(logits(model), logits(tiny_vlm()))
    assert not torch.equal(logits(wrapped()[0]), logits(tiny_vlm()))


def test_a_wrapped_layer_computes_the_paper():
    """y = W x + (alpha / r) B A x, by hand."""
    layer = lora.LoRALinear(torch.nn.Linear(5, 3), 2, 7.0, 0.0).double()
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(4, 5, dtype=torch.float64)
    A, B, W = layer.lora_A.weight, layer.lora_B.weight, layer.weight
    torch.testing.assert_close(layer(x), x @ (W + 3.5 * B @ A).T + layer.bias, rtol=TIGHT, atol=TIGHT)


# ---- layers that read the same input --------------------------------------------------------------------------------

def definition(layer, x, keep=None, p=0.0):
    """One operator after the other, as in PEFT; keep: the dropout mask"""
    wide = layer.lora_A.weight.dtype
    d = x.to(wide) if keep is None else x.to(wide) * keep / (1 - p)
    y = torch.nn.functional.linear(x, layer.weight, layer.bias)
    return y + (layer.scale * layer.lora_B(layer.lora_A(d))).to(y.dtype)


def family(C=40, sizes=(24, 8, 8), ranks=(4, 2, 3), dropout=0.0, bias=True, dtype=torch.float64):
    """Layers that read the same x of width C, each with its own rank and scale"""
    torch.manual_seed(0)
    layers = [lora.LoRALinear(torch.nn.Linear(C, O, bias=bias), r, 3.0 * i + 1, dropout)
              for i, (O, r) in enumerate(zip(sizes, ranks))]
    for f in layers:
        torch.nn.init.normal_(f.lora_B.weight, std=0.1)
        f.weight.data = f.weight.data.to(dtype)                               # adapters stay fp32 over a bf16 base,
        if dtype == torch.float64:                                            # as engine.choose keeps them
            f.double()
    return layers


def parts(layers):
    return [p for f in layers for p in (f.lora_A.weight, f.lora_B.weight)]


def outputs_and_gradients(call, layers, x):
    """call(x, *layers) -> outputs, gradients of x and of the adapters, for random incoming gradients"""
    x = x.detach().requires_grad_()
    ys = call(x, *layers)
    up = [normal(*y.shape, seed=7).to(y.dtype) for y in ys]
    return [*ys, *torch.autograd.grad(ys, [x, *parts(layers)], up)]


def one_by_one(keep=None, p=0.0):
    return lambda x, *layers: [definition(f, x, keep, p) for f in layers]


@pytest.mark.parametrize("N, n, bias", [(17, 3, True), (1, 2, False), (0, 3, False)])
def test_shared_input_equals_one_by_one(N, n, bias):
    layers, x = family(bias=bias)[:n], normal(N, 40)
    mine = outputs_and_gradients(lora.apply_shared_input, layers, x)
    for a, b in zip(mine, outputs_and_gradients(one_by_one(), layers, x), strict=True):
        torch.testing.assert_close(a, b, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("needs", [True, False])
def test_an_input_without_gradient_costs_no_product(needs, monkeypatch):
    """Backward multiplies by the base weight only if x needs a gradient."""
    layer, dense, calls = lora.LoRALinear(torch.nn.Linear(6, 5), 2, 4, 0.0), kernels.linear.dense, []
    monkeypatch.setattr(kernels.linear, "dense", lambda *a: calls.append(a) or dense(*a))
    layer(torch.ones(3, 6, requires_grad=needs)).sum().backward()
    assert len(calls) == 1 + needs and layer.lora_B.weight.grad is not None


def test_one_dropout_mask_serves_a_shared_input():
    layers, x, p = family(dropout=0.25), normal(500, 40), 0.25
    torch.manual_seed(5)
    mine = outputs_and_gradients(lora.apply_shared_input, layers, x)
    torch.manual_seed(5)
    keep = torch.empty(500, 40, dtype=torch.bool).bernoulli_(1 - p)
    assert abs(keep.double().mean() - 0.75) < 0.02
    for a, b in zip(mine, outputs_and_gradients(one_by_one(keep, p), layers, x), strict=True):
        torch.testing.assert_close(a, b, rtol=TIGHT, atol=TIGHT)
    layers[1].dropout = 0.5                                                   # now each layer needs its own mask
    assert [y.shape for y in lora.apply_shared_input(x, *layers)] == [y.shape for y in mine[:3]]


def test_layers_without_adapter_share_the_input_too():
    """And x may have more dimensions than two."""
    (q, _, v), k, x = family(), torch.nn.Linear(40, 8).double(), normal(2, 3, 40)
    for a, b in zip(lora.apply_shared_input(x, k, q, v), [k(x), definition(q, x), definition(v, x)], strict=True):
        torch.testing.assert_close(a, b, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("pattern, dropout", [("all-linear", 0.5), ("q_proj,v_proj,down_proj", 0.0),
                                              ("language_model.model.*,vision_tower.*", 0.0)])
def test_gradients_of_a_whole_model_are_exact(pattern, dropout, monkeypatch):
    """Against the definition, layer by layer. One layer is the last, where few tokens are queries. The ViT has adapters
    too in the last case."""
    def run():
        model, names = wrapped(dropout=dropout, pattern=pattern)
        lrs = engine.choose(model, {"*.lora_*": 1e-3, "multi_modal_projector.*": 1e-3}, torch.float64)
        torch.manual_seed(3)
        loss, got = gradients(model, [BATCH])
        assert got.keys() == lrs.keys() and all(g.any() for n, g in got.items() if "k_proj" not in n)
        assert {n.split(".lora_")[0] for n in got if ".lora_" in n} == set(names)
        return loss, got

    def plain(x, *layers):
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
        return [definition(f, x, keep, dropout) if isinstance(f, lora.LoRALinear) else f(x) for f in layers]
    loss, got = run()
    monkeypatch.setattr(lora, "apply_shared_input", plain)
    true, want = run()
    assert abs(loss / true - 1) < TIGHT and got.keys() == want.keys()
    assert all((got[n] - want[n]).norm() <= 10 * TIGHT * want[n].norm() for n in want)


def test_wrapped_models_share_their_inputs(monkeypatch):
    """Four calls per decoder layer: q, k and v; o; gate and up; down. The last layer's q reads fewer tokens: five."""
    calls, apply = [], kernels.linear.LoRALinears.apply
    monkeypatch.setattr(kernels.linear.LoRALinears, "apply", lambda *a: calls.append(len(a[2])) or apply(*a))
    model, _ = wrapped()
    model(*BATCH)
    assert calls == [3, 1, 2, 1, 1, 2, 1, 2, 1]
    twin = copy.deepcopy(model)                                                # its methods are of the copy
    twin.language_model.model.layers[0].self_attn.q_proj.lora_B.weight.data.zero_()
    assert not torch.equal(logits(twin), logits(model))


class Passes(TorchDispatchMode):
    """Names of the operators that write a tensor of at least `size` elements, and how many products read `x`"""

    def __init__(self, size, x):
        super().__init__()
        self.size, self.x, self.seen, self.reads = size, x, [], 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out, name = f(*args, **(kwargs or {})), f.overloadpacket.__name__
        views = {"t", "view", "detach", "alias", "split", "_unsafe_view", "transpose", "permute"}
        self.seen += [name for t in (out if isinstance(out, (tuple, list)) else [out])
                      if isinstance(t, torch.Tensor) and t.numel() >= self.size and name not in views]
        self.reads += name in ("mm", "addmm") and any(isinstance(t, torch.Tensor) and t.data_ptr() == self.x.data_ptr()
                                                      for t in args)
        return out


def test_one_product_serves_all_adapters():
    N, C = 64, 40
    layers, x = family(sizes=(C, C, C), bias=False), normal(N, C)
    with Passes(N * C, x) as mine:
        outputs_and_gradients(lora.apply_shared_input, layers, x)
    unrelated = {"randn", "normal_", "randn_like", "empty", "_to_copy"}        # of the incoming gradients
    large = [n for n in mine.seen if n not in unrelated]
    assert sorted(large) == sorted(["mm", "addmm_"] * 3 + ["mm"] + ["addmm_"] * 3), large
    assert mine.reads == 3 + 1 + 1                                            # by W three times, by A once, for dA once


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_backward_saves_x_one_mask_and_small_products(dropout):
    """bf16 over fp32 adapters, as on a GPU. The definition saves a copy of x for every adapter."""
    N, C = 200, 400
    layers = family(C, (400, 100, 100), bias=False, dropout=dropout, dtype=torch.bfloat16)
    x, seen = normal(N, C, dtype=torch.bfloat16).requires_grad_(), {}
    given = {t.untyped_storage().data_ptr() for t in (x, *(p for f in layers for p in f.parameters()))}

    def save(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        ys = lora.apply_shared_input(x, *layers)                               # alive: no address is used twice
    assert len(ys) == 3 and x.data_ptr() in seen
    assert sum(n for at, n in seen.items() if at not in given) == N * (4 + 2 + 3) * 2 + (N * C if dropout else 0)


def test_adapters_start_as_in_peft():
    model, names = wrapped(r=8, moved=False)
    for n in names:
        m = model.get_submodule(n)
        bound = m.in_features**-0.5
        assert not m.lora_B.weight.any() and 0.9 * bound < m.lora_A.weight.abs().max() <= bound * (1 + 1e-6)
    again, other = tiny_vlm(), tiny_vlm()
    state = torch.get_rng_state()
    lora.add_adapters(again, 8, 8.0, 0.0, "all-linear")
    lora.add_adapters(other, 8, 8.0, 0.0, "all-linear", seed=1)
    assert torch.equal(torch.get_rng_state(), state)                          # the global random state stays
    first, same, different = (m.get_parameter(f"{names[0]}.lora_A.weight").double() for m in (model, again, other))
    assert torch.equal(first, same) and not torch.equal(first, different)


@pytest.mark.parametrize("pattern, want", [
    ("all-linear", [f"language_model.model.layers.{i}.{p}" for i in (0, 1) for p in LEAVES]),
    ("q_proj,v_proj", [f"language_model.model.layers.{i}.self_attn.{p}" for p in ("q_proj", "v_proj") for i in (0, 1)]),
    ("language_model.*.1.mlp.*,*.layers.1.mlp.up_proj", [f"language_model.model.layers.1.{p}" for p in LEAVES[4:]]),
    ("vision_tower.*.fc1", [f"vision_tower.vision_model.encoder.layers.{i}.mlp.fc1" for i in (0, 1)]),
])
def test_a_pattern_selects_exactly_these_layers(pattern, want):
    """`q_proj` means those of the language model: the vision tower has layers of the same name."""
    model = tiny_vlm()
    assert lora.targets(model, pattern) == want
    assert lora.add_adapters(model, 2, 4.0, 0.0, pattern) == want
    assert {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n} == set(want)


def test_unknown_patterns_and_second_adapters_are_refused():
    for name in ("w_qkv", "lm_head", "*.lm_head"):                            # the head is a matrix, never called
        line = error(lora.targets, tiny_vlm(), f"q_proj,{name}")
        assert f"no linear layer is called {name!r}; the model has, for example, language_model" in line
    model, names = wrapped()
    assert f"{names[0]} already has an adapter" in error(lora.add_adapters, model, 4, 8.0, 0.0, names[0])


def test_recomputed_blocks_give_the_same_gradients():
    """With frozen embeddings in front of them, and dropout."""
    def run(how):
        model, _ = wrapped(dropout=0.5)
        engine.choose(model, {"*.lora_*": 1e-3}, torch.float64)
        world = engine.World(0, 1, torch.device("cpu"), torch.float64)
        model = engine.parallelize(model, world, [*model.language_model.model.layers], recompute=how)
        torch.manual_seed(3)                                                  # the same dropout
        return gradients(model, [BATCH])

    (loss, got), (plain, want) = run("block"), run("none")
    assert loss == plain and got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


def test_reentrant_checkpointing_loses_gradients():
    from torch.utils.checkpoint import checkpoint
    model, _ = wrapped()
    engine.choose(model, {"*.lora_*": 1e-3}, torch.float64)
    first = model.language_model.model.layers[0]
    plain = first.forward
    first.forward = lambda *args, cache=None: checkpoint(plain, *args, use_reentrant=True)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        _, got = gradients(model, [BATCH])
    assert not any("layers.0." in n for n in got) and any("layers.1." in n for n in got)


def test_evaluation_has_no_dropout():
    model, _ = wrapped(dropout=0.5)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model)) and torch.equal(logits(model), logits(wrapped()[0].eval()))


@pytest.mark.parametrize("dtype, gate", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_merging_keeps_the_logits(dtype, gate):
    model, names = wrapped(dtype=dtype)
    merged = tiny_vlm(dtype=dtype)
    state = model.state_dict()
    before = {k: v.clone() for k, v in state.items()}
    plain = lora.merge_state(state, lora.scales(model))
    merged.load_state_dict(plain)                                             # all names of a plain model, and no other
    scale = logits(model).abs().max()
    assert (logits(merged) - logits(model)).abs().max() <= gate * 10 * scale        # logits: ten layers' roundings
    assert all(torch.equal(state[k], before[k]) for k in before)              # so merging twice is possible
    again = lora.merge_state(state, lora.scales(model))
    assert all(torch.equal(again[k], plain[k]) for k in plain)
    merged.load_state_dict(lora.merge_state(state, dict.fromkeys(names, 8.0)))    # alpha, not alpha / r
    assert (logits(merged) - logits(model)).abs().max() > 1000 * gate * scale


def test_a_bf16_model_is_merged_in_fp32():
    model, names = wrapped()
    model.bfloat16()
    state, name = model.state_dict(), f"{names[0]}.weight"
    A, B = (state[f"{names[0]}.lora_{x}.weight"].double() for x in "AB")
    true = state[name].double() + 2 * B @ A
    got = lora.merge_state(state, lora.scales(model))[name]
    assert got.dtype == torch.float32 and (got.double() - true).abs().max() <= 1e-6
    half = lora.merge_state(state, lora.scales(model), torch.float16)             # as published, rounded once
    assert all(torch.equal(half[f"{n}.weight"], lora.merge_state(state, lora.scales(model))[f"{n}.weight"].half())
               and half[f"{n}.weight"].dtype == torch.float16 for n in names)


def test_infinite_adapters_are_not_merged():
    model, names = wrapped()
    with torch.no_grad():
        model.get_parameter(f"{names[1]}.lora_A.weight")[0, 0] = torch.nan
    assert f"the adapter of {names[1]} is not finite" in error(lora.merge_state, model.state_dict(), lora.scales(model))


# ---- files ----------------------------------------------------------------------------------------------------------

def test_a_saved_adapter_loads_every_bit(tmp_path):
    """In fp32, as they are trained: a new process with the base and the folder says the same, to the last bit."""
    model, names = wrapped(pattern="q_proj,down_proj", dtype=torch.float32)
    with torch.no_grad():
        model.multi_modal_projector.linear_1.weight.add_(0.1)
    our_peft.save_adapter(tmp_path / "adapter", trained(model), 4, 8.0, 0.0, "base", digest_of(model))
    back = tiny_vlm(dtype=torch.float32)
    assert our_peft.load_adapter(back, tmp_path / "adapter") == sorted(names)
    assert torch.equal(logits(back), logits(model))
    bare = tiny_vlm(dtype=torch.float32)                                      # without the connector it would not
    adapters = {n: p for n, p in trained(model).items() if ".lora_" in n}
    our_peft.save_adapter(tmp_path / "bare", adapters, 4, 8.0, 0.0, "base", digest_of(model, adapters))
    assert "was trained on another base" in error(our_peft.load_adapter, bare, tmp_path / "bare")
    (tmp_path / "bare" / "pumice.json").unlink()
    our_peft.load_adapter(bare, tmp_path / "bare")
    assert not torch.equal(logits(bare), logits(model))


def test_peft_reads_what_we_write(tmp_path):
    """Adapter and connector, on transformers' own model: equal logits in float64, every tensor used."""
    peft = pytest.importorskip("peft")
    base = exact_norms(theirs(v={"image_size": 8}))
    model = ours(base)
    lora.add_adapters(model, 4, 8.0, 0.0, "language_model.*,vision_tower.*.fc1")
    torch.manual_seed(1)
    for n, p in model.named_parameters():
        if ".lora_" in n or "projector" in n:
            torch.nn.init.normal_(p.data, std=0.1)
            p.data = p.data.float()                                           # what a file holds
    our_peft.save_adapter(tmp_path / "adapter", trained(model), 4, 8.0, 0.0, "base", digest_of(model))
    model.double()
    before = their_logits(base, EXAMPLES, model.cfg.vision)
    there = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").double().eval()
    assert sum("lora_A" in n for n, _ in there.named_parameters()) == 14 + 2
    true = their_logits(there, EXAMPLES, model.cfg.vision)
    assert (true - before).abs().max() > 0.1
    assert (logits(model, pack(EXAMPLES, 8)) - true).abs().max() <= 1e-10 * max(1, true.abs().max())


@pytest.mark.parametrize("save_too", [None, ["multi_modal_projector"]])
def test_we_read_what_peft_writes(tmp_path, save_too):
    peft = pytest.importorskip("peft")
    base = exact_norms(theirs(v={"image_size": 8}))
    model = ours(base)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=r".*language_model.*\.(q_proj|up_proj)",
                             init_lora_weights=False, modules_to_save=save_too)
    there = peft.get_peft_model(base, config).double()
    if save_too:
        for n, p in there.named_parameters():
            if "modules_to_save" in n:
                torch.nn.init.normal_(p.data, std=0.1)
    there.float().save_pretrained(tmp_path / "adapter")
    there = exact_norms(there).double().eval()
    assert our_peft.load_adapter(model, tmp_path / "adapter") == sorted(
        f"language_model.model.layers.{i}.{p}" for i in (0, 1) for p in ("self_attn.q_proj", "mlp.up_proj"))
    true = their_logits(there, EXAMPLES, model.cfg.vision)
    assert (logits(model.double(), pack(EXAMPLES, 8)) - true).abs().max() <= 1e-10 * max(1, true.abs().max())


@pytest.mark.parametrize("how, ranks", [
    (dict(use_dora=True), {}), (dict(use_dora=True, use_rslora=True), {}),
    (dict(use_rslora=True), {r"layers\.0\.self_attn\.q_proj": 2})])
def test_rslora_and_dora_are_read_and_merged(tmp_path, how, ranks):
    """Merged; LoRA's scale without the root, or without the lengths of rows, gives other logits."""
    peft = pytest.importorskip("peft")
    base = exact_norms(theirs(v={"image_size": 8}))
    model, plain, other = ours(base), ours(base), ours(base)
    there = peft.get_peft_model(base, peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=r".*language_model.*\.(q_proj|up_proj|down_proj)", rank_pattern=ranks,
        init_lora_weights=False, **how)).float()
    for n, p in there.named_parameters():
        if "lora_magnitude" in n:
            p.data *= 1 + 0.2 * torch.rand_like(p)                            # at first it is the length that rows have
    there.save_pretrained(tmp_path / "adapter")
    there = exact_norms(there).double().eval()
    assert len(our_peft.load_adapter(model, tmp_path / "adapter")) == 6
    model.double()
    true = their_logits(there, EXAMPLES, model.cfg.vision)
    gate, batch = 1e-10 * max(1, true.abs().max()), pack(EXAMPLES, 8)
    plain.double().load_state_dict(lora.merge_state(model.state_dict(), lora.scales(model)))
    assert (logits(plain, batch) - true).abs().max() <= gate
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": False}))
    if "use_dora" in how:
        assert "is merged before" in error(logits, model, batch)
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        lengths = next(k for k in tensors if "lora_magnitude" in k)
        del tensors[lengths]
        save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
        assert "lora_magnitude_vector is missing" in error(our_peft.load_adapter, other, tmp_path / "adapter")
    else:
        assert (logits(model, batch) - true).abs().max() <= gate
        our_peft.load_adapter(other, tmp_path / "adapter")
        assert (logits(other.double(), batch) - true).abs().max() > 1e6 * gate


def test_layers_may_have_their_own_rank(tmp_path):
    """PEFT's rank_pattern and alpha_pattern: with one scale for all, the merged model would say something else."""
    peft = pytest.importorskip("peft")
    there = exact_norms(theirs(v={"image_size": 8}))
    model, plain = ours(there), ours(there)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=r".*language_model.*\.(q_proj|up_proj)",
                             rank_pattern={r"layers\.0\.self_attn\.q_proj": 2}, alpha_pattern={"up_proj": 20},
                             init_lora_weights=False)
    there = peft.get_peft_model(there, config).float()
    there.save_pretrained(tmp_path / "adapter")
    there = exact_norms(there).double().eval()
    our_peft.load_adapter(model, tmp_path / "adapter")
    scales = lora.scales(model)
    assert sorted(scales.values()) == [1.5, 3.0, 5.0, 5.0]
    true = their_logits(there, EXAMPLES, model.cfg.vision)
    gate, batch = 1e-10 * max(1, true.abs().max()), pack(EXAMPLES, 8)
    assert (logits(model.double(), batch) - true).abs().max() <= gate
    plain.double().load_state_dict(lora.merge_state(model.state_dict(), scales))
    assert (logits(plain, batch) - true).abs().max() <= gate
    plain.load_state_dict(lora.merge_state(model.state_dict(), dict.fromkeys(scales, 1.5)))
    assert (logits(plain, batch) - true).abs().max() > 1e6 * gate


def before_4_52(k):
    """A name in a model of transformers 5 -> the name until 4.51, also in adapters of that time"""
    for new, old in (("model.language_model.", "language_model.model."), ("model.multi_modal_", "multi_modal_"),
                     ("model.vision_tower.", "vision_tower.vision_model."), ("lm_head.", "language_model.lm_head.")):
        if k.startswith(our_peft.PREFIX + new):
            return k.replace(new, old, 1)
    raise AssertionError(k)


NEW = str                                                                     # names as transformers 5 writes them


@pytest.mark.parametrize("how, spelling", [
    (dict(target_modules="all-linear"), NEW), (dict(target_modules="all-linear"), before_4_52),
    (dict(target_modules=["fc1", "k_proj"], use_dora=True), before_4_52),
    (dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"), NEW),
    (dict(target_modules=["o_proj"], modules_to_save=["norm", "lm_head", "multi_modal_projector"]), NEW),
    (dict(target_modules=["v_proj"], modules_to_save=["embed_tokens", "multi_modal_projector"]), before_4_52)])
def test_adapters_of_all_parts_are_read(tmp_path, how, spelling):
    """The usual leaf names mean layers of the tower, too, even of the block whose output is not used."""
    peft = pytest.importorskip("peft")
    there = exact_norms(theirs(v={"image_size": 8}))
    model, merged = ours(there), ours(there)
    # one layer of another alpha, by its whole name
    name = "model.language_model.layers.1.self_attn.q_proj"
    there = peft.get_peft_model(there, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **how,
                                                       alpha_pattern={name: 20})).float()
    for n, p in there.named_parameters():
        if "modules_to_save" in n or "lora_magnitude" in n:
            p.data += 0.2 * torch.rand_like(p)
    there.save_pretrained(tmp_path)
    there = exact_norms(there).double().eval()
    tensors = {spelling(k): v for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["alpha_pattern"] = {spelling(f"{our_peft.PREFIX}{name}").removeprefix(our_peft.PREFIX): 20}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    our_peft.load_adapter(model, tmp_path)
    merged.double().load_state_dict(lora.merge_state(model.double().state_dict(), lora.scales(model)))
    true = their_logits(there, EXAMPLES, model.cfg.vision)
    assert (logits(merged, pack(EXAMPLES, 8)) - true).abs().max() <= 1e-10 * max(1, true.abs().max())


def test_an_adapter_of_another_module_is_named(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in ("lm_head", "model.language_model.embed_tokens", "model.vision_tower.encoder.layers.3.mlp.fc1"):
        new = {f"{our_peft.PREFIX}{name}.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
        save_file(tensors | new, adapter / "adapter_model.safetensors")
        line = error(our_peft.load_adapter, tiny_vlm(), adapter)
        assert f"holds an adapter of {name}, which is not a linear layer" in line


@pytest.mark.parametrize("new, says", [
    (dict(r=0), "r=0 and lora_alpha=8.0 in its adapter_config.json"), (dict(r=None), "r=None and"),
    (dict(lora_alpha="8"), "lora_alpha='8' in its"), (dict(alpha_pattern={"q_proj": True}), "lora_alpha=True in its"),
    (dict(rank_pattern=["q_proj"]), "rank_pattern=['q_proj'] is not an object with a number for each layer")])
def test_an_invalid_scale_is_one_line(adapter, new, says):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | new))
    assert says in error(our_peft.load_adapter, tiny_vlm(), adapter)


def test_another_base_refuses_the_adapter(tmp_path):
    model, _ = wrapped(dtype=torch.float32)
    our_peft.save_adapter(tmp_path / "adapter", trained(model), 4, 8.0, 0.0, "base", digest_of(model))
    for spoil in ("language_model.lm_head.weight", "vision_tower.vision_model.pre_layrnorm.bias"):
        other = tiny_vlm(dtype=torch.float32)
        with torch.no_grad():
            p = other.get_parameter(spoil).view(-1)
            p[-1] = p[-1].nextafter(torch.tensor(9.0))                        # the last bit of one weight
        assert "was trained on another base" in error(our_peft.load_adapter, other, tmp_path / "adapter")
        assert not any("lora_" in n for n, _ in other.named_parameters())
    other = tiny_vlm(dtype=torch.float32)
    torch.nn.init.zeros_(other.multi_modal_projector.linear_1.weight)         # the connector comes with the adapter
    our_peft.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits(other), logits(model))
    (tmp_path / "adapter" / "pumice.json").unlink()                           # as PEFT itself writes one
    our_peft.load_adapter(tiny_vlm(seed=1, dtype=torch.float32), tmp_path / "adapter")


@pytest.fixture
def adapter(tmp_path):
    model, _ = wrapped(pattern="q_proj")
    our_peft.save_adapter(tmp_path / "adapter", trained(model), 4, 8.0, 0.0, "base", digest_of(model))
    return tmp_path / "adapter"


def test_unsupported_peft_settings_are_refused(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    for key, value in (("bias", "all"), *((key, True) for key in adapter_config.REFUSED)):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        assert f"{key}={value} is not supported" in error(our_peft.load_adapter, tiny_vlm(), adapter)
    for how in ("pissa", "pissa_niter_4", "olora", "corda", "loftq"):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": how}))
        assert f"{how} changed the base" in error(our_peft.load_adapter, tiny_vlm(), adapter)


@pytest.mark.parametrize("change, says", [
    (lambda t, k: t[k].fill_(torch.nan), "is not finite"), (lambda t, k: t.pop(k), "lora_A.weight is missing"),
    (lambda t, k: t.update({k: torch.ones(4, 31)}), "(4, 31) does not fit this model"),
    (lambda t, k: t.update({our_peft.PREFIX + "model.language_model.norms": torch.ones(1)}),
     "language_model.model.norms (1,) does not fit"),
    (lambda t, k: [t.pop(k) for k in list(t) if "lora" in k], "holds no adapter"),
])
def test_an_incomplete_adapter_is_refused(adapter, change, says):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors, next(k for k in sorted(tensors) if k.endswith("lora_A.weight")))
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert says in error(our_peft.load_adapter, tiny_vlm(), adapter)


def test_a_folder_without_an_adapter_is_one_line(adapter, tmp_path):
    assert "adapter_config.json is missing" in error(our_peft.load_adapter, tiny_vlm(), tmp_path)
    shutil.move(adapter / "adapter_model.safetensors", adapter / "adapter_model.bin")
    line = error(our_peft.load_adapter, tiny_vlm(), adapter)
    assert "adapter_model.bin is not a file of tensors alone, or is cut off" in line
