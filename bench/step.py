"""Compare whole training steps with those of transformers' LLaVA. Both sides have the same weights, the same
conversations of different lengths, and the same trained parameters. A row is one such comparison (bench/systems.py).

`ours` packs the conversations and runs the loop of the training scripts. The others are called peers:
    theirs           transformers on padded batches with a mask, in a loop with sdpa and fused AdamW. The pixels are
                     normalised before timing starts.
    theirs+liger     adds Liger's kernels
    theirs+ckpt      recomputes the layers in backward (gradient checkpointing)
    theirs+sorted    puts conversations of similar length in one batch, so there is less padding
On both sides the vision tower is frozen and runs without an autograd graph.

Every measurement has its own process. Processes of ours and theirs alternate. Each ratio is of two processes that ran
one after the other. On a CPU the time is CPU time (user + system) of one thread, which depends little on the load of
the machine. On a GPU it is the time between two CUDA events, before and after the step.
"""

import contextlib
import dataclasses
import re
import statistics
import time
from pathlib import Path

import torch

import bench
import config
from bench.systems import NAMES, conversations, fill, pad, system, work
from config import setting

LR, CLIP = 1e-3, 1.0
AGREE = {"cuda": 1e-2, "cpu": 1e-4}         # largest allowed difference between our first loss and that of a peer
MEMORY = 0.6                                # goal: our peak memory is at most this share of the memory of a peer
CLOCK = {"cuda": "Time between events", "cpu": "CPU time"}


# ---- the two sides --------------------------------------------------------------------------------------------------
# ours() and theirs() return two functions and the optimizer.
# - prepare(samples, part) makes micro-batches of `part` (0 to 1) times the usual size. It is not timed.
# - step(micro-batches) does one update and returns the mean loss before it.

def ours(s, device):
    import data
    import engine
    import lora
    from kernels.linear import add_into_grad
    from loss import supervised, token_loss
    from model import VLM
    from run.plan import adds_into_grad
    world = engine.start(device, "bf16" if device == "cuda" else "fp32")
    with torch.device(device):
        model = VLM(s.cfg)
    fill(s.cfg, model, device)
    table = {"multi_modal_projector.*": LR}
    if s.stage == "lora":
        lora.add_adapters(model, s.r, 2 * s.r, 0.0, "all-linear")
    if s.stage != "align":
        table["*.lora_*" if s.stage == "lora" else "language_model.*"] = LR
    lrs = engine.choose(model, table, world.dtype)
    if adds_into_grad(world, compiled=False):                     # as run/stage.py
        add_into_grad(model)
    optimizer = engine.adamw(model.to(device), lrs, 0.0)
    engine.set_lr(optimizer, 0, 1, 0)

    def prepare(made, part=1.0):
        streams = data.best_fit(range(len(made)), [len(ids) for ids, _, _ in made], int(part * s.room))
        return [data.pack([made[i] for i in stream], s.cfg.vision.image_size) for stream in streams]

    def step(micro):
        n, total = sum(supervised(b.labels) for b in micro), 0.0
        for b in micro:
            with world.autocast():
                loss = token_loss(model, b.to(world.device))
            (loss / n).backward()
            total += loss.detach()
        return engine.update(model, optimizer, total, n, world, CLIP)["loss"]
    return prepare, step, optimizer


def theirs(s, device, *how):
    from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration,
                              SiglipVisionConfig)

    if "liger" in how:
        from liger_kernel.transformers import apply_liger_kernel_to_llava
    if s.stage == "lora":
        from peft import LoraConfig, inject_adapter_in_model

    def given(part, *ours_alone):
        return {k: v for k, v in dataclasses.asdict(part).items() if k not in ("model_type", *ours_alone)}
    clip, dtype = s.cfg.vision.class_token, torch.bfloat16 if device == "cuda" else torch.float32
    vision = (CLIPVisionConfig if clip else SiglipVisionConfig)(
        **given(s.cfg.vision, "feature_layer", "num_register_tokens", "image_mean", "image_std"))
    text = LlamaConfig(**given(s.cfg.text, "rope_scaling"), use_cache=False)
    whole = LlavaConfig(vision_config=vision, text_config=text, image_token_index=s.cfg.image_token_index,
                        vision_feature_layer=s.cfg.vision.feature_layer, image_seq_length=s.cfg.vision.patches,
                        vision_feature_select_strategy="default" if clip else "full",
                        tie_word_embeddings=s.cfg.text.tie_word_embeddings)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(whole, attn_implementation="sdpa")

    def names(k):
        k = "lm_head.weight" if "lm_head" in k else "model." + k.replace("language_model.model.", "language_model.")
        # transformers 5.20 has the first name; older versions have the second
        return k.replace("vision_tower.vision_model.", "vision_tower."), k
    # transformers runs the last block of the tower, but its output is unused. Our tower does not have this block
    last = f"encoder.layers.{s.cfg.vision.num_hidden_layers - 1}."
    besides = fill(s.cfg, model, device, names)
    assert all(re.search(re.escape(last) + r"|post_layernorm|vision_tower.*\.head\.", k) for k in besides), besides

    if "liger" in how:
        apply_liger_kernel_to_llava(model=model, rope=True, rms_norm=True, swiglu=True)
    if s.stage == "lora":
        linears = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
        model = inject_adapter_in_model(LoraConfig(r=s.r, lora_alpha=2 * s.r, lora_dropout=0.0, target_modules=linears),
                                        model)
    trains = {"align": r"multi_modal_projector", "lora": r"multi_modal_projector|\.lora_",
              "sft": r"multi_modal_projector|language_model|lm_head"}[s.stage]
    for k, p in model.to(device).named_parameters():
        p.requires_grad_(bool(re.search(trains, k)))
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
    if "ckpt" in how:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    tower = model.model.vision_tower.eval()
    tower.forward = torch.no_grad()(tower.forward)
    # trained embeddings are in fp32 and would make all hidden states fp32, so cast their output
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.to(dtype))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    def prepare(made, part=1.0):
        if "sorted" in how:
            made = sorted(made, key=lambda sample: len(sample[0]))
        n = max(1, int(part * min(s.micro, len(made))))
        return [pad(s.cfg, made[i : i + n]) for i in range(0, len(made), n)]

    def step(micro):
        # the model shifts the labels and drops the first one, but the first label is always -100
        n = sum(int((batch["labels"] >= 0).sum()) for batch in micro)
        total = 0.0
        for batch in micro:
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            with torch.autocast(device, dtype) if dtype == torch.bfloat16 else contextlib.nullcontext():
                loss = model(**batch, num_items_in_batch=n, return_dict=True).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()
    return prepare, step, optimizer


# ---- measuring -----------------------------------------------------------------------------------------------------

def memory(key):
    """Return the memory of this process in bytes: key "VmRSS" = now, key "VmHWM" = peak. Python's resource.getrusage is
    not used, because it also counts the peak of the parent process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024


def clocked(f, device):
    """Call f -> its result, and the seconds it took. On a CPU, this is CPU time; on a GPU, time between two events."""
    if device == "cpu":
        began = time.process_time()
        return f(), time.process_time() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(bench.HEAD_START)
    start.record()
    result = f()
    end.record()
    torch.cuda.synchronize()
    return result, start.elapsed_time(end) / 1e3


def measure(name, side, steps, size="full", device="cpu"):
    """Run "ours" or one peer in this process. Return a dict:

    "losses"      the loss of each step
    "seconds"     the time of the median step
    "peak"        the peak memory in bytes
    "imported"    on a CPU: the memory in bytes after the imports
    "part"        1, or less if memory ran out: the size of a micro-batch, relative to the usual size"""
    if device == "cpu":
        torch.set_num_threads(1)
    if side == "ours":
        import data  # noqa: E401,F401
        import engine
        import loss
    else:
        from transformers import LlavaForConditionalGeneration  # noqa: F401
    imported = memory("VmRSS") if device == "cpu" else 0
    s, (side, *how) = system(name, size), side.split("+")
    prepare, step, optimizer = ours(s, device) if side == "ours" else theirs(s, device, *how)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()                  # creating the model in fp32 is not counted
    warm, losses, seconds, part = 1 if device == "cpu" else 2, [], [], 1.0
    while len(seconds) < warm + steps:
        batch = prepare(conversations(s, len(seconds)), part)
        try:
            loss, took = clocked(lambda: step(batch), device)
        except torch.OutOfMemoryError:
            if part <= 1 / 16:
                raise
            took = None
        if took is None:                                      # out of memory: start again with smaller micro-batches
            part, seconds, losses = part / 2, [], losses[:1]  # keep the first loss: it is of the initial weights
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            continue
        losses.append(loss)
        seconds.append(took)
    peak = memory("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
    return {"losses": losses, "seconds": statistics.median(seconds[warm:]), "peak": peak, "imported": imported,
            "part": part}


def compare(name, pairs, steps, size, device, ceilings, peer):
    """Return one row of the result: "ours" compared with one peer. `pairs` holds results of measure(): (that of ours,
    that of the peer) of each repetition, or (that of ours,) if no peer ran."""
    s = system(name, size)
    batches = [conversations(s, n) for n in range(1, steps + 1)]
    real = sum(len(ids) for made in batches for ids, _, _ in made)
    padded = sum(len(made) * max(len(ids) for ids, _, _ in made) for made in batches)
    supervised = sum(i >= 0 for made in batches for _, labels, _ in made for i in labels)
    mid = statistics.median
    sides = [*zip(*pairs)]
    seconds = [mid(p["seconds"] for p in side) for side in sides]
    products, forward, backward = (sum(w) / steps for w in zip(*(work(s, made) for made in batches)))
    row = {"row": name, "peer": peer, "tokens": round(real / steps), "padding": padded / real,
           "supervised": supervised / real, "ms": [1e3 * t for t in seconds],
           "samples_per_s": [s.samples / t for t in seconds],
           "mib": [mid(p["peak"] for p in side) / 2**20 for side in sides], "part": [side[0]["part"] for side in sides]}
    if ceilings:
        # the best published speeds are 790 TFLOP/s (matrix product), 600 (attention forward), 500 (attention backward)
        rate = ceilings["matmul"]
        floor = products / rate + forward / (rate * 600 / 790) + backward / (rate * 500 / 790)
        flops = products + forward + backward
        row |= {"flops": flops, "mfu": flops / seconds[0] / peak_flops(), "of_floor": floor / seconds[0]}
    if not peer:
        return row
    speed = sorted(b["seconds"] / a["seconds"] for a, b in pairs)
    share = mid(a["peak"] / b["peak"] for a, b in pairs)
    apart = [max(abs(a["losses"][n] - b["losses"][n]) for a, b in pairs) for n in (0, -1)]
    goal, agree = s.goals.get(peer), apart[0] <= AGREE[device]
    return row | {"speed": mid(speed), "speed_range": [speed[0], speed[-1]], "goal": goal, "memory": share,
                  "memory_goal": MEMORY, "apart": apart, "agree": agree,
                  "memory_net": mid((a["peak"] - a["imported"]) / (b["peak"] - b["imported"]) for a, b in pairs),
                  "reached": agree and mid(speed) >= (goal or 0) and (device != "cpu" or share <= MEMORY)}


def peak_flops():
    import engine
    from run import log
    name = torch.cuda.get_device_name()
    return next((f for card, f in log.PEAK.items() if card in name), float("nan"))


def sentence(r):
    """Return a row of compare() as one line of text."""
    ms, mib = (" / ".join(f"{x:.0f}" for x in r[key]) for key in ("ms", "mib"))
    text = f"{r['row']}: {r['samples_per_s'][0]:.1f} samples/s; no peer ran"
    if r["peer"]:
        halved = f" (micro-batch x {r['part'][1]:g})" if r["part"][1] < 1 else ""
        goal = f"; goal {r['goal']}" if r["goal"] else ""
        text = "{}: **{:.2f}** times as fast as {}{} ({:.2f} to {:.2f}{}), **{:.2f}** of its memory".format(
            r["row"], r["speed"], r["peer"], halved, *r["speed_range"], goal, r["memory"])
    text += f"; {ms} ms, {mib} MiB, {r['tokens']} tokens, padding {r['padding']:.2f}"
    text += f", MFU {r['mfu']:.1%}, {r['of_floor']:.0%} of the floor" if "mfu" in r else ""
    if r["peer"]:
        text += f", first losses {r['apart'][0]:.0e} apart{'' if r['agree'] else ': **NOT THE SAME STEPS**'}"
    return text


# ---- the command ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Settings:
    rows: str = setting("all", "all rows of this device, or some: S1,S2")
    size: str = setting("", "full; tiny: S rows with a model of a few thousand parameters; empty: by device")
    device: str = setting("auto", "auto, cuda, cpu")
    repeats: int = setting(0, "processes of each side; 0 = 5 on a CPU, 1 on a GPU", 0)
    steps: int = setting(5, "timed steps of each process, after one or two others", 1)
    seconds: float = setting(7200.0, "no process starts later, and none takes longer", 0)
    out: str = setting("", "file for the page")
    date: str = setting("", "of the page; empty: today")
    side: str = setting("", "ours, theirs, theirs+liger, ...: measure this side once, in this process")


def main(s, args):
    s.device = bench.pick_device(s.device)
    s.size = s.size or {"cuda": "full", "cpu": "tiny"}[s.device]
    names = bench.pick_rows(s.rows, NAMES[s.device], NAMES["cpu"] + NAMES["cuda"])
    if s.size not in ("full", "tiny") or (s.device, s.size) == ("cpu", "full"):
        config.stop(f"size={s.size}, device={s.device}: full (on a GPU) or tiny")
    config.check_ranges(s)
    if s.device == "cpu" and not Path("/proc/self/status").is_file():
        config.stop("memory is read from Linux's /proc, which this machine does not have")
    sizes = {n: "full" if n in NAMES["cpu"] else s.size for n in names}       # rows for a CPU have only this size
    if s.side == "ceilings":
        return bench.print_json(bench.ceilings(s.device))
    if s.side:
        if (n := names[0]) and s.side not in ("ours", *system(n).peers):
            config.stop(f"side={s.side}: ours, {', '.join(system(n).peers)}")
        return bench.print_json(measure(n, s.side, s.steps, sizes[n], s.device))
    s.repeats = s.repeats or {"cuda": 1, "cpu": 5}[s.device]
    end, rows, failed, machine = time.time() + s.seconds, [], {}, bench.describe_machine(s.device)
    say = bench.open_page(s.out)
    say(f"# Training steps, {s.date}\n\n`python -m bench step{''.join(f' {a}' for a in args)}` on {machine}.\n\n"
        f"Ours / theirs: transformers' LLaVA (sdpa, fused AdamW). {CLOCK[s.device]} of the median of {s.steps} steps;\n"
        f"medians over {s.repeats} processes; ratios are of pairs, least and most in brackets.\n")

    def once(name, side):
        """Measure one side of row `name` in a new process. Return the result, or None if it failed. side: "ours", a
        peer, or "ceilings" (the highest speeds of this device)"""
        left = end - time.time()
        if left < 1:
            failed[name, side] = f"not begun within {s.seconds:.0f} s"
            return say(f"- {name}, {side}: {failed[name, side]}")
        *found, last = bench.child("step", [f"--rows={name}", f"--side={side}", f"--steps={s.steps}",
                                            f"--size={s.size}", f"--device={s.device}"], left)
        if found and not last["ended"]:
            return found[-1]
        failed[name, side] = last["because"]
        say(f"- {name}, {side}: did not run, ended with {last['ended']}: {last['because']}")

    ceilings = once(names[0], "ceilings") if s.device == "cuda" else None
    plan = [(name, n, side) for name in names for n in range(s.repeats)
            for side in ["ours", *system(name).peers][:: (1, -1)[n % 2]]]
    if s.device == "cuda":                 # compare each row with its first peer first, because time may run out
        plan.sort(key=lambda p: (p[1], system(p[0]).peers[1:].index(p[2]) + 1 if p[2] in system(p[0]).peers[1:] else 0))
    got = {}

    for name, n, side in plan:
        if (name, side) not in failed and (found := once(name, side)):
            got.setdefault((name, side), []).append(found)
            say(f"- {name} {n + 1}/{s.repeats} {side}: {found['seconds'] * 1e3:.0f} ms, first loss "
                f"{found['losses'][0]:.4f}, {found['peak'] / 2**20:.0f} MiB")
    for name in names:
        ours, peers = got.get((name, "ours"), []), [p for p in system(name).peers if (name, p) in got]
        for peer in (peers or [None]) if ours else []:
            pairs = [*zip(ours, got[name, peer])] if peer else [*zip(ours)]
            rows.append(compare(name, pairs, s.steps, sizes[name], s.device, ceilings, peer))
            say(f"- {sentence(rows[-1])}")
    bench.print_json({"machine": machine, "ceilings": ceilings, "rows": rows,
                      "failed": {f"{name}, {side}": why for (name, side), why in failed.items()}})
