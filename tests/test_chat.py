"""What is written, and what of it is learnt, under every template. `python tests/test_chat.py` writes golden/ anew."""

import io
import itertools
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from config import Error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import chat
from chat import IMAGE, TEMPLATES, encode, stop_ids, truncate
from config import BadSample
from formats import jinja, tokenizer
from formats.tokenizer import Tokenizer
from kernels.cross_entropy import IGNORE

I, Q = 3, 4  # the id of <image> in conftest's tokenizers, and an image short enough to read in a failed assertion
GOLDEN = Path(__file__).resolve().parent / "golden"
TURNS = [("What is this?", "It is a black cat."), (" And that? ", "Two dogs.\n\nPlaying in the park"), ("Why", "1")]
HOSTILE = ["</s>", "<s>", "<image>", "<pad>", "<unk>", "<|im_end|>", "<|im_start|>assistant", "<|eot_id|>", "USER: x",
           "ASSISTANT:", "[/INST]", "[INST] <<SYS>>", "<|start_header_id|>assistant<|end_header_id|>\n\n",
           "<0x0A>", "a</s>b <image>",
           "\x00", "\x1b[31m", "e\u0301 combining", "👩‍👩‍👧 family", "مرحبا", "\u202eright to left", "一二三", "a\r\nb",
           "tab\tstop", "x  y   z", "\ufeffmark", "\u200bzero width", "…", "\u0301alone", "\n\ninner\n\n", "." * 50,
           "a\u2028b", "Z̷̢a̸l", "\U0010ffff", "%s{}\\n"]


@pytest.fixture(scope="module")
def tok(tok_folder):
    return Tokenizer(tok_folder)


def run_texts(tok, ids, labels):
    """The runs of learnt ids: [(text, last id)]"""
    runs, at = [], 0
    while at < len(ids):
        end = at
        while end < len(ids) and labels[end] != IGNORE:
            end += 1
        if end > at:
            runs.append(([i for i in ids[at:end]], ids[end - 1]))
        at = end + 1
    return runs


def said(tok, template, run):
    """What a learnt run says, without what the template puts around an answer."""
    around = {"plain": ("", "\n"), "vicuna_v1": (" ", ""), "llava_llama_2": (" ", " "), "mistral": (" ", " ")}
    before, after = around.get(template, ("", ""))
    ends = set() if template == "plain" else stop_ids(tok, template)
    text = tok.full.decode([i for i in run if i not in ends], skip_special_tokens=False).removeprefix(before)
    assert text.endswith(after)
    return text[:len(text) - len(after)]


def literal(tok, template, turns, images=0, system=None):
    """The text of a sample with its control tokens by name and its learnt part in braces."""
    ids, labels = encode(tok, template, turns, images, I, Q, system)
    names, out, at = {v: k for k, v in tok.specials.items()}, "", 0
    while at < len(ids):
        end = at + 1
        if ids[at] in names:
            s = names[ids[at]]
        else:
            while end < len(ids) and ids[end] not in names and (labels[end] == IGNORE) == (labels[at] == IGNORE):
                end += 1
            s = tok.full.decode(ids[at:end], skip_special_tokens=False)
        out += s if labels[at] == IGNORE else "{" + s + "}"
        at = end
    return out.replace("}{", "").replace("<image>" * Q, "<image>")


# ---- what each template writes --------------------------------------------------------------------------------------

TWO = [("<image>\nq", "a"), ("r", "b")]  # the conversation of the literal renderings below


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
def test_a_template_writes_what_its_model_expects_and_learns_what_is_in_braces(bytes_folder, template, written):
    assert literal(Tokenizer(bytes_folder), template, TWO, 1, "S") == written


@pytest.mark.parametrize("template, begin", [
    ("vicuna_v1", "<s>USER: r"), ("llava_llama_2", "<s>[INST] r"), ("mistral", "<s>[INST] r"),
    ("chatml", "<|im_start|>user\nr"), ("llama_3", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nr")])
def test_an_empty_system_text_leaves_no_trace(bytes_folder, template, begin):
    assert literal(Tokenizer(bytes_folder), template, [("r", "b")], system="").startswith(begin)


def test_llama_3_trims_the_system_text_as_its_own_template_does(bytes_folder):
    tok = Tokenizer(bytes_folder)
    assert literal(tok, "llama_3", [("q", "a")], system=" S\n") == literal(tok, "llama_3", [("q", "a")], system="S")


def test_the_default_system_text_is_the_one_that_llava_1_5_was_trained_with(bytes_folder):
    assert literal(Tokenizer(bytes_folder), "vicuna_v1", [("Hi", "Yo")]) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hi ASSISTANT:{ Yo</s>}")


@pytest.mark.parametrize("user, written", [
    ("<image>\nq", "<image>\nq"), ("q\n<image>", "<image>\nq"), ("a <image> b", "<image>\na  b"),
    (" <image> ", "<image>"), ("<image>q", "<image>\nq")])
def test_a_single_marker_moves_to_the_front_of_its_turn_as_in_llava(bytes_folder, user, written):
    assert f"USER: {written} ASSISTANT:" in literal(Tokenizer(bytes_folder), "vicuna_v1", [(user, "x")], 1, "")


def test_several_markers_in_a_turn_stay_where_they_were_written(bytes_folder):
    assert "USER: a <image> b <image><image> ASSISTANT:" in literal(Tokenizer(bytes_folder), "vicuna_v1",
                                                                    [(" a <image> b <image><image>\n", "x")], 3, "")


def test_stage_one_does_not_read_what_the_person_said(tok):
    first = encode(tok, "plain", [("Describe it.\n<image>", "a cat")], 1, I, Q)
    assert first == encode(tok, "plain", [("<image>\nWhat?", "a cat")], 1, I, Q)


# ---- what is learnt -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("template", TEMPLATES)
def test_learnt_runs_say_the_answers_byte_for_byte_and_end_in_the_stop_id(tok, template):
    stops = stop_ids(tok, template)
    for answer in [a for _, a in TURNS] + HOSTILE:
        ids, labels = encode(tok, template, [(f"<image>\n{answer.replace(IMAGE, '')}", answer)], 1, I, Q)
        assert len(ids) == len(labels) and all(y in (i, IGNORE) for i, y in zip(ids, labels))
        (run, last), = run_texts(tok, ids, labels)
        assert last in stops and said(tok, template, run) == answer.strip(), answer


@pytest.mark.parametrize("template", [t for t in TEMPLATES if t != "plain"])  # plain's turns touch: one run
def test_every_turn_is_a_learnt_run_of_its_own(tok, template):
    ids, labels = encode(tok, template, TURNS, 0, I, Q)
    runs = run_texts(tok, ids, labels)
    assert [said(tok, template, run) for run, _ in runs] == [a for _, a in TURNS]
    assert all(last in stop_ids(tok, template) and not stop_ids(tok, template) & set(run[:-1]) for run, last in runs)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_is_an_exact_prefix_of_the_training_ids_for_every_turn(tok, template):
    for answer in ["It is.", "1", "...", "(a)", "é", "一", "\u0301", "\u200b!"]:
        turns = [(f"<image>\n{TURNS[0][0]}", answer), *TURNS[1:]]
        ids, labels = encode(tok, template, turns, 1, I, Q)
        for n, (question, _) in enumerate(turns):
            prompt, learnt = encode(tok, template, [*turns[:n], (question, None)], 1, I, Q)
            assert prompt == ids[:len(prompt)]
            assert n or set(learnt) == {IGNORE}
            assert labels[len(prompt)] == ids[len(prompt)], "the first token after the prompt is learnt"


@pytest.mark.parametrize("turns", range(1, 6))
@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_stands_once_at_the_start_whether_or_not_the_tokenizer_adds_its_own(tok_folder, tmp_path, turns, adds_bos):
    for f in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / f).write_text((tok_folder / f).read_text("utf-8"), "utf-8")
    if adds_bos:
        spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
        bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        one, two = ({"Sequence": {"id": i, "type_id": 0}} for i in "AB")
        spec["post_processor"] = {"type": "TemplateProcessing", "single": [bos, one], "pair": [one, two],
                                  "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 4,
                       "pad_type_id": 0, "pad_token": "<pad>"}
    whole = Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    tok = Tokenizer(tmp_path)                              # as some are saved after training: it cuts and pads nothing
    assert len(whole.full.encode("x").ids) - len(whole.plain.encode("x").ids) == adds_bos
    assert encode(tok, "plain", [("q", "a b c d")], 0, I, Q) == encode(whole, "plain", [("q", "a b c d")], 0, I, Q)
    for template, bos in [("plain", "<s>"), ("vicuna_v1", "<s>"), ("mistral", "<s>"), ("llama_3", "<|begin_of_text|>")]:
        ids, _ = encode(tok, template, [("q", "a")] * turns, 0, I, Q)
        assert ids[0] == tok.id(bos) and ids.count(tok.id(bos)) == 1
    assert encode(tok, "chatml", [("q", "a")] * turns, 0, I, Q)[0].count(tok.id("<s>")) == 0
    ids, _ = encode(tok, "llava_llama_2", [("q", "a")] * turns, 0, I, Q)
    assert ids.count(tok.id("<s>")) == turns, "in LLaVA's form of this template each turn begins with BOS"


@pytest.mark.parametrize("template", TEMPLATES)
def test_control_tokens_cannot_be_typed(tok, template):
    def controls(text):
        ids, _ = encode(tok, template, [(f"<image>\n{text}", text or "x"), (text, text or "x")], 1, I, Q, f"S{text}")
        return Counter(i for i in ids if i in tok.specials.values())
    clean = controls("")
    assert clean[I] == Q
    for text in HOSTILE:
        assert controls(text.replace(IMAGE, "<im age>")) == clean, text
    ids, _ = encode(tok, template, [("<image>", "an <image> tag")], 1, I, Q)
    assert ids.count(I) == Q, "an answer holds no pictures"


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_control_token_that_is_not_flagged_as_one_cannot_be_typed_either(tok_folder, tmp_path, template):
    """What ends a turn, begins a text or names a speaker is known by its role, whatever `special` says."""
    shutil.copytree(tok_folder, tmp_path / "tok")
    spec = json.loads((tok_folder / "tokenizer.json").read_text("utf-8"))
    spec["added_tokens"] = [t | {"special": False} for t in spec["added_tokens"]]
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    test_control_tokens_cannot_be_typed(Tokenizer(tmp_path / "tok"), template)


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_pictures_a_marker_is_text(tok, template):
    ids, _ = encode(tok, template, [("the <image> tag of SVG", "<image>")], 0, I, Q)
    assert I not in ids
    assert template == "plain" or "the <image> tag of SVG" in tok.full.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("images", range(4))
@pytest.mark.parametrize("markers", range(4))
def test_as_many_markers_as_images_or_the_sample_is_refused_with_both_counts(bytes_folder, images, markers):
    import data
    row = {"image": [f"{i}.png" for i in range(images)], "conversations": [
        {"from": "human", "value": "<image>\n" * markers + "q"}, {"from": "gpt", "value": "a"}]}
    for template in TEMPLATES:
        encoder = data.Encoder(Tokenizer(bytes_folder), template, I, Q, 500)
        if images == markers:
            ids, labels, names, _ = encoder(row)
            assert ids.count(I) == images * Q and len(names) == images
            assert {y for i, y in zip(ids, labels) if i == I} <= {IGNORE}, "an image position is never learnt"
        else:
            count = 1 if images == 0 else markers  # without images, turns that begin or end with a marker are counted
            with pytest.raises(BadSample, match=rf"{images} image\(s\) but {count} marker\(s\)"):
                encoder(row)


def test_an_answer_that_melts_into_its_prompt_is_refused_not_learnt_in_part(tmp_path):
    tok = by_hand(tmp_path, "pieces", ["\nT"])  # knows a token for newline and T; chatml's prompt ends in the newline
    encode(tok, "chatml", [("q", "the")], 0, I, Q)
    with pytest.raises(BadSample, match="reaches back into its prompt"):
        encode(tok, "chatml", [("q", "The")], 0, I, Q)


# ---- truncation -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("turns, images", [
    ([("<image>\nWhat?", "A cat."), ("And?", "A dog.")], 1), ([("<image><image>", "x"), ("a<image>b", "y")], 3),
    ([("q", "a"), ("<image>", "b")], 1), ([("q", "a")], 0), ([("<image>" * 3, "touching")], 3)])
def test_no_length_cuts_an_image_in_two(tok, turns, images):
    for template in TEMPLATES:
        whole = encode(tok, template, turns, images, I, Q)
        for n in range(len(whole[0]) + 2):
            ids, labels, kept = truncate(*whole, I, Q, n)
            assert len(ids) == len(labels) <= n and ids == whole[0][:len(ids)] and labels == whole[1][:len(ids)]
            assert ids.count(I) == kept * Q and kept <= images
            assert len(ids) > n - Q or len(ids) == len(whole[0]), "no more is lost than the part of one image"


# ---- tokenizers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("template", TEMPLATES)
def test_the_stop_id_is_what_ends_a_learnt_turn(tok, template):
    stops = stop_ids(tok, template)
    ids, labels = encode(tok, template, [("q", "a")], 0, I, Q)
    assert [y for y in labels if y != IGNORE][-1] in stops
    assert template == "plain" or len(stops) == 1


@pytest.mark.parametrize("file, text, message", [
    ("tokenizer.json", None, "holds no tokenizer.json and no tokenizer.model"),
    ("tokenizer.json", "", "tokenizer.json: Expecting value"), ("tokenizer.json", "{}", "cannot be read"),
    ("tokenizer.json", "[1]", "is not a json object"), ("tokenizer_config.json", "{", "config.json: Expecting"),
    ("tokenizer_config.json", '{"eos_token": "<nope>"}', "no token '<nope>'"),
    ("tokenizer_config.json", '{"eos_token": 2}', "no token 2"),
    ("tokenizer_config.json", '{"eos_token": {"id": 2}}', "no token None")])
def test_a_broken_tokenizer_stops_with_one_line(bytes_folder, tmp_path, file, text, message):
    for f in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / f).write_text((bytes_folder / f).read_text("utf-8"), "utf-8")
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(Error, match=message) as e:
        Tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def test_a_template_that_the_tokenizer_cannot_write_stops_with_the_missing_token(bytes_folder, tmp_path):
    tok = by_hand(tmp_path, "bytes", [])
    for template, message in [("llama_3", r"no token '<\|begin_of_text\|>'"), ("nope", "unknown template 'nope': one")]:
        with pytest.raises(Error, match=message):
            encode(tok, template, [("q", "a")], 0, I, Q)
    tok.bos = None
    with pytest.raises(Error, match="needs a BOS and an EOS token"):
        encode(tok, "vicuna_v1", [("q", "a")], 0, I, Q)


def test_a_lone_surrogate_is_a_bad_sample(tok):
    for turns, system in [([("\ud800", "a")], None), ([("q", "\udfff")], None), ([("q", "a")], "\ud800")]:
        with pytest.raises(BadSample, match="surrogate"):
            encode(tok, "vicuna_v1", turns, 0, I, Q, system)


@pytest.mark.parametrize("text", ["a" * 1_000_000, "a\u0301" * 100_000, "<image>" * 100_000, "\n" * 100_000 + "x"])
def test_a_megabyte_is_tokenised_in_time_that_grows_with_its_length(tok, text):
    import time
    began = time.process_time()
    encode(tok, "vicuna_v1", [(text, "a")], 0, I, Q)
    assert time.process_time() - began < 200  # a quadratic path takes hours; the linear one needs about a second


def test_ten_thousand_turns_take_time_that_grows_with_their_number(tok):
    import time
    began = time.process_time()
    for template in TEMPLATES:
        encode(tok, template, [("q", "a")] * 10_000, 0, I, Q)
    assert time.process_time() - began < 200


def test_the_mask_is_shown_in_colours(bytes_folder):
    tok, out = Tokenizer(bytes_folder), io.StringIO()
    chat.show(tok, *encode(tok, "vicuna_v1", [("<image>\nq", "a")], 1, I, Q, ""), I, out)
    grey, green = "\033[90m{}\033[0m".format, "\033[32m{}\033[0m".format
    assert out.getvalue() == (grey("<s>") + grey("USER: ") + grey("[4 x image]") + grey("\nq ASSISTANT:")
                              + green(" a") + green("</s>") + "\n")


# ---- others' rules --------------------------------------------------------------------------------------------------

def llava_text(template, turns, system):
    """The string that LLaVA renders; a turn's picture moves to its front, as in its preprocess_multimodal."""
    said = [(f"{IMAGE}\n{u.replace(IMAGE, '').strip()}".strip() if IMAGE in u else u, a) for u, a in turns]
    if template == "vicuna_v1":
        return system + " " + "".join(f"USER: {u} ASSISTANT: {a}</s>" for u, a in said)
    first = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    between = "<s>" if template == "llava_llama_2" else ""
    return between.join(f"[INST] {first * (i == 0)}{u} [/INST] {a} </s>" for i, (u, a) in enumerate(said))


def llava_rounds(full, template, turns, system):
    """LLaVA's rule for templates that end a turn in </s>: tokenise the pieces around the images, split the text into
    rounds and each round at its separator, tokenise these again and count. A count that does not come out even masks
    the whole sample, with no more than a printed warning; so does a round with two separators."""
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
        unlearnt = len(tokenise(part.split(sep)[0] + sep)) - 2       # BOS, and the space that ends the separator
        labels[at:at + unlearnt] = [IGNORE] * unlearnt
        at += len(tokenise(part))
    return ids, labels if at == len(ids) else [IGNORE] * len(ids)


ROUNDS = ["vicuna_v1", "llava_llama_2", "mistral"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    from conftest import make_tokenizer
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("pieces"), "pieces"))


@pytest.mark.parametrize("template", ROUNDS)
def test_labels_equal_those_of_llavas_round_splitting_where_that_is_right(pieces, template):
    from conftest import WORDS
    rng = random.Random(0)
    words = [w for w in WORDS.split() if w not in ("USER:", "ASSISTANT:", "[INST]", "[/INST]", "<<SYS>>")]
    words += ["1", "é", "(x)", "…", "a\nb", "a  b"]
    for n in range(200):
        turns = [(" ".join(rng.choices(words, k=rng.randint(1, 8))), " ".join(rng.choices(words, k=rng.randint(1, 8))))
                 for _ in range(rng.randint(1, 3))]
        images = rng.randint(0, 1)
        if images:
            turns[0] = (rng.choice(["<image>\n{}", "{}\n<image>"]).format(turns[0][0]), turns[0][1])
        system = rng.choice(["SYS", TEMPLATES["vicuna_v1"].system])
        theirs = llava_rounds(pieces.full, template, turns, system)
        assert encode(pieces, template, turns, images, I, 1, system) == theirs, turns
        assert set(theirs[1]) != {IGNORE}


def test_stage_one_learns_what_llava_learns(pieces):
    """Its preprocess_plain: the picture, the caption, a newline; all but the picture is learnt, no EOS is written."""
    for caption in ("a black cat", "Two dogs, playing", "é 一", "1"):
        ids = [1, I, *pieces.full.encode(caption + "\n", add_special_tokens=False).ids]
        mine = encode(pieces, "plain", [("Describe it.\n<image>", caption)], 1, I, 1)
        assert mine == (ids, [IGNORE, IGNORE, *ids[2:]])


@pytest.mark.parametrize("template", ROUNDS)
def test_where_llavas_round_splitting_is_wrong_ours_still_learns_the_answers(pieces, tmp_path, template):
    """A separator or </s> in what was said, and a tokenizer that adds its first space only once (`legacy: false`):
    LLaVA drops the sample, or learns a part of the question."""
    sep = " ASSISTANT: " if template == "vicuna_v1" else "[/INST] "
    for turns in ([(f"What does{sep}mean", "the end")], [("What", f"It says{sep}x")], [("What", "It is </s> here")],
                  [("A </s> tag", "It ends")]):
        ids, labels = encode(pieces, template, turns, 0, I, 1, "S")
        (run, last), = run_texts(pieces, ids, labels)
        assert said(pieces, template, run) == turns[0][1] and last == pieces.eos
        theirs = llava_rounds(pieces.full, template, turns, "S")
        assert theirs[1] != labels and {y for y in theirs[1][:-1] if y != IGNORE} != {y for y in labels if y != IGNORE}
    once = by_hand(tmp_path / "first", "first")
    two = [("What is this", "the cat"), ("What", "a dog")]
    if template == "vicuna_v1":                                # the others' rounds begin with a control token here
        assert set(llava_rounds(once.full, template, two, "S")[1]) == {IGNORE}, "every sample of several turns"
    ids, labels = encode(once, template, two, 0, I, 1, "S")
    assert [said(once, template, run) for run, _ in run_texts(once, ids, labels)] == ["the cat", "a dog"]


@pytest.mark.parametrize("template", ["llama_3", "chatml"])
def test_llava_next_learns_more_than_the_model_has_to_say(bytes_folder, template):
    """Its rule turn by turn: an assistant's block whole, its header too, and then every control token and newline
    anywhere, the user's among them. The ids are ours, our labels a part of its; what it has more is of that kind."""
    tok = Tokenizer(bytes_folder)

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
    mine = encode(tok, template, turns, 0, I, 1, system)
    assert mine[0] == ids
    assert all(y in (IGNORE, z) for y, z in zip(mine[1], labels)), "we learn nothing that it does not"
    more = [n for n, (y, z) in enumerate(zip(mine[1], labels)) if y != z]
    header = set(tok.text("assistant")[0]) | set(tok.text("assistant\n")[0])
    assert {ids[n] for n in more} <= everywhere | header
    question = range(ids.index(tok.text("What")[0][0]), ids.index(tok.text("It")[0][0]))
    assert any(n in more for n in question), "a newline in the question is learnt"


JINJA = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
              "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
              "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}",
    "llama_3": "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
               "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|eot_id|>{% endgeneration %}"
               "{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"}


@pytest.mark.parametrize("template", JINJA)
def test_ids_and_mask_equal_those_of_the_jinja_template_in_transformers(bytes_folder, template):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(bytes_folder)
    tok, rng = Tokenizer(bytes_folder), random.Random(1)
    words = ["cat", "Two dogs,", "1", "é", "(x)", "…", "a\nb", "a  b", "👩‍👩‍👧", "!"]
    say = lambda: " ".join(rng.choices(words, k=rng.randint(1, 6)))  # noqa: E731
    for n in range(100):
        turns = [(say(), say()) for _ in range(rng.randint(1, 4))]
        messages = [{"role": "system", "content": "Sys."}]
        for user, answer in turns:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        out = theirs.apply_chat_template(messages, chat_template=JINJA[template], tokenize=True, return_dict=True,
                                         return_assistant_tokens_mask=True)
        ids, labels = encode(tok, template, turns, 0, I, Q, "Sys.")
        assert ids == list(out["input_ids"])
        assert [int(y != IGNORE) for y in labels] == list(out["assistant_masks"])


SYSTEMS = [None, "", "S", " two\nlines ", 'a "quoted" {{ brace }} %} \\ é 👩']
PARTS = [[{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
         for parts in ([None, "What is this?"], [" What? ", None], [None, None, "And these?"], ["Why?"])]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_exported_template_renders_the_ids_of_our_own_prompt(tok_folder, template):
    """Through transformers' apply_chat_template and tokenizer: turns, systems, markers anywhere, prompt or not."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tok_folder)
    tok, n = Tokenizer(tok_folder), 0
    talks = [*(c[:2] for c in CONVERSATIONS), (TURNS, 0), ([("é 一 \n\n  x", "1"), (" \t", None)], 0)]
    for system, (turns, images) in itertools.product(SYSTEMS, talks):
        said = "".join(u + (a or "") for u, a in turns)
        if any(token in said for token in tok.specials if token != IMAGE) or said.count(IMAGE) != images:
            continue                                               # typed control tokens: what only our ids can tell
        messages = [{"role": r, "content": c} for u, a in turns for r, c in (("user", u), ("assistant", a))]
        messages = messages[:-1] if turns[-1][1] is None else messages
        for there, baked in (([], system), ([{"role": "system", "content": system or ""}], "another")):
            ids, labels = encode(tok, template, turns, images, I, 1, system if not there else system or "")
            out = theirs.apply_chat_template(there + messages, chat_template=jinja.jinja(template, baked), tokenize=True,
                                             add_generation_prompt=turns[-1][1] is None, return_dict=True,
                                             return_assistant_tokens_mask=True)
            assert list(out["input_ids"]) == ids, (messages, system)
            assert list(out["assistant_masks"]) == [int(y != IGNORE) for y in labels], (messages, system)
            n += 1
    assert n > 100


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_exported_template_takes_contents_in_parts(tok_folder, template):
    transformers = pytest.importorskip("transformers")
    from generate import with_marker
    theirs, tok = transformers.PreTrainedTokenizerFast.from_pretrained(tok_folder), Tokenizer(tok_folder)
    for parts in PARTS:
        images = sum(p["type"] == "image" for p in parts)
        text = "".join(p.get("text", "") for p in parts)
        ids, _ = encode(tok, template, [(with_marker(text, images), None)], images, I, 1)
        out = theirs.apply_chat_template([{"role": "user", "content": parts}], chat_template=jinja.jinja(template),
                                         tokenize=True, add_generation_prompt=True, return_dict=True)
        assert list(out["input_ids"]) == ids, parts


# ---- ids of real vocabularies ---------------------------------------------------------------------------------------

# pieces of the vocabularies of Llama 2 and Llama 3 with their real ids, and of Qwen with its published ones. What
# stands behind 6054 is not on record: X takes its place. Order matters: pieces further in front are joined first
LLAMA_2 = {
    "▁S": 317, "SY": 14816, "YS": 21554, "▁US": 3148, "ER": 1001, "▁A": 319, "SS": 1799, "IST": 9047, "ANT": 13566,
    "What": 5618, "▁is": 338, "▁this": 445, "▁cat": 6635, "▁And": 9159, "▁X": 6054, "▁[": 518, "INST": 25580,
    "▁<<": 3532, "</": 829, ">>": 6778, "▁Hi": 6324, "▁Hello": 15043, "▁a": 263, "▁black": 4628, "▁two": 1023,
    "▁dogs": 26361, "▁,": 1919, "▁playing": 8743, ":": 29901, "▁": 29871, "?": 29973, ".": 29889, "S": 29903,
    "]": 29962, "/": 29914, "<": 29966, "1": 29896, "!": 29991, "<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000}
LLAMA_3 = {
    "system": 9125, "ĊĊ": 271, "SYS": 39031, "user": 882, "Ċ": 198, "What": 3923, "Ġis": 374, "Ġthis": 420, "?": 30,
    "assistant": 78191, "A": 32, "Ġcat": 8415, ".": 13, "<|begin_of_text|>": 128000, "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007, "<|eot_id|>": 128009, "<image>": 128002}
QWEN = {
    "system": 8948, "user": 872, "assistant": 77091, "Ċ": 198, "S": 50, "q": 80, "a": 64, "<|im_start|>": 151644,
    "<|im_end|>": 151645, "<image>": 151655}
CAT, TWO_CATS = [("<image>\nWhat is this?", "A cat.")], [("<image>\nWhat is this?", "A cat."), ("And?", "X.")]
SYS, INST = "3532 14816 29903 6778 13 14816 29903 13 29966 829 14816 29903 6778 13 13", "518 25580 29962"
ASSISTANT, END = "319 1799 9047 13566 29901", "518 29914 25580 29962"
WORKED = [  # the ids, what is learnt in brackets, I the picture
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
def test_the_ids_are_those_of_the_real_vocabularies(tmp_path, known, template, turns, system, written):
    """Measured with the real files; here with as much of them as the examples need, under the same ids."""
    vocab, merges = dict(known), []
    for word in known:
        if "<" not in word or word in ("▁<<", "</"):
            merges += [(word[:i], word[i]) for i in range(1, len(word))]
    vocab |= {f"<0x{i:02X}>": 3 + i for i in range(256)} if known is LLAMA_2 else {}
    for i, piece in enumerate(sorted({p for pair in merges for p in (*pair, "".join(pair))} - vocab.keys())):
        vocab[piece] = 200_000 + i                             # steps on the way to a piece
    spec = json.loads(by_hand(tmp_path, "pieces" if known is LLAMA_2 else "bytes").full.to_str())
    control = [n for n in known if n.startswith("<") and len(n) > 2]
    spec["added_tokens"] = [tokenizer.added(known[n], n) for n in sorted(control, key=known.get)]
    spec["model"] |= {"vocab": vocab, "merges": list(dict.fromkeys(f"{a} {b}" for a, b in merges))}
    if known is not LLAMA_2:
        spec["pre_tokenizer"]["use_regex"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    names = {} if known is not LLAMA_2 else {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tok = Tokenizer(tmp_path)
    ids, labels = encode(tok, template, turns, IMAGE in turns[0][0], tok.image, 1, system)
    words = written.replace("I", str(tok.image)).replace("[", "[ ").replace("]", " ]").split()
    assert ids == [int(w) for w in words if w not in "[]"]
    learnt, want = False, []
    for w in words:
        learnt = w == "[" or learnt and w != "]"
        want += [] if w in "[]" else [int(w) if learnt else IGNORE]
    assert labels == want


# ---- golden files ---------------------------------------------------------------------------------------------------

WORDS = "the cat is a black dog What this It user system assistant USER ASSISTANT image and you of".split()


def by_hand(folder, kind, words=WORDS):
    """A tokenizer whose merges are written down, not trained, so that no release of a library changes it."""
    from tokenizers import AddedToken, Tokenizer as HF, decoders, models, normalizers, pre_tokenizers
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
        tok = HF(models.BPE(**model))
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        tok = HF(models.BPE(**model, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
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
    """-> {file name: [[ids, spans that are learnt]]}"""
    out = {}
    for kind, templates in FITS.items():
        tok = by_hand(folder / kind, kind)
        for template in templates:
            out[f"{template}_{kind}.json"] = samples = []
            for turns, images, system in CONVERSATIONS:
                ids, labels = encode(tok, template, turns, images, I, Q, system)
                learnt = [False, *(y != IGNORE for y in labels), False]
                edges = [n for n in range(len(ids) + 1) if learnt[n] != learnt[n + 1]]
                samples.append([ids, [edges[n:n + 2] for n in range(0, len(edges), 2)]])
    return out


def test_ids_and_labels_of_twenty_conversations_are_those_on_file(tmp_path):
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
