"""Random conversations: what holds for every one of them. PUMICE_FUZZ=N tries N of each instead of 80."""

import os
import pickle
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

pytest.importorskip("hypothesis")
from conftest import TEMPLATES, blocks, make_tokenizer
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from hypothesis.internal.conjecture import providers
from test_chat import HOSTILE, I, Q, answer_of, supervised_runs

from chat import IMAGE, encode, stop_ids, truncate
from formats.jinja import BEGIN, END, jinja
from formats.tokenizer import Tokenizer
from kernels.cross_entropy import IGNORE

# hypothesis also tries literals of our modules: only of those already imported, or any edit would change all examples
providers._get_local_constants = lambda: providers._local_constants
N = int(os.environ.get("PUMICE_FUZZ", 80))
fuzz = settings(max_examples=N, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@cache
def tokenizer(kind):
    return Tokenizer(make_tokenizer(Path(mkdtemp()) / kind, kind))


@cache
def pickled(tok):
    return pickle.loads(pickle.dumps(tok))


# U+2581 is SentencePiece's spelling of a space: no Llama tokenizer can tell the two apart
free = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30)
words = st.sampled_from([" ", "\n", "user", "assistant", "It is a cat."])
text = st.lists(free | st.sampled_from(HOSTILE) | words, max_size=4).map("".join)
harmless = st.lists(free | words, max_size=4).map("".join)
answer = text.filter(str.strip)


@st.composite
def conversation(draw, text=text):
    """-> tokenizer, template, turns with their markers, number of images, system text"""
    turns = draw(st.lists(st.tuples(text, text.filter(str.strip)), min_size=1, max_size=6))
    images = draw(st.integers(0, 4))
    if images:  # a typed marker would stand for an image: markers are inserted on purpose only
        turns = [(user.replace(IMAGE, ""), answer) for user, answer in turns]
        for _ in range(images):
            n = draw(st.integers(0, len(turns) - 1))
            pieces = turns[n][0].split(IMAGE)  # not into the middle of another marker
            at = draw(st.integers(0, len(pieces) - 1))
            cut = draw(st.integers(0, len(pieces[at])))
            pieces[at] = pieces[at][:cut] + IMAGE + pieces[at][cut:]
            turns[n] = (IMAGE.join(pieces), turns[n][1])
        assume(sum(user.count(IMAGE) for user, _ in turns) == images)  # letters around it may have formed one more
    tok = tokenizer(draw(st.sampled_from(["bytes", "pieces"])))
    return tok, draw(st.sampled_from(list(TEMPLATES))), turns, images, draw(st.none() | text)


def controls(tok, ids):
    return [i for i in ids if i in tok.specials.values()]


@fuzz
@given(conversation(), answer, st.integers(0, 5), st.integers(1, 400))
def test_ids_labels_prompts_and_cuts(c, other, n, max_len):
    tok, template, turns, images, system = c
    n %= len(turns)

    def encoded(turns, images=images, system=system, tok=tok):
        return encode(tok, template, turns, blocks(images), system)

    ids, labels = encoded(turns)
    assert len(ids) == len(labels) and all(y in (IGNORE, i) for i, y in zip(ids, labels))
    assert not {I, tok.id("<pad>")} & set(labels), "neither images nor padding are supervised"
    assert ids.count(I) == images * Q
    assert encoded(turns, tok=pickled(tok)) == (ids, labels), "the same in a loader's process"
    clean = [(IMAGE * user.count(IMAGE) if images else "", "x") for user, _ in turns]
    assert controls(tok, ids) == controls(tok, encoded(clean, system=system and "x")[0]), "none was typed"
    check_runs(tok, template, turns, system, ids, labels)
    check_prompt(template, turns, images, encoded, n, ids, labels)
    check_cut(ids, labels, max_len)
    if template != "plain":                                    # its turns are one text
        changed = supervised_runs(*encoded([(u, other if k == n else a) for k, (u, a) in enumerate(turns)]))
        runs = supervised_runs(ids, labels)
        assert runs[:n] + runs[n + 1:] == changed[:n] + changed[n + 1:], "another answer changes no other run"


def check_runs(tok, template, turns, system, ids, labels):
    runs, stops = supervised_runs(ids, labels), stop_ids(tok, template)
    if template == "plain":
        assert len(turns) > 1 or answer_of(tok, template, runs[0]) == turns[0][1].strip()
        return
    assert [answer_of(tok, template, run) for run in runs] == [a.strip() for _, a in turns]
    assert all(run[-1] in stops for run in runs)
    unsupervised = len(turns) + bool(TEMPLATES[template].system if system is None else system)
    assert sum(i in stops for i in ids) == len(turns) + (unsupervised if template in ("llama_3", "chatml") else 0)


def check_prompt(template, turns, images, encoded, n, ids, labels):
    """A prompt is a prefix of the sample, and a new turn changes nothing before it."""
    before, user = turns[:n], turns[n][0]
    shown = sum(u.count(IMAGE) for u in (*(u for u, _ in before), user)) if images else 0
    prompt, _ = encoded([*before, (user, None)], shown)
    assert ids[:len(prompt)] == prompt and len(ids) > len(prompt)
    longer, longer_labels = encoded([*turns, ("and?", "yes")])
    end = len(ids) - (template == "plain")                     # its turns share a text, which ends in a newline
    assert longer[:end] == ids[:end] and longer_labels[:end] == labels[:end]


def check_cut(ids, labels, max_len):
    """A truncated sample is a prefix with whole images."""
    short, short_labels, kept = truncate(ids, labels, blocks(ids.count(I) // Q), I, max_len)
    assert len(short) <= max_len and (short, short_labels) == (ids[:len(short)], labels[:len(short)])
    shown = "".join("i" if i == I else "." for i in short).replace("i" * Q, "I")
    assert "i" not in shown and shown.count("I") == kept


# as their publishers write them, with the tags of which transformers makes its mask
JINJA = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
              "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
              "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}",
    "llama_3": "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
               "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|eot_id|>{% endgeneration %}"
               "{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"}


@cache
def compiled(template):
    jinja2 = pytest.importorskip("jinja2")
    source = jinja(template).replace(BEGIN, "").replace(END, "")
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)


@cache
def hf_tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer("bytes").folder)


@fuzz
@given(conversation(harmless), st.sampled_from(list(JINJA)))
def test_jinja_templates_give_the_same_ids(c, published):
    """Ours, and two as published. For texts without control tokens: in rendered text typed and real ones look alike."""
    tok, template, turns, images, system = c
    typed = [answer for _, answer in turns] + [system or ""]
    typed += [user.replace(IMAGE, "") if images else user for user, _ in turns]
    assume(not any(control in text for control in tok.specials for text in typed))
    ids, _ = encode(tok, template, turns, blocks(images), system)
    messages = [{"role": "system", "content": system}] * (system is not None) + in_messages(turns)
    rendered = compiled(template).render(messages=messages, bos_token="<s>", eos_token="</s>")
    theirs = tok.full.encode(rendered, add_special_tokens=False).ids
    assert [i for t in theirs for i in [t] * (Q if t == I else 1)] == ids

    turns = [(user.replace(IMAGE, "").strip(), answer.strip()) for user, answer in turns]     # they strip nothing
    messages = [{"role": "system", "content": "Sys."}] + in_messages(turns)
    out = hf_tokenizer().apply_chat_template(messages, chat_template=JINJA[published], tokenize=True,
                                             return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = encode(tokenizer("bytes"), published, turns, (), "Sys.")
    assert ids == list(out["input_ids"]) and [int(y != IGNORE) for y in labels] == list(out["assistant_masks"])


def in_messages(turns):
    return [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
