"""QLoRA: adapters over an NF4 base equal adapters over the dequantized base. No part of training stores, changes or
sends the base."""

import hashlib
import json
import shutil

import pytest
import torch
from conftest import example, fork, tiny_vlm, train_step
from kernel_cases import TIGHT, normal
from safetensors import safe_open
from safetensors.torch import load_file
from test_llava import error
from test_model import all_logits, gradients, their_logits
from tiny_runs import LORA, halves_agree, run, state

import engine
import eval as evaluation
import generate
import lora
from data import pack
from formats import llava, peft as our_peft
from loss import token_loss
from model import VLM
from run import plan

BATCH = pack([example(1), example(2, images=2, text=14)], 8)
LINEARS = 14                                                                  # of the tiny model's two decoder layers
CPU = engine.World(0, 1, torch.device("cpu"), torch.float64)
TABLE = {"multi_modal_projector.*": 1e-2, "*.lora_*": 1e-2}


def adapted(model, pattern="all-linear", dropout=0.0):
    """model with adapters, B not zero, and parameters chosen for training"""
    lora.add_adapters(model, 4, 8.0, dropout, pattern)
    torch.manual_seed(1)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    engine.choose(model, TABLE, torch.float64)
    return model


def pair(pattern="all-linear"):
    """-> a model over NF4, and one over the dequantized base, with the same adapters"""
    ours, plain = tiny_vlm(qkv_bias=True), tiny_vlm(qkv_bias=True)
    for name in lora.quantize_base(ours):
        layer = plain.get_submodule(name)
        layer.weight.data = lora.dense(lora.base_weight(ours.get_submodule(name)), torch.float64)
    return adapted(ours, pattern), adapted(plain, pattern)


def base(model):
    """Digest of all NF4 tensors"""
    return hashlib.sha256(b"".join(b.numpy().tobytes() for b in model.buffers())).hexdigest()


@pytest.mark.parametrize("pattern", ["all-linear", "q_proj,down_proj"])
def test_qlora_equals_lora_over_the_dequantized_base(pattern):
    """Logits and gradients; layers without an adapter pass the gradient on."""
    ours, plain = pair(pattern)
    assert torch.equal(all_logits(ours, BATCH), all_logits(plain, BATCH))
    assert not torch.equal(all_logits(plain, BATCH), all_logits(adapted(tiny_vlm(qkv_bias=True), pattern), BATCH))
    (loss, got), (true, want) = (gradients(m, [BATCH]) for m in (ours, plain))
    assert loss == true and got.keys() == want.keys()
    assert all((got[n] - want[n]).norm() <= TIGHT * want[n].norm() for n in want)


def test_a_weight_takes_0_53_bytes_at_most():
    model = tiny_vlm(hidden_size=128, intermediate_size=352, head_dim=32).requires_grad_(False)
    count = {n: m.weight.numel() for n, m in model.named_modules() if n in lora.targets(model, "all-linear")}
    before = {n: c for n, _, c in plan.count_parameters(model)}
    shapes = plan.flops(model, {"*": ("tokens", 1)})
    names = lora.quantize_base(model)
    assert len(names) == LINEARS and count.keys() == set(names)
    size = sum(t.nbytes for n in names for t in model.get_submodule(n).state_dict().values())
    assert size == sum(b.nbytes for b in model.buffers())
    assert size <= 0.53 * sum(count.values())
    assert not any(n.rpartition(".")[0] in count for n, _ in model.named_parameters())
    assert {n: c for n, _, c in plan.count_parameters(model)} == before        # weights, not bytes
    assert plan.flops(model, {"*": ("tokens", 1)}) == shapes


def test_the_dequantized_matrix_is_not_saved():
    layer, x = lora.NF4Linear(torch.nn.Linear(64, 96)), normal(5, 64).float().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = layer(x)
        assert not saved and not [t for t in y.grad_fn.W if t.is_floating_point() and t.numel() > 1]
        torch.nn.functional.linear(x, lora.dense(lora.base_weight(layer), x.dtype))  # the definition saves it
        assert saved == [64 * 96]
        saved.clear()
        lora.LoRALinear(layer, 2, 2.0, 0.0)(x)
    assert sorted(saved) == sorted([x.numel(), 5 * 2, 2 * 64, 96 * 2])         # x, A x, A, B
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(5, 96) @ lora.dense(lora.base_weight(layer), torch.float32))


def test_a_recomputed_nf4_model_has_the_same_gradients():
    model, other = pair("q_proj,k_proj,gate_proj")[0], pair("q_proj,k_proj,gate_proj")[0]
    loss, want = gradients(model, [BATCH])
    engine.parallelize(other, CPU, other.language_model.model.layers, recompute="block")
    again, got = gradients(other, [BATCH])
    assert again == loss and got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


def test_merging_adds_to_the_dequantized_base():
    ours, _ = pair("q_proj,up_proj")
    merged, wrong = tiny_vlm(qkv_bias=True), tiny_vlm(qkv_bias=True)
    full = wrong.state_dict()
    plain = lora.merge_state(ours.state_dict(), lora.scales(ours))
    merged.load_state_dict(plain)                                             # exactly the names of a plain model
    true = all_logits(ours, BATCH)
    assert (all_logits(merged, BATCH) - true).abs().max() <= 10 * TIGHT * true.abs().max()
    for n in lora.scales(ours):                                               # added to the base before quantization
        A, B = (ours.get_parameter(f"{n}.lora_{x}.weight") for x in "AB")
        full[f"{n}.weight"] += 2 * (B @ A).detach()
    wrong.load_state_dict(full)
    assert (all_logits(wrong, BATCH) - true).abs().max() > 0.01


def test_training_changes_no_bit_of_the_base():
    model, _ = pair()
    optimizer = engine.adamw(model, {n: 1e-2 for n, p in model.named_parameters() if p.requires_grad}, 0.1)
    before, losses = base(model), []
    for _ in range(20):
        losses.append(train_step(model, optimizer, [BATCH], token_loss, CPU, check=True)["loss"])
    assert base(model) == before and losses[-1] < 0.5 * losses[0]
    model.language_model.model.layers[0].mlp.up_proj.absmax[0] += 1
    assert base(model) != before


def test_what_cannot_be_quantized_is_one_line():
    model = tiny_vlm()
    model.language_model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.inf
    assert "layers.1.mlp.up_proj.weight is not finite and cannot be quantized" in error(lora.quantize_base, model)
    assert "is already a LoRALinear" in error(lora.quantize_base, adapted(tiny_vlm()))
    model = tiny_vlm()
    lora.quantize_base(model)
    assert "is already a NF4Linear" in error(lora.quantize_base, model)


MICRO = [pack([example(1)], 8), pack([example(2, images=2, text=14)], 8)]


def seen_by(model, micro, w):
    """One step without an update -> gradients by name, as lists"""
    class Spy:
        def step(self):
            self.seen = {n: engine.whole_tensor(p.grad).tolist() for n, p in engine.unwrap(model).named_parameters()
                         if p.requires_grad}

        def zero_grad(self, set_to_none):
            model.zero_grad(set_to_none)
    spy = Spy()
    train_step(model, spy, micro, token_loss, w, check=True)
    return spy.seen


def agree(found, truth):
    for seen in found:
        assert seen.keys() == truth.keys()
        for n in truth:
            a, b = (torch.tensor(t, dtype=torch.float64) for t in (seen[n], truth[n]))
            assert (a - b).norm() <= TIGHT * b.norm()


def test_shards_of_a_plain_base_equal_one_rank(tmp_path):
    """FSDP shards this base, and frees it between forward and backward."""
    def rank(r):
        model, w = pair()[1], engine.World(r, 2, torch.device("cpu"), torch.float64)
        model = engine.parallelize(model, w, [*model.language_model.model.layers], "fsdp")
        return seen_by(model, [MICRO[r]], w)
    agree(fork(2, rank, tmp_path), seen_by(pair()[1], MICRO, CPU))


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_two_ranks_equal_one_over_nf4(wrap, tmp_path):
    """DDP does not broadcast the base before each pass: a change on one rank stays there."""
    def rank(r):
        model, w = pair()[0], engine.World(r, 2, torch.device("cpu"), torch.float64)
        before = base(model)
        model = engine.parallelize(model, w, [*model.language_model.model.layers], wrap)
        seen = seen_by(model, [MICRO[r]], w)
        assert base(engine.unwrap(model)) == before
        if r == 1:
            engine.unwrap(model).language_model.model.layers[0].mlp.up_proj.absmax.zero_()
            before = base(engine.unwrap(model))
        seen_by(model, [MICRO[r]], w)
        assert base(engine.unwrap(model)) == before
        other = pair()[0]
        if r == 1:
            other.language_model.model.layers[0].mlp.up_proj.weight[0, 0] ^= 1
        return seen, error(engine.parallelize, other, w, [], wrap)

    found = fork(2, rank, tmp_path)
    agree([seen for seen, _ in found], seen_by(pair()[0], MICRO, CPU))
    assert all("start from different weights" in line for _, line in found)


def test_qlora_resumes_and_publishes_a_plain_model(world, aligned, tmp_path):  # noqa: F811
    how, whole, again = dict(init=str(aligned), bits=4, **LORA), tmp_path / "whole", tmp_path / "again"
    run("sft", world, whole, **how)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_0000006")
    (again / "finished.json").unlink()
    run("sft", world, again, **how)                          # from step 4 on; the base is quantized again
    assert state(again) == state(whole)
    assert (again / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    with safe_open(whole / "checkpoints/step_0000006/trained.safetensors", "pt") as f:
        assert all(".lora_" in k or "projector" in k for k in f.keys()) and len(list(f.keys())) == 2 * LINEARS + 4
    halves_agree(*(generate.Chat(whole / part, "cpu", "fp32") for part in ("adapter", "model")))   # over NF4 too
    merged, plain = (load_file(out / "model" / "model.safetensors") for out in (whole, aligned))
    assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {k: (v.shape, v.dtype) for k, v in plain.items()}


def test_a_bf16_run_is_published_and_asked(world, aligned, tmp_path, capsys):  # noqa: F811
    """model/ is the dequantized base plus the adapter, rounded once to bf16. Here and in transformers its logits differ
    from the unrounded ones by a few roundings of 2^-9."""
    out = tmp_path / "run"
    run("sft", world, out, init=str(aligned), bits=4, dtype="bf16", lr=0.02, template="vicuna_v1", **LORA)
    exact = llava.load_model(init=aligned, dtype=None)[0]
    our_peft.load_adapter(exact, out / "adapter")                                 # quantises, for the adapter says so
    state = lora.merge_state(exact.state_dict(), lora.scales(exact), torch.float64)
    plain = llava.load_model(init=aligned)[0].state_dict()
    moved, published = [n for n in state if (state[n] - plain[n]).abs().max() > 0.01], load_file(
        out / "model" / "model.safetensors")
    assert len(moved) >= LINEARS and {x.dtype for x in published.values()} == {torch.bfloat16}
    assert all(torch.equal(published[n], x.float().bfloat16()) for n, x in state.items())
    whole = VLM(exact.cfg).double()
    whole.load_state_dict(state)
    true = all_logits(whole, BATCH)
    for dtype, gate in (("fp32", 0.03), ("bf16", 0.05)):
        said = all_logits(generate.Chat(out / "model", "cpu", dtype).model, BATCH).double()
        assert 0 < (said - true).norm() <= gate * true.norm()
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 0, "text": "What is this?", "answer": "a cat"}))
    said = []
    for part in ("model", "adapter"):
        evaluation.main(evaluation.Settings(model=str(out / part), data=str(tmp_path / "q.jsonl"), device="cpu",
                                            dtype="bf16", max_new_tokens=6, answers=str(tmp_path / part)))
        said.append(json.loads((tmp_path / part).read_text())["text"])
    assert said[0] == said[1]
    T = pytest.importorskip("transformers")
    there = T.LlavaForConditionalGeneration.from_pretrained(out / "model", dtype="auto")
    assert there.dtype == torch.bfloat16
    other = their_logits(there, [example(1), example(2, images=2, text=14)], exact.cfg.vision, torch.bfloat16).double()
    assert (other - true).norm() <= 0.05 * true.norm()
