"""Read strict JSON. NaN, floats that overflow and duplicate keys are errors here; Python's json accepts them."""

import json
import math
from collections import Counter
from pathlib import Path

from config import stop


def unique(items):
    d = dict(items)
    if len(d) < len(items):
        raise ValueError(f"duplicate key {(Counter(k for k, _ in items) - Counter(d.keys())).popitem()[0]!r}")
    return d


def finite(text):
    if math.isinf(x := float(text)):
        raise ValueError(f"{text:.40} is larger than any float")
    return x


def constant(name):
    raise ValueError(f"{name} is not JSON")


STRICT = json.JSONDecoder(object_pairs_hook=unique, parse_float=finite, parse_constant=constant)


def strict_json(text, where):
    """Parse JSON text -> its value. An error is a ValueError whose message begins with `where`."""
    try:
        return STRICT.decode(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: {e}") from None


def read_json(path, absent=None):
    """Read a file that holds one JSON object -> dict. If the file is missing, return `absent`; if `absent` is None,
    stop."""
    if absent is not None and not Path(path).is_file():
        return absent
    try:
        found = strict_json(Path(path).read_text("utf-8"), path)
    except FileNotFoundError:
        stop(f"{path} is missing")
    except OSError as e:
        stop(f"{path} cannot be read: {e.strerror}")
    except UnicodeDecodeError:
        stop(f"{path} is not text in utf-8")
    except ValueError as e:
        stop(str(e))
    return found if isinstance(found, dict) else stop(f"{path} is not a json object")
