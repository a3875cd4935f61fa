"""Whole training steps beside transformers' LLaVA: same weights, same ragged batches, same parameters trained.

    python bench.py                                # all rows, some minutes; a table in bench/results/<date>-cpu.md
    python bench.py --row=step_sft --repeats=3     # one row, printed only

    step_align, step_sft    a ViT of 6 x 192, a Llama of 6 x 256 with 32,000 words, 4 conversations a step
    toy_align, toy_sft      the toy world's model, 32 conversations a step

_align trains the connector, _sft connector and language model; the vision tower is frozen and builds no graph on
either side. Ours takes the batch packed, through engine.train_step; transformers takes it padded, with a mask, in a
loop of the same verbs. Every measurement is a process of its own with one thread, the two sides by turns. Times are
CPU time (user + system) of the median step, which a busy machine moves little; ratios are of processes that ran one
after the other. The last line is JSON.
"""

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import config

ROOT = Path(__file__).resolve().parent
ROWS = ("step_align", "step_sft", "toy_align", "toy_sft")
GOALS = {"step_align": 2.5, "step_sft": 2.0}          # CPU time of theirs over ours
MEMORY = 0.65                                         # peak memory of ours over theirs
TRAINED = {"align": ("multi_modal_projector",), "sft": ("multi_modal_projector", "language_model", "lm_head")}
LR, CLIP = 1e-3, 1.0


@dataclasses.dataclass
class Settings:
    row: str = "all"               # all, step_align, step_sft, toy_align, toy_sft
    device: str = "cpu"
    repeats: int = 5               # processes of each side, by turns
    steps: int = 5                 # timed steps in each, after one that is not
    date: str = ""                 # of the table; empty = today
    side: str = ""                 # ours, theirs: measure this side once, here (what the repeats start)


# ---- what both sides are given -------------------------------------------------------------------------------------

def system(row):
    """-> config of the model, conversations per step, spread of their lengths (sigma of the logarithm)"""
    from model import TextConfig, VisionConfig, VLMConfig
    if row.startswith("step"):
        vision = VisionConfig(hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3,
                              image_size=112, patch_size=14)
        text = TextConfig(vocab_size=32000, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
                          num_attention_heads=8, num_key_value_heads=4, head_dim=32)
        return VLMConfig(vision, text, image_token_index=3), 4, 0.7
    vision = VisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                          image_size=72, patch_size=12)
    text = TextConfig(vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=6,
                      num_attention_heads=4, num_key_value_heads=4, head_dim=32)
    return VLMConfig(vision, text, image_token_index=3), 32, 0.25


def conversations(cfg, samples, spread, step, words=90, asked=10, answered=3):
    """One step's samples as data.pack takes them: BOS, a picture, turns. Lengths are log-normal around `words`, spread
    so that padding a batch to its longest costs what it costs with real conversations: 1.3 to 1.75 times the tokens."""
    import torch
    g = torch.Generator().manual_seed(1000 + step)
    out = []
    for length in (words * (spread * torch.randn(samples, generator=g)).exp()).long().clamp(8, 5 * words).tolist():
        text = torch.randint(4, cfg.text.vocab_size, (length,), generator=g).tolist()
        ids = [1] + [cfg.image_token_index] * cfg.vision.patches
        labels = [-100] * len(ids) + [t if i % (asked + answered) >= asked else -100 for i, t in enumerate(text)]
        S = cfg.vision.image_size
        out.append((ids + text, labels, torch.randint(0, 256, (1, 3, S, S), generator=g, dtype=torch.uint8)))
    return out


def pad(cfg, made):
    """The samples of a step as transformers takes them."""
    import torch
    longest = max(len(ids) for ids, _, _ in made)

    def rows(lists, filler):
        return torch.tensor([[*r, *[filler] * (longest - len(r))] for r in lists])
    mean, std = (torch.tensor(t).view(1, 3, 1, 1) for t in (cfg.vision.image_mean, cfg.vision.image_std))
    return {"input_ids": rows([ids for ids, _, _ in made], 0), "labels": rows([labels for _, labels, _ in made], -100),
            "attention_mask": rows([[1] * len(ids) for ids, _, _ in made], 0),
            "pixel_values": (torch.cat([images for *_, images in made]) / 255 - mean) / std}


def fill(cfg, model, name=lambda k: k):
    """Give a model the parameters of model.VLM, under `name`, always the same ones -> names of what it has besides."""
    import torch
    from model import VLM
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in VLM(cfg).state_dict().items()}
    has, g = dict(model.named_parameters()), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for k, shape in shapes.items():
            p = has.pop(name(k))
            assert p.shape == shape, f"{k} is {tuple(shape)} here and {tuple(p.shape)} there"
            p.normal_(0, 0.02, generator=g).add_("norm" in k and k.endswith("weight"))
    return set(has)


# ---- the two sides: each prepares samples, off the clock, and trains a step, which says the loss before it ----------

def ours(cfg, stage):
    import torch

    import data
    import engine
    from loss import token_loss
    from model import VLM
    world = engine.start("cpu", "fp32")
    model = VLM(cfg)
    fill(cfg, model)
    lrs = engine.choose(model, {f"{part}.*": LR for part in TRAINED[stage] if part != "lm_head"}, torch.float32)
    optimizer = engine.adamw(model, lrs, 0.0)
    engine.set_lr(optimizer, 0, 1, 0)
    return (lambda made: data.pack(made, cfg.vision.image_size),
            lambda batch: engine.train_step(model, optimizer, [batch], token_loss, world, CLIP)["loss"])


def theirs(cfg, stage):
    """transformers at its best: sdpa, no cache, fused AdamW, the tower in no_grad, pixels normalised off the clock."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    def given(part, *ours_alone):
        return {k: v for k, v in dataclasses.asdict(part).items() if k not in ("model_type", *ours_alone)}
    vision = CLIPVisionConfig(**given(cfg.vision, "feature_layer", "image_mean", "image_std"))
    text = LlamaConfig(**given(cfg.text, "rope_scaling"), use_cache=False)
    whole = LlavaConfig(vision_config=vision, text_config=text, image_token_index=cfg.image_token_index,
                        vision_feature_layer=cfg.vision.feature_layer)
    model = LlavaForConditionalGeneration._from_config(whole, attn_implementation="sdpa")

    def name(k):
        k = k.replace("vision_tower.vision_model.", "vision_tower.").replace("language_model.model.", "language_model.")
        return "lm_head.weight" if "lm_head" in k else "model." + k
    last = f"encoder.layers.{cfg.vision.num_hidden_layers - 1}."           # transformers computes it, nobody reads it
    assert all(last in k or "post_layernorm" in k for k in fill(cfg, model, name))

    for k, p in model.named_parameters():
        p.requires_grad_(k.removeprefix("model.").split(".")[0] in TRAINED[stage])
    tower = model.model.vision_tower.eval()
    tower.forward = torch.no_grad()(tower.forward)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    def step(padded):
        loss = model(**padded).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return lambda made: pad(cfg, made), step


# ---- measuring -----------------------------------------------------------------------------------------------------

def memory(key):
    """Bytes of this process: VmRSS now, VmHWM at most. (getrusage's maximum would begin with that of the parent.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024


def measure(row, side, steps):
    """One side of one row, in this process -> losses, CPU seconds of the median step, bytes at most and after import"""
    import torch
    torch.set_num_threads(1)
    if side == "ours":
        import data, engine, loss  # noqa: E401,F401
    else:
        from transformers import LlavaForConditionalGeneration  # noqa: F401
    imported = memory("VmRSS")
    cfg, samples, spread = system(row)
    prepare, step = {"ours": ours, "theirs": theirs}[side](cfg, row.split("_")[1])
    losses, seconds = [], []
    for n in range(steps + 1):
        batch = prepare(conversations(cfg, samples, spread, n))
        began = time.process_time()
        losses.append(step(batch))
        seconds.append(time.process_time() - began)
    return {"losses": losses, "seconds": statistics.median(seconds[1:]), "peak": memory("VmHWM"), "imported": imported}


def child(row, side, steps):
    """measure(), in a process of its own"""
    p = subprocess.run([sys.executable, ROOT / "bench.py", f"--row={row}", f"--side={side}", f"--steps={steps}"],
                       capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if p.returncode:
        config.stop(f"{row}, {side}: the measurement ended with {p.returncode}\n{p.stderr[-2000:]}")
    return json.loads(p.stdout.splitlines()[-1])


def compare(row, repeats, steps):
    """Both sides of a row, by turns -> a row of the table"""
    pairs = []
    for n in range(repeats):
        pair = {side: child(row, side, steps) for side in (("ours", "theirs") if n % 2 == 0 else ("theirs", "ours"))}
        a, b = pair["ours"], pair["theirs"]
        print(f"{row} {n + 1}/{repeats}: {a['seconds'] * 1e3:.0f} ms beside {b['seconds'] * 1e3:.0f} ms", flush=True)
        first = a["losses"][0], b["losses"][0]
        assert abs(first[0] - first[1]) <= 1e-4, f"{row}: first losses {first}: these are not the same steps"
        pairs.append((a, b))
    cfg, samples, spread = system(row)
    batches = [conversations(cfg, samples, spread, n) for n in range(1, steps + 1)]
    real = sum(len(ids) for made in batches for ids, _, _ in made)
    padded = sum(len(made) * max(len(ids) for ids, _, _ in made) for made in batches)
    learnt = sum(i >= 0 for made in batches for _, labels, _ in made for i in labels)
    mid = statistics.median
    speed = sorted(b["seconds"] / a["seconds"] for a, b in pairs)
    share = mid(a["peak"] / b["peak"] for a, b in pairs)
    return {"row": row, "tokens": round(real / steps), "padding": padded / real, "learnt": learnt / real,
            "ms": [1e3 * mid(p["seconds"] for p in side) for side in zip(*pairs)],
            "mib": [mid(p["peak"] for p in side) / 2**20 for side in zip(*pairs)],
            "speed": mid(speed), "speed_range": [speed[0], speed[-1]], "goal": GOALS.get(row),
            "memory": share, "memory_goal": MEMORY,
            "memory_net": mid((a["peak"] - a["imported"]) / (b["peak"] - b["imported"]) for a, b in pairs),
            "loss_apart": [abs(pairs[0][0]["losses"][n] - pairs[0][1]["losses"][n]) for n in (0, -1)],
            "reached": mid(speed) >= GOALS.get(row, 0) and share <= MEMORY}


def hardware():
    """What was measured on, in one line."""
    import torch
    import transformers
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return (f"{cpu}, {os.cpu_count()} cores, one thread used, load {os.getloadavg()[0]:.1f}; "
            f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}; "
            f"fp32; revision {git.stdout.strip() or 'unknown'}")


PAGE = """# A training step on a CPU, {date}

`python bench.py --repeats={repeats} --steps={steps}` on {machine}.

Ours beside transformers' LlavaForConditionalGeneration (sdpa, fused AdamW): same weights, same conversations, same
trained set, each side in a process of its own, by turns. CPU time of the median of {steps} steps; medians over
{repeats} processes; ratios are of pairs, least and most in brackets. Padding: tokens that transformers computes for
each real one. Memory: peak of the process; net of what it held after its imports. Apart: the two losses, in the first
and in the last step. The toy rows have no goal in time: with 512 words there is no head to save on, and most of
what is left of a step are products that both sides need.

| row | tokens | padding | learnt | ms, ours | ms, theirs | **times faster** | goal | MiB, ours | MiB, theirs \
| **memory** | goal | net | apart |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""


def table(rows, s, machine):
    """The rows as a page of markdown."""
    page = PAGE.format(**dataclasses.asdict(s), machine=machine)
    for r in rows:
        cells = (r["row"], r["tokens"], f"{r['padding']:.2f}", f"{r['learnt']:.0%}", *(f"{t:.0f}" for t in r["ms"]),
                 "**{:.2f}** ({:.2f} to {:.2f})".format(r["speed"], *r["speed_range"]), r["goal"] or "",
                 *(f"{m:.0f}" for m in r["mib"]), f"**{r['memory']:.2f}**", r["memory_goal"], f"{r['memory_net']:.2f}",
                 "{:.0e}, {:.0e}".format(*r["loss_apart"]))
        page += f"| {' | '.join(map(str, cells))} |\n"
    return page


def main(s):
    if s.row not in ("all", *ROWS):
        config.stop(f"row={s.row}: all, {', '.join(ROWS)}")
    if s.device != "cpu":
        config.stop(f"device={s.device}: there are only CPU rows here")
    if s.repeats < 1 or s.steps < 1 or s.side not in ("", "ours", "theirs"):
        config.stop(f"repeats={s.repeats}, steps={s.steps}, side={s.side}: at least 1, at least 1, ours or theirs")
    if not Path("/proc/self/status").is_file():
        config.stop("memory is read from Linux's /proc, which this machine does not have")
    if s.side:
        print(json.dumps(measure("step_align" if s.row == "all" else s.row, s.side, s.steps)))
        return
    s.date = s.date or datetime.date.today().isoformat()
    rows = [compare(row, s.repeats, s.steps) for row in (ROWS if s.row == "all" else (s.row,))]
    machine = hardware()
    page = table(rows, s, machine)
    print("\n" + page)
    if s.row == "all":
        out = ROOT / "bench" / "results" / f"{s.date}-cpu.md"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, "utf-8")
        print(f"written to {out.relative_to(ROOT)}")
    print(json.dumps({"machine": machine, "rows": rows}))


if __name__ == "__main__":
    main(config.load(Settings, sys.argv[1:], __doc__))
