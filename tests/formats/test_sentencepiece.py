"""tokenizer.model translated: the ids of the package itself, and what is refused."""

import io
import itertools
import json
import random
import struct

import pytest
from conftest import WORDS, error

from formats.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from formats.tokenizer import Tokenizer, without_control_tokens

TYPED = list("abcdefgh  \n▁é一👩/s0x1A|im_\x00\t\u0301\u200d") + [
    "<s>", "</s>", "<0x0A>", "<unk>", "<pad>", "   ", "cat", "the", "▁▁", "<im>", " of", "<|im_start|>",
    "\U0010ffff", "black cat. "]


# ---- a tokenizer.model written by hand ------------------------------------------------------------------------------

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


def spm(merged, chars="▁abcdeht", more=(), trainer=(), normalizer=(), start=(*LLAMA, *BYTES)):
    """A tokenizer.model like Llama's: `merged` pieces, the highest score first, then characters"""
    normal = [(name, -float(i), NORMAL) for i, name in enumerate([*merged, *chars])]
    pieces = [message((1, name), (2, score), (3, kind)) for name, score, kind in [*start, *normal, *more]]
    trainer = {3: 2, 35: 1, 41: 1, 42: 2, 43: -1} | dict(trainer)
    normalizer = {1: "identity", 3: 1, 4: 0, 5: 1} | dict(normalizer)
    return message(*((1, p) for p in pieces), (2, message(*trainer.items())), (3, message(*normalizer.items())))


def by_scores(text, vocab, prefix=True):
    """SentencePiece's rule: merge the adjacent pair whose union has the highest score, the leftmost of several, until
    no union is a piece."""
    symbols = list((" " + text if prefix and text else text).replace(" ", "▁"))
    while True:
        pairs = [(-vocab[a + b], i) for i, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in vocab]
        if not pairs:
            return symbols
        i = min(pairs)[1]
        symbols[i:i + 2] = ["".join(symbols[i:i + 2])]


def read(folder, blob, **files):
    """A tokenizer.model and json files beside it -> Tokenizer"""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(blob)
    for name, obj in files.items():
        (folder / f"{name}.json").write_text(json.dumps(obj))
    return Tokenizer(folder)


@pytest.mark.parametrize("merged", [
    "ab ba aba bab abab aa aaa aaaa bb abb", "aa ab aaa aab baa aaaa ▁a ▁aa ▁▁ ▁▁▁ a▁",
    "ba aa ab bb aab bba abba"])
def test_ranked_merges_equal_scores_on_short_strings(tmp_path, merged):
    """All 6,561 strings of eight letters a, b and space, over vocabularies full of overlapping pieces."""
    tok = read(tmp_path, spm(merged.split(), "▁ab"))
    vocab = {name: -i for i, name in enumerate(merged.split())}
    for n in (0, 1, 8):
        for letters in itertools.product("ab ", repeat=n):
            text = "".join(letters)
            assert tok.start.encode(text).tokens == by_scores(text, vocab), text
    assert tok.decode(tok.text(" a b ")[0]) == " a b "


def train(texts, folder, vocab_size=675, **kw):
    """A model trained by the package -> the package's processor, our Tokenizer"""
    sp, out = pytest.importorskip("sentencepiece"), io.BytesIO()
    llama = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", split_digits=True,
                 remove_extra_whitespaces=False, add_dummy_prefix=True, allow_whitespace_only_pieces=True)
    sp.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=out, vocab_size=vocab_size,
                                  hard_vocab_limit=False, minloglevel=2, **llama | kw)
    return sp.SentencePieceProcessor(model_proto=out.getvalue()), read(folder, out.getvalue())


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
def test_ids_equal_those_of_sentencepiece(tmp_path, kw):
    """Also its text: spaces, newlines, bytes, typed control pieces, characters that are no pieces."""
    for name, texts in TEXTS.items():
        sp, tok = train(texts, tmp_path / name, 675 if name == "words" else 330, **kw)
        for text in strings(name, 1000):
            ids = sp.encode(text)
            assert tok.text(text)[0] == ids, (text, sp.encode(text, out_type=str))
            if sp.unk_id() not in ids and "▁" not in text:
                assert tok.decode(ids) == sp.decode(ids) == text
        assert tok.published == sp.vocab_size() and len(tok) == sp.vocab_size() + len(tok.notes)
        assert (tok.bos, tok.eos) == tuple(i if i >= 0 else None for i in (sp.bos_id(), sp.eos_id()))


def test_a_wrong_translation_gives_other_ids(tmp_path):
    """These strings do show errors: Metaspace for the first space, or merges in another order."""
    sp, tok = train(TEXTS["words"], tmp_path / "a")
    metaspace = tok.spec | {"normalizer": None, "pre_tokenizer": {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}}
    backwards = json.loads(json.dumps(tok.spec))
    backwards["model"]["merges"].reverse()
    for broken in (metaspace, backwards):
        other = without_control_tokens(broken, [])
        assert any(other.encode(text).ids != sp.encode(text) for text in strings(0, 500))


def test_transformers_gives_the_same_ids(tmp_path):
    """Its conversion in legacy mode. Texts that begin with a space differ: there it differs from SentencePiece."""
    T = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")                     # what transformers reads the file with
    sp, tok = train(TEXTS["words"], tmp_path / "a")
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    theirs = T.LlamaTokenizer.from_pretrained(tmp_path / "a", legacy=True)
    differ = 0
    for text in strings(1, 500):
        if any(token in text for token in ("<s>", "</s>", "<unk>", "▁")):
            continue                                           # transformers makes control tokens of these
        same = theirs(text, add_special_tokens=False)["input_ids"] == tok.text(text)[0]
        assert same or text.startswith(" "), text
        differ += not same
    assert differ


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("blob, says", [
    (spm(["ab"], trainer={3: 1}), "its model type is not bpe"),
    (spm(["ab"], normalizer={2: b"table"}), "it rewrites text before it splits it"),
    (spm(["ab"], normalizer={4: 1}), "it rewrites text"), (spm(["ab"], trainer={24: 1}), "it rewrites text"),
    (spm(["ab"], more=[("cd", 0.0, NORMAL)]), "pieces of equal score"),
    (spm(["ab", "xy"]), "some pieces have characters that are no pieces"),
    (spm(["ab"], more=[("ab", -99.0, NORMAL)]), "duplicate or empty pieces"),
    (spm(["ab"], more=[("a d", -99.0, NORMAL)]), "or pieces with a space"),
    (spm(["ab"], more=[("cd", -99.0, UNUSED)]), "more or less than one unknown piece, or unused"),
    (spm(["ab"], start=BYTES), "more or less than one unknown piece"),
    (spm(["ab"], more=[("<x>", 0.0, USER_DEFINED)]), "user-defined pieces and a first space"),
    (spm(["ab"], start=LLAMA), "it falls back on bytes but does not hold all 256"),
    (b"", "is not a complete SentencePiece model"), (b"\x80\x02ccopy_reg\n", "is not a complete SentencePiece model"),
    (b"\xff" * 40, "an integer of more than 64 bits"), (message((1, message((1, b"\xff\xfe")))), "UnicodeDecodeError"),
    (message((1, 7)), "is not a complete SentencePiece model"), (b"\x0b", "wire type 3")])
def test_other_models_are_refused_in_one_line(tmp_path, blob, says):
    assert says in error(read, tmp_path, blob)


def test_a_truncated_file_is_refused(tmp_path):
    blob = spm(["ab", "abc"])
    whole = read(tmp_path, blob).spec
    for n in range(len(blob)):
        if n % 37 == 0 or n > len(blob) - 60:
            assert "tokenizer.model" in error(read, tmp_path, blob[:n]), n
    assert read(tmp_path, blob + message((4, b""), (5, message((1, "x"))))).spec == whole    # unknown fields
