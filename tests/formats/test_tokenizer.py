"""Published tokenizers: files and roles, tokens for images and padding in every family, broken files."""

import json
import math
from functools import cache

import pytest
import tokenizers
import torch
from conftest import WORDS, blocks, error, example, make_tokenizer, tiny_config
from safetensors.torch import save_file
from test_sentencepiece import BYTES, LLAMA, read, spm
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

import chat
from data import pack
from formats import llava, tokenizer
from formats.sentencepiece import CONTROL, added_token
from formats.tokenizer import Tokenizer
from model import VLM

PRE = {"crop_size": 8, "size": 8}


# ---- files and roles ------------------------------------------------------------------------------------------------

def test_added_tokens_are_read_from_either_file(tmp_path):
    blob, size = spm(["ab"]), len(LLAMA) + len(BYTES) + 9
    for more in (dict(added_tokens={"<image>": size, "<loc>": size + 1}),
                 dict(tokenizer_config={"added_tokens_decoder": {
                     "1": {"content": "<s>", "special": True}, str(size): {"content": "<image>", "special": True},
                     str(size + 1): {"content": "<loc>", "special": False}}})):
        for f in tmp_path.glob("*.json"):
            f.unlink()
        tok = read(tmp_path, blob, **more)
        assert tok.image == size and not tok.notes and len(tok) == tok.published == size + 2
        assert tok.text("<loc>")[0] == [size + 1], "an added token that is not a control token is text"
        assert tok.decode([size, size + 1]) == "<loc>"
    (tmp_path / "tokenizer_config.json").unlink()
    assert "added token '<x>' has id 999" in error(read, tmp_path, blob, added_tokens={"<x>": 999})
    assert "added token '<x>' has id 1" in error(read, tmp_path, blob, added_tokens={"<x>": 1})


def test_roles_are_read_from_three_files(tmp_path):
    tok = read(tmp_path, spm(["ab"]))
    assert (tok.bos, tok.eos) == (1, 2)                        # from tokenizer.model: Llama 1's names are empty
    tok = read(tmp_path, spm(["ab"]), tokenizer_config={"bos_token": "", "eos_token": {"content": "<s>"}},
               special_tokens_map={"bos_token": "</s>", "eos_token": "</s>"})
    assert (tok.bos, tok.eos) == (2, 1)


@pytest.mark.parametrize("file, text, message", [
    ("tokenizer.json", None, "holds no tokenizer.json and no tokenizer.model"),
    ("tokenizer.json", "", "tokenizer.json: Expecting value"), ("tokenizer.json", "{}", "cannot be read"),
    ("tokenizer.json", "[1]", "is not a json object"), ("tokenizer_config.json", "{", "config.json: Expecting"),
    ("tokenizer.json", '{"model": {}, "model": {}}', "duplicate key 'model'"),
    ("tokenizer_config.json", '{"eos_token": "<nope>"}', "no token '<nope>'"),
    ("tokenizer_config.json", '{"eos_token": 2}', "no token 2"),
    ("tokenizer_config.json", '{"eos_token": ["</s>"]}', "no token ['</s>']"),
    ("tokenizer_config.json", '{"eos_token": {"id": 2}}', "no token None")])
def test_a_broken_tokenizer_is_one_line(bytes_folder, tmp_path, file, text, message):
    for f in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / f).write_text((bytes_folder / f).read_text("utf-8"), "utf-8")
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_text(text)
    line = error(Tokenizer, tmp_path)
    assert message in line and line.count(str(tmp_path)) == 1


@pytest.mark.parametrize("change", [
    lambda s: s["added_tokens"][3].update(id=10**12), lambda s: s["added_tokens"][3].update(id=-1),
    lambda s: s["added_tokens"][3].update(id="3"), lambda s: s["added_tokens"][3].update(content=7),
    lambda s: s["added_tokens"][3].pop("id"), lambda s: s["added_tokens"][4].update(content="</s>"),
    lambda s: s["added_tokens"][4].update(id=2), lambda s: s.update(added_tokens=None),
    lambda s: s["model"].update(merges=[["a"]]), lambda s: s["model"].update(merges=["no\npiece"]),
    lambda s: s["model"].update(vocab=[]), lambda s: s["model"]["vocab"].pop("a"),
    lambda s: s["model"]["vocab"].update(zzz=2**40), lambda s: s["model"].update(type="New"),
    lambda s: s.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                                      "invert": False})])
def test_an_odd_tokenizer_json_is_one_line(bytes_folder, tmp_path, change):
    spec = json.loads((bytes_folder / "tokenizer.json").read_text("utf-8"))
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text((bytes_folder / "tokenizer_config.json").read_text())
    line = error(Tokenizer, tmp_path)
    assert line.startswith(f"the tokenizer in {tmp_path} cannot be read: ") and line.count(str(tmp_path)) == 1


# ---- tokens for images and padding, in every family -----------------------------------------------------------------

def byte_level(folder, control, words=(), bos=None, **names):
    """As Llama 3 and Qwen publish theirs: control tokens follow the vocabulary, and stand in added_tokens alone"""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator([WORDS] * 5, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in words])
    if bos:
        tok.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tok.token_to_id(bos))])
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos} | names))
    return tok.get_vocab_size()


def llama_3(folder, *more):
    return byte_level(folder, ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                               "<|reserved_special_token_1|>", *more, "<|start_header_id|>", "<|end_header_id|>",
                               "<|eot_id|>"], bos="<|begin_of_text|>", eos_token="<|eot_id|>")


def qwen(folder, *more, eos="<|im_end|>"):
    return byte_level(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more], ["<think>", "</think>"],
                      eos_token=eos, pad_token="<|endoftext|>")


def vicuna(folder):
    (folder / "tokenizer.model").write_bytes(spm("th ▁th ▁the at cat ▁a ▁c ▁cat".split(), "▁thecab."))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": None,
        "bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "unk_token": {"content": "<unk>"}}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>", "eos_token": "</s>"}))
    return 259 + 16


def mistral_3(folder):
    """The first space is added at the very beginning alone, and [INST] is a control token."""
    spec = json.loads((make_tokenizer(folder, "pieces") / "tokenizer.json").read_text("utf-8"))
    renamed = {"<image>": "[INST]", "<pad>": "[/INST]"}
    for token in spec["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    spec["model"]["vocab"] = {renamed.get(k, k): i for k, i in spec["model"]["vocab"].items()}
    spec |= {"normalizer": None, "pre_tokenizer": {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}}
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return len(spec["model"]["vocab"])


RESERVED = "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"
# files, unused rows of the embedding, template, the tokens renamed to <image> and for padding; None: a new one
PUBLISHED = {
    "vicuna": (vicuna, 0, "vicuna_v1", None, None),
    "llama 3": (llama_3, 0, "llama_3", *RESERVED),
    "llama 3.1": (lambda f: llama_3(f, "<|finetune_right_pad_id|>"), 0, "llama_3", RESERVED[0],
                  "<|finetune_right_pad_id|>"),
    "qwen 2 base": (lambda f: qwen(f, eos="<|endoftext|>"), 40, "chatml", None, None),   # its EOS ends no turn
    "qwen 2.5": (lambda f: qwen(f, "<|image_pad|>"), 40, "chatml", "<|image_pad|>", "<|endoftext|>"),
    "smollm 2": (qwen, 0, "chatml", None, "<|endoftext|>"), "mistral 0.3": (mistral_3, 0, "mistral", None, None)}


@pytest.fixture(scope="module")
def publish(tmp_path_factory):
    """name -> vision folder, LLM folder, the model they hold, how many ids its tokenizer has"""
    @cache
    def make(name, **text):
        root = tmp_path_factory.mktemp("published")
        (root / "vision").mkdir(), (root / "llm").mkdir()
        size = PUBLISHED[name][0](root / "llm")
        torch.manual_seed(0)
        model = VLM(tiny_config(vocab_size=size + PUBLISHED[name][1], **text))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        v, t = model.cfg.vision, model.cfg.text
        for folder, prefix, c in ((root / "vision", "vision_tower.", v), (root / "llm", "language_model.", t)):
            save_file({k.removeprefix(prefix): x.contiguous() for k, x in model.state_dict().items()
                       if k.startswith(prefix) and not (t.tie_word_embeddings and "lm_head" in k)},
                      folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(vars(c) | {"architectures": None}))
        (root / "vision/preprocessor_config.json").write_text(json.dumps(PRE))
        return root / "vision", root / "llm", model, size
    return make


@pytest.fixture(scope="module")
def exported(publish, tmp_path_factory):
    """name -> model and Folder of the two folders, and the LLaVA folder written from them"""
    @cache
    def make(name):
        model, folder = llava.load_model(*publish(name)[:2])
        out = tmp_path_factory.mktemp("exported") / "model"
        llava.save_model(out, model.state_dict(), model.cfg, folder, PUBLISHED[name][2], None, "pad", torch.float32)
        return model, folder, out
    return make


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_llm_gets_an_image_token(publish, exported, name):
    """A reserved token and unused rows where there are any; no published token gets another id or row."""
    (_, llm, old, size), (model, folder, out) = publish(name), exported(name)
    before = tokenizer.read_spec(llm)[0]
    tok, (_, _, _, image, padding) = folder.tok, PUBLISHED[name]
    known = {t["content"]: t["id"] for t in before["added_tokens"]}
    assert tok.image == model.cfg.image_token_index == tok.id("<image>") == known.get(image, size)
    assert tok.pad == known.get(padding, size + (image is None)) not in (tok.eos, tok.image)
    V, rows = old.cfg.text.vocab_size, model.cfg.text.vocab_size
    assert rows == (V if len(tok) <= V else math.ceil(len(tok) / 64) * 64) and len(tok) >= size
    grows = name in ("vicuna", "smollm 2", "mistral 0.3")
    assert ("rows for it" in folder.notes[-1]) == (rows > V) == grows
    assert "<image>" in folder.notes[0] and (image is None) == ("added with id" in folder.notes[0])
    for k, x in model.state_dict().items():
        if not k.startswith("multi_modal"):
            y = old.state_dict()[k]
            assert torch.equal(x[:V] if "embed_tokens" in k or "lm_head" in k else x, y), k
            if len(x) > len(y):
                torch.testing.assert_close(x[V:], y.double().mean(0).float().expand(rows - V, -1), rtol=0, atol=1e-7)
    unchanged = tokenizer.without_control_tokens(before, [])
    for text in ("the cat. It is", "a <|im_end|> </s> <image> b", " é\n"):
        assert tok.text(text)[0] == unchanged.encode(text, add_special_tokens=False).ids

    again, back = llava.load_model(init=out)
    assert again.cfg.text == model.cfg.text and again.cfg.image_token_index == tok.image
    assert back.notes == [] and (back.tok.image, back.tok.pad) == (tok.image, tok.pad)
    assert all(torch.equal(x, again.state_dict()[k]) for k, x in model.state_dict().items())
    c = json.loads((out / "config.json").read_text())
    assert (c["image_token_index"], c["pad_token_id"], c["text_config"]["vocab_size"]) == (tok.image, tok.pad, rows)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_exported_tokenizer_gives_the_same_ids(exported, name):
    """In transformers: AutoTokenizer and chat template on the golden conversations; the model loads with every row."""
    T = pytest.importorskip("transformers")
    from test_chat import CONVERSATIONS
    model, folder, out = exported(name)
    tok, template, n = folder.tok, PUBLISHED[name][2], 0
    theirs = T.AutoTokenizer.from_pretrained(out)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tok.bos, chat.end_of_turn(tok, template), tok.pad)
    assert theirs.convert_tokens_to_ids("<image>") == tok.image and len(theirs) == len(tok)
    control = [t["content"] for t in tok.spec["added_tokens"] if t["special"]]
    thinks = [([("q", "<think>\n\n</think>\n\na"), ("<think>", "b")], 0, "S")]
    for turns, images, system in CONVERSATIONS + thinks:
        text = "".join(u + (a or "") for u, a in turns)
        if any(t in text for t in control if t != "<image>") or text.count("<image>") != images:
            continue                                           # typed control tokens: a string cannot tell them
        messages = [{"role": "system", "content": chat.TEMPLATES[template].system if system is None else system}]
        messages += [{"role": r, "content": c} for u, a in turns for r, c in (("user", u), ("assistant", a))]
        ask = turns[-1][1] is None
        ids, _ = chat.encode(tok, template, turns, blocks(images, 1, tok.image), system)
        found = theirs.apply_chat_template(messages[:-1] if ask else messages, add_generation_prompt=ask,
                                           tokenize=True, return_dict=True)
        assert list(found["input_ids"]) == ids, turns
        assert theirs.decode(ids, skip_special_tokens=True) == tok.decode(ids)
        n += 1
    assert n >= 17
    loaded, info = T.LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["mismatched_keys"] and not any("language_model" in k for k in info["missing_keys"])
    assert loaded.get_input_embeddings().weight.shape[0] == model.cfg.text.vocab_size


def test_new_rows_hardly_raise_the_loss(publish):
    """At most log(1 + n/V) for any prompt, by Jensen's inequality; and a new id is never the likeliest. Rows drawn at
    random break both."""
    vision, llm, old, size = publish("vicuna")
    model, _ = llava.load_model(vision, llm)
    V, n = size, model.cfg.text.vocab_size - size
    h = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    W = model.state_dict()["language_model.lm_head.weight"].double()
    rise = (h @ W.T).logsumexp(-1) - (h @ W[:V].T).logsumexp(-1)
    assert 0 < rise.min() and rise.max() <= math.log1p(n / V) + 1e-6
    assert ((h @ W.T).argmax(-1) < V).all()
    W[V:] = torch.randn(n, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.2
    rise = (h @ W.T).logsumexp(-1) - (h @ W[:V].T).logsumexp(-1)
    assert rise.max() > 2 * math.log1p(n / V) and ((h @ W.T).argmax(-1) >= V).any()


def test_a_tied_embedding_grows_once(publish):
    vision, llm, _, size = publish("smollm 2", tie_word_embeddings=True)
    model, folder = llava.load_model(vision, llm)
    assert model.cfg.text.vocab_size > size and "language_model.lm_head.weight" not in model.state_dict()
    ids, labels = chat.encode(folder.tok, "chatml", [("<image>\nq", "a")], blocks(1, 4, folder.tok.image))
    batch = pack([(ids, labels, example(1)[2])], 8)
    assert model(*batch).isfinite() and folder.tok.image not in labels


def test_config_json_may_name_the_image_token(publish, tmp_path):
    """Some LLaVAs keep the name of a reserved token. The id of a text token is refused."""
    vision, llm, *_ = publish("llama 3")
    model, folder = llava.load_model(vision, llm)
    reserved = folder.tok.specials["<pad>"]                       # the second reserved token, by its new name
    own = Tokenizer(llm, reserved)
    assert own.image == reserved == own.id("<image>") and own.pad == folder.tok.image == own.id("<pad>")
    assert "no <image>: <|reserved_special_token_1|>, id" in own.notes[0]
    assert f"its image token has id {own.published}, but config.json says 5" in error(Tokenizer, llm, 5)
    llava.save_model(tmp_path / "out", model.state_dict(), model.cfg, folder, "llama_3", "", "pad", torch.float32)
    assert "but config.json says" in error(Tokenizer, tmp_path / "out", reserved)


def test_image_becomes_a_control_token(tmp_path):
    blob, size = spm(["ab"]), len(LLAMA) + len(BYTES) + 9
    for more in (dict(added_tokens={"<image>": size}), dict()):
        (tmp_path / str(len(more))).mkdir()
        tok = read(tmp_path / str(len(more)), blob if more else spm(["ab"], more=[("<image>", -99.0, CONTROL)]), **more)
        assert tok.image == size and size not in tok.text("<image>")[0]
    vocab = json.loads(json.dumps(tok.spec))
    vocab["added_tokens"] = [t for t in vocab["added_tokens"] if t["content"] != "<image>"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only/tokenizer.json").write_text(json.dumps(vocab))
    assert Tokenizer(tmp_path / "only").image == size, "a piece of that name is the token, where nothing added is"


def test_training_prints_the_added_tokens(publish, tmp_path, capsys):
    """Two published folders go into stage 1 as they are."""
    from PIL import Image

    import train_align
    vision, llm, *_ = publish("vicuna")
    Image.new("RGB", (9, 12)).save(tmp_path / "a.png")
    rows = [{"id": i, "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nthe"}, {"from": "gpt", "value": "a cat"}]} for i in range(16)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    train_align.main(train_align.Settings(
        data=str(tmp_path / "data.json"), images=str(tmp_path), vision=str(vision), llm=str(llm), device="cpu",
        dtype="fp32", dry_run=True, out=str(tmp_path / "out")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "the tokenizer has no <image>: added with id 275", "the tokenizer has no <pad>: added with id 276",
        "embedding and head get 45 rows for it, each the mean of the old ones: 275 -> 320"]


@pytest.mark.parametrize("image", [True, False])
def test_padding_is_never_eos(image):
    """TinyLlama-Chat pads with </s>: who masks padding would mask the end of every answer."""
    names = ["<unk>", "<s>", "</s>", *(["<image>"] if image else [])]
    spec = {"model": {"vocab": {n: i for i, n in enumerate(names)}, "unk_token": "<unk>"},
            "added_tokens": [added_token(i, n) for i, n in enumerate(names)]}
    _, pad, _ = tokenizer.add_missing_tokens(spec, {"eos_token": "</s>", "pad_token": "</s>"})
    assert pad == (0 if image else 4)                        # unknown, as in LLaVA; a new one, after <image>
