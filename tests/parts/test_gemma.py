"""Gemma with a prefix mask, as in PaliGemma: packed, rows, cache. test_families.py compares it with transformers."""

import pytest
from part_checks import check_cache, check_flops, check_no_images, check_packed, check_rows, config, random_model
from test_persimmon import SIZES

from parts.gemma import GemmaConfig


@pytest.mark.parametrize("check", [check_packed, check_no_images, check_rows, check_cache, check_flops])
def test_all_that_parts_have_in_common(check):
    check(random_model(config(GemmaConfig(**SIZES, first_position=1), mask="prefix")))
