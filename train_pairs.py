"""Train an image tower and a text tower on images and their captions: CLIP, SigLIP, or BLIP-2's Q-Former.

    torchrun train_pairs.py                                        # toy data (demo/), on a CPU, a few minutes
    torchrun train_pairs.py --kind=siglip --out=runs/siglip
    torchrun train_pairs.py recipes/blip2.py --data=toy            # BLIP-2's first stage: a Q-Former (parts/blip2.py)
    torchrun train_pairs.py --init=openai/clip-vit-base-patch32 --data=FILE --images=DIR --lr=1e-5     # train on
    torchrun --nproc_per_node=8 train_pairs.py --data=FILE --images=DIR --batch_size=4096              # eight GPUs
    python -m tools.retrieval --model=runs/pairs                   # recall of held-out captions and images

Every pair of a step is compared with every other one, on any number of processes: batch_size says how many these are,
max_tokens how many tokens of captions pass through the towers at once. Neither max_tokens nor the number of processes
changes the gradient (parts/pairs.py); only which wrong pairs BLIP-2 draws depends on them (parts/blip2.py).

Settings are given as --key=value or in recipe files; `python train_pairs.py --help` prints them all.
"""

from dataclasses import dataclass
from pathlib import Path

import engine
from config import Common, setting
from loss import supervised
from run import pairs, stage

HERE = Path(__file__).resolve().parent


@dataclass
class Settings(Common):
    stage = "pairs"
    epochs: float = 10.0
    batch_size: int = 64                         # pairs per optimizer step, over all processes
    lr: float = 1e-3                             # of both towers
    warmup: float = 0.1
    out: str = "runs/pairs"

    kind: str = setting("clip", "of a new model, and its loss", choices=("clip", "siglip", "blip2"), group="pairs")
    tokenizer: str = setting(str(HERE / "demo/llm"), "of a new model: folder or org/name", resume="say")


def main(s):
    world, model, folder = pairs.begin_pairs(s)
    lrs = engine.choose(model, stage.training_table(s, pairs.trained_towers(s, model.cfg)), world.dtype, world.device)
    compare, pair_loss, contrast = pairs.METHODS[model.cfg.kind]
    run = pairs.prepare_pairs(s, world, model, folder, lrs)

    # ---- the loop: as in every stage, but all pairs of the step are compared first -----------------------------------
    model, optimizer, start, steps = run.model, run.optimizer, run.start, run.steps
    for step, batch in zip(range(start, steps), run.batches):
        lr = engine.set_lr(optimizer, step, steps, s.warmup)
        n, = world.sum([sum(supervised(b.labels) for b in batch.micro)])   # n: pairs of the step, all ranks
        compared, accuracy = compare(model, batch.micro, world, contrast, (s.seed, step))
        total = 0.0
        for b in compared:
            with engine.sync_gradients(model, enabled=b is compared[-1]):
                with world.autocast():
                    loss = pair_loss(model, b)                             # a sum over the pairs of b
                (loss * world.size / n).backward()                         # * world.size: DDP and FSDP divide by it
            total += loss.detach()
        if step == start and batch.micro:                                  # batch.micro is [] if no sample is usable
            engine.check_gradients(model)
        result = engine.update(model, optimizer, total, n, world, s.grad_clip)
        engine.unwrap(model).limit_scale()

        run.log.count(step, batch, result | {"accuracy": float(accuracy)})
        if step == start:
            run.folder.begin(start)
        if run.due(step, s.log_every):
            run.log.write(step, lr)
        if run.due(step, s.eval_every):
            run.validation.measure(step, model, contrast, run.log)
        stop, = world.sum([len(run.signals)])                              # has any rank received a signal to stop?
        if stop or run.due(step, s.save_every) or run.is_best(step):
            run.folder.save(step, model, optimizer, run.log)
        if stop:
            return stage.stopped(run, step, world)
    # ------------------------------------------------------------------------------------------------------------------
    return pairs.finish_pairs(run, s, world, folder)


if __name__ == "__main__":
    engine.run_script(main, Settings, __doc__)
