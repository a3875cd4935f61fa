"""Conversations at random: what holds for every one of them; and whatever else people hand in, as files, names, bytes
of pictures and settings. PUMICE_FUZZ=N tries N of each instead of 200."""

import dataclasses
import io
import json
import multiprocessing
import os
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from config import Error

pytest.importorskip("hypothesis")
from conftest import make_tokenizer
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from hypothesis.internal.conjecture import providers
from PIL import Image
from test_chat import HOSTILE, JINJA, I, Q, run_texts, said

import config
import data
import images
from chat import IMAGE, TEMPLATES, encode, stop_ids, truncate
from config import BadSample
from formats import strict_json
from formats.jinja import jinja
from formats.rows import Rows
from formats.tokenizer import Tokenizer
from kernels.cross_entropy import IGNORE

# literals of our modules are tried as well: those that are imported, so that any edit would make all examples other ones
providers._get_local_constants = lambda: providers._local_constants
N = int(os.environ.get("PUMICE_FUZZ", 200))
fuzz = settings(max_examples=N, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@cache
def tokenizer(kind):
    return Tokenizer(make_tokenizer(Path(mkdtemp()) / kind, kind))


# U+2581 is how SentencePiece spells a space: no Llama tokenizer can tell the two apart
free = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30)
words = st.sampled_from([" ", "\n", "user", "assistant", "It is a cat."])
text = st.lists(free | st.sampled_from(HOSTILE) | words, max_size=4).map("".join)
answer = text.filter(str.strip)


@st.composite
def conversation(draw, text=text):
    """-> tokenizer, template, turns with their markers, number of images, system text"""
    said = draw(st.lists(st.tuples(text, text.filter(str.strip)), min_size=1, max_size=6))
    images = draw(st.integers(0, 4))
    if images:  # typed markers would be pictures here: they are written on purpose only
        said = [(user.replace(IMAGE, ""), answer) for user, answer in said]
        for _ in range(images):
            n = draw(st.integers(0, len(said) - 1))
            at = draw(st.integers(0, len(said[n][0])))
            pieces = said[n][0].split(IMAGE)  # not into the middle of another marker
            at = draw(st.integers(0, len(pieces) - 1))
            cut = draw(st.integers(0, len(pieces[at])))
            pieces[at] = pieces[at][:cut] + IMAGE + pieces[at][cut:]
            said[n] = (IMAGE.join(pieces), said[n][1])
        assume(sum(user.count(IMAGE) for user, _ in said) == images)  # letters around it may have formed one more
    tok = tokenizer(draw(st.sampled_from(["bytes", "pieces"])))
    return tok, draw(st.sampled_from(list(TEMPLATES))), said, images, draw(st.none() | text)


def controls(tok, ids):
    return [i for i in ids if i in tok.specials.values()]


@fuzz
@given(conversation())
def test_ids_and_labels(c):
    tok, template, turns, images, system = c
    ids, labels = encode(tok, template, turns, images, I, Q, system)
    assert len(ids) == len(labels)
    assert all(y in (IGNORE, i) for i, y in zip(ids, labels))
    assert not {I, tok.id("<pad>")} & set(labels), "neither images nor padding are learnt"
    assert ids.count(I) == images * Q
    assert encode(tok, template, turns, images, I, Q, system) == (ids, labels), "the same every time"
    clean = [(IMAGE * user.count(IMAGE) if images else "", "x") for user, _ in turns]
    inserted, _ = encode(tok, template, clean, images, I, Q, system and "x")
    assert controls(tok, ids) == controls(tok, inserted), "none was typed"
    runs = run_texts(tok, ids, labels)
    if template == "plain":
        if len(turns) == 1:
            assert said(tok, template, runs[0][0]) == turns[0][1].strip()
    else:
        stops = stop_ids(tok, template)
        assert [said(tok, template, run) for run, _ in runs] == [a.strip() for _, a in turns]
        assert all(last in stops for _, last in runs)
        people = len(turns) + bool(TEMPLATES[template].system if system is None else system)
        ends = len(turns) + (people if template in ("llama_3", "chatml") else 0)
        assert sum(i in stops for i in ids) == ends


@fuzz
@given(conversation(), st.integers(1, 400))
def test_a_cut_sample_is_a_prefix_with_whole_images(c, max_len):
    tok, template, turns, images, system = c
    whole = encode(tok, template, turns, images, I, Q, system)
    ids, labels, kept = truncate(*whole, I, Q, max_len)
    assert len(ids) <= max_len and (ids, labels) == (whole[0][:len(ids)], whole[1][:len(ids)])
    assert ids.count(I) == kept * Q and kept <= images
    blocks = "".join("i" if i == I else "." for i in ids).replace("i" * Q, "I")
    assert "i" not in blocks and blocks.count("I") == kept


@fuzz
@given(conversation(), st.integers(0, 5))
def test_any_prompt_is_a_prefix_and_a_new_turn_changes_nothing_before_it(c, n):
    tok, template, turns, images, system = c
    ids, labels = encode(tok, template, turns, images, I, Q, system)
    *before, (user, _) = turns[:1 + n % len(turns)]
    shown = sum(u.count(IMAGE) for u in (*(u for u, _ in before), user)) if images else 0
    prompt, _ = encode(tok, template, [*before, (user, None)], shown, I, Q, system)
    assert ids[:len(prompt)] == prompt and len(ids) > len(prompt)
    longer, learnt = encode(tok, template, [*turns, ("and?", "yes")], images, I, Q, system)
    if template == "plain":  # its turns share a text, which ends in a newline
        ids, labels = ids[:-1], labels[:-1]
    assert longer[:len(ids)] == ids and learnt[:len(labels)] == labels


@fuzz
@given(conversation(st.lists(free | words, max_size=4).map("".join)))
def test_the_exported_template_writes_the_same_ids(c):
    """Of texts in which nobody typed a control token: rendered, it could not be told from a meant one."""
    jinja2 = pytest.importorskip("jinja2")
    tok, template, turns, images, system = c
    typed = [answer for _, answer in turns] + [system or ""]
    typed += [user.replace(IMAGE, "") if images else user for user, _ in turns]
    assume(not any(control in text for control in tok.specials for text in typed))
    ids, _ = encode(tok, template, turns, images, I, Q, system)
    said = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
    talk = jinja(template, system).replace("{% generation %}", "").replace("{% endgeneration %}", "")
    rendered = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(talk).render(
        messages=said, bos_token="<s>", eos_token="</s>", add_generation_prompt=False)
    theirs = tok.full.encode(rendered, add_special_tokens=False).ids
    assert [i for t in theirs for i in [t] * (Q if t == I else 1)] == ids


@cache
def theirs():
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer("bytes").folder)


@fuzz
@given(conversation(st.lists(free | words, max_size=4).map("".join)), st.sampled_from(list(JINJA)))
def test_ids_and_mask_are_those_of_transformers_where_a_template_marks_its_answers(c, template):
    _, _, turns, _, system = c
    tok, system = tokenizer("bytes"), (system or "").strip() or "Sys."
    turns = [(user.replace(IMAGE, "").strip(), answer.strip()) for user, answer in turns]
    assume(not any(control in text for control in tok.specials for turn in [*turns, [system]] for text in turn))
    said = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
    out = theirs().apply_chat_template([{"role": "system", "content": system}, *said], chat_template=JINJA[template],
                                       tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = encode(tok, template, turns, 0, I, Q, system)
    assert ids == list(out["input_ids"]) and [int(y != IGNORE) for y in labels] == list(out["assistant_masks"])


@fuzz
@given(conversation(), answer, st.data())
def test_changing_an_answer_changes_no_label_before_or_after_it(c, other, draw):
    tok, template, turns, images, system = c
    assume(template != "plain")
    k = draw.draw(st.integers(0, len(turns) - 1))
    changed = [(u, other if n == k else a) for n, (u, a) in enumerate(turns)]
    runs = [run_texts(tok, *encode(tok, template, t, images, I, Q, system)) for t in (turns, changed)]
    assert [r for n, r in enumerate(runs[0]) if n != k] == [r for n, r in enumerate(runs[1]) if n != k]


@fuzz
@given(st.lists(conversation(), min_size=1, max_size=5))
def test_packed_and_unpacked_they_are_the_same(several):
    made = [(*encode(tok, template, turns, images, I, Q, system), torch.full((images, 3, 1, 1), n, dtype=torch.uint8))
            for n, (tok, template, turns, images, system) in enumerate(several)]
    b, at, image = data.pack(made, 1), 0, 0
    for ids, labels, images in made:
        n = len(ids)
        assert b.ids[at:at + n].tolist() == ids and b.labels[at:at + n].tolist() == [*labels[1:], IGNORE]
        assert b.pos[at:at + n].tolist() == list(range(n))
        assert set(b.lo[at:at + n].tolist()) == {at} and b.hi[at:at + n].tolist() == list(range(at + 1, at + n + 1))
        assert torch.equal(b.images[image:image + len(images)], images)
        at, image = at + n, image + len(images)
    assert at == len(b.ids) and image == len(b.images)


# anything that json can hold, often in the shape of a row
leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
anything = st.recursive(leaf | st.sampled_from(["human", "gpt", IMAGE]), max_leaves=6, extend=lambda x:
                        st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))
who = st.sampled_from(["human", "gpt", "system", "x"])
message = st.fixed_dictionaries({}, optional={
    "from": who | anything, "role": anything, "value": text | anything, "content": anything})
row = anything | st.fixed_dictionaries({}, optional={
    "conversations": st.lists(message | anything, max_size=4) | anything, "id": anything,
    "image": anything | st.lists(text, max_size=2)})


@fuzz
@given(row, st.sampled_from(list(TEMPLATES)), st.integers(1, 60))
def test_a_row_is_a_sample_or_a_bad_sample_never_another_error(row, template, max_len):
    encoder = data.Encoder(tokenizer("bytes"), template, I, Q, max_len)
    try:
        if not isinstance(row, dict):
            raise BadSample("as in Rows")
        ids, labels, names, cut = encoder(row)
    except BadSample as e:
        assert e.reason and "\n" not in e.reason
    else:
        assert len(ids) <= max_len and any(y != IGNORE for y in labels[1:]) and len(names) == ids.count(I) // Q


@cache
def rows_file():
    return Path(mkdtemp()) / "rows.json"


@fuzz
@given(st.binary(max_size=60) | st.lists(row, max_size=3).map(lambda r: json.dumps(r).encode()) |
       st.lists(row, max_size=3).map(lambda r: json.dumps(r, ensure_ascii=False, indent=1).encode(errors="replace")) |
       st.lists(row, max_size=3).map(lambda r: "\n".join(map(json.dumps, r)).encode()), st.integers(0, 200))
def test_a_data_file_is_read_or_refused_in_one_line(blob, cut):
    blob = blob[:max(0, len(blob) - cut)] if cut < 100 else blob
    rows_file().write_bytes(blob)
    try:
        truth = strict_json.strict_json(blob.decode("utf-8-sig"), "")
    except ValueError:
        truth = None
    try:
        rows = Rows(rows_file())
    except Error as e:
        assert "\n" not in str(e)
        assert not (truth and isinstance(truth, list))
        return
    for i in range(len(rows)):
        try:
            assert isinstance(rows[i], dict) and (not isinstance(truth, list) or rows[i] == truth[i])
        except BadSample:
            assert not isinstance(truth, list) or not isinstance(truth[i], dict)
    assert len(rows) == len(truth) if isinstance(truth, list) else True


@cache
def root():
    folder = Path(mkdtemp()).resolve()
    (folder / "images" / "a").mkdir(parents=True)
    (folder / "images" / "a" / "b.png").write_text("inside")
    (folder / "secret").write_text("outside")
    (folder / "images" / "link").symlink_to(folder)
    (folder / "images" / "loop").symlink_to("loop")
    return folder / "images"


parts = st.sampled_from(["..", ".", "", "a", "b.png", "link", "loop", "secret", "%2e%2e", "..\\", "\0",
                         "\ud800", "x" * 300, "images", "~", "/etc/passwd"])


@fuzz
@given(st.lists(parts, max_size=6).map("/".join) | st.text(max_size=10) | anything)
def test_no_name_leads_out_of_the_image_folder(name):
    try:
        path = images.safe_path(root(), name)
    except BadSample:
        return
    assert Path(path).read_text() == "inside"


def echo(pipe):
    while True:
        kind, *rest = pipe.recv()
        pipe.send(encode(tokenizer(kind), *rest))


@pytest.fixture(scope="module")
def worker():
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=echo, args=(there,), daemon=True)
    process.start()
    there.close()                                                  # or nobody would notice that the worker has died
    yield here
    process.kill()
    process.join()


@fuzz
@given(c=conversation())
def test_a_worker_process_makes_the_same_ids(worker, c):
    tok, template, turns, images, system = c
    worker.send((Path(tok.folder).name, template, turns, images, I, Q, system))
    assert worker.recv() == encode(tok, template, turns, images, I, Q, system)


PICTURES = [(Image.new(mode, (5, 4)), form) for mode, form in (("RGB", "JPEG"), ("RGBA", "PNG"), ("P", "GIF"),
            ("RGB", "WEBP"), ("RGB", "BMP"), ("I;16", "TIFF"), ("CMYK", "TIFF"))]


@cache
def blobs():
    made = []
    for image, form in PICTURES:
        file = io.BytesIO()
        image.save(file, form)
        made.append(file.getvalue())
    return made


@cache
def picture_file():
    return Path(mkdtemp()) / "picture"


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some of these files: that is its good right
@fuzz
@given(st.integers(0, len(PICTURES) - 1), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
       st.integers(0, 400), st.binary(max_size=8))
def test_a_picture_of_any_bytes_is_read_or_a_bad_sample(n, changes, cut, more):
    blob = bytearray(blobs()[n])
    for at, byte in changes:
        blob[at % len(blob)] = byte
    picture_file().write_bytes(blob[:len(blob) if cut > 200 else cut] + more)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(images, "MAX_PIXELS", 1_000_000)
        try:
            image = images.load_image(picture_file())
        except BadSample as e:
            assert "\n" not in str(e)
        else:
            assert image.mode == "RGB" and 0 < image.width * image.height <= images.MAX_PIXELS
            assert images.preprocess(image, images.ImageSpec(4)).shape == (3, 4, 4)


@dataclasses.dataclass
class Settings:
    """One of each type that the scripts have."""
    batch_size: int = 1
    lr: float = 1.0
    compile: bool = False
    data: str = "toy"
    system: str | None = None


keys = st.sampled_from(["batch_size", "lr", "compile", "data", "system", "learning_rate", "l"]) | st.text(max_size=5)
values = st.sampled_from(["1", "1e3", "nan", "inf", "-0", "true", "None", "1_0", "0x1", "", "٣"]) | st.text(max_size=5)
typed = st.tuples(st.sampled_from(["--", "", "-"]), keys, st.sampled_from(["=", "", "=="]), values).map("".join)


@fuzz
@given(st.lists(typed | st.text(max_size=6), max_size=4))
def test_a_command_line_is_read_or_refused_in_one_line(argv):
    assume(not {"-h", "--help"} & set(argv))
    try:
        s = config.parse(Settings, argv)
    except Error as e:
        assert ("\n" not in str(e) or "\n" in "".join(argv))
        return
    assert [type(v) for v in vars(s).values()][:4] == [int, float, bool, str] and s.lr == s.lr
    assert s.system is None or isinstance(s.system, str)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
