"""Stage 1: train the connector on images and their captions; vision tower and language model stay frozen.

    torchrun train_align.py                                        # toy data (demo/), on a CPU, about a minute
    torchrun train_align.py recipes/llava15_align.py --data=blip_laion_cc_sbu_558k.json --images=DIR
    torchrun --nproc_per_node=8 train_align.py recipes/llava15_align.py ...              # eight GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train_align.py recipes/llava15_align.py ...                                      # four nodes of eight GPUs

Settings are given as --key=value or in recipe files; `python train_align.py --help` prints them all.
"""

from dataclasses import dataclass
from pathlib import Path

import engine
from config import Common, setting
from loss import token_loss, total_weight
from run import stage

HERE = Path(__file__).resolve().parent


@dataclass
class Settings(Common):                          # config.Common: the settings of all stages
    stage = "align"                              # name of the stage, also for recipes and the toy data
    template: str = "plain"
    vision: str = str(HERE / "demo/vit")
    llm: str = str(HERE / "demo/llm")
    epochs: float = 3.0
    lr: float = 5e-3                             # learning rate of the connector
    out: str = "runs/align"
    eval_captions: int = setting(0, "images and captions of val_data: R@1, R@5; costs its square", 0, resume="free")


def main(s):
    world, model, folder = stage.begin(s, "plain")
    lrs = engine.choose(model, stage.training_table(s, {"multi_modal_projector.*": s.lr}), world.dtype, world.device)
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
