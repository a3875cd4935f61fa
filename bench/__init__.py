"""Functions that both benchmarks use: lengths of conversations, timing, ceilings (how fast this device is at most),
child processes, reports."""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import config

ROOT = Path(__file__).resolve().parent.parent
HEAD_START = 2_000_000                              # cycles, about 1 ms: the GPU sleeps while the CPU queues a call
LOW = {"cuda": torch.bfloat16, "cpu": torch.float32}   # dtype of the measurements

# A simulation of LLaVA's 665k conversations. Each part of the mixture has five numbers: thousands of conversations,
# mean number of text tokens, standard deviation of this number divided by the mean, supervised share, images. Only the
# first number is published. We assume the others.
MIX = [(58, 290, .35, .62, 1), (23, 160, .30, .68, 1), (77, 215, .30, .75, 1),    # conversation, detail, reasoning
       (40, 1150, .55, .65, 0), (83, 150, .25, .14, 1), (72, 285, .60, .15, 1),   # ShareGPT, VQAv2, GQA
       (9, 75, .10, .05, 1), (80, 160, .20, .25, 1), (66, 105, .15, .02, 1),      # OKVQA, OCR-VQA, A-OKVQA
       (22, 110, .35, .16, 1), (48, 450, .50, .40, 1), (86, 450, .35, .40, 1)]    # TextCaps, RefCOCO, Visual Genome


def draw_lengths(n, g):
    """Draw n conversations of the mixture MIX. Return a list of (text tokens, share supervised, images). g is a
    torch.Generator."""
    which = torch.multinomial(torch.tensor([float(k) for k, *_ in MIX]), n, True, generator=g).tolist()
    out = []
    for (_, mean, cv, share, images), z in zip((MIX[i] for i in which), torch.randn(n, generator=g).tolist()):
        sigma = math.sqrt(math.log(1 + cv * cv))
        tokens = mean * math.exp(sigma * z - sigma * sigma / 2)
        out.append((int(min(max(tokens, 8), 2048 if not images else 1472)), share, images))
    return out


# ---- settings ------------------------------------------------------------------------------------------------------

def pick_device(device):
    """Return "cuda" or "cpu". `device` is one of them, or "auto": "cuda" if torch finds a GPU."""
    if device not in ("auto", "cuda", "cpu"):
        config.stop(f"device={device}: auto, cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        config.stop("device=cuda, but torch finds no GPU on this machine")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def pick_rows(names, usual, known):
    """Return a list of names of rows. "all" gives the names in `usual`. "A3,C1" gives ["A3", "C1"]; each name must be
    in `known`, else the program stops."""
    names = [*usual] if names == "all" else names.split(",")
    if unknown := [n for n in names if n not in known]:
        config.stop(f"rows={unknown[0]}: all, or some of {','.join(known)}")
    return names


# ---- measuring -----------------------------------------------------------------------------------------------------

def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(f, device, ms):
    """Return the median milliseconds of a call of f(). The number of calls is chosen so that all calls together take
    about `ms` milliseconds. On a GPU, two events time a call. Before each call, 1 GiB is overwritten, which removes the
    inputs of f from the L2 cache, and the GPU sleeps, so that the CPU has queued the call before its time begins."""
    f()
    sync(device)
    began = time.perf_counter()
    f()
    sync(device)
    n = max(3, min(200, int(ms / 1e3 / (time.perf_counter() - began))))
    if device == "cpu":
        times = []
        for _ in range(n):
            began = time.perf_counter()
            f()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times)
    flush = torch.empty(1 << 30, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    for start, end in events:
        flush.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        f()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def ceilings(device, ms=200):
    """Measure how fast this device is at most. Return a dict: "matmul" is the FLOP/s of a large matrix product, "copy"
    is the bytes per second (read + written) of a large copy. The inputs are random, because a product of zeros ran 13 %
    faster."""
    n, size = (8192, 1 << 30) if device == "cuda" else (512, 1 << 24)
    a, b = (torch.randn(n, n, device=device).to(LOW[device]) for _ in range(2))
    x = torch.randn(size // 4, device=device)
    y = torch.empty_like(x)
    return {"matmul": 2e3 * n**3 / timed(lambda: a @ b, device, ms),
            "copy": 2e3 * size / timed(lambda: y.copy_(x), device, ms)}


def child(command, args, seconds):
    """Run `python -m bench command args` in a child process, because it may run out of memory, hang or lose the GPU.
    The child process is killed after `seconds`. Yield each JSON object that it prints. At the end, yield {"ended": exit
    code, "because": time limit or last errors}."""
    with tempfile.TemporaryFile("w+") as errors:
        p = subprocess.Popen([sys.executable, "-m", "bench", command, *args], stdout=subprocess.PIPE, stderr=errors,
                             text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        killer = threading.Timer(max(1, seconds), p.kill)
        killer.start()
        try:
            for line in p.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
            code = p.wait()
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.strip()]
            because = f"stopped after {seconds:.0f} s" if code == -9 else " | ".join(lines[-2:])[-300:]
            yield {"ended": code, "because": because}
        finally:
            killer.cancel()
            p.kill()


# ---- reporting -----------------------------------------------------------------------------------------------------

def describe_machine(device):
    """Return one line with the hardware, the versions of the software, and the git revision of this code."""
    def output(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""
    have = {d.name: d.version for d in importlib.metadata.distributions()}
    packages = "torch", "triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy"
    revision = os.environ.get("REVISION") or output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    software = [f"Python {platform.python_version()}", *(f"{p} {have.get(p, 'missing')}" for p in packages),
                str(LOW[device]).removeprefix("torch."), f"revision {revision or 'unknown'}"]
    if device == "cuda":
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit"
        hardware = output("nvidia-smi", query, "--format=csv,noheader", "--id=0") or torch.cuda.get_device_name()
    else:
        cpu = output("sed", "-n", "s/^model name.*: //p;T;q", "/proc/cpuinfo") or platform.machine()
        hardware = f"{cpu}, {os.cpu_count()} cores, one thread used, load {os.getloadavg()[0]:.1f}"
    return f"{hardware}; {', '.join(software)}"


def print_json(x):
    print(json.dumps(x), flush=True)


def open_page(out):
    """Return a function say(text), which prints the text. If `out` names a file, open_page empties this file, and say
    also appends the text to it."""
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text("")

    def say(text):
        print(text, flush=True)
        if out:
            with open(out, "a", encoding="utf-8") as f:
                f.write(f"{text}\n")
    return say
