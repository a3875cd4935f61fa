"""Read image files: check their paths, and decode them to upright RGB images. Pillow raises many kinds of errors on
broken files and converts some modes wrongly: both are handled here. images.py makes pixels of the RGB images."""

import contextlib
import io
import os

import numpy as np
from PIL import Image, ImageOps

from config import BadSample, stop

MAX_PIXELS = 64_000_000    # limit per image, checked before decoding: a larger image may need too much memory
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]        # not EPS: Pillow would start the program Ghostscript


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
