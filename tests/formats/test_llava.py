"""LLaVA folders in and out, to the last bit: transformers writes and reads them as well."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import error, example
from safetensors.torch import load_file, save_file
from test_model import FAMILIES, TEXT, VISION, all_logits, exact_norms, their_logits, theirs

from data import pack
from formats import configs, llava, names, tensors

PRE = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True, "do_rescale": True,
       "do_normalize": True, "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255,
       "size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8},
       "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
EXAMPLES = [example(1), example(2, images=0, text=14), example(3, images=3, text=5)]


def random(model, seed=0):
    torch.manual_seed(seed)
    for n, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in n and n.endswith("weight") else 0.0, std=0.2)
    return model.eval()


def add_files(folder, tok=None, pre=None):
    if pre:
        (folder / "preprocessor_config.json").write_text(json.dumps(pre))
    for f in tok.glob("tokenizer*.json") if tok else ():
        shutil.copy(f, folder)
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory, bytes_folder):
    """A CLIP and a Llama as transformers writes them -> vision, llm"""
    T = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("towers")
    random(T.CLIPVisionModel(T.CLIPVisionConfig(**VISION | {"image_size": 8}))).save_pretrained(root / "clip")
    random(T.LlamaForCausalLM(T.LlamaConfig(**TEXT))).save_pretrained(root / "llama")
    return add_files(root / "clip", pre=PRE), add_files(root / "llama", bytes_folder)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory, bytes_folder):
    """A LLaVA as transformers 5 writes a new one (without `vision_model.`)"""
    folder = tmp_path_factory.mktemp("llava") / "a"
    theirs(v={"image_size": 8}).float().save_pretrained(folder)
    return add_files(folder, bytes_folder, PRE)


@pytest.fixture
def copy(towers, tmp_path):
    """The two towers, to be damaged"""
    return tuple(shutil.copytree(t, tmp_path / t.name) for t in towers)


def respell(folder, out, spelling):
    """The same folder with its tensors under other names"""
    shutil.copytree(folder, out)
    tensors = {spelling(names.rename(k)): v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def hub(k):
    return k


def in_memory(k):
    k = k.replace("language_model.lm_head.", "lm_head.")
    return k if k.startswith("lm_head") else "model." + k.replace("language_model.model.", "language_model.")


SPELLINGS = {"A": lambda k: k.replace("vision_tower.vision_model.", "vision_tower."), "B": hub, "C": in_memory,
             "D": lambda k: in_memory(k).replace("vision_tower.vision_model.", "vision_tower.")}


def export(model, folder, out, dtype=torch.float32, template="vicuna_v1", aspect="crop"):
    llava.save_model(out, model.state_dict(), model.cfg, folder, template, None, aspect, dtype)
    return out


def same(a, b):
    a, b = ({**m.state_dict(), **f.unused} for m, f in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- in -------------------------------------------------------------------------------------------------------------

def test_two_towers_of_transformers_become_a_model(towers, bytes_folder):
    vision, llm = towers
    model, folder = llava.load_model(vision, llm)
    published = load_file(vision / "model.safetensors") | load_file(llm / "model.safetensors")
    state = model.state_dict()
    for k, x in state.items():
        if not k.startswith("multi_modal_projector"):
            name = k.removeprefix("vision_tower.vision_model.").removeprefix("language_model.")
            assert torch.equal(x, published.pop(name)), k
    assert {"vision_tower.vision_model." + k for k in published} == folder.unused.keys()  # the last block and norm
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert model.cfg.image_token_index == 3 and model.cfg.text.num_key_value_heads == 2


def test_only_the_connector_depends_on_the_seed(towers):
    one, same_, other = (llava.load_model(*towers, seed=s)[0].state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[k], same_[k]) for k in one)
    assert {k for k in one if not torch.equal(one[k], other[k])} == {k for k in one if k.startswith("multi_modal_")}
    assert 0.9 * 32**-0.5 < one["multi_modal_projector.linear_1.weight"].abs().max() <= 32**-0.5  # as any Linear starts
    assert "multi_modal_projector.linear_2.weight" not in llava.load_model(*towers, connector="linear")[0].state_dict()


def test_a_whole_clip_is_a_vision_tower(towers, tmp_path):
    """CLIPModel: both halves in one file, the vision settings nested."""
    T = pytest.importorskip("transformers")
    vision, llm = towers
    tower = load_file(vision / "model.safetensors")
    rest = {k: torch.ones(4) for k in ("text_model.final_layer_norm.weight", "logit_scale", "visual_projection.weight",
                                       "text_projection.weight", "vision_model.embeddings.position_ids")}
    save_file({f"vision_model.{k}": v for k, v in tower.items()} | rest, tmp_path / "model.safetensors")
    nested = json.loads((vision / "config.json").read_text())
    nested.pop("layer_norm_eps"), nested.pop("hidden_act")                       # absent, as in the published one
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": nested}))
    add_files(tmp_path, pre=PRE)
    assert same(llava.load_model(tmp_path, llm), llava.load_model(*towers))
    assert T.CLIPVisionConfig().hidden_act == llava.load_model(tmp_path, llm)[0].cfg.vision.hidden_act == "quick_gelu"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_four_spellings_of_a_llava_load(llava_folder, tmp_path, spelling):
    reference = llava.load_model(init=llava_folder)
    folder = respell(llava_folder, tmp_path / "other", SPELLINGS[spelling])
    names = set(load_file(folder / "model.safetensors"))
    assert (names == set(load_file(llava_folder / "model.safetensors"))) == (spelling == "A")    # as 5 writes it
    assert same(llava.load_model(init=folder), reference)


def test_a_tensor_under_two_names_is_refused(llava_folder, tmp_path):
    folder = shutil.copytree(llava_folder, tmp_path / "twice")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(512, 32)}, folder / "model.safetensors")
    assert "language_model.lm_head.weight under two names" in error(llava.load_model, init=folder)


@pytest.mark.parametrize("name", ["three heads, one group", "linear rope", "biases"])     # the others: test_clients.py
def test_config_tensors_and_logits_survive_writing(name, tmp_path, bytes_folder):
    """Saved by transformers, read by us, written by us, read by both: the same config, bits and logits."""
    T = pytest.importorskip("transformers")
    vision, v, text, t = FAMILIES[name]
    theirs(vision, v | {"image_size": 8}, text, t).float().save_pretrained(tmp_path / "a")
    pre = {k: x for k, x in PRE.items() if vision == "CLIP" or not k.startswith("image_")}
    first = llava.load_model(init=add_files(tmp_path / "a", bytes_folder, pre))
    second = llava.load_model(init=export(*first, tmp_path / "b"))
    assert second[0].cfg == first[0].cfg and same(second, first)
    back, info = T.LlavaForConditionalGeneration.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    back = exact_norms(back.double().eval())
    with torch.no_grad():
        mine = all_logits(second[0].double(), pack(EXAMPLES, 8))
    true = their_logits(back, EXAMPLES, first[0].cfg.vision)
    assert (mine - true).abs().max() <= 1e-10 * max(1, true.abs().max())


# ---- errors in one line ----------------------------------------------------------------------------------------------

def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **new):
    c = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(c | new))


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
     "1 tensor(s) missing, the first is language_model.model.layers.1.mlp.up_proj.weight"),
    (lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.ones(1)}),
     "1 unexpected tensor(s), the first is language_model.model.layers.7.mlp.up_proj.weight"),
    (lambda t: t.update({"model.norm.weight": torch.ones(31)}),
     "language_model.model.norm.weight has shape (31,), the config says (32,)"),
    (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),                # codes of weights
     "language_model.model.norm.weight holds torch.int8, where one of torch.float16, torch.bfloat16, torch.float32"),
    (lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}), "holds torch.float8_e4m3fn"),
])
def test_a_missing_unexpected_or_misshapen_tensor_is_named(copy, change, says):
    damage(copy[1], change)
    assert says in error(llava.load_model, *copy)


@pytest.mark.parametrize("where, name, bad, dtype", [
    (1, "lm_head.weight", torch.nan, torch.float32),
    (1, "model.layers.1.mlp.up_proj.weight", torch.inf, torch.bfloat16),
    (0, "encoder.layers.2.mlp.fc1.weight", -torch.inf, torch.float16)])
def test_a_value_that_is_not_finite_is_named(copy, where, name, bad, dtype):
    """Also in the last block of the tower, which is not built, but written again."""
    def poison(tensors):
        tensors.update({k: x.to(dtype) for k, x in tensors.items()})
        tensors[name].view(-1)[7] = bad
    damage(copy[where], poison)
    says = names.rename(name) if where else f"vision_tower.vision_model.{name}"
    assert error(llava.load_model, *copy).endswith(f": {says} holds values that are not finite")


@pytest.mark.parametrize("length, scaling, room", [
    (4096, None, 4096), (4096, {"type": "linear", "factor": 4.0}, 16384),         # lmsys/vicuna-7b-v1.5-16k
    (131072, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}, 131072)])                # meta-llama/Llama-3.1-8B
def test_positions_are_those_after_scaling(length, scaling, room):
    config = dict(model_type="llama", max_position_embeddings=length, rope_scaling=scaling)
    assert configs.positions(configs.text_config(config)) == room


def test_tables_of_old_files_are_ignored(copy, towers):
    damage(copy[1], lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    damage(copy[0], lambda t: t.update({"embeddings.position_ids": torch.arange(5)[None]}))
    assert same(llava.load_model(*copy), llava.load_model(*towers))


def test_pickles_give_tensors_and_run_nothing(copy, towers):
    """torch.save's files, new and old, are opened with weights_only=True; what is more than tensors is refused."""
    for part, zipped in zip(copy, (True, False)):
        tensors = load_file(part / "model.safetensors")
        (part / "model.safetensors").unlink()
        torch.save(tensors, part / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert same(llava.load_model(*copy), llava.load_model(*towers))
    file = copy[1] / "pytorch_model.bin"
    for bad in (b"\x80\x02cos\nsystem\n(X\x04\0\0\0exittR.", b"", b"PK\x03\x04", b"no pickle"):
        file.write_bytes(bad)
        assert "is not a file of tensors alone, or is cut off" in error(llava.load_model, *copy)
    torch.save(Path("/"), file)
    assert "cut off, so it is not opened (Unpickling" in error(llava.load_model, *copy)
    for bad in ({"state_dict": tensors}, tensors | {"model.norm.weight": torch.ones(32).to_sparse()}):
        torch.save(bad, file)
        assert "is not a dict of dense tensors by name" in error(llava.load_model, *copy)


def test_a_pickle_beside_safetensors_is_not_even_opened(copy, towers):
    for part in copy:                                                         # many published folders hold both
        (part / "pytorch_model.bin").write_bytes(b"never read")
    assert same(llava.load_model(*copy), llava.load_model(*towers))


def shards(folder, name="model-00002-of-00002.safetensors"):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first, *rest = sorted(tensors)
    save_file({first: tensors[first]}, folder / "model-00001-of-00002.safetensors")
    save_file({k: tensors[k] for k in rest}, folder / "model-00002-of-00002.safetensors")
    where = {first: "model-00001-of-00002.safetensors"} | {k: name for k in rest}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where


def test_a_model_in_shards_loads(copy, towers):
    shards(copy[1])
    assert same(llava.load_model(*copy), llava.load_model(*towers))


def test_a_shard_outside_its_folder_is_refused(copy):
    shards(copy[1], "../model.safetensors")
    assert "names a shard outside its folder: ../model.safetensors" in error(llava.load_model, *copy)


def test_a_safetensors_header_names_a_tensor_once(copy):
    """Its library takes the last of two entries; other readers take the first."""
    file = copy[1] / "model.safetensors"
    blob = file.read_bytes()
    header = blob[8 : 8 + int.from_bytes(blob[:8], "little")].rstrip()
    entry = json.dumps(json.loads(header)["model.norm.weight"])
    header = header[:-1] + b',"model.norm.weight":' + entry.encode() + b"}"
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + blob[8 + int.from_bytes(blob[:8], "little"):])
    assert "duplicate key 'model.norm.weight'" in error(llava.load_model, *copy)


@pytest.mark.parametrize("part", [0, 1])
def test_a_lie_about_layers_costs_nothing(copy, part):
    """Ten million layers would take minutes to build."""
    configure(copy[part], num_hidden_layers=10**7)
    assert "10,000,000 layers in its config.json, but 76 tensors in its files" in error(llava.load_model, *copy)


def test_an_index_must_be_true(copy, towers):
    where = shards(copy[1])
    index = copy[1] / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where | {"more": "model-00001-of-00002.safetensors"}}))
    assert same(llava.load_model(*copy), llava.load_model(*towers))           # a tensor that is needed would be missing
    index.write_text(json.dumps({"weight_map": where | {"more": "model-00003-of-00003.safetensors"}}))
    assert "model-00003-of-00003.safetensors is missing" in error(llava.load_model, *copy)
    for wrong in ("{}", '{"weight_map": {"a": 1}}'):
        index.write_text(wrong)
        assert "has no weight_map" in error(llava.load_model, *copy)


def test_a_wrong_folder_is_one_line(copy, tmp_path, towers, llava_folder):
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in error(llava.load_model, tmp_path / "empty", copy[1])
    assert "there is no such folder" in error(llava.load_model, init=tmp_path / "nowhere")
    assert "no model.safetensors in it" in error(llava.load_model, init=tmp_path / "empty")
    assert "holds a 'clip_vision_model', not a llava model" in error(llava.load_model, init=copy[0])
    assert "vision tower of type 'llama'" in error(llava.load_model, copy[1], copy[0])          # the wrong way round
    (copy[1] / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    assert "is not a whole safetensors file" in error(llava.load_model, *copy)
    for text, says in (("{", "config.json: Expecting"), ("[1]", "is not a json object"),
                       ('{"a": NaN}', "NaN is not JSON"), ('{"a": 1e999}', "1e999 is larger than any float"),
                       ('{"hidden_size": 32, "hidden_size": 64}', "duplicate key 'hidden_size'")):
        (copy[1] / "config.json").write_text(text)
        assert says in error(llava.load_model, *copy)


@pytest.mark.parametrize("part, new, says", [
    (0, dict(model_type="beit"), "vision tower of type 'beit': clip_vision_model, siglip_vision_model, dinov2, "),
    (0, dict(hidden_act="relu"), "vision tower with hidden_act 'relu'"),
    (1, dict(quantization_config={"quant_method": "fp8"}), "holds quantised weights (fp8), which"),
    (1, dict(rope_parameters={"rope_theta": 0}), "rope_theta=0 in its"),
    (1, dict(rope_scaling={"type": "linear", "factor": 0}), "'linear' without a number above 0 for factor"),
    (1, dict(model_type="mamba"),
     "language model of type 'mamba': llama, mistral, qwen2, qwen3, gemma, persimmon, idefics, opt are supported"),
    (1, dict(hidden_act="gelu"), "language model with hidden_act 'gelu'"),
    (1, dict(rope_scaling={"rope_type": "yarn"}), "rope scaling 'yarn'"),
    (1, dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
     "a sliding window in 1 of its 2 layers"),
    (1, dict(vocab_size=400), "the tokenizer knows"),
])
def test_unsupported_configs_are_refused(copy, part, new, says):
    configure(copy[part], **new)
    assert says in error(llava.load_model, *copy)


def test_image_tokens_are_called_index_or_id(llava_folder, tmp_path):
    """Two names of one thing in transformers 5; without either it is 32000, as in its class."""
    folder = shutil.copytree(llava_folder, tmp_path / "other")
    c = json.loads((folder / "config.json").read_text())
    c = {k: x for k, x in c.items() if k not in ("image_token_index", "image_token_id")}
    (folder / "config.json").write_text(json.dumps(c | {"image_token_id": 3}))
    assert llava.load_model(init=folder)[0].cfg.image_token_index == 3
    (folder / "config.json").write_text(json.dumps(c))
    assert "its image token has id 3, but config.json says 32000" in error(llava.load_model, init=folder)


@pytest.mark.parametrize("new, says", [
    (dict(vision_feature_select_strategy="full"), "vision_feature_select_strategy 'full'"),
    (dict(projector_hidden_act="relu"), "projector_hidden_act 'relu'"),
    (dict(vision_feature_layer=[-2, -5]), "feature layers [-2, -5]; one is supported"),
    (dict(model_type="llava_onevision"), "not a llava model"),
])
def test_a_llava_of_another_kind_is_refused(llava_folder, tmp_path, new, says):
    folder = shutil.copytree(llava_folder, tmp_path / "other")
    configure(folder, **new)
    assert says in error(llava.load_model, init=folder)


# ---- out ------------------------------------------------------------------------------------------------------------

def test_a_model_comes_back_bit_by_bit(towers, tmp_path):
    """The block behind the feature layer and the last norm go along, so that other readers find a whole tower."""
    first = llava.load_model(*towers)
    assert any("layers.2" in k for k in first[1].unused) and any("post_layernorm" in k for k in first[1].unused)
    again = llava.load_model(init=export(*first, tmp_path / "out"))
    assert same(again, first) and again[0].cfg == first[0].cfg
    third = llava.load_model(init=export(*again, tmp_path / "third"))
    assert same(third, first)
    assert (tmp_path / "third" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()


def test_weights_are_rounded_once_and_overflow_is_refused(towers, tmp_path):
    model, folder = llava.load_model(*towers)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        out = export(model, folder, tmp_path / str(dtype), dtype)
        back, _ = llava.load_model(init=out)
        assert all(torch.equal(x.to(dtype).float(), back.state_dict()[k]) for k, x in model.state_dict().items())
        assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {dtype}
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    with torch.no_grad():
        model.language_model.model.norm.weight[0] = 1e6
    line = error(export, model, folder, tmp_path / "big", torch.float16)
    assert "language_model.model.norm.weight is not finite in torch.float16" in line and not (tmp_path / "big").exists()


def test_a_large_model_is_written_in_shards(towers, tmp_path, monkeypatch):
    assert tensors.SHARD == 5 * 10**9                                              # as published models have them
    monkeypatch.setattr(tensors, "SHARD", 20_000)
    first = llava.load_model(*towers)
    out = export(*first, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {n: set(load_file(out / n)) for n in set(index["weight_map"].values())}
    assert len(found) > 3 and not (out / "model.safetensors").exists()
    assert {k: n for n, keys in found.items() for k in keys} == index["weight_map"]
    state = {**first[0].state_dict(), **first[1].unused}
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert same(llava.load_model(init=out), first)


def test_transformers_tokenizes_as_we_do(towers, tmp_path):
    T = pytest.importorskip("transformers")
    model, folder = llava.load_model(*towers)
    out = export(model, folder, tmp_path / "out")
    tok = T.AutoTokenizer.from_pretrained(out)
    for s in ("What is this? It is a black cat.", "  two  spaces\nand ünïcode 🙂", ""):
        assert tok(s, add_special_tokens=True)["input_ids"] == folder.tok.text(s)[0]     # no BOS of its own
    assert tok.convert_tokens_to_ids("<image>") == model.cfg.image_token_index == 3
    assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token) == (1, 2, "<pad>") and tok.padding_side == "left"
    assert tok("<s> <image>")["input_ids"][0] == 1
    assert T.GenerationConfig.from_pretrained(out).eos_token_id == 2


def test_only_the_template_writes_bos(copy, tmp_path):
    """Llama 3's tokenizer.json, and those that transformers converts, put one in front of every text."""
    T = pytest.importorskip("transformers")
    spec = json.loads((copy[1] / "tokenizer.json").read_text())
    one, rest = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    spec["post_processor"] = {"type": "TemplateProcessing", "single": [one, rest], "pair": [one, rest],
                              "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    (copy[1] / "tokenizer.json").write_text(json.dumps(spec))
    model, folder = llava.load_model(*copy)
    assert T.AutoTokenizer.from_pretrained(copy[1])("What")["input_ids"][0] == 1 != folder.tok.text("What")[0][0]
    tok = T.AutoTokenizer.from_pretrained(export(model, folder, tmp_path / "out"))
    assert tok("What")["input_ids"] == folder.tok.text("What")[0]
    text = tok.apply_chat_template([{"role": "user", "content": "What"}], tokenize=False)
    assert tok(text)["input_ids"].count(1) == 1 == tok(text)["input_ids"][0]


@pytest.mark.parametrize("aspect", ["crop", "squash"])
def test_transformers_answers_as_we_do(towers, tmp_path, aspect):
    """Tokens, pixels to 1e-6 and the greedy answer follow from the folder alone."""
    T = pytest.importorskip("transformers")
    from PIL import Image

    from generate import generate
    from images import preprocess
    model, folder = llava.load_model(*towers)
    out = export(model, folder, tmp_path / "out", aspect=aspect)
    processor = T.AutoProcessor.from_pretrained(out)
    assert type(processor) is T.LlavaProcessor
    image = Image.effect_noise((23, 14), 90).convert("RGB")
    there = processor(images=image, text="<s>USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
    tok = folder.tok
    ids = [1, *tok.text("USER: ")[0], *[3] * 4, *tok.text("\nWhat is this? ASSISTANT:")[0]]
    assert there["input_ids"][0].tolist() == ids
    mine = preprocess(image, configs.image_spec(folder.pre, aspect))
    mean, std = (torch.tensor(PRE[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    torch.testing.assert_close((mine / 255 - mean) / std, there["pixel_values"][0], rtol=0, atol=1e-6)
    other = T.LlavaForConditionalGeneration.from_pretrained(out).eval()
    there = other.generate(**there, max_new_tokens=8, do_sample=False)[0, len(ids):].tolist()
    ours = generate(model, [torch.tensor(ids)], mine[None], {2}, 8, banned=range(len(tok), 512))[0]
    assert [i for i in there if i != 2] == ours and len(ours) > 0


@pytest.mark.parametrize("template", ["plain", "llava_llama_2", "llama_3", "chatml"])     # the others: test_clients.py
def test_transformers_writes_our_prompts_and_stops(towers, tmp_path, template):
    """By processor and tokenizer of the folder alone. Both name the token that ends an answer as EOS, where the base
    model's is </s>: generate(eos_token_id=tokenizer.eos_token_id) must stop."""
    T = pytest.importorskip("transformers")
    from PIL import Image

    from generate import Chat
    model, folder = llava.load_model(*towers)
    out, state = tmp_path / "out", model.state_dict()
    llava.save_model(out, state, model.cfg, folder, template, "Be brief.", "pad", torch.float32)
    content = [{"type": "image", "image": Image.new("RGB", (9, 12))}, {"type": "text", "text": "What is this?"}]
    how = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
    there = T.AutoProcessor.from_pretrained(tmp_path / "out").apply_chat_template(
        [{"role": "user", "content": content}], return_tensors="pt", **how)
    speaker = Chat.of(*llava.load_model(init=tmp_path / "out"), template, "Be brief.", "pad")
    says = T.GenerationConfig.from_pretrained(tmp_path / "out")               # where an answer ends, what none holds
    assert {says.eos_token_id} == (speaker.stop_ids if template != "plain" else {2})
    assert set(says.suppress_tokens) == speaker.banned
    ours = speaker.prompt([("<image>\nWhat is this?", None)], [speaker.layout.block()])
    assert there["input_ids"][0].tolist() == ours.tolist()
    assert there["pixel_values"].shape == (1, 3, 8, 8)
    tok = T.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tok.eos_token_id == says.eos_token_id
    assert tok.eos_token == {"llama_3": "<|eot_id|>", "chatml": "<|im_end|>"}.get(template, "</s>")
    if template != "plain":
        other = T.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
        other.generation_config.eos_token_id = None
        with torch.no_grad():                                        # now it ends every answer at once
            last = other(**there, output_hidden_states=True).hidden_states[-1][0, -1]
            other.lm_head.weight.zero_()[tok.eos_token_id] = last
        answer = other.generate(**there, max_new_tokens=5, eos_token_id=tok.eos_token_id)[0]
        assert len(answer) == len(there["input_ids"][0]) + 1
    (tmp_path / "out" / "chat_template.jinja").unlink()              # as transformers before 4.50 read it
    turns = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yo"), ("user", "?"))]
    there = T.AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(turns, **how)
    assert list(there["input_ids"]) == speaker.prompt([("Hi", "Yo"), ("?", None)]).tolist()


def test_the_config_says_how_the_model_was_trained(towers, tmp_path):
    model, folder = llava.load_model(*towers)
    out, text = tmp_path / "out", model.cfg.text
    text.max_position_embeddings, text.rope_scaling = 512, {"rope_type": "linear", "factor": 4.0}
    llava.save_model(out, model.state_dict(), model.cfg, folder, "plain", "be brief", "pad", torch.float32, "a card\n")
    assert llava.load_model(init=out)[1].meta == {"template": "plain", "system": "be brief", "image_aspect": "pad"}
    pre = json.loads((out / "preprocessor_config.json").read_text())
    assert pre["image_processor_type"] == "LlavaImageProcessor" and pre["do_pad"]
    assert pre["crop_size"] == PRE["crop_size"]
    c = json.loads((out / "config.json").read_text())
    text = c["text_config"]
    assert c["torch_dtype"] == "float32" and "dtype" not in text and text["architectures"] == ["LlamaForCausalLM"]
    assert text["rope_theta"] == 1e4 and "rope_parameters" not in text                   # flat: 4.x reads no other
    assert (out / "README.md").read_text().endswith("a card\n")
    names, both, talk = (json.loads((out / f"{n}.json").read_text())          # what older readers would miss (7.1)
                         for n in ("tokenizer_config", "processor_config", "chat_template"))
    assert {k: names[k] for k in ("tokenizer_class", "model_input_names", "clean_up_tokenization_spaces")} == {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False}
    assert names["model_max_length"] == 2048                                  # positions after scaling, as trained
    assert {x["processor_class"] for x in (names, both, pre)} == {"LlavaProcessor"}
    assert names["chat_template"] == talk["chat_template"] == (out / "chat_template.jinja").read_text()


def test_image_sizes_are_read_from_either_spelling():
    from images import ImageSpec
    mean = (0.1, 0.2, 0.3)
    assert configs.image_spec({"crop_size": 8, "image_mean": mean}, "crop") == ImageSpec(8, "crop", 3, mean)
    assert configs.image_spec({"size": {"height": 9, "width": 9}, "resample": 2}, "squash")[:3] == (9, "squash", 2)
    assert configs.image_spec({"crop_size": {"height": 7, "width": 7}, "size": {"shortest_edge": 9}}, "pad").side == 7
    assert configs.image_spec({"do_center_crop": False, "crop_size": 7, "size": 9}, "squash").side == 9
    assert "image_aspect=stretch: pad, crop or squash" in error(configs.image_spec, {}, "stretch")


@pytest.mark.parametrize("new", [
    dict(do_rescale=False), dict(do_normalize=False, rescale_factor=0.5),
    dict(image_mean=[0.5] * 3, image_std=[0.25] * 3), dict(do_normalize=None)])                # null means no
def test_normalisation_is_that_of_the_image_processor(towers, copy, new):
    """do_normalize and rescale_factor included, but for the order of two roundings."""
    pytest.importorskip("transformers")
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from images import preprocess
    add_files(copy[0], pre=PRE | new)
    model, folder = llava.load_model(*copy)
    image = Image.effect_noise((23, 14), 90).convert("RGB")
    there = CLIPImageProcessorPil(**PRE | new)(image, return_tensors="pt")["pixel_values"].float()
    mine = preprocess(image, configs.image_spec(folder.pre, "crop"))
    embeddings = model.vision_tower.vision_model.embeddings
    with torch.no_grad():                                          # a patch embedding that hands its pixels on
        embeddings.patch_embedding.weight.zero_().view(32, -1).copy_(torch.eye(48)[:32])
        embeddings.class_embedding.zero_(), embeddings.position_embedding.weight.zero_()
        seen = embeddings(mine[None])[0, 1:, :32]
    patches = there[0].unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).reshape(4, 48)[:, :32]
    torch.testing.assert_close(seen, patches, rtol=1e-6, atol=1e-6 * patches.abs().max().item())


@pytest.mark.parametrize("tower, aspect", [("clip", "squash"), ("siglip", "crop"), ("siglip", "pad")])
def test_absent_mean_and_std_are_the_towers(towers, tmp_path, tower, aspect):
    """Whichever image processor is written: another class would have other defaults."""
    T = pytest.importorskip("transformers")
    from PIL import Image

    from images import preprocess
    shutil.copytree(towers[0], tmp_path / "tower")
    if tower == "siglip":
        config = T.SiglipVisionConfig(**VISION | {"image_size": 8})
        random(T.SiglipVisionModel(config)).save_pretrained(tmp_path / "tower")
    add_files(tmp_path / "tower", pre={k: None if "mean" in k else x for k, x in PRE.items() if k != "image_std"})
    first = llava.load_model(tmp_path / "tower", towers[1])
    model, folder = llava.load_model(init=export(*first, tmp_path / "out", aspect=aspect))
    image = Image.effect_noise((23, 14), 90).convert("RGB")
    mine = preprocess(image, configs.image_spec(folder.pre, aspect))
    v = model.cfg.vision
    assert v.image_mean == ((0.5,) * 3 if tower == "siglip" else tuple(PRE["image_mean"]))
    assert first[0].cfg.vision.image_mean == v.image_mean
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (v.image_mean, v.image_std))
    there = T.AutoProcessor.from_pretrained(tmp_path / "out").image_processor(image, return_tensors="pt")
    torch.testing.assert_close((mine / 255 - mean) / std, there["pixel_values"][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("new, says", [
    (dict(do_resize=False), "do_resize=false is not supported"), (dict(resample=9), "9 is not a valid Resampling"),
    (dict(crop_size={"height": 8, "width": 9}), "are no squares of one side"),
    (dict(size={"longest_edge": 8}, do_center_crop=False), "no squares"),
    (dict(image_mean=[None]), "preprocessor_config.json of a vision tower cannot be read: TypeError"),
    (dict(crop_size=9), "no squares of side 9 can be cut from images of size {'shortest_edge': 8}"),
    (dict(crop_size=3), "images of side 3; this vision tower was trained on 8"),
    (dict(crop_size=20_000, size=20_000), "images of side 20000; this")])          # 800 MB of positions, at width 32
def test_an_unsupported_image_processor_is_refused(copy, new, says):
    add_files(copy[0], pre=PRE | new)
    assert says in error(lambda: configs.image_spec(llava.load_model(*copy)[1].pre, "crop"))


def test_a_llava_reads_images_of_its_own_size(llava_folder, tmp_path):
    folder = add_files(shutil.copytree(llava_folder, tmp_path / "other"), pre=PRE | {"crop_size": 7})
    assert "makes images of side 7, the tower reads 8" in error(llava.load_model, init=folder)


def test_image_aspect_survives_writing(towers, tmp_path):
    """With and without pumice.json, also where it changes."""
    first = llava.load_model(*towers)
    for aspect in ("pad", "squash"):
        model, folder = llava.load_model(init=export(*first, tmp_path / aspect, aspect=aspect))
        assert llava.aspect(folder, model.cfg) == llava.aspect(folder._replace(meta={}), model.cfg) == aspect
        other = "crop" if aspect == "pad" else "pad"
        again = llava.load_model(init=export(model, folder, tmp_path / f"{aspect}_{other}", aspect=other))
        assert llava.aspect(again[1]._replace(meta={}), model.cfg) == other     # nothing of the old way is left behind


def test_digests_tell_every_bit_and_place():
    assert tensors.tensor_digest(torch.arange(3e6) - 1e6) == "8ef1da86d0a5b8ed"       # as in published adapters
    x = torch.arange(3000.0).view(60, 50)
    assert tensors.tensor_digest(x) == tensors.tensor_digest(x.double())
    flipped, moved = x.clone(), x.clone()
    flipped[59, 49] = flipped[59, 49].nextafter(torch.tensor(1e9))
    moved[0, :2] = x[0, [1, 0]]
    assert len({tensors.tensor_digest(t) for t in (x, flipped, moved, x.view(50, 60), x.T)}) == 5
    assert tensors.base_digest({"a": "1", "b": "2"}) == tensors.base_digest({"b": "2", "a": "1"})
    assert tensors.base_digest({"a": "1"}) != tensors.base_digest({"a": "2"})
