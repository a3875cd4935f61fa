"""CLIP and SigLIP, both towers: folders of transformers in and out, the same similarities, the same ids and pixels."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, error, make_tokenizer
from PIL import Image
from safetensors.torch import load_file
from test_llava import PRE, random
from test_model import exact_norms, pixels

import data
from formats import llava, pairs
from formats.configs import image_spec
from images import preprocess
from run.pairs import METHODS

T = pytest.importorskip("transformers")
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=8,
              patch_size=4)
TEXT = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, vocab_size=512,
            max_position_embeddings=12)
EOS = 10                                     # <|eot_id|> of the tests' tokenizer; 2 is a trap of its own
TEXTS = ["What is this?", "a red cat", "Two dogs, playing in the park; don't know? Yes! No. It is a black cat.", "1"]


def tokenizer(folder, kind):
    """The byte-level tokenizer of the tests with a post-processor, as CLIP's and SigLIP's have one"""
    make_tokenizer(folder)
    spec, names = (json.loads((folder / n).read_text()) for n in ("tokenizer.json", "tokenizer_config.json"))
    eos = "<|eot_id|>" if kind == "clip" else "</s>"
    names |= {"eos_token": eos, "pad_token": eos}
    spec, names, _ = pairs.with_ends(spec, names, kind)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def make(kind, folder):
    if kind == "clip":
        theirs = T.CLIPModel(T.CLIPConfig(text_config=TEXT | {"eos_token_id": EOS}, vision_config=VISION,
                                          projection_dim=20))
    else:
        theirs = T.SiglipModel(T.SiglipConfig(text_config=TEXT | {"projection_size": 32}, vision_config=VISION))
    random(theirs).save_pretrained(folder)
    tokenizer(folder, kind)
    pre = PRE if kind == "clip" else PRE | {"image_processor_type": "SiglipImageProcessor", "do_center_crop": False,
                                            "size": {"height": 8, "width": 8}, "crop_size": None,
                                            "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(pre))
    return theirs


@pytest.fixture(scope="module", params=["clip", "siglip"])
def published(request, tmp_path_factory):
    """-> folder, their model in float64, our model, our folder"""
    at = tmp_path_factory.mktemp("pairs") / request.param
    theirs = make(request.param, at)
    mine, folder = pairs.load_pairs(at)
    return at, exact_norms(theirs.double().eval()), mine.double(), folder


def batch(folder, cfg, images):
    ids = [folder.words.encode(text) for text in TEXTS]
    rows = [(i, [-100] * (len(i) - 1) + i[-1:], x[None]) for i, x in zip(ids, images)]
    return data.pack(rows, 8, None if cfg.text.causal else lambda ids, labels, pos, lo: lo + 12)


def their_inputs(folder, cfg, images):
    ids = [folder.words.encode(text) for text in TEXTS]
    width = max(map(len, ids))
    mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in ids])
    ids = torch.tensor([i + [EOS] * (width - len(i)) for i in ids])
    return dict(input_ids=ids, attention_mask=mask, pixel_values=pixels(images, cfg.vision).double())


def logits(mine, b):
    with torch.no_grad():
        image, text, (t, bias) = mine(b)
        return t.exp() * image @ text.T + bias


def test_similarities_are_those_of_transformers(published):
    _, theirs, mine, folder = published
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        true = theirs(**their_inputs(folder, mine.cfg, images)).logits_per_image
    found = logits(mine, batch(folder, mine.cfg, images))
    assert (found - true).abs().max() < 1e-10 * true.abs().max() and true.std() > 0.01
    assert max(map(len, map(folder.words.encode, TEXTS))) == 12, "one text is cut"
    with torch.no_grad():
        loss = theirs(**their_inputs(folder, mine.cfg, images), return_loss=True).loss
        ours = METHODS[mine.cfg.kind][2](*mine(batch(folder, mine.cfg, images))).mean()
    assert abs(ours / loss - 1) < 1e-10


def test_tensors_return_bit_equal(published, tmp_path):
    at, _, mine, folder = published
    state = pairs.load_pairs(at)[0].state_dict()
    pairs.save_pairs(tmp_path / "out", state, mine.cfg, folder, torch.float32)
    there, here = load_file(at / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert there.keys() == here.keys() and all(torch.equal(there[k], here[k]) for k in there)
    again, other = pairs.load_pairs(tmp_path / "out")
    assert again.cfg == mine.cfg and other.words.encode("a cat") == folder.words.encode("a cat")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_opens_a_new_folder(kind, tmp_path):
    """No missing or unexpected tensors; its processor gives our ids and pixels; equal similarities"""
    mine, folder = pairs.load_pairs(kind=kind, tokenizer=ROOT / "demo/llm", seed=3)
    pairs.save_pairs(tmp_path / "out", mine.state_dict(), mine.cfg, folder, torch.float32)
    Model = {"clip": T.CLIPModel, "siglip": T.SiglipModel}[kind]
    theirs, info = Model.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float64)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 72, 3), dtype=np.uint8))
    texts = ["a red circle", "top left: a small blue star; bottom right: a sign that says 7"]
    processor = T.AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    there = processor(images=image, text=texts, return_tensors="pt", padding="max_length" if kind == "siglip" else True,
                      max_length=48 if kind == "siglip" else None)
    found = preprocess(image, image_spec(folder.pre, "crop" if kind == "clip" else "squash"))
    assert (there["pixel_values"][0] - pixels(found[None], mine.cfg.vision)[0]).abs().max() < 1e-6
    for text, ids, mask in zip(texts, there["input_ids"], there.get("attention_mask", torch.ones(2, 999))):
        assert folder.words.encode(text) == [i for i, m in zip(ids.tolist(), mask.tolist()) if m or kind == "siglip"]
    rows = [(i := folder.words.encode(t), [-100] * (len(i) - 1) + i[-1:], found[None]) for t in texts]
    b = data.pack(rows, 72, None if kind == "clip" else lambda ids, labels, pos, lo: lo + 48)
    theirs = exact_norms(theirs.eval())
    ask = {"input_ids": there["input_ids"], "pixel_values": pixels(found[None], mine.cfg.vision).double()}
    if kind == "clip":
        ask["attention_mask"] = there["attention_mask"]
    with torch.no_grad():
        true = theirs(**ask).logits_per_image
    assert (logits(mine.double(), b)[:1] - true).abs().max() < 1e-10 * true.abs().max()


def test_eos_of_a_new_clip_is_not_2(tmp_path):
    """The toy's EOS has id 2, where transformers would read the token with the highest id"""
    _, folder = pairs.load_pairs(kind="clip", tokenizer=ROOT / "demo/llm")
    assert folder.words.encode("circle")[-1] == len(json.loads(folder.files["tokenizer.json"])["model"]["vocab"])
    assert pairs.END in folder.notes[0]


def test_typed_control_tokens_stay_text(published):
    words = published[3].words
    end = words.encode("a")[-1]
    assert end not in words.encode("</s><|eot_id|>")[:-1] or words.pad is not None
    assert words.whole.encode("</s><|eot_id|>").ids.count(end) == 1


def test_the_image_tower_serves_a_llava(published, tmp_path, bytes_folder):
    """vision=FOLDER of train_align.py"""
    at, _, mine, _ = published
    v, _, tensors = llava.read_tower(at)
    state = mine.state_dict()
    assert all(torch.equal(tensors[f"vision_tower.{k}"].double(), state[k]) for k in state
               if k.startswith("vision_model.encoder"))
    assert v["model_type"] == f"{mine.cfg.kind}_vision_model"


@pytest.mark.parametrize(("part", "change", "says"), [
    ("", {"model_type": "blip"}, "holds a 'blip': clip and siglip"),
    ("", {"projection_dim": 7}, "the config says (7, "),
    ("text_config", {"hidden_size": "wide"}, "hidden_size='wide'"),
    ("text_config", {"vocab_size": 100}, "the config says (100, 24)"),
    ("vision_config", {"num_hidden_layers": 4}, "missing tensor(s)")])
def test_a_wrong_config_is_one_line(part, change, says, tmp_path):
    make("clip", tmp_path / "x")
    c = json.loads((tmp_path / "x/config.json").read_text())
    (c[part] if part else c).update(change)
    (tmp_path / "x/config.json").write_text(json.dumps(c))
    assert says in error(pairs.load_pairs, tmp_path / "x")


def test_a_siglip_without_head_is_refused(tmp_path):
    make("siglip", tmp_path / "x")
    c = json.loads((tmp_path / "x/config.json").read_text())
    c["vision_config"]["vision_use_head"] = False
    (tmp_path / "x/config.json").write_text(json.dumps(c))
    assert "has no vector of an image" in error(pairs.load_pairs, tmp_path / "x")


def test_towers_can_start_from_a_folder(published, tmp_path):
    """vision=: the image tower is that of the folder, the text tower is new"""
    at, _, mine, _ = published
    shutil.copytree(at, tmp_path / "v")
    model, _ = pairs.load_pairs(kind=mine.cfg.kind, tokenizer=ROOT / "demo/llm", vision=tmp_path / "v",
                                parts="width=32 text.num_hidden_layers=1")
    key = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(model.state_dict()[key].double(), mine.state_dict()[key])
    assert len(model.text_model.encoder.layers) == 1
