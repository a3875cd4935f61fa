"""Families whose images are tiles, InternVL and Fuyu: folders that transformers wrote, read, compared in float64, written
and opened by transformers."""

import json

import numpy as np
import pytest
import torch
from conftest import example, make_tokenizer
from PIL import Image
from safetensors.torch import load_file
from test_families import NORMAL, TEXT, exact_norms
from test_llava import random
from test_model import PARITY, all_logits, pixels

from data import pack
from formats import llava
from generate import Chat, generate
from parts.spans import span_ends

T = pytest.importorskip("transformers")


def add_specials(folder, *names):
    """Add control tokens to the tokenizer in a folder."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    first = max(spec["model"]["vocab"].values()) + 1
    spec["added_tokens"] += [{"id": first + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": True} for i, name in enumerate(names)]
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def internvl(folder, text, **vision):
    """-> a tiny InternVL of transformers; its image processor and its tokenizer are written to `folder`"""
    v = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=[16, 16],
             patch_size=[4, 4])
    c = T.InternVLConfig(vision_config=v | vision, text_config=TEXT | text, image_token_id=3, image_seq_length=4,
                         tie_word_embeddings=text.get("tie_word_embeddings", False))
    make_tokenizer(folder)
    add_specials(folder, "<img>", "</img>")
    pre = NORMAL | {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": False, "max_patches": 5,
                    "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pre))
    return T.InternVLForConditionalGeneration(c)


CASES = {
    "internvl": lambda folder: internvl(folder, {"model_type": "qwen2"}, attention_bias=True),
    "internvl 6b": lambda folder: internvl(folder, {"model_type": "llama"}, use_qk_norm=True, norm_type="rms_norm",
                                           use_mean_pooling=False)}


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    """-> name of the case, its folder as transformers writes it, their model in float64, our model, our folder's parts"""
    at = tmp_path_factory.mktemp("family")
    theirs = random(CASES[request.param](at))
    for n, p in theirs.named_parameters():
        if "lambda_" in n:
            torch.nn.init.normal_(p, mean=1.0, std=0.2)
    theirs.save_pretrained(at)
    mine, folder = llava.load_model(init=at, dtype=torch.float64)
    return request.param, at, exact_norms(theirs.double().eval()), mine, folder


def their_processor(out, monkeypatch):
    """InternVL's own, put together without its video processor, which wants torchvision."""
    monkeypatch.setattr(T.InternVLProcessor, "check_argument_for_proper_class", lambda *_: None)
    told = json.loads((out / "processor_config.json").read_text())
    return T.InternVLProcessor(T.AutoImageProcessor.from_pretrained(out, backend="pil"), T.AutoTokenizer.from_pretrained(out),
                               image_seq_length=told["image_seq_length"])


def examples(cfg):
    return [example(1, side=cfg.vision.image_size), example(2, images=0, text=14),
            example(3, images=3, text=5, side=cfg.vision.image_size)]


def seen(images, cfg):
    """Pixels -> what their model gets for them"""
    return {"pixel_values": pixels(images, cfg.vision).double()} if len(images) else {}


def test_logits_are_those_of_transformers(family):
    _, _, theirs, mine, _ = family
    batch = pack(examples(mine.cfg), mine.cfg.vision.image_size, span_ends(mine.cfg))
    with torch.no_grad():
        true = torch.cat([theirs(input_ids=torch.tensor([ids]), **seen(images, mine.cfg)).logits[0]
                          for ids, _, images in examples(mine.cfg)])
        error = (all_logits(mine, batch) - true).abs().max() / true.abs().max()
    assert error < PARITY and true.std() > 0.05, error


def test_greedy_tokens_are_those_of_transformers(family):
    _, _, theirs, mine, _ = family
    for ids, _, images in examples(mine.cfg):
        one = torch.tensor([ids])
        out = theirs.generate(input_ids=one, attention_mask=torch.ones_like(one), **seen(images, mine.cfg),
                              max_new_tokens=6, do_sample=False, suppress_tokens=[3], eos_token_id=2, pad_token_id=4)
        answer, = generate(mine, [one[0]], images, {2}, 6)
        assert answer == [i for i in out[0, len(ids):].tolist() if i != 2]


def test_tensors_return_bit_equal(family, tmp_path):
    _, at, _, mine, folder = family
    state = llava.load_model(init=at, dtype=None)[0].state_dict()
    llava.save_model(tmp_path / "out", state, mine.cfg, folder, folder.meta["template"], "", "squash", torch.float32)
    there, here = load_file(at / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    again, _ = llava.load_model(init=tmp_path / "out", dtype=torch.float64)
    assert sum(x.numel() for x in here.values()) == sum(x.numel() for x in there.values())
    assert again.cfg == mine.cfg
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), mine.state_dict().values(), strict=True))


def test_transformers_opens_our_folder(family, tmp_path, monkeypatch):
    """No missing or unexpected tensors; its processor gives our ids and pixels; equal logits and greedy tokens."""
    _, at, theirs, mine, folder = family
    out = tmp_path / "out"
    llava.save_model(out, mine.state_dict(), mine.cfg, folder, folder.meta["template"], "", "squash", torch.float32)
    model, told = type(theirs).from_pretrained(out, output_loading_info=True, dtype=torch.float64, attn_implementation="sdpa")
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    model = exact_norms(model.eval())
    asked = Chat(out, device="cpu", dtype="fp64")
    processor = their_processor(out, monkeypatch)
    for n, size in enumerate([(40, 22), (17, 16)]):
        image = Image.fromarray(np.random.default_rng(n).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        shown, blocks = asked.look([image])
        prompt = asked.prompt([("<image>\nWhat is this?", None)], blocks)
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}], tokenize=False,
            add_generation_prompt=True)
        assert text == "<|im_start|>user\n<IMG_CONTEXT>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
        there = processor(images=image, text=text, return_tensors="pt")
        assert there["input_ids"][0].tolist() == prompt.tolist()
        assert (there["pixel_values"] - pixels(shown[0], mine.cfg.vision)).abs().max() < 1e-6
        with torch.no_grad():
            batch = pack([(prompt.tolist(), [-100] * len(prompt), shown[0])], 8, span_ends(mine.cfg))
            true = model(input_ids=there["input_ids"], **seen(shown[0], mine.cfg)).logits[0]
            assert (all_logits(asked.model, batch) - true).abs().max() < PARITY * true.abs().max()
            greedy = model.generate(input_ids=there["input_ids"], attention_mask=there["attention_mask"],
                                    **seen(shown[0], mine.cfg), max_new_tokens=6, do_sample=False)
        answer, = generate(asked.model, [prompt], shown[0], asked.stop_ids, 6, banned=asked.banned)
        assert answer == [i for i in greedy[0, len(prompt):].tolist() if i not in asked.stop_ids]
