"""Idefics3's images: sizes and tiles as in transformers, ids of all tiles; pixel shuffle with one matrix; positions."""

import itertools
import random

import numpy as np
import pytest
import torch
from conftest import error
from part_checks import check_cache, check_flops, check_no_images, check_packed, config, random_model
from PIL import Image

import chat
from parts.build import build, image_layout
from parts.idefics3_vit import Idefics3ViTConfig, table_rows
from parts.tiles import Split

PLACES = [[10 * y + x, 99] for y in range(1, 4) for x in range(1, 4)]
SMALL = Split(3, 4, 8, 24, before=[5], cells=PLACES, whole=[6], row_end=[7], grid_end=[8, 8], after=[9])
DRAW = random.Random(0)
SIZES = [(DRAW.randint(1, 3000), DRAW.randint(1, 3000)) for _ in range(150)] + [
    (w, h) for w, h in itertools.product((1, 2, 7, 8, 9, 24, 364, 4000), repeat=2)]


def picture(w, h, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


@pytest.fixture
def model():
    cfg = config(connector="shuffle_linear", tokens=1)
    cfg.vision = Idefics3ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                                   image_size=8, patch_size=4)
    return random_model(cfg)


@pytest.mark.parametrize("side, longest", [(364, 1456), (512, 2048), (384, 1536), (8, 24), (8, 8), (7, 15), (1, 3),
                                           (512, 6000)])
def test_sizes_are_those_of_transformers(side, longest):
    T = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    for w, h in SIZES:
        first = T.get_resize_output_image_size(np.empty((3, h, w)), longest)
        asked = []
        theirs = T.Idefics3ImageProcessorPil()
        theirs.resize = lambda image, size, resample: asked.append((size.width, size.height))
        theirs.resize_for_vision_encoder(np.empty((3, *first)), side)
        layout = Split(3, 4, side, longest)
        assert layout.sizes(w, h) == (first[::-1], asked[0]) and max(layout.grid(w, h)) <= layout.most, (w, h)


@pytest.mark.parametrize("split", [True, False])
def test_tiles_are_those_of_transformers(split):
    T = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    for n, size in enumerate([(17, 9), (9, 30), (8, 8), (90, 3), (1, 1), (200, 150)]):
        for longest in (24, 8, 13):
            theirs = T.Idefics3ImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": 8},
                                                 do_rescale=False, do_normalize=False, do_image_splitting=split)
            true = theirs(picture(*size, n), return_row_col_info=True)
            layout = Split(3, 4, 8, longest, split)
            tiles = np.stack([np.asarray(t).transpose(2, 0, 1) for t in layout.cut(picture(*size, n))])
            assert np.array_equal(tiles, true["pixel_values"][0]), (size, longest)
            grid = layout.grid(*size)
            assert (true["cols"][0][0], true["rows"][0][0]) == (grid if len(tiles) > 1 else (0, 0))


def test_the_ids_of_an_image():
    """8 x 8 pixels grow to 24 x 24; 24 x 9 to 3 x 2 tiles; one tile is not split"""
    tile = [3] * 4
    assert SMALL.block(picture(24, 9)) == [
        5, 11, 99, *tile, 5, 12, 99, *tile, 5, 13, 99, *tile, 7, 5, 21, 99, *tile, 5, 22, 99, *tile, 5, 23, 99, *tile,
        8, 8, 5, 6, *tile, 9]
    assert SMALL.grid(8, 8) == (3, 3) and len(SMALL.cut(picture(8, 8))) == 10
    for one in (Split(3, 4, 8, 8, before=[5], whole=[6], after=[9]),
                Split(3, 4, 8, 24, False, [5], [], [6], after=[9])):
        assert one.block(picture(24, 9)) == [5, 6, *tile, 9] and len(one.cut(picture(24, 9))) == 1


def test_the_block_has_the_placeholders_of_all_tiles():
    for w, h in SIZES:
        image = Image.new("RGB", (min(w, 99), min(h, 99)))
        assert SMALL.block(image).count(3) == 4 * len(SMALL.cut(image))


def test_truncation_keeps_whole_images():
    blocks = [SMALL.block(picture(24, 9)), SMALL.block(picture(8, 8))]
    ids = [1, *blocks[0], *blocks[1], 4]
    first, second = 1 + len(blocks[0]), 1 + len(blocks[0]) + len(blocks[1])
    for n in range(1, len(ids) + 1):
        short, _, kept = chat.truncate(ids, ids, blocks, 3, n)
        assert kept == (first <= n) + (second <= n) and len(short) == (n if n >= second else first if n >= first else 1)


def test_layouts_are_chosen_by_kind():
    cfg = config(layout={"kind": "split", "longest": 24, "before": [5]})
    assert image_layout(cfg) == Split(3, 4, 8, 24, before=[5])
    cfg.layout |= {"cells": [[1]] * 8}
    assert "8 cells for a grid of at most 3 x 3 tiles" in error(image_layout, cfg)


@pytest.mark.parametrize("check", [check_packed, check_no_images, check_cache, check_flops])
def test_all_that_parts_have_in_common(model, check):
    check(model)


def test_token_counts_that_do_not_fit():
    assert "4 patches into tokens=2" in error(build, config(connector="shuffle_linear", tokens=2))


def test_positions_of_full_tiles():
    """Against transformers' embeddings: a plain grid for the published sides, not for some others"""
    T = pytest.importorskip("transformers")
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
    for n in (2, 4, 19, 25, 26, 27, 31, 32, 41):
        e = Idefics3VisionEmbeddings(T.Idefics3VisionConfig(hidden_size=1, image_size=n, patch_size=1))
        e.patch_embedding.weight.data.zero_(), e.patch_embedding.bias.data.zero_()
        e.position_embedding.weight.data[:, 0] = torch.arange(n * n)
        rows = e(torch.zeros(1, 3, n, n), torch.ones(1, n, n, dtype=torch.bool)).view(n, n)
        assert torch.equal(rows, table_rows(n)[:, None] * n + table_rows(n)[None].float())
        assert (table_rows(n).tolist() == list(range(n))) == (n not in (19, 25, 31, 41))
