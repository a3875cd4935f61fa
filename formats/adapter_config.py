"""Read adapter_config.json of a LoRA: refuse unsupported options, and find the rank and alpha of each layer."""

import re
from fnmatch import fnmatchcase

from config import stop
from formats.strict_json import read_json

# PEFT options that change the forward pass and are refused
REFUSED = ("fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
           "kasa_config", "monteclora_config", "layer_replication", "target_parameters")
# initialisations of a LoRA that leave the base weights unchanged; others (PiSSA, OLoRA, CorDA ...) are refused
INIT = (None, True, False, "gaussian", "eva", "orthogonal")
PATTERNS = ("rank_pattern", "alpha_pattern")


def read_adapter_config(folder):
    """Read adapter_config.json -> dict. Stop at an option that is not supported."""
    c = read_json(folder / "adapter_config.json")
    for key in REFUSED:
        if c.get(key):
            stop(f"{folder}: {key}={c[key]} is not supported")
    if (how := c.get("init_lora_weights")) not in INIT:
        stop(f"{folder}: init_lora_weights={how} changed the base as well, which is not supported")
    for key in PATTERNS:
        if not isinstance(c.get(key) or {}, dict):
            stop(f"{folder}: {key}={c[key]} is not an object with a number for each layer")
        if strange := [p for p in c.get(key) or {} if not re.fullmatch(r"\^?(\w|-|\\?\.|\.\*){1,300}\$?", p)]:
            stop(f"{folder}: the pattern {strange[0]!r:.80} in {key} is not supported: names, `.*` and `\\.` are")
    return c


def matches(pattern, name):
    """Does a pattern of PEFT match the whole name of a layer, or the end of the name after a dot? PEFT uses the regular
    expression (.*\\.)?(pattern)$, which is extremely slow with some patterns. fnmatch is fast with every pattern."""
    glob = pattern.removesuffix("$").replace("\\.", ".").replace(".*", "*")
    return fnmatchcase(name, glob[1:]) if glob[:1] == "^" else fnmatchcase(f".{name}", f"*.{glob}")


def rank_and_alpha(folder, c, name=""):
    """Find the rank r and the scale alpha of a layer's adapter -> r, alpha. The adapter adds
    (alpha / r) B A x to the layer's output.

    name     the layer's name in the PEFT file; as in PEFT, the first pattern that matches the name counts
    alpha    lora_alpha. But rsLoRA divides lora_alpha by sqrt(r), not by r: then alpha is lora_alpha * sqrt(r)"""
    r, alpha = (next((v for p, v in (c.get(patterns) or {}).items() if matches(p, name)), c.get(key))
                for key, patterns in zip(("r", "lora_alpha"), PATTERNS))
    if type(r) is not int or r < 1 or type(alpha) not in (int, float):
        stop(f"{folder}: r={r!r} and lora_alpha={alpha!r} in its adapter_config.json")
    return r, alpha * (r**0.5 if c.get("use_rslora") else 1)
