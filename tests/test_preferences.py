"""Preference rows: every published form becomes the same question and two answers; a bad row says why."""

import base64
import io
import json

import pytest
from PIL import Image

from config import BadSample
from formats.image_files import load_image, safe_path
from formats.preferences import preference


def png(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(file, "PNG")
    return file.getvalue()


Q, GOOD, BAD = "What is it?", "A cat.", "A dog."
URL = "data:image/png;base64," + base64.b64encode(png()).decode()


def human(text, key="from"):
    return {"from": "human", "value": text} if key == "from" else {"role": "user", "content": text}


def says(text, key="from"):
    return {"from": "gpt", "value": text} if key == "from" else {"role": "assistant", "content": text}


def parts(*items):
    return [{"type": "image"} if item == "#" else {"type": "text", "text": item} for item in items]


FORMS = {
    "TRL, texts": dict(prompt=Q, chosen=GOOD, rejected=BAD, images=["a.png"]),
    "TRL, messages": dict(images=["a.png"], prompt=[human(parts("#", Q), "role")],
                          chosen=[says(parts(GOOD), "role")], rejected=[says(parts(BAD), "role")]),
    "TRL, implicit": dict(images=["a.png"], chosen=[human(parts("#", Q), "role"), says(parts(GOOD), "role")],
                          rejected=[human(parts("#", Q), "role"), says(parts(BAD), "role")]),
    "RLAIF-V": dict(ds_name="x", image={"bytes": None, "path": "a.png"}, question=Q, chosen=GOOD, rejected=BAD, idx=3,
                    origin_split="{}", image_path="elsewhere.png"),
    "RLHF-V": dict(image="a.png", text=json.dumps(dict(question=Q, chosen=GOOD, rejected=BAD))),
    "2U1": dict(id="1", image="a.png", prompt=f"<image>\n{Q}", chosen=GOOD, rejected=BAD),
    "LLaVA-NeXT": dict(id="1", image="a.png", prompt=Q, answer="It is an animal.", chosen=GOOD, rejected=BAD),
    "LLaMA-Factory": dict(images=["a.png"], conversations=[human(f"<image>{Q}")], chosen=says(GOOD),
                          rejected=says(BAD)),
    "LLaMA-Factory, roles": dict(images=["a.png"], messages=[human(f"<image>{Q}", "role")], chosen=says(GOOD, "role"),
                                 rejected=says(BAD, "role")),
    "ms-swift": dict(images=["a.png"], messages=[human(f"<image>{Q}", "role"), says(GOOD, "role")],
                     rejected_response=BAD),
    "LLaVA-RLHF": dict(image="a.png", conversations=[human(f"<image>\n{Q}")], preference=2,
                       output_1={"from": "llava", "value": BAD}, output_2={"from": "llava", "value": GOOD}),
    "LLaVA-RLHF, answered": dict(image="a.png", conversations=[human(f"<image>\n{Q}"), says("Hm.")], preference=1,
                                 output_1={"from": "llava", "value": GOOD}, output_2={"from": "llava", "value": BAD}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_pair(form):
    turns, chosen, rejected, names, system = preference(FORMS[form])
    (question, answer), = turns
    assert question.count("<image>") == 1 and question.replace("<image>", "").strip() == Q and answer is None
    assert (chosen, rejected, names, system) == (GOOD, BAD, ["a.png"], None)


def test_earlier_turns_and_system_are_kept():
    row = dict(image="a.png", system="Be brief.", chosen=GOOD, rejected=BAD,
               conversations=[human("<image>\nHi"), says("Hello."), human(Q)])
    assert preference(row) == ([("<image>\nHi", "Hello."), (Q, None)], GOOD, BAD, ["a.png"], "Be brief.")
    row = dict(chosen=[{"role": "system", "content": "S"}, human(Q, "role"), says(GOOD, "role")],
               rejected=[{"role": "system", "content": "S"}, human(Q, "role"), says(BAD, "role")])
    assert preference(row) == ([(Q, None)], GOOD, BAD, [], "S")


def test_two_images_stand_before_the_question():
    turns, *_, names, _ = preference(dict(prompt=Q, chosen=GOOD, rejected=BAD, images=["a.png", "b.png"]))
    assert turns == [(f"<image>\n<image>\n{Q}", None)] and names == ["a.png", "b.png"]


@pytest.mark.parametrize("image", [{"bytes": png(), "path": "a.png"}, URL, png()])
def test_an_image_may_be_in_the_row(image, tmp_path):
    name, = preference(dict(prompt=Q, chosen=GOOD, rejected=BAD, image=image))[3]
    assert name == png()
    loaded = load_image(safe_path(tmp_path, name))
    assert loaded.size == (3, 2) and loaded.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("change, reason", [
    (dict(rejected=GOOD + " "), "chosen and rejected are equal"),
    (dict(rejected=""), "an empty answer"),
    (dict(chosen=" "), "an empty answer"),
    (dict(rejected=None), "no pair of answers"),
    (dict(chosen=3), "a turn has no text|unknown speaker"),
    (dict(prompt=""), "no question"),
    (dict(prompt=None, chosen=[human("A?"), says("B")], rejected=[human("C?"), says("D")]),
     "more than the last answer"),
    (dict(prompt=None, chosen=[human("A?"), says("B"), human("x"), says("y")], rejected=[human("A?"), says("D")]),
     "more than the last answer"),
    (dict(prompt=[human("A?"), says("B")]), "an answer without a question"),
    (dict(image="https://example.org/a.png"), "training downloads nothing"),
    (dict(image="data:image/png;base64,%%%"), "not base64"),
    (dict(image=7), "neither a name"),
    (dict(output_1=BAD, output_2=GOOD, preference=0), "neither 1 nor 2"),
    (dict(video="a.mp4"), "video is not supported"),
])
def test_a_bad_row_says_why(change, reason):
    with pytest.raises(BadSample, match=reason):
        preference({**FORMS["2U1"], **change})


@pytest.mark.parametrize("row", [{"text": "{"}, {"text": "[1]"}, {"text": "words"}, {}, {"chosen": 1, "rejected": 2},
                                 {"rejected_response": BAD, "messages": [human(Q)]},
                                 {"chosen": [None], "rejected": [3]}])
def test_a_row_of_another_form_is_refused(row):
    with pytest.raises(BadSample):
        preference(row)
