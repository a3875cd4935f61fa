"""The log of a run: log.jsonl and lines on the terminal. It also counts samples, and stops a run that has too many
unusable samples, or too many updates in a row without a finite gradient."""

import contextlib
import datetime
import json
import math
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from config import stop
from formats.whole import write_file
from loss import supervised

# peak FLOP/s of a GPU in bf16 matrix products without sparsity, by the GPU's name
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
PATIENCE = 10  # the run stops after this many updates in a row without a finite gradient


def tolerated(share, n):
    """-> how many of n samples may be unusable: share * n plus three standard deviations, so that one bad sample among
    the first samples does not stop a run. A share of 0 allows no unusable sample."""
    return share * n + (3 * math.sqrt(max(1, share * n)) if share else 0)


def tally(world, dropped, reasons):
    """Count the dropped samples [(name, reason)] of all ranks in `reasons`: {reason: (count, example)}."""
    names = [[why.split(": ")[0], f"{name}: {why}"] for name, why in dropped]
    for reason, line in (pair for rank in world.gather(names) for pair in rank):
        count, first = reasons.get(reason, (0, line))
        reasons[reason] = (count + 1, first)


def check_dropped(max_dropped, dropped, samples, reasons):
    """Stop if more samples were dropped than max_dropped allows, and print the most frequent reasons."""
    if dropped > tolerated(max_dropped, samples):
        worst = "\n  ".join(f"{count} like {first}" for count, first in sorted(reasons.values(), reverse=True)[:5])
        stop(f"{dropped} of {samples} samples could not be used, over max_dropped={max_dropped}:\n  {worst}")


class Log:
    """Count tokens and samples, and write log lines. Rates per second are sums over all ranks since the previous line.

    start    the first step to train; not 0 in a resumed run
    flops    FLOPs per token, per supervised token and per image, from plan.flops()
    state    what state() returned when the checkpoint was written; None in a new run
    best     best.Best, which sees every row          send     on rank 0: called after every row (run/track.py)"""

    def __init__(self, out, world, steps, start=0, flops={}, max_dropped=0.01, state=None, best=None, send=None):
        self.file, self.world, self.steps, self.start = Path(out, "log.jsonl"), world, steps, start
        self.flops_per, self.max_dropped, self.best, self.send, self.done = flops, max_dropped, best, send, start
        self.seen, self.reasons = Counter((state or {}).get("seen")), (state or {}).get("reasons") or {}
        self.drawn = Counter((state or {}).get("drawn"))                       # {path of a data file: samples}
        self.began = self.last = time.time()
        self.tokens = self.samples = self.flops = self.wait = self.bad_updates = 0
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self.peak = next((v for k, v in PEAK.items() if k in name), None)

    def state(self):
        return dict(seen=self.seen, reasons=self.reasons, drawn=self.drawn)

    def timed(self, batches):
        """Yield `batches` unchanged, and add up the time that the training loop waits for them."""
        batches, end = iter(batches), object()
        while True:
            began = time.time()
            batch = next(batches, end)
            self.wait += time.time() - began
            if batch is end:
                return
            yield batch

    def count(self, step, batch, result):
        """Count one step; called after every step. batch: its data.StepData; result: what engine.update returned."""
        micro, self.done = batch.micro, step + 1
        used, dropped, cut, animated, flipped, tokens, labels, images = (int(v) for v in self.world.sum([
            len(batch.names), len(batch.dropped), batch.truncated, batch.animated, batch.flipped,
            sum(len(b.ids) for b in micro), sum(supervised(b.labels) for b in micro),
            sum(len(b.images) for b in micro)]))
        self.seen.update(samples=used + dropped, dropped=dropped, truncated=cut, animated=animated, flipped=flipped,
                         skipped_updates=int(not result["updated"]))
        self.drawn.update(batch.drawn)                                         # the same on all ranks
        units = dict(tokens=tokens, supervised=labels, images=images)
        self.tokens, self.samples = self.tokens + tokens, self.samples + used
        self.flops += sum(f * units[u] for u, f in self.flops_per.items())
        self.result = {**result, "tokens": tokens, "supervised_tokens": labels}
        del self.result["updated"]
        if dropped:
            tally(self.world, batch.dropped, self.reasons)
        check_dropped(self.max_dropped, self.seen["dropped"], self.seen["samples"], self.reasons)
        self.bad_updates = 0 if result["updated"] else self.bad_updates + 1
        if not result["updated"]:
            self.world.print(f"step {step + 1}: gradient norm {result['grad_norm']}, loss {result['loss']}, "
                             f"{labels} supervised tokens: update skipped")
        if self.bad_updates >= PATIENCE:
            names = [n for rank in self.world.gather(batch.names) for n in rank]
            stop(f"{PATIENCE} updates in a row had no finite gradient; the last one, step {step + 1}, "
                 f"used {', '.join(names[:8])} ...")

    def write(self, step, lr):
        """Write one line to log.jsonl and one to the terminal, after step `step` (counted from 0)."""
        now, done = time.time(), step + 1
        rate = 1 / max(1e-9, now - self.last)
        eta = (now - self.began) / (done - self.start) * (self.steps - done)
        memory = torch.cuda.max_memory_allocated() if self.world.device.type == "cuda" else peak_bytes()
        row = dict(step=done, lr=lr, **self.result, tokens_per_s=round(self.tokens * rate, 1),
                   samples_per_s=round(self.samples * rate, 2),
                   mfu=round(self.flops * rate / self.peak / self.world.size, 4) if self.peak else None,
                   memory=memory, data_wait_s=round(self.wait, 3), eta=round(eta, 1),
                   **{k: self.seen[k] for k in ("dropped", "truncated", "animated", "flipped", "skipped_updates")},
                   drawn=short_names(self.drawn))
        self.append(row)
        mfu = f"  mfu {row['mfu']:.1%}" if self.peak else ""
        self.world.print(f"step {done:>{len(str(self.steps))}}/{self.steps}  loss {row['loss']:.4f}  "
                         f"lr {row['lr']:.2e}  norm {row['grad_norm']:.3f}  {row['tokens_per_s']:,.0f} tokens/s  "
                         f"{row['samples_per_s']:.1f} samples/s{mfu}  {memory / 2**20:,.0f} MiB  "
                         f"waited {row['data_wait_s']:.1f} s  left {datetime.timedelta(seconds=int(eta))}")
        self.last, self.tokens, self.samples, self.flops, self.wait = now, 0, 0, 0, 0.0
        return row

    def append(self, row, file=None):
        """Append one line of json, with null for nan and inf. If the disk is full, only this line is lost."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        if file is None and self.best and self.best.metric in row:
            self.best.see(self.world.gather(row)[0])             # all ranks decide by the row of rank 0
        if self.world.rank > 0:
            return
        try:
            with open(file or self.file, "a") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            self.world.print(f"a line of {file or self.file} is lost: {e.strerror}")
        if file is None and self.send:
            self.send()

    def summary(self):
        """-> text on dropped samples, truncated samples and animated images, for the run's last line; "" if none"""
        seen = self.seen
        lost = f"; {seen['dropped']} of {seen['samples']} samples dropped, {seen['truncated']} truncated"
        moving = f"; {seen['animated']} images are animated, only the first frame was used"
        return lost * (seen["dropped"] + seen["truncated"] > 0) + moving * (seen["animated"] > 0)


def short_names(counts):
    """{path: count} -> the same with the last part of a path alone, where no other path has this last part"""
    last = Counter(Path(path).name for path in counts)
    return {Path(path).name if last[Path(path).name] == 1 else path: n for path, n in counts.items()}


def lines_until(file, step):
    """-> the log lines of steps up to `step`; [] without a file"""
    kept = []
    for line in file.read_text("utf-8", "replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):         # a killed run may have left half a line
            if json.loads(line)["step"] <= step:
                kept.append(line)
    return kept


def trim(file, step):
    """Remove the log lines of steps after `step`. The run is resumed after `step`, and logs the later steps again."""
    file = Path(file)
    if file.is_file():
        write_file(file, "".join(line + "\n" for line in lines_until(file, step)))


def peak_bytes():
    """-> peak memory of this process in bytes"""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
