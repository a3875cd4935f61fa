"""The plan of a recipe at the size of its paper, on the meta device: no data, no weights and no memory are needed.

    python train_sft.py recipes/paligemma.py --dry_run

A recipe's `paper` is a dict: model (VLMConfig), samples, text and supervised (tokens per sample, often an estimate of
ours), images (per sample), hours (as published, with the hardware; or "not published").
"""

import dataclasses
import math

import torch

import engine
from config import stop
from data import Batch
from kernels.cross_entropy import IGNORE
from parts.build import build
from run import plan

A100 = 312e12      # FLOP/s in bf16, of the data sheet
SHARE = 0.4        # of them that training of this size reaches; an assumption, not a measurement


def show(s, world, table):
    """Print the plan. s: settings with s.paper; table: {name glob: lr} of who trains"""
    facts = s.paper
    cfg, images = facts["model"], facts["images"]
    with torch.device("meta"):
        model = build(cfg)
    lrs = engine.choose(model, table, torch.bfloat16)
    length = facts["text"] + images * cfg.image_tokens
    if length > s.max_tokens:
        stop(f"paper: a sample of {length} tokens, max_tokens={s.max_tokens}")
    per_stream = s.max_tokens // length
    micro = [batch(cfg, facts, length, min(per_stream, s.batch_size - at)) for at in range(0, s.batch_size, per_stream)]
    steps = math.ceil(facts["samples"] * s.epochs / s.batch_size) if not s.steps else s.steps
    world = dataclasses.replace(world, dtype=torch.bfloat16)
    world.print(*plan.lines(model, lrs, world, micro, steps, s), sep="\n")
    cost = plan.step_flops(model, micro) * steps
    hours = cost / (8 * A100 * SHARE) / 3600
    world.print(f"  {cfg.image_tokens} tokens per image or tile; {length} tokens per sample, as this plan assumes\n"
                f"  {cost:.2e} FLOP in all: {hours:,.1f} h on 8 A100 at {SHARE:.0%} of their peak; "
                f"published: {facts['hours']}")


def batch(cfg, facts, length, samples):
    """-> a Batch of `samples` equal samples; only sizes and labels matter"""
    labels = torch.full((samples, length), IGNORE)
    labels[:, length - facts["supervised"] :] = 0
    n, S = samples * length, cfg.vision.image_size
    ids, pixels = torch.zeros(n, dtype=torch.long), torch.empty(samples * facts["images"], 3, S, S, device="meta")
    return Batch(ids, labels.flatten(), ids, ids, ids, pixels)
