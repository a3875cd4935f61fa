"""Perceptual hashes, and the index of near ones against all pairs."""

import io
import time

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from demo import toy
from tools.image_hash import BITS, HashIndex, image_hash


def distance(a, b):
    return int(np.bitwise_count(a ^ b).sum())


def random_hashes(n, flips, seed=0):
    """n hashes: some random ones, and others that differ from an earlier one in up to `flips` bits"""
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        h = rng.integers(0, 2**64, 3, np.uint64)
        if i and rng.random() < 0.7:
            bits = rng.choice(BITS, rng.integers(0, min(flips, BITS) + 1), replace=False)
            h = out[rng.integers(i)].copy()
            for b in bits.tolist():
                h[b // 64] ^= np.uint64(1 << b % 64)
        out.append(h)
    return out


@pytest.mark.parametrize("most", [0, 1, 7, 16, 47, 191])
def test_the_index_equals_all_pairs(most):
    hashes, index = random_hashes(200, 2 * most + 2, most), HashIndex(most)
    assert sum(mask.bit_count() for _, mask in index.bands) == BITS and len(index.bands) == most + 1
    found = 0
    for i, h in enumerate(hashes):
        near = {j: d for j in range(i) if (d := distance(h, hashes[j])) <= most}
        assert index.near([h]) == near and [*index.near([h])] == sorted(near)
        found += len(near)
        index.add([h], i)
    assert found > 60


def test_every_image_of_a_row_must_be_near():
    """A row of two images is compared with rows of two images alone, image by image."""
    a, b, c = (np.array([x, 0, 0], np.uint64) for x in (0, 0b111, 2**64 - 1))
    index = HashIndex(3)
    for row, hashes in ((4, [a, b]), (5, [a]), (6, [b, a]), (8, [a, c])):
        index.add(hashes, row)
    assert index.near([b, b]) == {4: 3, 6: 3} and index.near([a, c]) == {8: 0} and index.near([b]) == {5: 3}
    assert index.near([c, a]) == {} and index.near([a] * 3) == {}


def test_the_hash_is_the_cosine_transform():
    """Its definition, sum for sum, on one channel; a constant is added to the others, and changes their mean alone."""
    rng = np.random.default_rng(1)
    pixels = np.repeat(rng.integers(40, 200, (32, 32, 1)), 3, 2).astype(np.uint8)
    sums = [sum(float(pixels[y, x, 0]) * np.cos(np.pi * u * (2 * y + 1) / 64) * np.cos(np.pi * v * (2 * x + 1) / 64)
                for y in range(32) for x in range(32)) for u in range(8) for v in range(8)]
    bits = int("".join(str(int(s > np.median(sums))) for s in sums), 2)
    image = Image.fromarray(pixels + np.array([0, 9, 50], np.uint8))
    assert image_hash(image).tolist() == [bits] * 3 and bits.bit_count() == 32
    flat = [image_hash(Image.new("RGB", (50, 70), colour)).tolist() for colour in ("black", (1, 2, 3), "white")]
    assert flat == [[0] * 3, [2**63] * 3, [2**63] * 3], "a flat image has its mean, and no noise of rounding"


def test_saved_again_is_near_another_scene_is_far():
    """Scenes of the toy world: as JPEG, at half the size, lighter; all distances to other scenes are larger."""
    import random
    scenes = [toy.draw_scene(toy.make_scene(random.Random(i), test=True), i).convert("RGB") for i in range(40)]
    own, changed = [image_hash(s) for s in scenes], []
    for scene, h in zip(scenes, own):
        file = io.BytesIO()
        scene.save(file, "jpeg", quality=90)
        for other in (Image.open(file), scene.resize((36, 36), Image.BICUBIC), scene.resize((150, 150), Image.BICUBIC),
                      ImageEnhance.Brightness(scene).enhance(1.1)):
            changed.append(distance(h, image_hash(other.convert("RGB"))))
    others = [distance(a, b) for i, a in enumerate(own) for b in own[:i]]
    assert np.mean(np.array(changed) <= 16) > 0.9 and min(others) > 16


def test_a_hundred_thousand_images_take_seconds():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (2000, 3), np.uint64)
    index, compared, began = HashIndex(16), 0, time.process_time()
    for i, h in enumerate(hashes):
        compared += len({p for key in index.keys([h]) for p in index.places.get(key, ())})
        index.near([h])
        index.add([h], i)
    assert compared < 0.02 * 2000**2 / 2, "of all pairs"
    assert time.process_time() - began < 5
