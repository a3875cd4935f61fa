"""What vLLM asks of a LLaVA folder, and what transformers itself would have written into one. vLLM cannot run here: its
demands are read from its source (vllm/model_executor/models/llava.py at 35d3c24, clip.py at 030ea52, siglip.py at
0531c22), as facts about names, keys and counts, and every folder that llava.save_model writes must satisfy them."""

import json

import clients
import pytest
from safetensors import safe_open
from test_shapes import reader, tower

ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}  # that it registers
ACTIVATIONS = {"gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", "quick_gelu"}
CASES = ["clip-llama-mlp", "siglip-qwen2-mlp", "clip-mistral-mlp", "siglip-qwen3-mlp"]


def shapes(folder):
    out = {}
    for file in folder.glob("*.safetensors"):
        if file.name != "expected.safetensors":
            with safe_open(file, "pt") as f:
                out |= {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}
    return out


def asked(c):
    """Every parameter that vLLM builds for a config.json and must find -> {name on disk: shape}; what it leaves out on
    purpose: blocks behind the feature layer and the norm after the last"""
    v, t = c["vision_config"], c["text_config"]
    layer = c["vision_feature_layer"]
    depth = layer + v["num_hidden_layers"] + 1 if layer < 0 else layer
    assert depth <= v["num_hidden_layers"]                                    # else: a ValueError
    out = {f"vision_tower.{k}": s for k, s in tower(v | {"num_hidden_layers": depth}).items() if "post_layer" not in k}
    C, D = t["hidden_size"], v["hidden_size"]
    for i, width in ((1, D), (2, C)):
        out[f"multi_modal_projector.linear_{i}.weight"] = (C, width)
        if c["multimodal_projector_bias"]:
            out[f"multi_modal_projector.linear_{i}.bias"] = (C,)
    return out | {f"language_model.{k}": s for k, s in reader(t).items()}, depth


def skipped(name, depth):
    block = name.split(".encoder.layers.")
    return "vision_model.post_layernorm" in name or len(block) == 2 and int(block[1].split(".")[0]) >= depth


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory, bytes_folder):
    return clients.write(request.param, tmp_path_factory.mktemp("served"), bytes_folder)


def test_vllm_finds_every_tensor_and_no_other(folder):
    c = json.loads((folder / "config.json").read_text())
    want, depth = asked(c)
    there = {k: s for k, s in shapes(folder).items() if not skipped(k, depth)}
    assert there == want and depth == 2 and len(shapes(folder)) > len(there)


def test_vllm_finds_every_setting(folder):
    c = json.loads((folder / "config.json").read_text())
    v, t = c["vision_config"], c["text_config"]
    assert c["architectures"] == ["LlavaForConditionalGeneration"] and c["model_type"] == "llava"
    assert set(t["architectures"]) < ARCHITECTURES and c["projector_hidden_act"] in ACTIVATIONS
    assert v["model_type"] in ("clip_vision_model", "siglip_vision_model") and v["hidden_act"] in ACTIVATIONS
    assert c["pad_token_id"] == clients.PAD and c["tie_word_embeddings"] == t["tie_word_embeddings"]
    assert v["image_size"] % v["patch_size"] == 0 and type(c["vision_feature_layer"]) is int
    # SGLang looks here for the dtype, and its loader knows "full" and not "default": no tower with a class token
    assert c["torch_dtype"] in ("float32", "float16", "bfloat16")
    assert c["vision_feature_select_strategy"] == ("default" if "clip" in v["model_type"] else "full")


def test_vllm_and_processor_count_the_same_image_tokens(folder):
    """It checks one against the other, and pixels against the tower's size."""
    T = pytest.importorskip("transformers")
    from PIL import Image
    c = json.loads((folder / "config.json").read_text())
    v, processor = c["vision_config"], T.AutoProcessor.from_pretrained(folder)
    assert type(processor) is T.LlavaProcessor and processor.image_token == "<image>"
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert image == c["image_token_index"] < c["text_config"]["vocab_size"]
    own = (v["image_size"] // v["patch_size"]) ** 2 + ("clip" in v["model_type"])
    own -= c["vision_feature_select_strategy"] == "default"
    seen = processor(images=Image.new("RGB", (23, 9)), text="<image>", return_tensors="pt")
    assert (seen["input_ids"] == image).sum() == own == c["image_seq_length"]
    assert seen["pixel_values"].shape == (1, 3, v["image_size"], v["image_size"])
    # of a question it renders the image as the text <image>, or leaves the part to the template: once, either way
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    texts = [processor.apply_chat_template([{"role": "user", "content": x}], add_generation_prompt=True)
             for x in ("<image>\nWhat?", parts)]
    assert texts[0] == texts[1] and texts[0].count("<image>") == 1


# ---- transformers ---------------------------------------------------------------------------------------------------

NEVER = {"transformers_version", "dtype", "backend", "is_local", "local_files_only", "model_specific_special_tokens"}


def flat(d, at=()):
    out = {}
    for k, x in d.items():
        out |= flat(x, (*at, k)) if isinstance(x, dict) and x else {(*at, k): x}
    return out


def test_transformers_would_write_the_same_metadata(folder, tmp_path):
    """save_pretrained of the model and of the processor that were read from it, key by key."""
    T = pytest.importorskip("transformers")
    ours, theirs = folder, tmp_path / "theirs"
    model = T.LlavaForConditionalGeneration.from_pretrained(ours, dtype="auto")
    model.save_pretrained(theirs)
    T.AutoProcessor.from_pretrained(ours).save_pretrained(theirs)
    assert {p.name for p in theirs.iterdir()} <= {p.name for p in ours.iterdir()}
    assert shapes(theirs) == shapes(ours)
    mine, other = (flat(json.loads((at / "config.json").read_text())) for at in (ours, theirs))
    for k in other.keys() - mine.keys():
        sub = {"text_config": model.config.text_config, "vision_config": model.config.vision_config}.get(k[0])
        if k[-1] == "dtype":
            assert other[k] == mine[("torch_dtype",)]                         # its name until transformers 4
        elif "rope_parameters" in k:                                          # flat until transformers 4
            flat_ = mine[("text_config", "rope_theta")] if k[-1] == "rope_theta" else (
                mine.get(("text_config", "rope_scaling", k[-1]), "default"))
            assert other[k] == flat_
        elif k[-1] not in NEVER | {"layer_types"}:                            # layer_types follows from the window
            assert other[k] in (getattr(type(sub)(), k[-1]), None), k
    for k in other.keys() & mine.keys() - {("text_config", "sliding_window")}:      # which Qwen2 forgets when off
        assert other[k] == mine[k], k
    for name in ("generation_config.json", "tokenizer_config.json", "processor_config.json"):
        mine, other = (json.loads((at / name).read_text()) for at in (ours, theirs))
        images = other.pop("image_processor", {})                             # a file of its own until transformers 4
        pre = json.loads((ours / "preprocessor_config.json").read_text())
        assert all(pre[k] == x for k, x in images.items() if k in pre)
        assert set(images) - set(pre) <= {"do_resize", "do_rescale", "do_normalize", "rescale_factor"}     # defaults
        wrong = {k for k, x in other.items() if k not in NEVER and mine.get(k) != x}
        assert wrong <= {"tokenizer_class"}                                   # theirs is not known to transformers 4
