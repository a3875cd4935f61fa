"""LLaVA-NeXT's images: grids, tiles and counts as in transformers, features of any size at their places, packed
documents, no image, truncation."""

import random

import numpy as np
import pytest
import torch
from conftest import error
from part_checks import check_cache, check_flops, check_no_images, check_packed, check_rows, config, random_model, sized
from PIL import Image
from test_model import Syncs, all_logits

import chat
from data import pack
from formats.tokenizer import Tokenizer
from parts.anyres import sources
from parts.build import build, image_layout
from parts.tiles import Anyres

NEXT = Anyres(3, 16, 8)                                         # tiles of 4 x 4 features
DRAW = random.Random(0)
SIZES = [(DRAW.randint(1, 3000), DRAW.randint(1, 3000)) for _ in range(60)] + [
    (w, h) for w in (1, 2, 7, 336, 4000) for h in (1, 3, 9, 672, 4000)]


def anyres(**fields):
    return config(connector="anyres", layout={"kind": "anyres"}, **fields)


def numbers(block):
    """The four bytes of the first placeholder"""
    return [block[0] >> shift & 255 for shift in (24, 16, 8, 0)]


def test_grids_and_counts_are_those_of_transformers():
    """Published settings: tiles of 24 x 24 features; a SigLIP of 27 x 27 with 36 grids"""
    T = pytest.importorskip("transformers.models.llava_next.processing_llava_next")
    many = [(c, r) for c in range(1, 7) for r in range(1, 7)]
    for layout in (Anyres(3, 576, 336), Anyres(3, 729, 384, grids=many), NEXT):
        n, S = layout.n, layout.side
        pins = [(r * S, c * S) for c, r in layout.grids]
        for w, h in SIZES:
            block, image = layout.block(Image.new("L", (w, h))), (h, w)
            rows, columns, R, C = numbers(block)
            assert T.select_best_resolution(image, pins) == (rows * S, columns * S), image
            features, ends = T.LlavaNextProcessor._get_unpadded_features(None, h, w, n, n, rows, columns)
            assert (R * C, R) == (features, ends) and len(block) == n * n + features + ends, image
            assert block[1:] == [3] * (len(block) - 1)


def test_each_token_gets_its_feature():
    """Against pictures that are put together tile by tile, cut, and read row by row"""
    ids, rows, tiles = [], [], 0
    for w, h in [(9, 30), *SIZES[:20], *SIZES[-25:]]:
        block = NEXT.block(Image.new("L", (w, h)))
        down, across, R, C = numbers(block)
        grid = np.arange(16 * (1 + down * across)).reshape(-1, 4, 4) + 16 * tiles
        whole = np.block([[grid[1 + y * across + x] for x in range(across)] for y in range(down)])
        top, left = (len(whole) - R) // 2, (len(whole[0]) - C) // 2
        rows += [("text", len(ids)), *grid[0].flat]
        for line in whole[top : len(whole) - top, left : len(whole[0]) - left]:
            rows += [*line, "end"]
        ids, tiles = ids + [7, *block], tiles + len(grid)
    N, end = len(ids), len(ids) + 16 * tiles
    true = [x[1] if isinstance(x, tuple) else end if isinstance(x, str) else N + x for x in rows]
    assert sources(torch.tensor(ids), 3, 4, tiles).tolist() == true and true.count(end) > 100


def test_borders_of_one_side_may_be_all():
    """An image so flat that its picture has no row: the small picture is all that the model sees"""
    flat = NEXT.block(Image.new("L", (900, 2)))
    assert numbers(flat) == [1, 2, 0, 8] and len(flat) == 16
    assert sources(torch.tensor([5, *flat, 6]), 3, 4, 3).tolist() == [0, *range(18, 34), 17]


def test_tiles_are_those_of_transformers():
    T = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
    theirs = T.LlavaNextImageProcessorPil(
        image_grid_pinpoints=[[r * 8, c * 8] for c, r in NEXT.grids], do_rescale=False, do_normalize=False,
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    for n, size in enumerate([(17, 9), (9, 30), (8, 8), (90, 3), (1, 1), (200, 150), (24, 8)]):
        image = Image.fromarray(np.random.default_rng(n).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        true = theirs(image)["pixel_values"][0]
        assert np.array_equal(np.stack([np.asarray(t).transpose(2, 0, 1) for t in NEXT.cut(image)]), true), size


def test_packed_is_one_by_one():
    check_packed(random_model(anyres()))


def test_without_images():
    check_no_images(random_model(anyres()))


def test_cache_and_labelled_rows():
    check_cache(random_model(anyres()))
    check_rows(random_model(anyres()))


def test_the_plan_counts_as_torch_does():
    check_flops(random_model(anyres()), most=1.014)            # 19 tiles: the gradient of pixels is 1.4 %


def test_a_step_has_one_host_device_sync():
    model = random_model(anyres())
    batch = pack([sized(model.cfg, 0, [(5, 90), (8, 8)])], 8)
    with Syncs() as syncs:
        model(*batch).backward()
    assert syncs.names == ["nonzero"]


def test_the_vector_at_row_ends_matters():
    model = random_model(anyres())
    stream = pack([sized(model.cfg, 0, [(23, 8)])], 8)
    with torch.no_grad():
        plain = all_logits(model, stream)
        model.multi_modal_projector.image_newline.zero_()
        assert (all_logits(model, stream)[-1] - plain[-1]).abs().max() > 1e-3


def test_wrong_numbers_of_tiles_or_placeholders_stop():
    model = random_model(anyres())
    ids, labels, tiles = sized(model.cfg, 0, [(23, 8)])
    for bad in ((ids, labels, tiles[:-1]), ([1, *ids], [-100, *labels], torch.cat([tiles, tiles[:1]])),
                ([1, 3, *ids], [-100, -100, *labels], tiles), ([1, *ids[2:]], labels, tiles)):
        with pytest.raises(RuntimeError, match="not as many"):
            model(*pack([bad], 8))


def test_truncation_keeps_whole_images():
    blocks = [NEXT.block(Image.new("L", size)) for size in ((17, 9), (9, 30), (8, 8))]
    ids = [1, *blocks[0], *blocks[1], 7, *blocks[2], 8, 9]
    ends = np.cumsum([1 + len(blocks[0]), len(blocks[1]), 1 + len(blocks[2])])
    for n in range(len(ids) + 2):
        short, labels, kept = chat.truncate(ids, ids, blocks, 3, n)
        assert kept == sum(end <= n for end in ends), n
        most = n if kept == 3 else min(n, [1, ends[0], ends[1] + 1][kept])
        assert short == labels == ids[:most], n


def test_a_sample_is_shown_with_all_its_placeholders(bytes_folder, capsys):
    ids = [1, *NEXT.block(Image.new("L", (9, 30))), 30]
    chat.show(Tokenizer(bytes_folder), ids, [-100] * len(ids), 3)
    assert f"<s>[{len(ids) - 2} x image]" in capsys.readouterr().out


def test_what_cannot_be_is_said_in_one_line():
    for cfg in (config(connector="anyres"), config(layout={"kind": "anyres"}), anyres(mask="image")):
        assert "anyres" in error(build, cfg)
    assert "not tokens=16" in error(build, anyres(tokens=16))
    assert "at least 2 x 2, not 1" in error(image_layout, anyres(vision={"patch_size": 8}))
    for grids in ([], [[0, 1]], [[128, 1]]):
        cfg = anyres()
        cfg.layout |= {"grids": grids}
        assert "at most 255 features" in error(image_layout, cfg)
