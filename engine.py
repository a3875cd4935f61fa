"""The verbs of training: start, choose, adamw, parallelize, train_step, Log, finish. They know nothing of pictures or
conversations.

The arithmetic of one step, which is the heart of it. A loss is a sum over supervised tokens; n is their count over all
micro-batches of all ranks, known before the first backward pass:

    gradient = sum over ranks, micro-batches, tokens of d loss / n          (never a mean of means)

DDP and FSDP average over ranks, so each rank's loss is multiplied by their number once, to undo it.
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
import signal
import sys

import torch
import torch.distributed as dist

from config import stop

# a rank waits for a collective, which a slow disk may hold up for long; and for the others between two steps, for less:
# so that where one hangs in the middle of a step, those who wait for it say who it is before time is up for all
TIMEOUT, MEET = datetime.timedelta(minutes=30), datetime.timedelta(minutes=20)


# ---- processes -------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class World:
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype             # of the computation; what is trained is stored in fp32 (or fp64)
    side: object = None            # a gloo group beside NCCL's, for meet(); None = the default group is gloo

    def sum(self, numbers):
        """Element-wise sum over ranks of a list of numbers -> list of floats."""
        t = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            t = t.to(self.device)
            dist.all_reduce(t)
        return t.tolist()

    def gather(self, thing):
        """A small object of every rank -> list, on every rank. It travels as json, for pickles are not read here."""
        if self.size == 1:
            return [thing]
        text = torch.tensor(list(json.dumps(thing).encode()), dtype=torch.uint8, device=self.device)
        sizes = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(text)], device=self.device))
        parts = [torch.zeros(int(max(sizes)), dtype=torch.uint8, device=self.device) for _ in sizes]
        dist.all_gather(parts, torch.nn.functional.pad(text, (0, int(max(sizes)) - len(text))))
        return [json.loads(bytes(p[: int(n)].tolist())) for p, n in zip(parts, sizes)]

    def meet(self, where):
        """Wait for every rank. One that hangs is named, which no collective does: those only say that time is up."""
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(self.side, timeout=MEET, wait_all_ranks=True)
        except RuntimeError as e:                              # rank 0 alone knows who is missing
            missing = re.search(r"Ranks? ([\d, ]+) failed to pass", str(e))
            who = f"rank(s) {missing[1].strip(' ,')} of {self.size}" if missing else "another rank"
            stop(f"{where}: {who} did not come within {MEET.total_seconds():.0f} s; it hangs in reading its data or in "
                 "the step before")

    def autocast(self):
        low = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype) if low else contextlib.nullcontext()

    def print(self, *words, **how):
        if self.rank == 0:
            say(*words, **how)


def say(*words, **how):
    """Print. Where nobody listens any more (a closed terminal, a full disk behind it), training goes on in silence."""
    try:
        print(*words, flush=True, **how)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())       # or Python complains once more at the end


def start(device="auto", dtype="auto", seed=0):
    """Join the other processes that torchrun started, if any."""
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
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
    if dtype not in kinds:
        stop(f"dtype={dtype}: auto, {', '.join(kinds)}")
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if dev.type == "cuda" else "gloo", timeout=TIMEOUT)
    side = dist.new_group(backend="gloo", timeout=TIMEOUT) if size > 1 and dev.type == "cuda" else None
    torch.manual_seed(seed + rank)         # what is random while training (dropout) differs between ranks
    return World(rank, size, dev, kinds[dtype], side)


def listen():
    """From now on SIGTERM and SIGUSR1, by which schedulers ask for the machine, do not end this process -> the list
    they are written into. Ctrl-C stays what it is."""
    got = []
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, lambda number, frame: got.append(number))
    return got


def finish(code=0):
    """Leave in an order that lets gloo end quietly: main has returned, so its wrappers are garbage; then the group."""
    say(end="")
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return code


# ---- who trains ------------------------------------------------------------------------------------------------------

def choose(model, table, dtype=torch.bfloat16):
    """table: name glob -> learning rate; the last glob that fits a parameter decides, and what none fits is frozen.
    Frozen weights are kept in the dtype of the computation, trained ones in fp32 at least. -> {name: lr} of these"""
    lrs, used = {}, set()
    for name, p in model.named_parameters():
        fits = [g for g in table if fnmatch.fnmatchcase(name, g)]
        used.update(fits)
        lr = table[fits[-1]] if fits else 0
        p.requires_grad_(bool(lr))
        # a copy even where the dtype stays, for what was loaded may be a view of its file
        p.data = p.data.to(torch.promote_types(torch.float32, dtype) if lr else dtype, copy=True)
        if lr:
            lrs[name] = lr
    if unused := [g for g in table if g not in used]:
        stop(f"no parameter is called {unused[0]!r}; the model has, for example, {next(iter(model.state_dict()))}")
    if not lrs:
        stop(f"nothing would be trained: the learning rate of {', '.join(table) or 'everything'} is 0")
    model.train()                          # the model itself leaves in eval mode what is frozen as a whole
    return lrs


def adamw(model, lrs, weight_decay, betas=(0.9, 0.999), eps=1e-8):
    """AdamW over the trained parameters, one group per (lr, decay). Only matrices decay: no norm, bias, embedding,
    position table or learnt vector. Each group knows the names of its parameters."""
    groups = {}
    for name, p in unwrap(model).named_parameters():
        if p.requires_grad:
            decays = p.ndim >= 2 and "embed" not in name
            groups.setdefault((lrs[name], weight_decay if decays else 0.0), []).append((name, p))
    return torch.optim.AdamW(
        [{"params": [p for _, p in g], "names": [n for n, _ in g], "lr": lr, "peak": lr, "weight_decay": wd}
         for (lr, wd), g in groups.items()], betas=betas, eps=eps, fused=True)


def lr_at(step, steps, warmup, lr, floor=0.0):
    """Learning rate of update `step` (0 .. steps - 1): a linear rise over `warmup` updates, then half a cosine down
    towards floor * lr, which the update after the last one would have."""
    if step < warmup:
        return lr * (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t)))


def set_lr(optimizer, step, steps, warmup):
    """-> the learning rate of the first group"""
    for g in optimizer.param_groups:
        g["lr"] = lr_at(step, steps, warmup, g["peak"])
    return optimizer.param_groups[0]["lr"]


# ---- applied from outside --------------------------------------------------------------------------------------------

def shards(model, world, parallel):
    """Will parameters be sharded? auto: where more than half of them train on several GPUs."""
    if parallel not in ("auto", "ddp", "fsdp"):
        stop(f"parallel={parallel}: one of auto, ddp, fsdp")
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    most = 2 * sum(n for n, trains in sizes if trains) > sum(n for n, _ in sizes)
    return world.size > 1 and (parallel == "fsdp" or (parallel == "auto" and most and world.device.type == "cuda"))


def parallelize(model, world, blocks, parallel="auto", recompute="none", compile=False):
    """Recompute, compile and shard `blocks` (the modules worth doing so one by one), then wrap the model for `world`.

    ddp replicates: right for stage 1 and LoRA, where gathering a frozen model in every step would move bytes for
    nothing. fsdp shards everything (FSDP2)."""
    sharded = shards(model, world, parallel)
    if recompute not in ("none", "block"):
        stop(f"recompute={recompute}: one of none, block")
    if compile:
        for b in blocks:                                   # first of all: around a recomputed block, compilation would
            b.forward = torch.compile(b.forward)           # give up without a word
    if recompute == "block":
        from torch.utils.checkpoint import checkpoint
        for b in blocks:                                   # the reentrant form gives adapters behind frozen
            b.forward = functools.partial(checkpoint, b.forward, use_reentrant=False)     # embeddings no gradient
    if world.size == 1:
        return model
    sums = [t.sum(dtype=torch.float64).item() for t in (*model.parameters(), *model.buffers())]
    if len(set(world.gather(str(sums)))) > 1:
        stop("the ranks start from different weights: do all machines see the same files?")
    if sharded:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        low = world.dtype in (torch.bfloat16, torch.float16)
        policy = MixedPrecisionPolicy(*((world.dtype, torch.float32) if low else ()))
        for b in [*blocks, model]:
            fully_shard(b, mp_policy=policy)
        return model
    from torch.nn.parallel import DistributedDataParallel
    ids = [world.device.index] if world.device.type == "cuda" else None
    model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    model.broadcast_buffers = False                        # weights in four bits, which nobody changes
    return model


def unwrap(model):
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def full(t):
    """A tensor or a sharded one -> the whole tensor, on every rank."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


@contextlib.contextmanager
def reduced(model, now):
    """Gradients travel between ranks only where `now` is true: once per optimizer step, in its last micro-batch."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if now else model.no_sync():
            yield
    else:
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(now)
        yield


# ---- one optimizer step ----------------------------------------------------------------------------------------------

def train_step(model, optimizer, micro, loss_fn, world, grad_clip=0.0, check=False):
    """micro: the batches of this rank, as many on every rank; loss_fn(model, batch) -> summed loss. Updates the
    weights, unless the gradient norm is not finite or there was nothing to learn, which all ranks find alike. -> dict:
    loss (mean per supervised token over all ranks), grad_norm (before clipping), tokens, supervised_tokens, updated"""
    tokens, supervised = world.sum([sum(len(b.ids) for b in micro), sum(int((b.labels >= 0).sum()) for b in micro)])
    n = max(1.0, supervised)
    total = 0.0
    for i, batch in enumerate(micro):
        with reduced(model, i == len(micro) - 1):
            with world.autocast():
                loss = loss_fn(model, batch.to(world.device))
            (loss * (world.size / n)).backward()
        total += loss.detach()
    if check and micro:
        check_gradients(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = full(torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)).item()
    loss = world.sum([float(total)])[0] / n
    ok = math.isfinite(norm) and math.isfinite(loss) and supervised > 0  # the same numbers on every rank
    if ok:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return dict(loss=loss, grad_norm=norm, tokens=int(tokens), supervised_tokens=int(supervised), updated=ok)


def check_gradients(model):
    """After the first backward pass: every trained parameter has a gradient, and no other does."""
    for name, p in unwrap(model).named_parameters():
        if p.requires_grad != (p.grad is not None):
            stop(f"{name} is {'trained but got no' if p.requires_grad else 'frozen but got a'} gradient")


# ---- seeing ----------------------------------------------------------------------------------------------------------


