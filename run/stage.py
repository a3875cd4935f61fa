"""What the training scripts share besides verbs and loop: settings that mean something, and the books of a run folder.

    config.json      settings, versions, code revision          log.jsonl        one object per logged step
    samples.jsonl    fixed questions answered on the way        checkpoints/     whole or absent
    model/           at the end: a complete llava-hf folder     adapter/         after LoRA, in PEFT form
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

import chat
import config
import data
import engine
import images
import lora
from config import stop, within
from formats import card, configs, hub, llava, peft, tensors, whole
from formats.strict_json import read_json
from generate import Chat
from loss import token_loss
from run import checkpoint, log, plan
from run.folder import foreign, unwritable

# settings that may differ between two runs that are the same
IDLE = {"out", "resume", "log_every", "sample_every", "eval_every", "save_every", "keep_last", "keep_best", "workers",
        "device", "parallel", "recompute", "compile", "kernels", "dry_run", "max_tokens", "steps", "epochs"}
# settings without which a checkpoint means something else: which samples a step sees follows from the first two and the
# step alone, and adapters were learnt under their scale and over a base in so many bits
FIXED = ("seed", "batch_size", "lora_alpha", "bits")
OWN = ("finished.json", "model", "adapter", "checkpoints", "log.jsonl", "samples.jsonl")    # in a run, and config.json
PATIENCE = 10  # updates in a row whose gradient is not finite, before the run stops
TRIES = 3      # checkpoints in a row that could not be written, before the run stops


def toy_world(s, world, split):
    """data=toy: draw the toy world, once, and point the settings at it."""
    if s.data != "toy":
        return
    if s.val_data or s.images != ".":
        stop("data=toy brings its own images and val_data; the ones given would not be read")
    from demo import toy
    place = Path("runs/toy")
    if world.rank == 0:
        try:
            if toy.write_world(place, split):
                world.print(f"drew the toy world's pictures for {split} in {place}")
        except OSError as e:
            stop(f"the toy world cannot be drawn in {place}: {e.strerror or e}")
    if world.size > 1:
        dist.barrier()
    s.data, s.images, s.val_data = (str(place / n) for n in (f"{split}.json", "images", f"val_{split}.json"))
    s.system = s.system or ""                                # the toy's tongue was schooled without a system text


RANGES = {"steps": (0, None), "epochs": (0, 1e9), "batch_size": (1, None), "lr": (0, None), "connector_lr": (0, None),
          "warmup": (0, 0.99, "a share of the steps"), "weight_decay": (0, None), "grad_clip": (0, None),
          "workers": (0, None), "lora_r": (0, None), "lora_dropout": (0, 0.99), "max_dropped": (0, 1),
          "lora_alpha": (1e-6, None), "save_every": (0, None), "log_every": (0, None), "eval_every": (0, None),
          "sample_every": (0, None), "keep_last": (1, None), "seed": (0, 2**32)}


def where(name):
    """A folder in full, of a run its model/; a name of the hub as it is"""
    return str((hub.model_in(Path(name)) or Path(name)).resolve()) if Path(name).exists() else name


def place(s):
    """The folder of a run: an exercise leaves the run itself as it is."""
    return Path(s.out, "overfit") if s.overfit else Path(s.out)


def check(s):
    """Settings that cannot be meant end here, in one line, before anything is read."""
    within(s, RANGES)
    if not s.out:
        stop("out is empty: it names the folder of the run")
    if not s.init and not (s.vision and s.llm):
        stop("init is empty, so vision and llm must name two towers")
    out = place(s)
    if (problem := unwritable(out) or foreign(out, (*OWN, "config.json"))) and not s.dry_run:
        stop(f"out={s.out}: {problem}")
    if not s.steps and not s.epochs:
        stop("steps=0 and epochs=0.0: nothing to do")
    towers = [k for k in ("vision", "llm") if getattr(s, k) != type(s).__dataclass_fields__[k].default]
    if s.init and towers:
        stop(f"init={s.init} brings its own towers, so {towers[0]}={getattr(s, towers[0])} would not be read: "
             "--init= starts from vision and llm")
    idle = [k for k in ("lora_alpha", "lora_dropout", "lora_targets", "bits") if not getattr(s, "lora_r", 1)
            and getattr(s, k) != type(s).__dataclass_fields__[k].default]
    if idle:
        stop(f"{idle[0]}={getattr(s, idle[0])} means nothing while lora_r is 0: the whole language model would train")
    if (bits := getattr(s, "bits", 16)) not in (4, 16):
        stop(f"bits={bits}: 4 or 16")
    if s.connector not in ("mlp", "linear"):
        stop(f"connector={s.connector}: mlp or linear")
    if s.resume not in ("auto", "none") and not Path(s.resume, whole.MANIFEST).is_file():
        stop(f"resume={s.resume} is no checkpoint: those of a run are called checkpoints/step_*")
    if s.keep_best and not (s.val_data or s.data == "toy"):
        stop("keep_best needs val_data")
    if s.keep_best and (not s.save_every or s.eval_every % s.save_every):
        stop("keep_best: eval_every must be a multiple of save_every, for only what is written can be kept")


def inherit(s, folder, cfg, template):
    """What the settings leave open is as the model was trained that we start from; a new one is made as LLaVA-1.5. The
    template of stage 1 is not handed on: it knows no questions. What the model cannot be, ends here."""
    if s.connector not in ("mlp", cfg.connector):
        stop(f"connector={s.connector}, but that of {s.init} is {cfg.connector}")
    known = folder.meta.get("template", "plain")
    if s.max_len > (room := configs.positions(cfg.text)):
        stop(f"max_len={s.max_len}, but the language model was made for {room:,} positions")
    s.template = s.template or (known if known != "plain" else template)
    if s.init and not s.image_aspect and not folder.meta and llava.aspect(folder, cfg) == "crop":
        folder.notes.append("image_aspect=crop, as the image processor of init has it; LLaVA-1.5 itself was trained "
                            "on padded pictures, which is --image_aspect=pad")
    s.image_aspect = s.image_aspect or (llava.aspect(folder, cfg) if s.init else "pad")
    if s.system is None:
        s.system = folder.meta.get("system")


def tolerated(share, n):
    """Samples of n that may be unusable: the share asked for, and three standard deviations of chance above it, so that
    one bad sample among the first few stops nothing. A share of 0 means none."""
    return share * n + (3 * math.sqrt(max(1, share * n)) if share else 0)


def tally(world, dropped, reasons):
    """Add what a step dropped, [(sample, reason)] on each rank, to {kind: (count, first line)}."""
    names = [[why.split(": ")[0], f"{name}: {why}"] for name, why in dropped]
    for kind, line in (pair for rank in world.gather(names) for pair in rank):
        count, first = reasons.get(kind, (0, line))
        reasons[kind] = (count + 1, first)


def too_many(s, seen, reasons):
    """Stop where more samples could not be used than the settings allow, with the commonest reasons."""
    if seen["dropped"] > tolerated(s.max_dropped, seen["samples"]):
        worst = "\n  ".join(f"{count} like {first}" for count, first in sorted(reasons.values(), reverse=True)[:5])
        stop(f"{seen['dropped']} of {seen['samples']} samples could not be used, over "
             f"max_dropped={s.max_dropped}:\n  {worst}")


def validation(s, world, samples):
    """The validation file -> Once, or None; one that holds nothing usable ends the run before it begins."""
    if not s.val_data:
        return None
    val = Once(s.val_data, s.images, samples.encode, samples.image_spec, min(s.batch_size, 32), s.max_tokens, 0,
               world.rank, world.size)
    if not any(sum(world.gather(len(val[i].names))) for i in range(len(val))):
        first = "".join(f"; {name}: {why}" for name, why in val[0].dropped[:1])
        stop(f"{s.val_data}: no sample can be used{first}")
    return val


def rehearse(s, world, samples, first, tok):
    """What --dry_run does after the plan: stop where the run would stop, for the samples of its first step or for its
    validation file; print the first usable sample with its mask coloured."""
    used, dropped = (int(n) for n in world.sum([len(first.names), len(first.dropped)]))
    reasons = {}
    tally(world, first.dropped, reasons)
    too_many(s, {"samples": used + dropped, "dropped": dropped}, reasons)
    for count, line in reasons.values():
        world.print(f"  {count} of these samples cannot be used, as {line}")
    validation(s, world, samples)
    for f, i in samples.samples(0):
        try:
            ids, labels, names, cut = samples.encode(samples.files[f][i])
            for n in names:
                images.load_image(images.safe_path(s.images, n))
        except config.BadSample:
            continue
        world.print(f"  {samples.name(f, i)}, {len(ids)} tokens, {len(names)} image(s), what is learnt in green:")
        return chat.show(tok, ids, labels, samples.encode.image_id) if world.rank == 0 else None
    world.print("  none of the first step's samples can be used: python data.py says why")
    return 1


class Once(data.Steps):
    """Every sample once, in one epoch whose last step may be short: for validation."""

    def samples(self, step):
        return super().samples(step)[: max(0, self.total - step * self.batch_size)]

    def __len__(self):
        return math.ceil(self.total / self.batch_size)


class Run:
    def __init__(self, s, world, model, folder, samples, steps, adapter=None):
        self.s, self.world, self.model, self.folder, self.samples, self.steps = s, world, model, folder, samples, steps
        self.adapter, self.cfg = adapter, engine.unwrap(model).cfg
        self.out = place(s)
        trained = {n for n, p in engine.unwrap(model).named_parameters() if p.requires_grad}
        self.base = tensors.base_digest({n: m for n, m in folder.marks.items() if n not in trained})  # before quantising
        self.origin = s.init or f"{s.vision} and {s.llm}"
        self.seen, self.reasons, self.best = Counter(), {}, None   # kind: (count, first line); (validation loss, step)
        self.bad_updates = self.bad_saves = 0                               # in a row
        self.spikes = log.Spikes()
        self.done = self.told = self.begun = False
        self.val = validation(s, world, samples)
        self.fixed = self.fixed_questions() if self.val else []
        self.flops = plan.flops(model, plan.rows(self.cfg))
        self.signals = engine.listen()

    # -- where it stopped

    @functools.cached_property
    def fingerprint(self):
        """Of the data files and how they are mixed, so that a run is not resumed on other data."""
        h = hashlib.sha256()
        for r, draws in zip(self.samples.files, self.samples.counts):
            h.update(b"%d of %d bytes" % (draws, len(r.blob)))
            h.update(r.blob)
        return h.hexdigest()

    def finished(self):
        """Was this very run done before? Other settings or data in the same folder are a mistake, no finished run."""
        file = self.out / "finished.json"
        if not file.is_file() or not (self.out / "model" / "config.json").is_file():
            return False
        done = read_json(file)
        if done["steps"] < self.steps:
            return False                                             # it was asked to go on
        if done["data"] != self.fingerprint:
            stop(f"{self.out} holds a run finished on other data: --out=DIR writes elsewhere, "
                 "--resume=none starts again")
        if done.get("base") != self.base:
            stop(f"{self.out} holds a run finished on another base, for what is frozen in {self.origin} has changed "
                 "since: --out=DIR writes elsewhere, --resume=none starts again")
        for key, old in done["settings"].items():
            if key not in IDLE and old != getattr(self.s, key, old):
                stop(f"{self.out} holds a run finished with {key}={old}, not {getattr(self.s, key)}: --out=DIR writes "
                     "elsewhere, --resume=none starts again")
        return True

    def resume(self, optimizer):
        """-> the step to go on from; of a finished run the last one, and then nothing is touched any more."""
        s, out, world, start = self.s, self.out, self.world, 0
        how = "none" if s.overfit else s.resume
        if how == "auto" and self.finished():
            world.print(f"{out} is finished ({self.steps} steps): nothing to do. "
                        "--resume=none starts again, --out=DIR elsewhere")
            self.done = True
            return self.steps
        if world.rank == 0:
            try:
                self.lock = checkpoint.claim(out, world.print)
            except OSError as e:                             # what no look beforehand shows: a file system that refuses
                stop(f"out={out}: {e.strerror}")
        path = checkpoint.find_checkpoint(out, how, world.print) if world.rank == 0 else None    # one looks and cleans up for all
        path = world.gather(str(path) if path else None)[0]
        if path:
            state, new = read_json(Path(path, "state.json")), dataclasses.asdict(s)
            if state["data"] != self.fingerprint:
                stop(f"{path} was trained on other data than {s.data}, or on another mixture of it; "
                     "--resume=none starts again")
            for key in FIXED:
                if (old := state["settings"].get(key, getattr(type(s), key, None))) != new.get(key):
                    stop(f"{path} was trained with {key}={old}, not {new.get(key)}: --resume=none starts again")
            if state.get("base") != self.base:
                stop(f"{path} was trained on another base: what is frozen in {self.origin} has changed since; "
                     "--resume=none starts again")
            checkpoint.restore(Path(path), self.model, optimizer, world)
            for key, old in state["settings"].items():
                if old != new.get(key) and key not in ("out", "resume"):
                    world.print(f"resumed with {key}={new.get(key)}, before it was {old}")
            start, self.best = state["step"], state["best"]
            self.seen, self.reasons = Counter(state["seen"]), state["reasons"]
            self.spikes = log.Spikes(state["losses"])
            world.print(f"resumed from {path}")
        self.logger = log.Log(out, world, self.steps, start)
        return start

    def begin(self):
        """The first step is done and its gradients are checked: from here on the folder is this run's. What another one
        left in it goes now, and not before: a mistake in the new one must not cost the old one."""
        self.begun = True
        if self.world.rank > 0:
            return
        try:
            if self.s.overfit or self.s.resume == "none":
                for name in OWN:
                    if (self.out / name).exists():
                        checkpoint.discard(self.out / name)
            for name in ("log.jsonl", "samples.jsonl"):
                checkpoint.trim_log(self.out / name, self.logger.start)
            about = {"settings": dataclasses.asdict(self.s), "versions": log.versions()}
            tensors.write_json(self.out / ".tmp-config.json", about)   # half a config.json would make a stranger's folder of this
            os.replace(self.out / ".tmp-config.json", self.out / "config.json")
        except OSError as e:
            stop(f"out={self.out}: {e.strerror}")

    def due(self, step, every):
        return every > 0 and (step + 1) % every == 0 or step + 1 == self.steps

    # -- what happened in a step

    def count(self, step, batch, result, waited):
        """Count what was dropped, cut or skipped, over all ranks; stop when it is too much."""
        images = sum(len(b.images) for b in batch.micro)
        used, dropped, cut, moving, images, told = (int(v) for v in self.world.sum(
            [len(batch.names), len(batch.dropped), batch.truncated, batch.animated, images, len(self.signals)]))
        self.told = told > 0                                 # the same on every rank, whichever the scheduler spoke to
        self.seen.update(samples=used + dropped, dropped=dropped, truncated=cut, animated=moving,
                         skipped_updates=int(not result["updated"]))
        units = dict(tokens=result["tokens"], supervised=result["supervised_tokens"], images=images)
        self.logger.count(result["tokens"], used, sum(f * units[u] for u, f in self.flops.items()), waited)
        if dropped:
            tally(self.world, batch.dropped, self.reasons)
        too_many(self.s, self.seen, self.reasons)
        if not self.begun:
            self.begin()
        if result["updated"] and (spike := self.spikes.look(result["loss"])):
            names = [n for rank in self.world.gather(batch.names) for n in rank]
            self.world.print(f"step {step + 1}: loss {result['loss']:.4f} is {spike:.1f} standard deviations above the "
                             f"last ones; all its samples are in log.jsonl: {', '.join(names[:8])} ...")
            if self.world.rank == 0:
                log.append(self.out / "log.jsonl", {"step": step + 1, "spike": spike, "samples": names})
        self.bad_updates = 0 if result["updated"] else self.bad_updates + 1
        if not result["updated"]:
            self.world.print(f"step {step + 1}: gradient norm {result['grad_norm']}, loss {result['loss']}, "
                             f"{result['supervised_tokens']} supervised tokens: update skipped")
        if self.bad_updates >= PATIENCE:
            names = [n for rank in self.world.gather(batch.names) for n in rank]
            stop(f"{PATIENCE} updates in a row had no finite gradient; the last one, step {step + 1}, "
                 f"saw {', '.join(names[:8])} ...")

    def log(self, step, lr, result):
        result = {k: v for k, v in result.items() if k != "updated"}
        counters = {k: self.seen[k] for k in ("dropped", "truncated", "animated", "skipped_updates")}
        self.logger.write(step + 1, lr=lr, **result, **counters)

    # -- looking at it

    @torch.no_grad()
    def validate(self, step):
        """Mean loss per supervised token of the validation file; training is not touched."""
        if not self.val:
            return
        self.model.eval()
        total = count = 0.0
        bad = 0
        for i in range(len(self.val)):
            part = self.val[i]
            bad += len(part.dropped)
            for batch in part.micro:
                with self.world.autocast():
                    total += float(token_loss(self.model, batch.to(self.world.device)))
                count += int((batch.labels >= 0).sum())
        self.model.train()
        total, count, bad = self.world.sum([total, count, bad])
        loss = total / count if count else math.nan          # pictures may have gone since the start
        if self.world.rank == 0:
            log.append(self.out / "log.jsonl", {"step": step + 1, "val_loss": loss, "val_dropped": int(bad)})
        self.world.print(f"step {step + 1}/{self.steps}  validation loss {loss:.4f}"
                         + (f" ({bad:.0f} of {self.val.total} samples could not be used)" if bad else ""))
        if math.isfinite(loss) and (self.best is None or loss < self.best[0]):
            self.best = (loss, step + 1)

    def fixed_questions(self, n=4):
        """[(sample, question, true answer, prompt (n,), pictures)] from the first turns of the validation file."""
        out = []
        for i in range(len(self.val.files[0])):
            try:
                row = self.val.files[0][i]
                turns, names, system = data.conversation(row)
                if names and turns[0][0].count(chat.IMAGE) == len(names):
                    self.val.encode(row)                       # nobody is asked what could not be learnt
                    prompt, _ = self.val.encode.encode([(turns[0][0], None)], len(names), system)
                    files = [images.safe_path(self.s.images, f) for f in names]
                    pictures = [images.preprocess(images.load_image(f), self.val.image_spec) for f in files]
                    out.append((row.get("id"), *turns[0], torch.tensor(prompt), pictures))
            except config.BadSample:
                continue
            if len(out) == n:
                break
        return out

    def sample(self, step):
        if not self.fixed:
            return
        model = engine.unwrap(self.model)
        speaker = Chat.of(model, self.folder, self.s.template, self.s.system, self.s.image_aspect)
        with self.world.autocast(), torch.compiler.set_stance("force_eager"):   # a cache has other lengths at each word
            said = speaker.answers([p for *_, p, _ in self.fixed], [x for *_, p in self.fixed for x in p])
        if self.world.rank == 0:
            for (i, q, a, _, _), answer in zip(self.fixed, said):
                row = {"step": step + 1, "id": i, "prompt": q, "expected": a, "answer": answer}
                log.append(self.out / "samples.jsonl", row)
        _, question, truth, *_ = self.fixed[0]
        question = " ".join(question.replace(chat.IMAGE, "").split())
        self.world.print(f"  asked: {question:.100}\n  says:  {said[0]}\n  true:  {truth}")

    def by_heart(self, batch):
        """After --overfit: is every supervised token of the batch the model's first choice?"""
        right = count = 0
        self.model.eval()
        with torch.no_grad(), self.world.autocast():
            for b in batch.micro:
                b = b.to(self.world.device)
                guess = self.model(*b, head=lambda h, w, y: (h @ w.to(h.dtype).T).argmax(-1))
                y = b.labels[b.labels >= 0]
                right, count = right + int((guess == y).sum()), count + len(y)
        right, count = self.world.sum([right, count])
        self.world.print(f"learnt by heart: {'yes' if right == count else 'no'} "
                         f"({right:.0f} of {count:.0f} supervised tokens are the first choice)")
        return 0 if right == count else 1

    # -- keeping it

    def save(self, step, optimizer):
        """A checkpoint that cannot be written is reported and training goes on, TRIES times in a row."""
        if self.s.overfit:
            return
        state = dict(settings=dataclasses.asdict(self.s), data=self.fingerprint, seen=self.seen, reasons=self.reasons,
                     best=self.best, base=self.base, losses=list(self.spikes.losses))
        problem = ""
        try:
            checkpoint.save_checkpoint(self.out, step + 1, self.model, optimizer, self.world, state, *self.kept())
        except OSError as e:
            problem = str(e)
        problem = next(filter(None, self.world.gather(problem)), "")
        self.bad_saves = self.bad_saves + 1 if problem else 0
        if self.bad_saves >= TRIES:
            stop(f"{TRIES} checkpoints in a row could not be written: {problem}")
        if problem:
            self.world.print(f"step {step + 1}: {problem}; training goes on from memory")

    def kept(self):
        return self.s.keep_last, (self.best[1],) if self.s.keep_best and self.best else ()

    def stopping(self, step, optimizer):
        """Was any rank told to stop? Then this step is saved, unless it just was."""
        if self.told:
            if not self.due(step, self.s.save_every):
                self.save(step, optimizer)
            self.world.print(f"stopped by a signal after step {step + 1}/{self.steps}; the same command goes on")
        return self.told

    def publish(self):
        """model/, and adapter/ after LoRA; then the mark that says the run is done."""
        if self.done:
            return
        s, model, state = self.s, engine.unwrap(self.model), {}
        if self.seen["skipped_updates"] >= self.steps:
            stop(f"nothing was learnt in {self.steps} steps ({self.seen['dropped']} of {self.seen['samples']} samples "
                 "dropped), so no model is written")
        dtype = self.world.dtype if self.world.dtype != torch.float32 else torch.float16
        if not self.begun:
            self.begin()                                     # no step was left to do
        for k, v in model.state_dict().items():
            v = engine.full(v.detach())                      # every rank takes part in gathering it
            if self.world.rank == 0:
                state[k] = (v if self.adapter or v.device.type == "cpu" else v.to(dtype)).cpu()   # merging is in fp32
        if self.world.rank > 0:
            return
        try:
            checkpoint.retire(self.out, max(self.steps, self.logger.start), *self.kept())   # killed in its last save?
            if self.adapter:
                trained = {n: state[n] for n, p in model.named_parameters() if p.requires_grad}
                about = dict(template=s.template, system=s.system, image_aspect=s.image_aspect, bits=s.bits)
                about |= {} if s.init else dict(vision=where(s.vision), llm=where(s.llm))
                base = where(s.init) if s.init else None
                peft.save_adapter(self.out / "adapter", trained, s.lora_r, s.lora_alpha, s.lora_dropout, base,
                                  self.base, about, card.adapter(self.out, base))
                state = lora.merge_state(state, lora.scales(model), dtype)
            llava.save_model(self.out / "model", state, self.cfg, self.folder, s.template, s.system, s.image_aspect, dtype,
                    card.text(self.out, self.cfg))
            tmp = self.out / ".tmp-finished"
            tmp.write_text(json.dumps({"steps": self.steps, **self.seen, "data": self.fingerprint, "base": self.base,
                                       "settings": dataclasses.asdict(s)}))
            os.replace(tmp, self.out / "finished.json")
        except OSError as e:
            stop(f"{e}. The last checkpoint is whole, the same command tries again")
        lost = self.seen["dropped"] + self.seen["truncated"]
        if self.adapter and not card.peft_reads(base):
            self.world.print(f"{self.out / 'adapter'} is for sample.py and eval.py: {' '.join(card.NO_BASE.split())}")
        self.world.print(f"done: {self.out / 'model'}" + (f"; {self.seen['dropped']} of {self.seen['samples']} samples "
                         f"dropped, {self.seen['truncated']} truncated" if lost else "")
                         + (f"; {self.seen['animated']} pictures are animated, only the first frame was looked at"
                            if self.seen["animated"] else ""))
