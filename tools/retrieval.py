"""Retrieval and zero-shot classification with two towers (a run of train_pairs.py, a CLIP or a SigLIP folder).

    python -m tools.retrieval --model=runs/pairs                                 # the toy's held-out captions
    python -m tools.retrieval --model=DIR --data=FILE --images=DIR
    python -m tools.retrieval --model=DIR --data=FILE --images=DIR --classes=cat,dog --templates="a photo of a {}."

A row of FILE is an image with its caption, in LLaVA form: the caption is the first answer. The last line is JSON: R@k
is the share of images whose caption is among the k nearest captions (and of captions whose image is among the k nearest
images). Equal captions count as one. Of two equally near ones, the wrong one comes first.

With --classes the caption is the name of the class. The vector of a class is the mean over the templates, scaled to
length 1 (CLIP, arXiv 2103.00020, section 3.1.4); the answer is the nearest class.
"""

import dataclasses
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import config
from config import BadSample, setting, stop
from data import pack
from formats.configs import image_spec
from formats.pairs import load_pairs
from formats.rows import Rows, conversation
from images import image_folder, load_image, preprocess, safe_path
from kernels.cross_entropy import IGNORE
from run.pairs import text_ends

KS = (1, 5, 10)


@dataclasses.dataclass
class Settings:
    model: str = setting("runs/pairs", "a run of train_pairs.py, or a folder of CLIP or SigLIP")
    data: str = setting("toy", "images and captions in LLaVA form; toy: held-out captions of the toy world")
    images: str = setting(".", "folder that image names are relative to")
    classes: str = setting("", "names of classes, separated by commas; empty: retrieval")
    templates: str = setting("a photo of a {}.", "texts for a class, separated by |; {} is its name")
    batch_size: int = setting(64, "images or texts at once", 1)
    device: str = setting("cpu", "cpu or cuda")


def read_pairs(file, images):
    """-> [(path of the image, caption)]"""
    image_folder(images)
    out, rows = [], Rows(file)
    for i in range(len(rows)):
        try:
            turns, names, _ = conversation(rows[i])
            if len(names) != 1:
                raise BadSample("a pair has one image and one caption", f"{len(names)} images")
            out.append((safe_path(images, names[0]), turns[0][1].strip()))
        except BadSample as e:
            stop(f"{file}, row {i} (counted from 0): {e}")
    return out


class Towers:
    """The two towers of a folder, and what turns files and texts into their input."""

    def __init__(self, model, device="cpu", batch_size=64):
        self.model, self.folder = load_pairs(model)
        self.model.to(device, torch.float32).eval()
        self.device, self.batch_size = device, batch_size
        pre, clip = self.folder.pre, self.model.cfg.kind == "clip"
        self.spec = image_spec(pre, "crop" if pre.get("do_center_crop", clip) else "squash")

    @torch.no_grad()
    def images(self, paths):
        """Paths -> (I, E)"""
        out = []
        for i in range(0, len(paths), self.batch_size):
            try:
                x = torch.stack([preprocess(load_image(p), self.spec) for p in paths[i : i + self.batch_size]])
            except BadSample as e:
                stop(str(e))
            out.append(self.model.encode_images(x.to(self.device)))
        return torch.cat(out)

    @torch.no_grad()
    def texts(self, texts):
        """Texts -> (B, E)"""
        out = []
        for i in range(0, len(texts), self.batch_size):
            ids = [self.folder.words.encode(t) for t in texts[i : i + self.batch_size]]
            batch = pack([(x, [IGNORE] * (len(x) - 1) + x[-1:], []) for x in ids], 1, text_ends(self.model.cfg))
            out.append(self.model.encode_texts(batch.to(self.device)))
        return torch.cat(out)


def recall(similar, same):
    """similar (n, m): of n questions to m candidates; same (n, m) bool: the right candidates -> {k: share of questions
    with a right candidate among the k nearest}"""
    best = similar.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
    before = ((similar >= best) & ~same).sum(1)                              # wrong candidates in front of the best one
    return {k: round((before < k).double().mean().item(), 4) for k in KS}


def toy_captions():
    """The held-out scenes of the toy world -> a file of their images and captions, the folder of the images"""
    from demo import captions, toy
    place = Path("runs/toy")
    toy.write_world(place, "test")
    file, names = place / "test_captions.json", [f"test_{i:05d}.png" for i in range(toy.SCENES["test"])]
    scenes = [toy.make_scene(random.Random(captions.scene_seed(name)), test=True) for name in names]
    file.write_text(json.dumps([{"image": name, "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": toy.caption(scene, True)}]}
        for name, scene in zip(names, scenes)]))
    return file, place / "images"


def main(s):
    config.check_ranges(s)
    file, images = toy_captions() if s.data == "toy" else (s.data, s.images)
    pairs, towers = read_pairs(file, images), Towers(s.model, s.device, s.batch_size)
    paths, captions = map(list, zip(*pairs))
    image = towers.images(paths)
    if s.classes:
        names = [name.strip() for name in s.classes.split(",")]
        if unknown := sorted({*captions} - {*names}):
            stop(f"{file}: the caption {unknown[0]!r:.80} is none of the classes")
        text = torch.stack([F.normalize(towers.texts([t.replace("{}", name) for t in s.templates.split("|")]).mean(0),
                                        dim=0) for name in names])
        right = [names[i] == caption for i, caption in zip((image @ text.T).argmax(1).tolist(), captions)]
        return print(json.dumps({"task": "zeroshot", "n": len(right), "accuracy": round(sum(right) / len(right), 4)}))
    kinds = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    own = torch.tensor([kinds[c] for c in captions])
    text = towers.texts(list(kinds))
    same = own[:, None] == torch.arange(len(kinds))
    similar = (image @ text.T).cpu()
    print(json.dumps({"task": "retrieval", "n": len(image), "captions": len(kinds),
                      "image_to_text": recall(similar, same), "text_to_image": recall(similar.T, same.T)}))


if __name__ == "__main__":
    with config.one_line_errors():
        main(config.parse(Settings, sys.argv[1:], __doc__))
