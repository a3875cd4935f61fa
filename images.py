"""Turn image files into pixels: check paths, decode, preprocess. S: side of a preprocessed image in pixels."""

import contextlib
import io
import math
import os
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from config import BadSample, stop

MAX_PIXELS = 64_000_000    # limit per image, checked before decoding: a larger image may need too much memory
MAX_SIDE = 8_000           # an image with a longer side is shrunk before padding: its square could fill the memory
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]        # not EPS: Pillow would start the program Ghostscript


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


# ---- paths ----------------------------------------------------------------------------------------------------------

def safe_path(root, name):
    """-> real path of the file `name` in `root`. BadSample if it is not a file, or outside (links are followed).
    If `name` is the bytes of an image -> these bytes as a file in memory"""
    if isinstance(name, bytes):
        return io.BytesIO(name)
    shown = f"{name!r:.200}"                                   # repr escapes unprintable characters
    root = os.path.realpath(root)
    try:
        path = os.path.realpath(os.path.join(root, name))
    except (TypeError, ValueError):                            # `name` is not text, or has a NUL or a lone surrogate
        raise BadSample("image name is not a path", shown) from None
    if os.path.commonpath([root, path]) != root:
        raise BadSample("image lies outside the image folder", shown)
    if not os.path.exists(path):
        raise BadSample("image is missing", shown)
    if not os.path.isfile(path):                               # opening a pipe or a device may block for ever
        raise BadSample("image is not a file", shown)
    return path


def image_folder(path):
    """Stop if `path` is not a folder: otherwise every image would be reported as missing."""
    if not os.path.isdir(path or "."):
        stop(f"images={path} is not a folder")


# ---- decoding -------------------------------------------------------------------------------------------------------

def load_image(source):
    """A path or a PIL image -> the first frame as an upright RGB image (PIL), on white where it was transparent.
    info["animated"]: are there more frames? Raises BadSample. Memory: 8 bytes per pixel, 16 with alpha."""
    name = repr(os.path.basename(source)) if isinstance(source, str | os.PathLike) else type(source).__name__
    try:
        given = isinstance(source, Image.Image)
        with contextlib.nullcontext(source) if given else Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            image.load()
            moving = True                                      # stays True if a broken later frame makes Pillow fail
            with contextlib.suppress(Exception):
                moving = getattr(image, "is_animated", False)
            image = rgb(upright(image))
            image.info = {"animated": moving}
            return image
    except BadSample as e:
        raise BadSample(e.reason, name) from None
    except Image.DecompressionBombError as e:
        raise BadSample("image is too large", f"{name}, {e} pixels; the limit is {MAX_PIXELS:,}") from None
    except Exception as e:                                     # Pillow raises many exception types on a broken file
        raise BadSample("image cannot be read", f"{name} ({type(e).__name__})") from None


def upright(image):
    """Rotate or flip a PIL image as its EXIF orientation says -> always a new image"""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:                                          # broken EXIF: the orientation is unknown
        return image.copy()


def rgb(image):
    """A PIL image of any mode -> RGB image on a white background. Raises BadSample for floats outside 0..255."""
    if image.mode.startswith("I"):                             # 16 or 32 bits: convert("RGB") would clip at 255
        a = np.asarray(image).astype(np.int64).clip(0, 65535)
        if image.mode != "I" or a.max() > 255:                 # some 32-bit files hold 8-bit values: not divided
            a = a // 257
        image = Image.fromarray(a.astype(np.uint8))
    elif image.mode == "F":
        a = np.asarray(image)
        if not (a.min() >= 0 and a.max() <= 255):              # with `not`, NaN is refused too
            raise BadSample("image holds floats outside 0..255")
        image = Image.fromarray((a * (255 if a.max() <= 1 else 1)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


# ---- preprocessing --------------------------------------------------------------------------------------------------

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
