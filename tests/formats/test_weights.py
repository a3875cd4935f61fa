"""Weights in: what transformers, PEFT and the LLaVA repository write, found by folder or by name, to the last bit."""

import dataclasses
import fnmatch
import itertools
import json
import random as dice
import shutil
import sys
import time
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_llava import (EXAMPLES, PRE, add_files, configure, damage, error, llava_folder, random, same,  # noqa: F401
                        towers)
from test_model import PARITY, TEXT, VISION, all_logits, exact_norms, pixels, their_logits

import engine
import train_sft
from config import Error
from data import pack
from formats import configs, hub, llava
from images import preprocess
from run import stage

IMAGES = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ---- towers ---------------------------------------------------------------------------------------------------------

SMALL = VISION | {"image_size": 8}
DINO = {k: v for k, v in SMALL.items() if k != "intermediate_size"} | {"mlp_ratio": 2, "layer_norm_eps": 1e-5}
HALF = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)


def make_tower(name):
    """-> the model that is saved, its vision part, which gives hidden states"""
    T = pytest.importorskip("transformers")
    if name.startswith("whole"):
        kind = name.split()[1]
        whole = getattr(T, f"{kind}Model")(getattr(T, f"{kind}Config")(vision_config=SMALL, text_config=HALF))
        return random(whole), whole.vision_model
    kind, config = {"CLIP": ("CLIPVisionModel", T.CLIPVisionConfig(**SMALL)),
                    "SigLIP": ("SiglipVisionModel", T.SiglipVisionConfig(**SMALL)),
                    "SigLIP headless": ("SiglipVisionModel", T.SiglipVisionConfig(**SMALL, vision_use_head=False)),
                    "DINOv2": ("Dinov2Model", T.Dinov2Config(**DINO)),
                    "DINOv2 with registers": ("Dinov2WithRegistersModel", T.Dinov2WithRegistersConfig(**DINO))}[name]
    model = random(getattr(T, kind)(config))
    return model, model


def with_prefix(tensors):
    """As transformers 4 wrote a tower alone, and every whole model"""
    known = ("vision_model.", "text_model.", "logit", "visual", "text_proj")
    return {k if k.startswith(known) else f"vision_model.{k}": x for k, x in tensors.items()}


@pytest.mark.parametrize("name, way", [
    ("CLIP", "prefix"), ("SigLIP", "as it is"), ("SigLIP headless", "prefix"), ("DINOv2", "as it is"),
    ("DINOv2 with registers", "pickle"), ("whole CLIP", "pickle"), ("whole Siglip", "as it is")])
def test_features_are_those_of_transformers(name, way, towers, tmp_path):  # noqa: F811
    """Features of the last but one layer, without class and register tokens, in float64 and fp32."""
    model, vision = make_tower(name)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = with_prefix(tensors) if way == "prefix" else tensors
    if name == "whole CLIP":                                                     # old files hold it
        tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    (tmp_path / "model.safetensors").unlink()
    if way == "pickle":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    mine, folder = llava.load_model(add_files(tmp_path, pre=PRE), towers[1])
    for dtype, close in ((torch.float32, 1e-5), (torch.float64, PARITY)):
        mine.to(dtype), vision.to(dtype)
        with torch.no_grad():
            there = vision(pixel_values=pixels(IMAGES, mine.cfg.vision).to(dtype), output_hidden_states=True)
            true, seen = there.hidden_states[-2][:, -4:], mine.vision_tower(IMAGES)
        assert seen.shape == true.shape == (3, 4, 32) and true.std() > 0.1
        assert (seen - true).abs().max() <= close * true.abs().max()
    assert len(folder.unused) == (20 if "DINO" in name else 18)                  # last block and norm
    assert all(".layers.2." in k or "post_layernorm" in k for k in folder.unused)


SIGLIP2 = {  # preprocessor_config.json of google/siglip2-base-patch16-224, of another size
    "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3,
    "image_processor_type": "SiglipImageProcessor", "image_std": [0.5] * 3, "processor_class": "SiglipProcessor",
    "resample": 2, "rescale_factor": 1 / 255, "size": {"height": 8, "width": 8}}


def test_siglip_2_of_fixed_size_loads(towers, tmp_path):  # noqa: F811
    """Both halves in one file under the names of transformers 4, config.json of type `siglip` with the halves nested,
    Gemma's tokenizer beside it (which is not read), bilinear resizing; and written again as a LLaVA."""
    T = pytest.importorskip("transformers")
    from PIL import Image
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    text = HALF | {"max_position_embeddings": 64}
    model = random(T.SiglipModel(T.SiglipConfig(vision_config=SMALL, text_config=text)))
    save_file(with_prefix(model.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"logit_scale", "logit_bias", "text_model.head.weight", "vision_model.head.probe"} < names
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip", "torch_dtype": "float32",
        "text_config": HALF | {"model_type": "siglip_text_model", "projection_size": 16, "hidden_act":
                               "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "max_position_embeddings": 64},
        "vision_config": SMALL | {"model_type": "siglip_vision_model", "attention_dropout": 0.0, "num_channels": 3,
                                  "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}}))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    add_files(tmp_path, pre=SIGLIP2)
    mine, folder = llava.load_model(tmp_path, towers[1], dtype=torch.float64)
    with torch.no_grad():
        seen = pixels(IMAGES, mine.cfg.vision).double()
        true = model.double().vision_model(pixel_values=seen, output_hidden_states=True).hidden_states[-2]
        assert (mine.vision_tower(IMAGES) - true).abs().max() <= PARITY * true.abs().max()
    image = Image.effect_noise((23, 14), 90).convert("RGB")
    spec = configs.image_spec(folder.pre, "squash")
    there = SiglipImageProcessorPil(**SIGLIP2)(image, return_tensors="pt")["pixel_values"][0]
    assert spec.resample == 2 and torch.equal(there, pixels(preprocess(image, spec)[None], mine.cfg.vision)[0])
    llava.save_model(tmp_path / "out", mine.state_dict(), mine.cfg, folder, "vicuna_v1", "", "squash", torch.float32)
    back, info = T.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = T.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert int(processor.resample) == 2 and dict(processor.size) == {"height": 8, "width": 8}
    assert "vision tower of type 'siglip2_vision_model'" in error(        # the one that takes images of any size
        lambda: configure(tmp_path, model_type="siglip2", vision_config=SMALL) or llava.load_model(tmp_path, towers[1]))


def test_a_llava_with_dinov2_is_that_of_transformers(tmp_path, bytes_folder):
    """Registers would stay among the patches there, so that such a folder is refused."""
    T = pytest.importorskip("transformers")
    for kind in ("Dinov2", "Dinov2WithRegisters"):
        vision = getattr(T, f"{kind}Config")(**DINO)
        model = random(T.LlavaForConditionalGeneration(T.LlavaConfig(
            vision_config=vision, text_config=T.LlamaConfig(**TEXT), image_token_index=3, attn_implementation="sdpa")))
        model.save_pretrained(tmp_path / kind)
        add_files(tmp_path / kind, bytes_folder, PRE)
        if kind == "Dinov2":
            mine = llava.load_model(init=tmp_path / kind)[0].double()
            true = their_logits(exact_norms(model.double()), EXAMPLES, mine.cfg.vision)
            with torch.no_grad():
                assert (all_logits(mine, pack(EXAMPLES, 8)) - true).abs().max() <= PARITY * true.abs().max()
    assert "register tokens among the features" in error(llava.load_model, init=tmp_path / "Dinov2WithRegisters")


@pytest.mark.parametrize("change, says", [
    (lambda t: t.update({"encoder.layers.7.layer_norm1.bias": torch.ones(32)}),
     "unexpected tensor(s), the first is vision_tower.vision_model.encoder.layers.7.layer_norm1.bias"),
    (lambda t: t.update({"encoder.layers.2.layer_norm1.bias": torch.ones(31)}),
     "layers.2.layer_norm1.bias has shape (31,)"),
    (lambda t: t.pop("encoder.layers.2.layer_norm1.bias"),
     "missing, the first is vision_tower.vision_model.encoder.layers.2."),
    (lambda t: t.update({"vision_model.pre_layrnorm.bias": torch.ones(32)}),
     "holds vision_tower.vision_model.pre_layrnorm.bias under two names"),
    (lambda t: t.update({"pre_layrnorm.bias": torch.ones(32).int()}), "pre_layrnorm.bias holds torch.int32, where"),
    (lambda t: t.update({"pre_layrnorm.bias": torch.ones(1, 1, 31)}), "pre_layrnorm.bias has shape (31,)"),
])
def test_unused_blocks_are_accounted_for(towers, tmp_path, change, says):  # noqa: F811
    folder = shutil.copytree(towers[0], tmp_path / "clip")
    damage(folder, change)
    assert says in error(llava.load_model, folder, towers[1])


def test_unused_blocks_may_be_absent(towers, tmp_path):  # noqa: F811
    folder = shutil.copytree(towers[0], tmp_path / "clip")
    damage(folder, lambda t: [t.pop(k) for k in list(t) if "layers.2." in k or k.startswith("post_")])
    model, parts = llava.load_model(folder, towers[1])
    assert parts.unused == {} and same((model, parts._replace(unused={})), (llava.load_model(*towers)[0], parts))


# ---- heads ----------------------------------------------------------------------------------------------------------

def test_a_tied_head_counts_if_different(llava_folder, tmp_path):  # noqa: F811
    """As in transformers 5: a copy is a copy, and what is not a copy is a head of its own whatever the config says."""
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    text = json.loads((llava_folder / "config.json").read_text())["text_config"] | {"tie_word_embeddings": True}
    for place, how in (("top", "absent"), ("text", "copy"), ("top", "other"), ("text", "other")):
        folder = shutil.copytree(llava_folder, tmp_path / f"{place}_{how}")
        configure(folder, **({"tie_word_embeddings": True} if place == "top" else {"text_config": text}))
        damage(folder, lambda t: {"absent": lambda: t.pop(head), "copy": lambda: t.update({head: t[embedding].clone()}),
                                 "other": lambda: None}[how]())
        model, _ = llava.load_model(init=folder)
        assert model.cfg.text.tie_word_embeddings == (how != "other")
        wanted = load_file(folder / "model.safetensors")[head if how == "other" else embedding]
        assert torch.equal(model.language_model.head_weight, wanted)
    configure(folder, tie_word_embeddings=False)
    damage(folder, lambda t: t.pop(head))
    configure(folder, text_config=text | {"tie_word_embeddings": False})
    assert f"1 tensor(s) missing, the first is {head}" in error(llava.load_model, init=folder)


# ---- what an absent key means ---------------------------------------------------------------------------------------

GIVEN = {"vocab_size": 77, "hidden_size": 96, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 8,
         "num_key_value_heads": [2, None], "head_dim": 20, "rms_norm_eps": 1e-4, "max_position_embeddings": 555,
         "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "sliding_window": [33, None],
         "use_sliding_window": True, "max_window_layers": [0, 99], "rope_theta": 7e5,
         "rope_scaling": [{"type": "linear", "factor": 3.0}, None, {"rope_type": "default"},
                          {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}],
         "rope_parameters": [{"rope_type": "default", "rope_theta": 3e4}, {"rope_type": "linear", "factor": 2.0},
                             {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e4}]}


def draw(keys, g):
    pick = {k: v for k, v in keys.items() if g.random() < 0.4}
    return {k: g.choice(v) if isinstance(v, list) else v for k, v in pick.items()}


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_text_defaults_are_those_of_the_class(kind):
    """No key at all, and 80 random choices, against the class itself: every setting of ours is compared."""
    T = pytest.importorskip("transformers")
    g, seen = dice.Random(0), set()
    for given in [{}, *(draw(GIVEN, g) for _ in range(80))]:
        if given.get("sliding_window", 1) is None and given.get("use_sliding_window"):
            given.pop("use_sliding_window")                                      # a contradiction
        if kind == "Mistral" and given.get("num_key_value_heads", 1) is None:
            given.pop("num_key_value_heads")                                     # transformers 5 stops at it
        c = getattr(T, f"{kind}Config")(**json.loads(json.dumps(given)))
        windows = {getattr(c, "sliding_window", None) if t == "sliding_attention" else None
                   for t in getattr(c, "layer_types", None) or ["sliding_attention"]} if kind != "Llama" else {None}
        if len(windows) > 1 and c.sliding_window >= c.max_position_embeddings:
            windows = {None}                                                     # longer than any document
        if len(windows) > 1 or c.num_attention_heads % c.num_key_value_heads:
            assert error(configs.text_config, {"model_type": kind.lower()} | given)
            continue
        ours = configs.text_config({"model_type": kind.lower()} | given)
        names = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
                 "rms_norm_eps max_position_embeddings tie_word_embeddings").split()
        want = {k: getattr(c, k) for k in names} | {"model_type": kind.lower(), "qk_norm": kind == "Qwen3",
                                                    "first_position": 0}
        want["head_dim"] = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        bias = getattr(c, "attention_bias", False) if kind in ("Llama", "Qwen3") else False
        want |= {"qkv_bias": kind == "Qwen2" or bias, "o_bias": bias}
        want["mlp_bias"] = kind == "Llama" and c.mlp_bias
        want["sliding_window"], = windows
        rope = dict(c.rope_parameters)
        want["rope_theta"] = rope.pop("rope_theta")
        scaled = rope if rope["rope_type"] != "default" else {}
        mine = {k: x for k, x in (ours.rope_scaling or {}).items() if k not in ("type", "rope_type")}
        assert mine == {k: x for k, x in scaled.items() if k not in ("type", "rope_type")}, given
        assert (ours.rope_scaling is None) == (not scaled)
        got = dataclasses.asdict(ours)
        got.pop("rope_scaling")
        assert got == want, given
        seen |= {(k, json.dumps(x)) for k, x in want.items()}
    assert len(seen) > 20


@pytest.mark.parametrize("kind", ["CLIPVision", "SiglipVision", "Dinov2", "Dinov2WithRegisters"])
def test_vision_defaults_are_those_of_the_class(kind):
    T = pytest.importorskip("transformers")
    keys = {"hidden_size": 96, "num_hidden_layers": 5, "num_attention_heads": 6, "image_size": 60, "patch_size": 12,
            "hidden_act": "gelu", "layer_norm_eps": 1e-3}
    keys |= {"mlp_ratio": 3} if "Dino" in kind else {"intermediate_size": 50}
    keys |= {"num_register_tokens": 2} if "With" in kind else {}
    g = dice.Random(0)
    for given in [{}, *(draw(keys, g) for _ in range(20))]:
        c = getattr(T, f"{kind}Config")(**given)
        ours = configs.vision_config({"model_type": c.model_type} | given)
        names = [f.name for f in dataclasses.fields(ours) if hasattr(c, f.name)]
        assert {k: getattr(ours, k) for k in names} == {k: getattr(c, k) for k in names}, given
        assert len(names) == 8 + ("Dino" not in kind) + ("With" in kind)
        if "Dino" in kind:
            assert ours.intermediate_size == c.hidden_size * c.mlp_ratio


def test_llava_defaults_are_those_of_the_class(tmp_path, monkeypatch):
    T = pytest.importorskip("transformers")
    (tmp_path / "model.safetensors").touch()
    c, seen = T.LlavaConfig(), []
    monkeypatch.setattr(llava, "Tokenizer", lambda folder, image_id: image_id)
    monkeypatch.setattr(llava, "read_tensors", lambda folder: {})
    vision = {"vision_config": c.to_dict()["vision_config"]}
    for config in (vision, vision | {"text_config": None}, c.to_dict()):
        add_files(tmp_path, pre=PRE)
        parts, _, layer = llava.read_llava_hf(tmp_path, {"model_type": "llava"} | config)
        cfgs = configs.vision_config(parts.vision, layer), configs.text_config(parts.text)
        seen.append((*cfgs, layer, parts.tok))
    first, *others = seen
    assert others == [first, first]
    assert first[2:] == (c.vision_feature_layer, c.image_token_index) == (-2, 32000)


@pytest.mark.parametrize("c, says", [
    ({"hidden_size": "4096"}, "hidden_size='4096' in its config.json, where int belongs"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"), ({"rms_norm_eps": True}, "where float belongs"),
    ({"num_key_value_heads": 5}, "32 heads for 5 keys and values"), ({"tie_word_embeddings": 1}, "where bool belongs"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "'llama3' without a number above 0 for low_freq_factor"),
    ({"rope_scaling": {"type": "linear"}}, "'linear' without a number above 0 for factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope scaling 'dynamic'"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "window in 4 of its 32 layers"),
    ({"model_type": "qwen3", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9,
      "use_sliding_window": True, "num_hidden_layers": 2}, "window in 1 of its 2 layers"),
])
def test_an_unsupported_language_model_is_one_line(c, says):
    assert says in error(configs.text_config, c)


@pytest.mark.parametrize("c, says", [
    ({"use_swiglu_ffn": True, "model_type": "dinov2"}, "use_swiglu_ffn=True"), ({"num_channels": 4}, "num_channels=4"),
    ({"image_size": [224, 112]}, "image_size=[224, 112] in its config.json, where int belongs"),
    ({"num_hidden_layers": 1, "feature_layer": 7}, None),
])
def test_an_unsupported_tower_is_one_line(c, says):
    if says:
        assert says in error(configs.vision_config, c)
    else:
        assert "feature layer -3 of a vision tower of 1 blocks" in error(configs.vision_config, c, -3)


@pytest.mark.parametrize("kind", ["qwen2", "dinov2"])
def test_odd_values_in_a_config_are_one_line(kind):
    """Each key with each odd value: read or refused, without a traceback."""
    read, keys = (configs.text_config, [*GIVEN, "layer_types"]) if kind == "qwen2" else (
        configs.vision_config, [*VISION, "mlp_ratio", "hidden_act"])
    for key, value in itertools.product(keys, ["x", -1, 0, 1.5, [], {"a": 1}]):
        try:
            read({"model_type": kind, "use_sliding_window": True, "max_window_layers": 0} | {key: value})
        except Error as e:
            assert "\n" not in str(e)


def test_a_window_longer_than_documents_is_none():
    """Published Qwen2.5: layers from 28 on might slide over 131,072 tokens, of which there are 32,768."""
    c = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 131072, "max_window_layers": 28}
    assert configs.text_config(c).sliding_window is None
    assert configs.text_config({"sliding_window": 8}).sliding_window is None        # a Llama has none


def test_transformers_5_describes_images_in_processor_config(llava_folder, tmp_path):  # noqa: F811
    """One processor_config.json for everything, and no preprocessor_config.json."""
    T = pytest.importorskip("transformers")
    folder = shutil.copytree(llava_folder, tmp_path / "five")
    processor = T.LlavaProcessor(*(f.from_pretrained(llava_folder) for f in (T.AutoImageProcessor, T.AutoTokenizer)))
    processor.save_pretrained(tmp_path / "processor")
    (folder / "preprocessor_config.json").unlink()
    assert not (tmp_path / "processor" / "preprocessor_config.json").exists()
    shutil.copy(tmp_path / "processor" / "processor_config.json", folder)
    (model, five), (_, four) = llava.load_model(init=folder), llava.load_model(init=llava_folder)
    assert configs.image_spec(five.pre, "crop") == configs.image_spec(four.pre, "crop")
    assert llava.aspect(five, model.cfg) == "crop"
    (folder / "processor_config.json").write_text("{}")
    assert "preprocessor_config.json is missing" in error(llava.load_model, init=folder)


def test_a_cropping_init_is_told(llava_folder, towers, tmp_path, monkeypatch):  # noqa: F811
    """llava-hf's folders crop, where LLaVA-1.5 was trained on padded images."""
    monkeypatch.setattr(engine, "set_threads", lambda *args: None)
    world = engine.World(0, 1, torch.device("cpu"), torch.float32)

    def notes(init, **how):
        s = train_sft.Settings(init=str(init), max_len=48, **how)
        _, folder = stage.load(s, world, "vicuna_v1")
        return s.image_aspect, [n for n in folder.notes if "image_aspect" in n]

    how, (line,) = notes(llava_folder)
    assert how == "crop" and line.startswith("image_aspect=crop") and line.endswith("--image_aspect=pad")
    assert notes(llava_folder, image_aspect="pad") == ("pad", [])
    model, folder = llava.load_model(*towers)
    llava.save_model(tmp_path / "ours", model.state_dict(), model.cfg, folder, "vicuna_v1", "", "crop", torch.float32)
    assert notes(tmp_path / "ours") == ("crop", [])                             # which says how it was trained


# ---- names of the hub -----------------------------------------------------------------------------------------------

@pytest.fixture
def cache(towers, tmp_path, monkeypatch):  # noqa: F811
    """The hub's cache with the two towers in it: openai/clip, lmsys/llama"""
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for folder, name in zip(towers, ("openai/clip", "lmsys/llama")):
        at = tmp_path / "home" / "hub" / f"models--{name.replace('/', '--')}"
        (at / "snapshots").mkdir(parents=True)
        shutil.copytree(folder, at / "blobs")
        (at / "snapshots" / "abc").mkdir()
        for file in folder.iterdir():                                           # as the hub does it: links into blobs
            (at / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{file.name}")
        (at / "refs").mkdir()
        (at / "refs" / "main").write_text("abc")
    return tmp_path / "home" / "hub"


def test_hub_names_are_found_in_the_cache(cache, towers, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)                   # not even the client is needed
    want = llava.load_model(*towers)
    others = [cache / "models--lmsys--llama" / "snapshots" / name for name in ("aaa", "zzz")]
    for other in others:                                                        # revisions that main no longer is
        shutil.copytree(other.with_name("abc"), other)
        (other / "config.json").write_text("{")
    assert same(llava.load_model("openai/clip", "lmsys/llama"), want)
    [shutil.rmtree(other) for other in others]
    (cache / "models--lmsys--llama" / "refs" / "main").unlink()                # a snapshot by its revision alone
    assert same(llava.load_model("openai/clip", "lmsys/llama"), want)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.rename(cache.parent / "elsewhere")))
    assert same(llava.load_model("openai/clip", "lmsys/llama"), want)


def test_an_unknown_name_is_one_line(cache, towers, monkeypatch, tmp_path):  # noqa: F811
    def says(name):
        return error(llava.load_model, name, towers[1])

    assert f"no such model in {cache}; HF_HUB_OFFLINE forbids a download" in says("openai/other")
    (cache / "models--openai--clip" / "snapshots" / "abc" / "model.safetensors").unlink()      # only the config came
    assert "no such model in" in says("openai/clip")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "no such model in" in says("openai/clip") and "pip install huggingface_hub" in says("openai/clip")
    monkeypatch.chdir(tmp_path)
    for path in ("runs/align", "home/clip", "./clip", "/openai/clip", "a/b/c", "clip"):        # no names of the hub
        assert says(path).endswith(f"{path} holds no model: there is no such folder")


def test_other_hub_names_are_downloaded(cache, towers, monkeypatch):  # noqa: F811
    """Only what is needed of it, and safetensors where there are any. (The hub itself is played by the test.)"""
    asked = []

    class Api:
        def model_info(self, name):
            names = {"openai/new": ["model.safetensors", "pytorch_model.bin"],
                     "openai/old": ["pytorch_model.bin"]}[name]
            return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=n) for n in names])

    def snapshot_download(name, **kw):
        asked.append((name, kw))
        return str(towers[0])

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setitem(sys.modules, "huggingface_hub",
                        types.SimpleNamespace(HfApi=Api, snapshot_download=snapshot_download))
    assert same(llava.load_model("openai/new", "lmsys/llama"), llava.load_model(*towers))
    assert hub.find_folder("openai/old") == towers[0]
    kinds = [(name, kw["allow_patterns"][-1]) for name, kw in asked]
    assert kinds == [("openai/new", "*.safetensors"), ("openai/old", "*.bin")]
    left = asked[0][1]["ignore_patterns"]                                       # Mistral's, Llama's second copies
    assert [any(fnmatch.fnmatch(f, p) for p in left) for f in (
        "model-00001-of-00003.safetensors", "consolidated.safetensors", "original/model.safetensors")] == [0, 1, 1]
    assert "and the download failed: KeyError: 'openai/none'" in error(hub.find_folder, "openai/none")


def test_without_a_network_there_is_one_line(monkeypatch, tmp_path, caplog, capfd):
    """huggingface_hub warns at each of six tries, half a minute long, if it is asked for a list of files."""
    hf = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hf.constants, "HF_HUB_OFFLINE", False)
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")                          # where nothing listens
    monkeypatch.setattr(time, "sleep", lambda s: None)
    hf.utils.close_session()
    assert "and the download failed: " in error(hub.find_folder, "openai/none")
    hf.utils.close_session()
    assert not caplog.records and capfd.readouterr() == ("", "")


# ---- the LLaVA repository -------------------------------------------------------------------------------------------

def spelt_as_llava(k):
    """Ours -> the original spelling, written down independently of llava.SPELLINGS"""
    if k.startswith("multi_modal_projector."):
        return k.replace("multi_modal_projector.linear_1", "model.mm_projector.0").replace(
            "multi_modal_projector.linear_2", "model.mm_projector.2")
    if k.startswith("vision_tower."):
        return "model.vision_tower." + k
    return k.removeprefix("language_model.")


@pytest.fixture
def originals(cache, towers, tmp_path, bytes_folder):  # noqa: F811
    """make(tensors, **config) -> a folder as the LLaVA repository writes it; and the model it should be"""
    (model, folder) = llava.load_model(*towers, seed=3)
    base = json.loads((towers[1] / "config.json").read_text()) | {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "mm_hidden_size": 32,
        "mm_vision_tower": "openai/clip", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad", "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False}

    def make(files, tokenizer=True, **config):
        out = tmp_path / "original"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "config.json").write_text(json.dumps({k: v for k, v in (base | config).items() if v != "absent"}))
        for name, tensors in files.items():
            torch.save(tensors, out / name)
        return add_files(out, bytes_folder if tokenizer else None)

    state = {spelt_as_llava(k): v for k, v in {**model.state_dict(), **folder.unused}.items()}
    return make, state, (model, folder)


def part(state, *parts):
    return {k: v for k, v in state.items() if any(p in k for p in parts)}


def test_models_of_the_llava_repository_load(originals):
    """With its tower, or with the name of it; one pickle or two; with the v1.5 or the later model_type."""
    make, state, want = originals
    untuned = {k: v for k, v in state.items() if "vision_tower" not in k}
    for tensors in (state, untuned):
        model, folder = llava.load_model(init=make({"pytorch_model.bin": tensors}, model_type="llava"))
        assert same((model, folder), want) and model.cfg == want[0].cfg
        assert llava.aspect(folder, model.cfg) == "pad" and not any(k.startswith("mm_") for k in folder.text)
    folder = make({"pytorch_model-00001-of-00002.bin": part(untuned, "layers"),
                   "pytorch_model-00002-of-00002.bin": {k: v for k, v in untuned.items() if "layers" not in k}},
                  image_aspect_ratio="absent", mm_vision_select_layer=-1)
    index = {k: f"pytorch_model-0000{1 if 'layers' in k else 2}-of-00002.bin" for k in untuned}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    model, read = llava.load_model(init=folder)
    assert model.cfg.vision.depth == 3 and llava.aspect(read, model.cfg) == "crop"
    assert torch.equal(model.language_model.head_weight, want[0].language_model.head_weight)


def test_a_tuned_tower_replaces_the_named_one(originals):
    make, state, want = originals
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    tuned = state | {f"model.vision_tower.{name}": state[f"model.vision_tower.{name}"] + 1}
    got = llava.load_model(init=make({"pytorch_model.bin": tuned}))[0].state_dict()
    assert [k for k, v in want[0].state_dict().items() if not torch.equal(v, got[k])] == [name]


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_a_connector_alone_loads_over_named_models(originals, kind):
    """mm_projector.bin of stage 1, in half precision as there; also the one matrix of LLaVA v1."""
    make, state, want = originals
    trained = {k: v.half() for k, v in part(state, "mm_projector").items()}
    if kind == "linear":
        trained = {k.replace(".0.", "."): v for k, v in trained.items() if ".0." in k}
    how = dict(_name_or_path="lmsys/llama", mm_projector_type="linear" if kind == "linear" else "mlp2x_gelu")
    at = make({"mm_projector.bin": trained}, **how)
    assert llava.load_model(init=at)[1].tok.folder == at                                   # its own, where it has one
    model, read = llava.load_model(init=make({"mm_projector.bin": trained}, tokenizer=False, **how))
    assert "models--lmsys--llama" in str(read.tok.folder)
    assert model.cfg.connector == kind
    got, true = model.state_dict(), want[0].state_dict()
    assert all(torch.equal(got[k], true[k].half().float() if "projector" in k else true[k]) for k in got)
    assert (got.keys() == true.keys()) == (kind == "mlp")


def test_a_lora_of_the_llava_repository_is_pefts(originals, towers, tmp_path):  # noqa: F811
    """adapter_model as peft writes it, beside non_lora_trainables.bin: merged as peft merges it."""
    peft, T = pytest.importorskip("peft"), pytest.importorskip("transformers")
    make, state, want = originals
    llm = peft.get_peft_model(T.AutoModelForCausalLM.from_pretrained(towers[1]), peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj", "v_proj"], task_type="CAUSAL_LM"))
    for n, p in llm.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(len(n)))
    other = {f"base_model.model.{k}": v + 1 for k, v in part(state, "mm_projector", "model.norm.").items()}
    folder = make({"non_lora_trainables.bin": other}, tokenizer=False)
    llm.save_pretrained(folder)
    configure_adapter(folder, base_model_name_or_path="lmsys/llama")
    got, true = llava.load_model(init=folder)[0].state_dict(), want[0].state_dict()
    merged = {f"language_model.{k}": v for k, v in llm.merge_and_unload().state_dict().items()}
    moved = {k for k in merged if not torch.equal(merged[k], true[k])}
    assert len(moved) == 6 and got.keys() == true.keys()
    for k in got:                                                             # the last norm, too, was trained
        tuned = "projector" in k or k == "language_model.model.norm.weight"
        torch.testing.assert_close(got[k], merged.get(k, true[k]) + tuned, rtol=1e-6, atol=1e-6)
        assert torch.equal(got[k], true[k]) == (not tuned and k not in moved)
    for key, value, usual in (("use_dora", True, False), ("fan_in_fan_out", True, False), ("lora_bias", True, False),
                              ("init_lora_weights", "pissa", True), ("alpha_pattern", {"q_proj": 2}, {})):
        configure_adapter(folder, **{key: value})
        assert f"{key}={value} " in error(llava.load_model, init=folder)
        configure_adapter(folder, **{key: usual})
    configure_adapter(folder, use_rslora=True)                                # alpha / sqrt(4): twice what it was
    for k, x in llava.load_model(init=folder)[0].state_dict().items():
        if k in moved:
            torch.testing.assert_close(x - true[k], 2 * (got[k] - true[k]), rtol=1e-5, atol=1e-5)
    configure_adapter(folder, use_rslora=False)
    tensors = load_file(folder / "adapter_model.safetensors")
    file = folder / "adapter_model.safetensors"
    save_file({k.replace("layers.1.", "layers.9."): v for k, v in tensors.items()}, file)
    assert "layers.9.mlp.down_proj has no matrix that it fits" in error(llava.load_model, init=folder)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.down_proj.lora_A" not in k}, file)
    assert "unexpected tensor(s), the first is language_model.model.layers.1.mlp.down_proj.lora_B" in error(
        llava.load_model, init=folder)


def configure_adapter(folder, **new):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | new))


@pytest.mark.parametrize("new, says", [
    (dict(mm_projector_type="mlp3x_gelu"), "mm_projector_type='mlp3x_gelu', where 'linear' or 'mlp2x_gelu' is"),
    (dict(mm_vision_select_feature="cls_patch"), "mm_vision_select_feature='cls_patch'"),
    (dict(mm_use_im_start_end=True), "mm_use_im_start_end=True"), (dict(image_aspect_ratio="anyres"), "'anyres'"),
    (dict(mm_patch_merge_type="spatial"), "mm_patch_merge_type='spatial'"),
    (dict(mm_vision_tower="openai/other"), "openai/other: there is no such folder, and no such model in"),
    (dict(model_type="llava_mpt"), "language model of type 'llava_mpt'")])
def test_unsupported_settings_of_the_llava_repository_are_refused(originals, new, says):
    make, state, _ = originals
    assert says in error(llava.load_model, init=make({"pytorch_model.bin": state}, **new))


def test_half_a_model_is_refused(originals):
    make, state, _ = originals
    untuned = {k: v for k, v in state.items() if "vision_tower" not in k}
    for drop, says in (("mm_projector.2.bias", "the first is multi_modal_projector.linear_2.bias"),
                       ("lm_head.weight", "the first is language_model.lm_head.weight")):
        tensors = {k: v for k, v in untuned.items() if not k.endswith(drop)}
        assert says in error(llava.load_model, init=make({"pytorch_model.bin": tensors}))
    assert "unexpected tensor(s), the first is image_newline" in error(
        llava.load_model, init=make({"pytorch_model.bin": untuned | {"model.image_newline": torch.ones(32)}}))
    for absent in (dict(), dict(_name_or_path="lmsys/llama", mm_vision_tower=5)):
        folder = make({"mm_projector.bin": part(state, "mm_projector")}, **absent)
        assert "does not say in its configs which models" in error(llava.load_model, init=folder)
