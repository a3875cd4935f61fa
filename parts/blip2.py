"""The first stage of BLIP-2 (arXiv 2301.12597, section 3.2): a Q-Former learns to read images, without an LLM.

The vision tower is frozen. One Q-Former reads images (its queries) and captions (its words) under three masks:

    ITC    image-text contrast      queries alone; words alone, all see all. The similarity of an image and a caption is
                                    the largest cosine of one of the Q queries and the caption's first word, [CLS]
    ITM    image-text matching      queries and words all see each other: does the caption belong to the image? A linear
                                    layer answers at each query; the answer is the mean. Of each pair, the caption is
                                    also shown with a wrong image, and the image with a wrong caption. Both are drawn by
                                    their similarity, so that they are hard to tell from the right ones
    ITG    image-grounded text      queries see queries; a word sees queries and earlier words, and predicts the next
           generation               word. [DEC] stands in place of [CLS]

The loss is the sum of the three, unweighted. As in the released code (LAVIS): the temperature of ITC is trained and
begins at 0.07; labels of ITC and ITG are smoothed by 0.1; ITM counts as the mean over its three pairs. Not as there:
words are predicted by their own embeddings, without BERT's head; no dropout; the captions are never padded.

As in parts/pairs.py, every pair of a step is compared with every other one, on any micro-batches and ranks. Wrong
images and captions come from all ranks, too: ranks exchange features of the frozen tower, not pixels. Which wrong ones
are drawn depends on the order of the pairs, so on max_tokens and the number of ranks; how likely each is does not.

    B pairs of a micro-batch   n pairs of the step, all ranks   P features per image   D their width   Q queries
    E width of the Q-Former   F width of the common space   W words of all captions
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import stop
from kernels.cross_entropy import IGNORE
from model import VisionConfig
from parts.cross import Projection
from parts.features import FeatureTower
from parts.instruct import InstructConfig, InstructQFormer
from parts.pairs import accuracy, gather_rows, similarities, unit

SMOOTH, TEMPERATURE = 0.1, 0.07


@dataclass
class Blip2Config:
    kind: str = "blip2"
    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: InstructConfig = field(default_factory=InstructConfig)
    tokens: int = 32                         # Q
    width: int = 256                         # F
    dec: int = 0                             # id of [DEC]
    connector = "qformer"                    # of the second stage


class Texts(NamedTuple):
    """Captions, one after the other: ids (W,) of their words, counts (B,) of words"""
    words: torch.Tensor
    counts: torch.Tensor


def texts_of(batch):
    """data.Batch of captions -> Texts. A caption has one label, and an image unless captions alone are read"""
    caption = (batch.pos == 0).cumsum(0) - 1                                                               # (W,)
    counts = caption.new_zeros(len(batch.rows) or len(batch.images))   # bincount would make the CPU wait for a GPU
    return Texts(batch.ids, counts.index_add(0, caption, torch.ones_like(caption)))


def joined(*texts):
    return Texts(*(torch.cat(part) for part in zip(*texts)))


class Blip2(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, E = cfg, cfg.qformer.hidden_size
        if not (cfg.vision.feature_norm and cfg.vision.keep_class):
            stop("BLIP-2's tower has vision.feature_norm=true vision.keep_class=true")
        self.vision_tower = FeatureTower(cfg.vision)
        self.multi_modal_projector = InstructQFormer(cfg.vision.hidden_size, E, cfg.tokens, cfg.qformer,
                                                     cfg.qformer.vocab_size)
        self.multi_modal_projector.projection = None       # it leads to a language model: the second stage
        # [CLS] reads its caption by self-attention alone. If that begins at 0, as it does in the second stage, the
        # captions found at rank 1 fall from 96.3 to 5.4 % (toy world, 250 steps, docs/systems.md)
        for layer in self.multi_modal_projector.layers:
            layer.attention.out_proj = Projection(E, E)
        self.vision_projection, self.text_projection = nn.Linear(E, cfg.width), nn.Linear(E, cfg.width)
        self.itm_head = nn.Linear(E, 2)
        self.temperature = nn.Parameter(torch.empty(1))

    @property
    def blocks(self):
        return [*self.vision_tower.blocks, *self.multi_modal_projector.layers]

    @torch.no_grad()
    def features(self, images):
        """(B, 3, S, S) uint8 -> (B, P, D), before the tower's last norm, which trains"""
        return self.vision_tower.vision_model(images)

    @torch.no_grad()
    def limit_scale(self):
        """After an update: the temperature stays at 0.01 or more, as CLIP's"""
        self.temperature.clamp_(min=0.01)

    def normed(self, features):
        return self.vision_tower.vision_model.post_layernorm(features)

    def encode_images(self, features):
        """(B, P, D) -> (B, Q, F), of length 1"""
        none = torch.zeros(len(features), dtype=torch.long, device=features.device)
        queries, _ = self.multi_modal_projector.states(self.normed(features), none[:0], none)              # (B Q, E)
        return unit(self.vision_projection(queries)).unflatten(0, (len(features), self.cfg.tokens))

    def encode_texts(self, texts):
        """Texts -> (B, F), of length 1"""
        nothing = self.vision_projection.weight.new_zeros(len(texts.counts), 0, self.cfg.vision.hidden_size)
        _, words = self.multi_modal_projector.states(nothing, *texts, queries=False)
        return unit(self.text_projection(words[texts.counts.cumsum(0) - texts.counts]))

    def match(self, features, texts):
        """(B, P, D), Texts -> (B, 2) logits: the caption does not belong to the image, it does"""
        queries, _ = self.multi_modal_projector.states(self.normed(features), *texts)
        return self.itm_head(queries).unflatten(0, (len(features), self.cfg.tokens)).mean(1)

    def word_logits(self, features, texts):
        """(B, P, D), Texts -> (W, V): the logits of the word after each word"""
        words, first = texts.words.clone(), texts.counts.cumsum(0) - texts.counts
        words[first] = self.cfg.dec
        _, states = self.multi_modal_projector.states(self.normed(features), words, texts.counts, causal=True)
        return states @ self.multi_modal_projector.word_embedding.weight.to(states.dtype).T

    def forward(self, batch, compared=None):
        """In the first pass: data.Batch -> image (B, Q, F), text (B, F), temperature (1,), features (B, P, D). In the
        second one: the same three, the losses of ITM (B,) and of ITG, summed over words"""
        texts = texts_of(batch)
        features = self.features(batch.images) if compared is None else compared.features
        image, text = self.encode_images(features), self.encode_texts(texts)
        if compared is None:
            return image, text, self.temperature, features
        B = len(features)
        logits = self.match(torch.cat([features, compared.wrong_features, features]),
                            joined(texts, texts, compared.wrong_texts))                                    # (3 B, 2)
        right = (torch.arange(3 * B, device=logits.device) < B).long()                     # the first B pairs are right
        itm = F.cross_entropy(wide(logits), right, reduction="none").unflatten(0, (3, B)).mean(0)
        labels = torch.cat([texts.words[1:], texts.words[:1]])
        labels[texts.counts.cumsum(0) - 1] = IGNORE                                       # nothing follows a last word
        itg = F.cross_entropy(wide(self.word_logits(features, texts)), labels, ignore_index=IGNORE, reduction="sum",
                              label_smoothing=SMOOTH)
        return image, text, self.temperature, itm, itg


def wide(x):
    """-> x in fp32 at least: autocast computes in 16 bits"""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def itc_loss(image, text, temperature):
    """image (n, Q, F), text (n, F), temperature (1,) -> (n,), whose mean is the symmetric cross-entropy with smoothed
    labels"""
    logits, own = similarities(image, text) / temperature, torch.arange(len(text), device=text.device)     # (n, n)
    return sum(F.cross_entropy(s, own, label_smoothing=SMOOTH, reduction="none") for s in (logits, logits.T)) / 2


# ---- all pairs of a step --------------------------------------------------------------------------------------------

class Blip2Compared(NamedTuple):
    """A micro-batch, and what the other pairs of the step mean for it"""
    batch: tuple                   # data.Batch
    losses: torch.Tensor           # (B,) ITC of each pair
    image: torch.Tensor            # (B, Q, F) gradient of the step's ITC at the image vectors
    text: torch.Tensor             # (B, F) gradient at the text vectors
    temperature: torch.Tensor      # (1,) gradient, this micro-batch's share of it
    features: torch.Tensor         # (B, P, D) of the images
    wrong_features: torch.Tensor   # (B, P, D) of a wrong image for each caption
    wrong_texts: Texts             # a wrong caption for each image
    per_word: float                # pairs of the step / predicted words of the step


def chosen(words, counts, indices):
    """The captions at these indices -> Texts. words: list of the ids of each caption"""
    return Texts(torch.cat([counts[:0], *(words[i] for i in indices.tolist())]), counts[indices])


def draw_wrong(similar, draw):
    """(n, n) logits of images and texts -> wrong image of each text (n,), wrong text of each image (n,). draw: numbers
    that seed the choice. A wrong one is drawn by the softmax of its similarity, plus 1e-4"""
    g = torch.Generator().manual_seed(draw[0] * 2**31 + draw[1])
    found = []
    for s in (similar.T, similar):
        p = (s.softmax(1) + 1e-4).fill_diagonal_(0)
        found.append(torch.multinomial(p.cpu().double(), 1, generator=g)[:, 0].to(s.device))
    return found


def compare_blip2(model, micro, world, loss, draw):
    """The micro-batches of a step -> [Blip2Compared], accuracy of ITC. As compare_pairs"""
    if not micro:                                          # no sample of the step is usable
        return [], math.nan
    micro = [b.to(world.device) for b in micro]
    with torch.no_grad(), world.autocast():
        seen = [model(b) for b in micro]
    image, text, features = (gather_rows(torch.cat([z[k] for z in seen]), world)[0] for k in (0, 1, 3))
    own = joined(*map(texts_of, micro))
    counts, first = gather_rows(own.counts, world)                                                         # (n,)
    sizes, n = counts.tolist(), len(counts)
    words = gather_rows(own.words, world)[0].split(sizes)
    if n < 2:
        stop("image-text matching needs two usable pairs in a step: the wrong ones come from it")
    leaves = [x.detach().requires_grad_() for x in (image, text, seen[0][2])]
    losses = loss(*leaves)                                                                                 # (n,)
    slopes = torch.autograd.grad(losses.sum(), leaves)
    similar = similarities(image, text)
    wrong_image, wrong_text = draw_wrong(similar / seen[0][2], draw)
    out, per_word = [], n / (sum(sizes) - n)
    for b in micro:
        at = slice(first, first := first + len(b.images))
        out.append(Blip2Compared(
            b, losses.detach()[at], slopes[0][at], slopes[1][at], slopes[2] * len(b.images) / n, features[at],
            features[wrong_image[at]], chosen(words, counts, wrong_text[at]), per_word))
    return out, accuracy(similar)


def blip2_loss(model, b):
    """Blip2Compared -> the sum of the losses of its pairs, with the gradient of the step's ITC at their vectors"""
    image, text, temperature, itm, itg = model(b.batch, b)
    linear = (image * b.image).sum() + (text * b.text).sum() + (temperature * b.temperature).sum()
    return b.losses.sum() + linear - linear.detach() + itm.sum() + itg * b.per_word
