"""Image files to pixels: paths, decoding, preprocessing.

    S side in pixels
"""

import math
import os
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from config import BadSample, stop

MAX_PIXELS = 64_000_000    # a header may promise more than memory holds: refuse before decoding
MAX_SIDE = 8_000           # a thin picture padded to a square would be more than memory holds: reduce it first
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]  # EPS would start Ghostscript


class ImageSpec(NamedTuple):
    """How a picture becomes S x S: pad = to a square of the mean colour, then resize (LLaVA-1.5); crop = resize the
    shorter side, cut out the centre (CLIP); squash = resize both sides (SigLIP)."""
    side: int
    aspect: str = "pad"
    resample: int = Image.BICUBIC
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    short: int = 0             # crop: the shorter side before the cut, where it is not S (DINOv2: 256, then 224)


def safe_path(root, name):
    """A file below root, whatever the name says and wherever links lead."""
    shown = f"{name!r:.200}"                                   # repr: a name may hold what no terminal can print
    root = os.path.realpath(root)
    try:
        path = os.path.realpath(os.path.join(root, name))
    except (TypeError, ValueError):                            # not a string; a NUL or a lone surrogate in it
        raise BadSample("image name is not a path", shown) from None
    if os.path.commonpath([root, path]) != root:
        raise BadSample("image lies outside the image folder", shown)
    if not os.path.exists(path):
        raise BadSample("image is missing", shown)
    if not os.path.isfile(path):                               # never open a pipe or a device: it may not answer
        raise BadSample("image is not a file", shown)
    return path


def image_folder(path):
    """A folder that image names are relative to. A wrong one ends here, not after a step of missing pictures."""
    if not os.path.isdir(path or "."):
        stop(f"images={path} is no folder")


def load_image(path):
    """-> PIL image, RGB, upright. Transparency shows white; 16 bits are scaled; an animation is its first frame, and
    its info says so."""
    name = repr(os.path.basename(path))
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            image.load()
            still = rgb(upright(image))
            still.info = {"animated": animated(image)}
            return still
    except BadSample as e:
        raise BadSample(e.reason, name) from None
    except Image.DecompressionBombError as e:
        raise BadSample("image is too large", f"{name}, {e} pixels; the limit is {MAX_PIXELS:,}") from None
    except Exception as e:                                     # Pillow raises almost anything on a broken file
        raise BadSample("image cannot be read", f"{name} ({type(e).__name__})") from None


def upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:                                          # EXIF that cannot be read does not say what is up
        return image


def animated(image):
    """Does a file hold more than the frame that was loaded?"""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:                                          # the first frame is whole, and no other is looked at
        return True


def rgb(image):
    if image.mode.startswith("I"):                             # 16 or 32 bits: convert("RGB") would cut at 255
        a = np.asarray(image).astype(np.int64).clip(0, 65535)
        if image.mode != "I" or a.max() > 255:                 # 32 bits may also hold 8
            a = a // 257
        image = Image.fromarray(a.astype(np.uint8))
    elif image.mode == "F":
        a = np.asarray(image)
        if not (a.min() >= 0 and a.max() <= 255):              # so written because NaN compares false
            raise BadSample("image holds floats outside 0..255")
        image = Image.fromarray((a * (255 if a.max() <= 1 else 1)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def preprocess(image, spec):
    """PIL RGB -> (3, S, S) uint8; equal to the pixels of transformers' Pillow processors before they normalise, for
    sides of at most MAX_SIDE."""
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
    else:                                                      # very thin: resize no more than the crop will keep
        box = (left * w / W, top * h / H, (left + S) * w / W, (top + S) * h / H)
        image = image.resize((S, S), spec.resample, box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
