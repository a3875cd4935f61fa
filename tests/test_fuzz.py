"""Random rows, files, names, bytes of images and settings: a result, or an error in one line.
PUMICE_FUZZ=N tries N of each instead of 200."""

import dataclasses
import io
import json
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from config import Error

pytest.importorskip("hypothesis")
from hypothesis import assume, given, strategies as st
from PIL import Image
from conftest import TEMPLATES, blocks
from test_chat import I, Q
from test_chat_fuzz import conversation, fuzz, text, tokenizer

import data
import images
from chat import IMAGE, encode
from config import BadSample
from formats import strict_json
from formats.image_files import MAX_PIXELS, load_image, safe_path
from formats.rows import Rows
from kernels.cross_entropy import IGNORE
from run.arguments import parse


@fuzz
@given(st.lists(conversation(), min_size=1, max_size=3))
def test_packing_changes_no_sample(several):
    made = [(*encode(tok, template, turns, blocks(images), system), torch.full((images, 3, 1, 1), n, dtype=torch.uint8))
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
part = st.fixed_dictionaries({}, optional={
    "type": st.sampled_from(["text", "image", "video"]) | anything, "text": text | anything, "image": text | anything})
content = text | st.lists(part | anything, max_size=3) | anything
message = st.fixed_dictionaries({}, optional={
    "from": who | anything, "role": anything, "value": content, "content": content})
row = anything | st.fixed_dictionaries({}, optional={
    "conversations": st.lists(message | anything, max_size=4) | anything, "id": anything, "system": text | anything,
    "image": anything | st.lists(text, max_size=2)})


@fuzz
@given(row, st.sampled_from(list(TEMPLATES)), st.integers(1, 60))
def test_any_row_is_a_sample_or_refused(row, template, max_len):
    encoder = data.Encoder(tokenizer("bytes"), template, images.Layout(I, Q), max_len)
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
def test_any_data_file_is_read_or_refused(blob, cut):
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
def test_no_name_leads_out_of_the_folder(name):
    try:
        path = safe_path(root(), name)
    except BadSample:
        return
    assert Path(path).read_text() == "inside"


FILES = [(Image.new(mode, (5, 4)), form) for mode, form in (("RGB", "JPEG"), ("RGBA", "PNG"), ("P", "GIF"),
            ("RGB", "WEBP"), ("RGB", "BMP"), ("I;16", "TIFF"), ("CMYK", "TIFF"))]


@cache
def blobs():
    made = []
    for image, form in FILES:
        file = io.BytesIO()
        image.save(file, form)
        made.append(file.getvalue())
    return made


@cache
def image_file():
    return Path(mkdtemp()) / "image"


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some of these files, rightly
@fuzz
@given(st.integers(0, len(FILES) - 1), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
       st.integers(0, 400), st.binary(max_size=8))
def test_any_bytes_are_an_image_or_refused(n, changes, cut, more):
    blob = bytearray(blobs()[n])
    for at, byte in changes:
        blob[at % len(blob)] = byte
    image_file().write_bytes(blob[:len(blob) if cut > 200 else cut] + more)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(images, "MAX_PIXELS", 1_000_000)
        try:
            image = load_image(image_file())
        except BadSample as e:
            assert "\n" not in str(e)
        else:
            assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS
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
def test_a_command_line_is_read_or_refused(argv):
    assume(not {"-h", "--help"} & set(argv))
    try:
        s = parse(Settings, argv)
    except Error as e:
        assert ("\n" not in str(e) or "\n" in "".join(argv))
        return
    assert [type(v) for v in vars(s).values()][:4] == [int, float, bool, str] and s.lr == s.lr
    assert s.system is None or isinstance(s.system, str)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
