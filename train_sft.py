"""Stage 2: train the connector and the language model (all weights, or LoRA adapters) on conversations about images.

    torchrun train_sft.py                                          # toy data (demo/), on a CPU, after train_align.py
    torchrun train_sft.py --lora_r=32 --lr=5e-3 --connector_lr=4e-3 --out=runs/lora   # with LoRA adapters
    torchrun train_sft.py recipes/llava15.py --init=runs/align --data=llava_v1_5_mix665k.json --images=DIR
    torchrun --nproc_per_node=8 train_sft.py recipes/llava15.py ...      # eight GPUs; several nodes: see train_align.py

Settings are given as --key=value or in recipe files; `python train_sft.py --help` prints them all.
"""

from dataclasses import dataclass

import engine
import lora
from config import Common, setting
from loss import token_loss, total_weight
from run import stage


@dataclass
class Settings(Common):
    stage = "sft"
    init: str = "runs/align"
    lr: float = 3e-3                             # learning rate of the language model, or of its adapters
    out: str = "runs/sft"

    connector_lr: float = setting(0.0, "of the connector; 0 = lr", 0, resume="say", group="stage 2")
    vision_lr: float = setting(0.0, "of the vision tower, or of its adapters; 0 = it is frozen, or adapters take lr", 0,
                               resume="say")
    lora_r: int = setting(0, "rank of the adapters; 0 = train the whole language model", 0)
    lora_alpha: float = setting(64.0, "adapters are scaled by lora_alpha / lora_r", 1e-6)
    lora_dropout: float = setting(0.0, "share of the adapters' inputs set to zero", 0, 0.99, resume="say")
    lora_targets: str = setting("all-linear", "of the language model but its head; or q_proj,v_proj ...; or globs: "
                                              "vision_tower.*q_proj")
    bits: int = setting(16, "of the language model under adapters: 4 = NF4 (QLoRA), 16 = as dtype says",
                        choices=(4, 16))


def who_trains(s, model):
    """-> table {glob over names: learning rate} for engine.choose. If lora_r > 0, add adapters to the model."""
    table = {"multi_modal_projector.*": s.connector_lr or s.lr}
    if not s.lora_r:
        return table | {"language_model.*": s.lr} | ({"vision_tower.*": s.vision_lr} if s.vision_lr else {})
    if s.bits == 4:
        lora.quantize_base(model)
    adapted = lora.add_adapters(model, s.lora_r, s.lora_alpha, s.lora_dropout, s.lora_targets, s.seed)
    in_tower = any(name.startswith("vision_tower.") for name in adapted)
    tower = {"vision_tower.*.lora_*" if in_tower else "vision_tower.*": s.vision_lr} if s.vision_lr else {}
    return table | {"*.lora_*": s.lr} | tower


def main(s):
    world, model, folder = stage.begin(s, "vicuna_v1")
    lrs = engine.choose(model, stage.training_table(s, who_trains(s, model)), world.dtype, world.device)
    run = stage.prepare(s, world, model, folder, lrs)

    # ---- the loop: the same in every stage ---------------------------------------------------------------------------
    model, optimizer, start, steps = run.model, run.optimizer, run.start, run.steps
    for step, batch in zip(range(start, steps), run.batches):
        lr = engine.set_lr(optimizer, step, steps, s.warmup)
        n, = world.sum([sum(map(total_weight, batch.micro))])    # n: supervised tokens of the step, or their weights
        total = 0.0
        for b in batch.micro:
            with engine.sync_gradients(model, enabled=b is batch.micro[-1]):
                with world.autocast():
                    loss = token_loss(model, b.to(world.device))           # a sum over the supervised tokens of b
                (loss * world.size / n).backward()                         # * world.size: DDP and FSDP divide by it
            total += loss.detach()
        if step == start and batch.micro:                                  # batch.micro is [] if no sample is usable
            engine.check_gradients(model)
        result = engine.update(model, optimizer, total, n, world, s.grad_clip)

        run.log.count(step, batch, result)
        if step == start:
            run.folder.begin(start)
        if run.due(step, s.log_every):
            run.log.write(step, lr)
        if run.due(step, s.eval_every):
            run.validation.measure(step, model, token_loss, run.log)
        if run.due(step, s.sample_every):
            run.validation.answers(step, model, run.log)
        stop, = world.sum([len(run.signals)])                              # has any rank received a signal to stop?
        if stop or run.due(step, s.save_every) or run.is_best(step):
            run.folder.save(step, model, optimizer, run.log)
        if stop:
            return stage.stopped(run, step, world)
    # ------------------------------------------------------------------------------------------------------------------
    return stage.finish(run, s, world, folder)


if __name__ == "__main__":
    engine.run_script(main, Settings, __doc__)
