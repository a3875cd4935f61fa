"""log.jsonl: what a run did, one object per line."""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import torch

from engine import say

# dense bf16 FLOP/s, by name of the card
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def versions():
    """What made a run: written into its config.json."""
    try:
        here = Path(__file__).resolve().parent.parent
        git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        revision = git.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = ""
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
            "revision": revision or None}


def append(file, row):
    """One line of json more, where nan is null. A full disk costs the line, not the run."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    try:
        with open(file, "a") as f:
            f.write(json.dumps(row) + "\n")
    except OSError as e:
        say(f"a line of {file} is lost: {e.strerror}")


class Spikes:
    """Losses that stand out: more than 6 standard deviations above the mean of up to 128 before them, of at least 32.
    A spike enters that mean too, so that a new level of the loss is soon the usual one."""

    def __init__(self, losses=()):
        self.losses = deque(losses, maxlen=128)

    def look(self, loss):
        """-> deviations above the mean if this one stands out, else None"""
        n, found = len(self.losses), None
        if n >= 32:
            mean, deviation = statistics.fmean(self.losses), statistics.stdev(self.losses)
            if loss > mean + 6 * deviation > mean:
                found = (loss - mean) / deviation
        self.losses.append(loss)
        return found


class Log:
    """log.jsonl, one object per logged step, and one readable line each. Throughput is of real tokens over all ranks,
    since the line before."""

    def __init__(self, out, world, steps, start):
        self.out, self.world, self.steps, self.start = out, world, steps, start
        self.began = self.last = time.time()
        self.tokens = self.samples = self.flops = 0
        self.wait = 0.0
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self.peak = next((v for k, v in PEAK.items() if k in name), None)

    def count(self, tokens, samples, flops, wait):
        """Every step, logged or not."""
        self.tokens, self.samples = self.tokens + tokens, self.samples + samples
        self.flops, self.wait = self.flops + flops, self.wait + wait

    def write(self, step, **numbers):
        """Step `step` (counted from 1) is done."""
        now = time.time()
        rate = 1 / max(1e-9, now - self.last)
        eta = (now - self.began) / (step - self.start) * (self.steps - step)
        memory = torch.cuda.max_memory_allocated() if self.world.device.type == "cuda" else rss()
        row = dict(step=step, **numbers, tokens_per_s=round(self.tokens * rate, 1),
                   samples_per_s=round(self.samples * rate, 2),
                   mfu=round(self.flops * rate / self.peak / self.world.size, 4) if self.peak else None,
                   memory=memory, data_wait_s=round(self.wait, 3), eta=round(eta, 1))
        if self.world.rank == 0:
            append(self.out / "log.jsonl", row)
            mfu = f"  mfu {row['mfu']:.1%}" if self.peak else ""
            say(f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                f"norm {row['grad_norm']:.3f}  {row['tokens_per_s']:,.0f} tokens/s  "
                f"{row['samples_per_s']:.1f} samples/s{mfu}  {memory / 2**20:,.0f} MiB  "
                f"waited {row['data_wait_s']:.1f} s  left {clock(eta)}")
        self.last, self.tokens, self.samples, self.flops, self.wait = now, 0, 0, 0, 0.0
        return row


def rss():
    """Bytes of memory this process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def clock(seconds):
    s = int(seconds)
    return f"{s // 3600}:{s // 60 % 60:02}:{s % 60:02}" if s >= 3600 else f"{s // 60}:{s % 60:02}"
