"""The plan of a run, printed before training: what is trained, and what a step costs in bytes and operations.

    P patches per image   Q placeholders per image   C, F: width and MLP width of the LLM
    q, kv: width of all query heads together and of all key heads together, in the LLM
"""

import fnmatch
from collections import Counter

import torch

import engine
from engine import unwrap
from kernels import use_triton
from kernels.cross_entropy import logits_bytes
from loss import supervised


def rows(cfg):
    """Make the table that flops() needs: {pattern of a weight's name: (unit, rows)}. A unit is an image, a token or a
    supervised token. rows: how many vectors the weight multiplies for each unit"""
    last = f"language_model.model.layers.{cfg.text.num_hidden_layers - 1}"
    head = "language_model." + ("model.embed_tokens" if cfg.text.tie_word_embeddings else "lm_head")
    P, Q = cfg.vision.patches, cfg.image_tokens
    seen = P + (cfg.vision.class_token if cfg.vision.keep_class else 0)       # features of an image
    latents = cfg.connector_args.get("latents", 64)
    return {"vision_tower.*.patch_embedding.weight": ("images", P),
            "vision_tower.*.layers.*": ("images", P + cfg.vision.class_token + cfg.vision.num_register_tokens),
            "multi_modal_projector.*": ("images", Q), "multi_modal_projector.*_embedding*": ("images", 0),
            "multi_modal_projector.before.*": ("images", P),         # a C-Abstractor, in front of its averages
            "multi_modal_projector.*kv_proj.*": ("images", seen),    # three patterns: keys and values of image features
            "multi_modal_projector.attention.[kv]_proj.*": ("images", seen),
            "multi_modal_projector.layers.*.cross.[kv]_proj.*": ("images", seen),
            "multi_modal_projector.layers.*.linear_*": ("images", latents),                  # a perceiver
            "multi_modal_projector.layers.*.linear_[kv].*": ("images", seen + latents),
            "language_model.gated_layers.*": ("tokens", 1),
            "language_model.gated_layers.*.cross_attn.[kv]_proj.*": ("images", latents),
            "multi_modal_projector.layers.*.word_*": ("images", 0),      # InstructBLIP's words are not counted
            "language_model.model.layers.*": ("tokens", 1),
            f"{last}.self_attn.[qo]_proj.*": ("supervised", 1), f"{last}.mlp.*": ("supervised", 1),
            f"{head}.weight": ("supervised", 1)}


def disk(model, dtype):
    """-> two sizes in bytes: of a checkpoint (trained weights with two AdamW moments), and of model/ in `dtype`"""
    sizes = [(p.numel(), p.requires_grad * p.element_size()) for p in model.parameters()]
    return 3 * sum(n * size for n, size in sizes), sum(n for n, _ in sizes) * dtype.itemsize


def adds_into_grad(world, compiled):
    """Do the products of backward add the gradients of weights to .grad (kernels/linear.py)? Only in eager code in one
    process. Only with the kernels: kernels=torch is plain torch."""
    return world.size == 1 and not compiled and use_triton(torch.empty(0, device=world.device))


def memory(model, world, micro, s):
    """Estimate the memory of a step -> two numbers of bytes: for weights, gradients and AdamW moments together; and for
    the activations and logits of the largest micro-batch."""
    cfg, low = model.cfg, world.dtype in (torch.bfloat16, torch.float16)
    copy = 2 * (low and not adds_into_grad(world, s.compile))               # autocast caches a 16-bit copy (2 bytes)
    states = sum(p.numel() * (4 * p.element_size() + copy if p.requires_grad else p.element_size())
                 for p in model.parameters())
    if engine.is_sharded(model, world, s.parallel):
        states /= world.size
    states += sum(b.nbytes for b in model.buffers())                # every rank holds all NF4 (4-bit) weights
    t, size, like = cfg.text, torch.finfo(world.dtype).bits // 8, torch.empty(0, dtype=world.dtype, device=world.device)
    C, F = t.hidden_size, t.intermediate_size
    q, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    block = 2 * C + q + 2 * kv + 2 * F                              # elements saved for backward, per token and layer
    if any(p.requires_grad for p in model.language_model.parameters()):
        block += 2 * C + q + F                                      # saved, too, if LLM weights or adapters train
    backward, again = 4 * C + 4 * F, s.recompute == "block"         # backward: elements that one layer uses, per token
    head = model.language_model.head_weight
    head = head.requires_grad * head.numel() * (head.element_size() + 2 * low)   # its gradient, and its 16-bit copy
    blocks, vit = [*model.vision_tower.blocks], 0                   # vit: elements saved per image by towers that train
    for v, own in (cfg.vision, blocks[: cfg.vision.depth]), (cfg.second, blocks[cfg.vision.depth :]):
        if any(p.requires_grad for b in own for p in b.parameters()):
            block_vit = v.hidden_size if again else 7 * v.hidden_size + 2 * v.intermediate_size
            vit += (v.patches + v.class_token + v.num_register_tokens) * v.depth * block_vit
    most = 0
    for b in micro:
        saved = t.num_hidden_layers * C + block if again else t.num_hidden_layers * block
        logits = logits_bytes(supervised(b.labels), t.vocab_size, like)
        most = max(most, (len(b.ids) * (saved + backward) + len(b.images) * vit) * size + logits + head)
    return states, most


def trained_lines(model, lrs):
    """-> what trains, as lines of text: a table of the parts, and the names per learning rate"""
    out, parts = [f"{'':24}{'trained':>16}{'frozen':>16}"], {}
    for name, p, count in count_parameters(model):
        part = parts.setdefault(name.split(".")[0], [0, 0])
        part[0 if p.requires_grad else 1] += count
    for part, (trained, frozen) in {**parts, "together": [sum(v) for v in zip(*parts.values())]}.items():
        out.append(f"  {part:22}{trained:16,}{frozen:16,}")
    for lr in sorted(set(lrs.values())):
        names = [n for n in lrs if lrs[n] == lr]
        out.append(f"  lr {lr:g}: {len(names)} tensors, {names[0]} ... {names[-1]}")
    return out


def lines(model, lrs, world, micro, steps, s):
    """-> the plan as lines of text"""
    seen, cost = units(micro), step_flops(model, micro)
    states, work = memory(model, world, micro, s)
    return [*trained_lines(model, lrs),
            f"  {steps} steps of {s.batch_size} samples; the first one, on this rank: {seen['tokens']:,} tokens in "
            f"{len(micro)} packed sequence(s), {seen['supervised']:,} supervised, {seen['images']} images",
            f"  memory, roughly: {states / 2**20:,.1f} MiB weights, gradients and moments "
            f"+ {work / 2**20:,.1f} MiB activations",
            f"  {cost / 1e9:,.2f} GFLOP per step and rank in matrix products; "
            f"{world.size} x {world.device}, {world.dtype}, "
            f"{'Triton kernels' if use_triton(torch.empty(0, device=world.device)) else 'plain torch'}"]


def units(micro):
    """Count the units of rows() in the micro-batches -> {unit: count}"""
    return dict(tokens=sum(len(b.ids) for b in micro), supervised=sum(supervised(b.labels) for b in micro),
                images=sum(len(b.images) for b in micro))


def step_flops(model, micro):
    """-> FLOPs of the matrix products for these micro-batches"""
    return sum(f * units(micro)[unit] for unit, f in flops(model, rows(model.cfg)).items())


def count_parameters(model):
    """Yield (name, tensor, number of weights) in the order in which data passes the modules. The tensors are parameters
    and 2-D buffers. A 2-D buffer holds a matrix in 4 bits, two weights per byte."""
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(prefix, recurse=False):
            yield name, p, p.numel()
        for name, b in module.named_buffers(prefix, recurse=False):
            if b.ndim == 2:
                yield name, b, 2 * b.numel()


def flops(model, table):
    """Count the FLOPs of the matrix products in a training step -> {unit: FLOPs per unit}. table: what rows() returns;
    if several patterns fit a name, the last one decides. For each row, a weight costs:

        2    in the forward pass
        2    for its gradient, if the weight is trained
        2    for the gradient of its input, if an earlier parameter is trained

    Attention and recomputation are not counted."""
    out, below = Counter(), False
    for name, p, count in count_parameters(unwrap(model)):
        fits = [table[g] for g in table if fnmatch.fnmatchcase(name, g)]
        if p.ndim >= 2 and fits:
            unit, rows = fits[-1]
            out[unit] += (2 + 2 * p.requires_grad + 2 * below) * rows * count
        below = below or p.requires_grad
    return out
