"""Turn a conversation into token ids and labels. Both lists are built together, turn by turn.

A template writes a conversation as a list of parts: control tokens (BOS, headers, end of turn), images (a block of ids
each), and text. Control tokens are inserted as ids. Text between two control tokens is tokenised in one piece, by a
tokenizer without control tokens, so a user cannot type a control token. Answers and the tokens that end them are
supervised (the loss counts them). At inference, the ids of a prompt are an exact prefix of the ids in training.

    turns    [(user text, assistant text)]; if the last assistant text is None, the ids end where the answer begins
    ids      list of token ids
    labels   list of the same length: labels[i] is ids[i] where token i is supervised, else IGNORE; not yet shifted
    block    list of the ids of one image: its placeholders, and in some systems other ids around them
"""

import itertools
import os
import re
import sys
from typing import NamedTuple

from config import BadSample, stop
from kernels.cross_entropy import IGNORE

IMAGE = "<image>"  # marks the place of an image in LLaVA's texts; the placeholder token has the same name
LONGEST = 64       # most characters per token: encode() refuses texts longer than LONGEST * max(max_len, 2048)


class Parts:
    """One conversation as parts: ("id", token id, supervised) or ("text", str, supervised). blocks: ids per image"""

    def __init__(self, tok, blocks):
        self.tok, self.images, self.blocks, self.parts = tok, len(blocks), iter(blocks), []

    def control(self, token, supervised=False):
        if token is None:
            stop(f"this template needs a BOS and an EOS token; {self.tok.folder}/tokenizer_config.json names none")
        self.parts.append(("id", token if isinstance(token, int) else self.tok.id(token), supervised))
        return self                                     # `self`, so that calls can be chained: p.control(...).text(...)

    def text(self, s, supervised=False):
        self.parts += [("text", s, supervised)] if s else []
        return self

    def image(self, n=1):
        self.parts += [("id", i, False) for block in itertools.islice(self.blocks, n) for i in block]
        return self

    def user(self, s):
        """Add a user's text. If the sample has images, each <image> marker in the text becomes an image. A single
        marker moves to the front of its turn, as in LLaVA; several markers stay where they are."""
        if not self.images or IMAGE not in s:
            return self.text(s.strip())
        if s.count(IMAGE) == 1:
            s = f"{IMAGE}\n{s.replace(IMAGE, '').strip()}"
        first, *rest = s.strip().split(IMAGE)
        self.text(first)
        for piece in rest:
            self.image().text(piece)
        return self

    def tokenise(self):
        """-> ids, labels. Adjacent text parts are joined before they are tokenised."""
        out = []                                                               # [(id, supervised)]
        for kind, parts in itertools.groupby(self.parts, lambda part: part[0]):
            if kind == "text":
                out += self.tokenise_text([part[1:] for part in parts], first=not out)
            else:
                out += [part[1:] for part in parts]
        return [i for i, _ in out], [i if supervised else IGNORE for i, supervised in out]

    def tokenise_text(self, texts, first):
        """Adjacent text parts [(str, supervised)] -> [(token id, supervised)]. first: do they begin the sequence?"""
        text = "".join(s for s, _ in texts)
        mask = b"".join(bytes([supervised]) * len(s) for s, supervised in texts)  # 1 = supervised character, 0 = not
        if re.search("[\ud800-\udfff]", text):
            raise BadSample("a text holds a lone surrogate, which no encoding allows")
        out = []
        for i, (start, end) in zip(*self.tok.text(text, first)):
            span = mask[start:end]
            if 0 in span and 1 in span:
                raise BadSample("one token holds the end of a prompt and the start of its answer",
                                repr(self.tok.decode([i])))
            out.append((i, 1 in span))
        return out


# ---- templates: each writes turns as its language models expect them ------------------------------------------------

def plain(p, system, turns):
    """Template of stage 1: image, caption, newline. It uses the images of a question, but not its text."""
    if p.tok.bos is not None:                           # Qwen's tokenizers have no BOS token
        p.control(p.tok.bos)
    for user, answer in turns:
        p.image(user.count(IMAGE) if p.images else 0)
        if answer is not None:
            p.text(answer + "\n", supervised=True)


def vicuna_v1(p, system, turns):
    p.control(p.tok.bos).text(system + " " if system else "")
    for user, answer in turns:
        p.text("USER: ").user(user).text(" ASSISTANT:")
        if answer is not None:
            p.text(" " + answer, supervised=True).control(p.tok.eos, supervised=True)


def llama_3(p, system, turns):
    def header(role):
        return p.control("<|start_header_id|>").text(role).control("<|end_header_id|>").text("\n\n")

    p.control("<|begin_of_text|>")
    if system:
        header("system").text(system.strip()).control("<|eot_id|>")
    for user, answer in turns:
        header("user").user(user).control("<|eot_id|>")
        header("assistant")
        if answer is not None:
            p.text(answer, supervised=True).control("<|eot_id|>", supervised=True)


def chatml(p, system, turns):
    def header(role):
        return p.control("<|im_start|>").text(role + "\n")

    if system:
        header("system").text(system).control("<|im_end|>").text("\n")
    for user, answer in turns:
        header("user").user(user).control("<|im_end|>").text("\n")
        header("assistant")
        if answer is not None:
            p.text(answer, supervised=True).control("<|im_end|>", supervised=True).text("\n")


_VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
           "The assistant gives helpful, detailed, and polite answers to the user's questions.")
_LLAVA = ("You are a helpful language and vision assistant. You are able to understand the visual content "
          "that the user provides, and assist the user with a variety of tasks using natural language.")


class Template(NamedTuple):
    write: callable
    system: str           # the default system text
    stop: str             # the token that ends an answer; "" = the tokenizer's EOS; "\n" = any token that has a newline


TEMPLATES = {   # parts/templates.py adds more
    "plain": Template(plain, "", "\n"),
    "vicuna_v1": Template(vicuna_v1, _VICUNA, ""),
    "llama_3": Template(llama_3, _LLAVA, "<|eot_id|>"),
    "chatml": Template(chatml, "You are a helpful assistant.", "<|im_end|>")}


def template(name):
    if name not in TEMPLATES:
        stop(f"unknown template {name!r}: one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def encode(tok, name, turns, blocks=(), system=None, max_len=None):
    """One conversation -> ids, labels, not yet truncated. blocks: the ids of each image; the users' texts must have one
    <image> marker for each (without images, a marker is plain text). system: None = the template's default, "" = none.
    max_len: if a text is far longer, raise BadSample before it is tokenised, to save memory."""
    t = template(name)
    markers = sum(user.count(IMAGE) for user, _ in turns)
    if blocks and markers != len(blocks):
        raise BadSample(f"not as many {IMAGE} markers as images", f"{len(blocks)} image(s) but {markers} marker(s)")
    size = sum(len(user) + len(answer or "") for user, answer in turns)
    if max_len is not None and size > LONGEST * max(max_len, 2048):
        raise BadSample("far longer than max_len", f"{size:,} characters, max_len={max_len} tokens")
    p = Parts(tok, blocks)
    t.write(p, t.system if system is None else system, [(u, a if a is None else a.strip()) for u, a in turns])
    return p.tokenise()


def end_of_turn(tok, name):
    """-> id of the token that ends an answer, or None if there is none. In a published model, this token is the EOS"""
    end = template(name).stop
    return tok.eos if end in ("", "\n") else tok.id(end)


def stop_ids(tok, name):
    """-> the set of token ids at which generation stops"""
    if template(name).stop == "\n":
        return {i for i in range(len(tok)) if "\n" in tok.full.decode([i], skip_special_tokens=False) or i == tok.eos}
    return {end_of_turn(tok, name)} - {None}


def truncate(ids, labels, blocks, image_id, max_len):
    """Keep at most max_len tokens, and only whole images -> ids, labels, images kept. blocks: as in encode()"""
    n, kept, end = max_len, 0, 0                     # end: index behind the last image that is kept
    for block in blocks:
        begin = ids.index(image_id, end) - block.index(image_id)
        if begin + len(block) > max_len:
            n = min(n, begin)
            break
        kept, end = kept + 1, begin + len(block)
    return ids[:n], labels[:n], kept


# ---- looking at the loss mask ---------------------------------------------------------------------------------------

def printable(s):
    """Make text safe to print on a terminal: control characters and changes of writing direction are escaped."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda m: repr(m[0])[1:-1], s)


def show(tok, ids, labels, image_id, file=None):
    """Print a sample and its loss mask: supervised tokens are in [[ ]], and green on a terminal."""
    file = file or sys.stdout
    coloured = file.isatty() and not os.environ.get("NO_COLOR")
    # an id of 2**24 or more is a placeholder, too: parts/tiles.Anyres writes the grid of an image into it
    names = {i: t for t, i in tok.specials.items()} | {i: IMAGE for i in ids if i == image_id or i >> 24}
    for supervised, pairs in itertools.groupby(zip(ids, labels), lambda pair: pair[1] != IGNORE):
        text = ""
        for name, run in itertools.groupby([i for i, _ in pairs], names.get):
            run = list(run)
            text += f"[{len(run)} x image]" if name == IMAGE else name * len(run) if name else tok.full.decode(run)
        text = f"[[{printable(text)}]]" if supervised else printable(text)
        print(f"\033[{32 if supervised else 90}m{text}\033[0m" if coloured else text, end="", file=file)
    print(file=file)
