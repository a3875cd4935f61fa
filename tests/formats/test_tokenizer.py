"""Published tokenizers: SentencePiece's files against the package itself, and the picture's token in every family."""

import io
import itertools
import json
import math
import random
import struct

import pytest
import torch
from conftest import WORDS, error, example, make_tokenizer, tiny_config
from safetensors.torch import save_file

import chat
from data import pack
from formats import llava, tokenizer
from formats.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, WORD, Tokenizer
from model import VLM

PRE = {"crop_size": 8, "size": 8}
TYPED = list("abcdefgh  \n▁é一👩/s0x1A|im_\x00\t\u0301\u200d") + [
    "<s>", "</s>", "<0x0A>", "<unk>", "<pad>", "   ", "cat", "the", "▁▁", "<im>", " of", "<|im_start|>",
    "\U0010ffff", "black cat. "]


# ---- SentencePiece, written by hand: what its file says, and what it means -------------------------------------------

def message(*fields):
    """[(number, int, float, str or bytes)] -> protobuf"""
    def varint(n):
        n, out = n % 2**64, b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number * 8 + 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number * 8) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += varint(number * 8 + 2) + varint(len(value)) + value
    return out


LLAMA = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
BYTES = [(f"<0x{i:02X}>", 0.0, BYTE) for i in range(256)]


def spm(joint, chars="▁abcdeht", more=(), trainer=(), normalizer=(), start=(*LLAMA, *BYTES)):
    """A tokenizer.model of Llama's kind: `joint` pieces, the best first, then characters"""
    words = [(name, -float(i), NORMAL) for i, name in enumerate([*joint, *chars])]
    pieces = [message((1, name), (2, score), (3, kind)) for name, score, kind in [*start, *words, *more]]
    trainer = {3: 2, 35: 1, 41: 1, 42: 2, 43: -1} | dict(trainer)
    normalizer = {1: "identity", 3: 1, 4: 0, 5: 1} | dict(normalizer)
    return message(*((1, p) for p in pieces), (2, message(*trainer.items())), (3, message(*normalizer.items())))


def by_scores(text, vocab, prefix=True):
    """SentencePiece's rule with the scores themselves: join the neighbours whose joint piece scores best, the leftmost
    of several, until none is left."""
    symbols = list((" " + text if prefix and text else text).replace(" ", "▁"))
    while True:
        pairs = [(-vocab[a + b], i) for i, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in vocab]
        if not pairs:
            return symbols
        i = min(pairs)[1]
        symbols[i:i + 2] = ["".join(symbols[i:i + 2])]


def load(folder, blob, **files):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(blob)
    for name, obj in files.items():
        (folder / f"{name}.json").write_text(json.dumps(obj))
    return Tokenizer(folder)


@pytest.mark.parametrize("joint", [
    "ab ba aba bab abab aa aaa aaaa bb abb", "aa ab aaa aab baa aaaa ▁a ▁aa ▁▁ ▁▁▁ a▁", "ba aa ab bb aab bba abba"])
def test_ranked_merges_do_what_scores_do_on_every_short_string(tmp_path, joint):
    """Needs no package: 19,682 strings, exhaustively, over vocabularies full of overlapping pieces."""
    tok = load(tmp_path, spm(joint.split(), "▁ab"))
    vocab = {name: -i for i, name in enumerate(joint.split())}
    for n in range(10):
        for letters in itertools.product("ab ", repeat=n):
            text = "".join(letters)
            assert tok.plain.encode(text).tokens == by_scores(text, vocab), text
    assert tok.decode(tok.text(" a b ")[0]) == " a b "


def train(texts, folder, vocab_size=675, **kw):
    """A model made by the package -> the package's processor, our Tokenizer"""
    sp, out = pytest.importorskip("sentencepiece"), io.BytesIO()
    llama = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", split_digits=True,
                 remove_extra_whitespaces=False, add_dummy_prefix=True, allow_whitespace_only_pieces=True)
    sp.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=out, vocab_size=vocab_size,
                                  hard_vocab_limit=False, minloglevel=2, **llama | kw)
    return sp.SentencePieceProcessor(model_proto=out.getvalue()), load(folder, out.getvalue())


def strings(seed, n):
    rng = random.Random(seed)
    yield from ("", " ", "  ", "\n", "\n\nx", " x", "x ", "x  y", "▁", "</s>", "\u0301")
    for i in range(n):
        yield "".join(rng.choices(TYPED if i % 2 else ["a", "b", " "], k=rng.randint(0, 40)))


TEXTS = {"words": [WORDS.replace("\n", " ")] * 5,
         "ab": ["".join(random.Random(i).choices("ab ", [5, 5, 1], k=60)) for i in range(300)],
         "runs": ["a" * n + " " * (n % 7) + "b" * (n % 5) for n in range(1, 60)]}


@pytest.mark.parametrize("kw", [dict(), dict(byte_fallback=False), dict(add_dummy_prefix=False),
                                dict(control_symbols="<pad>,[CLS]"), dict(bos_id=-1),
                                dict(add_dummy_prefix=False, user_defined_symbols="cat,the,<im>,▁▁,th,▁of")],
                         ids=lambda kw: "-".join(kw) or "llama")
def test_a_translated_model_gives_the_ids_of_sentencepiece(tmp_path, kw):
    """Spaces, newlines, bytes, typed control pieces, characters nobody trained on: the package's ids, and its text."""
    for name, texts in TEXTS.items():
        sp, tok = train(texts, tmp_path / name, 675 if name == "words" else 330, **kw)
        for text in strings(name, 3000):
            ids = sp.encode(text)
            assert tok.text(text)[0] == ids, (text, sp.encode(text, out_type=str))
            if sp.unk_id() not in ids and "▁" not in text:
                assert tok.decode(ids) == sp.decode(ids) == text
        assert tok.published == sp.vocab_size() and len(tok) == sp.vocab_size() + len(tok.notes)
        assert (tok.bos, tok.eos) == tuple(i if i >= 0 else None for i in (sp.bos_id(), sp.eos_id()))


def test_a_broken_translation_would_be_seen(tmp_path):
    """The pre-tokenizer that others take for the first space, and merges by id, both give other ids somewhere."""
    sp, tok = train(TEXTS["words"], tmp_path / "a")
    metaspace = tok.spec | {"normalizer": None, "pre_tokenizer": {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}}
    backwards = json.loads(json.dumps(tok.spec))
    backwards["model"]["merges"].reverse()
    for broken in (metaspace, backwards):
        other = tokenizer.blind(broken, [])
        assert any(other.encode(text).ids != sp.encode(text) for text in strings(0, 500))


def test_transformers_reads_a_vicuna_folder_alike(tmp_path):
    """Its own conversion in legacy mode, but for texts that begin with a space: there it leaves SentencePiece's way."""
    T = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")                     # what transformers reads the file with
    sp, tok = train(TEXTS["words"], tmp_path / "a")
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    theirs = T.LlamaTokenizer.from_pretrained(tmp_path / "a", legacy=True)
    differ = 0
    for text in strings(1, 2000):
        if any(token in text for token in ("<s>", "</s>", "<unk>", "▁")):
            continue                                           # typed control tokens are controls there
        same = theirs(text, add_special_tokens=False)["input_ids"] == tok.text(text)[0]
        assert same or text.startswith(" "), text
        differ += not same
    assert differ


# ---- files that are no such model -----------------------------------------------------------------------------------

@pytest.mark.parametrize("blob, says", [
    (spm(["ab"], trainer={3: 1}), "a model of type unigram, only bpe is known here"),
    (spm(["ab"], trainer={3: 4}), "a model of type char"),
    (spm(["ab"], normalizer={2: b"table"}), "it rewrites text before it splits it"),
    (spm(["ab"], normalizer={4: 1}), "it rewrites text"), (spm(["ab"], trainer={24: 1}), "it rewrites text"),
    (spm(["ab"], more=[("cd", 0.0, NORMAL)]), "pieces of equal score"),
    (spm(["ab", "xy"]), "pieces hold 'x', which is no piece itself"),
    (spm(["ab"], more=[("ab", -99.0, NORMAL)]), "pieces that are double"),
    (spm(["ab"], more=[("a d", -99.0, NORMAL)]), "or hold a space"),
    (spm(["ab"], more=[("cd", -99.0, UNUSED)]), "not one piece for the unknown, or unused ones"),
    (spm(["ab"], start=BYTES), "not one piece for the unknown"),
    (spm(["ab"], more=[("<x>", 0.0, WORD)]), "user-defined symbols beside a first space"),
    (spm(["ab"], start=LLAMA), "it falls back on bytes and does not hold all of them"),
    (b"", "is no whole SentencePiece model"), (b"\x80\x02ccopy_reg\n", "is no whole SentencePiece model"),
    (b"\xff" * 40, "a number of more than 64 bits"), (message((1, message((1, b"\xff\xfe")))), "UnicodeDecodeError"),
    (message((1, 7)), "is no whole SentencePiece model"), (b"\x0b", "wire type 3")])
def test_what_is_no_bpe_model_of_this_kind_is_one_line(tmp_path, blob, says):
    assert says in error(load, tmp_path, blob)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    blob = spm(["ab", "abc"])
    whole = load(tmp_path, blob).spec
    for n in range(len(blob)):
        if n % 37 == 0 or n > len(blob) - 60:
            assert "tokenizer.model" in error(load, tmp_path, blob[:n]), n
    assert load(tmp_path, blob + message((4, b""), (5, message((1, "x"))))).spec == whole    # fields unknown here


def test_added_tokens_lie_beside_a_model_in_either_file(tmp_path):
    blob, size = spm(["ab"]), len(LLAMA) + len(BYTES) + 9
    for more in (dict(added_tokens={"<image>": size, "<loc>": size + 1}),
                 dict(tokenizer_config={"added_tokens_decoder": {
                     "1": {"content": "<s>", "special": True}, str(size): {"content": "<image>", "special": True},
                     str(size + 1): {"content": "<loc>", "special": False}}})):
        for f in tmp_path.glob("*.json"):
            f.unlink()
        tok = load(tmp_path, blob, **more)
        assert tok.image == size and not tok.notes and len(tok) == tok.published == size + 2
        assert tok.text("<loc>")[0] == [size + 1], "an added token that controls nothing is a word"
        assert tok.decode([size, size + 1]) == "<loc>"
    (tmp_path / "tokenizer_config.json").unlink()
    assert "added token '<x>' has id 999" in error(load, tmp_path, blob, added_tokens={"<x>": 999})
    assert "added token '<x>' has id 1" in error(load, tmp_path, blob, added_tokens={"<x>": 1})


def test_names_of_roles_come_from_the_first_file_that_tells_one(tmp_path):
    tok = load(tmp_path, spm(["ab"]))
    assert (tok.bos, tok.eos) == (1, 2)                        # from the model itself, as Llama 1's empty names need it
    tok = load(tmp_path, spm(["ab"]), tokenizer_config={"bos_token": "", "eos_token": {"content": "<s>"}},
               special_tokens_map={"bos_token": "</s>", "eos_token": "</s>"})
    assert (tok.bos, tok.eos) == (2, 1)


# ---- a token for pictures, in every family ---------------------------------------------------------------------------

def byte_level(folder, control, words=(), bos=None, **names):
    """As Llama 3 and Qwen publish theirs: control tokens stand behind the vocabulary, and in added_tokens alone"""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    tok = Tokenizer(models.BPE())
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


def qwen(folder, *more):
    return byte_level(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more], ["<think>", "</think>"],
                      eos_token="<|im_end|>", pad_token="<|endoftext|>")


def vicuna(folder):
    (folder / "tokenizer.model").write_bytes(spm("th ▁th ▁the at cat ▁a ▁c ▁cat".split(), "▁thecab."))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": None,
        "bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "unk_token": {"content": "<unk>"}}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>", "eos_token": "</s>"}))
    return 259 + 16


def mistral_3(folder):
    """The first space stands at the very beginning alone, and [INST] is a control token."""
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
# what is published, spare rows of its embedding, template, then who becomes <image> and who padding; none: a new one
PUBLISHED = {
    "vicuna": (vicuna, 0, "vicuna_v1", None, None), "llama 2": (vicuna, 0, "llava_llama_2", None, None),
    "llama 3": (llama_3, 0, "llama_3", *RESERVED),
    "llama 3.1": (lambda f: llama_3(f, "<|finetune_right_pad_id|>"), 0, "llama_3", RESERVED[0],
                  "<|finetune_right_pad_id|>"),
    "qwen 2": (qwen, 40, "chatml", None, "<|endoftext|>"),
    "qwen 2.5": (lambda f: qwen(f, "<|image_pad|>"), 40, "chatml", "<|image_pad|>", "<|endoftext|>"),
    "smollm 2": (qwen, 0, "chatml", None, "<|endoftext|>"), "mistral 0.3": (mistral_3, 0, "mistral", None, None)}


@pytest.fixture(scope="module")
def publish(tmp_path_factory):
    """name -> vision folder, llm folder, the model both were taken from, how many ids its tokenizer has"""
    def make(name, **text):
        root = tmp_path_factory.mktemp("published")
        (root / "eyes").mkdir(), (root / "tongue").mkdir()
        size = PUBLISHED[name][0](root / "tongue")
        torch.manual_seed(0)
        model = VLM(tiny_config(vocab_size=size + PUBLISHED[name][1], **text))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        v, t = model.cfg.vision, model.cfg.text
        for folder, prefix, c in ((root / "eyes", "vision_tower.", v), (root / "tongue", "language_model.", t)):
            save_file({k.removeprefix(prefix): x.contiguous() for k, x in model.state_dict().items()
                       if k.startswith(prefix) and not (t.tie_word_embeddings and "lm_head" in k)},
                      folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(vars(c) | {"architectures": None}))
        (root / "eyes/preprocessor_config.json").write_text(json.dumps(PRE))
        return root / "eyes", root / "tongue", model, size
    return make


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_language_model_gets_a_token_for_pictures(publish, tmp_path, name):
    """Spare tokens are used where there are any, rows where there are any, and nothing old gets another id or row."""
    eyes, tongue, old, size = publish(name)
    before = tokenizer.read_spec(tongue)[0]
    model, folder = llava.load_model(eyes, tongue)
    tok, (_, _, _, picture, padding) = folder.tok, PUBLISHED[name]
    known = {t["content"]: t["id"] for t in before["added_tokens"]}
    assert tok.image == model.cfg.image_token_index == tok.id("<image>") == known.get(picture, size)
    assert tok.pad == known.get(padding, size + (picture is None)) not in (tok.eos, tok.image)
    V, rows = old.cfg.text.vocab_size, model.cfg.text.vocab_size
    assert rows == (V if len(tok) <= V else math.ceil(len(tok) / 64) * 64) and len(tok) >= size
    grows = name in ("vicuna", "llama 2", "smollm 2", "mistral 0.3")
    assert ("rows for it" in folder.notes[-1]) == (rows > V) == grows
    assert "<image>" in folder.notes[0] and (picture is None) == ("it is new, id" in folder.notes[0])
    for k, x in model.state_dict().items():
        if not k.startswith("multi_modal"):
            y = old.state_dict()[k]
            assert torch.equal(x[:V] if "embed_tokens" in k or "lm_head" in k else x, y), k
            if len(x) > len(y):
                torch.testing.assert_close(x[V:], y.double().mean(0).float().expand(rows - V, -1), rtol=0, atol=1e-7)
    for text in ("the cat. It is", "a <|im_end|> </s> <image> b", " é\n"):               # typed words are as they were
        assert tok.text(text)[0] == tokenizer.blind(before, []).encode(text, add_special_tokens=False).ids

    llava.save_model(tmp_path / "out", model.state_dict(), model.cfg, folder, PUBLISHED[name][2], "", "pad", torch.float32)
    again, back = llava.load_model(init=tmp_path / "out")
    assert again.cfg.text == model.cfg.text and again.cfg.image_token_index == tok.image
    assert back.notes == [] and (back.tok.image, back.tok.pad) == (tok.image, tok.pad)
    assert all(torch.equal(x, again.state_dict()[k]) for k, x in model.state_dict().items())
    c = json.loads((tmp_path / "out/config.json").read_text())
    assert (c["image_token_index"], c["pad_token_id"], c["text_config"]["vocab_size"]) == (tok.image, tok.pad, rows)


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_writes_the_same_ids_with_the_exported_tokenizer(publish, tmp_path, name):
    """AutoTokenizer and chat template of the folder, on the golden conversations; the model loads with every row."""
    T = pytest.importorskip("transformers")
    from test_chat import CONVERSATIONS
    eyes, tongue, *_ = publish(name)
    model, folder = llava.load_model(eyes, tongue)
    tok, template, out, n = folder.tok, PUBLISHED[name][2], tmp_path / "out", 0
    llava.save_model(out, model.state_dict(), model.cfg, folder, template, None, "pad", torch.float32)
    theirs = T.AutoTokenizer.from_pretrained(out)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (tok.bos, tok.eos, tok.pad)
    assert theirs.convert_tokens_to_ids("<image>") == tok.image and len(theirs) == len(tok)
    control = [t["content"] for t in tok.spec["added_tokens"] if t["special"]]
    thinks = [([("q", "<think>\n\n</think>\n\na"), ("<think>", "b")], 0, "S")]
    for turns, images, system in CONVERSATIONS + thinks:
        said = "".join(u + (a or "") for u, a in turns)
        if any(t in said for t in control if t != "<image>") or said.count("<image>") != images:
            continue                                           # typed control tokens: what only our ids can tell
        messages = [{"role": "system", "content": chat.TEMPLATES[template].system if system is None else system}]
        messages += [{"role": r, "content": c} for u, a in turns for r, c in (("user", u), ("assistant", a))]
        ask = turns[-1][1] is None
        ids, _ = chat.encode(tok, template, turns, images, tok.image, 1, system)
        there = theirs.apply_chat_template(messages[:-1] if ask else messages, add_generation_prompt=ask,
                                           tokenize=True, return_dict=True)
        assert list(there["input_ids"]) == ids, turns
        assert theirs.decode(ids, skip_special_tokens=True) == tok.decode(ids)
        n += 1
    assert n >= 17
    there, info = T.LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["mismatched_keys"] and not any("language_model" in k for k in info["missing_keys"])
    assert there.get_input_embeddings().weight.shape[0] == model.cfg.text.vocab_size


def test_new_rows_cannot_raise_the_loss_by_more_than_their_share(publish):
    """log(1 + n/V) at most for any prompt, as the mean logit is never above the mean of the exponentials; and a new id
    is no prompt's first choice. Rows as wide as the old ones, drawn at random, break both."""
    eyes, tongue, old, size = publish("vicuna")
    model, _ = llava.load_model(eyes, tongue)
    V, n = size, model.cfg.text.vocab_size - size
    h = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    W = model.state_dict()["language_model.lm_head.weight"].double()
    rise = (h @ W.T).logsumexp(-1) - (h @ W[:V].T).logsumexp(-1)
    assert 0 < rise.min() and rise.max() <= math.log1p(n / V) + 1e-6
    assert ((h @ W.T).argmax(-1) < V).all()
    W[V:] = torch.randn(n, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.2
    rise = (h @ W.T).logsumexp(-1) - (h @ W[:V].T).logsumexp(-1)
    assert rise.max() > 2 * math.log1p(n / V) and ((h @ W.T).argmax(-1) >= V).any()


def test_a_tied_embedding_grows_once_and_a_picture_passes_through(publish):
    eyes, tongue, _, size = publish("smollm 2", tie_word_embeddings=True)
    model, folder = llava.load_model(eyes, tongue)
    assert model.cfg.text.vocab_size > size and "language_model.lm_head.weight" not in model.state_dict()
    ids, labels = chat.encode(folder.tok, "chatml", [("<image>\nq", "a")], 1, folder.tok.image, 4)
    batch = pack([(ids, labels, example(1)[2])], 8)
    assert model(*batch).isfinite() and folder.tok.image not in labels


def test_a_config_may_say_which_token_is_the_picture(publish, tmp_path):
    """As some LLaVAs do that keep a reserved token's name; a token that is someone else's word is refused."""
    eyes, tongue, *_ = publish("llama 3")
    model, folder = llava.load_model(eyes, tongue)
    spare = folder.tok.specials["<pad>"]                       # the second reserved token, by its new name
    own = Tokenizer(tongue, spare)
    assert own.image == spare == own.id("<image>") and own.pad == folder.tok.image == own.id("<pad>")
    assert "<|reserved_special_token_1|> is called so" in own.notes[0]
    assert f"config.json has 5 stand for a picture, here it is {own.published}" in error(Tokenizer, tongue, 5)
    llava.save_model(tmp_path / "out", model.state_dict(), model.cfg, folder, "llama_3", "", "pad", torch.float32)
    assert "stand for a picture" in error(Tokenizer, tmp_path / "out", spare)


def test_an_image_token_that_people_could_type_becomes_a_control_token(tmp_path):
    blob, size = spm(["ab"]), len(LLAMA) + len(BYTES) + 9
    for more in (dict(added_tokens={"<image>": size}), dict()):
        (tmp_path / str(len(more))).mkdir()
        tok = load(tmp_path / str(len(more)), blob if more else spm(["ab"], more=[("<image>", -99.0, CONTROL)]), **more)
        assert tok.image == size and size not in tok.text("<image>")[0]
    vocab = json.loads(json.dumps(tok.spec))
    vocab["added_tokens"] = [t for t in vocab["added_tokens"] if t["content"] != "<image>"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only/tokenizer.json").write_text(json.dumps(vocab))
    assert Tokenizer(tmp_path / "only").image == size, "a piece of that name is the token, where nothing added is"


def test_training_says_what_the_tokenizer_was_lacking(publish, tmp_path, capsys):
    """Two folders as they are published go into stage 1, and nothing has to be prepared."""
    from PIL import Image

    import train_align
    eyes, tongue, *_ = publish("vicuna")
    Image.new("RGB", (9, 12)).save(tmp_path / "a.png")
    rows = [{"id": i, "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nthe"}, {"from": "gpt", "value": "a cat"}]} for i in range(16)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    train_align.main(train_align.Settings(
        data=str(tmp_path / "data.json"), images=str(tmp_path), vision=str(eyes), llm=str(tongue), device="cpu",
        dtype="fp32", dry_run=True, out=str(tmp_path / "out")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "the tokenizer had no <image>: it is new, id 275", "the tokenizer had no <pad>: it is new, id 276",
        "embedding and head get 45 rows for it, each the mean of the old ones: 275 -> 320"]


@pytest.mark.parametrize("image", [True, False])
def test_padding_is_never_what_ends_an_answer(image):
    """TinyLlama-Chat pads with </s>, and who masks by `not the padding` would never learn to stop."""
    names = ["<unk>", "<s>", "</s>", *(["<image>"] if image else [])]
    spec = {"model": {"vocab": {n: i for i, n in enumerate(names)}, "unk_token": "<unk>"},
            "added_tokens": [tokenizer.added(i, n) for i, n in enumerate(names)]}
    _, pad, _ = tokenizer.needed(spec, {"eos_token": "</s>", "pad_token": "</s>"})
    assert pad == (0 if image else 4)                        # as original LLaVA; a new one, behind the new <image>
