"""JSON without what Python forgives: NaN, duplicate keys."""

import json
from pathlib import Path

from config import stop


def pairs(items):
    d = dict(items)
    if len(d) < len(items):
        seen = set()
        raise ValueError(f"duplicate key {next(k for k, _ in items if k in seen or seen.add(k))!r}")
    return d


def constant(name):
    raise ValueError(f"{name} is not JSON")
# json without what Python forgives: NaN, duplicate keys
STRICT = json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant)


def strict_json(text, where):
    """What a text says as json, or a ValueError that names the place."""
    try:
        return STRICT.decode(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: {e}") from None


def read_json(path):
    """A file that holds one json object -> dict"""
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
