"""What the training scripts share besides verbs and loop: the bookkeeping of a run folder.

    config.json      settings, versions, code revision          log.jsonl        one object per logged step
    samples.jsonl    fixed questions answered on the way        checkpoints/     whole or absent
    model/           at the end: a complete llava-hf folder     adapter/         after LoRA, in PEFT form
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

import chat
import checkpoint
import data
import engine
import hf
import lora
from answer import Speaker
from config import stop
from loss import token_loss

ROOT = Path(__file__).resolve().parent
PATIENCE = 10  # updates in a row whose gradient is not finite, before the run stops


def toy_world(s, world, split):
    """data=toy: draw the toy world, once, and point the settings at it."""
    if s.data != "toy":
        return
    sys.path.insert(0, str(ROOT / "demo"))
    import toy
    place = Path("runs/toy")
    if world.rank == 0:
        if toy.write(place, split):
            world.print(f"drew the toy world's pictures for {split} in {place}")
    if world.size > 1:
        dist.barrier()
    s.data, s.images, s.val_data = str(place / f"{split}.json"), str(place / "images"), str(place / f"val_{split}.json")


def one_sample(samples, tok, world):
    """Print the first usable sample of a run with its mask coloured."""
    for f, i in samples.samples(0):
        try:
            ids, labels, names, cut = samples.encode(samples.files[f][i])
        except data.BadSample:
            continue
        world.print(f"  {samples.name(f, i)}, {len(ids)} tokens, {len(names)} image(s), what is learnt in green:")
        return chat.show(tok, ids, labels, samples.encode.image_id) if world.rank == 0 else None


def fingerprint(samples):
    """Of the data files, so that a run is not resumed on other data."""
    h = hashlib.sha256()
    for rows in samples.files:
        h.update(rows.blob[:])
    return h.hexdigest()


class Run:
    def __init__(self, s, world, model, folder, samples, encode, spec, steps, adapter=None):
        self.s, self.world, self.model, self.folder, self.samples, self.steps, self.adapter = s, world, model, folder, samples, steps, adapter
        self.out, self.cfg, self.tok = Path(s.out), engine.unwrap(model).cfg, folder.tok
        self.seen, self.reasons, self.bad_updates, self.best = Counter(), Counter(), 0, None   # best: (validation loss, step)
        self.encode, self.spec = encode, spec
        self.val = data.Steps(s.val_data, s.images, encode, spec, min(s.batch_size, 32), s.max_tokens, 0, world.rank, world.size) if s.val_data else None
        self.fixed = self.fixed_questions() if self.val else []

    # -- where it stopped

    def resume(self, optimizer):
        """-> the step to go on from. A finished run stays as it is."""
        s, out, start = self.s, self.out, 0
        if s.resume == "auto" and (out / "finished.json").is_file() and not s.overfit:
            done = json.loads((out / "finished.json").read_text())
            if done["steps"] >= self.steps and checkpoint.whole(out / "model") is None:
                self.world.print(f"{out} is finished ({done['steps']} steps): nothing to do. --resume=none starts again, --out=DIR elsewhere")
                engine.finish(self.world)
                raise SystemExit(0)
        if not s.overfit:
            if self.world.rank == 0:                         # one process looks and cleans up, all use what it found
                found = checkpoint.find(out, s.resume, self.world.print)
            path = self.world.gather(str(found) if self.world.rank == 0 and found else None)[0]
            if path:
                state = checkpoint.restore(Path(path), self.model, optimizer, self.world)
                if state["data"] != fingerprint(self.samples):
                    stop(f"{path} was trained on other data than {s.data}; --resume=none starts again")
                for key, old in state["settings"].items():
                    new = dataclasses.asdict(s).get(key)
                    if old != new and key not in ("out", "resume"):
                        self.world.print(f"resumed with {key}={new}, before it was {old}")
                start, self.best = state["step"], state["best"]
                self.seen, self.reasons = Counter(state["seen"]), Counter(state["reasons"])
                self.world.print(f"resumed from {path}")
            elif s.resume == "auto" and (out / "config.json").is_file() and self.world.rank == 0:
                (out / "log.jsonl").unlink(missing_ok=True)      # an earlier attempt that never reached a checkpoint
                (out / "samples.jsonl").unlink(missing_ok=True)
        if self.world.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            if s.resume == "none":
                for name in ("log.jsonl", "samples.jsonl", "finished.json"):
                    (out / name).unlink(missing_ok=True)
                for name in ("checkpoints", "model", "adapter"):
                    shutil.rmtree(out / name, ignore_errors=True)
            for name in ("log.jsonl", "samples.jsonl"):
                checkpoint.trim_log(out / name, start)
            hf.write(out / "config.json", {"settings": dataclasses.asdict(s), "versions": engine.versions()})
        self.logger = engine.Log(out, self.world, self.steps, start, engine.flops_per_token(self.model))
        return start

    def due(self, step, every):
        return every > 0 and (step + 1) % every == 0 or step + 1 == self.steps

    # -- what happened in a step

    def count(self, step, batch, result, waited):
        """Count what was dropped, cut or skipped, over all ranks; stop when it is too much."""
        names = [f"{name}: {why}" for name, why in batch.dropped]
        used, dropped, cut = (int(v) for v in self.world.sum([len(batch.names), len(names), batch.truncated]))
        self.seen.update(samples=used + dropped, dropped=dropped, truncated=cut, skipped_updates=not result["updated"])
        self.logger.count(result["tokens"], used, waited)
        if dropped:
            for rank in self.world.gather(names):
                for line in rank:
                    self.reasons[line] += 1
        if self.seen["dropped"] > self.s.max_dropped * max(self.seen["samples"], 100):
            worst = "\n  ".join(list(self.reasons)[:5])
            stop(f"{self.seen['dropped']} of {self.seen['samples']} samples could not be used, over max_dropped={self.s.max_dropped}:\n  {worst}")
        self.bad_updates = 0 if result["updated"] else self.bad_updates + 1
        if not result["updated"]:
            self.world.print(f"step {step + 1}: gradient norm {result['grad_norm']}, loss {result['loss']}: update skipped")
        if self.bad_updates >= PATIENCE:
            names = [n for rank in self.world.gather(batch.names) for n in rank]
            stop(f"{PATIENCE} updates in a row had no finite gradient; the last one, step {step + 1}, saw {', '.join(names[:8])} ...")

    def log(self, step, lr, result):
        extra = {k: self.seen[k] for k in ("dropped", "truncated", "skipped_updates")}
        self.logger.write(step + 1, loss=result["loss"], lr=lr, grad_norm=result["grad_norm"], tokens=result["tokens"],
                          supervised_tokens=result["supervised_tokens"], **extra)

    # -- looking at it

    @torch.no_grad()
    def validate(self, step):
        """Mean loss per supervised token of the validation file; training is not touched."""
        if not self.val:
            return
        self.model.eval()
        total = count = 0.0
        for i in range(math.ceil(self.val.total / self.val.batch_size)):
            for batch in self.val[i].micro:
                with self.world.autocast():
                    total += float(token_loss(self.model, batch.to(self.world.device)))
                count += int((batch.labels >= 0).sum())
        self.model.train()
        total, count = self.world.sum([total, count])
        loss = total / max(1, count)
        if self.world.rank == 0:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps({"step": step + 1, "val_loss": loss}) + "\n")
        self.world.print(f"step {step + 1}/{self.steps}  validation loss {loss:.4f}")
        if self.best is None or loss < self.best[0]:
            self.best = (loss, step + 1)

    def fixed_questions(self, n=4):
        """[(sample, question, true answer, pictures)] from the first turns of the validation file."""
        out = []
        for i in range(len(self.val.files[0])):
            try:
                row = self.val.files[0][i]
                turns, names, _ = data.conversation(row)
                if names and turns[0][0].count(chat.IMAGE) == len(names):
                    pictures = [data.preprocess(data.load_image(data.safe_path(self.s.images, f)), self.spec) for f in names]
                    out.append((row.get("id"), turns[0][0], turns[0][1], pictures))
            except data.BadSample:
                continue
            if len(out) == n:
                break
        return out

    def sample(self, step):
        if not self.fixed:
            return
        model = engine.unwrap(self.model)
        speaker = Speaker(model, self.folder, self.s.template, self.s.system, self.s.image_aspect)
        prompts = [speaker.prompt([(q, None)], len(p)) for _, q, _, p in self.fixed]
        with self.world.autocast():
            said = speaker.say(prompts, [x for *_, p in self.fixed for x in p])
        if self.world.rank == 0:
            with open(self.out / "samples.jsonl", "a") as f:
                for (i, q, a, _), answer in zip(self.fixed, said):
                    f.write(json.dumps({"step": step + 1, "id": i, "prompt": q, "expected": a, "answer": answer}) + "\n")
        self.world.print(f"  says: {said[0]}\n  true: {self.fixed[0][2]}")

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
        self.world.print(f"learnt by heart: {'yes' if right == count else 'no'} ({right:.0f} of {count:.0f} supervised tokens are the first choice)")
        engine.finish(self.world)
        return 0 if right == count else 1

    # -- keeping it

    def save(self, step, optimizer):
        state = dict(settings=dataclasses.asdict(self.s), data=fingerprint(self.samples), seen=self.seen, reasons=self.reasons, best=self.best)
        keep = (self.best[1],) if self.s.keep_best and self.best else ()
        checkpoint.save(self.out, step + 1, self.model, optimizer, self.world, state, self.s.keep_last, keep)

    def publish(self):
        """model/, and adapter/ after LoRA; then the mark that says the run is done."""
        model = engine.unwrap(self.model)
        state = {k: engine.full(v.detach()).cpu() for k, v in model.state_dict().items()}
        if self.world.rank == 0:
            s = self.s
            if self.adapter:
                trained = {n for n, p in model.named_parameters() if p.requires_grad}
                lora.save_adapter(self.out / "adapter", {k: v for k, v in state.items() if k in trained}, s.lora_r, s.lora_alpha, s.lora_dropout, s.init or s.llm)
                state = lora.merge_state(state, s.lora_alpha / s.lora_r)
            card = (f"# {Path(s.out).name}\n\nTrained with pumice: {self.steps} steps of {s.batch_size} samples from {s.data}, template {s.template}. "
                    f"Started from {s.init or f'{s.vision} and {s.llm}'}." + (f" Validation loss {self.best[0]:.4f} (step {self.best[1]})." if self.best else ""))
            dtype = torch.float16 if self.world.device.type == "cpu" and self.world.dtype == torch.float32 else self.world.dtype
            hf.save(self.out / "model", state, self.cfg, self.folder, s.template, s.system, s.image_aspect, dtype, card)
            tmp = self.out / ".tmp-finished"
            tmp.write_text(json.dumps({"steps": self.steps, **self.seen}))
            os.replace(tmp, self.out / "finished.json")
            dropped = f"; {self.seen['dropped']} of {self.seen['samples']} samples dropped, {self.seen['truncated']} truncated" if self.seen["dropped"] + self.seen["truncated"] else ""
            self.world.print(f"done: {self.out / 'model'}{dropped}")
