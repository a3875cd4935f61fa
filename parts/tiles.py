"""An image as several squares (tiles) in the sequence: the vision tower sees each tile as an image of its own.

    grid      InternVL 1.5 (arXiv 2404.16821, section 3.2): the image is resized to a grid of squares of side S. The
              grid has the aspect ratio that is closest to the image's. A thumbnail of the whole image follows
    rows      Fuyu (adept.ai/blog/fuyu-8b): a tile is one patch. The image keeps its size, or shrinks to the largest
              size; its last row and column of patches are filled up. An id ends each row of patches

    before    ids in front of an image   after   ids behind it   row_end    ids behind a row of tiles
    S side of a tile in pixels   w, h width and height of an image   Q placeholders per tile
"""

import contextlib
import math
import os
from dataclasses import dataclass, fields

from PIL import Image

from config import BadSample, stop
from images import FORMATS, MAX_PIXELS


def image_size(source):
    """A path or a PIL image -> (w, h) as images.load_image gives it, mostly from the header. BadSample on failure."""
    if isinstance(source, Image.Image):
        return source.size
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:        # load_image refuses it: the size does not matter
                return image.size
            if image.format == "TIFF":                         # Pillow turns a TIFF itself when it decodes the file
                image.load()
            turned = False
            with contextlib.suppress(Exception):               # broken EXIF: load_image does not turn the image
                turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)    # these swap width and height
            return image.size[::-1] if turned else image.size
    except Exception as e:                                     # Pillow raises many exception types on a broken file
        raise BadSample("image cannot be read", f"{os.path.basename(source)!r} ({type(e).__name__})") from None


@dataclass
class Tiles:
    """The layout of an image as a grid of tiles (images.Layout has the same methods)."""
    image_id: int
    tokens: int                # Q
    side: int                  # S
    least: int = 1             # fewest tiles of a grid
    most: int = 12             # most tiles of a grid, without the thumbnail
    grids: tuple = ()          # (columns, rows) to choose from, in place of least and most; MM1: [[2, 2]]
    thumbnail: bool = True
    before: tuple = ()
    after: tuple = ()
    row_end: tuple = ()
    resample: int = Image.BICUBIC
    needs_image = True

    def grid(self, w, h):
        """-> columns, rows. Of two grids equally close to w / h, the larger one wins if at least half of its pixels
        would come from the image."""
        best, least_off = (1, 1), math.inf
        sizes = range(1, self.most + 1)
        grids = self.grids or [(c, r) for c in sizes for r in sizes if self.least <= c * r <= self.most]
        for c, r in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            off = abs(w / h - c / r)
            if off < least_off or off == least_off and w * h > 0.5 * self.side**2 * c * r:
                best, least_off = (c, r), off
        return best

    def block(self, image):
        """A path or a PIL image -> the ids of this image"""
        columns, rows = self.grid(*image_size(image))
        whole = self.thumbnail and columns * rows > 1
        tile = [self.image_id] * self.tokens
        return [*self.before, *(tile * columns + [*self.row_end]) * rows, *tile * whole, *self.after]

    def resized(self, image, columns, rows):
        return image.resize((columns * self.side, rows * self.side), self.resample)

    def cut(self, image):
        """A PIL image -> its tiles row by row, then the thumbnail: PIL images of side S"""
        columns, rows = self.grid(*image.size)
        S, whole = self.side, self.resized(image, columns, rows)
        tiles = [whole.crop((c * S, r * S, c * S + S, r * S + S)) for r in range(rows) for c in range(columns)]
        return tiles + [image.resize((S, S), self.resample)] * (self.thumbnail and len(tiles) > 1)


@dataclass
class PatchRows(Tiles):
    """The layout of an image as rows of patches. largest: (w, h) above which an image shrinks; fill: grey of the pixels
    that fill up the last row and column"""
    thumbnail: bool = False
    largest: tuple = (1920, 1080)
    fill: int = 1
    resample: int = Image.BILINEAR

    def shrunk(self, w, h):
        """-> w, h of at most `largest`, with the same aspect ratio. Smaller images keep their size."""
        W, H = self.largest
        scale = min(H / h, W / w)
        return (max(1, int(w * scale)), max(1, int(h * scale))) if w > W or h > H else (w, h)

    def grid(self, w, h):
        return tuple(math.ceil(n / self.side) for n in self.shrunk(w, h))

    def resized(self, image, columns, rows):
        small = self.shrunk(*image.size)
        image = image if small == image.size else image.resize(small, self.resample)
        canvas = Image.new("RGB", (columns * self.side, rows * self.side), (self.fill,) * 3)
        canvas.paste(image)
        return canvas


LAYOUTS = {"grid": Tiles, "rows": PatchRows}


def layout(cfg):
    """VLMConfig with a dict `layout` -> Tiles or PatchRows. The key "kind" says which; the others are fields."""
    settings = dict(cfg.layout)
    if (kind := settings.pop("kind", None)) not in list(LAYOUTS):
        stop(f"layout of images of kind {kind!r}: {' or '.join(LAYOUTS)}")
    Kind = LAYOUTS[kind]
    if unknown := settings.keys() - {f.name for f in fields(Kind)}:
        stop(f"layout of images: unknown key {sorted(unknown)[0]!r}")
    return Kind(cfg.image_token_index, cfg.image_tokens, cfg.vision.image_size, **settings)
