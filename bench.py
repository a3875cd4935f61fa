"""Whole training steps beside transformers' LLaVA: the same weights, the same ragged batch, the same parameters trained.

    python bench.py                                # all rows, a few minutes; the table goes to bench/results/<date>-cpu.md
    python bench.py --row=step_sft --repeats=3     # one row; a table is only written for all of them

    step_align, step_sft    a ViT of 6 x 192 and a Llama of 6 x 256 with 32,000 words, 4 conversations a step
    toy_align, toy_sft      the toy world's model, 32 conversations a step

_align trains the connector, _sft connector and language model; the vision tower is frozen and builds no graph on either side. Ours
takes the batch packed, through engine.train_step; transformers takes it padded, with a mask, in a loop of the same verbs. Every
measurement is a process of its own with one thread, the two sides by turns. Times are CPU time (user + system) of the median step,
so that a busy machine moves them little; ratios are of neighbours in time. The last line is JSON.
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
GOALS = {"align": 2.5, "sft": 2.0, "memory": 0.65}  # times the CPU time of ours; share of transformers' peak memory


@dataclasses.dataclass
class Settings:
    row: str = "all"               # all, step_align, step_sft, toy_align, toy_sft
    device: str = "cpu"
    repeats: int = 5               # processes of each side, by turns
    steps: int = 5                 # timed steps in each, after one that is not
    date: str = ""                 # of the table; empty = today
    side: str = ""                 # ours, theirs: measure this side once, here (what the repeats start)


# ---- what both sides are given ------------------------------------------------------------------------------------------------

def system(row):
    """-> config of the model, conversations per step, median words of one, and (asked, answered) words of each of its turns"""
    from model import TextConfig, VisionConfig, VLMConfig
    if row.startswith("step"):
        return VLMConfig(
            VisionConfig(hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, image_size=112,
                         patch_size=14),
            TextConfig(vocab_size=32000, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8,
                       num_key_value_heads=4, head_dim=32), image_token_index=3), 4, 90, (10, 3)
    return VLMConfig(
        VisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=72, patch_size=12),
        TextConfig(vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=6, num_attention_heads=4,
                   num_key_value_heads=4, head_dim=32, rms_norm_eps=1e-5), image_token_index=3), 32, 90, (10, 3)


def conversations(cfg, samples, words, turn, step):
    """One step's samples as data.pack takes them: BOS, picture, turns. Lengths are log-normal, as those of real conversations are
    nearly, so that padding to the longest of a batch costs what it costs in practice: 1.3 to 1.75 times the tokens."""
    import torch
    g = torch.Generator().manual_seed(1000 + step)
    out = []
    for length in (words * (0.7 * torch.randn(samples, generator=g)).exp()).long().clamp(8, 5 * words).tolist():
        text = torch.randint(4, cfg.text.vocab_size, (length,), generator=g).tolist()
        ids = [1] + [cfg.image_token_index] * cfg.vision.patches + text
        first, S = len(ids) - length, cfg.vision.image_size
        labels = [i if n >= first and (n - first) % sum(turn) >= turn[0] else -100 for n, i in enumerate(ids)]
        out.append((ids, labels, torch.randint(0, 256, (1, 3, S, S), generator=g, dtype=torch.uint8)))
    return out


def fill(cfg, model, name=lambda k: k):
    """Give a model the parameters of model.VLM under `name`, the same wherever it is made -> names of those it has besides."""
    import torch
    from model import VLM
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in VLM(cfg).state_dict().items()}
    mine, g = dict(model.named_parameters()), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for k, shape in shapes.items():
            p = mine.pop(name(k))
            assert p.shape == shape, f"{k} is {tuple(shape)} here and {tuple(p.shape)} there"
            p.normal_(0, 0.02, generator=g).add_("norm" in k and k.endswith("weight"))
    return set(mine)


LR, CLIP = 1e-3, 1.0
TRAINED = {"align": ("multi_modal_projector",), "sft": ("multi_modal_projector", "language_model", "lm_head")}


# ---- the two sides: each -> step(conversations), which trains and says the loss before --------------------------------------

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
    engine.set_lr(optimizer, 1, 10**9, 1)

    def step(made):
        batch = data.pack(made, cfg.vision.image_size)
        return engine.train_step(model, optimizer, [batch], token_loss, world, CLIP)["loss"]
    return step


def theirs(cfg, stage):
    """transformers at its best: sdpa, no cache, fused AdamW, the tower in no_grad, pixels normalised and padded off the clock."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    vision = {f.name: getattr(cfg.vision, f.name) for f in dataclasses.fields(cfg.vision)}
    text = {f.name: getattr(cfg.text, f.name) for f in dataclasses.fields(cfg.text)}
    model = LlavaForConditionalGeneration._from_config(LlavaConfig(
        vision_config=CLIPVisionConfig(**{k: v for k, v in vision.items() if k not in ("model_type", "feature_layer", "image_mean", "image_std")}),
        text_config=LlamaConfig(**{k: v for k, v in text.items() if k not in ("model_type", "rope_theta", "rope_scaling")}, use_cache=False),
        image_token_index=cfg.image_token_index), attn_implementation="sdpa")

    def name(k):
        if k == "language_model.lm_head.weight":
            return "lm_head.weight"
        return "model." + k.replace("language_model.model.", "language_model.").replace("vision_tower.vision_model.", "vision_tower.")
    last = f"encoder.layers.{cfg.vision.num_hidden_layers - 1}."          # built by transformers, run by it, read by nobody
    assert all(last in k or "post_layernorm" in k for k in fill(cfg, model, name))
    for name, p in model.named_parameters():
        p.requires_grad_(name.removeprefix("model.").split(".")[0] in TRAINED[stage])
    model.train()
    model.model.vision_tower.eval()
    model.model.vision_tower.forward = torch.no_grad()(model.model.vision_tower.forward)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    def step(padded):
        loss = model(**padded).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def pad(cfg, made):
    """The samples of a step as transformers takes them."""
    import torch
    longest = max(len(ids) for ids, _, _ in made)
    rows = [(ids + [0] * (longest - len(ids)), labels + [-100] * (longest - len(ids)), [1] * len(ids) + [0] * (longest - len(ids)))
            for ids, labels, _ in made]
    mean, std = (torch.tensor(t).view(1, 3, 1, 1) for t in (cfg.vision.image_mean, cfg.vision.image_std))
    pixels = (torch.cat([images for *_, images in made]) / 255 - mean) / std
    return dict(zip(("input_ids", "labels", "attention_mask"), (torch.tensor(t) for t in zip(*rows))), pixel_values=pixels)


# ---- measuring ----------------------------------------------------------------------------------------------------------------

def memory(key):
    """Bytes of this process from /proc: VmRSS is now, VmHWM the most ever (getrusage's inherits from the parent, which is not asked)."""
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def measure(row, side, steps):
    """One side of one row in this process -> {losses, seconds, peak, imported}"""
    import torch
    torch.set_num_threads(1)
    cfg, *kind = system(row)
    if side == "ours":
        import data, engine, loss  # noqa: E401,F401  (what is imported counts apart)
    else:
        from transformers import LlavaForConditionalGeneration  # noqa: F401
    imported = memory("VmRSS")
    step = {"ours": ours, "theirs": theirs}[side](cfg, row.split("_")[1])
    losses, seconds = [], []
    for n in range(steps + 1):
        made = conversations(cfg, *kind, n)
        made = made if side == "ours" else pad(cfg, made)
        began = time.process_time()
        losses.append(step(made))
        seconds.append(time.process_time() - began)
    return {"losses": losses, "seconds": statistics.median(seconds[1:]), "peak": memory("VmHWM"), "imported": imported}


def child(row, side, steps):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    p = subprocess.run([sys.executable, str(ROOT / "bench.py"), f"--row={row}", f"--side={side}", f"--steps={steps}"],
                       capture_output=True, text=True, env=env)
    if p.returncode:
        config.stop(f"{row}, {side}: the measurement ended with {p.returncode}:\n{p.stderr[-2000:]}")
    return json.loads(p.stdout.splitlines()[-1])


def compare(row, repeats, steps, say=print):
    """Both sides of a row by turns -> a row of the table"""
    pairs = []
    for n in range(repeats):
        pair = {side: child(row, side, steps) for side in (("ours", "theirs") if n % 2 == 0 else ("theirs", "ours"))}
        say(f"{row} {n + 1}/{repeats}: " + ", ".join(f"{k} {v['seconds'] * 1e3:.0f} ms" for k, v in sorted(pair.items())), flush=True)
        pairs.append((pair["ours"], pair["theirs"]))
    a, b = (p["losses"] for p in pairs[0])
    assert abs(a[0] - b[0]) <= 1e-4 * abs(b[0]), f"{row}: the first loss is {a[0]} here and {b[0]} there: these are not the same steps"
    cfg, *kind = system(row)
    batches = [conversations(cfg, *kind, n) for n in range(1, steps + 1)]
    real = [sum(len(ids) for ids, _, _ in made) for made in batches]
    padded = [len(made) * max(len(ids) for ids, _, _ in made) for made in batches]
    learnt = [sum(i >= 0 for _, labels, _ in made for i in labels) for made in batches]

    def over(key):                                             # theirs / ours or ours / theirs, always of one pair
        return sorted(key(p) for p in pairs)
    speed = over(lambda p: p[1]["seconds"] / p[0]["seconds"])
    space = over(lambda p: p[0]["peak"] / p[1]["peak"])
    net = over(lambda p: (p[0]["peak"] - p[0]["imported"]) / (p[1]["peak"] - p[1]["imported"]))
    mid = statistics.median
    return {"row": row, "tokens": sum(real) / steps, "padded": sum(padded) / sum(real), "supervised": sum(learnt) / sum(real),
            "ms": [round(1e3 * mid(p[i]["seconds"] for p in pairs), 1) for i in (0, 1)],
            "mib": [round(mid(p[i]["peak"] for p in pairs) / 2**20) for i in (0, 1)],
            "mib_imports": [round(mid(p[i]["imported"] for p in pairs) / 2**20) for i in (0, 1)],
            "speed": round(mid(speed), 3), "speed_range": [round(speed[0], 3), round(speed[-1], 3)],
            "memory": round(mid(space), 3), "memory_net": round(mid(net), 3),
            "loss_first": abs(a[0] - b[0]), "loss_last": abs(a[-1] - b[-1]),
            "reached": mid(speed) >= GOALS[row.split("_")[1]] and mid(space) <= GOALS["memory"]}


def hardware():
    """What was measured on, in one line."""
    import torch
    import transformers
    try:
        cpu = next(l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    revision = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return (f"{cpu}, {os.cpu_count()} cores, 1 thread used, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
            f"torch {torch.__version__}, transformers {transformers.__version__}, fp32; revision {revision or 'unknown'}")


def table(rows, s, machine):
    """The rows as a page of markdown."""
    out = [f"# A training step on a CPU, {s.date}", "", f"`python bench.py --repeats={s.repeats} --steps={s.steps}`; {machine}.", "",
           "Ours against transformers' LlavaForConditionalGeneration (sdpa): same weights, same conversations, same trained set, each",
           f"side in its own process, by turns. CPU time of the median of {s.steps} steps; medians over {s.repeats} processes, ratios over pairs",
           "(least to most in brackets). Padding: what transformers computes per real token. Memory: peak of the process, and the same",
           "without what its imports hold. Loss: difference between the two sides in the first and in the last step.", "",
           "| row | tokens | padding | learnt | ms ours | ms theirs | **times faster** | goal | MiB ours | MiB theirs | **share** | goal "
           "| without imports | loss |", "|---|" + "--:|" * 13]
    for r in rows:
        out.append(f"| {r['row']} | {r['tokens']:.0f} | {r['padded']:.2f} | {r['supervised']:.0%} | {r['ms'][0]:.0f} | {r['ms'][1]:.0f} | "
                   f"**{r['speed']:.2f}** ({r['speed_range'][0]:.2f}-{r['speed_range'][1]:.2f}) | {GOALS[r['row'].split('_')[1]]} | "
                   f"{r['mib'][0]} | {r['mib'][1]} | **{r['memory']:.2f}** | {GOALS['memory']} | {r['memory_net']:.2f} | "
                   f"{r['loss_first']:.0e}, {r['loss_last']:.0e} |")
    return "\n".join(out) + "\n"


def main(s):
    if s.row not in ("all", *ROWS):
        config.stop(f"row={s.row}: all, {', '.join(ROWS)}")
    if s.device != "cpu":
        config.stop(f"device={s.device}: the rows of this file are CPU rows")
    if s.side:
        return print(json.dumps(measure(s.row, s.side, s.steps)))
    s.date = s.date or datetime.date.today().isoformat()
    rows = [compare(r, s.repeats, s.steps) for r in (ROWS if s.row == "all" else (s.row,))]
    machine = hardware()
    page = table(rows, s, machine)
    print(page)
    if s.row == "all":
        out = ROOT / "bench" / "results" / f"{s.date}-cpu.md"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, "utf-8")
        print(f"written to {out.relative_to(ROOT)}")
    print(json.dumps({"machine": machine, "rows": rows}))


if __name__ == "__main__":
    main(config.load(Settings, sys.argv[1:], __doc__))
