"""Prompt templates of other systems, as their own processors write them. They are added to chat.TEMPLATES."""

import chat
from chat import IMAGE, Template


def paligemma(p, system, turns):
    """Write all images, BOS, the question, a newline, the answer, EOS. Later questions follow in the same way."""
    p.image(sum(user.count(IMAGE) for user, _ in turns) if p.images else 0).control(p.tok.bos)
    for user, answer in turns:
        p.text((user.replace(IMAGE, "") if p.images else user).strip() + "\n")
        if answer is not None:
            p.text(answer, supervised=True).control(p.tok.eos, supervised=True)


def blip(p, system, turns):
    """All images, BOS, the question; a space, the answer, a newline. An empty question asks for a caption."""
    p.image(sum(user.count(IMAGE) for user, _ in turns) if p.images else 0).control(p.tok.bos)
    for user, answer in turns:
        user = (user.replace(IMAGE, "") if p.images else user).strip()
        p.text(user)
        if answer is not None:
            p.text(" " * bool(user) + answer + "\n", supervised=True)


chat.TEMPLATES |= {"paligemma": Template(paligemma, "", ""), "internvl": Template(chat.chatml, "", "<|im_end|>"),
                   "blip": Template(blip, "", "\n")}
