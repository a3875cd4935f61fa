"""GGUF files, read with the gguf package: the bytes that it writes, and a model rebuilt from them exactly."""

import io
import json
import runpy
import shutil
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import ROOT, TEMPLATES, WORDS, make_tokenizer
from test_llava import EXAMPLES, FAMILIES, PRE, add_files, error, export
from test_model import all_logits, theirs

import chat
from data import pack
from formats import gguf as gguf_export, jinja, llava
from formats.tokenizer import Tokenizer
from model import VLM, TextConfig, VisionConfig, VLMConfig
from tools import export_gguf as cli

gguf = pytest.importorskip("gguf")
ARCHS = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


def folder(name, path, tok):
    """A tiny random LLaVA of some family as transformers writes it, with its tokenizer and image processor."""
    vision, v, text, t = FAMILIES[name]
    theirs(vision, v | {"image_size": 8}, text, t).float().save_pretrained(path)
    return add_files(path, tok, {k: x for k, x in PRE.items() if vision == "CLIP" or not k.startswith("image_")})


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory, bytes_folder):
    return folder("clip + llama", tmp_path_factory.mktemp("gguf") / "llava", bytes_folder)


def read(path):
    """-> {key: value}, {name: array as torch shapes it}"""
    reader = gguf.GGUFReader(path)
    keys = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    return keys, {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(*reversed(t.shape.tolist()))
                  for t in reader.tensors}


def rebuilt(keys, tensors, vision, model):
    """Tensors of both files -> a state dict, by the names and the permutation of the gguf package and llama.cpp."""
    arch, cfg = keys["general.architecture"], model.cfg.text
    names = gguf.get_tensor_name_map(ARCHS[arch], keys[f"{arch}.block_count"])
    vision_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, model.cfg.vision.depth)
    out = {}
    for name in model.state_dict():
        if name.startswith("language_model."):
            theirs = names.get_name(name.removeprefix("language_model."), try_suffixes=(".weight", ".bias"))
            x = tensors.pop(theirs)
            if arch == "llama" and ("attn_q." in theirs or "attn_k." in theirs):
                heads = cfg.num_attention_heads if "attn_q." in theirs else cfg.num_key_value_heads
                x = x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        elif name.startswith("multi_modal"):             # places in the nn.Sequential of the original LLaVA
            x = vision.pop(name.replace("multi_modal_projector.linear_1", "mm.0").replace(
                "multi_modal_projector.linear_2", "mm.2"))
        else:
            x = vision.pop(vision_names.get_name(name, try_suffixes=(".weight", ".bias")))
        out[name] = torch.tensor(x)
    return out


def logits(model):
    with torch.no_grad():
        return all_logits(model, pack(EXAMPLES, 8))


# ---- contents of the files ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"no groups", "mistral without", "clip with exact gelu"}))
def test_a_rebuilt_model_has_equal_logits(name, tmp_path, bytes_folder):
    model, _ = llava.load_model(init=folder(name, tmp_path / "llava", bytes_folder))
    text, mmproj, _ = gguf_export.export(tmp_path / "llava", tmp_path / "out", "f32")
    (keys, tensors), (vision_keys, vision) = read(text), read(mmproj)
    again = VLM(model.cfg)
    again.load_state_dict(rebuilt(keys, tensors, vision, model))
    assert torch.equal(logits(again), logits(model))
    assert set(tensors) == ({"rope_freqs.weight"} if name == "llama3 rope" else set()) and not vision   # nothing more
    cfg, arch = model.cfg.text, keys["general.architecture"]
    assert vision_keys["clip.vision.feature_layer"] == [2] and vision_keys["clip.vision.block_count"] == 2
    assert vision_keys["clip.use_gelu"] == (name == "siglip")
    assert keys[f"{arch}.rope.freq_base"] == pytest.approx(cfg.rope_theta, rel=1e-7)
    assert keys[f"{arch}.attention.key_length"] == cfg.head_dim
    assert keys[f"{arch}.context_length"] == (5 if "window" in name else cfg.max_position_embeddings)
    assert keys.get(f"{arch}.rope.scaling.factor") == (4.0 if name == "linear rope" else None)


def test_every_value_of_a_config_has_its_key():
    """All values differ, so that no key can get another's."""
    v = VisionConfig("siglip_vision_model", hidden_size=30, intermediate_size=40, num_hidden_layers=7, image_size=28,
                     num_attention_heads=6, patch_size=4, hidden_act="gelu_pytorch_tanh", layer_norm_eps=2**-9,
                     feature_layer=-3, image_mean=(0.25, 0.5, 0.75), image_std=(0.125, 0.375, 0.625))
    t = TextConfig("qwen2", vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                   num_attention_heads=12, num_key_value_heads=2, head_dim=16, rms_norm_eps=2**-8, rope_theta=4096.0,
                   rope_scaling={"type": "linear", "factor": 8.0}, max_position_embeddings=512, qkv_bias=True)
    assert gguf_export.text_keys(t, "bf16", "x") == {
        "general.architecture": "qwen2", "general.type": "model", "general.name": "x", "general.file_type": 32,
        "qwen2.vocab_size": 101, "qwen2.block_count": 3, "qwen2.embedding_length": 48, "qwen2.context_length": 512,
        "qwen2.feed_forward_length": 80, "qwen2.attention.head_count": 12, "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.key_length": 16, "qwen2.attention.value_length": 16, "qwen2.rope.dimension_count": 16,
        "qwen2.attention.layer_norm_rms_epsilon": 2**-8, "qwen2.rope.freq_base": 4096.0,
        "qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 8.0}
    assert gguf_export.mmproj_keys(VLMConfig(v, t), "f16", "x") == {
        "general.architecture": "clip", "general.type": "mmproj", "general.name": "x", "general.file_type": 1,
        "clip.has_text_encoder": False, "clip.has_vision_encoder": True, "clip.has_llava_projector": True,
        "clip.projector_type": "mlp", "clip.use_gelu": True, "clip.vision.image_size": 28, "clip.vision.patch_size": 4,
        "clip.vision.embedding_length": 30, "clip.vision.feed_forward_length": 40, "clip.vision.projection_dim": 48,
        "clip.vision.attention.head_count": 6, "clip.vision.attention.layer_norm_epsilon": 2**-9,
        "clip.vision.block_count": 5, "clip.vision.feature_layer": [5], "clip.vision.image_mean": [0.25, 0.5, 0.75],
        "clip.vision.image_std": [0.125, 0.375, 0.625]}


def test_rope_factors_of_llama_3_equal_their_definition(tmp_path, bytes_folder):
    folder("llama3 rope", tmp_path / "llava", bytes_folder)
    cfg = llava.load_model(init=tmp_path / "llava")[0].cfg.text
    found = read(gguf_export.export(tmp_path / "llava", "", "f16")[0])[1]["rope_freqs.weight"]
    s, want = cfg.rope_scaling, []
    for i in range(0, cfg.head_dim, 2):                  # in float64: 1, the factor, or between
        wave = 2 * np.pi * cfg.rope_theta ** (i / cfg.head_dim)
        blend = (s["original_max_position_embeddings"] / wave - s["low_freq_factor"]) \
            / (s["high_freq_factor"] - s["low_freq_factor"])
        want.append(1 / ((1 - min(max(blend, 0), 1)) / s["factor"] + min(max(blend, 0), 1)))
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert want[0] == 1 and want[-1] == 8


@pytest.mark.parametrize("dtype", gguf_export.DTYPES)
def test_the_files_equal_those_of_the_gguf_package(dtype, llava_folder, tmp_path):
    """Byte for byte: header, keys, offsets, padding, rounded matrices; vectors and positions are in f32."""
    model, source = llava.load_model(init=llava_folder)
    *paths, _ = gguf_export.export(llava_folder, tmp_path, dtype)
    cfg, kinds = model.cfg, {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16,
                             "bf16": gguf.GGMLQuantizationType.BF16}
    for path, keys, tensors in (
            (paths[0], gguf_export.text_keys(cfg.text, dtype, "llava")
             | gguf_export.tokenizer_keys(source.tok, cfg.text.vocab_size, None),
             [*gguf_export.text_tensors(model.language_model, cfg.text, dtype)]),
            (paths[1], gguf_export.mmproj_keys(cfg, dtype, "llava"), [*gguf_export.mmproj_tensors(model, dtype)])):
        writer = gguf.GGUFWriter(tmp_path / "theirs", keys.pop("general.architecture"))
        for k, v in keys.items():
            kind = gguf.GGUFValueType.get_type(v)
            writer.add_key_value(k, v, gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind)
        for name, x, how in tensors:
            raw = gguf.quants.quantize(x.numpy(), kinds[how])
            writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=kinds[how])
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
        assert path.read_bytes() == (tmp_path / "theirs").read_bytes()
        wide = {name: how for name, x, how in tensors if how != "f32"}
        assert (len(wide) > 10) == (dtype != "f32") and not any("embd.weight" in n and "v.pos" in n for n in wide)
        assert ("v.patch_embd.weight" in wide) == (dtype == "f16" and path == paths[1])


def test_values_beyond_fp16_are_refused(llava_folder, tmp_path):
    model, source = llava.load_model(init=llava_folder)
    model.language_model.lm_head.weight.data[0, 0] = 1e6
    run = export(model, source, tmp_path / "run")
    assert "output.weight is not finite in f16" in error(gguf_export.export, run, "", "f16")
    assert not list((run / "gguf").glob("*.gguf"))
    assert gguf_export.export(run, "", "bf16")[0].is_file()


def test_one_tensor_at_a_time_is_in_memory(llava_folder, tmp_path, monkeypatch):
    seen, load = [], llava.load_model

    def tensors():
        for i in range(6):
            assert sum(r() is not None for r in seen) <= 1, "those before the last one are gone"
            x = torch.full((64, 3), float(i))
            seen.append(weakref.ref(x))
            yield f"blk.{i}.attn_q.weight", x, "f16"
            del x
    gguf_export.write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, tensors)
    assert [x[0, 0] for x in read(tmp_path / "x.gguf")[1].values()] == [*range(6)] and len(seen) == 12
    run = export(*load(init=llava_folder), tmp_path / "run", torch.float16)
    monkeypatch.setattr(llava, "load_model", lambda **kw: seen.append(load(**kw)) or seen[-1])
    gguf_export.export(run, "", "bf16")
    assert {p.dtype for p in seen[-1][0].parameters()} == {torch.float16}     # as in the file: not a copy in fp32


# ---- the tokenizer --------------------------------------------------------------------------------------------------

def test_a_byte_level_tokenizer_keeps_pieces_and_merges(llava_folder, tmp_path):
    keys, _ = read(gguf_export.export(llava_folder, tmp_path, "f16")[0])
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in keys.items()}
    tok = Tokenizer(llava_folder)
    spec = json.loads((llava_folder / "tokenizer.json").read_text())
    assert keys["model"] == "gpt2" and keys["pre"] == "gpt-2"
    assert keys["tokens"] == [tok.full.id_to_token(i) or f"[PAD{i}]" for i in range(512)]
    special = set(tok.specials.values())
    assert keys["token_type"] == [3 if i in special else 1 if i < len(tok) else 5 for i in range(512)]
    assert [m.split(" ") for m in keys["merges"]] == [list(m) for m in spec["model"]["merges"]]
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["padding_token_id"]) == (1, 2, tok.specials["<pad>"])
    assert keys["add_bos_token"] is False and "scores" not in keys and "eot_token_id" not in keys


def test_an_added_text_token_is_user_defined(tmp_path):
    def change(spec):
        next(t for t in spec["added_tokens"] if t["content"] == "<|eot_id|>")["special"] = False
    tok = respecified(None, tmp_path / "t", change)
    types = gguf_export.tokenizer_keys(tok, 512, None)["tokenizer.ggml.token_type"]
    assert [types[tok.specials[t]] for t in ("<|eot_id|>", "<|im_end|>")] == [4, 3]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_chat_template_knows_llama_cpps_image_marker(template, bytes_folder):
    """Where transformers has <image> and a newline, llama.cpp puts its marker alone, before or after the text."""
    jinja2 = pytest.importorskip("jinja2")
    keys = gguf_export.tokenizer_keys(Tokenizer(bytes_folder), 512, template, "")
    ours, exported = (jinja2.Template(source) for source in (
        jinja.jinja(template, "").replace(jinja.BEGIN, "").replace(jinja.END, ""), keys["tokenizer.chat_template"]))
    for here, there in (("Hi", "Hi"), ("<image>\nHi", "<__media_x__>Hi"), ("<image>\nHi", "Hi<__media_x__>"),
                        ("<image>\nHi", "<image>\nHi"), ("<image>\n<image>\nHi", "<__media_x__>\n<__media_x__>\nHi")):
        want, found = (t.render(messages=[{"role": "user", "content": text}, {"role": "assistant", "content": "Yo"},
                                          {"role": "user", "content": "?"}],
                                bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
                       for t, text in ((ours, here), (exported, there)))
        assert found.replace("<__media_x__>", "<image>") == want


@pytest.mark.parametrize("template", ["chatml", "vicuna_v1"])
def test_the_file_names_the_end_of_a_turn(template, llava_folder, tmp_path):
    """Whether the folder's EOS is the base model's, as in older ones, or the template's."""
    model, source = llava.load_model(init=llava_folder)
    llava.save_model(tmp_path / "run", model.state_dict(), model.cfg, source, template, "", "pad")
    names = json.loads((tmp_path / "run/tokenizer_config.json").read_text())
    end, = chat.stop_ids(source.tok, template)
    for eos in ("</s>", names["eos_token"]):
        (tmp_path / "run/tokenizer_config.json").write_text(json.dumps(names | {"eos_token": eos}))
        keys, _ = read(gguf_export.export(tmp_path / "run", tmp_path / "out", "f16")[0])
        assert keys["tokenizer.ggml.eos_token_id"] == source.tok.id(eos)
        assert keys.get("tokenizer.ggml.eot_token_id", keys["tokenizer.ggml.eos_token_id"]) == end
    assert source.tok.id(names["eos_token"]) == end, "what was written last is the template's"
    assert keys["tokenizer.chat_template"] == gguf_export.with_media_marker(jinja.jinja(template, ""))


def test_scores_of_sentencepiece_are_recovered_from_merges(pieces):
    """llama.cpp merges by scores: of two possible unions the one with the higher score comes first."""
    spm, tok = pieces
    keys = gguf_export.tokenizer_keys(tok, 600, None)
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in keys.items()}
    assert keys["model"] == "llama" and keys["pre"] == "default" and keys["add_space_prefix"] and "merges" not in keys
    for i in range(spm.vocab_size()):
        kind = 2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1
        assert (keys["tokens"][i], keys["token_type"][i]) == (spm.id_to_piece(i), kind)
    made = [i for i in range(spm.vocab_size()) if keys["token_type"][i] == 1 and len(spm.id_to_piece(i)) > 1]
    assert len(made) > 50
    assert sorted(made, key=spm.get_score) == sorted(made, key=lambda i: keys["scores"][i])
    image = tok.specials["<image>"]
    assert keys["tokens"][image] == "<image>" and keys["token_type"][image] == 3 and keys["token_type"][-1] == 5


def make_pieces(folder):
    """-> a SentencePiece model, trained here, and our Tokenizer of it"""
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS.split("\n") * 5), model_writer=out, model_type="bpe", vocab_size=480,
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2)
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue()), Tokenizer(folder)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return make_pieces(tmp_path_factory.mktemp("pieces") / "tok")


def separate(merges):
    """Move the second way to make some piece to the front, far from the first."""
    made = [m.replace(" ", "") for m in merges]
    merges.insert(0, merges.pop(next(i for i, m in enumerate(made) if i > 20 and m in made[:i])))


LLAMA_3 = {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+"}},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
QWEN = json.loads(json.dumps(LLAMA_3).replace("{1,3}", ""))
SMOL = {"type": "Sequence", "pretokenizers": [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}


def respecified(source, out, change):
    """A tokenizer, or conftest's, with a changed tokenizer.json -> Tokenizer"""
    out.mkdir()
    spec = json.loads(json.dumps((source or Tokenizer(make_tokenizer(out / "unchanged"))).spec))
    change(spec)
    (out / "tokenizer.json").write_text(json.dumps(spec))
    (out / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return Tokenizer(out)


@pytest.mark.parametrize("split, norm, ignore_merges, name", [
    (LLAMA_3, None, True, "llama-bpe"), (QWEN, {"type": "NFC"}, False, "qwen2"), (SMOL, None, False, "smollm")])
def test_known_pre_tokenizers_are_exported_by_name(split, norm, ignore_merges, name, bytes_folder, tmp_path):
    def change(spec):
        spec.update(pre_tokenizer=split, normalizer=norm)
        spec["model"]["ignore_merges"] = ignore_merges
    tok = respecified(Tokenizer(bytes_folder), tmp_path / "t", change)
    assert gguf_export.tokenizer_keys(tok, 512, None)["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("change, says", [
    (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "no such pre-tokenizer: ['Whitespace']"),
    (lambda s: s.update(pre_tokenizer=LLAMA_3), "no such pre-tokenizer"),                       # without ignore_merges
    (lambda s: s.update(normalizer={"type": "Lowercase"}), "no such pre-tokenizer: ['Lowercase'"),
    (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "no such pre-tokenizer"),
    (lambda s: s.update(pre_tokenizer=None), "no such pre-tokenizer: []"),
    (lambda s: s["model"].update(ignore_merges=True), "no such pre-tokenizer"),
    (lambda s: s.update(model={"type": "WordLevel", "vocab": {"<s>": 1, "</s>": 2, "<unk>": 0}, "unk_token": "<unk>"},
                        added_tokens=[]), "a tokenizer of type 'WordLevel'")])
def test_unknown_tokenizers_are_refused(change, says, bytes_folder, tmp_path):
    tok = respecified(Tokenizer(bytes_folder), tmp_path / "t", change)
    assert says in error(gguf_export.tokenizer_keys, tok, 512, None)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_the_first_space_is_exported(scheme, pieces, tmp_path):
    def change(spec):
        split = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        spec.update(normalizer=None, pre_tokenizer=split)
    tok = respecified(pieces[1], tmp_path / "t", change)
    space = tok.start.encode("What").tokens[0].startswith("▁")
    keys = gguf_export.tokenizer_keys(tok, 600, None)
    assert keys["tokenizer.ggml.add_space_prefix"] == space == (scheme != "never")


@pytest.mark.parametrize("change", [separate, list.pop])
def test_merges_that_scores_cannot_express_are_refused(change, pieces, tmp_path):
    tok = respecified(pieces[1], tmp_path / "t", lambda s: change(s["model"]["merges"]))
    assert "not those of a SentencePiece model" in error(gguf_export.tokenizer_keys, tok, 600, None)


# ---- the command ----------------------------------------------------------------------------------------------------

def test_the_command_writes_files_and_prints_notes(llava_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export_gguf.py", str(llava_folder), f"--out={tmp_path}", "--dtype=bf16"])
    runpy.run_path(str(ROOT / "tools/export_gguf.py"), run_name="__main__")
    out, notes = capsys.readouterr()
    files = ["model-bf16.gguf", "mmproj-model-bf16.gguf"]
    assert out.split() == [str(tmp_path / f) for f in files] and {p.name for p in tmp_path.iterdir()} == set(files)
    notes = [n for n in notes.splitlines() if n.startswith("note: ")]
    assert len(notes) == 3 and "trained with image_aspect=crop" in notes[1] and "issue 25814" in notes[2]
    assert f"{llava_folder} has no chat template: llama.cpp will use one of its own" in notes[0]


def test_a_model_of_the_hub_is_exported_twice(llava_folder, tmp_path, monkeypatch):
    """A folder me/tiny here would be taken for the model the second time."""
    shutil.copytree(llava_folder, tmp_path / "hub/models--me--tiny/snapshots/abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert str(gguf_export.export("me/tiny", "", "f16")[0]) == "tiny/gguf/model-f16.gguf"


def test_a_chat_template_is_found_in_every_file(llava_folder, tmp_path):
    folder = shutil.copytree(llava_folder, tmp_path / "theirs")
    path = folder / "tokenizer_config.json"
    names = json.loads(path.read_text())
    for template, want in (("A", "A"), (["A"], None), (None, None)):
        path.write_text(json.dumps(names | {"chat_template": template}))
        assert gguf_export.own_template(folder) == want
    (folder / "chat_template.json").write_text('{"chat_template": "B"}')      # a processor's, as in llava-hf
    assert gguf_export.own_template(folder) == "B"
    (folder / "chat_template.jinja").write_text("C")                          # transformers since 4.50
    *paths, notes = gguf_export.export(folder, tmp_path / "out", "f16")
    assert read(paths[0])[0]["tokenizer.chat_template"] == "C" and not any("no chat template" in n for n in notes)


def test_what_llama_cpp_cannot_read_is_refused(llava_folder):
    assert "usage: python -m tools.export_gguf DIR" in error(cli.main, [])
    assert "dtype=q4_0: f32, f16, bf16" in error(cli.main, [str(llava_folder), "--dtype=q4_0"])
    model, source = llava.load_model(init=llava_folder)
    cfg = model.cfg
    for part, key, value, says in (
            (cfg, "connector", "linear", "has no linear connector"),
            (cfg.vision, "model_type", "dinov2", "has no dinov2")):
        old = getattr(part, key)
        setattr(part, key, value)
        assert says in error(gguf_export.mmproj_keys, cfg, "f16", "x")
        setattr(part, key, old)
    cfg.text.model_type, cfg.text.qkv_bias = "qwen3", True
    assert "has no qwen3 with attention_bias" in error(gguf_export.text_keys, cfg.text, "f16", "x")
    cfg.text.model_type = "gemma"
    assert "language model of type 'gemma'" in error(gguf_export.text_keys, cfg.text, "f16", "x")
