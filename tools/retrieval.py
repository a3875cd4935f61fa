"""Retrieval and zero-shot classification with two towers (a run of train_pairs.py, a CLIP or a SigLIP folder).

    python -m tools.retrieval --model=runs/pairs                                 # the toy's held-out captions
    python -m tools.retrieval --model=DIR --data=FILE --images=DIR
    python -m tools.retrieval --model=DIR --data=FILE --images=DIR --classes=cat,dog --templates="a photo of a {}."

A row of FILE is an image with its caption, in LLaVA form: the caption is the first answer. The last line is JSON: R@k
is the share of images with one of their captions among the k nearest captions (and of captions with one of their images
among the k nearest images). An image with several captions has several rows. Equal images count as one, and equal
captions. Of two equally near ones, the wrong one comes first.

A Q-Former (BLIP-2's first stage) retrieves by ITC; --rerank=16 then sorts the 16 nearest candidates by the sum of their
ITC similarity and the logit of a match (ITM), as the released code does.

With --classes the caption is the name of the class. The vector of a class is the mean over the templates, scaled to
length 1 (CLIP, arXiv 2103.00020, section 3.1.4); the answer is the nearest class.
"""

import dataclasses
import io
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
from formats.image_files import image_folder, load_image, safe_path
from formats.rows import open_rows
from images import preprocess
from kernels.cross_entropy import IGNORE
from parts.blip2 import chosen, texts_of
from parts.pairs import similarities
from run.arguments import parse
from run.pairs import load_towers, read_pair, text_ends

KS = (1, 5, 10)


@dataclasses.dataclass
class Settings:
    model: str = setting("runs/pairs", "a run of train_pairs.py, or a folder of CLIP or SigLIP")
    data: str = setting("toy", "images and captions in LLaVA form; toy: held-out captions of the toy world")
    images: str = setting(".", "folder that image names are relative to")
    classes: str = setting("", "names of classes, separated by commas; empty: retrieval")
    templates: str = setting("a photo of a {}.", "texts for a class, separated by |; {} is its name")
    rerank: int = setting(0, "candidates that a Q-Former sorts again by ITM; 0: none", 0)
    batch_size: int = setting(64, "images or texts at once", 1)
    device: str = setting("cpu", "cpu or cuda")


def read_pairs(file, images):
    """-> [(image: its path or bytes, caption)]"""
    image_folder(images)
    out, rows = [], open_rows(file)
    for i in range(len(rows)):
        try:
            image, caption = read_pair(rows[i])
            out.append((image if isinstance(image, bytes) else safe_path(images, image), caption))
        except BadSample as e:
            stop(f"{file}, row {i} (counted from 0): {e}")
    return out


class Towers:
    """The two towers of a folder, and what turns files and texts into their input."""

    def __init__(self, model, device="cpu", batch_size=64):
        self.model, self.folder = load_towers(model)
        self.model.to(device, torch.float32).eval()
        self.device, self.batch_size = device, batch_size
        pre, clip = self.folder.pre, self.model.cfg.kind == "clip"
        self.spec = image_spec(pre, "crop" if pre.get("do_center_crop", clip) else "squash")

    def pixels(self, paths):
        """Paths or bytes of images -> tensors (batch_size, 3, S, S) uint8"""
        for i in range(0, len(paths), self.batch_size):
            try:
                x = torch.stack([preprocess(load_image(io.BytesIO(p) if isinstance(p, bytes) else p), self.spec)
                                 for p in paths[i : i + self.batch_size]])
            except BadSample as e:
                stop(str(e))
            yield x.to(self.device)

    @torch.no_grad()
    def features(self, paths):
        """Paths -> (I, P, D): what a Q-Former reads"""
        return torch.cat([self.model.features(x) for x in self.pixels(paths)])

    @torch.no_grad()
    def encode(self, x):
        """Pixels (I, 3, S, S) uint8 -> (I, E), or (I, Q, E) of a Q-Former"""
        return self.model.encode_images(self.model.features(x) if self.model.cfg.kind == "blip2" else x)

    def images(self, paths):
        """Paths -> (I, E), or (I, Q, E) of a Q-Former"""
        return torch.cat([self.encode(x) for x in self.pixels(paths)])

    def batch(self, texts):
        """Texts -> data.Batch without images"""
        ids = [self.folder.words.encode(t) for t in texts]
        samples = [(x, [IGNORE] * (len(x) - 1) + x[-1:], []) for x in ids]
        return pack(samples, 1, text_ends(self.model.cfg)).to(self.device)

    @torch.no_grad()
    def texts(self, texts):
        """Texts -> (B, E)"""
        parts = [self.batch(texts[i : i + self.batch_size]) for i in range(0, len(texts), self.batch_size)]
        encode, blip2 = self.model.encode_texts, self.model.cfg.kind == "blip2"
        return torch.cat([encode(texts_of(part) if blip2 else part) for part in parts])


@torch.no_grad()
def reranked(towers, paths, texts, similar, k):
    """similar (I, B) -> the same (I, B), (B, I), where the k nearest of each row are sorted by similarity + ITM"""
    features, all_texts = towers.features(paths), texts_of(towers.batch(texts))
    words, counts = all_texts.words.split(all_texts.counts.tolist()), all_texts.counts
    out = []
    for s in (similar, similar.T):
        score = s - 1000                                                     # behind the k nearest, in their old order
        for i, row in enumerate(s):
            near = row.topk(min(k, len(row))).indices
            one = torch.full_like(near, i)
            image, text = (one, near) if not out else (near, one)
            logits = towers.model.match(features[image], chosen(words, counts, text))
            score[i, near] = row[near] + logits[:, 1]
        out.append(score)
    return out


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
    captions, numbers = [caption for _, caption in pairs], {}
    places = [numbers.setdefault(source, len(numbers)) for source, _ in pairs]      # of each row: number of its image
    image, blip2 = towers.images([*numbers]), towers.model.cfg.kind == "blip2"
    if s.rerank and not blip2:
        stop(f"rerank={s.rerank}: only a Q-Former has ITM")
    if s.classes:
        names = [name.strip() for name in s.classes.split(",")]
        if unknown := sorted({*captions} - {*names}):
            stop(f"{file}: the caption {unknown[0]!r:.80} is none of the classes")
        text = torch.stack([F.normalize(towers.texts([t.replace("{}", name) for t in s.templates.split("|")]).mean(0),
                                        dim=0) for name in names])
        nearest = similarities(image, text).argmax(1).tolist()
        right = [names[nearest[place]] == caption for place, caption in zip(places, captions)]
        return print(json.dumps({"task": "zeroshot", "n": len(right), "accuracy": round(sum(right) / len(right), 4)}))
    kinds = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    text = towers.texts(list(kinds))
    same = torch.zeros(len(image), len(kinds), dtype=torch.bool)
    same[places, [kinds[c] for c in captions]] = True
    similar = similarities(image, text)
    scores = reranked(towers, [*numbers], list(kinds), similar, s.rerank) if s.rerank else (similar, similar.T)
    print(json.dumps({"task": "retrieval", "n": len(image), "captions": len(kinds), "rerank": s.rerank, **{
        name: recall(score.cpu(), right) for name, score, right in zip(("image_to_text", "text_to_image"), scores,
                                                                       (same, same.T))}}))


if __name__ == "__main__":
    with config.one_line_errors():
        main(parse(Settings, sys.argv[1:], __doc__))
