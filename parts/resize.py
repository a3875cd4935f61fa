"""Images of another size than a model was trained on: the tables of positions are resampled, all else stays as it is.

Two uses: a vision tower whose image processor has another size; and stages of growing size, as in Qwen-VL (arXiv
2308.12966, section 3: 224, then 448 pixels), PaliGemma (2407.07726: 224, 448, 896) and PaLI-3 (2310.09199: 224, 812,
1064). Such a stage starts with --init=RUN --parts="vision.image_size=448".

The convention is that of interpolate_pos_encoding in transformers: bicubic, align_corners=False, antialias only for
DINOv2 with registers, computed in fp32; the position of a class token stays. A table of the same size stays as it is.

    n, m patches along the side of an image, before and after   D ViT width   P patches   Q tokens of an image
"""

import math
import re

import torch
import torch.nn.functional as F

from config import stop
from parts.build import ONE_EACH
from parts.shuffle import group_side

POSITIONS = "vision_model.embeddings.position_embedding.weight"               # the position table of a vision tower
CONNECTOR = "multi_modal_projector.position_embedding"     # of the C-Abstractor: one row per patch
LARGER = 4  # limit of an image side, in multiples of the side in training: the number of tokens grows with its square


def grid(table, m, antialias=False):
    """(n n, D) -> (m m, D)"""
    n = math.isqrt(len(table))
    x = table.float().view(1, n, n, -1).permute(0, 3, 1, 2)                                        # (1, D, n, n)
    x = F.interpolate(x, size=(m, m), mode="bicubic", antialias=antialias)
    return x.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


def check_side(v, side):
    """Stop if a tower with VisionConfig v cannot read images of this side"""
    if not v.patch_size <= side <= LARGER * v.image_size:
        stop(f"images of side {side}; this vision tower was trained on {v.image_size}, and its positions can be "
             f"resampled for {v.patch_size} to {LARGER * v.image_size}")


def resampled(table, v, side):
    """Position table (first + n n, D) of a tower with VisionConfig v -> (first + m m, D), for images of this side;
    first: 1 with a class token, else 0"""
    check_side(v, side)
    n, m, first = v.image_size // v.patch_size, side // v.patch_size, int(v.class_token)
    if m == n:
        return table
    return torch.cat([table[:first], grid(table[first:], m, v.model_type == "dinov2_with_registers")])


def resize(cfg, tensors, side):
    """Change a VLMConfig and its {our name: tensor} to images of this side. A Qwen-VL tower has no table to resample:
    it does so itself in every forward pass."""
    v, P = cfg.vision, cfg.vision.patches
    r = group_side(P, cfg.tokens) if cfg.connector in ("shuffle", "shuffle_linear") else 0
    for tower, w in (("", v), ("second.", cfg.second)):
        if w:
            check_side(w, side)                                # a Qwen-VL tower has no table
            if (name := f"vision_tower.{tower}{POSITIONS}") in tensors:
                tensors[name] = resampled(tensors[name], w, side)
            w.image_size = side
    if CONNECTOR in tensors and v.patches != P:
        tensors[CONNECTOR] = grid(tensors[CONNECTOR], math.isqrt(v.patches))
    if r:                                                      # as many patches per token as before
        if math.isqrt(v.patches) % r:
            stop(f"images of side {side}: {v.patches} patches are not groups of {r} x {r}, as the connector reads them")
        cfg.tokens = v.patches // r ** 2
    elif cfg.tokens and cfg.connector in ONE_EACH:
        cfg.tokens += v.patches - P


def asked_side(parts, cfg, init):
    """The setting `parts` of a run that starts from a whole model -> the side of its images. Nothing else may change"""
    found = re.fullmatch(r"vision\.image_size=(\d{1,5})", parts)
    if not found:
        stop(f"{init} brings its own parts; only vision.image_size=N may change, so parts={parts} would not be read")
    if cfg.layout:
        stop(f"parts={parts}: {init} cuts images into tiles, and their size cannot change")
    return int(found[1])


def processor(pre, old, new):
    """preprocessor_config.json for images of side `old` -> the same for side `new`"""
    def scaled(size):
        if isinstance(size, dict):
            return {k: scaled(x) for k, x in size.items()}
        return round(size * new / old) if isinstance(size, int) else size

    return pre | {k: scaled(pre[k]) for k in ("size", "crop_size") if k in pre}
