"""An adapter is a model to sample.py and eval.py: its base with the adapter merged, asked as it was trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import example, make_tokenizer, tiny_vlm
from PIL import Image
from safetensors.torch import load_file
from test_llava import EXAMPLES, error
from test_lora import mark_of, say, trained
from test_model import exact_norms, their_logits
from test_stages import LORA, aligned, halves_agree, run, signals, world  # noqa: F401  (fixtures: world, stage 1)
from test_weights import spelt_as_llava

import eval
import generate
import lora
import sample
import train_sft
from data import pack
from formats import gguf as gguf_export, llava, peft as our_peft

TURNS, BATCH = [("<image>\nWhat is this?", None)], pack([example(1), example(2, images=2, text=14)], 8)


def publish(out, model, template="vicuna_v1", system=None, dtype=torch.float64):
    """A whole folder around a model of conftest's shape -> out"""
    tok = llava.chat.Tokenizer(make_tokenizer(out.with_name(f"{out.name}_tok")))
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
    lora.apply(model, 4, 8.0, 0.0, "all-linear", seed)
    torch.manual_seed(seed)
    for n, p in model.named_parameters():
        if "lora_B" in n or "projector" in n:
            p.data = 0.2 * torch.randn(p.shape)                               # in fp32, which is what a file holds
    our_peft.save_adapter(out, trained(model), 4, 8.0, 0.0, base, mark_of(model), about)
    return model.double()


def picture():
    return torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def same(a, b, gate=0.0):
    """Two Chats: equal logits, prompts and greedy words"""
    assert (say(a.model, BATCH) - say(b.model, BATCH)).abs().max() <= gate
    words = [s.answers([s.prompt(TURNS, 1)], [picture()], 12)[0] for s in (a, b)]
    assert words[0] == words[1] != "" and a.prompt(TURNS, 1).tolist() == b.prompt(TURNS, 1).tolist()
    return words[0]


def test_ours_answers_as_the_merged_model_and_is_asked_as_it_was_trained(base, tmp_path):
    about = dict(template="chatml", system="Be brief.", image_aspect="crop", bits=16)
    model = make(tmp_path / "adapter", base, **about)
    plain = tiny_vlm()
    plain.load_state_dict(lora.merge_state(model.state_dict(), lora.scales(model)))
    merged = generate.Chat(publish(tmp_path / "merged", plain, "chatml", "Be brief."), "cpu", "fp64")
    ours = generate.Chat(str(tmp_path / "adapter"), "cpu", "fp64")
    same(ours, merged)
    assert (ours.template, ours.system, ours.spec.aspect) == ("chatml", "Be brief.", "crop")
    assert (say(ours.model, BATCH) - say(generate.Chat(base, "cpu", "fp64").model, BATCH)).abs().max() > 1
    ours = generate.Chat(tmp_path / "adapter", "cpu", "fp64", "mistral", "")    # who asks has the last word
    assert (ours.template, ours.system) == ("mistral", "")
    low = generate.Chat(tmp_path / "adapter", "cpu", "bf16").model              # rounded once, after merging
    for (k, p), q in zip(low.state_dict().items(), plain.state_dict().values(), strict=True):
        assert p.dtype == torch.bfloat16
        assert "layers" in k and "language" in k or torch.equal(p, q.bfloat16())


@pytest.mark.parametrize("how", [{}, dict(use_rslora=True), dict(use_dora=True), dict(use_dora=True, use_rslora=True)],
                         ids=lambda how: "+".join(how) or "plain")
def test_pefts_answers_as_peft_and_as_what_peft_merges(base, tmp_path, how):
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
    assert (say(ours.model, pack(EXAMPLES, 8)) - true).abs().max() <= gate
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
        assert (say(wrong, pack(EXAMPLES, 8)) - true).abs().max() > 1e6 * gate


def test_a_template_that_nobody_tells_is_guessed_aloud(base, tmp_path, capsys):
    """transformers would take the folder's own chat template, which need not be LLaVA-1.5's."""
    folder = shutil.copytree(base, tmp_path / "theirs")
    generate.Chat(folder, "cpu", "fp64")
    assert capsys.readouterr() == ("", "")                                    # ours says how it was trained
    (folder / "pumice.json").unlink()
    assert generate.Chat(folder, "cpu", "fp64", "chatml").template == "chatml" and capsys.readouterr() == ("", "")
    assert generate.Chat(folder, "cpu", "fp64").template == "vicuna_v1"
    out, said = capsys.readouterr()
    assert out == "" and said.startswith(f"note: {folder} does not say by which template it was trained: asked by "
                                         "vicuna_v1; --template= of plain, vicuna_v1, ") and said.count("\n") == 1


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_base_that_is_another_or_gone_is_one_line(base, tmp_path, monkeypatch):
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


def test_sample_and_eval_take_it_and_what_wants_a_whole_model_says_so(base, tmp_path, capsys):
    run = tmp_path / "run"
    make(run / "adapter", base, template="vicuna_v1", system=None, image_aspect="pad", bits=16)
    Image.new("RGB", (9, 12), (200, 30, 90)).save(tmp_path / "0.png")
    question = {"question_id": 0, "image": "0.png", "text": "What is this?", "answer": "a cat"}
    (tmp_path / "q.jsonl").write_text(json.dumps(question))
    how = dict(model=str(run / "adapter"), device="cpu", dtype="fp64", max_new_tokens=5)
    sample.main(sample.Settings(image=str(tmp_path / "0.png"), prompt="What is this?", **how))
    said = capsys.readouterr().out
    eval.main(eval.Settings(data=str(tmp_path / "q.jsonl"), **how))
    assert json.loads((run / "answers_seeing.jsonl").read_text())["text"] + "\n" == said
    assert {p.name for p in run.iterdir()} == {"adapter", "answers_seeing.jsonl", "report_seeing.html"}
    want = f"{run / 'adapter'} holds an adapter, where a whole model is wanted: merged, it is the model/ of its run"
    assert want in error(gguf_export.export, run / "adapter", "", "f16")
    assert want in error(train_sft.main, train_sft.Settings(init=str(run / "adapter"), out=str(tmp_path / "o"),
                                                            device="cpu", data=str(tmp_path / "q.jsonl")))
    shutil.copytree(base, run / "model")                                      # runs/x stays its model/
    assert torch.equal(say(generate.Chat(run, "cpu", "fp64").model, BATCH),
                       say(generate.Chat(base, "cpu", "fp64").model, BATCH))


# ---- what it was trained on -----------------------------------------------------------------------------------------

def original(out, aligned, world):  # noqa: F811
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
def test_one_that_peft_has_no_base_for_says_so_and_is_read_here(base, world, aligned, tmp_path, capsys):  # noqa: F811
    """Of two towers there was no LLaVA before it was trained; of those of the LLaVA repository PEFT reads none."""
    at = original(tmp_path / "original", aligned, world) if base == "original" else ""
    run("sft", world, tmp_path / "run", **({"init": str(at)} if at else {"connector": base}), **LORA)
    out = tmp_path / "run" / "adapter"
    assert f"{out} is for sample.py and eval.py: PEFT would put it on" in capsys.readouterr().out
    card, c, says = (out / "README.md").read_text(), *(json.loads((out / f"{n}.json").read_text())
                                                       for n in ("adapter_config", "pumice"))
    assert "PEFT would put it on a LLaVA folder of transformers" in card and "```" not in card
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


@pytest.mark.parametrize("bits", [16, 4])
def test_the_card_of_an_adapter_says_how_peft_reads_it(bits, world, aligned, tmp_path, monkeypatch,  # noqa: F811
                                                       capsys):
    pytest.importorskip("peft")
    run("sft", world, tmp_path / "run", init=str(aligned), bits=bits, template="vicuna_v1", **LORA)
    out = tmp_path / "run" / "adapter"
    assert "is for sample.py and eval.py" not in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "over align; the template is `vicuna_v1`" in card and "library_name: peft" in card
    assert ("four bits" in card) == (bits == 4) and str(tmp_path) not in card
    monkeypatch.chdir(out)
    names = {}
    exec(card.split("```python\n")[1].split("```")[0].replace('"auto"', '"float64"'), names)
    there, ours = names["model"].eval(), generate.Chat(tmp_path / "run/model", "cpu", "fp64")
    true, mine = their_logits(exact_norms(there), EXAMPLES, ours.cfg.vision), say(ours.model, pack(EXAMPLES, 8))
    assert (mine - true).abs().max() <= (2e-3 if bits == 16 else 1) * true.abs().max()        # model/ is in fp16


def test_names_of_the_hub_are_looked_up_for_adapters_too(base, tmp_path, monkeypatch, capsys):
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


def test_a_base_by_its_name_on_the_hub_stays_one(world, aligned, tmp_path, monkeypatch):  # noqa: F811
    """A place in this machine's cache would be nobody else's."""
    shutil.copytree(aligned / "model", tmp_path / "hub/models--me--base/snapshots/abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run("sft", world, tmp_path / "run", init="me/base", steps=1, **LORA)
    out = tmp_path / "run" / "adapter"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"
    assert "library_name: peft\nbase_model: me/base\n" in (out / "README.md").read_text()
    halves_agree(*(generate.Chat(tmp_path / "run" / part, "cpu", "fp32") for part in ("adapter", "model")))
