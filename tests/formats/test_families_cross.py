"""VipLlava and Idefics: folders that transformers wrote, read, compared in float64, written, opened by transformers."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from conftest import error, example, make_tokenizer
from family_checks import check_greedy, check_logits, check_return
from PIL import Image
from test_families import NORMAL, TEXT, card_answers, exact_norms
from test_llava import random
from test_model import PARITY, all_logits, pixels
from tiny_runs import run

import chat
from data import pack
from formats import gguf, llava
from generate import Chat
from parts.cross_attention import last_image
from parts.spans import span_ends

T = pytest.importorskip("transformers")
FAKE = "<fake_token_around_image>"
CLIP = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=2, image_size=8, patch_size=4)


def vipllava(layers=(-2, 1, -1)):
    c = T.VipLlavaConfig(vision_config=CLIP, text_config=TEXT | {"model_type": "llama"}, image_token_index=3,
                         vision_feature_layer=list(layers), image_seq_length=4)
    return T.VipLlavaForConditionalGeneration(c), NORMAL | {
        "image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "size": {"shortest_edge": 8},
        "crop_size": {"height": 8, "width": 8}}


def idefics(**fields):
    """The token FAKE, the last of the tokenizer, is in the second vocabulary"""
    llm = {k: x for k, x in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}
    vision = {k: x for k, x in CLIP.items() if k not in ("model_type", "hidden_size")} | {"embed_dim": 32}
    c = T.IdeficsConfig(**llm | {"vocab_size": 490, "num_hidden_layers": 4} | fields, additional_vocab_size=22,
                        cross_layer_interval=2, use_resampler=True, vision_config=vision, image_token_id=3,
                        perceiver_config=dict(use_resampler=True, resampler_n_latents=3, resampler_depth=2,
                                              resampler_n_heads=2, resampler_head_dim=6,
                                              qk_layer_norms_perceiver=fields.get("qk_layer_norms", False)))
    return T.IdeficsForVisionText2Text(c), {k: x for k, x in NORMAL.items() if k != "size"} | {
        "image_processor_type": "IdeficsImageProcessor", "image_size": 8}


CASES = {"vipllava": vipllava, "vipllava, one layer": lambda: vipllava((-2,)), "idefics": idefics,
         "idefics 80b": lambda: idefics(qk_layer_norms=True, alpha_type="vector", vocab_size=690),
         "idefics, tied": lambda: idefics(tie_word_embeddings=True)}
ONLY_IDEFICS = pytest.mark.parametrize("family", [c for c in CASES if c.startswith("idefics")], indirect=True)


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    """-> name of the case, its folder as transformers writes it, their model in float64, our model and Folder"""
    at = tmp_path_factory.mktemp("family")
    theirs, pre = CASES[request.param]()
    random(theirs).save_pretrained(at)
    kind = "pieces" if request.param == "idefics 80b" else "bytes"
    tok = tokenizers.Tokenizer.from_file(str(make_tokenizer(at, kind) / "tokenizer.json"))
    tok.add_special_tokens([FAKE])
    tok.save(str(at / "tokenizer.json"))
    (at / "preprocessor_config.json").write_text(json.dumps(pre))
    mine, folder = llava.load_model(init=at, dtype=torch.float64)
    return request.param, at, exact_norms(theirs.double().eval()), mine, folder


def examples(mine):
    """One image, none, three; Idefics has one token per image, and text between the three"""
    Q = mine.cfg.image_tokens
    three = example(3, images=3, text=9, model_patches=Q)
    if Q == 1:
        three = [1, 3, 7, 3, 8, 9, 3, *three[0][4:]], [-100] * 3 + three[1], three[2]
    return [example(1, model_patches=Q), example(2, images=0, text=14), three]


def seen(mine, ids, images):
    """-> further arguments of their model for one document"""
    values = pixels(images, mine.cfg.vision).double()
    if mine.cfg.text.model_type != "idefics":
        return {"pixel_values": values} if len(images) else {}
    lo, hi = last_image(torch.tensor(ids) == 3, torch.arange(len(ids)), 1)
    n = max(1, len(images))                                      # without images, transformers wants a black one
    mask = (lo[:, None] <= torch.arange(n)) & (torch.arange(n) < hi[:, None])
    return {"pixel_values": values[None] if len(images) else torch.zeros(1, 1, 3, 8, 8, dtype=torch.float64),
            "image_attention_mask": mask[None]}


def their_logits(theirs, mine, ids, images):
    with torch.no_grad():
        return theirs(input_ids=torch.tensor([ids]), **seen(mine, ids, images)).logits[0]


def test_logits_are_those_of_transformers(family):
    _, _, theirs, mine, _ = family
    true = torch.cat([their_logits(theirs, mine, ids, images) for ids, _, images in examples(mine)])
    check_logits(mine, pack(examples(mine), 8, span_ends(mine.cfg)), true)


def test_greedy_tokens_are_those_of_transformers(family):
    _, _, theirs, mine, _ = family
    for ids, _, images in examples(mine):
        check_greedy(theirs, mine, ids, images, seen(mine, ids, images))


def test_tensors_return_bit_equal(family, tmp_path):
    _, at, _, mine, folder = family
    there, here = check_return(at, mine, folder, tmp_path / "out")
    assert sum(x.numel() for x in here.values()) == sum(x.numel() for x in there.values())


def opened(family, tmp_path):
    """-> our folder; their model and processor, opened from it"""
    _, _, theirs, mine, folder = family
    out = tmp_path / "out"
    meta = folder.meta
    llava.save_model(out, mine.state_dict(), mine.cfg, folder, meta["template"], meta["system"], meta["image_aspect"],
                     torch.float32)
    model, info = type(theirs).from_pretrained(out, output_loading_info=True, dtype=torch.float64,
                                               attn_implementation="sdpa")
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return out, exact_norms(model.eval()), T.AutoProcessor.from_pretrained(out, backend="pil")


def test_transformers_opens_our_folder(family, tmp_path):
    """No missing or unexpected tensors; its processor gives our ids, pixels and image masks; equal logits"""
    name, _, _, mine, _ = family
    out, model, processor = opened(family, tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (11, 17, 3), dtype=np.uint8))
    asked = Chat(out, device="cpu", dtype="fp64")
    shown, blocks = asked.look([image] * 2)
    if name.startswith("idefics"):
        prompt = asked.prompt([("<image><image>What is this?", "a cat"), ("Is it black?", None)], blocks)
        said = "What is this?\nAssistant: a cat\nUser: Is it black?\nAssistant:"
        there = processor(text=[["User:", image, image, said]], return_tensors="pt")
        mask = seen(mine, prompt.tolist(), torch.cat(shown))["image_attention_mask"]
        assert torch.equal(there["image_attention_mask"].bool(), mask)
    else:
        prompt = asked.prompt([("<image>\n<image>\nWhat is this?", "a cat"), ("Is it black?", None)], blocks)
        text = processor.apply_chat_template([
            {"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
            {"role": "user", "content": [{"type": "text", "text": "Is it black?"}]}], add_generation_prompt=True)
        assert text.count("A chat between a curious human") == 1 and text.endswith("Is it black?###Assistant:")
        there = processor(images=[image] * 2, text=text, return_tensors="pt")
    assert there["input_ids"][0].tolist() == prompt.tolist()
    values = pixels(torch.cat(shown), mine.cfg.vision)
    assert (there["pixel_values"].view(values.shape) - values).abs().max() < 1e-6
    with torch.no_grad():
        batch = pack([(prompt.tolist(), [-100] * len(prompt), torch.cat(shown))], 8, span_ends(mine.cfg))
        true = model(**there | {"pixel_values": values.double().view(there["pixel_values"].shape)}).logits[0]
        assert (all_logits(asked.model, batch) - true).abs().max() < PARITY * true.abs().max()


@ONLY_IDEFICS
def test_text_alone_as_in_its_processor(family, tmp_path):
    """Idefics' processor gives a black image and no sight of it"""
    out, model, processor = opened(family, tmp_path)
    asked = Chat(out, device="cpu", dtype="fp64")
    there = processor(text=[["User: What is this?\nAssistant:"]], return_tensors="pt")
    prompt = asked.prompt([("What is this?", None)])
    assert there["input_ids"][0].tolist() == prompt.tolist()
    with torch.no_grad():
        true = model(**there | {"pixel_values": there["pixel_values"].double()}).logits[0]
        mine = all_logits(asked.model, pack([(prompt.tolist(), [-100] * len(prompt), [])], 8))
    assert (mine - true).abs().max() < PARITY * true.abs().max()


def test_gguf_is_refused_in_one_line(family, tmp_path):
    assert "llama.cpp's LLaVA cannot hold this model" in error(gguf.export, family[1], tmp_path / "gguf", "f16")


def test_the_code_of_the_card_runs(family, tmp_path, monkeypatch):
    out, _, _ = opened(family, tmp_path)
    theirs, ours = card_answers(out, family[3].cfg, monkeypatch)
    assert theirs == ours != ""


@pytest.mark.parametrize("family", ["vipllava", "idefics"], indirect=True)
@pytest.mark.parametrize("how", ({}, dict(lora_r=2, lora_dropout=0.0)), ids=("whole", "lora"))
def test_a_published_folder_trains_on(family, how, world, tmp_path):
    """The run has a folder of the same family; with LoRA, its adapter and the folder give the same model"""
    name, at, theirs, mine, _ = family
    image_aspect = "squash" if name == "idefics" else "crop"
    assert run("sft", world, tmp_path / "sft", init=str(at), image_aspect=image_aspect, **how) is None
    model, folder = llava.load_model(init=tmp_path / "sft", dtype=torch.float32)
    assert json.loads((tmp_path / "sft" / "model" / "config.json").read_text())["model_type"] == name
    assert folder.meta["template"] == {"idefics": "idefics", "vipllava": "llava_v0"}[name]
    _, info = type(theirs).from_pretrained(tmp_path / "sft" / "model", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, mine.get_parameter(n).float())]
    assert moved and ("language_model.model.layers.0.self_attn.q_proj.weight" in moved)
    if how:
        adapter = Chat(tmp_path / "sft" / "adapter", "cpu", "fp32").model
        pairs = zip(adapter.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(a.half(), b.half()) for a, b in pairs)        # model/ is in fp16


def changed(at, tmp_path, file, **values):
    """A copy of a folder with other values in one of its configs"""
    for f in at.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    c = json.loads((at / file).read_text())
    (tmp_path / file).write_text(json.dumps(c | values))
    return tmp_path


def test_what_is_not_supported_stops_in_one_line(family, tmp_path):
    name, at, *_ = family
    cases = {"use_resampler": False, "cross_layer_interval": 3} if name.startswith("idefics") else {
        "vision_feature_layer": [-9, 1], "projector_hidden_act": "relu"}
    for key, value in cases.items():
        assert error(llava.load_model, init=changed(at, tmp_path, "config.json", **{key: value}))


@ONLY_IDEFICS
def test_tokens_of_idefics_prompts(family):
    """Adjacent images share a fake token, images with text between them do not"""
    folder = family[4]
    fake = folder.tok.id(FAKE)
    ids, labels = chat.encode(folder.tok, "idefics", [("<image><image> and <image>", "a cat")], [[3]] * 3)
    assert [i for i in ids if i in (3, fake)] == [fake, 3, fake, 3, fake, fake, 3, fake]
    assert folder.tok.decode([y for y in labels if y >= 0]).lstrip(" ") == "a cat\n"


@pytest.mark.parametrize("family", [c for c in CASES if c.startswith("vipllava")], indirect=True)
def test_without_the_blocks_after_the_last_layer(family, tmp_path):
    """A tower that ends at its last feature layer, without a last norm: -2 of three blocks becomes 2"""
    name, at, theirs, mine, folder = family
    _, model, _ = opened((name, at, theirs, mine, folder._replace(unused={})), tmp_path)
    assert model.config.vision_feature_layer == ([-2, 1, -1] if mine.cfg.vision.depth == 3 else 2)
    ids, _, images = examples(mine)[2]
    true = their_logits(theirs, mine, ids, images)
    assert (their_logits(model, mine, ids, images) - true).abs().max() < PARITY * true.abs().max()


@ONLY_IDEFICS
def test_a_new_model_has_one_vocabulary(family, tmp_path):
    """Made of parts, from a tower without a last norm"""
    name, at, theirs, mine, folder = family
    cfg = copy.deepcopy(mine.cfg)
    cfg.text.base_vocab = 32000
    out, model, _ = opened((name, at, theirs, SimpleNamespace(cfg=cfg, state_dict=mine.state_dict),
                            folder._replace(unused={})), tmp_path)
    assert model.config.additional_vocab_size == 0
    ids, _, images = examples(mine)[0]
    true = their_logits(theirs, mine, ids, images)
    assert (their_logits(model, mine, ids, images) - true).abs().max() < PARITY * true.abs().max()
    again, _ = llava.load_model(init=out, dtype=torch.float64)
    assert again.cfg.image_token_index == 3 and again.cfg.text.base_vocab == cfg.text.vocab_size
