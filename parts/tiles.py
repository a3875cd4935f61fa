"""An image as several squares (tiles) in the sequence: the vision tower sees each tile as an image of its own.

    grid      InternVL 1.5 (arXiv 2404.16821, section 3.2): the image is resized to a grid of squares of side S. The
              grid has the aspect ratio that is closest to the image's. A thumbnail of the whole image follows
    rows      Fuyu (adept.ai/blog/fuyu-8b): a tile is one patch. The image keeps its size, or shrinks to the largest
              size; its last row and column of patches are filled up. An id ends each row of patches
    anyres    LLaVA-NeXT (llava-vl.github.io/blog/2024-01-30-llava-next): a small picture of the whole image, and the
              image in a grid of tiles with black borders. The features of the borders get no placeholder
    split     Idefics3 (arXiv 2408.12637, section 3.1) and SmolVLM (arXiv 2504.05299, section 2): the longer side gets
              one length, then both sides become multiples of S. A small picture of the whole image follows the tiles.
              The place of each tile is written in front of it

    before    ids in front of an image   after   ids behind it   row_end    ids behind a row of tiles
    S side of a tile in pixels   w, h width and height of an image   Q placeholders per tile
"""

import contextlib
import math
import os
from dataclasses import dataclass, fields

from PIL import Image

from config import BadSample, stop
from formats.image_files import FORMATS, MAX_PIXELS


def image_size(source):
    """A path, a file in memory or a PIL image -> (w, h) as image_files.load_image gives it, mostly from the header.
    BadSample on failure."""
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
        name = repr(os.path.basename(source)) if isinstance(source, str | os.PathLike) else type(source).__name__
        raise BadSample("image cannot be read", f"{name} ({type(e).__name__})") from None


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


@dataclass
class Anyres:
    """The layout of LLaVA-NeXT. The Q features of a tile are n x n. The features of all tiles together are one picture
    of the image, R rows of C features without the borders. Its placeholders: Q for the small picture of the whole
    image, then R times C + 1, because one more vector ends each row (parts/anyres.py).

    The model must know the grid and the borders. So the first placeholder of an image has an id of its own: its four
    bytes are the numbers of tiles (rows, columns), R and C. This id is at least 2^24, more than any vocabulary has."""
    image_id: int
    tokens: int
    side: int
    grids: tuple = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))    # (columns, rows) to choose from
    resample: int = Image.BICUBIC
    needs_image = True

    def __post_init__(self):
        self.n = math.isqrt(self.tokens)
        if self.n**2 != self.tokens or self.n < 2:
            stop(f"layout of images: anyres needs a square of tokens per tile, at least 2 x 2, not {self.tokens}")
        if not self.grids or not all(0 < k * self.n < 256 for grid in self.grids for k in grid):
            stop(f"layout of images: grids={self.grids} of {self.n} x {self.n} tokens per tile: anyres needs at least "
                 "one grid, and at most 255 features on a side")

    def grid(self, w, h):
        """-> columns, rows of the grid that shows most pixels of the image; of equal ones, the smallest; the first"""
        def cost(grid):
            W, H = (k * self.side for k in grid)
            scale = min(W / w, H / h)
            shown = min(int(w * scale) * int(h * scale), w * h)
            return -shown, W * H - shown

        return min(self.grids, key=cost)

    def block(self, image):
        """A path or a PIL image -> the ids of this image"""
        w, h = image_size(image)
        columns, rows = self.grid(w, h)
        C, R = columns * self.n, rows * self.n
        if w / h > C / R:                                      # borders above and below, else left and right
            R -= (R - int(round(h * (C / w), 7))) // 2 * 2
        else:
            C -= (C - int(round(w * (R / h), 7))) // 2 * 2
        first = rows << 24 | columns << 16 | R << 8 | C
        return [first] + [self.image_id] * (self.tokens - 1 + R * (C + 1))

    def cut(self, image):
        """A PIL image -> PIL images of side S: the whole image, then its tiles row by row"""
        (w, h), S, (columns, rows) = image.size, self.side, self.grid(*image.size)
        W, H = columns * S, rows * S
        size = (W, min(math.ceil(h * (W / w)), H)) if W / w < H / h else (min(math.ceil(w * (H / h)), W), H)
        canvas = Image.new("RGB", (W, H))
        canvas.paste(image.resize(size, self.resample), ((W - size[0]) // 2, (H - size[1]) // 2))
        tiles = [canvas.crop((x, y, x + S, y + S)) for y in range(0, H, S) for x in range(0, W, S)]
        return [image.resize((S, S), self.resample), *tiles]


@dataclass
class Split:
    """The layout of Idefics3. An image that fits into one tile is not split"""
    image_id: int
    tokens: int
    side: int
    longest: int = 1456        # of the longer side in pixels
    split: bool = True         # False: every image becomes one tile
    before: tuple = ()         # ids in front of every tile; then those of its place:
    cells: tuple = ()          # for each place in a square grid, row by row, its ids
    whole: tuple = ()          # ids of the place of the small picture
    row_end: tuple = ()
    grid_end: tuple = ()       # in place of the last row_end
    after: tuple = ()          # ids behind an image
    resample: int = Image.LANCZOS
    needs_image = True

    @property
    def most(self):
        """Most tiles on a side"""
        return math.ceil(min(self.longest + self.longest % 2, 4096) / self.side)

    def __post_init__(self):
        if self.cells and len(self.cells) != self.most**2:
            stop(f"layout of images: {len(self.cells)} cells for a grid of at most {self.most} x {self.most} tiles")

    def sizes(self, w, h):
        """-> two sizes (w, h): of the image with `longest`, and in whole tiles. Idefics3's code makes the shorter side
        even, and allows no side above 4096"""
        aspect, L = w / h, self.longest

        def even(n):
            return max(1, n + n % 2)

        w, h = (L, even(int(L / aspect))) if w >= h else (even(int(L * aspect)), L)
        aspect, L = w / h, min(max(w, h), 4096)
        if max(w, h) > L:
            w, h = (L, max(1, int(L / aspect))) if w >= h else (max(1, int(L * aspect)), L)
            aspect = w / h

        def tiles(n):
            return math.ceil(n / self.side) * self.side

        W, H = (tiles(w), tiles(int(tiles(w) / aspect))) if w >= h else (tiles(int(tiles(h) * aspect)), tiles(h))
        return (w, h), ((W, H) if self.split else (self.side,) * 2)

    def grid(self, w, h):
        return tuple(n // self.side for n in self.sizes(w, h)[1])

    def block(self, image):
        """A path or a PIL image -> the ids of this image"""
        columns, rows = self.grid(*image_size(image))
        tile, out, cells = [self.image_id] * self.tokens, [], self.cells or [()] * self.most**2
        for r in range(rows if columns * rows > 1 else 0):
            for c in range(columns):
                out += [*self.before, *cells[r * self.most + c], *tile]
            out += self.row_end if r + 1 < rows else self.grid_end
        return [*out, *self.before, *self.whole, *tile, *self.after]

    def cut(self, image):
        """A PIL image -> PIL images of side S: its tiles row by row, then the whole image"""
        S, (first, (W, H)) = self.side, self.sizes(*image.size)
        image = image.resize(first, self.resample).resize((W, H), self.resample)
        tiles = [image.crop((x, y, x + S, y + S)) for y in range(0, H, S) for x in range(0, W, S)]
        return tiles + [image.resize((S, S), self.resample)] * (len(tiles) > 1)


LAYOUTS = {"grid": Tiles, "rows": PatchRows, "anyres": Anyres, "split": Split}


def layout(cfg):
    """VLMConfig with a dict `layout` -> one of LAYOUTS. The key "kind" says which; the others are fields."""
    settings = dict(cfg.layout)
    if (kind := settings.pop("kind", None)) not in list(LAYOUTS):
        stop(f"layout of images of kind {kind!r}: {' or '.join(LAYOUTS)}")
    Kind = LAYOUTS[kind]
    if unknown := settings.keys() - {f.name for f in fields(Kind)}:
        stop(f"layout of images: unknown key {sorted(unknown)[0]!r}")
    return Kind(cfg.image_token_index, cfg.image_tokens, cfg.vision.image_size, **settings)
