"""Turn RGB images into the pixels that the vision tower reads. S: side of a preprocessed image in pixels."""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from formats.image_files import MAX_PIXELS

MAX_SIDE = 8_000           # an image with a longer side is shrunk before padding: its square could fill the memory


class ImageSpec(NamedTuple):
    """How an image becomes S x S pixels. pad: add borders in the mean colour to get a square, then resize (LLaVA-1.5).
    crop: resize the shorter side, then cut out the centre (CLIP). squash: resize both sides to S (SigLIP)."""
    side: int
    aspect: str = "pad"
    resample: int = Image.BICUBIC
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    short: int = 0             # for crop: shorter side before the cut; 0 means S. DINOv2 resizes to 256, cuts to 224


class Layout(NamedTuple):
    """The ids of an image in the sequence: `tokens` placeholders. Other systems have other layouts (parts/tiles.py)."""
    image_id: int
    tokens: int
    needs_image = False        # do the ids depend on the size of the image?

    def block(self, image=None):
        """A path or a PIL image -> the ids of this image"""
        return [self.image_id] * self.tokens

    def cut(self, image):
        """A PIL image -> the PIL images that the vision tower sees for it"""
        return [image]


def preprocess(image, spec):
    """RGB PIL image -> (3, S, S) uint8. For sides of at most MAX_SIDE, the pixels equal those of transformers' Pillow
    processors before normalisation."""
    S = spec.side
    if max(image.size) > MAX_SIDE:
        image = image.reduce(math.ceil(max(image.size) / MAX_SIDE))
    w, h = image.size
    if spec.aspect == "pad" and w != h:
        canvas = Image.new("RGB", (max(w, h),) * 2, tuple(int(255 * m) for m in spec.mean))
        canvas.paste(image, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
        image, w, h = canvas, max(w, h), max(w, h)
    W, H = (S, S)
    if spec.aspect == "crop":
        short = spec.short or S
        W, H = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    left, top = (W - S) // 2, (H - S) // 2
    if W * H <= MAX_PIXELS:
        image = image.resize((W, H), spec.resample).crop((left, top, left + S, top + S))
    else:                                                      # a very thin image: resize only the part that is kept
        box = (left * w / W, top * h / H, (left + S) * w / W, (top + S) * h / H)
        image = image.resize((S, S), spec.resample, box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
