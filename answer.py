"""Questions about pictures -> answers in words: the one path that sample.py, eval.py and the samples during training
share, with the templates and the image preprocessing of training."""

import sys
from pathlib import Path

import torch

import chat
import engine
import hf
import lora
from config import stop
from data import BadSample, load_image, preprocess
from kernels import choose_kernels
from model import generate


def load(path, device="auto", dtype="auto", template="", system=None, kernels="auto"):
    """A run folder, its model/ or adapter/, any LLaVA folder or PEFT adapter of one -> Speaker"""
    if not path:
        stop("model is empty: it names a run, its model/ or adapter/, or any LLaVA folder")
    world, path = engine.start(device, dtype), hf.find(path)
    choose_kernels(kernels, world.device)
    if hf.is_adapter(path):
        model, folder = lora.load_merged(path, world.dtype)
    else:
        model, folder = hf.load(init=path, dtype=world.dtype)
    template = template or folder.meta.get("template")
    if not template:                                                          # on stdout there are answers alone
        template = "vicuna_v1"
        world.print(f"note: {path} does not say by which template it was trained: asked by {template}; --template= of "
                    f"{', '.join(chat.TEMPLATES)}", file=sys.stderr)
    return Speaker(model.to(world.device), folder, template,
                   folder.meta.get("system") if system is None else system, hf.aspect(folder, model.cfg))


class Speaker:
    """A model with its tokenizer, template and image preprocessing."""

    def __init__(self, model, folder, template, system, aspect):
        self.model, self.tok, self.template, self.system = model, folder.tok, template, system
        self.cfg, self.spec = model.cfg, hf.image_spec(folder.pre, aspect)
        self.stop = chat.stop_ids(self.tok, template)
        self.banned = {self.cfg.image_token_index, *range(len(self.tok), self.cfg.text.vocab_size)}

    def picture(self, path):
        """A file -> (3, S, S) uint8; what is wrong with it, in one line, otherwise."""
        if not Path(path).is_file():
            raise BadSample(f"there is no image file {path}")
        return preprocess(load_image(path), self.spec)

    def prompt(self, turns, images):
        """turns [(user, assistant)], the last assistant None, with `images` pictures -> (n,) ids"""
        Q = self.cfg.vision.patches
        ids, _ = chat.encode(self.tok, self.template, turns, images, self.cfg.image_token_index, Q, self.system)
        return torch.tensor(ids)

    def say(self, prompts, pictures, max_new_tokens=64, temperature=0.0, seed=0):
        """Ragged prompts (n_b,) and all their pictures in order, each (3, S, S) -> answers"""
        S = self.cfg.vision.image_size
        images = torch.stack(pictures) if pictures else torch.zeros(0, 3, S, S, dtype=torch.uint8)
        said = generate(self.model, prompts, images.to(next(self.model.parameters()).device), self.stop,
                        max_new_tokens, temperature, self.banned, seed)
        texts = [self.tok.decode(ids) for ids in said]
        return [(t.split("\n")[0] if self.template == "plain" else t).strip() for t in texts]


def with_marker(text, images=1):
    """A question that does not say where its picture stands gets it in front."""
    return text if chat.IMAGE in text or not images else f"{chat.IMAGE}\n" * images + text
