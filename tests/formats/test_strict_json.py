"""JSON as the standard has it: no duplicate keys, no NaN; a bad file is named in one line."""

import time

import pytest
from conftest import error

from formats.strict_json import read_json, strict_json


@pytest.mark.parametrize("text, message", [
    (None, "is missing"), ("folder", "cannot be read: Is a directory"), (b"\xff", "is not text in utf-8"),
    (b"[1]", "is not a json object"), (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
    (b'{"a": NaN}', "NaN is not JSON"), (b"{", "line 1 column 2")])
def test_a_bad_json_file_is_named(tmp_path, text, message):
    file = tmp_path / "x.json"
    if text == "folder":
        file.mkdir()
    elif text is not None:
        file.write_bytes(text)
    line = error(read_json, file)
    assert line.startswith(f"{file}") and message in line


@pytest.mark.parametrize("text, message", [
    ('{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'"), ('[NaN]', "NaN is not JSON"),
    ('[-Infinity]', "-Infinity is not JSON"), ('[1,', "line 1 column"), ("{'a': 1}", "line 1 column 2"),
    ("[1]]", "Extra data"), ("[" * 100_000, "recursion"), ("9" * 5000, "limit"), ("", "line 1 column 1")])
def test_strict_json_refuses_what_python_forgives(text, message):
    with pytest.raises(ValueError, match=message) as e:
        strict_json(text, "x.json")
    assert str(e.value).startswith("x.json: ")


def test_a_duplicate_among_many_keys_is_found_quickly():
    text = "{" + ",".join(f'"{i}": 0' for i in range(50_000)) + ', "49999": 1}'
    began = time.process_time()
    with pytest.raises(ValueError, match="duplicate key '49999'"):
        strict_json(text, "x")
    assert time.process_time() - began < 20  # quadratic: minutes
