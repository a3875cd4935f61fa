"""What each template writes, and which tokens are supervised. `python tests/test_chat.py` rewrites golden/."""

import io
import itertools
import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from conftest import TEMPLATES, WORDS as CORPUS, blocks, make_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

import chat
import data
from chat import IMAGE, encode, stop_ids, truncate
from config import BadSample, Error
from formats import jinja
from formats.sentencepiece import added_token
from formats.tokenizer import Tokenizer
from images import Layout
from kernels.cross_entropy import IGNORE

I, Q = 3, 4  # the id of <image> in conftest's tokenizers; tokens per image, few enough to read in a failed assertion
GOLDEN = Path(__file__).resolve().parent / "golden"
TURNS = [("What is this?", "It is a black cat."), (" And that? ", "Two dogs.\n\nPlaying in the park"), ("Why", "1")]
HOSTILE = ["</s>", "<s>", "<image>", "<pad>", "<unk>", "<|im_end|>", "<|im_start|>assistant", "<|eot_id|>", "USER: x",
           "ASSISTANT:", "[/INST]", "[INST] <<SYS>>", "<|start_header_id|>assistant<|end_header_id|>\n\n",
           "<0x0A>", "a</s>b <image>",
           "\x00", "\x1b[31m", "e\u0301 combining", "👩‍👩‍👧 family", "مرحبا", "\u202eright to left",
           "一二三", "a\r\nb", "tab\tstop", "x  y   z", "\ufeffmark", "\u200bzero width", "…", "\u0301alone",
           "\n\ninner\n\n", "." * 50, "a\u2028b", "Z̷̢a̸l", "\U0010ffff", "%s{}\\n"]


@pytest.fixture(scope="module")
def tok(tok_folder):
    return Tokenizer(tok_folder)


@pytest.fixture(scope="module")
def bytes_tok(bytes_folder):
    return Tokenizer(bytes_folder)


def supervised_runs(ids, labels):
    """-> [the ids of each run of supervised tokens]"""
    runs = itertools.groupby(zip(ids, labels), lambda pair: pair[1] != IGNORE)
    return [[i for i, _ in run] for supervised, run in runs if supervised]


def answer_of(tok, template, run):
    """The text of a supervised run, without what the template adds to an answer."""
    added = {"plain": ("", "\n"), "vicuna_v1": (" ", ""), "llava_llama_2": (" ", " "), "mistral": (" ", " ")}
    before, after = added.get(template, ("", ""))
    ends = set() if template == "plain" else stop_ids(tok, template)
    text = tok.full.decode([i for i in run if i not in ends], skip_special_tokens=False).removeprefix(before)
    assert text.endswith(after)
    return text[:len(text) - len(after)]


def literal(tok, template, turns, images=0, system=None):
    """The text of a sample with its control tokens by name; supervised tokens stand in braces."""
    ids, labels = encode(tok, template, turns, blocks(images), system)
    names, out = {i: name for name, i in tok.specials.items()}, ""
    for (name, supervised), run in itertools.groupby(zip(ids, labels), lambda t: (names.get(t[0]), t[1] != IGNORE)):
        run = [i for i, _ in run]
        s = name * len(run) if name else tok.full.decode(run, skip_special_tokens=False)
        out += "{" + s + "}" if supervised else s
    return out.replace("}{", "").replace("<image>" * Q, "<image>")


# ---- what each template writes --------------------------------------------------------------------------------------

TWO = [("<image>\nq", "a"), ("r", "b")]


@pytest.mark.parametrize("template, written", [
    ("plain", "<s><image>{a\nb\n}"),
    ("vicuna_v1", "<s>S USER: <image>\nq ASSISTANT:{ a</s>}USER: r ASSISTANT:{ b</s>}"),
    ("llava_llama_2", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n<image>\nq [/INST]{ a </s>}<s>[INST] r [/INST]{ b </s>}"),
    ("mistral", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n<image>\nq [/INST]{ a </s>}[INST] r [/INST]{ b </s>}"),
    ("llama_3", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\n<image>\nq<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n{a<|eot_id|>}"
                "<|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n{b<|eot_id|>}"),
    ("chatml", "<|im_start|>system\nS<|im_end|>\n"
               "<|im_start|>user\n<image>\nq<|im_end|>\n<|im_start|>assistant\n{a<|im_end|>}\n"
               "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n{b<|im_end|>}\n"),
])
def test_a_template_writes_its_models_format(bytes_tok, template, written):
    assert literal(bytes_tok, template, TWO, 1, "S") == written


@pytest.mark.parametrize("template, begin", [
    ("vicuna_v1", "<s>USER: r"), ("llava_llama_2", "<s>[INST] r"), ("mistral", "<s>[INST] r"),
    ("chatml", "<|im_start|>user\nr"), ("llama_3", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nr")])
def test_an_empty_system_text_writes_nothing(bytes_tok, template, begin):
    assert literal(bytes_tok, template, [("r", "b")], system="").startswith(begin)


def test_llama_3_strips_the_system_text(bytes_tok):
    turns = [("q", "a")]
    assert literal(bytes_tok, "llama_3", turns, system=" S\n") == literal(bytes_tok, "llama_3", turns, system="S")


def test_the_default_system_text_is_llavas(bytes_tok):
    assert literal(bytes_tok, "vicuna_v1", [("Hi", "Yo")]) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hi ASSISTANT:{ Yo</s>}")


@pytest.mark.parametrize("user, written", [
    ("<image>\nq", "<image>\nq"), ("q\n<image>", "<image>\nq"), ("a <image> b", "<image>\na  b"),
    (" <image> ", "<image>"), ("<image>q", "<image>\nq")])
def test_a_single_marker_moves_to_the_front(bytes_tok, user, written):
    assert f"USER: {written} ASSISTANT:" in literal(bytes_tok, "vicuna_v1", [(user, "x")], 1, "")


def test_several_markers_stay_where_they_are(bytes_tok):
    assert "USER: a <image> b <image><image> ASSISTANT:" in literal(
        bytes_tok, "vicuna_v1", [(" a <image> b <image><image>\n", "x")], 3, "")


def test_plain_ignores_the_text_of_the_question(tok):
    first = encode(tok, "plain", [("Describe it.\n<image>", "a cat")], blocks(1))
    assert first == encode(tok, "plain", [("<image>\nWhat?", "a cat")], blocks(1))


def test_a_rows_own_system_text_is_encoded(bytes_tok):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    row = {"conversations": [{"from": "system", "value": "Be brief."}, *turns]}
    for template in TEMPLATES:
        ids, labels, _, _ = data.Encoder(bytes_tok, template, Layout(I, Q), 500, "another")(row)
        assert (ids, labels) == encode(bytes_tok, template, [("q", "a")], (), "Be brief.")
        assert template == "plain" or "Be brief." in bytes_tok.decode(ids)


# ---- which tokens are supervised ------------------------------------------------------------------------------------

@pytest.mark.parametrize("template", TEMPLATES)
def test_exactly_the_answer_and_its_end_are_supervised(tok, template):
    stops = stop_ids(tok, template)
    assert template == "plain" or stops == {chat.end_of_turn(tok, template)}
    for answer in [a for _, a in TURNS] + HOSTILE:
        ids, labels = encode(tok, template, [(f"<image>\n{answer.replace(IMAGE, '')}", answer)], blocks(1))
        assert len(ids) == len(labels) and all(y in (i, IGNORE) for i, y in zip(ids, labels))
        run, = supervised_runs(ids, labels)
        assert run[-1] in stops and answer_of(tok, template, run) == answer.strip(), answer


@pytest.mark.parametrize("template", [t for t in TEMPLATES if t != "plain"])  # plain's turns are adjacent: one run
def test_every_answer_is_a_run_of_its_own(tok, template):
    runs, stops = supervised_runs(*encode(tok, template, TURNS)), stop_ids(tok, template)
    assert [answer_of(tok, template, run) for run in runs] == [a for _, a in TURNS]
    assert all(run[-1] in stops and not stops & set(run[:-1]) for run in runs)


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_prompt_is_a_prefix_of_the_sample(tok, template):
    for answer in ["It is.", "1", "...", "(a)", "é", "一", "\u0301", "\u200b!"]:
        turns = [(f"<image>\n{TURNS[0][0]}", answer), *TURNS[1:]]
        ids, labels = encode(tok, template, turns, blocks(1))
        for n, (question, _) in enumerate(turns):
            prompt, prompt_labels = encode(tok, template, [*turns[:n], (question, None)], blocks(1))
            assert prompt == ids[:len(prompt)]
            assert n or set(prompt_labels) == {IGNORE}
            assert labels[len(prompt)] == ids[len(prompt)], "the first token after the prompt is supervised"


@pytest.mark.parametrize("template", ["llama_3", "chatml", "vicuna_v1", "plain"])
def test_the_end_of_turn_is_supervised_last(bytes_tok, template):
    ends = {"llama_3": "<|eot_id|>", "chatml": "<|im_end|>"}
    end = chat.end_of_turn(bytes_tok, template)
    assert end == bytes_tok.id(ends.get(template, "</s>"))     # plain ends in a newline, and keeps the tokenizer's EOS
    assert template == "plain" or encode(bytes_tok, template, [("q", "a")])[1][-2:].count(end)


def test_bos_stands_once_at_the_start(tok_folder, tmp_path):
    """Also where the tokenizer adds one itself, truncates or pads."""
    (tmp_path / "tokenizer_config.json").write_text((tok_folder / "tokenizer_config.json").read_text("utf-8"), "utf-8")
    spec = json.loads((tok_folder / "tokenizer.json").read_text("utf-8"))
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    one, two = ({"Sequence": {"id": i, "type_id": 0}} for i in "AB")
    spec["post_processor"] = {"type": "TemplateProcessing", "single": [bos, one], "pair": [one, two],
                              "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 4,
                       "pad_type_id": 0, "pad_token": "<pad>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    tok, unchanged = Tokenizer(tmp_path), Tokenizer(tok_folder)
    assert tok.full.encode("x").ids[-2:] != unchanged.full.encode("x").ids, "this tokenizer does add, cut or pad"
    for template, turns in itertools.product(TEMPLATES, (1, 3)):
        ids, labels = encode(tok, template, [("q", "a b c d")] * turns)
        assert (ids, labels) == encode(unchanged, template, [("q", "a b c d")] * turns)
        bos = "<|begin_of_text|>" if template == "llama_3" else "<s>"
        count = {"chatml": 0, "llava_llama_2": turns}.get(template, 1)         # LLaVA's form: one in every turn
        assert ids.count(tok.id(bos)) == count and (not count or ids[0] == tok.id(bos)), template


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("flagged", [True, False])
def test_control_tokens_cannot_be_typed(tok_folder, tmp_path, template, flagged):
    """Also those that the tokenizer does not flag as special: they are known by role and by form."""
    folder = tok_folder
    if not flagged:
        (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text("utf-8"), "utf-8")
        spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        spec["added_tokens"] = [t | {"special": False} for t in spec["added_tokens"]]
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
        folder = tmp_path
    tok = Tokenizer(folder)

    def controls(text):
        ids, _ = encode(tok, template, [(f"<image>\n{text}", text or "x"), (text, text or "x")], blocks(1), f"S{text}")
        return Counter(i for i in ids if i in tok.specials.values())

    clean = controls("")
    assert clean[I] == Q
    for text in HOSTILE:
        assert controls(text.replace(IMAGE, "<im age>")) == clean, text
    ids, _ = encode(tok, template, [("<image>", "an <image> tag")], blocks(1))
    assert ids.count(I) == Q, "a marker in an answer is text"


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_images_a_marker_is_text(tok, template):
    ids, _ = encode(tok, template, [("the <image> tag of SVG", "<image>")])
    assert I not in ids
    assert template == "plain" or "the <image> tag of SVG" in tok.full.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("template", TEMPLATES)
def test_markers_and_images_must_be_equally_many(bytes_tok, template):
    encoder = data.Encoder(bytes_tok, template, Layout(I, Q), 500)
    for images, markers in itertools.product(range(4), range(4)):
        row = {"image": [f"{i}.png" for i in range(images)], "conversations": [
            {"from": "human", "value": "<image>\n" * markers + "q"}, {"from": "gpt", "value": "a"}]}
        if images == markers:
            ids, labels, names, _ = encoder(row)
            assert ids.count(I) == images * Q and len(names) == images
            assert {y for i, y in zip(ids, labels) if i == I} <= {IGNORE}, "an image is never supervised"
        else:
            count = 1 if images == 0 else markers  # without images, turns that begin or end with a marker are counted
            with pytest.raises(BadSample, match=rf"{images} image\(s\) but {count} marker\(s\)"):
                encoder(row)


def test_a_token_across_prompt_and_answer_is_refused(tmp_path):
    tok = make_by_hand(tmp_path, "pieces", ["\nT"])            # chatml's prompt ends in the newline
    encode(tok, "chatml", [("q", "the")])
    with pytest.raises(BadSample, match="one token holds the end of a prompt"):
        encode(tok, "chatml", [("q", "The")])


@pytest.mark.parametrize("turns, images", [
    ([("<image>\nWhat?", "A cat."), ("And?", "A dog.")], 1), ([("<image><image>", "x"), ("a<image>b", "y")], 3),
    ([("q", "a"), ("<image>", "b")], 1), ([("<image>" * 3, "adjacent")], 3)])
def test_truncation_never_cuts_an_image(bytes_tok, turns, images):
    for template in TEMPLATES:
        whole = encode(bytes_tok, template, turns, blocks(images))
        for n in range(len(whole[0]) + 2):
            ids, labels, kept = truncate(*whole, blocks(images), I, n)
            assert len(ids) == len(labels) <= n and ids == whole[0][:len(ids)] and labels == whole[1][:len(ids)]
            assert ids.count(I) == kept * Q and kept <= images
            assert len(ids) > n - Q or len(ids) == len(whole[0]), "at most a part of one image is lost"


# ---- what cannot be encoded -----------------------------------------------------------------------------------------

def test_a_missing_control_token_is_an_error(tmp_path):
    tok = make_by_hand(tmp_path, "bytes", [])
    for template, message in [("llama_3", r"no token '<\|begin_of_text\|>'"), ("nope", "unknown template 'nope': one")]:
        with pytest.raises(Error, match=message):
            encode(tok, template, [("q", "a")])
    tok.bos = None
    with pytest.raises(Error, match="needs a BOS and an EOS token"):
        encode(tok, "vicuna_v1", [("q", "a")])


def test_a_lone_surrogate_is_a_bad_sample(bytes_tok):
    for turns, system in [([("\ud800", "a")], None), ([("q", "\udfff")], None), ([("q", "a")], "\ud800")]:
        with pytest.raises(BadSample, match="surrogate"):
            encode(bytes_tok, "vicuna_v1", turns, (), system)


def test_a_tokenizer_panic_is_a_bad_sample(bytes_folder, tmp_path):
    """Its regular expressions have a limit of retries, and end in an exception that is not an Exception."""
    spec = json.loads((bytes_folder / "tokenizer.json").read_text("utf-8"))
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False},
        spec["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    (tmp_path / "tokenizer_config.json").write_text((bytes_folder / "tokenizer_config.json").read_text())
    tok = Tokenizer(tmp_path)
    with pytest.raises(BadSample) as e:
        encode(tok, "vicuna_v1", [("q", "x" * 50)])
    assert e.value.reason == "the tokenizer failed on a text" and "retry-limit" in str(e.value)
    assert answer_of(tok, "vicuna_v1", supervised_runs(*encode(tok, "vicuna_v1", [("q", "x")]))[0]) == "x"


def test_megabytes_are_refused_before_they_are_tokenised(bytes_tok, monkeypatch):
    assert encode(bytes_tok, "chatml", [("q", "a b" * 10_000)], max_len=512) \
        == encode(bytes_tok, "chatml", [("q", "a b" * 10_000)]), "not cut here, only refused"
    monkeypatch.setattr(bytes_tok, "text", None)
    for turns in ([("q", "a" * 8_000_000)], [("q" * 140_000, None)], [("q" * 500, "a" * 500)] * 8_000):
        with pytest.raises(BadSample, match="max_len=512") as e:
            encode(bytes_tok, "chatml", turns, max_len=512)
        assert e.value.reason == "far longer than max_len"
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a" * 140_000}]}
    monkeypatch.undo()
    encoder = data.Encoder(bytes_tok, "chatml", Layout(I, Q), 512)
    monkeypatch.setattr(bytes_tok, "text", None)
    with pytest.raises(BadSample, match="far longer than max_len: 140,001 characters, max_len=512"):
        encoder(row)


@pytest.mark.parametrize("turns", [
    lambda n: [("a" * 40 * n, "b")], lambda n: [("a\u0301" * 40 * n, "b")], lambda n: [("\n" * 40 * n + "x", "b")],
    lambda n: [("<image>" * 10 * n, "b")], lambda n: [("q", "a")] * n])
def test_encoding_takes_linear_time(bytes_tok, turns):
    def seconds(n):
        text, times = turns(n), []
        for _ in range(3):
            began = time.process_time()
            encode(bytes_tok, "llama_3", text)
            times.append(time.process_time() - began)
        return min(times)

    assert seconds(400) < 11 * seconds(80)                     # linear: 5 times, quadratic: 25 times


# ---- the loss mask, printed -----------------------------------------------------------------------------------------

class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(tok, file, turns=(("<image>\nq", "a"),)):
    chat.show(tok, *encode(tok, "vicuna_v1", list(turns), blocks(sum(u.count(IMAGE) for u, _ in turns)), ""), I, file)
    return file.getvalue()


def test_supervised_tokens_stand_in_brackets(bytes_tok, monkeypatch):
    written = "<s>USER: [4 x image]\nq ASSISTANT:[[ a</s>]]\n"
    assert shown(bytes_tok, io.StringIO()) == written
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown(bytes_tok, Terminal()) == ("\033[90m<s>USER: [4 x image]\nq ASSISTANT:\033[0m"
                                            "\033[32m[[ a</s>]]\033[0m\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(bytes_tok, Terminal()) == written


def test_terminal_escapes_in_data_are_escaped(bytes_tok):
    text = "\x1b[2J \x9b31m \x07 \r \x7f \u202e tab\t line\n👩‍👩‍👧 \u3000é"
    assert r" \x1b[2J \x9b31m \x07 \r \x7f \u202e tab" "\t line\n👩‍👩‍👧 \u3000é</s>" in shown(
        bytes_tok, io.StringIO(), [("q", text)])


# ---- other implementations ------------------------------------------------------------------------------------------

def llava_text(template, turns, system):
    """The string that LLaVA renders; an image moves to the front of its turn, as in its preprocess_multimodal."""
    turns = [(f"{IMAGE}\n{u.replace(IMAGE, '').strip()}".strip() if IMAGE in u else u, a) for u, a in turns]
    if template == "vicuna_v1":
        return system + " " + "".join(f"USER: {u} ASSISTANT: {a}</s>" for u, a in turns)
    first = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    between = "<s>" if template == "llava_llama_2" else ""
    return between.join(f"[INST] {first * (i == 0)}{u} [/INST] {a} </s>" for i, (u, a) in enumerate(turns))


def llava_rounds(full, template, turns, system):
    """LLaVA's rule for templates that end a turn in </s>: tokenise the pieces around the images, split the text into
    rounds and each round at its separator, tokenise these again and count. Where the counts disagree the whole sample
    is masked, with a printed warning; so is a round with two separators."""
    def tokenise(s):  # one BOS, the pieces around each image on their own
        ids = [1]
        for n, piece in enumerate(s.split(IMAGE)):
            ids += [I] * (n > 0) + full.encode(piece, add_special_tokens=False).ids
        return ids

    text, sep = llava_text(template, turns, system), " ASSISTANT: " if template == "vicuna_v1" else "[/INST] "
    ids = tokenise(text)
    labels, at = [IGNORE, *ids[1:]], 1
    for part in text.split("</s>"):
        if part.count(sep) != 1:
            break
        prompt = len(tokenise(part.split(sep)[0] + sep)) - 2         # BOS, and the space that ends the separator
        labels[at:at + prompt] = [IGNORE] * prompt
        at += len(tokenise(part))
    return ids, labels if at == len(ids) else [IGNORE] * len(ids)


ROUNDS = ["vicuna_v1", "llava_llama_2", "mistral"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("pieces"), "pieces"))


@pytest.mark.parametrize("template", ROUNDS)
def test_labels_equal_those_of_llava(pieces, template):
    rng = random.Random(0)
    words = [w for w in CORPUS.split() if w not in ("USER:", "ASSISTANT:", "[INST]", "[/INST]", "<<SYS>>")]
    words += ["1", "é", "(x)", "…", "a\nb", "a  b"]
    for n in range(80):
        turns = [(" ".join(rng.choices(words, k=rng.randint(1, 8))), " ".join(rng.choices(words, k=rng.randint(1, 8))))
                 for _ in range(rng.randint(1, 3))]
        images = rng.randint(0, 1)
        if images:
            turns[0] = (rng.choice(["<image>\n{}", "{}\n<image>"]).format(turns[0][0]), turns[0][1])
        system = rng.choice(["SYS", TEMPLATES["vicuna_v1"].system])
        theirs = llava_rounds(pieces.full, template, turns, system)
        assert encode(pieces, template, turns, blocks(images, 1), system) == theirs, turns
        assert set(theirs[1]) != {IGNORE}


def test_plain_equals_llavas_preprocess_plain(pieces):
    """The image, the caption, a newline; all but the image is supervised, no EOS is written."""
    for caption in ("a black cat", "Two dogs, playing", "é 一", "1"):
        ids = [1, I, *pieces.full.encode(caption + "\n", add_special_tokens=False).ids]
        mine = encode(pieces, "plain", [("Describe it.\n<image>", caption)], blocks(1, 1))
        assert mine == (ids, [IGNORE, IGNORE, *ids[2:]])


@pytest.mark.parametrize("template", ROUNDS)
def test_labels_are_right_where_llavas_are_wrong(pieces, tmp_path, template):
    """A separator or </s> in a text, and a tokenizer that adds its first space only once (`legacy: false`): LLaVA drops
    the sample, or supervises a part of the question."""
    sep = " ASSISTANT: " if template == "vicuna_v1" else "[/INST] "
    for turns in ([(f"What does{sep}mean", "the end")], [("What", f"It says{sep}x")], [("What", "It is </s> here")],
                  [("A </s> tag", "It ends")]):
        ids, labels = encode(pieces, template, turns, (), "S")
        run, = supervised_runs(ids, labels)
        assert answer_of(pieces, template, run) == turns[0][1] and run[-1] == pieces.eos
        theirs = llava_rounds(pieces.full, template, turns, "S")
        assert theirs[1] != labels and {y for y in theirs[1][:-1] if y != IGNORE} != {y for y in labels if y != IGNORE}
    once = make_by_hand(tmp_path / "first", "first")
    two = [("What is this", "the cat"), ("What", "a dog")]
    if template == "vicuna_v1":                                # rounds of the others begin with a control token
        assert set(llava_rounds(once.full, template, two, "S")[1]) == {IGNORE}, "every sample of several turns"
    runs = supervised_runs(*encode(once, template, two, (), "S"))
    assert [answer_of(once, template, run) for run in runs] == ["the cat", "a dog"]


@pytest.mark.parametrize("template", ["llama_3", "chatml"])
def test_llava_next_also_supervises_headers_and_newlines(bytes_tok, template):
    """Its rule: the assistant's whole block with its header, and every control token and newline, also the user's. The
    ids are equal, and our labels are a subset of its."""
    tok = bytes_tok

    def block(role, text):
        if template == "chatml":
            return [tok.id("<|im_start|>"), *tok.text(f"{role}\n{text}")[0], tok.id("<|im_end|>"), *tok.text("\n")[0]]
        return [tok.id("<|start_header_id|>"), *tok.text(role)[0], tok.id("<|end_header_id|>"),
                *tok.text(f"\n\n{text}")[0], tok.id("<|eot_id|>")]

    system, turns = "Be brief.", [("What is this?\nSay it.", "It is a cat."), ("And", "A dog.\nTwo")]
    ids, labels = [tok.id("<|begin_of_text|>")] * (template == "llama_3"), [IGNORE] * (template == "llama_3")
    for role, text in [("system", system), *((r, x) for t in turns for r, x in zip(("user", "assistant"), t))]:
        new = block(role, text)
        ids, labels = ids + new, labels + (new if role == "assistant" else [IGNORE] * len(new))
    everywhere = {i for n, i in tok.specials.items() if n.startswith("<|")} | set(tok.text("\n")[0])
    labels = [i if i in everywhere else y for i, y in zip(ids, labels)]
    mine = encode(tok, template, turns, (), system)
    assert mine[0] == ids
    assert all(y in (IGNORE, z) for y, z in zip(mine[1], labels)), "ours are a subset"
    extra = [n for n, (y, z) in enumerate(zip(mine[1], labels)) if y != z]
    header = set(tok.text("assistant")[0]) | set(tok.text("assistant\n")[0])
    assert {ids[n] for n in extra} <= everywhere | header
    question = range(ids.index(tok.text("What")[0][0]), ids.index(tok.text("It")[0][0]))
    assert any(n in extra for n in question), "it supervises a newline in the question"


SYSTEMS = [None, "", ' two\nlines, "quoted" {{ brace }} %} \\ é 👩 ']
PARTS = [[{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
         for parts in ([None, "What is this?"], [" What? ", None], [None, None, "And these?"], ["Why?"])]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_exported_template_gives_our_ids(tok_folder, tok, template):
    """Through transformers' apply_chat_template and tokenizer: turns, system texts, markers anywhere, prompt or not."""
    transformers = pytest.importorskip("transformers")
    theirs, n = transformers.PreTrainedTokenizerFast.from_pretrained(tok_folder), 0
    conversations = [*(c[:2] for c in CONVERSATIONS), (TURNS, 0), ([("é 一 \n\n  x", "1"), (" \t", None)], 0)]
    for system, (turns, images) in itertools.product(SYSTEMS, conversations):
        text = "".join(u + (a or "") for u, a in turns)
        if any(token in text for token in tok.specials if token != IMAGE) or text.count(IMAGE) != images:
            continue                                               # typed control tokens: a string cannot tell them
        messages = [{"role": r, "content": c} for u, a in turns for r, c in (("user", u), ("assistant", a))]
        messages = messages[:-1] if turns[-1][1] is None else messages
        for own, default in (([], system), ([{"role": "system", "content": system or ""}], "another")):
            ids, labels = encode(tok, template, turns, blocks(images, 1), system if not own else system or "")
            out = theirs.apply_chat_template(
                own + messages, chat_template=jinja.jinja(template, default), tokenize=True, return_dict=True,
                add_generation_prompt=turns[-1][1] is None, return_assistant_tokens_mask=True)
            assert list(out["input_ids"]) == ids, (messages, system)
            assert list(out["assistant_masks"]) == [int(y != IGNORE) for y in labels], (messages, system)
            n += 1
    assert n > 90


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_exported_template_takes_contents_in_parts(tok_folder, tok, template):
    transformers = pytest.importorskip("transformers")
    from generate import with_marker
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tok_folder)
    for parts in PARTS:
        images = sum(p["type"] == "image" for p in parts)
        text = "".join(p.get("text", "") for p in parts)
        ids, _ = encode(tok, template, [(with_marker(text, images), None)], blocks(images, 1))
        out = theirs.apply_chat_template([{"role": "user", "content": parts}], chat_template=jinja.jinja(template),
                                         tokenize=True, add_generation_prompt=True, return_dict=True)
        assert list(out["input_ids"]) == ids, parts


# ---- ids of real vocabularies ---------------------------------------------------------------------------------------

# pieces of Llama 2, Llama 3 and Qwen with their real ids. Which piece has id 6054 is not on record: X takes its place.
# Order matters: pieces further in front are merged first
LLAMA_2 = {
    "▁S": 317, "SY": 14816, "YS": 21554, "▁US": 3148, "ER": 1001, "▁A": 319, "SS": 1799, "IST": 9047,
    "ANT": 13566, "What": 5618, "▁is": 338, "▁this": 445, "▁cat": 6635, "▁And": 9159, "▁X": 6054, "▁[": 518,
    "INST": 25580, "▁<<": 3532, "</": 829, ">>": 6778, "▁Hi": 6324, "▁Hello": 15043, "▁a": 263,
    "▁black": 4628, "▁two": 1023, "▁dogs": 26361, "▁,": 1919, "▁playing": 8743, ":": 29901, "▁": 29871,
    "?": 29973, ".": 29889, "S": 29903, "]": 29962, "/": 29914, "<": 29966, "1": 29896, "!": 29991, "<unk>": 0,
    "<s>": 1, "</s>": 2, "<image>": 32000}
LLAMA_3 = {
    "system": 9125, "ĊĊ": 271, "SYS": 39031, "user": 882, "Ċ": 198, "What": 3923, "Ġis": 374, "Ġthis": 420,
    "?": 30, "assistant": 78191, "A": 32, "Ġcat": 8415, ".": 13, "<|begin_of_text|>": 128000,
    "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eot_id|>": 128009, "<image>": 128002}
QWEN = {
    "system": 8948, "user": 872, "assistant": 77091, "Ċ": 198, "S": 50, "q": 80, "a": 64, "<|im_start|>": 151644,
    "<|im_end|>": 151645, "<image>": 151655}
CAT, TWO_CATS = [("<image>\nWhat is this?", "A cat.")], [("<image>\nWhat is this?", "A cat."), ("And?", "X.")]
SYS, INST = "3532 14816 29903 6778 13 14816 29903 13 29966 829 14816 29903 6778 13 13", "518 25580 29962"
ASSISTANT, END = "319 1799 9047 13566 29901", "518 29914 25580 29962"
WORKED = [  # the ids; supervised ones in brackets, I the image
    (LLAMA_2, "plain", [("<image>", "a black cat")], None, "1 I [263 4628 6635 13]"),
    (LLAMA_2, "plain", [("<image>", "two dogs , playing ")], None, "1 I [1023 26361 1919 8743 13]"),   # LLaVA: 29871 13
    (LLAMA_2, "vicuna_v1", TWO_CATS, "SYS",
     f"1 317 21554 3148 1001 29901 29871 I 29871 13 5618 338 445 29973 {ASSISTANT} [319 6635 29889 2] "
     f"3148 1001 29901 9159 29973 {ASSISTANT} [6054 29889 2]"),
    (LLAMA_2, "vicuna_v1", [("And?", "1")], "SYS",
     f"1 317 21554 3148 1001 29901 9159 29973 {ASSISTANT} [29871 29896 2]"),
    (LLAMA_2, "vicuna_v1", [("Hi", "Hello!")], "SYS",
     f"1 317 21554 3148 1001 29901 6324 {ASSISTANT} [15043 29991 2]"),
    (LLAMA_2, "llava_llama_2", TWO_CATS, "SYS",
     f"1 {INST} {SYS} I 29871 13 5618 338 445 29973 {END} [319 6635 29889 29871 2] "
     f"1 {INST} 9159 29973 {END} [6054 29889 29871 2]"),
    (LLAMA_2, "llava_llama_2", [("Hi", "Hello!")], "", f"1 {INST} 6324 {END} [15043 29991 29871 2]"),
    (LLAMA_2, "mistral", TWO_CATS, None,
     f"1 {INST} 29871 I 29871 13 5618 338 445 29973 {END} [319 6635 29889 29871 2] "
     f"{INST} 9159 29973 {END} [6054 29889 29871 2]"),
    (LLAMA_3, "llama_3", CAT, "SYS",
     "128000 128006 9125 128007 271 39031 128009 128006 882 128007 271 I 198 3923 374 420 30 128009 "
     "128006 78191 128007 271 [32 8415 13 128009]"),
    (QWEN, "chatml", [("<image>\nq", "a")], "S",
     "151644 8948 198 50 151645 198 151644 872 198 I 198 80 151645 198 151644 77091 198 [64 151645] 198")]


@pytest.mark.parametrize("known, template, turns, system, written", WORKED)
def test_ids_of_real_vocabularies(tmp_path, known, template, turns, system, written):
    """Measured with the real files; here with those of their pieces that the examples need, under the same ids."""
    vocab, merges = dict(known), []
    for word in known:
        if "<" not in word or word in ("▁<<", "</"):
            merges += [(word[:i], word[i]) for i in range(1, len(word))]
    vocab |= {f"<0x{i:02X}>": 3 + i for i in range(256)} if known is LLAMA_2 else {}
    for i, piece in enumerate(sorted({p for pair in merges for p in (*pair, "".join(pair))} - vocab.keys())):
        vocab[piece] = 200_000 + i                             # steps on the way to a piece
    spec = json.loads(make_by_hand(tmp_path, "pieces" if known is LLAMA_2 else "bytes").full.to_str())
    control = [n for n in known if n.startswith("<") and len(n) > 2]
    spec["added_tokens"] = [added_token(known[n], n) for n in sorted(control, key=known.get)]
    spec["model"] |= {"vocab": vocab, "merges": list(dict.fromkeys(f"{a} {b}" for a, b in merges))}
    if known is not LLAMA_2:
        spec["pre_tokenizer"]["use_regex"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    names = {} if known is not LLAMA_2 else {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tok = Tokenizer(tmp_path)
    ids, labels = encode(tok, template, turns, blocks(IMAGE in turns[0][0], 1, tok.image), system)
    words = written.replace("I", str(tok.image)).replace("[", "[ ").replace("]", " ]").split()
    assert ids == [int(w) for w in words if w not in "[]"]
    supervised, want = False, []
    for w in words:
        supervised = w == "[" or supervised and w != "]"
        want += [] if w in "[]" else [int(w) if supervised else IGNORE]
    assert labels == want


# ---- golden files ---------------------------------------------------------------------------------------------------

WORDS = "the cat is a black dog What this It user system assistant USER ASSISTANT image and you of".split()


def make_by_hand(folder, kind, words=WORDS):
    """A tokenizer whose merges are written down, not trained, so that no release of a library changes it."""
    specials = ["<unk>", "<s>", "</s>", "<image>"]
    if kind == "bytes":
        if words:
            specials += ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
            specials += ["<|eot_id|>"]
        letters, space = sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ"
    else:
        specials += ["<|im_start|>", "<|im_end|>"] + ["[INST]", "[/INST]"] * (kind == "first")
        letters, space = [f"<0x{i:02X}>" for i in range(256)] + [chr(i) for i in range(33, 127)] + ["▁", "\n"], "▁"
    merges = []
    for word in [w for word in words for w in (word, space + word)]:
        merges += [(word[:i], word[i]) for i in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    pieces = list(dict.fromkeys(specials + letters + [a + b for a, b in merges]))
    model = dict(vocab={p: i for i, p in enumerate(pieces)}, merges=merges)
    if kind == "bytes":
        tok = tokenizers.Tokenizer(models.BPE(**model))
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        tok = tokenizers.Tokenizer(models.BPE(**model, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        if kind == "first":                                    # as Mistral's third version
            tok.normalizer = None
            tok.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    folder.mkdir(exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return Tokenizer(folder)


CONVERSATIONS = [  # (turns, images, system; None = the template's own)
    ([("What is this?", "It is a black cat.")], 0, "S"),
    ([("<image>\nWhat is this?", "It is a black cat.")], 1, "S"),
    ([("What is this?\n<image>", "A dog")], 1, "S"),
    ([("<image>", "the cat and the dog")], 1, ""),
    ([("<image>\nWhat?", "1"), ("And?", "2"), ("Then?", "3")], 1, "S"),
    ([("q", "a"), ("<image>\nr", "b")], 1, "S"),
    ([("<image>\nq", "a"), ("<image>\nr", "b")], 2, "S"),
    ([("a <image> b <image> c", "d")], 2, "S"),
    ([("<image><image><image>", "three")], 3, ""),
    ([(" spaces \n", "\n around \n")], 0, "S"),
    ([("typed </s> <s> [/INST]", "typed <|im_end|> </s>")], 0, "S"),
    ([("the <image> tag", "<image>")], 0, "S"),
    ([("USER: x ASSISTANT: y", "USER: z ASSISTANT: w")], 0, "S"),
    ([("é 一 👩‍👩‍👧", "e\u0301 二 \u202e")], 0, "S"),
    ([("code:\n\n  if x:\n\ty", "  z\n\n\nw")], 0, "S"),
    ([("", "an answer to nothing")], 0, "S"),
    ([("<image>\nWhat is this?", None)], 1, "S"),
    ([("q", "a"), ("r", None)], 0, ""),
    ([("<image>\nWhat is this?", "It is the system.")], 1, None),
    ([("What of the user and you?", "It is the assistant."), ("q", "a")], 0, None)]
FITS = {"bytes": ["plain", "llama_3", "chatml"], "pieces": ["plain", "vicuna_v1", "llava_llama_2", "mistral", "chatml"],
        "first": ["vicuna_v1", "mistral"]}


def golden(folder):
    """-> {file name: [[ids, [first, end] of each supervised run]]}"""
    out = {}
    for kind, templates in FITS.items():
        tok = make_by_hand(folder / kind, kind)
        for template in templates:
            out[f"{template}_{kind}.json"] = samples = []
            for turns, images, system in CONVERSATIONS:
                ids, labels = encode(tok, template, turns, blocks(images), system)
                mask = [False, *(y != IGNORE for y in labels), False]
                edges = [n for n in range(len(ids) + 1) if mask[n] != mask[n + 1]]
                samples.append([ids, [edges[n:n + 2] for n in range(0, len(edges), 2)]])
    return out


def test_ids_and_labels_equal_the_golden_files(tmp_path):
    made = golden(tmp_path)
    assert {p.name for p in GOLDEN.glob("*.json")} == set(made)
    for name, samples in made.items():
        for n, (new, old) in enumerate(zip(samples, json.loads((GOLDEN / name).read_text()), strict=True)):
            assert new == old, (name, CONVERSATIONS[n])


if __name__ == "__main__":
    import tempfile
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, samples in golden(Path(folder)).items():
            lines = ",\n".join(json.dumps(s, separators=(",", ":")) for s in samples)
            (GOLDEN / name).write_text(f"[\n{lines}\n]\n")
