"""Tokenizers as published -> text to ids: tokenizer.json as it is, SentencePiece's tokenizer.model translated by hand,
and in both of them a token that stands for a picture.

    piece      an entry of the vocabulary; its id is its place in the file
    control    a token that no text can become: BOS, end of turn, <image>
    folder     one of tokenizer.json and tokenizer.model; tokenizer_config.json, special_tokens_map.json,
               added_tokens.json where there are any
"""

import json
import re
import struct
from pathlib import Path

import tokenizers

from chat import IMAGE
from config import stop
from formats.strict_json import read_json

PAD = "<pad>"
SPARE = re.compile(r"<\|(image_pad|reserved_special_token_\d+)\|>")  # Qwen and Llama 3 keep these for such as us


# ---- SentencePiece --------------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, WORD, UNUSED, BYTE = range(1, 7)  # kinds of pieces; a WORD is taken whole wherever it stands


def fields(blob):
    """A protobuf message -> [(number of the field, value)]: an int of 64 bits, or the bytes of anything else."""
    at, out = 0, []

    def varint():                                              # seven bits a byte, low ones first; the eighth: go on
        nonlocal at
        n = shift = 0
        while shift < 70:
            byte = blob[at]
            at, n, shift = at + 1, n | (byte & 127) << shift, shift + 7
            if byte < 128:
                return n
        raise ValueError("a number of more than 64 bits")

    while at < len(blob):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            out.append((number, varint()))
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire}")
        size = {1: 8, 5: 4}.get(wire) or varint()
        if at + size > len(blob):
            raise IndexError("the last field is cut off")
        out.append((number, blob[at:at + size]))
        at += size
    return out


def sentencepiece(path):
    """tokenizer.model of Llama 1 and 2, Vicuna, Mistral, TinyLlama -> (what tokenizer.json would say, {role: token}).

    What SentencePiece does by scores is done by ranked merges: of all neighbours whose joint piece is in the vocabulary
    the pair with the best piece is joined, the leftmost first; so each way to halve a piece is a merge, the best piece
    first. That this is the same thing needs what is checked below: no two joint pieces of one score, and every
    character of a joint piece a piece itself. Field numbers: sentencepiece_model.proto.
    """
    try:
        model = fields(path.read_bytes())
        pieces = [dict(fields(value)) for number, value in model if number == 1]
        names = [piece[1].decode("utf-8") for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
        kinds = [piece.get(3, NORMAL) for piece in pieces]
        trainer, normalizer = (dict(fields(dict(model)[number])) for number in (2, 3))
    except OSError as e:
        stop(f"{path} cannot be read: {e.strerror}")
    except (ValueError, LookupError, TypeError, struct.error) as e:
        stop(f"{path} is no whole SentencePiece model ({type(e).__name__}: {e})")

    def refuse(why):
        stop(f"{path}: {why}; if transformers reads it, it can write a tokenizer.json, which is read here as it is")

    if (kind := trainer.get(3, 1)) != 2:
        refuse(f"a model of type {({1: 'unigram', 3: 'word', 4: 'char'}).get(kind, kind)}, only bpe is known here")
    prefix, squeezes, escapes = (normalizer.get(k, 1) for k in (3, 4, 5))
    if normalizer.get(2) or squeezes or not escapes or trainer.get(24):
        refuse("it rewrites text before it splits it (only the identity and a first space are known here)")
    if len(set(names)) < len(names) or not all(names) or " " in "".join(names):
        refuse("pieces that are double, empty or hold a space")
    if kinds.count(UNKNOWN) != 1 or UNUSED in kinds:
        refuse("not one piece for the unknown, or unused ones")
    normal = {name: score for name, score, kind in zip(names, scores, kinds) if kind == NORMAL}
    joint = sorted((name for name in normal if len(name) > 1), key=lambda name: -normal[name])
    if len({normal[name] for name in joint}) < len(joint):
        refuse("pieces of equal score, whose order no list of merges can tell")
    if lost := set("".join(joint)) - normal.keys():
        refuse(f"pieces hold {min(lost)!r}, which is no piece itself")
    if prefix and WORD in kinds:
        refuse("user-defined symbols beside a first space, which would come back after each of them")
    if trainer.get(35) and kinds.count(BYTE) != 256:
        refuse("it falls back on bytes and does not hold all of them")

    first = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None, "post_processor": None,
        "added_tokens": [added(i, name, kind != WORD) | {"normalized": kind == WORD}
                         for i, (name, kind) in enumerate(zip(names, kinds)) if kind in (UNKNOWN, CONTROL, WORD)],
        "normalizer": {"type": "Sequence", "normalizers": [*first, space]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, *strip]},
        "model": {"type": "BPE", "unk_token": names[kinds.index(UNKNOWN)], "fuse_unk": True,
                  "byte_fallback": bool(trainer.get(35)), "vocab": {name: i for i, name in enumerate(names)},
                  "merges": [f"{name[:i]} {name[i:]}" for name in joint for i in range(1, len(name))
                             if name[:i] in normal and name[i:] in normal]}}
    roles = {"bos_token": trainer.get(41, 1), "eos_token": trainer.get(42, 2)}      # an id that is switched off is -1
    return spec, {role: names[i] for role, i in roles.items() if i < len(names) and kinds[i] == CONTROL}


def added(i, content, special=True):
    """An added token, as tokenizer.json spells it: found in the text as it was typed, with no space around it eaten."""
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": special}


# ---- folders --------------------------------------------------------------------------------------------------------

def read_spec(folder):
    """-> (what tokenizer.json says or would say, {role: token})"""
    names = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):              # the later one wins where it speaks
        if (folder / file).is_file():
            names |= {k: v for k, v in read_json(folder / file).items() if v}
    if (folder / "tokenizer.json").is_file():
        return read_json(folder / "tokenizer.json"), names
    if not (folder / "tokenizer.model").is_file():
        stop(f"{folder} holds no tokenizer.json and no tokenizer.model")
    spec, roles = sentencepiece(folder / "tokenizer.model")
    names, vocab = roles | names, spec["model"]["vocab"]
    roles = [word(t) for v in names.values() for t in (v if isinstance(v, list) else [v])]
    more = [(int(i), not t.get("special"), t["content"]) for i, t in names.get("added_tokens_decoder", {}).items()]
    if (folder / "added_tokens.json").is_file():
        more += [(i, name not in roles, name) for name, i in read_json(folder / "added_tokens.json").items()]
    for i, said, name in sorted(more):
        if i == len(vocab):
            vocab[name] = i
            spec["added_tokens"].append(added(i, name, not said))
        elif vocab.get(name) != i:
            stop(f"{folder}: the added token {name!r} has id {i}, but {len(vocab)} is the next that is free")
    return spec, names


def word(token):
    """A token of a config file, which is a string or an object -> str"""
    return token.get("content") if isinstance(token, dict) else token


def vocabulary(spec):
    """-> {piece: id}, added tokens included"""
    own = spec["model"]["vocab"]
    own = own if isinstance(own, dict) else {piece: i for i, (piece, _) in enumerate(own)}      # a list: Unigram
    return own | {t["content"]: t["id"] for t in spec["added_tokens"]}


def name_token(spec, name, fits):
    """Call the first control token that fits `name`; if none does, add a new one -> its id, a line that says which"""
    ids, own = vocabulary(spec), spec["model"]["vocab"]
    spare = [t for t in spec["added_tokens"] if t["special"] and fits(t) and name not in ids]
    if not spare:
        i = ids.get(name, max(ids.values()) + 1)
        spec["added_tokens"].append(added(i, name))
        return i, f"the tokenizer had no {name}: it is new, id {i}"
    token = min(spare, key=lambda t: t["id"])
    old, i = token["content"], token["id"]
    token.update(added(i, name))
    if old in own:                                             # some list their control tokens in both places
        own[name] = own.pop(old)
    return i, f"the tokenizer had no {name}: {old} is called so from now on, id {i}"


def needed(spec, names, image_id=None):
    """Give a tokenizer the tokens of a picture and of padding that it lacks -> (id of one, id of the other, notes).

    A picture's token is `<image>`; else the one with image_id, where a config.json tells it; else one that is kept for
    such as us; else a new one. Padding is a token of its own, neither EOS nor unknown; where it has none and the
    picture had none either, it gets one likewise, as LLaVA-HF's have (32000 and 32001 on Llama 2).
    """
    def spare(t):
        return SPARE.fullmatch(t["content"]) if image_id is None else t["id"] == image_id

    control, notes = {t["content"]: t for t in spec["added_tokens"]}, []
    if IMAGE in control:
        control[IMAGE].update(added(image := control[IMAGE]["id"], IMAGE))
    else:
        image, note = name_token(spec, IMAGE, spare)
        notes.append(note)
    if image_id not in (None, image):
        raise ValueError(f"config.json has {image_id} stand for a picture, here it is {image}")
    eos, unknown = word(names.get("eos_token")), spec["model"].get("unk_token")
    pad = next((control[n]["id"] for n in (word(names.get("pad_token")), PAD, "<|finetune_right_pad_id|>",
                                           "<|endoftext|>") if n in control and n not in (eos, unknown)), None)
    if pad is None and notes:
        pad, note = name_token(spec, PAD, lambda t: SPARE.fullmatch(t["content"]))
        notes.append(note)
    elif pad is None:
        pad = vocabulary(spec).get(unknown, vocabulary(spec).get(eos))
    return image, pad, notes


def blind(spec, roles, *scheme):
    """-> a tokenizer that takes control tokens for text: those flagged, those with a role, and whatever a template may
    insert, for Qwen flags some only. scheme: another one of adding the first space"""
    tokens = [t | {"special": t["special"] or t["content"] in roles
                   or bool(re.fullmatch(r"<\|.*\|>|\[/?INST\]", t["content"]))} for t in spec["added_tokens"]]
    spec = spec | dict(post_processor=None, truncation=None, padding=None, added_tokens=tokens)
    if scheme:
        spec["pre_tokenizer"] = json.loads(json.dumps(spec["pre_tokenizer"]).replace(*scheme))
    tok = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tok.encode_special_tokens = True
    return tok


class Tokenizer:
    """A published tokenizer, built twice: as it is, to look up and decode control tokens, and blind to these, to
    tokenise what people type. Added tokens that control nothing are words, and stay.

    folder: where it lies; image_id: a picture's token, where a config.json tells it
    spec: what tokenizer.json would say; specials: {added token: id}; notes: what was named or added, in words;
    published: how many ids it came with, where len() counts the new ones too
    """

    def __init__(self, folder, image_id=None):
        self.folder = Path(folder)
        try:
            self.spec, names = read_spec(self.folder)
            self.published = max(vocabulary(self.spec).values()) + 1
            self.image, self.pad, self.notes = needed(self.spec, names, image_id)
            self.specials = {t["content"]: t["id"] for t in self.spec["added_tokens"]}
            self.full = tokenizers.Tokenizer.from_str(json.dumps(self.spec))
            if bad := [n for n, i in self.specials.items() if self.full.token_to_id(n) != i]:
                raise ValueError(f"the added token {bad[0]!r} does not get the id that is written there")
            roles = [word(names.get(f"{role}_token")) for role in ("bos", "eos", "pad", "unk")]
            self.plain = self.inner = blind(self.spec, roles)
            split = self.spec.get("pre_tokenizer") or {}
            if any(step.get("prepend_scheme") == "first" for step in split.get("pretokenizers", [split])):
                self.inner = blind(self.spec, roles, '"first"', '"never"')
        except Exception as e:  # tokenizers raises bare Exception
            stop(f"the tokenizer in {folder} cannot be read: {e}")
        self.size = max(vocabulary(self.spec).values()) + 1
        self.bos, self.eos = (self.id(word(names[k])) if k in names else None for k in ("bos_token", "eos_token"))

    def __setstate__(self, state):                             # tokenizers forgets, on the way to another process,
        self.__dict__.update(state)                            # what makes these two blind
        self.plain.encode_special_tokens = self.inner.encode_special_tokens = True

    def __len__(self):
        return self.size

    def id(self, token):
        i = self.full.token_to_id(token) if isinstance(token, str) else None
        if i is None:
            stop(f"the tokenizer in {self.folder} has no token {token!r}; does the template fit this language model?")
        return i

    def text(self, s, first=True):
        """Ids and character spans of plain text; nothing in it is a control token. first: it stands at the beginning of
        everything, where some tokenizers, and only there, add a space."""
        e = (self.plain if first else self.inner).encode(s, add_special_tokens=False)
        return e.ids, e.offsets

    def decode(self, ids):
        return self.full.decode(list(ids), skip_special_tokens=True)
