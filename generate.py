"""Questions about pictures -> answers in words: the one path that sample.py, eval.py and the samples during training
share, with the templates and the image preprocessing of training."""

import sys
from pathlib import Path

import torch

import chat
import engine
from config import BadSample, stop
from formats import configs, hub, llava, peft
from images import load_image, preprocess
from kernels import choose_kernels
from kernels.cross_entropy import IGNORE
from model import logits_head


class Cache:
    """Keys and values of B conversations of at most L tokens: sequence b owns the slots [b L, (b + 1) L), so that a
    span says which part of the cache a query reads, in the prompt and afterwards alike."""

    def __init__(self, B, L):
        self.B, self.L, self.kv, self.slot = B, L, {}, None   # slot (N,): where the tokens of the next forward pass go

    def append(self, layer, k, v):
        if layer not in self.kv:
            self.kv[layer] = tuple(t.new_zeros(self.B * self.L, *t.shape[1:]) for t in (k, v))
        for kept, new in zip(self.kv[layer], (k, v)):
            kept[self.slot] = new
        return self.kv[layer]


@torch.no_grad()
def generate(model, prompts, images, stop, max_new_tokens=64, temperature=0.0, banned=(), seed=0):
    """Continue B ragged prompts. prompts: list of (n_b,) id tensors with Q holes per image; images (I, 3, S, S) uint8,
    in the order of the holes. Ends at an id in `stop`, which is not returned; ids in `banned` (vocabulary padding) are
    never said, nor are holes. Greedy at temperature 0. Returns B lists of ids. Leaves every module's mode and the
    global random state as they were."""
    if not prompts:
        return []
    device = images.device
    training = [m for m in model.modules() if m.training]
    model.eval()
    rng = torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(p) for p in prompts])
    B, L = len(prompts), int(lengths.max()) + max_new_tokens
    cache = Cache(B, L)
    base = torch.arange(B) * L
    ids = torch.cat([p.to(device) for p in prompts])
    pos = torch.cat([torch.arange(n) for n in lengths])
    lo = base.repeat_interleave(lengths)
    last = torch.full((len(pos),), IGNORE)
    last[lengths.cumsum(0) - 1] = 0                           # ask for the logits of each prompt's last token
    said, alive = [[] for _ in prompts], list(range(B))
    banned = torch.tensor(sorted({*banned, model.cfg.image_token_index}), device=device)
    try:
        for _ in range(max_new_tokens):
            cache.slot = (lo + pos).to(device)
            batch = (t.to(device) for t in (last, pos, lo.int(), (lo + pos + 1).int()))
            logits = model(ids, *batch, images, head=logits_head, cache=cache).float()                     # (alive, V)
            logits[:, banned] = -torch.inf
            if temperature > 0:
                ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)[:, 0]
            else:
                ids = logits.argmax(-1)
            words = ids.tolist()
            for b, w in zip(alive, words):
                said[b].append(w)
            keep = [i for i, w in enumerate(words) if w not in stop]
            alive = [alive[i] for i in keep]
            if not alive:
                break
            ids, images = ids[keep], images[:0]
            lo = base[alive]
            pos = lengths[alive] + len(said[alive[0]]) - 1
            last = torch.zeros(len(alive), dtype=torch.long)
    finally:
        for m in training:
            m.training = True
    return [s[:-1] if s and s[-1] in stop else s for s in said]


def load(path, device="auto", dtype="auto", template="", system=None, kernels="auto"):
    """A run folder, its model/ or adapter/, any LLaVA folder or PEFT adapter of one -> Speaker"""
    if not path:
        stop("model is empty: it names a run, its model/ or adapter/, or any LLaVA folder")
    world, path = engine.start(device, dtype), hub.find_folder(path)
    choose_kernels(kernels, world.device)
    if hub.is_adapter(path):
        model, folder = peft.load_merged(path, world.dtype)
    else:
        model, folder = llava.load_model(init=path, dtype=world.dtype)
    template = template or folder.meta.get("template")
    if not template:                                                          # on stdout there are answers alone
        template = "vicuna_v1"
        world.print(f"note: {path} does not say by which template it was trained: asked by {template}; --template= of "
                    f"{', '.join(chat.TEMPLATES)}", file=sys.stderr)
    return Speaker(model.to(world.device), folder, template,
                   folder.meta.get("system") if system is None else system, llava.aspect(folder, model.cfg))


class Speaker:
    """A model with its tokenizer, template and image preprocessing."""

    def __init__(self, model, folder, template, system, aspect):
        self.model, self.tok, self.template, self.system = model, folder.tok, template, system
        self.cfg, self.spec = model.cfg, configs.image_spec(folder.pre, aspect)
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
