"""Images: every kind of file has one declared outcome, and pixels equal those of transformers."""

import io
import os
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import GifImagePlugin, Image, ImageFile, ImageOps

from config import BadSample
from formats.image_files import load_image, safe_path
from images import ImageSpec, preprocess

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
RED, GREEN, BLUE, WHITE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (255, 255, 0)


def pixels(path):
    return np.asarray(load_image(str(path)))


def quarters(size=16):
    a = np.zeros((size, size * 2, 3), np.uint8)
    a[:size // 2, :size], a[:size // 2, size:], a[size // 2:, :size], a[size // 2:, size:] = RED, GREEN, BLUE, YELLOW
    return a


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, depth=8, color=2, rows=b"", extra=b""):
    """A PNG written by hand: its header may promise anything."""
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def saved(image, kind, **kwargs):
    out = io.BytesIO()
    image.save(out, kind, **kwargs)
    return out.getvalue()


# ---- conversions ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_after_all_eight_orientations(tmp_path, orientation):
    truth = quarters()
    # the turn of the upright image that the orientation undoes
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    image = Image.fromarray(truth)
    image = image if stored is None else image.transpose(stored)
    exif = Image.Exif()
    exif[0x112] = orientation
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
        image.save(tmp_path / "x", kind, exif=exif, **lossless)
        got = pixels(tmp_path / "x")
        assert got.shape == truth.shape and np.abs(got.astype(int) - truth).max() <= 2, kind  # 2: JPEG's rounding


def test_sixteen_bits_are_upright_too(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000).save(tmp_path / "x.png", exif=exif)
    assert pixels(tmp_path / "x.png").shape == (4, 3, 3)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, mode):
    ramp = np.arange(0, 65536, dtype=np.uint16).reshape(256, 256)
    image = Image.frombytes("I;16B", (256, 256), ramp.astype(">u2").tobytes()) if mode == "I;16B" else \
        Image.fromarray(ramp.astype(np.int32) if mode == "I" else ramp)
    image.save(tmp_path / "x.tif")
    got = pixels(tmp_path / "x.tif")
    assert (got[..., 0] == ramp // 257).all() and abs(got.mean() - 127) <= 1  # convert("RGB") gives a mean of 254


def test_eight_bits_stored_as_thirty_two_are_kept(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)).save(tmp_path / "x.tif")
    assert (pixels(tmp_path / "x.tif")[..., 0].ravel() == np.arange(256)).all()


@pytest.mark.parametrize("top, refused", [
    (1.0, False), (255.0, False), (300.0, True), (np.nan, True), (np.inf, True), (-0.5, True)])
def test_floats_are_scaled_or_refused(tmp_path, top, refused):
    a = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16) * (top if top > 1 and np.isfinite(top) else 1)
    a[-1, -1] = top
    Image.fromarray(a).save(tmp_path / "x.tif")
    if refused:
        with pytest.raises(BadSample, match="floats outside 0..255: 'x.tif'"):
            load_image(str(tmp_path / "x.tif"))
    else:
        assert abs(pixels(tmp_path / "x.tif").mean() - 127.5) < 1


@pytest.mark.parametrize("mode, colour, shown", [
    ("RGBA", (255, 0, 0, 0), WHITE), ("RGBA", (255, 0, 0, 255), RED), ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
    ("LA", (0, 0), WHITE), ("LA", (0, 255), (0, 0, 0))])
def test_transparent_pixels_become_white(tmp_path, mode, colour, shown):
    Image.new(mode, (3, 3), colour).save(tmp_path / "x.png")
    assert (pixels(tmp_path / "x.png") == shown).all()


def test_a_transparent_palette_colour_becomes_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    for kind in ("png", "gif"):
        image.save(tmp_path / f"p.{kind}", transparency=0)
        assert pixels(tmp_path / f"p.{kind}").tolist() == [[[255, 255, 255], [0, 0, 255]]]
    Image.new("RGB", (2, 1), RED).save(tmp_path / "t.png", transparency=RED)
    assert (pixels(tmp_path / "t.png") == 255).all()


@pytest.mark.parametrize("rgb", [RED, GREEN, BLUE, (128, 128, 128)])
def test_cmyk_keeps_its_colours(tmp_path, rgb):
    Image.new("CMYK", (8, 8), tuple(255 - v for v in rgb) + (0,)).save(tmp_path / "x.jpg", quality=100)
    assert np.abs(pixels(tmp_path / "x.jpg").astype(int) - rgb).max() <= 12


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", (4, 4), c) for c in (RED, GREEN, BLUE)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(tmp_path / "x", kind, save_all=True, append_images=frames[1:], **lossless)
    assert (pixels(tmp_path / "x") == RED).all()
    assert load_image(str(tmp_path / "x")).info == {"animated": True}
    frames[0].save(tmp_path / "x", kind, **lossless)
    assert load_image(str(tmp_path / "x")).info == {"animated": False}


def test_a_broken_second_frame_costs_nothing(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "x", "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "_seek", broken(GifImagePlugin.GifImageFile._seek))
    image = load_image(str(tmp_path / "x"))
    assert (np.asarray(image) == RED).all() and image.info == {"animated": True}


def broken(seek):
    def wrapper(self, frame, update_image=True):
        if frame:
            raise SyntaxError("frame")
        return seek(self, frame, update_image)
    return wrapper


# ---- bombs ----------------------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # ours is the stricter limit
@pytest.mark.parametrize("width, height, color", [
    (8001, 8000, 0), (10_000, 10_000, 2), (20_000, 20_000, 2), (60_000, 60_000, 0), (2**31 - 1, 2, 0)])
def test_a_huge_image_is_refused_before_decoding(tmp_path, width, height, color, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *a: pytest.fail("decoded"))
    (tmp_path / "x.png").write_bytes(png(width, height, 8, color, b"\0" * 1000))
    with pytest.raises(BadSample, match="image is too large: 'x.png'"):
        load_image(str(tmp_path / "x.png"))


@pytest.mark.parametrize("size, aspect", [((1, 5000), "crop"), ((5000, 1), "crop"), ((9000, 3), "squash"),
                                          ((3, 70_000), "pad"), ((3, 70_000), "crop")])
def test_a_thin_image_needs_little_memory(size, aspect):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = preprocess(Image.new("RGB", size, BLUE), ImageSpec(336, aspect))
    assert out.shape == (3, 336, 336)
    assert out[:, 0, 0].tolist() == ([122, 116, 104] if aspect == "pad" else [0, 0, 255])
    assert out[2, 168, 168] > 104, "the image is in the middle"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB; (3, 70000) squared is 20 GB


def test_the_crop_of_a_thin_image_is_central():
    ramp = np.clip((np.arange(5000) - 2497) * 50, 0, 255).astype(np.uint8)  # rises around the middle pixel alone
    lying = np.repeat(ramp[None, :, None], 3, 2)
    S, W = 336, 336 * 5000
    truth = (((W - S) // 2 + np.arange(S) + 0.5) * 5000 / W - 0.5 - 2497) * 50  # cubic interpolation keeps a line
    for image, axis in ((lying, 1), (lying.transpose(1, 0, 2), 0)):
        x = preprocess(Image.fromarray(image), ImageSpec(S, "crop")).numpy()
        assert np.abs(x[0].mean(1 - axis) - truth).max() <= 1


# ---- the corpus -----------------------------------------------------------------------------------------------------

def corpus():
    """name -> (bytes, outcome): None = it loads, else the beginning of the reason."""
    noise = Image.fromarray(NOISE)
    jpeg, whole = saved(Image.fromarray(np.tile(NOISE, (8, 8, 1))), "JPEG"), saved(noise, "PNG")
    unread, tiff = "image cannot be read", b"Exif\0\0MM\0*\0\0\0\x08"
    flip = lambda b, i: b[:i] + bytes([b[i] ^ 0x10]) + b[i + 1:]  # noqa: E731
    rows = b"".join(b"\0" + y.tobytes() for y in NOISE)  # each row begins with its filter, none
    files = {
        "empty": (b"", unread), "one_byte": (b"\xff", unread), "zeros": (bytes(4096), unread),
        "random": (RNG.bytes(4096), unread), "html": (b"<!DOCTYPE html><html>404 not found</html>", unread),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", unread),
        "pdf": (b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n", unread), "json": (b'{"error": "rate limit"}', unread),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", unread),
        "zip": (b"PK\3\4" + bytes(60), unread), "ppm": (saved(noise, "PPM"), unread),
        "ico": (saved(noise, "ICO"), unread), "tga": (saved(noise, "TGA"), unread),
        "xbm": (b"#define x_width 2\n#define x_height 2\nstatic char x_bits[] = {0};", unread),
        "lfs_pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", unread),
        "jpeg_header_cut": (jpeg[:20], unread), "jpeg_half": (jpeg[:len(jpeg) // 2], unread),
        "jpeg_no_end": (jpeg[:-2], unread), "png_header_cut": (whole[:20], unread),
        "png_half": (whole[:len(whole) // 2], unread), "png_flip": (flip(whole, len(whole) // 2), unread),
        "png_flip_in_header": (flip(whole, 18), unread), "png_signature_alone": (whole[:8], unread),
        "png_too_few_rows": (png(17, 13, rows=rows[:100]), unread), "png_no_pixels": (png(0, 0), unread),
        "png_text_bomb": (png(17, 13, rows=rows, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(4_000_000)))),
                          unread),
        "gif_half": (saved(noise, "GIF")[:300], unread), "webp_half": (saved(noise, "WEBP")[:60], unread),
        "bmp_half": (saved(noise, "BMP")[:100], unread), "tiff_half": (saved(noise, "TIFF")[:200], unread),
        "jpeg_flip": (flip(jpeg, len(jpeg) // 2), None),  # cannot be detected: JPEG has no checksum
        "jpeg_trailing": (jpeg + b"<?php ?>" * 100, None), "png_trailing": (whole + bytes(100), None),
        "png_named_jpg": (whole, None), "gif_named_jpg": (saved(noise, "GIF"), None),
        "gray": (saved(noise.convert("L"), "PNG"), None), "one_bit": (saved(noise.convert("1"), "PNG"), None),
        "palette": (saved(noise.convert("P"), "PNG"), None), "gray_alpha": (saved(noise.convert("LA"), "PNG"), None),
        "rgba": (saved(noise.convert("RGBA"), "PNG"), None), "cmyk": (saved(noise.convert("CMYK"), "JPEG"), None),
        "cmyk_tiff": (saved(noise.convert("CMYK"), "TIFF"), None),
        "ycbcr_tiff": (saved(noise.convert("YCbCr"), "TIFF"), None),
        "lab_tiff": (saved(Image.new("LAB", (17, 13)), "TIFF"), None),
        "float": (saved(noise.convert("F"), "TIFF"), None),
        "sixteen": (saved(Image.fromarray(NOISE[..., 0].astype(np.uint16)), "PNG"), None),
        "rgb_sixteen": (png(17, 13, 16, 2, b"".join(b"\0" + y.astype(">u2").tobytes() for y in NOISE)), None),
        "progressive": (saved(noise, "JPEG", progressive=True), None),
        "icc": (saved(noise, "JPEG", icc_profile=b"not a profile"), None),
        "bad_exif": (saved(noise, "JPEG", exif=b"Exif\0\0garbage that is not a TIFF header"), None),
        "exif_99": (saved(noise, "JPEG", exif=tiff + b"\0\x01\x01\x12\0\x03\0\0\0\x01\0c\0\0\0\0\0\0"), None),
        "exif_cut": (saved(noise, "JPEG", exif=tiff + b"\0\xff\x01\x12"), None),
        "animated_gif": (saved(noise, "GIF", save_all=True, append_images=[noise]), None),
        "animated_webp": (saved(noise, "WEBP", save_all=True, append_images=[noise]), None),
        "apng": (saved(noise, "PNG", save_all=True, append_images=[noise.rotate(180)]), None),
        "bmp": (saved(noise, "BMP"), None), "mpo": (saved(noise, "MPO", save_all=True, append_images=[noise]), None),
        "tiff_lzw": (saved(noise, "TIFF", compression="tiff_lzw"), None),
        "1x1": (saved(noise.crop((0, 0, 1, 1)), "PNG"), None),
        "1x5000": (saved(Image.new("RGB", (1, 5000)), "PNG"), None),
        "bomb_64mp": (png(8001, 8000), "image is too large"), "bomb_3.6gp": (png(60_000, 60_000), "image is too large"),
        "bomb_gif": (b"GIF89a" + b"\xff" * 4 + b"\0\0\0,\0\0\0\0" + b"\xff" * 4 + b"\0\x02\0;", "image is too large"),
        "bomb_bmp": (saved(noise, "BMP")[:18] + struct.pack("<ii", 50_000, 50_000) + saved(noise, "BMP")[26:],
                     "image is too large"),
    }
    return files


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some of these files, rightly
def test_every_odd_file_has_its_declared_outcome(tmp_path):
    files = corpus()
    assert len(files) >= 60
    wrong = {}
    for name, (blob, outcome) in files.items():
        (tmp_path / name).write_bytes(blob)
        try:
            image = load_image(safe_path(tmp_path, name))
            got = None if image.mode == "RGB" and min(image.size) > 0 else image.mode
            assert preprocess(image, ImageSpec(8)).shape == (3, 8, 8)
        except BadSample as e:
            got = e.reason
            assert repr(name) in str(e) and "\n" not in str(e), "a message names the file and is one line"
        if got != outcome:
            wrong[name] = (got, outcome)
    assert not wrong


def test_a_name_outside_the_folder_is_refused(tmp_path):
    root = tmp_path / "images"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(saved(Image.new("RGB", (2, 2)), "PNG"))
    (root / "out").symlink_to(tmp_path)
    (root / "broken").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    (root / "device").symlink_to("/dev/zero")
    os.mkfifo(root / "fifo")
    outside = "image lies outside the image folder"
    outcomes = {
        "missing.png": "image is missing", "broken": "image is missing", "loop": "image is missing",
        "x" * 5000: "image is missing", "a/" * 3000: "image is missing", "..%2fsecret.png": "image is missing",
        "..\\secret.png": "image is missing", "folder": "image is not a file", "": "image is not a file",
        ".": "image is not a file", "fifo": "image is not a file", "../secret.png": outside,
        "folder/../../secret.png": outside, "out/secret.png": outside, "/etc/passwd": outside, "device": outside,
        str(tmp_path / "secret.png"): outside, "..": outside, "/": outside, "../images2/x": outside,
        "a\0b": "image name is not a path", "\ud800": "image name is not a path", None: "image name is not a path",
        5: "image name is not a path"}
    for name, reason in outcomes.items():
        with pytest.raises(BadSample) as e:
            safe_path(root, name)
        assert e.value.reason == reason, name
        str(e.value).encode("utf-8"), "whatever the name, the message can be printed"
        assert len(str(e.value)) < 300
    (root / "in").symlink_to(root / "folder")
    (root / "folder" / "x.png").write_bytes(b"x")
    (tmp_path / "link").symlink_to(root)
    for name in ("folder/x.png", "in/x.png", "folder/../in/x.png", str(root / "folder" / "x.png")):
        assert safe_path(tmp_path / "link", name) == str((root / "folder" / "x.png").resolve())


# ---- preprocessing --------------------------------------------------------------------------------------------------

# smaller and larger than the model's side, odd, thin; the last are where int() and round() part
SIZES = [(1, 1), (1, 2), (2, 1), (1, 7), (3, 1), (1, 60), (61, 1), (8, 8), (7, 8), (9, 8), (10, 13),
         (23, 22), (24, 24), (31, 17), (24, 25), (47, 96), (97, 48), (100, 75), (33, 100), (129, 43)]


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    asked = dict(do_rescale=False, do_normalize=False)

    def crop(S):
        return dict(size={"shortest_edge": S}, crop_size={"height": S, "width": S})
    return {
        "crop": lambda S, r: CLIPImageProcessorPil(**crop(S), resample=r, **asked),
        "squash": lambda S, r: SiglipImageProcessorPil(size={"height": S, "width": S}, resample=r, **asked),
        "pad": lambda S, r: LlavaImageProcessorPil(**crop(S), resample=r, do_pad=True, **asked)}


@pytest.mark.parametrize("aspect", ["pad", "crop", "squash"])
@pytest.mark.parametrize("resample", [2, 3])
def test_pixels_equal_those_of_transformers(theirs, aspect, resample):
    for S in (8, 24):
        processor = theirs[aspect](S, resample)
        for w, h in SIZES:
            image = Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8))
            want = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
            got = preprocess(image, ImageSpec(S, aspect, resample)).numpy()
            assert got.dtype == np.uint8 and (got == want).all(), (w, h, S)


def test_a_crop_from_a_larger_resize_equals_transformers(theirs):
    """DINOv2's processor: the shorter side becomes 256, of which 224 stay."""
    from transformers import CLIPImageProcessorPil
    processor = CLIPImageProcessorPil(size={"shortest_edge": 13}, crop_size={"height": 10, "width": 10},
                                      do_rescale=False, do_normalize=False)
    for w, h in SIZES:
        image = Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8))
        want = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
        assert (preprocess(image, ImageSpec(10, "crop", short=13)).numpy() == want).all(), (w, h)


AWKWARD = [(1, 1), (1, 500), (337, 335), (336, 1), (640, 480), (333, 500), (384, 384)]


def tower(kind, S, p, mean, std):
    """A vision tower whose features are its normalised pixels, patch by patch."""
    from model import VisionConfig, ViTEmbeddings
    e = ViTEmbeddings(VisionConfig(model_type=kind, hidden_size=3 * p * p, image_size=S, patch_size=p,
                                   image_mean=tuple(mean), image_std=tuple(std)))
    with torch.no_grad():
        for x in e.parameters():
            x.zero_()
        e.patch_embedding.weight.view(3 * p * p, -1).copy_(torch.eye(3 * p * p))
        return lambda image: e(image[None])[0, e.class_embedding is not None:]


@pytest.fixture(scope="module", params=["crop", "squash", "pad"])
def published(request):
    """A published processor, a tower with its mean and std, our ImageSpec, the patch size"""
    T = pytest.importorskip("transformers")
    if request.param == "squash":
        kind, S, p = "siglip_vision_model", 384, 16
        processor = T.SiglipImageProcessorPil(size={"height": S, "width": S})
    else:
        processor = {"crop": T.CLIPImageProcessorPil, "pad": T.LlavaImageProcessorPil}[request.param]
        processor = processor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336},
                              do_pad=request.param == "pad")
        kind, S, p = "clip_vision_model", 336, 14
    mean = processor.image_mean
    return processor, tower(kind, S, p, mean, processor.image_std), ImageSpec(S, request.param, mean=tuple(mean)), p


def patches(pixels, p):
    return torch.tensor(pixels).unfold(1, p, p).unfold(2, p, p).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)


@torch.no_grad()
def test_normalised_pixels_equal_those_of_transformers(published):
    processor, see, spec, p = published
    for size in AWKWARD:
        image = Image.fromarray(np.random.default_rng(size).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        want = processor(image, return_tensors="np")["pixel_values"][0]
        assert want.dtype == np.float32 and torch.equal(see(preprocess(image, spec)), patches(want, p)), size


def awkward_files():
    """name -> (bytes, what transformers gets instead; None: the file itself)"""
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (31, 45, 3), dtype=np.uint8))
    alpha = noise.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.random.default_rng(4).integers(0, 256, (31, 45), dtype=np.uint8)))
    ramp = np.arange(45 * 31, dtype=np.uint16).reshape(31, 45) * 47
    exif = Image.Exif()
    exif[0x112] = 6
    gray = Image.fromarray((ramp // 257).astype(np.uint8))       # convert("RGB") alone would make most pixels white
    return {"gray": (saved(noise.convert("L"), "PNG"), None), "gray_alpha": (saved(alpha.convert("LA"), "PNG"), None),
            "alpha": (saved(alpha, "PNG"), None), "palette": (saved(noise.convert("P"), "PNG"), None),
            "palette_transparent": (saved(noise.convert("P"), "PNG", transparency=7), None),
            "one_bit": (saved(noise.convert("1"), "PNG"), None), "cmyk": (saved(noise.convert("CMYK"), "JPEG"), None),
            "gif": (saved(noise, "GIF"), None), "sixteen": (saved(Image.fromarray(ramp), "PNG"), gray),
            "rotated": (saved(noise, "JPEG", exif=exif), None)}


def test_files_of_every_mode_equal_transformers(tmp_path):
    """White where transformers' processor paints white; upright, as its load_image has it. Only sixteen bits differ on
    purpose: transformers cuts them off at 255."""
    processor = pytest.importorskip("transformers").LlavaImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_pad=True, do_rescale=False,
        do_normalize=False)
    for name, (blob, shown) in awkward_files().items():
        (tmp_path / name).write_bytes(blob)
        shown = shown or ImageOps.exif_transpose(Image.open(tmp_path / name))
        want = np.asarray(processor(shown, return_tensors="np")["pixel_values"][0])
        assert (preprocess(load_image(str(tmp_path / name)), ImageSpec(24)).numpy() == want).all(), name


def test_channels_keep_their_order():
    for c, colour in enumerate((RED, GREEN, BLUE)):
        x = preprocess(Image.new("RGB", (5, 9), colour), ImageSpec(4, "squash"))
        assert x.dtype == torch.uint8 and x.is_contiguous()
        assert x.float().mean((1, 2)).tolist() == [255.0 * (i == c) for i in range(3)]


def test_padding_has_the_mean_colour():
    x = preprocess(Image.new("RGB", (4, 8), RED), ImageSpec(8, "pad"))
    assert x[:, 0, 0].tolist() == [122, 116, 104] == x[:, 7, 7].tolist() and x[:, 4, 4].tolist() == [255, 0, 0]
    y = preprocess(Image.new("RGB", (8, 4), RED), ImageSpec(8, "pad", mean=(0.5, 0.5, 0.5)))
    assert y[:, 0, 0].tolist() == [127] * 3 and torch.equal((x == 255).sum(), (y == 255).sum())
