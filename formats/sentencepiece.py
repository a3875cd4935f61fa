"""Translate SentencePiece's tokenizer.model (Llama 1 and 2, Vicuna, Mistral, TinyLlama) into a tokenizer.json.

SentencePiece merges the two neighbours that together form the piece with the highest score. tokenizer.json has a ranked
list of merges. Our list has every way to split a piece into two pieces, sorted by the score of the piece. Then both
tokenizers give the same ids if no two pieces of several characters have equal scores, and if every character of a piece
is also a piece. Other models are refused. The numbers of fields are those in sentencepiece_model.proto.
"""

import io
import struct

from config import stop

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces; USER_DEFINED ones are never split


def protobuf_fields(blob):
    """Read a protobuf message -> [(field number, value)]. A value is an int of up to 64 bits; other types are bytes."""
    file, out = io.BytesIO(blob), []

    def varint():
        # each byte has 7 bits of the integer, the lowest bits first. Its top bit is set if another byte follows
        n = 0
        for shift in range(0, 70, 7):
            byte, = file.read(1)
            n |= (byte & 127) << shift
            if byte < 128:
                return n
        raise ValueError("an integer of more than 64 bits")

    while file.tell() < len(blob):
        number, wire = divmod(varint(), 8)
        if wire not in (0, 1, 2, 5):
            raise ValueError(f"wire type {wire}")
        # a value of wire type 1 has 8 bytes, one of type 5 has 4. For type 2, the size comes first, as an integer. For
        # type 0, this integer is the value itself
        size = {1: 8, 5: 4}.get(wire, 0) or varint()
        if wire and file.tell() + size > len(blob):
            raise ValueError("the last field is cut off")
        out.append((number, file.read(size) if wire else size))
    return out


def read_sentencepiece(path):
    """Read and translate a tokenizer.model -> content of a tokenizer.json, {"bos_token": token, "eos_token": token}."""
    try:
        model = protobuf_fields(path.read_bytes())
        pieces = [dict(protobuf_fields(value)) for number, value in model if number == 1]
        names = [piece[1].decode("utf-8") for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
        types = [piece.get(3, NORMAL) for piece in pieces]
        trainer, normalizer = (dict(protobuf_fields(dict(model)[number])) for number in (2, 3))
    except OSError as e:
        stop(f"{path} cannot be read: {e.strerror}")
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as e:
        stop(f"{path} is not a complete SentencePiece model ({type(e).__name__}: {e})")

    first_space, squeezes, escapes = (normalizer.get(k, 1) for k in (3, 4, 5))
    normal = {name: score for name, score, kind in zip(names, scores, types) if kind == NORMAL}
    merged = sorted((name for name in normal if len(name) > 1), key=lambda name: -normal[name])
    refused = {
        "its model type is not bpe": trainer.get(3, 1) != 2,
        "it rewrites text before it splits it; only a first space is supported":
            normalizer.get(2) or squeezes or not escapes or trainer.get(24),
        "duplicate or empty pieces, or pieces with a space":
            len(set(names)) < len(names) or not all(names) or " " in "".join(names),
        "more or less than one unknown piece, or unused pieces": types.count(UNKNOWN) != 1 or UNUSED in types,
        "pieces of equal score, whose order a list of merges cannot express":
            len({normal[name] for name in merged}) < len(merged),
        "some pieces have characters that are no pieces": set("".join(merged)) - normal.keys(),
        "user-defined pieces and a first space, which would be added again after each of them":
            first_space and USER_DEFINED in types,
        "it falls back on bytes but does not hold all 256": trainer.get(35) and types.count(BYTE) != 256}
    if why := next((why for why, applies in refused.items() if applies), None):
        stop(f"{path}: {why}; where transformers reads it, save_pretrained writes a tokenizer.json for it")

    prepend, strip = {"type": "Prepend", "prepend": "▁"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    space, back = ({"type": "Replace", "pattern": {"String": a}, "content": b} for a, b in (" ▁", "▁ "))
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None, "post_processor": None,
        "added_tokens": [added_token(i, name, kind != USER_DEFINED) | {"normalized": kind == USER_DEFINED}
                         for i, (name, kind) in enumerate(zip(names, types))
                         if kind in (UNKNOWN, CONTROL, USER_DEFINED)],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, space] if first_space else [space]},
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
                    + [strip] * bool(first_space)},
        "model": {"type": "BPE", "unk_token": names[types.index(UNKNOWN)], "fuse_unk": True,
                  "byte_fallback": bool(trainer.get(35)), "vocab": {name: i for i, name in enumerate(names)},
                  "merges": [f"{name[:i]} {name[i:]}" for name in merged for i in range(1, len(name))
                             if name[:i] in normal and name[i:] in normal]}}
    roles = {"bos_token": trainer.get(41, 1), "eos_token": trainer.get(42, 2)}  # id -1 (read as 2**64 - 1): no token
    return spec, {role: names[i] for role, i in roles.items() if i < len(names) and types[i] == CONTROL}


def added_token(i, content, special=True):
    """Make an entry of added_tokens in tokenizer.json. The token is exactly `content`, without spaces around it."""
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": special}
