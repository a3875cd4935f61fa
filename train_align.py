"""Stage 1: the connector learns the language model's language. Pictures in, captions out; both towers stay as they are.

    torchrun train_align.py                                        # the toy world, on a CPU, in about a minute
    torchrun train_align.py recipes/llava15_align.py --data=blip_laion_cc_sbu_558k.json --images=DIR
    torchrun --nproc_per_node=8 train_align.py recipes/llava15_align.py ...              # eight GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train_align.py recipes/llava15_align.py ...                                      # four nodes of eight

Settings are given as --key=value or in recipe files; `python train_align.py --help` prints them all.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path

import config
import data
import engine
from formats import configs, llava
from kernels import choose_kernels
from loss import token_loss
from run import plan, stage

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass
class Settings:
    # data
    data: str = "toy"                    # LLaVA json or jsonl; a.json:0.7,b.json:0.3 mixes; toy = the toy world
    images: str = "."                    # folder that image names are relative to
    val_data: str = ""                   # the same form; none: no validation, no samples
    template: str = "plain"              # plain, vicuna_v1, llava_llama_2, llama_3, chatml, mistral
    system: str | None = None            # system text; none = as init was trained with, else the template's own
    image_aspect: str = ""               # pad (LLaVA-1.5), crop (CLIP), squash (SigLIP); empty: as init, else pad
    max_dropped: float = 0.01            # share of samples that may be unusable before the run stops
    # model
    vision: str = str(HERE / "demo/vit")    # CLIP, SigLIP or DINOv2: folder or org/name
    llm: str = str(HERE / "demo/llm")     # Llama, Mistral or Qwen: folder or org/name
    init: str = ""                       # a run or a LLaVA folder to start from, instead of two towers
    connector: str = "mlp"               # mlp, linear
    # optimisation
    batch_size: int = 16                 # samples per optimizer step, over all processes
    max_tokens: int = 4096               # tokens in one packed stream: less needs less memory, the gradient is the same
    max_len: int = 512                   # tokens of one sample; the rest is cut, never inside an image, and counted
    epochs: float = 3.0                  # over the data, where steps is 0
    steps: int = 0                       # optimizer steps
    lr: float = 5e-3                     # of the connector
    warmup: float = 0.03                 # share of the steps
    weight_decay: float = 0.0
    grad_clip: float = 1.0               # norm; 0 = never
    # machine
    device: str = "auto"                 # auto, cpu, cuda, cuda:1
    dtype: str = "auto"                  # of the computation: bf16 where the GPU has it, else fp32; fp64 for tests
    parallel: str = "auto"               # auto, ddp, fsdp
    recompute: str = "none"              # none, block: activations of a block are computed again in the backward pass
    compile: bool = False                # torch.compile, block by block
    kernels: str = "auto"                # torch, triton; auto = triton on a GPU
    workers: int = 0                     # loader processes
    seed: int = 0
    # the run
    out: str = "runs/align"              # folder of the run
    resume: str = "auto"                 # auto = go on where this folder stopped; none; path of a checkpoint
    save_every: int = 200                # steps between checkpoints
    keep_last: int = 2                   # checkpoints
    keep_best: bool = False              # and the one with the lowest validation loss
    log_every: int = 10                  # steps
    eval_every: int = 100                # steps between validation losses
    sample_every: int = 100              # steps between answers to fixed questions, in samples.jsonl
    dry_run: bool = False                # print the plan and one sample, and stop
    overfit: bool = False                # learn the first batch by heart, and say whether it worked


def main(s):
    stage.check(s)
    world = engine.start(s.device, s.dtype, s.seed)
    choose_kernels(s.kernels, world.device)
    stage.toy_world(s, world, "align")

    # what is trained
    model, folder = llava.load_model(s.vision, s.llm, s.init, s.connector, s.seed, dtype=None)
    stage.inherit(s, folder, model.cfg, "plain")
    lrs = engine.choose(model, {"multi_modal_projector.*": s.lr}, world.dtype)

    # on what
    cfg, spec = model.cfg, configs.image_spec(folder.pre, s.image_aspect)
    encode = data.Encoder(folder.tok, s.template, cfg.image_token_index, cfg.vision.patches, s.max_len, s.system)
    samples = data.Steps(s.data, s.images, encode, spec, s.batch_size, s.max_tokens, s.seed, world.rank, world.size)
    steps = s.steps or math.ceil(s.epochs * samples.total / s.batch_size)
    warmup = math.ceil(s.warmup * steps)
    first = samples[0]
    world.print(*folder.notes, *plan.lines(model, lrs, world, first.micro, steps, s), sep="\n")
    if s.dry_run:
        return stage.rehearse(s, world, samples, first, folder.tok)

    # on which machine
    blocks = [*model.vision_tower.vision_model.encoder.layers, *model.language_model.model.layers]
    model = engine.parallelize(model.to(world.device), world, blocks, s.parallel, s.recompute, s.compile)
    optimizer = engine.adamw(model, lrs, s.weight_decay)
    run = stage.Run(s, world, model, folder, samples, steps)
    start = run.resume(optimizer)

    # ---- the loop: the same in train_sft.py --------------------------------------------------------------------------
    batches = iter(data.loader(samples, [0] * steps if s.overfit else range(start, steps), s.workers))
    for step in range(start, steps):
        began = time.time()
        batch = next(batches)
        waited = time.time() - began
        world.meet(f"step {step + 1}")
        lr = engine.set_lr(optimizer, step, steps, warmup)
        result = engine.train_step(model, optimizer, batch.micro, token_loss, world, s.grad_clip, check=step == start)
        run.count(step, batch, result, waited)
        if run.due(step, s.log_every):
            run.log(step, lr, result)
        if run.due(step, s.eval_every):
            run.validate(step)
        if run.due(step, s.sample_every):
            run.sample(step)
        if run.due(step, s.save_every):
            run.save(step, optimizer)
        if run.stopping(step, optimizer):
            return 143
    # ------------------------------------------------------------------------------------------------------------------
    if s.overfit:
        return run.by_heart(first)
    run.publish()


if __name__ == "__main__":
    with config.one_line_errors():
        sys.exit(engine.finish(main(config.parse(Settings, sys.argv[1:], __doc__))))
