"""Published tokenizers: SentencePiece's files against the package itself, and the picture's token in every family."""

import io
import itertools
import json
import math
import random
import struct

import pytest
import torch
from conftest import WORDS, example, make_tokenizer, tiny_config
from safetensors.torch import save_file

import chat
import hf
import tokenizer
from data import pack
from model import VLM
from tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, WORD, Tokenizer

PRE = {"crop_size": 8, "size": 8}
TYPED = list("abcdefgh  \n▁é一👩/s0x1A|im_\x00\t\u0301\u200d") + [
    "<s>", "</s>", "<0x0A>", "<unk>", "<pad>", "   ", "cat", "the", "▁▁", "<im>", " of", "<|im_start|>", "\U0010ffff", "black cat. "]


def error(call, *args, **kw):
    with pytest.raises(SystemExit) as e:
        call(*args, **kw)
    line = str(e.value)
    assert line.startswith("error: ") and "\n" not in line
    return line


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
        other = tokenizer.blind(broken)
        assert any(other.encode(text).ids != sp.encode(text) for text in strings(0, 500))


def test_transformers_reads_a_vicuna_folder_alike(tmp_path):
    """Its own conversion in legacy mode, but for texts that begin with a space: there it leaves SentencePiece's way."""
    T = pytest.importorskip("transformers")
    sp, tok = train(TEXTS["words"], tmp_path / "a")
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    theirs = T.LlamaTokenizer.from_pretrained(tmp_path / "a", legacy=True)
    differ = 0
    for text in strings(1, 2000):
        if any(token in text for token in ("<s>", "</s>", "<unk>", "▁")):
            continue                                           # typed control tokens become controls there, and not here
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
    assert load(tmp_path, blob + message((4, b""), (5, message((1, "more"))))).spec == whole      # fields not known here


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
