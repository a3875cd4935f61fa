"""Masks: which keys each token sees, against a definition by loops, and through the model."""

import dataclasses

import pytest
import torch
from conftest import example, tiny_vlm
from part_checks import check_cache, check_flops, check_groups, check_no_images, check_rows, config, random_model
from test_model import TIGHT, all_logits, gradients, worst

from data import pack
from kernels.cross_entropy import IGNORE
from parts.spans import SPANS, span_ends

DOCS = [example(1), example(2, images=0, text=14), example(3, images=3, text=5), example(4, images=0, text=3)]


def definition(mask, ids, labels):
    """One document -> for each token, the number of tokens it sees, by loops. labels: not shifted"""
    first = next((i for i, y in enumerate(labels) if y != IGNORE), len(ids))
    seen = []
    for i in range(len(ids)):
        end = i + 1
        if mask == "prefix" and i < first:
            end = first
        if mask == "image" and ids[i] == 3:
            while end < len(ids) and ids[end] == 3:
                end += 1
        seen.append(end)
    return seen


@pytest.mark.parametrize("mask", ["causal", "prefix", "image"])
def test_spans_match_a_definition_by_loops(mask):
    blind = ([5, 6, 7], [IGNORE] * 3, [])                        # no label: a prompt
    ends, begins = ([5, 3, 3], [IGNORE] * 3, []), ([3, 6], [IGNORE] * 2, [])      # with an image, side by side
    docs = [*DOCS, blind, ends, begins]
    model = tiny_vlm()
    batch = pack(docs, 8, span_ends(dataclasses.replace(model.cfg, mask=mask)))
    want = [n for ids, labels, _ in docs for n in definition(mask, ids, labels)]
    assert (batch.hi - batch.lo).tolist() == want
    assert (batch.hi[1:] >= batch.hi[:-1]).all(), "the kernels need ends that never decrease"


def test_every_mask_has_a_name_and_a_function():
    assert {"causal", "prefix", "image", "mmca"} == set(SPANS)


def changed_rows(mask, at):
    """Which tokens of one document get other logits if the token `at` becomes another"""
    model = tiny_vlm().double().eval()
    model.cfg.mask = mask
    ids, labels, images = example(1)
    other = [*ids]
    other[at] = 9 if ids[at] != 9 else 10
    with torch.no_grad():
        a, b = (all_logits(model, pack([(i, labels, images)], 8, span_ends(model.cfg))) for i in (ids, other))
    return [i for i, x in enumerate((a - b).abs().amax(1)) if x > 0]


def test_no_answer_token_leaks_into_the_prefix():
    """The first supervised token is one row after the first row with a label: one row too many would show it."""
    ids, labels, _ = example(1)
    first = next(i for i, y in enumerate(labels) if y != IGNORE)
    assert changed_rows("prefix", first) == list(range(first, len(ids)))
    assert changed_rows("prefix", first - 1) == list(range(len(ids))), "the question is seen by all"
    assert changed_rows("causal", first - 1) == list(range(first - 1, len(ids)))


@pytest.mark.parametrize("check", [check_rows, check_cache, check_groups, check_no_images, check_flops])
@pytest.mark.parametrize("mask", ["prefix", "image"])
def test_all_that_parts_have_in_common(mask, check):
    check(random_model(config(mask=mask)))


@pytest.mark.parametrize("mask", ["prefix", "image"])
def test_packed_equals_one_by_one(mask):
    model = tiny_vlm().double()
    model.cfg.mask = mask
    ends = span_ends(model.cfg)
    whole = gradients(model, [pack(DOCS, 8, ends)])
    single = gradients(model, [pack([doc], 8, ends) for doc in DOCS])
    assert abs(whole[0] - single[0]) <= TIGHT * abs(single[0]) and worst(whole[1], single[1]) < TIGHT
    other = gradients(model, [pack(DOCS, 8)])
    assert worst(whole[1], other[1]) > 1e-3, "causal attention is something else"
