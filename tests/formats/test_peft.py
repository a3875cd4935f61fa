"""Adapters in files: PEFT reads ours and we read its; sample.py and eval.py take a folder of one as a model."""

import json
import random as dice
import re
import shutil
import time
from pathlib import Path
from unittest import mock

import clients
import pytest
import torch
from conftest import example, make_tokenizer, tiny_vlm
from PIL import Image
from safetensors.torch import load_file
from test_llava import EXAMPLES, error
from test_lora import digest_of, logits, trained
from test_model import exact_norms, their_logits
from test_weights import spelt_as_llava
from tiny_runs import LORA, halves_agree, run

import eval
import generate
import lora
import sample
import train_sft
from data import pack
from formats import adapter_config, gguf as gguf_export, llava, peft as our_peft, tensors
from formats.tokenizer import Tokenizer

TURNS, BATCH = [("<image>\nWhat is this?", None)], pack([example(1), example(2, images=2, text=14)], 8)


def publish(out, model, template="vicuna_v1", system=None, dtype=torch.float64):
    """A whole folder around a model of conftest's shape -> out"""
    tok = Tokenizer(make_tokenizer(out.with_name(f"{out.name}_tok")))
    pre = {"crop_size": {"height": 8, "width": 8}, "size": {"shortest_edge": 8}, "image_mean": [0.5] * 3}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32}
    folder = llava.Folder(tok, vision, {"model_type": "llama"}, pre, {}, {})
    llava.save_model(out, model.state_dict(), model.cfg, folder, template, system, "pad", dtype)
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """In fp64, so that no rounding hides a difference; with stage 1's template"""
    return publish(tmp_path_factory.mktemp("base") / "model", tiny_vlm(), "plain")


def make(out, base, seed=0, **about):
    """An adapter of ours for a folder, as stage 2 writes it -> the wrapped model"""
    model = llava.load_model(init=base, dtype=None)[0]
    lora.add_adapters(model, 4, 8.0, 0.0, "all-linear", seed)
    torch.manual_seed(seed)
    for n, p in model.named_parameters():
        if "lora_B" in n or "projector" in n:
            p.data = 0.2 * torch.randn(p.shape)                               # in fp32, which is what a file holds
    our_peft.save_adapter(out, trained(model), 4, 8.0, 0.0, base, digest_of(model), about)
    return model.double()


def pixels():
    return torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def same(a, b, gate=0.0):
    """Two Chats: equal logits, prompts and greedy answers"""
    assert (logits(a.model, BATCH) - logits(b.model, BATCH)).abs().max() <= gate
    prompts = [s.prompt(TURNS, [s.layout.block()]) for s in (a, b)]
    answers = [s.answers([prompt], [pixels()[None]], 12)[0] for s, prompt in zip((a, b), prompts)]
    assert answers[0] == answers[1] != "" and prompts[0].equal(prompts[1])
    return answers[0]


def test_an_adapter_answers_as_the_merged_model(base, tmp_path):
    about = dict(template="chatml", system="Be brief.", image_aspect="crop", bits=16)
    model = make(tmp_path / "adapter", base, **about)
    plain = tiny_vlm()
    plain.load_state_dict(lora.merge_state(model.state_dict(), lora.scales(model)))
    merged = generate.Chat(publish(tmp_path / "merged", plain, "chatml", "Be brief."), "cpu", "fp64")
    ours = generate.Chat(str(tmp_path / "adapter"), "cpu", "fp64")
    same(ours, merged)
    assert (ours.template, ours.system, ours.spec.aspect) == ("chatml", "Be brief.", "crop")
    assert (logits(ours.model, BATCH) - logits(generate.Chat(base, "cpu", "fp64").model, BATCH)).abs().max() > 1
    ours = generate.Chat(tmp_path / "adapter", "cpu", "fp64", "mistral", "")    # arguments come first
    assert (ours.template, ours.system) == ("mistral", "")
    low = generate.Chat(tmp_path / "adapter", "cpu", "bf16").model              # rounded once, after merging
    for (k, p), q in zip(low.state_dict().items(), plain.state_dict().values(), strict=True):
        assert p.dtype == torch.bfloat16
        assert "layers" in k and "language" in k or torch.equal(p, q.bfloat16())


@pytest.mark.parametrize("how", [{}, dict(use_dora=True, use_rslora=True)],
                         ids=lambda how: "+".join(how) or "plain")
def test_adapters_of_peft_answer_as_in_peft(base, tmp_path, how):
    peft, T = pytest.importorskip("peft"), pytest.importorskip("transformers")
    there = exact_norms(T.LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float64).eval())
    torch.manual_seed(1)
    there = peft.get_peft_model(there, peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=r".*language_model.*_proj", modules_to_save=["multi_modal_projector"],
        init_lora_weights=False, **how), autocast_adapter_dtype=False).eval()
    for n, p in there.named_parameters():
        if "modules_to_save" in n or "lora_magnitude" in n:
            p.data *= 1 + 0.2 * torch.rand_like(p)
    there.save_pretrained(tmp_path / "adapter")
    ours = generate.Chat(tmp_path / "adapter", "cpu", "fp64")
    true = their_logits(there, EXAMPLES, ours.cfg.vision)
    gate = 1e-10 * max(1, true.abs().max())
    assert (logits(ours.model, pack(EXAMPLES, 8)) - true).abs().max() <= gate
    assert ours.template == "plain" and ours.spec.aspect == "pad"             # nothing but the base says how to ask
    there.merge_and_unload().save_pretrained(tmp_path / "merged")
    for file in base.iterdir():
        if not (tmp_path / "merged" / file.name).exists():
            shutil.copy(file, tmp_path / "merged")
    same(generate.Chat(tmp_path / "adapter", "cpu", "fp64", "vicuna_v1"),
         generate.Chat(tmp_path / "merged", "cpu", "fp64", "vicuna_v1"), gate)
    if how:                                                                   # as plain LoRA it would say other things
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": "use_rslora" not in how}))
        wrong = generate.Chat(tmp_path / "adapter", "cpu", "fp64").model
        assert (logits(wrong, pack(EXAMPLES, 8)) - true).abs().max() > 1e6 * gate


def test_an_unknown_template_is_guessed_with_a_note(base, tmp_path, capsys):
    """transformers would take the folder's own chat template, which need not be LLaVA-1.5's."""
    folder = shutil.copytree(base, tmp_path / "theirs")
    generate.Chat(folder, "cpu", "fp64")
    assert capsys.readouterr() == ("", "")                                    # ours says how it was trained
    (folder / "pumice.json").unlink()
    assert generate.Chat(folder, "cpu", "fp64", "chatml").template == "chatml" and capsys.readouterr() == ("", "")
    assert generate.Chat(folder, "cpu", "fp64").template == "vicuna_v1"
    out, note = capsys.readouterr()
    assert out == "" and note.startswith(f"note: {folder} does not say with which template") and note.count("\n") == 1


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_another_or_no_base_is_one_line(base, tmp_path, monkeypatch):
    make(tmp_path / "adapter", base)
    file = tmp_path / "adapter" / "adapter_config.json"
    publish(tmp_path / "other", tiny_vlm(seed=1))
    rewrite(file, base_model_name_or_path=str(tmp_path / "other"))
    assert "was trained on another base" in error(generate.Chat, tmp_path / "adapter", "cpu", "fp64")
    rewrite(file, base_model_name_or_path="runs/gone")
    line = error(generate.Chat, tmp_path / "adapter", "cpu")
    assert "was trained on runs/gone: base_model_name_or_path in its adapter_config.json says where that lies" in line
    assert line.endswith("runs/gone holds no model: there is no such folder")
    for nothing in (None, ""):
        rewrite(file, base_model_name_or_path=nothing)
        assert f"was trained on {nothing}: base_model_name_or_path" in error(generate.Chat, tmp_path / "adapter", "cpu")
    rewrite(file, base_model_name_or_path=str(tmp_path / "adapter"))          # an adapter over an adapter
    assert "holds an adapter, where a whole model is wanted" in error(generate.Chat, tmp_path / "adapter", "cpu")
    rewrite(file, base_model_name_or_path="here")                             # relative to where the command runs
    monkeypatch.chdir(tmp_path)
    Path("here").symlink_to(base.parent)                                      # and a run is its model/
    generate.Chat("adapter", "cpu", "fp64")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in error(generate.Chat, "adapter", "cpu")


def test_sample_and_eval_take_an_adapter(base, tmp_path, capsys):
    run = tmp_path / "run"
    make(run / "adapter", base, template="vicuna_v1", system=None, image_aspect="pad", bits=16)
    Image.new("RGB", (9, 12), (200, 30, 90)).save(tmp_path / "0.png")
    question = {"question_id": 0, "image": "0.png", "text": "What is this?", "answer": "a cat"}
    (tmp_path / "q.jsonl").write_text(json.dumps(question))
    how = dict(model=str(run / "adapter"), device="cpu", dtype="fp64", max_new_tokens=5)
    sample.main(sample.Settings(image=str(tmp_path / "0.png"), prompt="What is this?", **how))
    printed = capsys.readouterr().out
    eval.main(eval.Settings(data=str(tmp_path / "q.jsonl"), **how))
    assert json.loads((run / "answers_seeing.jsonl").read_text())["text"] + "\n" == printed
    assert {p.name for p in run.iterdir()} == {"adapter", "answers_seeing.jsonl"}
    want = f"{run / 'adapter'} holds an adapter, where a whole model is wanted: merged, it is the model/ of its run"
    assert want in error(gguf_export.export, run / "adapter", "", "f16")
    assert want in error(train_sft.main, train_sft.Settings(init=str(run / "adapter"), out=str(tmp_path / "o"),
                                                            device="cpu", data=str(tmp_path / "q.jsonl")))
    shutil.copytree(base, run / "model")                                      # runs/x stays its model/
    assert torch.equal(logits(generate.Chat(run, "cpu", "fp64").model, BATCH),
                       logits(generate.Chat(base, "cpu", "fp64").model, BATCH))


# ---- adapter_config.json of a stranger ------------------------------------------------------------------------------

PATTERNS = ["q_proj", "layers.1.self_attn.q_proj", r"layers\.1\.self_attn\.q_proj", ".*q_proj", "^lm_head$", "^.*head",
            r"layers\.10\..*", r".*\.up_proj$", "^model.*fc1", r"self_attn\..*q_proj", "lm_head.*", "_proj"]
NAMES = ["model.language_model.layers.1.self_attn.q_proj", "base.layers.10.mlp.up_proj", "lm_head",
         "model.vision_tower.encoder.layers.3.mlp.fc1", "vq_proj", "model.layers.2.mlp.fc2"]


def test_patterns_match_as_in_peft():
    """peft.utils.other.get_pattern_key, for what people write and for random combinations of its parts"""
    g = dice.Random(0)
    cases = [(p, n) for p in PATTERNS for n in NAMES]
    for i in range(3000):
        middle = "".join(g.choices([r"\.", ".*", "a", "b"], k=1 + i % 5))
        cases.append((g.choice(["", "^"]) + middle + g.choice(["", "$"]), "".join(g.choices("ab.", k=i % 7))))
    found = [adapter_config.matches(p, n) for p, n in cases]
    assert found == [bool(re.match(rf"(.*\.)?({p})$", n)) for p, n in cases] and 300 < sum(found) < 2000


@pytest.fixture
def stranger(base, tmp_path):
    """An adapter whose config is to be changed"""
    make(tmp_path / "stranger", base)
    return tmp_path / "stranger"


@pytest.mark.parametrize("pattern", ["(a+)+$", "a|b", "[", ")", "a*", "a**", r"\d", "", "a" * 301])
def test_other_patterns_are_refused(pattern, tmp_path):
    """`re` would take a minute for the first one and raise an error of its own for others."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"rank_pattern": {pattern: 8}}))
    line = error(adapter_config.read_adapter_config, tmp_path)
    assert f"the pattern {pattern!r:.80} in rank_pattern is not supported" in line


def test_the_longest_pattern_takes_no_time():
    """Fifty times `.*` would keep `re` busy for years."""
    began = time.process_time()
    for pattern in ((".*a" * 100)[:300] + "b", ".*" * 150 + "b"):
        assert not adapter_config.matches(pattern, "a" * 2000)
    assert time.process_time() - began < 1


def test_a_lie_about_the_rank_costs_no_memory(base, stranger):
    """Rank 10^6 would allocate a gigabyte, before the tensors do not fit."""
    rewrite(stranger / "adapter_config.json", r=10**6)
    model, seen = llava.load_model(init=base, dtype=None)[0], []
    with mock.patch.object(our_peft, "add_adapters", lambda *a, **k: seen.append(a)):
        assert "does not fit this model" in error(our_peft.load_adapter, model, stranger)
    assert not seen


# ---- the vision tower -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tower, how", [("clip", "whole"), ("dinov2", "lora")])
def test_a_trained_tower_round_trips_through_peft(tower, how, bytes_folder, tmp_path):
    """By LoRA in the tower, and by modules_to_save where all of its weights were trained."""
    peft, T = pytest.importorskip("peft"), pytest.importorskip("transformers")
    tower_base = clients.write(f"{tower}-llama-mlp", tmp_path, bytes_folder)
    model, folder = llava.load_model(init=tower_base, dtype=torch.float32)
    lora.add_adapters(model, 4, 8.0, 0.0, "q_proj,vision_tower.*" if how == "lora" else "q_proj")
    torch.manual_seed(1)
    for n, p in model.named_parameters():
        if ".lora_" in n or "projector" in n or how == "whole" and "vision_tower" in n:
            p.data += 0.1 * torch.randn(p.shape)
            p.requires_grad_()
        else:
            p.requires_grad_(False)
    moved = {n: p for n, p in model.named_parameters() if p.requires_grad}
    base = tensors.base_digest({n: d for n, d in folder.digests.items() if n not in moved})
    about = dict(template="chatml", system="Be brief.", image_aspect="pad", bits=16)
    our_peft.save_adapter(tmp_path / "a", moved, 4, 8.0, 0.0, tower_base, base, about, folder=folder)
    assert T.AutoTokenizer.from_pretrained(tmp_path / "a").eos_token == "<|im_end|>"       # it brings its tokenizer
    there = exact_norms(T.LlavaForConditionalGeneration.from_pretrained(tower_base, dtype=torch.float64).eval())
    before = their_logits(there, EXAMPLES, model.cfg.vision)
    there = peft.PeftModel.from_pretrained(there, tmp_path / "a", autocast_adapter_dtype=False).double().eval()
    true = their_logits(there, EXAMPLES, model.cfg.vision)
    gate = 1e-10 * max(1, true.abs().max())
    assert (true - before).abs().max() > 1e6 * gate
    assert (logits(model.double(), pack(EXAMPLES, 8)) - true).abs().max() <= gate
    again = llava.load_model(init=tower_base, dtype=torch.float32)[0]
    our_peft.load_adapter(again, tmp_path / "a")
    assert all(torch.equal(p, q.double()) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    there.save_pretrained(tmp_path / "theirs")                                # and back from PEFT
    theirs = llava.load_model(init=tower_base, dtype=torch.float64)[0]
    our_peft.load_adapter(theirs, tmp_path / "theirs")
    assert (logits(theirs, pack(EXAMPLES, 8)) - true).abs().max() <= gate
    if how == "whole":                                                        # model/ holds the trained tower, too
        state = lora.merge_state(model.state_dict(), lora.scales(model))
        llava.save_model(tmp_path / "m", state, model.cfg, folder, "chatml", "", "pad", torch.float64)
        plain = T.LlavaForConditionalGeneration.from_pretrained(tmp_path / "m", dtype=torch.float64).eval()
        assert (their_logits(exact_norms(plain), EXAMPLES, model.cfg.vision) - true).abs().max() <= gate


# ---- what it was trained on -----------------------------------------------------------------------------------------

def original(out, aligned, world):
    """The model of a run as the LLaVA repository would have written it -> its folder"""
    out.mkdir()
    tensors = load_file(aligned / "model" / "model.safetensors")
    tensors = {spelt_as_llava(k): x for k, x in tensors.items() if "vision_tower" not in k}
    torch.save(tensors, out / "pytorch_model.bin")
    config = json.loads(Path(world["llm"], "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | dict(
        model_type="llava", mm_vision_tower=world["vision"], mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2, image_aspect_ratio="pad")))
    for file in Path(world["llm"]).glob("tokenizer*"):
        shutil.copy(file, out)
    return out


@pytest.mark.parametrize("base", ["mlp", "linear", "original"])
def test_adapters_without_a_base_for_peft_say_so(base, world, aligned, tmp_path, capsys):
    """Of two towers there was no LLaVA before it was trained; of those of the LLaVA repository PEFT reads none."""
    at = original(tmp_path / "original", aligned, world) if base == "original" else ""
    run("sft", world, tmp_path / "run", **({"init": str(at)} if at else {"connector": base}), **LORA)
    out = tmp_path / "run" / "adapter"
    assert f"{out} is for sample.py and eval.py: PEFT needs a LLaVA" in capsys.readouterr().out
    card, c, says = (out / "README.md").read_text(), *(json.loads((out / f"{n}.json").read_text())
                                                       for n in ("adapter_config", "pumice"))
    assert "PEFT needs a LLaVA folder of transformers as the base" in card and "```" not in card
    assert c["base_model_name_or_path"] == (str(at) if at else None)
    assert [says.get(k) for k in ("vision", "llm")] == ([None] * 2 if at else [world["vision"], world["llm"]])
    ours, whole = (generate.Chat(tmp_path / "run" / part, "cpu", "fp32") for part in ("adapter", "model"))
    halves_agree(ours, whole)
    assert (ours.template, ours.system, ours.spec) == (whole.template, whole.system, whole.spec)
    if not at:
        rewrite(out / "pumice.json", llm="runs/gone")
        assert error(generate.Chat, out, "cpu").endswith(
            f"was trained on {world['vision']} and runs/gone: its pumice.json says where that lies, and runs/gone "
            "holds no model: there is no such folder")


def test_the_card_says_how_peft_reads_it(world, aligned, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    run("sft", world, tmp_path / "run", init=str(aligned), template="vicuna_v1", **LORA)
    out = tmp_path / "run" / "adapter"
    assert "is for sample.py and eval.py" not in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "over align.\nThe template is `vicuna_v1`. " in card and "library_name: peft" in card
    assert "four bits" not in card and str(tmp_path) not in card
    monkeypatch.chdir(out)
    names = {}
    exec(card.split("```python\n")[1].split("```")[0].replace('"auto"', '"float64"'), names)
    there, ours = names["model"].eval(), generate.Chat(tmp_path / "run/model", "cpu", "fp64")
    true, mine = their_logits(exact_norms(there), EXAMPLES, ours.cfg.vision), logits(ours.model, pack(EXAMPLES, 8))
    assert (mine - true).abs().max() <= 2e-3 * true.abs().max()               # model/ is in fp16


def test_adapters_are_found_by_hub_names(base, tmp_path, monkeypatch, capsys):
    """The adapter, and the base that it names; twice, for answers go nowhere where a name could find them."""
    home = tmp_path / "hub"
    make(tmp_path / "adapter", base, template="vicuna_v1")
    rewrite(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="me/base")
    for folder, name in ((tmp_path / "adapter", "adapter"), (base, "base")):
        shutil.copytree(folder, home / f"models--me--{name}" / "snapshots" / "abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    same(generate.Chat("me/adapter", "cpu", "fp64"), generate.Chat(tmp_path / "adapter", "cpu", "fp64"))
    Path("q.jsonl").write_text(json.dumps({"question_id": 0, "text": "What is this?", "answer": "a cat"}))
    for _ in range(2):
        eval.main(eval.Settings(model="me/adapter", data="q.jsonl", device="cpu", dtype="fp64", max_new_tokens=2))
    assert {p.name for p in Path().iterdir()} == {"q.jsonl", "answers"}
    assert Path("answers/adapter/answers_seeing.jsonl").is_file()
    (home / "models--me--adapter/snapshots/abc/adapter_model.safetensors").unlink()           # only its config came
    assert "no such model in" in error(generate.Chat, "me/adapter", "cpu")


def test_a_base_keeps_its_hub_name(world, aligned, tmp_path, monkeypatch):
    """A path into this machine's cache means nothing elsewhere."""
    shutil.copytree(aligned / "model", tmp_path / "hub/models--me--base/snapshots/abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run("sft", world, tmp_path / "run", init="me/base", steps=1, **LORA)
    out = tmp_path / "run" / "adapter"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"
    assert "library_name: peft\nbase_model:\n- me/base\n" in (out / "README.md").read_text()
    halves_agree(*(generate.Chat(tmp_path / "run" / part, "cpu", "fp32") for part in ("adapter", "model")))
