"""Families whose images are tiles, InternVL and Fuyu: folders that transformers wrote, read, compared in float64,
written, and opened by transformers."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import WORDS, error, example, make_tokenizer
from family_checks import check_greedy, check_logits, check_return, save_folder
from PIL import Image
from test_families import NORMAL, TEXT, card_answers, exact_norms
from test_llava import random
from test_model import PARITY, all_logits, pixels

from data import pack
from formats import gguf, llava
from formats.family import published_name
from formats.fuyu import FUYU
from formats.internvl import INTERNVL
from formats.tokenizer import Tokenizer
from generate import Chat, generate
from parts.build import build
from parts.internvit import InternViTConfig
from parts.patches import PatchesConfig
from parts.persimmon import PersimmonConfig
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


def fuyu(folder):
    """-> a tiny Fuyu of transformers with patches of side 6; the same files. Its placeholder is a piece of a Unigram"""
    chars = sorted({c for c in WORDS + "|SPEAKRNWLI<>0x4"} - set(" \n"))
    pieces = ["<unk>", "<s>", "</s>", "|SPEAKER|", "|NEWLINE|", *(f"<0x{i:02X}>" for i in range(256)), "▁", *chars,
              *sorted({"▁" + word for word in WORDS.split()})]
    pieces = list(dict.fromkeys(pieces))
    spec = {"version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None, "post_processor": None,
            "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": True} for i, t in enumerate(pieces[:3])],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {
                "type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": True,
                      "vocab": [[t, -9.0 if len(t) == 1 else -5.0] for t in pieces]}}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "FuyuImageProcessor", "size": {"height": 18, "width": 30}, "image_mean": 0.5,
        "image_std": 0.5, "patch_size": {"height": 6, "width": 6}, "resample": 2}))
    text = {k: x for k, x in TEXT.items() if k not in ("head_dim", "num_key_value_heads")}
    text |= {"model_type": "persimmon", "hidden_act": "relu2"}
    return T.FuyuForCausalLM(T.FuyuConfig(text_config=text, patch_size=6, image_token_id=3))


CASES = {
    "fuyu": fuyu,
    "internvl": lambda folder: internvl(folder, {"model_type": "qwen2"}, attention_bias=True),
    "internvl 6b": lambda folder: internvl(folder, {"model_type": "llama"}, use_qk_norm=True, norm_type="rms_norm",
                                           use_mean_pooling=False)}


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    """-> name of the case, its folder as transformers writes it, their model in float64, our model, our Folder"""
    at = tmp_path_factory.mktemp("family")
    theirs = random(CASES[request.param](at))
    for n, p in theirs.named_parameters():
        if "lambda_" in n:
            torch.nn.init.normal_(p, mean=1.0, std=0.2)
    theirs.save_pretrained(at)
    mine, folder = llava.load_model(init=at, dtype=torch.float64)
    return request.param, at, exact_norms(theirs.double().eval()), mine, folder


def their_processor(out, monkeypatch):
    """The family's own processor, with what torchvision would give"""
    if (out / "chat_template.jinja").exists():                 # InternVL. Its video processor needs torchvision
        monkeypatch.setattr(T.InternVLProcessor, "check_argument_for_proper_class", lambda *_: None)
        info, tok = json.loads((out / "processor_config.json").read_text()), T.AutoTokenizer.from_pretrained(out)
        return T.InternVLProcessor(T.AutoImageProcessor.from_pretrained(out, backend="pil"), tok, image_seq_length=info[
            "image_seq_length"], chat_template=tok.chat_template)
    processor = T.AutoProcessor.from_pretrained(out, backend="pil")
    cut, ask = type(processor.image_processor).patchify_image, T.FuyuProcessor.__call__

    def asked(self, **how):
        there = ask(self, **how, return_legacy_image_output=False)
        return T.BatchFeature(there | {"pixel_values": torch.as_tensor(there["pixel_values"])[None]})

    monkeypatch.setattr(T.FuyuProcessor, "__call__", asked)    # 5.23 gives patchify_image tensors, which reads arrays
    monkeypatch.setattr(type(processor.image_processor), "patchify_image",
                        lambda self, image, patch_size: torch.as_tensor(cut(self, image.numpy(), patch_size)[None]))
    return processor


def as_transformers_asks(out, image, monkeypatch):
    """A question about an image -> input_ids, attention_mask, pixel_values of the family's own processor"""
    processor, text = their_processor(out, monkeypatch), "What is this?"
    if isinstance(processor, T.InternVLProcessor):
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
        assert text == "<|im_start|>user\n<IMG_CONTEXT>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    return processor(images=image, text=text, return_tensors="pt")


def test_gguf_is_refused_in_one_line(family, tmp_path):
    assert "llama.cpp's LLaVA cannot hold this model" in error(gguf.export, family[1], tmp_path / "gguf", "f16")


def test_the_code_of_the_card_runs(family, tmp_path, monkeypatch):
    _, _, _, mine, folder = family
    out = save_folder(mine, folder, tmp_path / "out")
    theirs, ours = card_answers(out, mine.cfg, monkeypatch, their_processor(out, monkeypatch))
    assert theirs == ours != ""


def examples(cfg):
    size = dict(side=cfg.vision.image_size, model_patches=cfg.image_tokens)
    return [example(1, **size), example(2, images=0, text=14, **size), example(3, images=3, text=5, **size)]


def seen(images, cfg):
    """Pixels -> what their model gets for them"""
    x = pixels(images, cfg.vision).double()
    if cfg.connector == "patches":
        x = x.permute(0, 2, 3, 1).flatten(1)[None]             # Fuyu: one row of 3 S^2 values per patch
    return {"pixel_values": x} if len(images) else {}


def test_logits_are_those_of_transformers(family):
    _, _, theirs, mine, _ = family
    batch = pack(examples(mine.cfg), mine.cfg.vision.image_size, span_ends(mine.cfg))
    with torch.no_grad():
        true = torch.cat([theirs(input_ids=torch.tensor([ids]), **seen(images, mine.cfg)).logits[0]
                          for ids, _, images in examples(mine.cfg)])
    check_logits(mine, batch, true)


def test_greedy_tokens_are_those_of_transformers(family):
    _, _, theirs, mine, _ = family
    for ids, _, images in examples(mine.cfg):
        check_greedy(theirs, mine, ids, images, seen(images, mine.cfg))


def test_tensors_return_bit_equal(family, tmp_path):
    _, at, _, mine, folder = family
    there, here = check_return(at, mine, folder, tmp_path / "out")
    assert sum(x.numel() for x in here.values()) == sum(x.numel() for x in there.values())


def test_transformers_opens_our_folder(family, tmp_path, monkeypatch):
    """No missing or unexpected tensors; its processor gives our ids and pixels; equal logits and greedy tokens."""
    _, at, theirs, mine, folder = family
    out = tmp_path / "out"
    llava.save_model(out, mine.state_dict(), mine.cfg, folder, folder.meta["template"], "", "squash", torch.float32)
    model, info = type(theirs).from_pretrained(out, output_loading_info=True, dtype=torch.float64)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model = exact_norms(model.eval())
    asked = Chat(out, device="cpu", dtype="fp64")
    for n, size in enumerate([(40, 22), (17, 16)]):
        image = Image.fromarray(np.random.default_rng(n).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        shown, blocks = asked.look([image])
        prompt = asked.prompt([("<image>\nWhat is this?", None)], blocks)
        with monkeypatch.context() as patches:
            there = as_transformers_asks(out, image, patches)
        assert there["input_ids"][0].tolist() == prompt.tolist()
        assert (there["pixel_values"] - seen(shown[0], mine.cfg)["pixel_values"]).abs().max() < 1e-6
        with torch.no_grad():
            batch = pack([(prompt.tolist(), [-100] * len(prompt), shown[0])], 8, span_ends(mine.cfg))
            true = model(input_ids=there["input_ids"], **seen(shown[0], mine.cfg)).logits[0]
            assert (all_logits(asked.model, batch) - true).abs().max() < PARITY * true.abs().max()
            greedy = model.generate(input_ids=there["input_ids"], attention_mask=there["attention_mask"],
                                    **seen(shown[0], mine.cfg), max_new_tokens=6, do_sample=False)
        answer, = generate(asked.model, [prompt], shown[0], asked.stop_ids, 6, banned=asked.banned)
        assert answer == [i for i in greedy[0, len(prompt):].tolist() if i not in asked.stop_ids]


def test_a_user_cannot_type_fuyus_placeholder(tmp_path):
    """It is a piece of a Unigram model, which finds its pieces in any text."""
    fuyu(tmp_path)
    tok = Tokenizer(tmp_path, 3)
    for text in ("|SPEAKER|", "a<image>|SPEAKER|", "<s>", "</s>"):
        ids = tok.text(text)[0]
        assert not {1, 2, 3} & set(ids) and tok.decode(ids).strip() == text
    assert tok.image == tok.id("<image>") == 3 and "<image>" in tok.notes[0] and len(tok.notes) == 1


def test_published_fuyu_has_one_flat_config(tmp_path):
    """Without text_config (transformers: "Hub configs are saved as flat dicts"), and names without `model.`"""
    flat = {"architectures": ["FuyuForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "relu2",
            "hidden_size": 4096, "image_size": 300, "intermediate_size": 16384, "layer_norm_eps": 1e-05,
            "max_position_embeddings": 16384, "model_type": "fuyu", "num_attention_heads": 64, "num_hidden_layers": 36,
            "num_channels": 3, "partial_rotary_factor": 0.5, "patch_size": 30, "qk_layernorm": True,
            "rope_theta": 25000.0, "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 262144}
    cfg = FUYU.config(flat, {})
    assert cfg.text == PersimmonConfig() and cfg.vision == PatchesConfig() and cfg.image_token_index == 71011
    with torch.device("meta"):
        names = {published_name(n, FUYU.names(cfg))[0] for n in build(cfg).state_dict()}
    assert {"vision_embed_tokens.weight", "language_model.lm_head.weight", "language_model.model.final_layernorm.bias",
            "language_model.model.layers.35.self_attn.query_key_value.weight",
            "language_model.model.layers.0.self_attn.q_layernorm.weight",
            "language_model.model.layers.0.mlp.dense_4h_to_h.bias"} <= names


@pytest.mark.parametrize("family, change, line", [
    (INTERNVL, {"vision_feature_layer": -4}, "vision_feature_layer=-4: -1 is supported"),
    (INTERNVL, {"downsample_ratio": 0.3}, "cannot turn 1024 patches"),
    (INTERNVL, {"vision_config": {"model_type": "clip_vision_model"}}, "type 'clip_vision_model'"),
    (FUYU, {"text_config": {"model_type": "llama"}}, "type 'llama': 'persimmon' is supported"),
    (FUYU, {"num_channels": 1}, "num_channels=1: 3 is supported"),
    (FUYU, {"patch_size": 28}, "no whole patches of side 28")])
def test_unsupported_folders_end_in_one_line(family, change, line):
    c = {"vision_config": {}, "text_config": {"model_type": "llama"}} if family is INTERNVL else {}
    with torch.device("meta"):
        assert line in error(lambda: build(family.config(c | change, {})))


def test_settings_of_images_may_be_in_processor_config(family, tmp_path):
    """transformers 5 writes them there; without them, an image would have up to 12 tiles, here up to 5"""
    _, at, _, mine, _ = family
    shutil.copytree(at, tmp_path / "a")
    pre = json.loads((tmp_path / "a" / "preprocessor_config.json").read_text())
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    (tmp_path / "a" / "processor_config.json").write_text(json.dumps({"image_processor": pre}))
    assert llava.load_model(init=tmp_path / "a", dtype=torch.float64)[0].cfg == mine.cfg


def test_published_internvl_is_known_to_the_last_name():
    """Sizes as those of InternVL3-1B-hf, and the names that transformers' class has for them"""
    vision = {"architectures": ["InternVLVisionModel"], "attention_bias": True, "attention_dropout": 0.0,
              "hidden_act": "gelu", "hidden_size": 1024, "image_size": [448, 448], "intermediate_size": 4096,
              "layer_norm_eps": 1e-06, "layer_scale_init_value": 0.1, "model_type": "internvl_vision",
              "norm_type": "layer_norm", "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24,
              "patch_size": [14, 14], "use_absolute_position_embeddings": True, "use_mask_token": False,
              "use_mean_pooling": True, "use_qk_norm": False}
    text = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
            "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0, "vocab_size": 151674}
    cfg = INTERNVL.config({"model_type": "internvl", "vision_config": vision, "text_config": text}, {})
    assert cfg.vision == InternViTConfig(attention_bias=True) and cfg.image_tokens == 256
    assert cfg.layout["most"] == 12 and cfg.image_token_index == 151667
    with torch.device("meta"):
        names = {published_name(n, INTERNVL.names(cfg))[0] for n in build(cfg).state_dict()}
    layer = "vision_tower.encoder.layer.23."
    assert {f"{layer}{name}" for name in (
        "attention.projection_layer.bias", "attention.q_proj.weight", "lambda_1", "lambda_2", "layernorm_before.weight",
        "layernorm_after.bias", "mlp.fc2.weight")} <= names
    assert {"vision_tower.embeddings.cls_token", "vision_tower.embeddings.position_embeddings",
            "vision_tower.embeddings.patch_embeddings.projection.weight", "multi_modal_projector.layer_norm.weight",
            "multi_modal_projector.linear_2.bias", "language_model.model.norm.weight"} <= names
    assert len([n for n in names if n.startswith("vision_tower.")]) == 4 + 24 * 18
