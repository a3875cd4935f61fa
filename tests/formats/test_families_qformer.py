"""Folders of BLIP-2 and InstructBLIP, as test_families.py has others. Their processors put the image first, without a
marker in the text; InstructBLIP's gives words for the Q-Former, too."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import error, example, make_tokenizer
from family_checks import check_greedy, check_logits, check_return, save_folder
from PIL import Image
from test_families import TEXT, card_answers, exact_norms
from test_llava import random, towers  # noqa: F401  (a fixture)
from test_model import PARITY, all_logits, pixels

from data import pack
from formats import gguf, llava
from generate import Chat
from parts import instruct

T = pytest.importorskip("transformers")
EVA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)
QFORMER = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, vocab_size=50)
OPT = dict(vocab_size=2048, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1,
           eos_token_id=2, pad_token_id=4, max_position_embeddings=64)
PRE = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3,
       "image_processor_type": "BlipImageProcessor", "size": {"height": 8, "width": 8},
       "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
Q = 3                                                             # queries; the tower has 5 tokens per image


def blip2(text):
    config = T.Blip2Config(vision_config=EVA, qformer_config=QFORMER, text_config=text, num_query_tokens=Q,
                           image_token_index=3, attn_implementation="sdpa")
    return T.Blip2ForConditionalGeneration(config)


def instructblip():
    config = T.InstructBlipConfig(vision_config=EVA, qformer_config=QFORMER, num_query_tokens=Q, image_token_index=3,
                                  text_config=TEXT | {"model_type": "llama"}, attn_implementation="sdpa")
    return T.InstructBlipForConditionalGeneration(config)


def bert(folder):
    """A tiny tokenizer of words with [CLS] and [SEP], as BERT's"""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "this", "?", "##s", "cat", "a", "the"]
    tok = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tok.normalizer, tok.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tok.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    folder.mkdir()
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]",
        "sep_token": "[SEP]"}))


CASES = {"instructblip": instructblip, "blip2-opt": lambda: blip2(OPT | {"model_type": "opt"}),
         "blip2-llama": lambda: blip2(TEXT | {"model_type": "llama", "num_key_value_heads": 2})}
EXAMPLES = [example(1, model_patches=Q), example(2, images=0, text=14), example(3, images=3, text=5, model_patches=Q)]


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    """-> folder as transformers writes it, their model in float64, our model, our folder's parts"""
    at = tmp_path_factory.mktemp(request.param)
    theirs = CASES[request.param]()
    random(theirs).save_pretrained(at)
    make_tokenizer(at)
    (at / "preprocessor_config.json").write_text(json.dumps(PRE))
    if request.param == "instructblip":
        bert(at / "qformer_tokenizer")
    mine, folder = llava.load_model(init=at, dtype=torch.float64)
    return at, exact_norms(theirs.double().eval()), mine, folder


def seen(mine, folder, ids, labels, images):
    """One document with images -> what our model sees, what theirs sees"""
    theirs, reader = {"pixel_values": pixels(images, mine.cfg.vision).double()}, instruct.reader(folder, mine.cfg)
    if reader:
        images = reader([(ids, labels)], images)
        theirs["qformer_input_ids"] = images.words.view(len(images), -1)
        assert len(images.words) > 2 * len(images)
    return images, theirs


def their_logits(model, mine, folder, ids, labels, images):
    """One document -> its logits (N, V). Their model cannot do without images: text alone goes to its language model"""
    one = torch.tensor([ids])
    with torch.no_grad():
        if not len(images):
            return model.language_model(input_ids=one, attention_mask=torch.ones_like(one)).logits[0]
        return model(input_ids=one, **seen(mine, folder, ids, labels, images)[1]).logits[0]


def test_logits_are_those_of_transformers(family):
    _, theirs, mine, folder = family
    true = torch.cat([their_logits(theirs, mine, folder, *e) for e in EXAMPLES])
    check_logits(mine, pack(EXAMPLES, 8, reader=instruct.reader(folder, mine.cfg)), true)


def test_greedy_tokens_are_those_of_transformers(family):
    _, theirs, mine, folder = family
    for ids, labels, images in EXAMPLES:
        images, other = seen(mine, folder, ids, labels, images) if len(images) else (images, {})
        check_greedy(theirs if other else theirs.language_model, mine, ids, images, other)


def test_tensors_return_bit_equal(family, tmp_path):
    at, _, mine, folder = family
    there, here = check_return(at, mine, folder, tmp_path / "out")
    assert there.keys() == here.keys() and all(torch.equal(there[k], here[k]) for k in there)


def test_transformers_opens_our_folder(family, tmp_path):
    """No missing or unexpected tensors; its processor gives our ids and pixels; equal logits; it stops where we do."""
    _, theirs, mine, folder = family
    out = tmp_path / "out"
    llava.save_model(out, mine.state_dict(), mine.cfg, folder, folder.meta["template"], "", "squash", torch.float32)
    model, info = type(theirs).from_pretrained(out, output_loading_info=True, dtype=torch.float64)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model = exact_norms(model.double().eval())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (11, 17, 3), dtype=np.uint8))
    asked = Chat(out, device="cpu", dtype="fp64")
    shown, blocks = asked.look([image])
    for question in ("What is this?", ""):
        prompt = asked.prompt([("<image>\n" + question, None)], blocks)
        there = T.AutoProcessor.from_pretrained(out, backend="pil")(images=image, text=question, return_tensors="pt")
        assert there["input_ids"][0].tolist() == prompt.tolist()
        assert (there["pixel_values"] - pixels(shown[0], mine.cfg.vision)).abs().max() < 1e-6
        if asked.reader:
            words = asked.reader([(prompt.tolist(), [])], shown[0]).words
            assert there["qformer_input_ids"][0].tolist() == words.tolist() and len(words) == (6 if question else 2)
        with torch.no_grad():
            batch = pack([(prompt.tolist(), [-100] * len(prompt), shown[0])], 8, reader=asked.reader)
            true = model(**{**there, "pixel_values": pixels(shown[0], mine.cfg.vision).double()}).logits[0]
            assert (all_logits(asked.model, batch) - true).abs().max() < PARITY * true.abs().max()
    ends, newline = model.language_model.generation_config.eos_token_id, asked.tok.text("\n")[0][-1]
    if asked.template == "blip":
        assert newline in asked.stop_ids and {newline, asked.tok.eos} == set(ends)
    else:
        assert {ends} == asked.stop_ids == {asked.tok.eos}


def test_gguf_is_refused_in_one_line(family, tmp_path):
    assert "llama.cpp's LLaVA cannot hold this model" in error(gguf.export, family[0], tmp_path / "gguf", "f16")


@pytest.mark.parametrize("family", ["instructblip", "blip2-opt"], indirect=True)      # "blip2-llama" ends at once
def test_the_code_of_the_card_runs(family, tmp_path, monkeypatch):
    _, _, mine, folder = family
    out = save_folder(mine, folder, tmp_path / "out")
    theirs, ours = card_answers(out, mine.cfg, monkeypatch)
    assert theirs == ours != ""


@pytest.mark.parametrize(("part", "change", "says"), [
    ("", {"image_token_index": None}, "without an image_token_index"),
    ("", {"num_query_tokens": 0}, "a Q-Former of 0 queries"),
    ("vision_config", {"qkv_bias": False}, "without qkv_bias"),
    ("qformer_config", {"use_qformer_text_input": True}, "use_qformer_text_input=True"),
    ("qformer_config", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("qformer_config", {"num_attention_heads": 5}, "width 24 with 5 heads"),
    ("qformer_config", {"hidden_size": "wide"}, "hidden_size='wide'"),
    ("text_config", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),           # opt-350m
    ("text_config", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16"),
    ("text_config", {"activation_function": "gelu"}, "hidden_act 'gelu'")])
def test_an_unsupported_config_is_one_line(opt_folder, tmp_path, part, change, says):
    at = shutil.copytree(opt_folder, tmp_path / "x")
    c = json.loads((at / "config.json").read_text())
    (c[part] if part else c).update(change)
    (at / "config.json").write_text(json.dumps(c))
    assert says in error(llava.load_model, init=at)


@pytest.fixture(scope="module")
def opt_folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("opt")
    CASES["blip2-opt"]().save_pretrained(at)
    make_tokenizer(at)
    (at / "preprocessor_config.json").write_text(json.dumps(PRE))
    return at


def test_instructblip_needs_its_second_tokenizer(tmp_path):
    instructblip().save_pretrained(tmp_path / "x")
    make_tokenizer(tmp_path / "x")
    (tmp_path / "x" / "preprocessor_config.json").write_text(json.dumps(PRE))
    assert "without a folder qformer_tokenizer" in error(Chat, tmp_path / "x", device="cpu")


@pytest.mark.parametrize("parts", [
    "connector=resampler tokens=4 connector_args.heads=4",
    "connector=qformer tokens=3 connector_args.hidden_size=24 connector_args.num_hidden_layers=2 "
    "connector_args.num_attention_heads=3 connector_args.intermediate_size=40"])
def test_a_new_connector_on_other_towers_comes_back(towers, tmp_path, parts):
    """CLIP and Llama with a resampler or a Q-Former: no class of transformers holds them, so the folder is pumice's"""
    vision, llm = towers
    mine, folder = llava.load_model(vision, llm, parts=parts)
    Q = mine.cfg.tokens
    llava.save_model(tmp_path / "out", mine.state_dict(), mine.cfg, folder, "vicuna_v1", "", "squash", torch.float32)
    again, _ = llava.load_model(init=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "pumice"
    assert again.cfg == mine.cfg and again.state_dict().keys() == mine.state_dict().keys()
    assert all(torch.equal(x, mine.state_dict()[k]) for k, x in again.state_dict().items())
    assert ("multi_modal_projector.pos_embed" in again.state_dict()) == ("resampler" in parts)
    batch = pack([example(1, model_patches=Q)], 8)
    with torch.no_grad():
        logits = all_logits(mine, batch)
        assert torch.equal(all_logits(again, batch), logits) and logits.isfinite().all()
