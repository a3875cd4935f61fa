"""What train_pairs.py does before and after its loop, as run/stage.py does it for the other stages."""

import math

import torch

import engine
from config import BadSample, stop
from data import Steps
from engine import unwrap
from formats import card
from formats.configs import image_spec
from formats.blip2_pairs import KIND, load_blip2, save_blip2
from formats.configs import read_config
from formats.hub import find_model
from formats.pairs import load_pairs, save_pairs
from formats.rows import conversation
from images import Layout
from kernels import choose_kernels
from kernels.cross_entropy import IGNORE
from loss import clip_loss, siglip_loss
from parts.blip2 import blip2_loss, compare_blip2, itc_loss
from parts.pairs import accuracy, compare_pairs, pair_loss, similarities, vectors
from run import plan, stage
from run.log import check_dropped, tally
from run.publish import publish
from run.validate import Once, level

# kind -> first pass over a step, loss of a micro-batch, contrastive loss
METHODS = {"clip": (compare_pairs, pair_loss, clip_loss), "siglip": (compare_pairs, pair_loss, siglip_loss),
           "blip2": (compare_blip2, blip2_loss, itc_loss)}
UNREAD = ("llm", "connector", "template", "system", "loss", "max_len", "sample_every",
          "eval_questions")                                # settings of Common


def read_pair(row):
    """A row of a data file -> its image, its caption. The caption is the first answer; a document has none"""
    turns, names, _ = conversation(row)
    if len(names) != 1 or not turns[0][1].strip():
        raise BadSample("a pair has one image and one caption", f"{len(names)} images" if turns[0][1] else "a document")
    return names[0], turns[0][1].strip()


class PairEncoder:
    """Turns a row into a pair: the ids of its caption, the name of its image. The one label of a text is its last id:
    data.pack shifts labels, so it stands one token before (parts/text_tower.py)."""
    reader, layout = None, Layout(-1, 0)                   # no image stands among the ids

    def __init__(self, words):
        self.words, self.max_len = words, words.length

    def __call__(self, row, root=""):
        """-> ids, labels, [image], number of tokens cut off"""
        image, text = read_pair(row)
        ids = self.words.encode(text)
        return ids, [IGNORE] * (len(ids) - 1) + ids[-1:], [image], self.words.lost(text)


def text_ends(cfg):
    """-> function for data.pack: the end of the span of each token. SigLIP: the whole text; CLIP: causal"""
    if cfg.kind != "siglip":
        return None
    length = cfg.text.max_position_embeddings
    return lambda ids, labels, pos, lo: lo + length


def load_towers(init="", kind="clip", **new):
    """-> the model, PairFolder. new: of a new model, as for pairs.load_pairs"""
    if init:
        kind = "blip2" if read_config(find_model(init)).get("model_type") in (KIND, "blip-2") else ""
    model, folder = load_blip2(init, **new) if kind == "blip2" else load_pairs(init, kind, **new)
    side, own = image_spec(folder.pre, "squash").side, model.cfg.vision.image_size
    if side != own:
        stop(f"{init or new['vision']}: preprocessor_config.json makes images of side {side}, the tower reads {own}")
    return model, folder


def trained_towers(s, cfg):
    """-> table {glob over names: learning rate} for engine.choose: all, but of BLIP-2's tower the last norm alone"""
    return {"*": s.lr} | ({"vision_tower.*": 0.0, "*.post_layernorm.*": s.lr} if cfg.kind == "blip2" else {})


def begin_pairs(s):
    """Check the settings, join the other ranks, load the model -> World, Pairs, PairFolder"""
    for key in UNREAD:
        if getattr(s, key) != getattr(type(s), key):
            stop(f"{key}={getattr(s, key)} would not be read: this stage has no language model"
                 + ", and the text tower says how long a caption may be" * (key == "max_len"))
    stage.check(s)
    if s.init and s.parts:
        stop(f"init={s.init} brings its own sizes, so parts={s.parts} would not be read")
    world = engine.start(s.device, s.dtype, s.seed)
    choose_kernels(s.kernels, world.device)
    if s.data == "toy":
        stage.toy_world(s, world, "align")
    model, folder = load_towers(s.init, s.kind, tokenizer=s.tokenizer, vision=s.vision, parts=s.parts, seed=s.seed)
    if s.init and s.kind not in (type(s).kind, model.cfg.kind):
        stop(f"kind={s.kind}, but {s.init} is a {model.cfg.kind}")
    engine.set_threads(model, world)
    aspect = "crop" if folder.pre.get("do_center_crop", model.cfg.kind == "clip") else "squash"
    if s.image_aspect not in ("", aspect):
        stop(f"image_aspect={s.image_aspect}, but the image processor that is published with the model has {aspect}")
    s.image_aspect = aspect
    return world, model, folder


def pair_rows(cfg):
    """As plan.rows: {pattern of a weight's name: (unit, how many vectors the weight multiplies for each unit)}"""
    P = cfg.vision.patches
    if cfg.kind == "blip2":                                # the Q-Former reads five times: ITC, three pairs of ITM, ITG
        return {"vision_tower.*.patch_embedding.weight": ("images", P), "vision_tower.*.layers.*": ("images", P + 1),
                "multi_modal_projector.layers.*": ("images", 5 * cfg.tokens), "*.word_fc*": ("tokens", 5),
                "multi_modal_projector.*.cross.[kv]_proj.*": ("images", 5 * (P + 1))}
    return {"vision_model.embeddings.patch_embedding.weight": ("images", P),
            "vision_model.encoder.*": ("images", P + cfg.vision.class_token), "vision_model.head.*": ("images", 1),
            "vision_model.head.attention.in_proj_weight": ("images", P), "text_model.encoder.*": ("tokens", 1),
            "*_projection.weight": ("images", 1), "text_model.head.weight": ("images", 1)}


def prepare_pairs(s, world, model, folder, lrs):
    """Open the data and print the plan. Then do a dry run, or start or resume the run -> stage.Run"""
    cfg, spec = model.cfg, image_spec(folder.pre, s.image_aspect)

    def steps_of(data, batch_size, seed, Kind, **more):
        return Kind(data, s.images, PairEncoder(folder.words), spec, batch_size, s.max_tokens, seed, world.rank,
                    world.size, text_ends(cfg), min_rating=s.min_rating, **more)

    samples = steps_of(s.data, s.batch_size, s.seed, Steps, order=s.order, augment=s.augment)
    steps = s.steps or math.ceil(s.epochs * samples.total / s.batch_size)
    (first,), flops = level(samples, [samples[0]], world), plan.flops(model, pair_rows(cfg))
    seen = plan.units(first.micro)
    cost = sum(f * seen[unit] for unit, f in flops.items())
    world.print(*folder.notes, *plan.trained_lines(model, lrs),
                f"  {steps} steps of {s.batch_size} pairs; the first one, on this rank: {seen['images']} pairs, "
                f"{seen['tokens']:,} tokens in {len(first.micro)} packed sequence(s), {cost / 1e9:,.2f} GFLOP; "
                f"{world.size} x {world.device}, {world.dtype}", sep="\n")
    val = PairValidation(steps_of(s.val_data, s.batch_size, 0, Once) if s.val_data else [], world)
    if s.dry_run:
        return stage.Run(exit_code=rehearse_pairs(s, world, first, folder))
    return stage.begin_run(s, world, model, folder, lrs, samples, first, steps, flops, lambda: val)


def rehearse_pairs(s, world, first, folder):
    """Do what --dry_run does after the plan -> exit code, or None"""
    used, dropped = (int(n) for n in world.sum([len(first.names), len(first.dropped)]))
    reasons = {}
    tally(world, first.dropped, reasons)
    check_dropped(s.max_dropped, dropped, used + dropped, reasons)
    if not used:
        world.print("  none of the first step's samples can be used: python data.py says why")
        return 1
    if first.names:
        b = next(b for b in first.micro if len(b.ids))
        n = int((b.lo == 0).sum())                         # tokens of the first text
        world.print(f"  {first.names[0]}, {n} tokens: {folder.words.decode(b.ids[:n].tolist())}")


class PairValidation:
    """Mean loss of steps of batch_size pairs (the last one may be smaller), and accuracy among all pairs of a file"""

    def __init__(self, steps, world):
        self.steps, self.world, self.metrics = steps, world, ("val_loss", "val_accuracy") if steps else ()
        if steps and not any(sum(world.gather(len(steps[i].names))) for i in range(len(steps))):
            first = "".join(f"; {name}: {why}" for name, why in steps[0].dropped[:1])
            stop(f"{steps.files[0].file}: no pair can be used{first}")

    @torch.no_grad()
    def measure(self, step, model, loss_fn, log):
        if not self.steps:
            return
        model.eval()
        total, bad, images, texts = 0.0, 0, [], []
        for part in level(self.steps, (self.steps[i] for i in range(len(self.steps))), self.world):
            bad += len(part.dropped)
            if part.micro:
                image, text, scale, *_ = vectors(model, part.micro, self.world)
                total += float(loss_fn(image, text, scale).sum())
                images.append(image)
                texts.append(text)
        model.train()
        n, bad = sum(map(len, images)), int(self.world.sum([bad])[0])
        loss, right = math.nan, math.nan
        if n:
            loss, right = total / n, float(accuracy(similarities(torch.cat(images), torch.cat(texts))))
        log.append({"step": step + 1, "val_loss": loss, "val_accuracy": right, "val_dropped": bad})
        self.world.print(f"step {step + 1}/{log.steps}  validation loss {loss:.4f}, accuracy {right:.1%} of {n} pairs"
                         + (f" ({bad} of {self.steps.total} could not be used)" if bad else ""))


def finish_pairs(run, s, world, folder):
    """Called after the last step: publish the model -> exit code, or None"""
    if run.folder is None:                                 # a dry run, or the run was already finished
        return run.exit_code
    if s.overfit:
        world.print(f"overfit: accuracy {run.log.result['accuracy']:.1%} of the first batch")
        return 0 if run.log.result["accuracy"] == 1 else 1
    cfg = unwrap(run.model).cfg
    save, about = (save_blip2, card.blip2_pairs) if cfg.kind == "blip2" else (save_pairs, card.pairs)
    publish(run.folder, run.model, folder, run.log, lambda out, state, dtype: save(
        out, state, cfg, folder, dtype, about(out.parent, cfg)))
