"""Conversations to token ids and labels, made together, turn by turn.

A template writes a script of three kinds of parts: control tokens (BOS, end of turn, header tokens: inserted as ids),
images (Q holes each), and text. Text between two control tokens is tokenised in one piece by a tokenizer that knows no
control tokens, so nobody can type one; what is learnt is decided by characters: the assistant's words, and the end of
their turn. Hence: no searching of rendered text, and the prompt at inference is an exact prefix of what was trained.

    turns: list of (user, assistant); assistant None in the last one = write the prompt of its answer
    ids, labels: lists of equal length; labels[i] is ids[i] where that is to be learnt, else -100 (not yet shifted)
"""

import itertools
import re
from typing import NamedTuple

from config import BadSample, stop
from kernels.cross_entropy import IGNORE

IMAGE = "<image>"  # the marker of LLaVA's data files; a tokenizer's token for an image has the same name


class Script:
    """The parts of one conversation as a template writes them: ("id", id, learn), ("image",), ("text", str, learn)."""

    def __init__(self, tok, images):
        self.tok, self.images, self.parts = tok, images, []

    def control(self, token, learn=False):
        if token is None:
            stop(f"this template needs a BOS and an EOS token; {self.tok.folder}/tokenizer_config.json names none")
        self.parts.append(("id", token if isinstance(token, int) else self.tok.id(token), learn))

    def mark(self, s):
        """Words around a turn that some tokenizers know as control tokens (Mistral's, from its third version on)."""
        self.control(s) if s in self.tok.specials else self.text(s)

    def text(self, s, learn=False):
        if s:
            self.parts.append(("text", s, learn))

    def user(self, s):
        """What a person said. Markers count as pictures only in a sample that has pictures; a single one moves to the
        front of its turn, as in LLaVA; several stay where they were written."""
        if not self.images or IMAGE not in s:
            return self.text(s.strip())
        if s.count(IMAGE) == 1:
            rest = s.replace(IMAGE, "").strip()
            s = f"{IMAGE}\n{rest}" if rest else IMAGE
        pieces = s.strip().split(IMAGE)
        for i, piece in enumerate(pieces):
            if i:
                self.parts.append(("image",))
            self.text(piece)

    def ids(self, image_id, image_tokens):
        """-> ids, labels. Neighbouring texts are joined before they are tokenised."""
        ids, labels, texts = [], [], []

        def flush():
            learnt = b"".join(bytes([learn]) * len(s) for s, learn in texts)  # one byte per character
            whole = "".join(s for s, _ in texts)
            if re.search("[\ud800-\udfff]", whole):
                raise BadSample("a text holds a lone surrogate, which no encoding knows")
            new, offsets = self.tok.text(whole, first=not ids)
            for i, (a, b) in zip(new, offsets):
                touched = learnt[a:b]
                if 0 in touched and 1 in touched:
                    raise BadSample("an answer's first token reaches back into its prompt", repr(self.tok.decode([i])))
                ids.append(i)
                labels.append(i if 1 in touched else IGNORE)
            texts.clear()

        for kind, *rest in self.parts:
            if kind == "text":
                texts.append(rest)
                continue
            flush()
            if kind == "image":
                ids.extend([image_id] * image_tokens)
                labels.extend([IGNORE] * image_tokens)
            else:
                ids.append(rest[0])
                labels.append(rest[0] if rest[1] else IGNORE)
        flush()
        return ids, labels


# ---- templates: each writes turns as the model in question expects them ---------------------------------------------

def plain(w, system, turns):
    """Stage 1: picture, caption, newline. What the person said is not read, only its pictures."""
    if w.tok.bos is not None:                           # Qwen has none
        w.control(w.tok.bos)
    for user, answer in turns:
        for _ in range(user.count(IMAGE) if w.images else 0):
            w.parts.append(("image",))
        if answer is not None:
            w.text(answer + "\n", learn=True)


def vicuna_v1(w, system, turns):
    w.control(w.tok.bos)
    w.text(system + " " if system else "")
    for user, answer in turns:
        w.text("USER: ")
        w.user(user)
        w.text(" ASSISTANT:")
        if answer is not None:
            w.text(" " + answer, learn=True)
            w.control(w.tok.eos, learn=True)


def llava_llama_2(w, system, turns, bos_each_turn=True):
    for i, (user, answer) in enumerate(turns):
        if i == 0 or bos_each_turn:
            w.control(w.tok.bos)
        w.mark("[INST]")
        w.text(" ")
        w.text(f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and i == 0 else "")
        w.user(user)
        w.text(" ")
        w.mark("[/INST]")
        if answer is not None:
            w.text(" " + answer + " ", learn=True)
            w.control(w.tok.eos, learn=True)


def mistral(w, system, turns):
    llava_llama_2(w, system, turns, bos_each_turn=False)


def llama_3(w, system, turns):
    def header(role):
        w.control("<|start_header_id|>")
        w.text(role)
        w.control("<|end_header_id|>")
        w.text("\n\n")

    w.control("<|begin_of_text|>")
    if system:
        header("system")
        w.text(system.strip())
        w.control("<|eot_id|>")
    for user, answer in turns:
        header("user")
        w.user(user)
        w.control("<|eot_id|>")
        header("assistant")
        if answer is not None:
            w.text(answer, learn=True)
            w.control("<|eot_id|>", learn=True)


def chatml(w, system, turns):
    def begin(role):
        w.control("<|im_start|>")
        w.text(role + "\n")

    if system:
        begin("system")
        w.text(system)
        w.control("<|im_end|>")
        w.text("\n")
    for user, answer in turns:
        begin("user")
        w.user(user)
        w.control("<|im_end|>")
        w.text("\n")
        begin("assistant")
        if answer is not None:
            w.text(answer, learn=True)
            w.control("<|im_end|>", learn=True)
            w.text("\n")


class Template(NamedTuple):
    write: callable
    system: str           # the default
    stop: str             # the token that ends an answer; "" = the tokenizer's EOS; "\n" = any token that holds one
    jinja: tuple          # what it writes, as jinja: at the beginning, for a user, for an answer, to ask for one


_VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
           "The assistant gives helpful, detailed, and polite answers to the user's questions.")
_LLAVA = ("You are a helpful language and vision assistant. You are able to understand the visual content "
          "that the user provides, and assist the user with a variety of tasks using natural language.")

# what stands between these is learnt, as encode labels it: of it transformers makes return_assistant_tokens_mask
LEARN, LEARNT = "{% generation %}", "{% endgeneration %}"
_INST = "[INST] {% if system and ns.first %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ user }} [/INST]"
_SYSTEM, _USER, _ASSISTANT = (f"<|start_header_id|>{r}<|end_header_id|>\n\n" for r in ("system", "user", "assistant"))

TEMPLATES = {
    "plain": Template(plain, "", "\n", (
        "{{ bos_token }}", "{{ '<image>' * images }}", LEARN + "{{ answer }}\n" + LEARNT, "")),
    "vicuna_v1": Template(vicuna_v1, _VICUNA, "", (
        "{{ bos_token }}{% if system %}{{ system + ' ' }}{% endif %}", "USER: {{ user }}",
        " ASSISTANT:" + LEARN + " {{ answer }}{{ eos_token }}" + LEARNT, " ASSISTANT:")),
    "llava_llama_2": Template(llava_llama_2, _LLAVA, "", (
        "", "{{ bos_token }}" + _INST, LEARN + " {{ answer }} {{ eos_token }}" + LEARNT, "")),
    "llama_3": Template(llama_3, _LLAVA, "<|eot_id|>", (
        "<|begin_of_text|>{% if system %}" + _SYSTEM + "{{ system | trim }}<|eot_id|>{% endif %}",
        _USER + "{{ user }}<|eot_id|>", _ASSISTANT + LEARN + "{{ answer }}<|eot_id|>" + LEARNT, _ASSISTANT)),
    "chatml": Template(chatml, "You are a helpful assistant.", "<|im_end|>", (
        "{% if system %}<|im_start|>system\n{{ system }}<|im_end|>\n{% endif %}",
        "<|im_start|>user\n{{ user }}<|im_end|>\n",
        "<|im_start|>assistant\n" + LEARN + "{{ answer }}<|im_end|>" + LEARNT + "{{ '\\n' }}",
        "<|im_start|>assistant\n")),
    "mistral": Template(mistral, "", "", (
        "{{ bos_token }}", _INST, LEARN + " {{ answer }} {{ eos_token }}" + LEARNT, "")),
}


def template(name):
    if name not in TEMPLATES:
        stop(f"unknown template {name!r}: one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def encode(tok, name, turns, images, image_id, image_tokens, system=None):
    """turns of one conversation with `images` pictures -> (ids, labels). system None = the template's own; "" = none.
    The users' texts must hold a marker for each picture; without pictures a marker is text like any other."""
    t = template(name)
    if images:
        marks = sum(user.count(IMAGE) for user, _ in turns)
        if marks != images:
            raise BadSample(f"not as many {IMAGE} markers as images", f"{images} image(s) but {marks} marker(s)")
    w = Script(tok, images)
    t.write(w, t.system if system is None else system, [(u, a if a is None else a.strip()) for u, a in turns])
    return w.ids(image_id, image_tokens)


def stop_ids(tok, name):
    """The ids that end an answer under a template."""
    end = template(name).stop
    if end == "\n":
        return {i for i in range(len(tok)) if "\n" in tok.full.decode([i], skip_special_tokens=False)}
    return {tok.id(end) if end else tok.eos} - {None}


def truncate(ids, labels, image_id, image_tokens, max_len):
    """Keep at most max_len tokens, and no part of an image -> ids, labels, images kept."""
    n = min(len(ids), max_len)
    if n < len(ids) and ids[n] == image_id:                            # the cut may lie inside an image block
        first = n
        while first and ids[first - 1] == image_id:
            first -= 1
        n = first + (n - first) // image_tokens * image_tokens         # blocks may touch: keep the whole ones
    ids, labels = ids[:n], labels[:n]
    return ids, labels, ids.count(image_id) // image_tokens


def show(tok, ids, labels, image_id, file=None):
    """Print a sample with its mask: learnt tokens green, the rest grey, control tokens and images named."""
    names = {v: k for k, v in tok.specials.items()} | {image_id: IMAGE}
    out = []
    for (name, learnt), run in itertools.groupby(zip(ids, labels), lambda t: (names.get(t[0]), t[1] != IGNORE)):
        run = [i for i, _ in run]
        if run[0] == image_id:
            s = f"[{len(run)} x image]"
        else:
            s = name * len(run) if name else tok.full.decode(run)
        out.append(f"\033[{32 if learnt else 90}m{s}\033[0m")
    print("".join(out), file=file)
