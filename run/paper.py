"""Print the plan of a recipe for a model as large as in the paper. The model is on the meta device, so no data, no
weights and almost no memory are needed.

    python train_sft.py recipes/paligemma.py --dry_run

A recipe's `paper` is a dict:

    model                VLMConfig                samples    number of training samples
    text, supervised     tokens per sample        images     images or tiles per sample
    hours                training time as published, with the hardware; or "not published"

`text` and `supervised` are often our own estimates.
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

A100 = 312e12      # peak FLOP/s in bf16, from the data sheet
SHARE = 0.4        # share of this peak that training reaches: an assumption, not a measurement


def print_plan(s, world, table):
    """Print the plan. s: the settings of a recipe with `paper`. table: {name glob: learning rate} of trained weights"""
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
    """Make a data.Batch of `samples` equal samples. Its ids and pixels mean nothing: the plan needs only their number,
    and the labels."""
    labels = torch.full((samples, length), IGNORE)
    labels[:, length - facts["supervised"] :] = 0
    n, S = samples * length, cfg.vision.image_size
    ids, pixels = torch.zeros(n, dtype=torch.long), torch.empty(samples * facts["images"], 3, S, S, device="meta")
    return Batch(ids, labels.flatten(), ids, ids, ids, pixels)
