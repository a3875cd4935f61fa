"""The setting `parts`: what it changes, and that every mistake ends in one line."""

import dataclasses

import pytest
from conftest import error, tiny_config

from formats.configs import CLASSES
from parts.settings import apply_parts


def test_parts_change_the_config():
    cfg = tiny_config()
    apply_parts(cfg, "mask=prefix tokens=9 vision.feature_layer=[1,-1] vision.feature_norm=true "
                     "text.rope_theta=5e5 connector_args.heads=4 connector=pool", CLASSES)
    assert (cfg.mask, cfg.tokens, cfg.connector, cfg.connector_args) == ("prefix", 9, "pool", {"heads": 4})
    assert cfg.vision.feature_layer == (1, -1) and cfg.vision.feature_norm is True and cfg.text.rope_theta == 5e5


def test_no_parts_change_nothing():
    cfg = tiny_config()
    apply_parts(cfg, "", CLASSES)
    assert cfg == tiny_config()


def test_a_model_type_brings_its_config_class():
    cfg = tiny_config()
    before = dataclasses.asdict(cfg.text)
    apply_parts(cfg, "text.model_type=gemma", CLASSES)
    assert type(cfg.text) is CLASSES["gemma"] and dataclasses.asdict(cfg.text) == before | {"model_type": "gemma"}


@pytest.mark.parametrize("parts, says", [
    ("colour=red", "'colour=red' is not a field=value"),
    ("vision.colour=red", "'vision.colour=red' is not a field=value"), ("mask", "'mask' is not a field=value"),
    ("tower.x=1", "'tower.x=1' is not a field=value"),
    ("tokens=many", "tokens is of type int, not 'many'"), ("vision.feature_norm=1", "feature_norm is of type bool")])
def test_a_mistake_ends_in_one_line(parts, says):
    assert says in error(apply_parts, tiny_config(), parts, CLASSES)
