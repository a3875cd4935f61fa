"""Near-duplicate images: a perceptual hash, and an index that finds near hashes without comparing all pairs.

The hash is pHash: the image at 32 x 32 pixels, its DCT-II, the 8 x 8 lowest frequencies, one bit for each: is it above
their median? (Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section 3.2.1; Krawetz,
hackerfactor.com, "Looks Like It", 2011.) Both sources use the brightness alone. Here each of the channels R, G, B has
its 64 bits, so a red thing and a blue one differ. The distance of two images is the number of bits that differ.

The index is exact. Its d + 1 bands divide the 192 bits. Two hashes that differ in at most d bits are equal in at least
one band, because d bits cannot touch d + 1 bands (the pigeonhole principle). So only the hashes that share a band with
a hash are compared with it: for d = 16, bands of 11 or 12 bits."""

from array import array
from itertools import pairwise

import numpy as np
from PIL import Image

SIDE, LOW, BITS = 32, 8, 192
DCT = np.cos(np.pi / (2 * SIDE) * np.arange(LOW)[:, None] * (2 * np.arange(SIDE) + 1))               # (LOW, SIDE)


def image_hash(image):
    """RGB image (PIL) -> (3,) uint64: 64 bits of each channel"""
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.LANCZOS), np.float64)                  # (SIDE, SIDE, 3)
    low = (DCT @ pixels.transpose(2, 0, 1) @ DCT.T).reshape(3, LOW * LOW).round(3)       # else 1e-14 sets a bit
    bits = np.ascontiguousarray(np.packbits(low > np.median(low, 1, keepdims=True), axis=1))          # (3, 8)
    return bits.view(">u8")[:, 0].astype(np.uint64)


class HashIndex:
    """Rows by the hashes of their images. Rows are compared if they have as many images."""

    def __init__(self, most):
        """most: the largest distance of near images"""
        self.most, edges = most, [BITS * b // (most + 1) for b in range(most + 2)]
        self.bands = [(a, (1 << b - a) - 1) for a, b in pairwise(edges)]         # first bit of a band, mask of its bits
        self.places = {}           # (images of a row, band, bits of its first image in this band) -> [place]
        self.hashes, self.rows = {}, {}                    # images of a row -> hashes of all places; row of each place

    def keys(self, hashes):
        bits = int.from_bytes(hashes[0].tobytes())
        return [(len(hashes), first, bits >> first & mask) for first, mask in self.bands]

    def near(self, hashes):
        """-> {row: largest distance of an image} of the rows that were added and of which every image is near the one
        of `hashes` at the same place; in the order in which they were added. hashes: [(3,)], at least one"""
        places = sorted({p for key in self.keys(hashes) for p in self.places.get(key, ())})
        if not places:
            return {}
        n, own = len(hashes), np.stack(hashes)                                                         # (n, 3)
        known = np.frombuffer(self.hashes[n], np.uint64).reshape(-1, n, 3)[places]                     # (places, n, 3)
        far = np.bitwise_count(known ^ own).sum(2, dtype=int).max(1)                                   # (places,)
        return {self.rows[n][p]: int(d) for p, d in zip(places, far) if d <= self.most}

    def add(self, hashes, row):
        rows, known = self.rows.setdefault(len(hashes), array("q")), self.hashes.setdefault(len(hashes), array("Q"))
        for key in self.keys(hashes):
            self.places.setdefault(key, array("q")).append(len(rows))
        rows.append(row)
        known.frombytes(np.stack(hashes).tobytes())
