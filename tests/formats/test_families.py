"""Families beside LLaVA: folders of transformers are read, compared in float64, written, and opened by transformers."""

import functools
import json

import numpy as np
import pytest
import torch
from conftest import error, example, make_tokenizer
from family_checks import check_greedy, check_logits, check_return, save_folder
from PIL import Image
from test_llava import random
from test_model import PARITY, all_logits, pixels

from data import pack
from formats import card, gguf, llava
from formats.tensors import tensor_digest
from generate import Chat
from parts.spans import span_ends

T = pytest.importorskip("transformers")
SIGLIP = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=2, image_size=8, patch_size=4, vision_use_head=False)
TEXT = dict(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=4)
NORMAL = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3,
          "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 8, "width": 8}}


def exact_norms(model):
    """transformers computes RMSNorm in fp32 even in a float64 model, and keeps Gemma's sqrt(C) in fp32."""
    def forward(m, x):
        eps = getattr(m, "variance_epsilon", getattr(m, "eps", None))
        scale = m.weight + type(m).__name__.startswith("Gemma")
        return scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    for m in model.modules():
        if type(m).__name__.endswith("RMSNorm"):
            m.forward = functools.partial(forward, m)
        if hasattr(m, "scalar_embed_scale"):
            m.embed_scale = torch.tensor(m.scalar_embed_scale, dtype=torch.float64)
    return model


def paligemma(text):
    c = T.PaliGemmaConfig(vision_config=SIGLIP, text_config=text, projection_dim=32, hidden_size=32,
                          image_token_index=3, tie_word_embeddings=text["model_type"] == "gemma")
    return T.PaliGemmaForConditionalGeneration(c), {**NORMAL, "image_processor_type": "SiglipImageProcessor",
                                                    "image_seq_length": 4}


CASES = {"paligemma": lambda: paligemma(TEXT | {"model_type": "gemma"}),
         "pali3": lambda: paligemma(TEXT | {"model_type": "llama", "use_bidirectional_attention": True})}


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    """-> name of the case, its folder as transformers writes it, their model in float64, our model, our Folder"""
    at = tmp_path_factory.mktemp(request.param)
    theirs, pre = CASES[request.param]()
    random(theirs).save_pretrained(at)
    make_tokenizer(at)
    (at / "preprocessor_config.json").write_text(json.dumps(pre))
    mine, folder = llava.load_model(init=at, dtype=torch.float64)
    return request.param, at, exact_norms(theirs.double().eval()), mine, folder


def card_answers(out, cfg, monkeypatch, processor=None):
    """Run the code of the model card in our folder -> the first 8 tokens of its answer, those of our Chat"""
    Image.new("RGB", (40, 22), "red").save(out / "image.png")
    monkeypatch.chdir(out)
    processor = processor or T.AutoProcessor.from_pretrained(out, backend="pil")
    monkeypatch.setattr(T.AutoProcessor, "from_pretrained", lambda folder: processor)
    code, found = card.use(cfg).removeprefix("```python\n").removesuffix("\n```"), {}
    exec(code.replace("max_new_tokens=64", "max_new_tokens=8"), found)
    asked = Chat(out, device="cpu", dtype="fp32")
    theirs = [i for i in found["answer"].tolist() if i not in asked.stop_ids]
    return asked.tok.decode(theirs).strip(), asked.ask("image.png", "What is this?", 8)


EXAMPLES = [example(1), example(2, images=0, text=14), example(3, images=3, text=5)]


def their_logits(model, mine, ids, labels, images):
    """One document -> its logits (N, V), by one call"""
    first = next((n for n, y in enumerate(labels) if y >= 0), len(ids))
    kind = (torch.arange(len(ids)) >= first).long()[None]
    seen = {"pixel_values": pixels(images, mine.cfg.vision).double()} if len(images) else {}
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), token_type_ids=kind, attention_mask=torch.ones_like(kind),
                     **seen).logits[0]


def test_logits_are_those_of_transformers(family):
    _, _, theirs, mine, _ = family
    true = torch.cat([their_logits(theirs, mine, *e) for e in EXAMPLES])
    check_logits(mine, pack(EXAMPLES, 8, span_ends(mine.cfg)), true)


def test_greedy_tokens_are_those_of_transformers(family):
    _, _, theirs, mine, _ = family
    for ids, _, images in EXAMPLES:
        seen = {"pixel_values": pixels(images, mine.cfg.vision).double()} if len(images) else {}
        seen["token_type_ids"] = torch.zeros(1, len(ids), dtype=torch.long)
        check_greedy(theirs, mine, ids, images, seen)


def test_tensors_return_bit_equal(family, tmp_path):
    _, at, _, mine, folder = family
    there, here = check_return(at, mine, folder, tmp_path / "out")
    assert sorted(map(tensor_digest, here.values())) == sorted(map(tensor_digest, there.values()))


def test_transformers_opens_our_folder(family, tmp_path):
    """No missing or unexpected tensors; its processor gives our ids and pixels; equal logits and answers."""
    _, at, theirs, mine, folder = family
    out = tmp_path / "out"
    llava.save_model(out, mine.state_dict(), mine.cfg, folder, folder.meta["template"], "", "squash", torch.float32)
    model, info = type(theirs).from_pretrained(out, output_loading_info=True, dtype=torch.float64,
                                               attn_implementation="sdpa")
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model = exact_norms(model.eval())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (11, 17, 3), dtype=np.uint8))
    asked = Chat(out, device="cpu", dtype="fp64")
    shown, blocks = asked.look([image])
    prompt = asked.prompt([("<image>What is this?", None)], blocks)
    processor = T.AutoProcessor.from_pretrained(out, backend="pil")
    there = processor(images=image, text="<image>What is this?", return_tensors="pt")
    assert there["input_ids"][0].tolist() == prompt.tolist()
    assert (there["pixel_values"] - pixels(shown[0], mine.cfg.vision)).abs().max() < 1e-6
    with torch.no_grad():
        batch = pack([(prompt.tolist(), [-100] * len(prompt), shown[0])], 8, span_ends(mine.cfg))
        true = model(**{k: x for k, x in there.items() if k != "labels"} | {
            "pixel_values": pixels(shown[0], mine.cfg.vision).double()}).logits[0]
        assert (all_logits(asked.model, batch) - true).abs().max() < PARITY * true.abs().max()
    there.pop("labels", None)
    out = model.generate(**there | {"pixel_values": pixels(shown[0], mine.cfg.vision).double()}, max_new_tokens=6,
                         do_sample=False)[0, len(prompt):]
    answer = asked.tok.decode([i for i in out.tolist() if i != asked.tok.eos])
    assert asked.answers([prompt], shown, 6) == [answer.strip()] != [""]


def test_gguf_is_refused_in_one_line(family, tmp_path):
    assert "llama.cpp's LLaVA cannot hold this model" in error(gguf.export, family[1], tmp_path / "gguf", "f16")


def test_the_code_of_the_card_runs(family, tmp_path, monkeypatch):
    _, _, _, mine, folder = family
    out = save_folder(mine, folder, tmp_path / "out")
    theirs, ours = card_answers(out, mine.cfg, monkeypatch)
    assert theirs == ours != ""
