"""Answer one request of tools/serve.py: the text as it grows, stop texts, log-probabilities."""

import io
import re
from typing import NamedTuple

import torch
from PIL import Image

import chat as templates
from config import BadSample
from formats.image_files import FORMATS
from tools.attention import read_again
from tools.look import piece_text, record
from tools.serve_request import Refusal


class Gone(Exception):
    """The client has left, or the server ends."""


def open_image(data, number):
    """Bytes of an image file -> PIL image, not decoded yet"""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as e:                                     # Pillow raises many exception types on a broken file
        raise BadSample("image cannot be read", f"number {number} ({type(e).__name__})") from None


# ---- text as it grows -----------------------------------------------------------------------------------------------

def text_so_far(chat, ids):
    """Ids of an unfinished answer -> its text, without the end that a later token may still change: the bytes of an
    unfinished character. Byte-level tokenizers decode them to U+FFFD; others have tokens of one byte, <0x0A>, and read
    adjacent ones together, even if a control token stands between them"""
    tok, n = chat.tok, len(ids)
    while n and (re.fullmatch("<0x..>", piece := tok.full.id_to_token(ids[n - 1]) or "") or piece in tok.specials):
        n -= 1
    return tok.decode(ids[:n]).strip().rstrip("\ufffd").rstrip()


def before_stop(text, stops):
    """-> the text before the first of the stop texts, was there one?"""
    at = min((i for i in map(text.find, stops) if i >= 0), default=None)
    return text[:at], at is not None


def certain(text, stops):
    """-> `text` without an end that may become a stop text"""
    for n in range(min(len(text), max(map(len, stops), default=0)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stops):
            return text[:-n]
    return text


# ---- answers -------------------------------------------------------------------------------------------------------

class Answer(NamedTuple):
    text: str
    finish: str                # stop or length
    prompt_tokens: int
    tokens: int                # of the answer, with the token that ended it
    extra: dict                # logprobs, look


def answer_request(chat, asked, s, begin, emit, left):
    """Answer one request. begin(): called once the request is found good. emit(piece): called with each new piece of
    the text. left(): has the client left? Then Gone is raised. -> Answer"""
    tiles, blocks = chat.look([open_image(data, i) for i, data in enumerate(asked.images, 1)])
    system = chat.system if asked.system is None else asked.system
    prompt = templates.encode(chat.tok, chat.template, asked.turns, blocks, system)[0]
    room = chat.cfg.text.max_position_embeddings - len(prompt)
    if room < (asked.max_tokens or 1):
        raise Refusal(400, f"{len(prompt)} tokens of the prompt and {asked.max_tokens or 1} of the answer are more "
                      f"than the {room + len(prompt)} of this model", "messages", "context_length_exceeded")
    most, prompt = asked.max_tokens or min(room, s.max_new_tokens), torch.tensor(prompt)
    begin()
    sent, steps = "", []

    def each(answers):
        nonlocal sent
        if left():
            raise Gone
        steps[:] = answers[0]
        text, found = before_stop(text_so_far(chat, without_end(chat, steps)), asked.stop)
        ready = text if found else certain(text, asked.stop)
        if ready.startswith(sent) and len(ready) > len(sent):
            emit(ready[len(sent):])
            sent = ready
        return found

    whole, = chat.answers([prompt], tiles, most, asked.temperature, asked.seed, each)
    whole, found = before_stop(whole, asked.stop)
    if len(whole) > len(sent):
        emit(whole[len(sent):])
    ids, extra = without_end(chat, steps), {}
    if asked.top_logprobs is not None:
        n = next((n for n in range(len(ids)) if len(chat.tok.decode(ids[:n]).strip()) >= len(whole)), len(ids))
        extra["logprobs"] = {"content": log_probabilities(chat, prompt, ids[:n], tiles, asked.top_logprobs)}
    if asked.look:
        extra["look"] = record(chat, prompt, steps, tiles, blocks)
    finish = "stop" if found or len(ids) < len(steps) else "length"
    return Answer(whole, finish, len(prompt), len(steps), extra)


def without_end(chat, ids):
    """-> ids without the stop token, if they end with one"""
    return ids[:-1] if ids and ids[-1] in chat.stop_ids else ids


def log_probabilities(chat, prompt, ids, tiles, top):
    """-> OpenAI's list: for each token its log-probability, and those of the `top` most probable tokens"""
    def row(text, p):
        return {"token": text, "logprob": max(float(p.log()), -9999.0), "bytes": list(text.encode("utf-8", "replace"))}

    p = read_again(chat, prompt, ids, tiles)[0] if ids else []
    return [row(piece_text(chat.tok, ids[:t], i), p[t, i]) | {"top_logprobs": [
        row(piece_text(chat.tok, ids[:t], int(j)), p[t, j]) for j in p[t].topk(top).indices]}
        for t, i in enumerate(ids)]
