"""The parts of training that do not depend on images or text: start, choose, adamw, parallelize, sync_gradients,
update, leave.

The loop in each training script computes the gradient of a step. A loss is a sum over supervised tokens. n is their
number (or the sum of their weights) in all micro-batches of all ranks, counted before the first backward pass:

    gradient = sum over ranks, micro-batches, tokens of d loss / n          (not a mean of means)
"""

import contextlib
import dataclasses
import datetime
import fnmatch
import functools
import gc
import json
import math
import os
import re
import sys

import torch
import torch.distributed as dist

from config import one_line_errors, stop
from run.arguments import parse

TIMEOUT = datetime.timedelta(minutes=30)   # how long a rank waits for the others; long, as a disk may be slow
PARAMETERS_PER_THREAD = 10_000_000         # on a CPU, set_threads uses one thread per 10 million parameters


# ---- processes ------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class World:
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype             # dtype of the computation; trained weights are in fp32 (fp64 if this is fp64)

    def sum(self, numbers):
        """Return the element-wise sum over ranks of the list `numbers`, which has the same length on each rank."""
        t = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            t = t.to(self.device)
            dist.all_reduce(t)
        return t.tolist()

    def gather(self, thing):
        """Return the list of the `thing` of each rank. They are sent as json, because pickle could run code."""
        if self.size == 1:
            return [thing]
        text = torch.tensor(list(json.dumps(thing).encode()), dtype=torch.uint8, device=self.device)
        sizes = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(text)], device=self.device))
        parts = [torch.zeros(int(max(sizes)), dtype=torch.uint8, device=self.device) for _ in sizes]
        dist.all_gather(parts, torch.nn.functional.pad(text, (0, int(max(sizes)) - len(text))))
        return [json.loads(bytes(p[: int(n)].tolist())) for p, n in zip(parts, sizes)]

    def autocast(self):
        low = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype) if low else contextlib.nullcontext()

    def print(self, *lines, **how):
        """Print on rank 0 only. If printing fails (closed terminal, full disk), training goes on without output."""
        if self.rank == 0:
            try:
                print(*lines, flush=True, **how)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # else Python repeats the error at exit


def start(device="auto", dtype="auto", seed=0):
    """Choose device and dtype, and connect to the other processes if torchrun started any -> World"""
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        stop(f"device={device}: auto, cpu, cuda or cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        stop(f"device={device}, but this machine has no GPU that torch can use")
    dev = torch.device("cuda", local) if device == "cuda" else torch.device(device)
    if dev.type == "cuda" and dev.index >= torch.cuda.device_count():
        stop(f"device={dev}, but this machine has {torch.cuda.device_count()} GPU(s)")
    if dev.type == "cuda":
        torch.cuda.set_device(dev)
        torch.backends.cuda.matmul.allow_tf32 = True
    if dtype == "auto":
        dtype = "bf16" if dev.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if dtype not in (dtypes := {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}):
        stop(f"dtype={dtype}: auto, {', '.join(dtypes)}")
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if dev.type == "cuda" else "gloo", timeout=TIMEOUT)
    torch.manual_seed(seed + rank)         # each rank has its own random numbers, for dropout
    return World(rank, size, dev, dtypes[dtype])


def set_threads(model, world):
    """On a CPU, use more threads for a larger model. Threads wait for each other: a toy model on two threads took 12
    times longer when the machine was busy. If OMP_NUM_THREADS is set, its value is used."""
    if world.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        worth = sum(p.numel() for p in model.parameters()) // PARAMETERS_PER_THREAD
        torch.set_num_threads(max(1, min(worth, torch.get_num_threads())))


def leave(code=0):
    """Exit. The wrapped model is freed before the process group, else gloo (the CPU backend) prints an error."""
    World(0, 1, None, None).print(end="")  # flushes stdout here, where an error does not end in a traceback
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(code)


def run_script(main, Settings, doc):
    """Run main(settings) with settings from the command line, then exit. A config.Error is printed as one line."""
    with one_line_errors():
        leave(main(parse(Settings, sys.argv[1:], doc)))


# ---- what trains ----------------------------------------------------------------------------------------------------

def choose(model, table, dtype=torch.bfloat16, device=None):
    """Choose the trained parameters -> {name: learning rate} of them. table: {glob over names: learning rate}; the last
    glob that fits decides. A parameter that fits none is frozen. Frozen weights get `dtype`, trained weights at least
    fp32. Weights move one at a time from the files that load_model memory-maps to the device. So no rank holds a copy
    of all weights in CPU memory."""
    lrs, used = {}, set()
    for name, p in model.named_parameters():
        fits = [g for g in table if fnmatch.fnmatchcase(name, g)]
        used.update(fits)
        lr = table[fits[-1]] if fits else 0
        p.requires_grad_(bool(lr))
        # always copy: p.data may be a memory-mapped file, which must not be trained in place
        p.data = p.data.to(device or p.device, torch.promote_types(torch.float32, dtype) if lr else dtype, copy=True)
        if lr:
            lrs[name] = lr
    if unused := [g for g in table if g not in used]:
        stop(f"no parameter is called {unused[0]!r}; the model has, for example, {next(iter(model.state_dict()))}")
    if not lrs:
        stop(f"nothing would be trained: the learning rate of {', '.join(table) or 'everything'} is 0")
    if device:
        model.to(device)                   # moves the buffers
    model.train()                          # VLM.train() leaves a frozen part in eval mode
    return lrs


def adamw(model, lrs, weight_decay, eps=1e-8):
    """AdamW over the trained parameters, one group per (lr, weight decay). Weight decay applies to matrices, but not to
    embeddings, norms, biases and other vectors. Each group stores the names of its parameters."""
    groups = {}
    for name, p in unwrap(model).named_parameters():
        if p.requires_grad:
            decays = p.ndim >= 2 and "embed" not in name
            groups.setdefault((lrs[name], weight_decay if decays else 0.0), []).append((name, p))
    return torch.optim.AdamW(
        [{"params": [p for _, p in g], "names": [n for n, _ in g], "lr": lr, "peak": lr, "weight_decay": wd}
         for (lr, wd), g in groups.items()], betas=(0.9, 0.999), eps=eps, fused=True)


def lr_at(step, steps, warmup, lr):
    """Return the learning rate of update `step` (0 .. steps - 1). It rises linearly for `warmup` updates to `lr`, then
    falls as half a cosine, which would reach 0 at update `steps`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    return lr * 0.5 * (1 + math.cos(math.pi * t))


def set_lr(optimizer, step, steps, warmup):
    """Set the learning rates of update `step`; warmup is a share of `steps`. -> the learning rate of the first group"""
    for g in optimizer.param_groups:
        g["lr"] = lr_at(step, steps, math.ceil(warmup * steps), g["peak"])
    return optimizer.param_groups[0]["lr"]


# ---- applied from outside -------------------------------------------------------------------------------------------

def is_sharded(model, world, parallel):
    """Return True if FSDP shards the model. parallel="auto": on several GPUs, if more than half of the weights train"""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    most = 2 * sum(n for n, trains in sizes if trains) > sum(n for n, _ in sizes)
    return world.size > 1 and (parallel == "fsdp" or (parallel == "auto" and most and world.device.type == "cuda"))


def parallelize(model, world, blocks, parallel="auto", recompute="none", compile=False):
    """Apply torch.compile and gradient checkpointing (recompute=block) to each block, then FSDP or DDP to the model.

    parallel=ddp replicates the model. This is better for stage 1 and LoRA, where FSDP would gather the frozen weights
    in every step. parallel=fsdp shards all parameters (FSDP2). -> the wrapped model"""
    sharded = is_sharded(model, world, parallel)
    if compile:
        for b in blocks:  # compile before checkpointing: torch.compile silently ignores a checkpointed block
            b.forward = torch.compile(b.forward)
    if recompute == "block":
        from torch.utils.checkpoint import checkpoint
        for b in blocks:  # with use_reentrant=True, adapters get no gradient if the input of the block needs none
            b.forward = functools.partial(checkpoint, b.forward, use_reentrant=False)
    if world.size == 1:
        return model
    sums = [t.sum(dtype=torch.float64).item() for t in (*model.parameters(), *model.buffers())]
    if len(set(world.gather(str(sums)))) > 1:
        stop("the ranks start from different weights: do all machines see the same files?")
    if sharded:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        low = world.dtype in (torch.bfloat16, torch.float16)
        # sum gradients in fp32, and cast no input: a rotary angle or the weight of a token must not be rounded
        policy = MixedPrecisionPolicy(*((world.dtype, torch.float32) if low else ()), cast_forward_inputs=False)
        for b in [*blocks, model]:
            fully_shard(b, mp_policy=policy)
        return model
    from torch.nn.parallel import DistributedDataParallel
    ids = [world.device.index] if world.device.type == "cuda" else None
    model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    model.broadcast_buffers = False                        # buffers hold 4-bit weights, which never change
    return model


def unwrap(model):
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def whole_tensor(t):
    """Return the whole tensor on every rank; t is a tensor, whole or sharded by FSDP."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def sync_gradients(model, enabled):
    """Context for forward and backward. DDP sums the gradients over the ranks only if `enabled`, in the last
    micro-batch. FSDP sums them in every micro-batch: to wait, each rank would hold the gradients of all weights."""
    return contextlib.nullcontext() if enabled or not hasattr(model, "no_sync") else model.no_sync()


# ---- the end of an optimizer step -----------------------------------------------------------------------------------

def check_gradients(model):
    """After the first backward pass, check that trained parameters have a gradient and frozen parameters have none."""
    for name, p in unwrap(model).named_parameters():
        if p.requires_grad != (p.grad is not None):
            stop(f"{name} is {'trained but got no' if p.requires_grad else 'frozen but got a'} gradient")


def update(model, optimizer, loss, n, world, grad_clip=0.0):
    """Clip the gradients, update the weights, clear the gradients. loss: sum over the supervised tokens of this rank;
    n: supervised tokens on all ranks. If loss or gradient norm is not finite, or n is 0, all ranks skip the update.
    -> dict: "loss" (mean over the n tokens), "grad_norm" (before clipping), "updated" (False if skipped)"""
    norm = whole_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)).item()
    mean = world.sum([float(loss)])[0] / n if n else math.nan
    updated = math.isfinite(norm) and math.isfinite(mean)
    if updated:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return dict(loss=mean, grad_norm=norm, updated=updated)
