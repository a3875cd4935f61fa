"""Tiles: sizes from headers, InternVL's grid rule, what is cut, and ids that count what is cut."""

import json
import random

import numpy as np
import pytest
from conftest import error, make_tokenizer
from part_checks import config
from PIL import Image, ImageColor

import images
from config import BadSample
from data import Encoder, Steps
from formats.image_files import FORMATS, load_image
from formats.tokenizer import Tokenizer
from parts.build import image_layout
from parts.tiles import PatchRows, Tiles, image_size

GRID = Tiles(3, 4, 16, most=6, before=[7], after=[8])
ROWS = PatchRows(3, 1, 6, largest=(48, 24), row_end=[9])


def picture(w, h, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", range(10))
def test_the_header_has_the_size_as_loaded(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {} if kind in ("GIF", "BMP") else {"exif": exif}
    picture(7, 4).save(tmp_path / "a", kind, **settings)
    size = image_size(tmp_path / "a")
    assert size == load_image(tmp_path / "a").size == image_size(load_image(tmp_path / "a"))
    assert (size == (4, 7)) == (orientation in (5, 6, 7, 8) and bool(settings))


def test_broken_files(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(BadSample, match="image cannot be read"):
        image_size(tmp_path / "text.png")
    picture(7, 4).save(tmp_path / "bad.jpg", exif=b"Exif\0\0broken")
    assert image_size(tmp_path / "bad.jpg") == load_image(tmp_path / "bad.jpg").size == (7, 4)
    picture(7, 4).save(tmp_path / "large.tiff")
    monkeypatch.setattr("parts.tiles.MAX_PIXELS", 27)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("a large image is decoded"))
    assert image_size(tmp_path / "large.tiff") == (7, 4)


def test_the_grid_is_that_of_internvl():
    ocr = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    draw = random.Random(0)
    for least, most in ((1, 12), (1, 1), (2, 6), (4, 4), (1, 40)):
        for _ in range(400):
            step = draw.choice([1, 100, 448])
            w, h = step * draw.randint(1, 9), step * draw.randint(1, 9)
            theirs = ocr.get_optimal_tiled_canvas((h, w), (448, 448), least, most)
            assert Tiles(3, 256, 448, least, most).grid(w, h) == theirs, (w, h, least, most)


def test_known_grids():
    """800 x 1300 and 1920 x 1080 as in InternVL's own code; a square of one tile is not cut, one of four is"""
    tiles = Tiles(3, 256, 448)
    sizes = (800, 1300), (1920, 1080), (448, 448), (896, 896)
    assert [tiles.grid(*size) for size in sizes] == [(2, 3), (4, 2), (1, 1), (2, 2)]


def test_given_grids_are_the_only_ones():
    """MM1's fine-tuning (arXiv 2403.09611, section 4): every image as 2 x 2 tiles and a whole one, 5 x 144 tokens"""
    tiles = Tiles(3, 144, 16, grids=[[2, 2]])
    for w, h in ((16, 16), (500, 3), (3, 500)):
        assert tiles.block(picture(w, h)) == [3] * 720 and len(tiles.cut(picture(w, h))) == 5


def test_layouts_that_do_not_exist():
    assert "kind None: grid or rows" in error(image_layout, config(layout={"most": 3}))
    assert "unknown key 'mots'" in error(image_layout, config(layout={"kind": "grid", "mots": 3}))
    assert image_layout(config(layout={"kind": "grid", "most": 3})) == Tiles(3, 4, 8, most=3)


def test_the_thumbnail_follows_the_rows_of_tiles():
    colours = ["red", "green", "blue", "white", "black", "yellow"]
    whole = Image.new("RGB", (48, 32))
    for i, colour in enumerate(colours):
        whole.paste(colour, (i % 3 * 16, i // 3 * 16, i % 3 * 16 + 16, i // 3 * 16 + 16))
    tiles = GRID.cut(whole)
    assert [t.size for t in tiles] == [(16, 16)] * 7
    assert [t.getcolors() for t in tiles[:6]] == [[(256, ImageColor.getrgb(c))] for c in colours]
    assert tiles[6].tobytes() == whole.resize((16, 16), Image.BICUBIC).tobytes()
    assert len(GRID.cut(whole.crop((0, 0, 16, 16)))) == 1
    assert len(Tiles(3, 4, 16, most=6, thumbnail=False).cut(whole)) == 6


@pytest.mark.parametrize("layout", [GRID, ROWS, Tiles(3, 4, 16, most=6, thumbnail=False, row_end=[9]),
                                    Tiles(3, 4, 16, 1, 1, before=[7])])
def test_the_block_has_the_placeholders_of_all_tiles(layout):
    for w, h in ((16, 16), (40, 22), (1, 500), (500, 1), (33, 99), (1, 1)):
        image = picture(w, h)
        tiles, block, (columns, rows) = layout.cut(image), layout.block(image), layout.grid(w, h)
        assert block.count(3) == len(tiles) * layout.tokens and block.count(9) == rows * len(layout.row_end)
        assert block[:1] == [*layout.before, 3][:1] and block[-1:] == [3, *layout.row_end, *layout.after][-1:]
        assert all(t.size == (layout.side,) * 2 and t.mode == "RGB" for t in tiles)


def test_rows_keep_pixels_and_fill_the_edge():
    image = picture(13, 8)
    tiles = ROWS.cut(image)
    assert ROWS.block(image) == [3, 3, 3, 9, 3, 3, 3, 9]
    rows = [np.concatenate([np.asarray(t) for t in tiles[i : i + 3]], 1) for i in (0, 3)]
    canvas = np.concatenate(rows)
    assert (canvas[:8, :13] == np.asarray(image)).all() and (canvas[8:] == 1).all() and (canvas[:, 13:] == 1).all()


def test_rows_shrink_to_the_largest_size_only():
    assert ROWS.shrunk(48, 24) == (48, 24) and ROWS.shrunk(5, 5) == (5, 5)
    assert ROWS.shrunk(96, 24) == (48, 12) and ROWS.shrunk(24, 48) == (12, 24) and ROWS.shrunk(9000, 1) == (48, 1)
    assert ROWS.grid(96, 40) == (8, 4)


@pytest.mark.parametrize("layout, sides", [(GRID, 16), (ROWS, 6)])
def test_from_files_to_a_stream(layout, sides, tmp_path):
    """Images of many sizes, turned ones too: as many placeholders as tiles times Q"""
    rows = []
    for i, (w, h) in enumerate([(16, 16), (40, 22), (10, 48), (5, 5), (64, 16), (30, 50)]):
        exif = Image.Exif()
        exif[0x0112] = 6 if i % 2 else 1
        picture(w, h, i).save(tmp_path / f"{i}.png", exif=exif)
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A black cat."}]})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    encode = Encoder(Tokenizer(make_tokenizer(tmp_path / "tok")), "chatml", layout, 80, "")
    steps = Steps(str(tmp_path / "data.json"), str(tmp_path), encode, images.ImageSpec(sides, "squash"), 6, 200, 0)
    step = steps[0]
    assert len(step.names) + len(step.dropped) == 6 and step.names
    assert all("longer than max_len" in why for _, why in step.dropped)
    for b in step.micro:
        assert int((b.ids == 3).sum()) == len(b.images) * layout.tokens and b.images.shape[1:] == (3, sides, sides)
    assert sum(len(b.images) for b in step.micro) > len(step.names)
    alone = encode(rows[1], str(tmp_path))[0]
    block = layout.block(tmp_path / "1.png")
    at = alone.index(block[0])
    assert alone[at : at + len(block)] == block and block == layout.block(load_image(tmp_path / "1.png"))
