"""CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343): an image tower and a text tower, with vectors in one space.

    CLIP      image: class token after the last norm, linear; text: EOS after the last norm, linear
    SigLIP    image: one learned query attends to all patches (attention pooling), then an MLP; text: see text_tower.py

The vectors of an image and of a text have length 1, so their dot product is the cosine of the angle between them. The
loss multiplies it by exp(logit_scale), and SigLIP adds logit_bias. The names of the tensors are the published ones.

A contrastive loss compares each pair of a step with every other pair, also with those of other micro-batches and other
ranks. compare_pairs() makes this exact (the idea of GradCache, arXiv 2101.06983): a first pass without gradients
computes all vectors of the step, then the loss and its gradient at each vector. A micro-batch of the second pass needs
no more than its own rows of this gradient. So a step may be larger than the memory; one more forward pass is the price.
A rank whose step is one micro-batch needs no second pass.

    I images   B pairs of a micro-batch   n pairs of the step, all ranks   T tokens of an image   D, E widths
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from kernels.attention import attention
from model import LayerNorm, ViTMLP, VisionConfig, VisionModel
from parts.cross import own_keys
from parts.text_tower import TextTower, TextTowerConfig

MOST = 4.605170185988092       # log 100: CLIP's logits are at most 100 times the cosine (section 2.5 of its paper)
SCALES = {"clip": (2.6592, 0.0), "siglip": (2.302585, -10.0)}     # first logit_scale, logit_bias: log(1 / .07); log 10


@dataclass
class PairsConfig:
    kind: str = "clip"                       # or siglip
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    width: int = 512                         # E; in SigLIP it is the width of the vision tower


def unit(x):
    """-> x scaled to length 1, in fp32 at least"""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class PoolAttention(nn.Module):
    """One query per image -> (I, D). The tensors have the names of torch's nn.MultiheadAttention: q, k, v are one."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.empty(3 * D, D)), nn.Parameter(torch.empty(3 * D))
        self.out_proj = nn.Linear(D, D)

    def forward(self, query, x):
        """query (I, D), x (I, T, D)"""
        I, T, D = x.shape
        (wq, wkv), (bq, bkv) = (t.split([D, 2 * D]) for t in (self.in_proj_weight, self.in_proj_bias))
        q, kv = F.linear(query, wq, bq), F.linear(x.flatten(0, 1), wkv, bkv)                     # (I, D), (I T, 2 D)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, *kv.chunk(2, -1)))
        return self.out_proj(attention(q, k, v, *own_keys(I, 1, T, x.device)).flatten(1))


class PoolHead(nn.Module):
    """SigLIP's attention pooling: x (I, T, D) -> (I, D)"""

    def __init__(self, cfg):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, cfg.hidden_size))
        self.attention = PoolAttention(cfg.hidden_size, cfg.num_attention_heads)
        self.layernorm = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.mlp = ViTMLP(cfg)

    def forward(self, x):
        x = self.attention(self.probe[0].to(x.dtype).expand(len(x), -1), x)
        return x + self.mlp(self.layernorm(x))


class Pairs(nn.Module):
    """Batch with one text per image -> image (B, E), text (B, E), both of length 1, and [logit_scale, logit_bias]"""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, D, E = cfg, cfg.vision.hidden_size, cfg.width
        clip = cfg.kind == "clip"
        self.vision_model = VisionModel(cfg.vision)
        self.vision_model.post_layernorm = LayerNorm(D, eps=cfg.vision.layer_norm_eps)
        self.vision_model.head = None if clip else PoolHead(cfg.vision)
        self.text_model = TextTower(cfg.text, E)
        self.visual_projection = nn.Linear(D, E, bias=False) if clip else None
        self.text_projection = nn.Linear(cfg.text.hidden_size, E, bias=False) if clip else None
        self.logit_scale = nn.Parameter(torch.empty(1))    # not a scalar: FSDP shards only tensors with a dimension
        self.logit_bias = None if clip else nn.Parameter(torch.empty(1))

    @property
    def blocks(self):
        return [*self.vision_model.encoder.layers, *self.text_model.encoder.layers]

    def encode_images(self, images):
        """(I, 3, S, S) uint8 -> (I, E)"""
        x = self.vision_model(images)                                                                  # (I, T, D)
        norm, head = self.vision_model.post_layernorm, self.vision_model.head
        x = self.visual_projection(norm(x[:, 0])) if head is None else head(norm(x))
        return unit(x)

    def encode_texts(self, batch):
        """-> (B, E)"""
        x = self.text_model(*batch)
        x = x if self.text_projection is None else self.text_projection(x)
        return unit(x)

    def forward(self, batch):
        scale = [self.logit_scale, torch.zeros_like(self.logit_scale) if self.logit_bias is None else self.logit_bias]
        return self.encode_images(batch.images), self.encode_texts(batch), torch.cat(scale)

    @torch.no_grad()
    def limit_scale(self):
        """After an update, as CLIP does: exp(logit_scale) is at most 100. SigLIP has no limit."""
        if self.cfg.kind == "clip":
            self.logit_scale.clamp_(max=MOST)


def similarities(image, text):
    """image (n, E), or (n, Q, E) where an image has Q vectors and the best one counts; text (m, E) -> (n, m)"""
    s = image @ text.T
    return s if s.ndim == 2 else s.amax(1)


# ---- all pairs of a step --------------------------------------------------------------------------------------------

class Compared(NamedTuple):
    """A micro-batch, and what the other pairs of the step mean for it."""
    batch: tuple              # data.Batch
    losses: torch.Tensor      # (B,) loss of each pair
    image: torch.Tensor       # (B, E) gradient of the step's loss at the image vectors
    text: torch.Tensor        # (B, E) gradient at the text vectors
    scale: torch.Tensor       # (2,) gradient at [logit_scale, logit_bias], this micro-batch's share of it
    seen: tuple | None        # what the model returned for it, if it is the only micro-batch of this rank


def gather_rows(x, world):
    """x (B, ...) of each rank, B may differ -> the rows of all ranks (n, ...), and the index of the first own row"""
    counts = world.gather(len(x))
    if world.size == 1:
        return x, 0
    padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([p[:c] for p, c in zip(parts, counts)]), sum(counts[: world.rank])


def vectors(model, micro, world):
    """The micro-batches of a step -> image (n, E), text (n, E) of all ranks, scale (2,), no gradients; the index of the
    first own pair; what the model returned for each micro-batch"""
    with world.autocast():
        seen = [model(b.to(world.device)) for b in micro]
    with torch.no_grad():
        (image, first), (text, _) = (gather_rows(torch.cat([z[k] for z in seen]), world) for k in (0, 1))
    return image.detach(), text.detach(), seen[0][2].detach(), first, seen


def compare_pairs(model, micro, world, loss, draw):
    """The micro-batches of a step -> [Compared], and the accuracy (): how often a pair's own text is the nearest to its
    image, and its own image to its text. loss: image (n, E), text (n, E), scale (2,) -> (n,). Each rank computes the
    n x n similarities of the whole step. draw: numbers that seed random choices; there are none here"""
    if not micro:                                          # no sample of the step is usable
        return [], math.nan
    with torch.set_grad_enabled(len(micro) == 1):
        *leaves, first, seen = vectors(model, micro, world)
    leaves, counts = [x.requires_grad_() for x in leaves], [len(z[0]) for z in seen]
    losses = loss(*leaves)                                                                             # (n,)
    slopes = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
    own, n = slice(first, first + sum(counts)), max(1, len(losses))
    parts = [x[own].split(counts) for x in (losses.detach(), *slopes[:2])]
    rows = zip([b.to(world.device) for b in micro], *parts, [slopes[2] * count / n for count in counts],
               seen if len(micro) == 1 else [None] * len(micro))
    return [Compared(*row) for row in rows], accuracy(similarities(*leaves[:2]))


def accuracy(similar):
    """(n, n) similarities of n images and n texts -> mean of both directions: is its own partner the nearest one?"""
    others = similar.detach() - torch.diag(similar.new_full((len(similar),), math.inf))
    own = similar.detach().diagonal()
    return torch.cat([own > others.amax(1), own > others.amax(0)]).double().mean() if len(own) > 1 else math.nan


def pair_loss(model, b):
    """Compared -> the sum of the losses of its pairs, with the gradient of the whole step's loss at their vectors"""
    image, text, scale = b.seen or model(b.batch)
    linear = (image * b.image).sum() + (text * b.text).sum() + (scale * b.scale).sum()
    return b.losses.sum() + linear - linear.detach()
