"""Published tokenizers: text to ids. SentencePiece's tokenizer.model is first translated into a tokenizer.json.
Each tokenizer gets a placeholder token for images.

    piece            an entry of the vocabulary
    control token    BOS, end of turn, <image> ...: text that a user types never becomes a control token
"""

import json
import re
from pathlib import Path

import tokenizers

from chat import IMAGE
from config import BadSample, Error, stop
from formats.sentencepiece import added_token, read_sentencepiece
from formats.strict_json import read_json

PAD, SPEAKER = "<pad>", "|SPEAKER|"                             # SPEAKER: the image token of Fuyu
RESERVED = re.compile(r"<\|(image_pad|reserved_special_token_\d+)\|>")  # Qwen and Llama 3 reserve these for later use


def read_spec(folder):
    """Read tokenizer.json, or translate tokenizer.model -> content of tokenizer.json, {role: token}, such as
    {"bos_token": "<s>"}"""
    names = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):              # the second file overrides the first
        names |= {k: v for k, v in read_json(folder / file, {}).items() if v}
    if (folder / "tokenizer.json").is_file():
        return read_json(folder / "tokenizer.json"), names
    if not (folder / "tokenizer.model").is_file():
        stop(f"{folder} holds no tokenizer.json and no tokenizer.model")
    spec, roles = read_sentencepiece(folder / "tokenizer.model")
    names, vocab = roles | names, spec["model"]["vocab"]
    roles = [token_text(t) for v in names.values() for t in (v if isinstance(v, list) else [v])]
    added = [(int(i), t["content"], t.get("special")) for i, t in names.get("added_tokens_decoder", {}).items()]
    added += [(i, name, name in roles) for name, i in read_json(folder / "added_tokens.json", {}).items()]
    for i, name, special in sorted(added, key=lambda t: (t[0], not t[2], t[1])):
        if i == len(vocab):
            vocab[name] = i
            spec["added_tokens"].append(added_token(i, name, bool(special)))
        elif vocab.get(name) != i:
            stop(f"{folder}: the added token {name!r} has id {i}, but the next free id is {len(vocab)}")
    return spec, names


def token_text(token):
    """Return the text of a token. In config files, a token is a string or an object with its text."""
    return token.get("content") if isinstance(token, dict) else token


def vocabulary(spec):
    """Return the vocabulary, {piece: id}, with the added tokens."""
    own = spec["model"]["vocab"]
    own = own if isinstance(own, dict) else {piece: i for i, (piece, _) in enumerate(own)}  # Unigram: a list of pairs
    return own | {t["content"]: t["id"] for t in spec["added_tokens"]}


def name_token(spec, name, fits):
    """Give the tokenizer a control token `name` -> its id, a note for the user. A control token t is renamed if fits(t)
    is true. If no control token fits, a new one is added."""
    ids, own = vocabulary(spec), spec["model"]["vocab"]
    reserved = [t for t in spec["added_tokens"] if t["special"] and fits(t) and name not in ids]
    if not reserved:
        i = ids.get(name, max(ids.values()) + 1)
        spec["added_tokens"].append(added_token(i, name))
        return i, f"the tokenizer has no {name}: added with id {i}"
    token = min(reserved, key=lambda t: t["id"])
    old, i = token["content"], token["id"]
    token.update(added_token(i, name))
    if old in own:                                             # in some files the vocabulary also lists control tokens
        own[name] = own.pop(old)
    elif isinstance(own, list) and i < len(own):
        own[i][0] = name
    return i, f"the tokenizer has no {name}: {old}, id {i}, is renamed to it"


def add_missing_tokens(spec, names, image_id=None):
    """Add the tokens for images and for padding if they are missing -> image id, padding id, [notes for the user].

    If `<image>` is missing, a token is renamed to it: the one with id image_id (from config.json) or, if that is None,
    a reserved one. If no token fits, `<image>` is added. A padding token is added only together with `<image>`, as in
    LLaVA-HF. If possible, it is not EOS: programs that ignore padding would also ignore the EOS of answers."""
    def fits(t):
        return RESERVED.fullmatch(t["content"]) if image_id is None else t["id"] == image_id

    pieces = {i: piece for piece, i in vocabulary(spec).items()}
    # Fuyu's image token is an ordinary piece of the vocabulary: make it an added token
    plain = pieces.get(image_id) == SPEAKER and all(t["id"] != image_id for t in spec["added_tokens"])
    if plain:
        spec["added_tokens"].append(added_token(image_id, pieces[image_id]))
    added, notes = {t["content"]: t for t in spec["added_tokens"]}, []
    if IMAGE in added:
        added[IMAGE].update(added_token(image := added[IMAGE]["id"], IMAGE))
    else:
        image, note = name_token(spec, IMAGE, fits)
        notes.append(note)
    if image_id not in (None, image):
        raise ValueError(f"its image token has id {image}, but config.json says {image_id}")
    eos, unknown = token_text(names.get("eos_token")), spec["model"].get("unk_token")
    pad = next((added[n]["id"] for n in (token_text(names.get("pad_token")), PAD, "<|finetune_right_pad_id|>",
                                         "<|endoftext|>") if n in added and n not in (eos, unknown)), None)
    if pad is None and notes and not plain:
        pad, note = name_token(spec, PAD, lambda t: RESERVED.fullmatch(t["content"]))
        notes.append(note)
    elif pad is None:
        pad = vocabulary(spec).get(unknown, vocabulary(spec).get(eos))
    return image, pad, notes


def without_control_tokens(spec, roles, *scheme):
    """Make a tokenizer that treats control tokens as ordinary text. Control tokens are tokens with the flag `special`,
    tokens in `roles`, and tokens like <|...|> or [INST]. The flag alone is not enough: Qwen sets it only for some.
    scheme: nothing, or two texts; the first one is replaced by the second one in `pre_tokenizer`"""
    tokens = [t | {"special": t["special"] or t["content"] in roles
                   or bool(re.fullmatch(r"<\|.*\|>|\[/?INST\]", t["content"]))} for t in spec["added_tokens"]]
    spec = spec | dict(post_processor=None, truncation=None, padding=None, added_tokens=tokens)
    # Unigram: make the pieces of control tokens empty. An empty piece is never found in a text
    if isinstance(vocab := spec["model"]["vocab"], list):
        control = {t["id"] for t in tokens if t["special"]}
        vocab = [["", score] if i in control else [piece, score] for i, (piece, score) in enumerate(vocab)]
        spec["model"] = spec["model"] | {"vocab": vocab}
    if scheme:
        spec["pre_tokenizer"] = json.loads(json.dumps(spec["pre_tokenizer"]).replace(*scheme))
    tok = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tok.encode_special_tokens = True
    return tok


class Tokenizer:
    """A published tokenizer, in three versions. `full` knows control tokens: it looks up and decodes ids. `start` and
    `inside` treat control tokens as text: they encode users' text at the start of a sequence and inside it.

    folder       folder of the tokenizer
    image_id     id of the image token, if config.json has one
    spec         content of tokenizer.json
    specials     {added token: id}
    notes        lines about renamed and added tokens
    published    number of ids in the folder; len() also counts the tokens that this class adds
    """

    def __init__(self, folder, image_id=None):
        self.folder = Path(folder)
        try:
            self.spec, names = read_spec(self.folder)
            self.published = max(vocabulary(self.spec).values()) + 1
            self.image, self.pad, self.notes = add_missing_tokens(self.spec, names, image_id)
            self.size = max(vocabulary(self.spec).values()) + 1
            self.specials = {t["content"]: t["id"] for t in self.spec["added_tokens"]}
            self.full = tokenizers.Tokenizer.from_str(json.dumps(self.spec))
            if wrong := [n for n, i in self.specials.items() if self.full.token_to_id(n) != i]:
                raise ValueError(f"the added token {wrong[0]!r} does not get the id that the file gives it")
            roles = [token_text(names.get(f"{role}_token")) for role in ("bos", "eos", "pad", "unk")]
            self.start = self.inside = without_control_tokens(self.spec, roles)
            split = self.spec.get("pre_tokenizer") or {}
            if any(step.get("prepend_scheme") == "first" for step in split.get("pretokenizers", [split])):
                self.inside = without_control_tokens(self.spec, roles, '"first"', '"never"')
        except Error:
            raise
        except Exception as e:  # the package tokenizers raises plain Exception
            stop(f"the tokenizer in {folder} cannot be read: {(str(e).splitlines() or [type(e).__name__])[0]}")
        self.bos, self.eos = (self.id(token_text(names[k])) if k in names else None for k in ("bos_token", "eos_token"))

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.start.encode_special_tokens = self.inside.encode_special_tokens = True    # set again: pickle loses it

    def __len__(self):
        return self.size

    def id(self, token):
        i = self.full.token_to_id(token) if isinstance(token, str) else None
        if i is None:
            stop(f"the tokenizer in {self.folder} has no token {token!r}; does the template fit this language model?")
        return i

    def text(self, s, first=True):
        """Encode plain text -> ids (no control tokens), [(first character, end)] of each token. first: does the text
        begin the sequence? Some tokenizers add a space only there."""
        try:
            e = (self.start if first else self.inside).encode(s, add_special_tokens=False)
        except BaseException as e:  # a Rust panic is not a subclass of Exception, and its class cannot be imported
            if type(e).__name__ != "PanicException":
                raise
            raise BadSample("the tokenizer failed on a text", str(e).partition("\n")[0]) from None
        return e.ids, e.offsets

    def decode(self, ids):
        return self.full.decode(list(ids), skip_special_tokens=True)
