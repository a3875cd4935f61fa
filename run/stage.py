"""What every training stage does before and after its loop:

    begin      check settings, join ranks, load the model      prepare    open data, make optimizer, resume -> Run
    finish     publish the model
"""

import dataclasses
import itertools
import math
import signal
from pathlib import Path

import torch

import chat
import engine
from config import check_ranges, stop
from data import Encoder, Steps
from formats import configs, llava
from formats.whole import MANIFEST
from kernels import choose_kernels
from kernels.cross_entropy import IGNORE
from kernels.linear import add_into_grad
from parts import instruct
from parts.build import image_layout
from parts.spans import span_ends
from run import paper, plan
from run.best import watched
from run.folder import RunFolder, check_space, path_of, unwritable, would_overwrite
from run.loader import loader
from run.log import Log, check_dropped, tally
from run.publish import publish, published_dtype
from run.signals import record_signals
from run.track import tracker
from run.validate import Validation, check_overfit, level


def begin(s, template):
    """Check the settings, join the other ranks, load the model -> World, VLM, Folder. template: see load()"""
    check(s)
    world = engine.start(s.device, s.dtype, s.seed)
    choose_kernels(s.kernels, world.device)
    if s.paper and s.dry_run and not s.data:
        paper.print_plan(s, world, training_table(s, {}))
        engine.leave()
    if s.data == "toy":
        toy_world(s, world, s.stage)
    return world, *load(s, world, template)


def check(s):
    check_ranges(s)
    if not s.out:
        stop("out is empty: it names the folder of the run")
    if not s.data and not (s.paper and s.dry_run):
        stop("data is empty: it names the training data")
    if (problem := unwritable(path_of(s)) or would_overwrite(path_of(s))) and not s.dry_run:
        stop(f"out={s.out}: {problem}")
    if not s.steps and not s.epochs:
        stop("steps=0 and epochs=0.0: nothing to do")
    for key in ("vision", "llm"):
        if s.init and getattr(s, key) != getattr(type(s), key):
            stop(f"init={s.init} brings its own towers, so {key}={getattr(s, key)} would not be read: --init= starts "
                 "from vision and llm")
    for key in ("lora_alpha", "lora_dropout", "lora_targets", "bits"):
        if not getattr(s, "lora_r", 1) and getattr(s, key) != getattr(type(s), key):
            stop(f"{key}={getattr(s, key)} means nothing while lora_r is 0: the whole language model would train")
    if s.resume not in ("auto", "none") and not Path(s.resume, MANIFEST).is_file():
        stop(f"resume={s.resume} is not a checkpoint: those of a run are called checkpoints/step_*")


def toy_world(s, world, split):
    """For data=toy: generate the toy data if it is missing, and set data, images and val_data to its files. split:
    align (captions) or sft (conversations)"""
    if s.val_data or s.images != ".":
        stop("data=toy brings its own images and val_data; the given ones would not be read")
    from demo import toy
    place = Path("runs/toy")
    if world.rank == 0:
        try:
            if toy.write_world(place, split):
                world.print(f"drew the toy world's images for {split} in {place}")
        except OSError as e:
            stop(f"the toy world cannot be drawn in {place}: {e.strerror or e}")
    world.gather("drawn")                                        # the other ranks wait for rank 0
    s.data, s.images, s.val_data = (str(place / n) for n in (f"{split}.json", "images", f"val_{split}.json"))
    s.system = s.system or ""                                    # the toy's LLM was trained without a system text


def load(s, world, template):
    """Load the model -> model.VLM, formats.llava.Folder (tokenizer, configs). Fill in settings that are empty: they are
    taken from `init`. A new model gets those of LLaVA-1.5.

    template    used if `init` has no template, or only `plain`, which is for captions"""
    if not s.init and not (s.vision and s.llm):
        stop("init is empty, so vision and llm must name a vision tower and a language model")
    model, folder = llava.load_model(s.vision, s.llm, s.init, s.connector, s.seed, dtype=None, parts=s.parts)
    engine.set_threads(model, world)
    cfg = model.cfg
    if s.connector not in (type(s).connector, cfg.connector):
        stop(f"connector={s.connector}, but that of {s.init} is {cfg.connector}")
    if s.max_len > (positions := configs.positions(cfg.text)):
        stop(f"max_len={s.max_len}, but the language model was made for {positions:,} positions")
    known = folder.meta.get("template", "plain")
    s.template = s.template or (known if known != "plain" else template)
    if s.init and not s.image_aspect and not folder.meta and llava.aspect(folder, cfg) == "crop":
        folder.notes.append("image_aspect=crop, as the image processor of init has it; LLaVA-1.5 itself was trained "
                            "on padded images, which is --image_aspect=pad")
    s.image_aspect = s.image_aspect or (llava.aspect(folder, cfg) if s.init else "pad")
    if s.system is None:
        s.system = folder.meta.get("system")
    return model, folder


def training_table(s, usual):
    """Say which weights train -> {name glob: learning rate}. This is the setting `train`, or, if `train` is empty, the
    table `usual` of the stage."""
    if not s.train:
        return usual
    ignored = [key for key in ("lr", "connector_lr", "vision_lr") if getattr(s, key, 0) != getattr(type(s), key, 0)]
    if ignored or getattr(s, "lora_r", 0):
        stop(f"train={s.train} says who trains, so {(ignored or ['lora_r'])[0]} would not be read: give one of them "
             "(--train= is the stage's own choice)")
    items = [item.rpartition("=")[::2] for item in s.train.split()]
    try:
        table = {glob: float(lr) for glob, lr in items}
    except ValueError:
        table = {}
    if len(table) < len(items) or not all(0 <= lr < math.inf for lr in table.values()) or not table:
        stop(f"train={s.train}: expected glob=lr, separated by spaces, each glob once, as in "
             "'multi_modal_projector.*=1e-3'")
    return table


@dataclasses.dataclass
class Run:
    """The objects that the training loop of a stage uses."""
    model: torch.nn.Module = None                # as engine.parallelize returned it
    optimizer: torch.optim.Optimizer = None
    start: int = 0                               # the first step to train; not 0 in a resumed run
    steps: int = 0
    batches: object = ()                         # iterator: data.StepData of each step from `start` on
    first: object = None                         # data.StepData of step 0
    folder: RunFolder = None                     # writes checkpoints
    log: Log = None
    validation: Validation = None
    signals: list = None                         # numbers of the signals received so far
    exit_code: int | None = None                 # set only by a dry run, which sets no other field

    def due(self, step, every):
        """True after the last step; if `every` > 0, also if step + 1 is a multiple of `every`. `step` counts from 0."""
        return every > 0 and (step + 1) % every == 0 or step + 1 == self.steps or self.log.best.over

    def is_best(self, step):
        """Must the checkpoint of this step be kept, because keep_best names a metric and no step was better?"""
        return self.folder.kept_step(self.log) == step + 1


def prepare(s, world, model, folder, lrs):
    """Open the data and print the plan. Then do a dry run, or start or resume the run -> Run.

    folder    formats.llava.Folder
    lrs       {name of a trained weight: its learning rate}"""
    cfg, spec = model.cfg, configs.image_spec(folder.pre, s.image_aspect)
    encode = Encoder(folder.tok, s.template, image_layout(cfg), s.max_len, s.system, instruct.reader(folder, cfg))
    samples = Steps(s.data, s.images, encode, spec, s.batch_size, s.max_tokens, s.seed, world.rank, world.size,
                    span_ends(cfg), s.loss, s.min_rating, s.order, s.augment)
    steps = s.steps or math.ceil(s.epochs * samples.total / s.batch_size)
    first, = level(samples, [samples[0]], world)
    world.print(*folder.notes, *plan.lines(model, lrs, world, first.micro, steps, s), sep="\n")
    if s.dry_run:
        return Run(exit_code=rehearse(s, world, samples, first, folder))
    flops = plan.flops(model, plan.rows(cfg))
    return begin_run(s, world, model, folder, lrs, samples, first, steps, flops,
                     lambda: Validation(s, world, samples, folder))


def begin_run(s, world, model, folder, lrs, samples, first, steps, flops, validation, metrics=()):
    """Start or resume a run -> Run. flops: what plan.flops returns; validation: function that makes Run.validation;
    metrics: those that keep_best may name where a run has no validation"""
    files = RunFolder(s, world, steps, samples, folder, lrs)
    if files.is_finished():
        return Run()
    if world.rank == 0 and not s.overfit:                        # --overfit writes no checkpoint and no model
        (checkpoint, published), more = plan.disk(model, published_dtype(s, world)), bool(s.keep_best)
        check_space(files.out, checkpoint, published * (1 + more), s.keep_last + more, world.print)
    send = None
    if s.track != "none" and world.rank == 0:
        send = tracker(s.track, files.out, dataclasses.asdict(s))
    validation = validation()
    model = engine.parallelize(model, world, model.blocks, s.parallel, s.recompute, s.compile)
    if plan.adds_into_grad(world, s.compile):
        add_into_grad(model)
    optimizer = engine.adamw(model, lrs, s.weight_decay)
    state = files.resume(model, optimizer)
    start = state["step"]
    best = watched(s, world, files.out / "log.jsonl", start, validation.metrics if validation else metrics)
    log = Log(files.out, world, steps, start, flops, s.max_dropped, state, best, send)
    batches = log.timed(loader(samples, [0] * steps if s.overfit else range(start, steps), s.workers))
    batches = itertools.takewhile(lambda _: not best.over, level(samples, batches, world))     # ends the loop early
    return Run(model, optimizer, start, steps, batches, first, files, log, validation, record_signals())


def stopped(run, step, world):
    """Called when a run stops after a signal: print a message. The checkpoint is already written. -> exit code"""
    world.print(f"stopped by a signal after step {step + 1}/{run.steps}; the same command goes on")
    return 128 + (run.signals or [signal.SIGTERM])[0]            # SIGTERM if only another rank got a signal


def finish(run, s, world, folder):
    """Called after the last step: publish the model, or report whether --overfit worked -> exit code, or None"""
    if run.folder is None:                                       # a dry run, or the run was already finished
        return run.exit_code
    if s.overfit:
        return check_overfit(run.model, run.first, world)
    publish(run.folder, run.model, folder, run.log)


def rehearse(s, world, samples, first, folder, validation=Validation):
    """Do what --dry_run does after the plan -> exit code, or None. Stop if a real run would stop at the samples of the
    first step, or at the validation file. Print the first usable sample with its loss mask."""
    used, dropped = (int(n) for n in world.sum([len(first.names), len(first.dropped)]))
    reasons = {}
    tally(world, first.dropped, reasons)
    check_dropped(s.max_dropped, dropped, used + dropped, reasons)
    for count, line in reasons.values():
        world.print(f"  {count} of these samples cannot be used, as {line}")
    validation(s, world, samples, folder)
    if not used:
        world.print("  none of the first step's samples can be used: python data.py says why")
        return 1
    if world.rank == 0 and first.names:
        b, encode = next(b for b in first.micro if len(b.ids)), samples.encode
        n = int((b.lo == 0).sum())                               # tokens of the first sample in this sequence
        firsts = int((b.ids[:n] >> 24 > 0).sum())                # images of the layout Anyres
        images = firsts or int((b.ids[:n] == encode.layout.image_id).sum()) // encode.layout.tokens
        kind = "tile(s)" if encode.layout.needs_image and not firsts else "image(s)"
        print(f"  {first.names[0]}, {n} tokens, {images} {kind}, its loss mask:")
        chat.show(encode.tok, b.ids[:n].tolist(), [IGNORE, *b.labels[: n - 1].tolist()], encode.layout.image_id)
