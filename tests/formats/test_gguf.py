"""GGUF files, read back with the gguf package: the bytes it would have written, and a model rebuilt exactly."""

import io
import json
import runpy
import shutil
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, make_tokenizer
from test_llava import EXAMPLES, FAMILIES, PRE, add_files, configure, error, export
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
    """A tiny random LLaVA of some family as transformers writes it, with what it needs beside it."""
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


def rebuilt(keys, tensors, eyes, model):
    """What was read -> a state dict, by the names and the permutation that the gguf package and llama.cpp know."""
    arch, cfg = keys["general.architecture"], model.cfg.text
    names = gguf.get_tensor_name_map(ARCHS[arch], keys[f"{arch}.block_count"])
    eye_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, model.cfg.vision.depth)
    out = {}
    for name in model.state_dict():
        if name.startswith("language_model."):
            there = names.get_name(name.removeprefix("language_model."), try_suffixes=(".weight", ".bias"))
            x = tensors.pop(there)
            if arch == "llama" and ("attn_q." in there or "attn_k." in there):
                heads = cfg.num_attention_heads if "attn_q." in there else cfg.num_key_value_heads
                x = x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        elif name.startswith("multi_modal"):             # places in the nn.Sequential of the original LLaVA
            x = eyes.pop(name.replace("multi_modal_projector.linear_1", "mm.0").replace(
                "multi_modal_projector.linear_2", "mm.2"))
        else:
            x = eyes.pop(eye_names.get_name(name, try_suffixes=(".weight", ".bias")))
        out[name] = torch.tensor(x)
    return out


def logits(model):
    with torch.no_grad():
        return all_logits(model, pack(EXAMPLES, 8))


# ---- what the files say ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_rebuilt_from_its_two_files_has_equal_logits(name, tmp_path, bytes_folder):
    model, _ = llava.load_model(init=folder(name, tmp_path / "llava", bytes_folder))
    text, mmproj, _ = gguf_export.export(tmp_path / "llava", tmp_path / "out", "f32")
    (keys, tensors), (eye_keys, eyes) = read(text), read(mmproj)
    again = VLM(model.cfg)
    again.load_state_dict(rebuilt(keys, tensors, eyes, model))
    assert torch.equal(logits(again), logits(model))
    assert set(tensors) == ({"rope_freqs.weight"} if name == "llama3 rope" else set()) and not eyes     # nothing more
    cfg, arch = model.cfg.text, keys["general.architecture"]
    assert eye_keys["clip.vision.feature_layer"] == [2] and eye_keys["clip.vision.block_count"] == 2
    assert eye_keys["clip.use_gelu"] == (name in ("siglip", "clip with exact gelu"))
    assert keys[f"{arch}.rope.freq_base"] == pytest.approx(cfg.rope_theta, rel=1e-7)
    assert keys[f"{arch}.attention.key_length"] == cfg.head_dim
    assert keys[f"{arch}.context_length"] == (5 if "window" in name else cfg.max_position_embeddings)
    assert keys.get(f"{arch}.rope.scaling.factor") == (4.0 if name == "linear rope" else None)


def test_every_number_of_a_config_stands_under_its_key():
    """All of them different, so that none can stand for another."""
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


def test_the_factors_of_llama_3_are_those_of_the_converter(tmp_path, bytes_folder):
    folder("llama3 rope", tmp_path / "llava", bytes_folder)
    cfg = llava.load_model(init=tmp_path / "llava")[0].cfg.text
    found = read(gguf_export.export(tmp_path / "llava", "", "f16")[0])[1]["rope_freqs.weight"]
    s, want = cfg.rope_scaling, []
    for i in range(0, cfg.head_dim, 2):                  # the definition, in float64: kept, slowed down, or between
        wave = 2 * np.pi * cfg.rope_theta ** (i / cfg.head_dim)
        blend = (s["original_max_position_embeddings"] / wave - s["low_freq_factor"]) \
            / (s["high_freq_factor"] - s["low_freq_factor"])
        want.append(1 / ((1 - min(max(blend, 0), 1)) / s["factor"] + min(max(blend, 0), 1)))
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert want[0] == 1 and want[-1] == 8


@pytest.mark.parametrize("dtype", gguf_export.DTYPES)
def test_the_files_are_byte_for_byte_those_of_the_gguf_package(dtype, llava_folder, tmp_path):
    """Header, keys, offsets and padding; matrices rounded as it rounds them, vectors and positions in f32."""
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


def test_what_fp16_cannot_hold_is_not_published(llava_folder, tmp_path):
    model, source = llava.load_model(init=llava_folder)
    model.language_model.lm_head.weight.data[0, 0] = 1e6
    run = export(model, source, tmp_path / "run")
    assert "output.weight is not finite in f16" in error(gguf_export.export, run, "", "f16")
    assert not list((run / "gguf").glob("*.gguf"))
    assert gguf_export.export(run, "", "bf16")[0].is_file()


def test_one_tensor_at_a_time_passes_through_memory(llava_folder, tmp_path, monkeypatch):
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
    assert {p.dtype for p in seen[-1][0].parameters()} == {torch.float16}     # what lies in the file, and no copy of it


# ---- the tokenizer --------------------------------------------------------------------------------------------------

def test_a_byte_level_tokenizer_keeps_its_pieces_merges_and_kinds(llava_folder, tmp_path):
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


def test_an_added_token_that_controls_nothing_is_a_word_there_too(tmp_path):
    def change(spec):
        next(t for t in spec["added_tokens"] if t["content"] == "<|eot_id|>")["special"] = False
    tok = respecified(None, tmp_path / "t", change)
    types = gguf_export.tokenizer_keys(tok, 512, None)["tokenizer.ggml.token_type"]
    assert [types[tok.specials[t]] for t in ("<|eot_id|>", "<|im_end|>")] == [4, 3]


@pytest.mark.parametrize("template", chat.TEMPLATES)
def test_an_export_tells_its_template_and_what_ends_an_answer(template, llava_folder, tmp_path):
    """Where transformers sees <image> and a newline, llama.cpp puts a marker alone, before or behind the text."""
    jinja2 = pytest.importorskip("jinja2")
    llava.save_model(tmp_path / "run", *(lambda m, f: (m.state_dict(), m.cfg, f))(*llava.load_model(init=llava_folder)), template, "", "pad")
    keys, _ = read(gguf_export.export(tmp_path / "run", "", "f16")[0])
    unmarked = jinja.jinja(template, "").replace("{% generation %}", "").replace("{% endgeneration %}", "")
    for here, there in (("Hi", "Hi"), ("<image>\nHi", "<__media_x__>Hi"), ("<image>\nHi", "Hi<__media_x__>"),
                        ("<image>\nHi", "<image>\nHi"), ("<image>\n<image>\nHi", "<__media_x__>\n<__media_x__>\nHi")):
        talk = [[{"role": r, "content": c} for r, c in (("user", said), ("assistant", "Yo"), ("user", "?"))]
                for said in (here, there)]
        how = dict(bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
        want, found = (jinja2.Template(t).render(messages=m, **how)
                       for t, m in zip((unmarked, keys["tokenizer.chat_template"]), talk))
        assert found.replace("<__media_x__>", "<image>") == want
    tok = Tokenizer(llava_folder)
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in keys.items()}
    end = {keys.get("eot_token_id", keys["eos_token_id"])}
    assert chat.stop_ids(tok, template) == end or template == "plain"         # a newline; llama.cpp stops at tokens


def test_the_scores_of_a_sentencepiece_model_are_found_again_in_its_merges(tmp_path, llava_folder):
    """llama.cpp has no merges for it: of two unions that could be made, the one with the higher score is."""
    spm, tok = make_pieces(tmp_path / "pieces")
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
    """-> a SentencePiece model trained on the spot, and our Tokenizer of it"""
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS.split("\n") * 5), model_writer=out, model_type="bpe", vocab_size=480,
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2)
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue()), Tokenizer(folder)


def apart(merges):
    """The second way to make some piece moves to the front, far from the first."""
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
    """A Tokenizer, or one trained on the spot, of whose tokenizer.json something was changed"""
    out.mkdir()
    spec = (source or Tokenizer(make_tokenizer(out / "as it was"))).spec
    change(spec)
    (out / "tokenizer.json").write_text(json.dumps(spec))
    (out / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return Tokenizer(out)


@pytest.mark.parametrize("cut, norm, at_once, name", [
    (LLAMA_3, None, True, "llama-bpe"), (QWEN, {"type": "NFC"}, False, "qwen2"), (SMOL, None, False, "smollm")])
def test_the_three_other_ways_to_cut_a_text_are_known_by_name(cut, norm, at_once, name, tmp_path):
    def change(spec):
        spec.update(pre_tokenizer=cut, normalizer=norm)
        spec["model"]["ignore_merges"] = at_once
    tok = respecified(None, tmp_path / "t", change)
    assert gguf_export.tokenizer_keys(tok, 512, None)["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("change, says", [
    (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "no name for this way of cutting text: ['Whitespace']"),
    (lambda s: s.update(pre_tokenizer=LLAMA_3), "no name for this way"),                       # without ignore_merges
    (lambda s: s.update(normalizer={"type": "Lowercase"}), "no name for this way of cutting text: ['Lowercase'"),
    (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "no name for this way"),
    (lambda s: s.update(pre_tokenizer=None), "no name for this way of cutting text: []"),
    (lambda s: s["model"].update(ignore_merges=True), "no name for this way"),
    (lambda s: s.update(model={"type": "WordLevel", "vocab": {"<s>": 1, "</s>": 2, "<unk>": 0}, "unk_token": "<unk>"},
                        added_tokens=[]), "a tokenizer of type 'WordLevel'")])
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(change, says, tmp_path):
    assert says in error(gguf_export.tokenizer_keys, respecified(None, tmp_path / "t", change), 512, None)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_space_is_put_in_front_there_where_one_is_here(scheme, tmp_path):
    def change(spec):
        cut = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        spec.update(normalizer=None, pre_tokenizer=cut)
    tok = respecified(make_pieces(tmp_path / "pieces")[1], tmp_path / "t", change)
    space = tok.plain.encode("What").tokens[0].startswith("▁")
    keys = gguf_export.tokenizer_keys(tok, 600, None)
    assert keys["tokenizer.ggml.add_space_prefix"] == space == (scheme != "never")


@pytest.mark.parametrize("change", [apart, list.pop])
def test_merges_that_no_scores_can_stand_for_are_refused(change, tmp_path):
    tok = respecified(make_pieces(tmp_path / "pieces")[1], tmp_path / "t", lambda s: change(s["model"]["merges"]))
    assert "not those of a SentencePiece model" in error(gguf_export.tokenizer_keys, tok, 600, None)


# ---- the command ----------------------------------------------------------------------------------------------------

def test_the_command_writes_two_files_and_says_what_will_differ(llava_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export_gguf.py", str(llava_folder), f"--out={tmp_path}", "--dtype=bf16"])
    runpy.run_path(str(ROOT / "tools/export_gguf.py"), run_name="__main__")
    out, notes = capsys.readouterr()
    files = ["model-bf16.gguf", "mmproj-model-bf16.gguf"]
    assert out.split() == [str(tmp_path / f) for f in files] and {p.name for p in tmp_path.iterdir()} == set(files)
    notes = [n for n in notes.splitlines() if n.startswith("note: ")]
    assert len(notes) == 3 and "trained with image_aspect=crop" in notes[1] and "issue 25814" in notes[2]
    assert f"{llava_folder} has no chat template: llama.cpp will ask by one of its own" in notes[0]


def test_a_chat_template_is_found_wherever_its_time_kept_it(llava_folder, tmp_path):
    folder = shutil.copytree(llava_folder, tmp_path / "theirs")
    names, both = folder / "tokenizer_config.json", folder / "chat_template.json"
    said = json.loads(names.read_text())

    def found():
        paths_and_notes = gguf_export.export(folder, tmp_path / "out", "f16")
        talk = read(paths_and_notes[0])[0].get("tokenizer.chat_template")
        assert (talk is None) == any("has no chat template" in note for note in paths_and_notes[2])
        return talk

    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "A"}]
    for talk, want in (("A", "A"), (several, "A"), (several[:1], None), (["A"], None), ([], None)):
        names.write_text(json.dumps(said | {"chat_template": talk}))
        assert found() == want
    both.write_text('{"chat_template": "B"}')                                 # a processor's, as llava-hf has it
    assert found() == "B"
    (folder / "chat_template.jinja").write_text("C")                          # of transformers since 4.50
    assert found() == "C"


def test_what_llama_cpp_cannot_do_is_refused_in_a_line(llava_folder):
    assert "usage: python -m tools.export_gguf DIR" in error(cli.main, [])
    assert "dtype=q4_0: f32, f16, bf16" in error(cli.main, [str(llava_folder), "--dtype=q4_0"])
    model, source = llava.load_model(init=llava_folder)
    cfg = model.cfg
    for part, key, value, says in (
            (cfg, "connector", "linear", "knows no linear connector"),
            (cfg.vision, "intermediate_size", 32, "would swap the two layers"),
            (cfg.vision, "model_type", "dinov2", "knows no dinov2")):
        old = getattr(part, key)
        setattr(part, key, value)
        assert says in error(gguf_export.mmproj_keys, cfg, "f16", "x")
        setattr(part, key, old)
    cfg.text.model_type, cfg.text.o_bias = "qwen2", True
    assert "knows no qwen2 with these biases" in error(gguf_export.text_keys, cfg.text, "f16", "x")
    cfg.text.model_type = "gemma"
    assert "language model of type 'gemma'" in error(gguf_export.text_keys, cfg.text, "f16", "x")
