"""LlavaNext: folders that transformers wrote, read, compared in float64, written, and opened by transformers."""

import json

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from PIL import Image
from test_families import NORMAL, SIGLIP, TEXT, exact_norms
from test_families_cross import CLIP
from test_llava import random
from test_model import PARITY, all_logits, pixels

from data import pack
from formats import llava
from generate import Chat, generate
from images import preprocess
from parts.build import image_layout

T = pytest.importorskip("transformers")
PINS = [[8, 16], [16, 8], [16, 16], [24, 8], [8, 24]]
USER = "USER: "
SIZES = [(17, 9)], [], [(9, 30), (8, 8), (90, 3)]              # of the images of three documents


def llava_next(folder, text, vision, chat_template, **fields):
    """-> a tiny LlavaNext of transformers; its image processor and its tokenizer are written to `folder`"""
    vision = vision | {"num_hidden_layers": 3, "image_size": 8, "patch_size": 2}
    c = T.LlavaNextConfig(vision_config=vision, text_config=TEXT | text, image_token_index=3, image_seq_length=16,
                          image_grid_pinpoints=PINS, **fields)
    make_tokenizer(folder, "pieces" if text["model_type"] == "llama" else "bytes")
    (folder / "chat_template.jinja").write_text(chat_template)
    pre = NORMAL | {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINS, "do_pad": True,
                    "size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(pre))
    return T.LlavaNextForConditionalGeneration(c)


CASES = {
    "vicuna": lambda at: llava_next(at, {"model_type": "llama"}, CLIP, "{{ message['role'].upper() }}"),
    "mistral": lambda at: llava_next(at, {"model_type": "mistral", "sliding_window": None}, CLIP, "[INST] "),
    "qwen": lambda at: llava_next(at, {"model_type": "qwen2"}, SIGLIP, "<|im_start|>", vision_feature_layer=-1,
                                  vision_feature_select_strategy="full")}
TEMPLATES = {"vicuna": "vicuna_v1", "mistral": "mistral", "qwen": "chatml"}


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    """-> name of the case, its folder as transformers writes it, their model in float64, our model, our Folder"""
    at = tmp_path_factory.mktemp("family")
    theirs = random(CASES[request.param](at))
    theirs.save_pretrained(at)
    mine, folder = llava.load_model(init=at, dtype=torch.float64)
    return request.param, at, exact_norms(theirs.double().eval()), mine, folder


def photo(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def document(cfg, spec, sizes, text=9):
    """A sample as data.pack takes it, with images of these sizes and no token between them"""
    layout, photos = image_layout(cfg), [photo(size) for size in sizes]
    ids = [1] + [i for image in photos for i in layout.block(image)]
    ids += torch.randint(5, 500, (text,), generator=torch.Generator().manual_seed(text)).tolist()
    tiles = [preprocess(tile, spec) for image in photos for tile in layout.cut(image)]
    return ids, [-100] * (len(ids) - 4) + ids[-4:], torch.stack(tiles) if tiles else torch.zeros(0, 3, 8, 8).byte()


def documents(mine, folder):
    spec = llava.image_spec(folder.pre, "crop")
    return [document(mine.cfg, spec, sizes, 9 + n) for n, sizes in enumerate(SIZES)]


def published(ids):
    """Our ids -> those of transformers, which has no own id for the first placeholder of an image"""
    return [3 if i >= 1 << 24 else i for i in ids]


def seen(cfg, tiles, sizes):
    """-> further arguments of their model"""
    return {"pixel_values": pixels(tiles, cfg.vision).double(),
            "image_sizes": torch.tensor([size[::-1] for size in sizes])} if sizes else {}


def their_logits(theirs, cfg, ids, tiles, sizes):
    with torch.no_grad():
        return theirs(input_ids=torch.tensor([published(ids)]), **seen(cfg, tiles, sizes)).logits[0]


def test_logits_are_those_of_transformers(family):
    _, _, theirs, mine, folder = family
    samples = documents(mine, folder)
    true = torch.cat([their_logits(theirs, mine.cfg, ids, tiles, sizes)
                      for (ids, _, tiles), sizes in zip(samples, SIZES)])
    with torch.no_grad():
        worst = (all_logits(mine, pack(samples, 8)) - true).abs().max() / true.abs().max()
    assert worst < PARITY and true.std() > 0.05, worst
