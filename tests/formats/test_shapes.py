"""Published models at full size, without their weights: names, shapes and counts of every tensor, on the meta device.

The names below are those of the published files, written down part by part and not derived from our modules; the
configs hold the keys that the published config.json holds, so that the defaults of the classes are needed too."""

import math

import pytest
import torch

from config import Error
from formats import configs, names
from model import VLM, VLMConfig

LLAMA = {"model_type": "llama"}
VICUNA = LLAMA | dict(hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096, num_attention_heads=32,
                      num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-5, rope_scaling=None,
                      vocab_size=32000)
LLMS = {  # config.json, parameters (a tied head counts once)
    "Vicuna 7B": (VICUNA, 6_738_415_616),
    "Vicuna 13B": (VICUNA | dict(hidden_size=5120, intermediate_size=13824, num_attention_heads=40,
                                 num_hidden_layers=40, num_key_value_heads=40), 13_015_864_320),
    "Llama 3 8B": (LLAMA | dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32,
                                num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=500000.0, vocab_size=128256,
                                max_position_embeddings=8192), 8_030_261_248),
    "Llama 3.2 1B": (LLAMA | dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, head_dim=64,
                                  num_hidden_layers=16, num_key_value_heads=8, rms_norm_eps=1e-5,
                                  rope_theta=500000.0, vocab_size=128256, tie_word_embeddings=True,
                                  max_position_embeddings=131072,
                                  rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                                "original_max_position_embeddings": 8192, "rope_type": "llama3"}),
                     1_235_814_400),
    "TinyLlama 1.1B": (LLAMA | dict(hidden_size=2048, intermediate_size=5632, num_attention_heads=32,
                                    num_hidden_layers=22, num_key_value_heads=4, rms_norm_eps=1e-5, vocab_size=32000),
                       1_100_048_384),
    "SmolLM2 360M": (LLAMA | dict(hidden_size=960, intermediate_size=2560, num_attention_heads=15, num_hidden_layers=32,
                                  num_key_value_heads=5, rms_norm_eps=1e-5, rope_theta=100000, vocab_size=49152,
                                  tie_word_embeddings=True, max_position_embeddings=8192), 361_821_120),
    "Qwen2.5 7B": (dict(model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
                        num_hidden_layers=28, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1000000.0,
                        vocab_size=152064, sliding_window=131072, use_sliding_window=False, max_window_layers=28,
                        tie_word_embeddings=False, max_position_embeddings=131072), 7_615_616_512),
    "Qwen3 0.6B": (dict(model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_attention_heads=16,
                        num_hidden_layers=28, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, vocab_size=151936,
                        rope_theta=1000000, tie_word_embeddings=True, max_position_embeddings=40960,
                        sliding_window=None, use_sliding_window=False, max_window_layers=28), 596_049_920),
    "Mistral 7B": (dict(model_type="mistral", hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                        num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=10000.0,
                        sliding_window=4096, vocab_size=32000, max_position_embeddings=32768), 7_241_732_096),
    "LLaVA-1.5 7B's": (dict(model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5, vocab_size=32064),
                       6_738_939_904)}

CLIP_L = dict(model_type="clip_vision_model", hidden_size=1024, image_size=336, intermediate_size=4096,
              num_attention_heads=16, num_hidden_layers=24, patch_size=14, projection_dim=768)
TOWERS = {  # config.json, parameters without a pooling head
    "CLIP L/14 336": (CLIP_L, 303_507_456),
    "SigLIP so400m/14 384": (dict(model_type="siglip_vision_model", hidden_size=1152, image_size=384,
                                  intermediate_size=4304, num_attention_heads=16, num_hidden_layers=27, patch_size=14),
                             428_225_600 - 15_238_352),                          # its pooling head
    "DINOv2 large": (dict(model_type="dinov2", hidden_size=1024, image_size=518, mlp_ratio=4, num_attention_heads=16,
                          num_hidden_layers=24, patch_size=14), 304_368_640),
    "DINOv2 base, registers": (dict(model_type="dinov2_with_registers", hidden_size=768, image_size=518, mlp_ratio=4,
                                    num_attention_heads=12, num_hidden_layers=12, patch_size=14), 86_583_552)}


def both(name, *shape):
    """A weight of this shape and the bias that goes with it"""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def reader(c):
    """Every tensor of a published language model"""
    D, F, L = c.get("hidden_size", 4096), c.get("intermediate_size", 11008), c.get("num_hidden_layers", 32)
    V, H, G = c["vocab_size"], c.get("num_attention_heads", 32), c.get("num_key_value_heads", 32)
    K = c.get("head_dim", D // H)
    out = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not c.get("tie_word_embeddings"):
        out["lm_head.weight"] = (V, D)
    for i in range(L):
        layer = {f"self_attn.{x}_proj.weight": (n * K, D) for x, n in (("q", H), ("k", G), ("v", G))}
        if c["model_type"] == "qwen2":
            layer |= {f"self_attn.{x}_proj.bias": (n * K,) for x, n in (("q", H), ("k", G), ("v", G))}
        if c["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm.weight": (K,), "self_attn.k_norm.weight": (K,)}
        layer |= {"self_attn.o_proj.weight": (D, H * K), "mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D),
                  "mlp.down_proj.weight": (D, F), "input_layernorm.weight": (D,),
                  "post_attention_layernorm.weight": (D,)}
        out |= {f"model.layers.{i}.{k}": s for k, s in layer.items()}
    return out


def tower(c):
    """Every tensor of a published tower, without a pooling head"""
    D, p, L, kind = c["hidden_size"], c["patch_size"], c["num_hidden_layers"], c["model_type"]
    N, F = (c["image_size"] // p) ** 2, c.get("intermediate_size", 4 * D)
    out = {}
    if kind.startswith("dinov2"):
        out |= both("embeddings.patch_embeddings.projection", D, 3, p, p) | both("layernorm", D)
        out |= {"embeddings.cls_token": (1, 1, D), "embeddings.position_embeddings": (1, N + 1, D),
                "embeddings.mask_token": (1, D)}
        if kind.endswith("registers"):
            out["embeddings.register_tokens"] = (1, 4, D)
        for i in range(L):
            at = f"encoder.layer.{i}"
            for x in ("attention.attention.query", "attention.attention.key", "attention.attention.value",
                      "attention.output.dense"):
                out |= both(f"{at}.{x}", D, D)
            out |= both(f"{at}.norm1", D) | both(f"{at}.norm2", D) | both(f"{at}.mlp.fc1", F, D)
            out |= both(f"{at}.mlp.fc2", D, F) | {f"{at}.layer_scale{j}.lambda1": (D,) for j in (1, 2)}
        return out
    out |= both("vision_model.embeddings.patch_embedding", D, 3, p, p) | both("vision_model.post_layernorm", D)
    out["vision_model.embeddings.position_embedding.weight"] = (N, D)
    if kind.startswith("clip"):
        out.pop("vision_model.embeddings.patch_embedding.bias")
        out["vision_model.embeddings.class_embedding"] = (D,)
        out["vision_model.embeddings.position_embedding.weight"] = (N + 1, D)
        out |= both("vision_model.pre_layrnorm", D)
    for i in range(L):
        at = f"vision_model.encoder.layers.{i}"
        for x in "qkv":
            out |= both(f"{at}.self_attn.{x}_proj", D, D)
        out |= both(f"{at}.self_attn.out_proj", D, D) | both(f"{at}.mlp.fc1", F, D) | both(f"{at}.mlp.fc2", D, F)
        out |= both(f"{at}.layer_norm1", D) | both(f"{at}.layer_norm2", D)
    return out


def meta(shapes):
    return {k: torch.empty(s, device="meta") for k, s in shapes.items()}


def count(shapes):
    return sum(math.prod(s) for s in shapes)


def accounted(v, t, tensors):
    """As load_model: names and shapes of a folder -> those of the parameters and the unused tensors, by our names"""
    with torch.device("meta"):
        model = VLM(VLMConfig(configs.vision_config(v), configs.text_config(t)))
    new = {k for k in model.state_dict() if k.startswith("multi_modal_projector.")}
    built, unused = names.account(model, names.renamed(meta(tensors), "folder"), "folder", new)
    want = {k: p.shape for k, p in model.named_parameters() if k not in new}
    assert {k: x.shape for k, x in built.items()} == want
    return {k: tuple(x.shape) for k, x in {**built, **unused}.items()}


TOY_TOWER = dict(model_type="clip_vision_model", hidden_size=8, image_size=4, intermediate_size=8,
                 num_attention_heads=1, num_hidden_layers=2, patch_size=2)
TOY_LLM = dict(model_type="llama", hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1,
                  num_key_value_heads=1, vocab_size=9)


@pytest.mark.parametrize("name", LLMS)
def test_language_models_have_the_published_tensors(name):
    c, parameters = LLMS[name]
    published = reader(c)
    assert count(published.values()) == parameters
    there = {f"vision_tower.{k}": s for k, s in tower(TOY_TOWER).items()} | published
    got = accounted(TOY_TOWER, c, there)
    assert {k: s for k, s in got.items() if k.startswith("language_model.")} == {
        f"language_model.{k}": s for k, s in published.items()}
    *_, last = published                                                          # and each of them is needed
    with pytest.raises(Error, match="1 tensor.s. missing, the first is language_model." + last):
        accounted(TOY_TOWER, c, {n: s for n, s in there.items() if n != last})


@pytest.mark.parametrize("name", TOWERS)
def test_towers_have_the_published_tensors(name):
    c, parameters = TOWERS[name]
    published = tower(c)
    assert count(published.values()) == parameters
    got = accounted(c, TOY_LLM, {f"vision_tower.{k}": s for k, s in published.items()} | reader(TOY_LLM))
    seen = [s for k, s in got.items() if k.startswith("vision_tower.")]
    hidden = published.get("embeddings.mask_token", (0,))                         # of a DINOv2 not kept
    assert count(seen) == parameters - math.prod(hidden) and len(seen) == len(published) - (hidden != (0,))
    if "dinov2" not in c["model_type"]:
        assert {k.removeprefix("vision_tower.") for k in got if k.startswith("vision_tower.")} == published.keys()


@pytest.mark.parametrize("size, parameters", [("7B", 7_063_427_072), ("13B", 13_351_494_656)])
def test_llava_1_5_has_the_published_tensors(size, parameters):
    """From the config.json of llava-hf/llava-1.5-7b-hf, which leaves the size of the language model to the class."""
    text = {"7B": LLMS["LLaVA-1.5 7B's"][0], "13B": LLMS["Vicuna 13B"][0] | {"vocab_size": 32064}}[size]
    D = text.get("hidden_size", 4096)
    published = {f"language_model.{k}": s for k, s in reader(text).items()}
    published |= {f"vision_tower.{k}": s for k, s in tower(CLIP_L).items()}
    published |= both("multi_modal_projector.linear_1", D, 1024) | both("multi_modal_projector.linear_2", D, D)
    assert count(published.values()) == parameters
    with torch.device("meta"):
        model = VLM(VLMConfig(configs.vision_config(CLIP_L), configs.text_config(text)))
    built, unused = names.account(model, names.renamed(meta(published), "folder"), "folder")
    assert {k: tuple(x.shape) for k, x in {**built, **unused}.items()} == published         # no name is changed at all
    assert model.state_dict().keys() == built.keys() and len(unused) == 18
    assert model.cfg.vision.patches == 576 and model.cfg.text.head_dim == 128


@pytest.mark.parametrize("name", [*LLMS, *TOWERS])
def test_transformers_builds_the_same_towers_and_llms(name):
    T = pytest.importorskip("transformers")
    c = (LLMS | TOWERS)[name][0]
    kind = {"clip_vision_model": "CLIPVision", "siglip_vision_model": "SiglipVision", "dinov2": "Dinov2",
            "dinov2_with_registers": "Dinov2WithRegisters", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2",
            "qwen3": "Qwen3"}
    config = getattr(T, f"{kind[c['model_type']]}Config")(**{k: v for k, v in c.items() if k != "model_type"})
    with torch.device("meta"):
        model = (T.AutoModelForCausalLM if name in LLMS else T.AutoModel).from_config(config)
    theirs = {k: tuple(p.shape) for k, p in model.named_parameters() if "head." not in k or k == "lm_head.weight"}
    if name in LLMS:
        assert theirs == reader(c)
    else:                                                                         # 5 has other names in memory
        assert sorted(theirs.values()) == sorted(tower(c).values())
        if "dinov2" not in c["model_type"]:
            assert theirs.keys() == {k.removeprefix("vision_model.") for k in tower(c)}


@pytest.mark.parametrize("size", ["7B", "13B"])
def test_transformers_builds_the_same_llava(size):
    """Names and shapes of its state dict, spelt as the files have them"""
    T = pytest.importorskip("transformers")
    text = {"7B": LLMS["LLaVA-1.5 7B's"][0], "13B": LLMS["Vicuna 13B"][0] | {"vocab_size": 32064}}[size]
    with torch.device("meta"):
        model = T.LlavaForConditionalGeneration(T.LlavaConfig(vision_config=dict(CLIP_L), text_config=dict(text)))
    published = {f"language_model.{k}": s for k, s in reader(text).items()}
    published |= {f"vision_tower.{k}": s for k, s in tower(CLIP_L).items()}
    D = text.get("hidden_size", 4096)
    published |= both("multi_modal_projector.linear_1", D, 1024) | both("multi_modal_projector.linear_2", D, D)
    in_memory = {k.replace("language_model.lm_head", "lm_head").replace("vision_model.", ""): s for k, s in
                 published.items()}
    in_memory = {k if k.startswith("lm_head") else "model." + k.replace("language_model.model", "language_model"): s
                 for k, s in in_memory.items()}
    assert {k: tuple(p.shape) for k, p in model.named_parameters()} == in_memory


def test_a_whole_siglip_2_is_accounted_for():
    """google/siglip2-so400m-patch14-384: both halves in one file, the text one with Gemma's vocabulary, spelt as its
    checkpoint and its config.json are: model_type siglip, not siglip2, which is the one of variable size."""
    T = pytest.importorskip("transformers")
    text = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=27,
                vocab_size=256000, model_type="siglip_text_model")
    c = TOWERS["SigLIP so400m/14 384"][0]
    with torch.device("meta"):
        whole = T.SiglipModel(T.SiglipConfig(text_config=text, vision_config=c))
    there = {f"vision_tower.{k}": tuple(p.shape) for k, p in whole.named_parameters()}
    assert count(there.values()) == 1_136_008_498 and "vision_tower.vision_model.head.probe" in there
    got = accounted(c, TOY_LLM, there | reader(TOY_LLM))
    assert {k.removeprefix("vision_tower."): s for k, s in got.items() if k.startswith("vision")} == tower(c)
