"""adapter_config.json of a LoRA: which options are supported, the rank and scale of a layer, patterns of layers."""

from config import stop
from formats.strict_json import read_json

# PEFT options that change the forward pass and are refused
REFUSED = ("fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
           "kasa_config", "monteclora_config", "layer_replication", "target_parameters")
# initialisations that leave the base as it is; the others (PiSSA, OLoRA, CorDA ...) change it as well and are refused
INIT = (None, True, False, "gaussian", "eva", "orthogonal")
PATTERNS = ("rank_pattern", "alpha_pattern")


def read_adapter_config(folder):
    """adapter_config.json -> dict. Stops at an option that is not supported."""
    c = read_json(folder / "adapter_config.json")
    for key in REFUSED:
        if c.get(key):
            stop(f"{folder}: {key}={c[key]} is not supported")
    if (how := c.get("init_lora_weights")) not in INIT:
        stop(f"{folder}: init_lora_weights={how} changed the base as well, which is not supported")
    for key in PATTERNS:
        if not isinstance(c.get(key) or {}, dict):
            stop(f"{folder}: {key}={c[key]} is no object with a number for each layer")
        for pattern in c.get(key) or {}:
            try:
                matches(pattern, "")
            except ValueError as e:
                stop(f"{folder}: the pattern {pattern!r:.80} in {key} {e}")
    return c


def rank_and_alpha(folder, c, name=""):
    """The r of a layer, and its alpha such that the adapter is B A times alpha / r. name: of the layer when it was
    trained; the first pattern that matches decides, as in PEFT. rsLoRA means alpha / sqrt(r)."""
    r, alpha = (next((v for p, v in (c.get(patterns) or {}).items() if matches(p, name)), c.get(key))
                for key, patterns in zip(("r", "lora_alpha"), PATTERNS))
    if type(r) is not int or r < 1 or type(alpha) not in (int, float):
        stop(f"{folder}: r={r!r} and lora_alpha={alpha!r} in its adapter_config.json")
    return r, alpha * (r**0.5 if c.get("use_rslora") else 1)


# ---- patterns: PEFT runs `re.match(rf"(.*\.)?({pattern})$", name)`, which a stranger's pattern can keep busy for ever.
# Here a pattern moves a set of positions along the name, so that the time is at most their two lengths multiplied.

def matches(pattern, name):
    """Does the name end in the pattern, from its beginning or from a dot on? Raises a ValueError for what is not
    supported: characters, `.`, `\\d`, `\\.`, [0-9], each also with *, + or ?; ^, $, ( | ) and (?: )."""
    if len(pattern) > 500 or not pattern.isascii():
        raise ValueError("is longer than 500 characters or not ASCII")
    at, ends = alternatives(pattern, 0, name, {0} | {i + 1 for i, c in enumerate(name) if c == "."})
    if at < len(pattern):
        raise ValueError("has a bracket too many")
    return len(name) in ends


def alternatives(p, i, name, starts):
    """Match p[i:], up to a closing bracket, from each of `starts` -> the place of that bracket, where matches end"""
    here, ends = starts, set()
    while i < len(p) and p[i] != ")":
        if p[i] == "|":
            here, ends, i = starts, ends | here, i + 1
        elif p[i] in "^$":
            here, i = here & {0 if p[i] == "^" else len(name)}, i + 1
        elif p[i] == "(":
            i, here = alternatives(p, i + (3 if p[i + 1 : i + 3] == "?:" else 1), name, here)
            if i == len(p) or p[i + 1 : i + 2] in tuple("*+?"):
                raise ValueError("leaves a bracket open or repeats a group, which is not supported")
            i += 1
        else:
            i, chars = character(p, i)
            times, before, new = p[i : i + 1], here, here
            here = set()
            while new := {s + 1 for s in new if s < len(name) and (chars is None or name[s] in chars)} - here:
                here |= new
                if times not in ("*", "+"):
                    break
            here |= before if times in ("*", "?") else set()
            i += times in ("*", "+", "?")
    return i, here | ends


def character(p, i):
    """One character as p[i:] describes it -> where the description ends, the characters that fit (None: all)"""
    if p[i] == "." or p[i].isalnum() or p[i] in "_-":
        return i + 1, None if p[i] == "." else p[i]
    if p[i : i + 2] in (r"\d", r"\.", r"\-", r"\_"):
        return i + 2, "0123456789" if p[i + 1] == "d" else p[i + 1]
    chars, end = p[i + 1 : p.find("]", i)], p.find("]", i) + 1
    if p[i] == "[" and chars.replace("-", "").replace("_", "").isalnum() and chars.strip("-") == chars:
        spans = ((ord(a), ord(z)) for a, dash, z in zip(chars, chars[1:], chars[2:]) if dash == "-")
        return end, {*chars.replace("-", ""), *(chr(n) for a, z in spans for n in range(a, z + 1))}
    raise ValueError(f"holds {p[i : i + 2]!r}, which is not supported")
