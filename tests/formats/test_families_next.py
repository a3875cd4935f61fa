"""LlavaNext, Idefics3 and SmolVLM: folders that transformers wrote, read, compared in float64, written, and opened by
transformers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import error, make_tokenizer
from family_checks import check_greedy, check_logits, check_return
from PIL import Image
from test_families import NORMAL, SIGLIP, TEXT, card_answers, exact_norms
from test_families_cross import CLIP
from test_families_tiles import add_specials
from test_llava import random
from test_model import PARITY, all_logits, pixels
from tiny_runs import run

import sample
from data import pack
from formats import gguf, llava
from formats.family import published_name
from formats.idefics3 import IDEFICS3, SMOLVLM
from formats.llava_next import LLAVA_NEXT
from formats.names import rename
from formats.tensors import tensor_digest
from generate import Chat, generate
from images import preprocess
from parts.build import build, image_layout
from parts.tiles import Anyres

T = pytest.importorskip("transformers")
PINS = [[8, 16], [16, 8], [16, 16], [24, 8], [8, 24]]
SIZES = [(17, 9)], [], [(9, 30), (8, 8), (90, 3)]              # of the images of three documents


def llava_next(folder, text, vision, chat_template, **fields):
    """-> a tiny LlavaNext of transformers; its image processor and its tokenizer are written to `folder`"""
    vision = vision | {"num_hidden_layers": 3, "image_size": 8, "patch_size": 2}
    c = T.LlavaNextConfig(vision_config=vision, text_config=TEXT | text, image_token_index=3, image_seq_length=16,
                          image_grid_pinpoints=PINS, **fields)
    make_tokenizer(folder, "pieces" if text["model_type"] == "llama" else "bytes")
    (folder / "chat_template.jinja").write_text(chat_template)
    pre = NORMAL | {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINS, "do_pad": True,
                    "size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(pre))
    return T.LlavaNextForConditionalGeneration(c)


def idefics3(folder, name, text, split=True, named=True, **fields):
    """The same for a tiny Idefics3 or SmolVLM. named: has the tokenizer a token for the place of a tile? Those of
    Idefics3-8B and SmolVLM-Instruct have none, those of SmolVLM-256M have"""
    vision = {k: x for k, x in SIGLIP.items() if k not in ("model_type", "vision_use_head")} | {"patch_size": 2}
    c = getattr(T, f"{name}Config")(vision_config=vision, text_config=TEXT | {"model_type": "llama"} | text,
                                    image_token_id=3, **fields)
    make_tokenizer(folder, "pieces" if name == "SmolVLM" else "bytes")
    places = ["<global-img>", *(f"<row_{y}_col_{x}>" for y in range(1, 7) for x in range(1, 7))]
    add_specials(folder, "<fake_token_around_image>", "<end_of_utterance>", *places * named)
    pre = {k: x for k, x in NORMAL.items() if k != "size"} | {
        "image_processor_type": f"{name}ImageProcessor", "size": {"longest_edge": 24}, "do_image_splitting": split,
        "max_image_size": {"longest_edge": 8}, "resample": 1}
    (folder / "preprocessor_config.json").write_text(json.dumps(pre))
    return getattr(T, f"{name}ForConditionalGeneration")(c)


CASES = {
    "idefics3": lambda at: idefics3(at, "Idefics3", {}, named=False),
    "idefics3, whole images": lambda at: idefics3(at, "Idefics3", {"tie_word_embeddings": True}, split=False,
                                                  tie_word_embeddings=True),
    "smolvlm": lambda at: idefics3(at, "SmolVLM", {"num_key_value_heads": 2}, scale_factor=4),
    "vicuna": lambda at: llava_next(at, {"model_type": "llama"}, CLIP, "{{ message['role'].upper() }}"),
    "mistral": lambda at: llava_next(at, {"model_type": "mistral", "sliding_window": None}, CLIP, "[INST] "),
    "qwen": lambda at: llava_next(at, {"model_type": "qwen2"}, SIGLIP, "<|im_start|>", vision_feature_layer=-1,
                                  vision_feature_select_strategy="full")}
TEMPLATES = {"vicuna": "vicuna_v1", "mistral": "mistral", "qwen": "chatml"}    # the others: idefics3


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    """-> name of the case, its folder as transformers writes it, their model in float64, our model, our Folder"""
    at = tmp_path_factory.mktemp("family")
    theirs = random(CASES[request.param](at))
    theirs.save_pretrained(at)
    mine, folder = llava.load_model(init=at, dtype=torch.float64)
    return request.param, at, exact_norms(theirs.double().eval()), mine, folder


def photo(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def document(cfg, spec, sizes, text=9):
    """A sample as data.pack takes it, with images of these sizes and no token between them"""
    layout, photos = image_layout(cfg), [photo(size) for size in sizes]
    ids = [1] + [i for image in photos for i in layout.block(image)]
    ids += torch.randint(5, 500, (text,), generator=torch.Generator().manual_seed(text)).tolist()
    tiles = [preprocess(tile, spec) for image in photos for tile in layout.cut(image)]
    return ids, [-100] * (len(ids) - 4) + ids[-4:], torch.stack(tiles) if tiles else torch.zeros(0, 3, 8, 8).byte()


def documents(mine, folder):
    spec = llava.image_spec(folder.pre, "crop")
    return [document(mine.cfg, spec, sizes, 9 + n) for n, sizes in enumerate(SIZES)]


def published(ids):
    """Our ids -> those of transformers, which has no own id for the first placeholder of an image"""
    return [3 if i >= 1 << 24 else i for i in ids]


def seen(cfg, tiles, sizes):
    """-> further arguments of their model"""
    if sizes and cfg.layout["kind"] == "split":
        return {"pixel_values": pixels(tiles, cfg.vision).double()[None]}
    return {"pixel_values": pixels(tiles, cfg.vision).double(),
            "image_sizes": torch.tensor([size[::-1] for size in sizes])} if sizes else {}


def their_logits(theirs, cfg, ids, tiles, sizes):
    with torch.no_grad():
        return theirs(input_ids=torch.tensor([published(ids)]), **seen(cfg, tiles, sizes)).logits[0]


def test_logits_are_those_of_transformers(family):
    _, _, theirs, mine, folder = family
    samples = documents(mine, folder)
    true = torch.cat([their_logits(theirs, mine.cfg, ids, tiles, sizes)
                      for (ids, _, tiles), sizes in zip(samples, SIZES)])
    check_logits(mine, pack(samples, 8), true)


def test_greedy_tokens_are_those_of_transformers(family):
    _, _, theirs, mine, folder = family
    for (ids, _, tiles), sizes in zip(documents(mine, folder), SIZES):
        check_greedy(theirs, mine, ids, tiles, seen(mine.cfg, tiles, sizes), published(ids))


def saved(family, out):
    """Our folder -> out"""
    _, _, _, mine, folder = family
    llava.save_model(out, mine.state_dict(), mine.cfg, folder, folder.meta["template"], folder.meta["system"],
                     folder.meta["image_aspect"], torch.float32)
    return out


def test_tensors_return_bit_equal(family, tmp_path):
    _, at, _, mine, folder = family
    there, here = check_return(at, mine, folder, tmp_path / "out")
    assert sorted(map(tensor_digest, here.values())) == sorted(map(tensor_digest, there.values()))


def opened(family, out):
    """-> their model in float64 and their processor, from our folder"""
    model, info = type(family[2]).from_pretrained(out, output_loading_info=True, dtype=torch.float64)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    if model.config.model_type != "smolvlm":
        return exact_norms(model.eval()), T.AutoProcessor.from_pretrained(out, backend="pil")
    with pytest.MonkeyPatch.context() as m:                    # its video processor needs torchvision and num2words
        m.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)
        m.setattr(T.SmolVLMProcessor, "check_argument_for_proper_class", lambda *_: None)
        tok, images = T.AutoTokenizer.from_pretrained(out), T.AutoImageProcessor.from_pretrained(out, backend="pil")
        info = json.loads((out / "processor_config.json").read_text())
        return exact_norms(model.eval()), T.SmolVLMProcessor(
            images, tok, SimpleNamespace(num_frames=1, fps=1), info["image_seq_len"], tok.chat_template)


def test_transformers_opens_our_folder(family, tmp_path):
    """Its chat template and its processor give our ids and pixels; equal logits and greedy tokens. The same of three
    images in one question"""
    out = saved(family, tmp_path / "out")
    model, processor = opened(family, out)
    asked = Chat(out, device="cpu", dtype="fp64")
    assert asked.template == TEMPLATES.get(family[0], "idefics3")
    for sizes in [(40, 22)], [(8, 8)], [(90, 3)], [(9, 30), (8, 8), (90, 3)]:
        photos = [photo(size, n) for n, size in enumerate(sizes)]
        shown, blocks = asked.look(photos)
        prompt = asked.prompt([("<image>\n" * len(photos) + "What is this?", None)], blocks)
        content = [{"type": "image"}] * len(photos) + [{"type": "text", "text": "What is this?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        there = processor(images=photos, text=text, return_tensors="pt")
        assert there["input_ids"][0].tolist() == published(prompt.tolist())
        tiles = [torch.cat(shown)] if asked.template == "idefics3" else shown
        for theirs, ours in zip(there["pixel_values"], tiles, strict=True):
            assert (theirs[: len(ours)] - pixels(ours, asked.cfg.vision)).abs().max() < 1e-6
            assert not theirs[len(ours) :].any()
        there["pixel_values"] = there["pixel_values"].double()
        same = seen(asked.cfg, torch.cat(shown), sizes)
        with torch.no_grad():
            batch = pack([(prompt.tolist(), [-100] * len(prompt), torch.cat(shown))], 8)
            mine, true = all_logits(asked.model, batch), model(**there | same).logits[0]
            assert (mine - true).abs().max() < PARITY * true.abs().max()
            greedy = model.generate(**there | same, max_new_tokens=6, do_sample=False)
        answer, = generate(asked.model, [prompt], torch.cat(shown), asked.stop_ids, 6, banned=asked.banned)
        assert answer == [i for i in greedy[0, len(prompt):].tolist() if i not in asked.stop_ids]


def test_prompts_are_those_of_its_chat_template(family, tmp_path):
    """Text alone, and a conversation of two turns with images in both"""
    out = saved(family, tmp_path / "out")
    _, processor = opened(family, out)
    asked, photos = Chat(out, device="cpu", dtype="fp32"), [photo((9, 30)), photo((8, 8))]

    def says(role, text, images=0):
        return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}

    two = [says("user", "Yes?", 1), says("assistant", "It is."), says("user", "And this?", 1)]
    for images, talk in ((None, [says("user", "Hi")]), (photos, two)):
        text = processor.apply_chat_template(talk, add_generation_prompt=True)
        there = processor(images=images, text=text, return_tensors="pt")["input_ids"][0].tolist()
        marked = "<image>" * bool(images)
        turns = [("Hi", None)] if len(talk) == 1 else [(f"{marked}Yes?", "It is."), (f"{marked}And this?", None)]
        assert there == published(asked.prompt(turns, asked.look(images or [])[1]).tolist())


@pytest.mark.parametrize("family", ["vicuna"], indirect=True)
def test_a_new_model_of_its_parts(family, world, tmp_path, capsys):
    """Stage 1 on towers of our own; transformers opens the folder; a dry run counts images, not tiles"""
    parts = "connector=anyres layout.kind=anyres"
    how = dict(parts=parts, steps=3, max_len=128, max_tokens=256)
    assert run("align", world, tmp_path / "dry", dry_run=True, **how) is None
    assert "1 image(s), its loss mask" in capsys.readouterr().out
    assert run("align", world, tmp_path / "align", **how) is None
    _, info = type(family[2]).from_pretrained(tmp_path / "align" / "model", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert run("sft", world, tmp_path / "sft", lora_r=2, **how) is None                # an adapter over two folders
    adapter, model = (Chat(tmp_path / "sft" / k, "cpu", "fp32").model for k in ("adapter", "model"))
    assert all(torch.equal(a.half(), b.half()) for a, b in zip(adapter.parameters(), model.parameters(), strict=True))


def test_sample_asks_by_the_processors_prompt(family, tmp_path, capsys):
    """The published folder has no pumice.json: its own chat template says how it is asked"""
    _, at, *_ = family
    photo((40, 22)).save(tmp_path / "a.png")
    sample.main(sample.Settings(model=str(at), image=str(tmp_path / "a.png"), prompt="What is this?", max_new_tokens=3,
                                device="cpu"))
    out, err = capsys.readouterr()
    assert out.strip() and "note" not in err
    assert Chat(at, "cpu", "fp32").template == TEMPLATES.get(family[0], "idefics3")


@pytest.mark.parametrize("family", ["vicuna", "idefics3", "smolvlm"], indirect=True)
def test_the_code_of_the_card_runs(family, tmp_path, monkeypatch):
    out = saved(family, tmp_path / "out")
    theirs, ours = card_answers(out, family[3].cfg, monkeypatch, opened(family, out)[1])
    assert theirs == ours != ""


@pytest.mark.parametrize("family, how", [
    ("vicuna", {}), ("vicuna", dict(lora_r=2)), ("vicuna", dict(lora_r=2, bits=4)), ("idefics3", {}),
    ("smolvlm", dict(lora_r=2, bits=4))], indirect=["family"])
def test_a_published_folder_trains_on(family, how, world, tmp_path):
    """Three steps on toy images; the run has a folder of the same family, and its adapter gives the same model"""
    _, at, theirs, mine, _ = family
    assert run("sft", world, tmp_path / "sft", init=str(at), image_aspect="crop", steps=3, max_len=256, max_tokens=512,
               recompute="block", **how) is None
    model, folder = llava.load_model(init=tmp_path / "sft", dtype=torch.float32)
    config = json.loads((tmp_path / "sft" / "model" / "config.json").read_text())
    assert config["model_type"] == theirs.config.model_type
    assert folder.meta["template"] == TEMPLATES.get(family[0], "idefics3")
    _, info = type(theirs).from_pretrained(tmp_path / "sft" / "model", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, mine.get_parameter(n).float())]
    assert "multi_modal_projector.linear_1.weight" in moved
    assert ("multi_modal_projector.image_newline" in moved) == (family[0] == "vicuna")
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in moved
    if how:
        adapter = Chat(tmp_path / "sft" / "adapter", "cpu", "fp32").model
        pairs = zip(adapter.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(a.half(), b.half()) for a, b in pairs)        # model/ is in fp16


def test_gguf_is_refused_in_one_line(family, tmp_path):
    assert f"{family[2].config.model_type} folder" in error(gguf.export, family[1], tmp_path / "gguf", "f16")


PUBLISHED = {"vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336,
                               "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
                               "patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
             "text_config": {"model_type": "mistral", "intermediate_size": 14336, "max_position_embeddings": 32768,
                             "num_key_value_heads": 8, "rope_theta": 1000000.0, "sliding_window": None,
                             "vocab_size": 32064, "rms_norm_eps": 1e-05},
             "image_token_index": 32000, "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336],
                                                                  [336, 1008]],
             "projector_hidden_act": "gelu", "tie_word_embeddings": False, "use_image_newline_parameter": True,
             "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "model_type": "llava_next"}


def test_every_published_name_of_llava_next_is_known():
    """Sizes as those of llava-v1.6-mistral-7b-hf, the names of its files, and those of transformers' class"""
    cfg = LLAVA_NEXT.config(PUBLISHED, {})
    assert LLAVA_NEXT.fits(cfg) and cfg.image_tokens == 576 and cfg.vision.depth == 23
    assert image_layout(cfg) == Anyres(32000, 576, 336, grids=[[2, 1], [1, 2], [2, 2], [1, 3], [3, 1]])
    with torch.device("meta"):
        theirs = T.LlavaNextForConditionalGeneration(T.LlavaNextConfig(**PUBLISHED))
        state = build(cfg).state_dict()
    names = {rename(published_name(n, LLAVA_NEXT.names(cfg))[0]): x.shape for n, x in state.items()}
    whole = {rename(n): x.shape for n, x in theirs.state_dict().items()}
    assert names.items() <= whole.items()
    assert all(".layers.23." in n or ".post_layernorm." in n for n in whole.keys() - names.keys())
    hub = {"image_newline", "language_model.lm_head.weight", "language_model.model.layers.31.mlp.down_proj.weight",
           "multi_modal_projector.linear_2.bias", "vision_tower.vision_model.pre_layrnorm.weight"}
    assert hub <= {rename(n) for n in hub} & names.keys()


SMOL = {"model_type": "smolvlm", "image_token_id": 49190, "scale_factor": 4, "pad_token_id": 128002,
        "vision_config": {"model_type": "smolvlm_vision", "hidden_size": 768, "image_size": 512, "patch_size": 16,
                          "num_attention_heads": 12},
        "text_config": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
                        "num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280,
                        "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000}}
SMOL_PRE = {"do_image_splitting": True, "resample": 1, "max_image_size": {"longest_edge": 512},
            "size": {"longest_edge": 2048}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize("family, name", [(IDEFICS3, "Idefics3"), (SMOLVLM, "SmolVLM")])
def test_published_smolvlm_is_known_to_the_last_name(family, name):
    """Sizes as those of SmolVLM-256M, and the names of transformers' class, which are those of its files"""
    cfg = family.config(SMOL, dict(SMOL_PRE))
    assert [f.fits(cfg) for f in (IDEFICS3, SMOLVLM)] == [name == "Idefics3", name == "SmolVLM"]
    assert cfg.image_tokens == 64 and len(cfg.layout["cells"]) == 16 and cfg.layout["longest"] == 2048
    with torch.device("meta"):
        c = SMOL | {"vision_config": SMOL["vision_config"] | {"model_type": f"{name.lower()}_vision"}}
        theirs = getattr(T, f"{name}ForConditionalGeneration")(getattr(T, f"{name}Config")(**c))
        state = build(cfg).state_dict()
    assert {published_name(n, family.names(cfg))[0]: x.shape for n, x in state.items()} == {
        n: x.shape for n, x in theirs.state_dict().items()}


@pytest.mark.parametrize("change, pre, line", [
    ({"scale_factor": 5}, {}, "cannot turn 1024 patches"),
    ({"vision_config": {"image_size": 400, "patch_size": 16}}, {"max_image_size": {"longest_edge": 400}},
     "25 patches on a side: transformers' positions"),
    ({"text_config": {"model_type": "t5"}}, {}, "language model of type 't5'"),
    ({}, {"max_image_size": {"longest_edge": 364}}, "tiles of side 364 of images of longest_edge 2048"),
    ({}, {"size": {"height": 512, "width": 512}}, "longest_edge None"),
    ({}, {"do_resize": False}, "do_resize=False")])
def test_unsupported_smolvlm_ends_in_one_line(change, pre, line):
    with torch.device("meta"):
        assert line in error(lambda: build(SMOLVLM.config(SMOL | change, SMOL_PRE | pre)))


@pytest.mark.parametrize("change, pre, line", [
    ({"vision_feature_layer": [-2, -5]}, {}, "vision_feature_layer=[-2, -5]: one layer"),
    ({"vision_feature_select_strategy": "full"}, {}, "strategy='full' and a tower of type 'clip_vision_model'"),
    ({"projector_hidden_act": "relu"}, {}, "projector_hidden_act='relu'"),
    ({"multimodal_projector_bias": False}, {}, "multimodal_projector_bias=False"),
    ({"vision_config": {"model_type": "dinov2"}}, {}, "type 'dinov2': CLIP and SigLIP"),
    ({"image_grid_pinpoints": [[336, 700]]}, {"image_grid_pinpoints": [[336, 700]]}, "no tiles of side 336"),
    ({}, {"image_grid_pinpoints": [[336, 336]]}, "but [[336, 336]] in preprocessor_config.json"),
    ({}, {"size": {"shortest_edge": 400}, "crop_size": 336}, "images of side 400, of which 336 stay")])
def test_unsupported_folders_end_in_one_line(change, pre, line):
    assert line in error(LLAVA_NEXT.config, PUBLISHED | change, pre)
