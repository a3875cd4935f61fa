"""Generate answers to questions about images. sample.py, eval.py and the validation during training use this code.

    from generate import Chat
    chat = Chat("runs/sft")                                  # a run, any LLaVA folder, or a PEFT adapter
    print(chat.ask("cat.jpg", "What is this?"))

    B prompts   L maximum tokens per conversation   N input tokens of a forward pass   I images   S side   V vocabulary
"""

import sys

import torch

import chat
import engine
from config import stop
from formats import configs, hub, llava, peft
from formats.image_files import load_image
from images import preprocess
from kernels import choose_kernels
from kernels.cross_entropy import IGNORE
from model import logits_head
from parts import instruct
from parts.build import image_layout
from parts.spans import span_ends


class Cache:
    """Keys and values of B prompts and their answers, at most L tokens each. Conversation b owns the slots [b * L,
    (b + 1) * L). So every query attends to one contiguous range [lo, hi) of slots, in the prompt and in the answer.
    slot (N,): where the next forward pass writes. fixed: what the `group` answers to a prompt share."""

    def __init__(self, B, L):
        self.B, self.L, self.kv, self.fixed, self.group, self.slot = B, L, {}, {}, 1, None

    def append(self, layer, *new):
        """Store k, v (N, G, K) of N new tokens, G heads of size K -> keys and values of all slots (B * L, G, K)"""
        if layer not in self.kv:
            self.kv[layer] = [t.new_zeros(self.B * self.L, *t.shape[1:]) for t in new]
        for stored, t in zip(self.kv[layer], new):
            stored[self.slot] = t
        return self.kv[layer]

    def repeat(self, group):
        """Copy the slots of each prompt `group` times: each of its answers goes on in its own slots."""
        self.group = group
        for kv in self.kv.values():
            kv[:] = [t.unflatten(0, (self.B, self.L)).repeat_interleave(group, 0).flatten(0, 1) for t in kv]


@torch.no_grad()
def generate(model, prompts, images, stop_ids, max_new_tokens=64, temperature=0.0, banned=(), seed=0, each=None,
             group=1):
    """Generate `group` answers to each of B prompts of different lengths -> B * group lists of token ids.
    prompts: list of tensors of ids, with placeholders for images. images: (I, 3, S, S) uint8, in the order of the
    placeholders. An answer ends before an id in `stop_ids`. Ids in `banned` and the placeholder are never generated.
    Temperature 0 is greedy decoding. At the end, train/eval modes and the global random state are as before.
    each(answers) is called after each step, with the lists so far (stop tokens included); it returns True to end."""
    if not prompts:
        return []
    device, training = images.device, [m for m in model.modules() if m.training]
    model.eval()
    rng = torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(p) for p in prompts])
    B, L = len(prompts), int(lengths.max()) + max_new_tokens
    cache = Cache(B, L)
    start = torch.arange(B * group) * L                       # first slot of each conversation
    ids = torch.cat([p.to(device) for p in prompts])          # (N,) step 1: all prompts; later: 1 token per answer
    pos = torch.cat([torch.arange(n) for n in lengths])       # (N,)
    lo = start[:B].repeat_interleave(lengths)                 # (N,)
    labels = torch.full((len(pos),), IGNORE)                  # (N,) logits are computed where a label is not IGNORE
    labels[lengths.cumsum(0) - 1] = 0                         # logits only for the last token of each prompt
    hi = span_ends(model.cfg)(ids.cpu(), labels, pos, lo)     # (N,)
    lengths, answers, alive = lengths.repeat_interleave(group), [[] for _ in start], list(range(B * group))
    banned = torch.tensor(sorted({*banned, model.cfg.image_token_index}), device=device)
    try:
        for _ in range(max_new_tokens):
            cache.slot = (lo + pos).to(device)
            batch = (t.to(device) for t in (labels, pos, lo.int(), hi.int()))
            logits = model(ids, *batch, images, head=logits_head, cache=cache).float()                     # (alive, V)
            if len(logits) < len(alive):                      # each prompt passed through the model once
                logits = logits.repeat_interleave(group, 0)
                cache.repeat(group)
            logits[:, banned] = -torch.inf
            if temperature > 0:
                ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)[:, 0]
            else:
                ids = logits.argmax(-1)
            for b, token in zip(alive, ids.tolist()):
                answers[b].append(token)
            keep = [i for i, b in enumerate(alive) if answers[b][-1] not in stop_ids]
            alive = [alive[i] for i in keep]
            if each and each(answers) or not alive:
                break
            ids, images = ids[keep], images[:0]               # the cache holds the keys and values of the images
            lo = start[alive]
            pos = lengths[alive] + len(answers[alive[0]]) - 1
            hi, labels = lo + pos + 1, torch.zeros_like(lo)
    finally:
        for m in training:
            m.training = True
    return [a[:-1] if a and a[-1] in stop_ids else a for a in answers]


class Chat:
    """A model with its tokenizer, chat template and image preprocessing.

    folder: a run, its model/ or adapter/, any LLaVA folder, a PEFT adapter, or org/name of the hub. device: auto, cpu,
    cuda, cuda:N. dtype: auto, bf16, fp32, fp64. template "" or system None: the one that the model was trained with.
    A model that cannot be loaded raises config.Error; an unusable image or question raises config.BadSample."""

    def __init__(self, folder, device="auto", dtype="auto", template="", system=None, kernels="auto"):
        if not folder:
            stop("model is empty: it names a run, its model/ or adapter/, or any LLaVA folder")
        world, path = engine.start(device, dtype), hub.find_folder(folder)
        choose_kernels(kernels, world.device)
        model, source = (peft.load_merged(path, world.dtype) if hub.is_adapter(path)
                         else llava.load_model(init=path, dtype=world.dtype))
        template = template or source.meta.get("template")
        if not template:
            template = "vicuna_v1"
            world.print(f"note: {path} does not say with which template it was trained: {template} is used; "
                        f"--template= of {', '.join(chat.TEMPLATES)}", file=sys.stderr)    # stdout gets only answers
        system = source.meta.get("system") if system is None else system
        self.set(model.to(world.device), source, template, system, llava.aspect(source, model.cfg))

    @classmethod
    def of(cls, model, folder, template, system, aspect):
        """Make a Chat of a model in memory. folder: formats.llava.Folder. aspect: pad, crop or squash (ImageSpec)"""
        self = cls.__new__(cls)                               # without __init__, which loads a model
        self.set(model, folder, template, system, aspect)
        return self

    def set(self, model, folder, template, system, aspect):
        self.model, self.tok, self.template, self.system = model, folder.tok, template, system
        self.cfg, self.spec = model.cfg, configs.image_spec(folder.pre, aspect)
        self.layout, self.reader = image_layout(model.cfg), instruct.reader(folder, model.cfg)
        self.stop_ids = chat.stop_ids(self.tok, template)
        self.banned = {self.cfg.image_token_index, *range(len(self.tok), self.cfg.text.vocab_size)}

    def ask(self, images, text, max_new_tokens=256, temperature=0.0, seed=0):
        """Answer one question -> text. images: a path, a PIL image, a list of these, or None for text alone."""
        images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        pixels, blocks = self.look(images)
        prompt = self.prompt([(with_marker(text, len(blocks)), None)], blocks)
        return self.answers([prompt], pixels, max_new_tokens, temperature, seed)[0]

    def look(self, images):
        """Load images (path, PIL) -> two lists: the tiles (n, 3, S, S) uint8 of each image; its ids in the prompt"""
        images = [load_image(image) for image in images]
        tiles = [torch.stack([preprocess(tile, self.spec) for tile in self.layout.cut(image)]) for image in images]
        return tiles, [self.layout.block(image) for image in images]

    def prompt(self, turns, blocks=()):
        """Encode turns [(user text, assistant text)], the last (text, None). blocks: from look() -> tensor of ids"""
        return torch.tensor(chat.encode(self.tok, self.template, turns, blocks, self.system)[0])

    def answers(self, prompts, pixels, max_new_tokens=64, temperature=0.0, seed=0, each=None):
        """Answer prompts (list of id tensors). pixels: from look(), for all prompts in order -> a string per prompt"""
        images = torch.cat(pixels or [torch.zeros(0, 3, *[self.cfg.vision.image_size] * 2, dtype=torch.uint8)])
        images = self.reader([(p.tolist(), []) for p in prompts], images) if self.reader else images
        answers = generate(self.model, prompts, images.to(next(self.model.parameters()).device), self.stop_ids,
                           max_new_tokens, temperature, self.banned, seed, each)
        return [(t.split("\n")[0] if self.template == "plain" else t).strip() for t in map(self.tok.decode, answers)]


def with_marker(text, images=1):
    """Put one <image> marker per image in front of `text`, unless `text` already has a marker -> text"""
    return text if chat.IMAGE in text or not images else f"{chat.IMAGE}\n" * images + text
