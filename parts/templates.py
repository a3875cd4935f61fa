"""Templates of other systems and language models, as their own processors write them; added to chat.TEMPLATES."""

from functools import partial

import chat
from chat import IMAGE, Template


def llava_llama_2(p, system, turns, bos_each_turn=True):
    """LLaVA with Llama 2, and with Mistral. [INST] is a control token if the tokenizer has it (Mistral since version
    3), else text."""
    def tag(s):
        return p.control(s) if s in p.tok.specials else p.text(s)

    for i, (user, answer) in enumerate(turns):
        if i == 0 or bos_each_turn:
            p.control(p.tok.bos)
        tag("[INST]").text(" ").text(f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and i == 0 else "")
        p.user(user).text(" ")
        tag("[/INST]")
        if answer is not None:
            p.text(" " + answer + " ", supervised=True).control(p.tok.eos, supervised=True)


def document(p, system, turns):
    """A document (MM1, arXiv 2403.09611, section 3.2; Flamingo's M3W): BOS, text with images between the words, EOS.
    All of its text is supervised. Rows with a text and no conversation use this template, whatever the run's own is. A
    prompt is the beginning of a document: examples with images, and the model goes on."""
    if p.tok.bos is not None:
        p.control(p.tok.bos)
    for text, end in turns:
        first, *rest = text.split(IMAGE) if p.images else [text]
        p.text(first, supervised=True)
        for piece in rest:
            p.image().text(piece, supervised=True)
        if end is not None:
            p.control(p.tok.eos, supervised=True)


def paligemma(p, system, turns):
    """Write all images, BOS, the question, a newline, the answer, EOS. Later questions follow in the same way."""
    p.image(sum(user.count(IMAGE) for user, _ in turns) if p.images else 0).control(p.tok.bos)
    for user, answer in turns:
        p.text((user.replace(IMAGE, "") if p.images else user).strip() + "\n")
        if answer is not None:
            p.text(answer, supervised=True).control(p.tok.eos, supervised=True)


def blip(p, system, turns, newline=True):
    """All images, BOS, the question; a space, the answer, a newline. An empty question asks for a caption.
    InstructBLIP has EOS in place of the newline."""
    p.image(sum(user.count(IMAGE) for user, _ in turns) if p.images else 0).control(p.tok.bos)
    for user, answer in turns:
        user = (user.replace(IMAGE, "") if p.images else user).strip()
        p.text(user)
        if answer is not None:
            p.text(" " * bool(user) + answer + "\n" * newline, supervised=True)
            if not newline:
                p.control(p.tok.eos, supervised=True)


def fuyu(p, system, turns):
    """All images, <s>; a question, <0x04>, the answer, EOS. Later questions follow in the same way."""
    p.image(sum(user.count(IMAGE) for user, _ in turns) if p.images else 0).control("<s>")
    for user, answer in turns:
        p.text((user.replace(IMAGE, "") if p.images else user).strip()).control("<0x04>")
        if answer is not None:
            p.text(answer, supervised=True).control(p.tok.eos, supervised=True)


def llava_v0(p, system, turns):
    """LLaVA v1 and VipLlava: BOS, system, ###Human: and the question, ###Assistant: and the answer, EOS."""
    p.control(p.tok.bos).text(system)
    for user, answer in turns:
        p.text("###Human: ").user(user).text("###Assistant:")
        if answer is not None:
            p.text(" " + answer, supervised=True).control(p.tok.eos, supervised=True)


def idefics(p, system, turns):
    """BOS, "User:" and the question with its images, a newline, "Assistant:" and the answer, a newline. A token
    <fake_token_around_image> stands before, between and after images; IdeficsProcessor strips the text between them."""
    fake = "<fake_token_around_image>"
    p.control(p.tok.bos)
    for user, answer in turns:
        first, *rest = [piece.strip() for piece in user.split(IMAGE)] if p.images else [user.strip()]
        p.text("User:" + " " * bool(first) + first)
        for n, piece in enumerate(rest):
            if n == 0 or rest[n - 1]:                          # adjacent images share one of these tokens
                p.control(fake)
            p.image().control(fake).text(piece)
        p.text("\nAssistant:")
        if answer is not None:
            p.text(" " + answer + "\n", supervised=True)


def idefics3(p, system, turns):
    """Idefics3 and SmolVLM: BOS, "User:" and the question with its images, <end_of_utterance>, a newline, "Assistant:"
    and the answer, <end_of_utterance>, a newline. Images stay where they are; the text between them is stripped."""
    end = "<end_of_utterance>"
    p.control(p.tok.bos)
    if system:
        p.text("System: " + system).control(end).text("\n")
    for user, answer in turns:
        first, *rest = [piece.strip() for piece in user.split(IMAGE)] if p.images else [user.strip()]
        p.text("User:" + " " * bool(first) + first)
        for piece in rest:
            p.image().text(piece)
        p.control(end).text("\nAssistant:")
        if answer is not None:
            p.text(" " + answer, supervised=True).control(end, supervised=True).text("\n")


def flamingo(p, system, turns):
    """Flamingo's prompt (arXiv 2204.14198, appendix A.3): images, Question: ... Answer: ... and the end of a chunk,
    which is EOS here"""
    p.control(p.tok.bos)
    for user, answer in turns:
        p.image(user.count(IMAGE) if p.images else 0)
        p.text("Question: " + (user.replace(IMAGE, "") if p.images else user).strip() + " Answer:")
        if answer is not None:
            p.text(" " + answer, supervised=True).control(p.tok.eos, supervised=True)


def visualchat(p, system, turns):
    """DeepSpeed-VisualChat (arXiv 2309.14327, section 3, and utils/data/DST.py of its code): every turn begins with BOS
    and its images, numbered in the whole conversation. These words are text: as control tokens they made answers worse.
    """
    images = 0
    for i, (user, answer) in enumerate(turns):
        p.control(p.tok.bos).text(system + "\n\n" if system and i == 0 else "")
        n = user.count(IMAGE) if p.images else 0
        for _ in range(n):
            images += 1
            p.text(f"### Image {images}:\n").image().text("\n")
        question = (user.replace(IMAGE, "") if p.images else user).strip()
        p.text("\n" * bool(n) + f"### Question:\n{question}\n\n### Answer:\n")
        if answer is not None:
            p.text(answer, supervised=True).control(p.tok.eos, supervised=True)


_V0 = ("A chat between a curious human and an artificial intelligence assistant. "
       "The assistant gives helpful, detailed, and polite answers to the human's questions.")
_LLAVA = chat.TEMPLATES["llama_3"].system
chat.TEMPLATES |= {
    "llava_llama_2": Template(llava_llama_2, _LLAVA, ""),
    "mistral": Template(partial(llava_llama_2, bos_each_turn=False), "", ""),
    "llava_v0": Template(llava_v0, _V0, ""), "visualchat": Template(visualchat, _LLAVA, ""),
    "paligemma": Template(paligemma, "", ""), "internvl": Template(chat.chatml, "", "<|im_end|>"),
    "blip": Template(blip, "", "\n"), "instructblip": Template(partial(blip, newline=False), "", ""),
    "idefics": Template(idefics, "", "\n"), "idefics3": Template(idefics3, "", "<end_of_utterance>"),
    "flamingo": Template(flamingo, "", ""), "fuyu": Template(fuyu, "", ""), "document": Template(document, "", "")}
