"""Reinforcement learning, after stage 2: the model answers questions, and good answers become more probable (GRPO).

    python demo/questions.py                                       # questions about new scenes of the toy world
    torchrun train_grpo.py                                         # on these, on a CPU
    torchrun train_grpo.py --lora_r=32 --lr=1e-4 --kl=0.04 --out=runs/grpo_lora
    torchrun --nproc_per_node=8 train_grpo.py --init=DIR --data=FILE --images=DIR --reward=mine.py:reward
    python -m tools.report runs/grpo/samples.jsonl --images=runs/toy/images        # a page of the roll-outs

A step draws batch_size questions; the model gives `group` answers to each (run/rollout.py), a reward scores them
(metrics/rewards.py), and an answer is compared with the others of its group (loss.py). A row of the data is a question
with its true answer (text, answer, image), or a conversation, whose last answer is the true one.

Settings are given as --key=value or in recipe files; `python train_grpo.py --help` prints them all.
"""

from dataclasses import dataclass
from functools import partial

import engine
import train_sft
from config import setting
from metrics.rewards import read_reward
from run import rollout, stage
from train_dpo import who_prefers


@dataclass
class Settings(train_sft.Settings):
    stage = "grpo"
    data: str = setting("runs/toy/questions_more.jsonl", "questions with true answers; a.json:0.7,b.json:0.3 mixes",
                        resume="free", group="data")
    images: str = setting("runs/toy/images", "folder that image names are relative to", resume="say")
    init: str = "runs/sft"
    epochs: float = 1.0
    lr: float = 1e-5
    warmup: float = 0.1
    out: str = "runs/grpo"

    reward: str = setting("exact", "exact, iou, format, length, or FILE.py:FUNCTION", group="rewards")
    group: int = setting(8, "answers to each question", 2, 2**10)
    max_new_tokens: int = setting(16, "tokens of an answer", 1, 2**16)
    temperature: float = setting(1.0, "at which answers are drawn", 1e-3, 100)
    normalise: str = setting("grpo", "grpo: mean over tokens, then answers; dr_grpo: sum of tokens, no standard "
                             "deviation; dapo: mean over all tokens of groups with unequal rewards",
                             choices=("grpo", "dr_grpo", "dapo"))
    updates: int = setting(1, "updates per roll-out", 1, 100)
    clip_low: float = setting(0.2, "the ratio of probabilities counts from 1 - clip_low", 0, 1)
    clip_high: float = setting(0.2, "to 1 + clip_high; DAPO: 0.28", 0, 100)
    kl: float = setting(0.0, "weight of the KL divergence from the model without adapters; GRPO: 0.04", 0)
    rollout_size: int = setting(256, "answers that are generated at a time", 1, resume="say")


def main(s):
    reward = read_reward(s.reward)
    world, model, folder = stage.begin(s, "vicuna_v1")
    lrs = engine.choose(model, stage.training_table(s, who_prefers(s, model)), world.dtype, world.device)
    run, roll = rollout.prepare_rollout(s, world, model, folder, lrs, reward)
    answer_loss = partial(rollout.rolled_loss, s)

    # ---- the loop: as in every stage, but the model makes the data of a step itself ----------------------------------
    model, optimizer, start, steps = run.model, run.optimizer, run.start, run.steps
    for step, batch in zip(range(start, steps), run.batches):
        lr = engine.set_lr(optimizer, step, steps, s.warmup)
        micro, n, about = roll(model, batch.micro, step)                   # n: answers or tokens, all ranks
        for _ in range(s.updates):
            total = 0.0
            for b in micro:
                with engine.sync_gradients(model, enabled=b is micro[-1]):
                    with world.autocast():
                        loss = answer_loss(model, b)                       # a sum over the tokens of b
                    (loss * world.size / n).backward()                     # * world.size: DDP and FSDP divide by it
                total += loss.detach()
            if step == start and micro:                                    # micro is [] if no sample is usable
                engine.check_gradients(model)
            result = engine.update(model, optimizer, total, n, world, s.grad_clip)

        run.log.count(step, batch._replace(micro=micro), result | about)
        if step == start:
            run.folder.begin(start)
        if run.due(step, s.log_every):
            run.log.write(step, lr)
        if run.due(step, s.sample_every):
            rollout.write_answers(roll, step, run.log)
        stop, = world.sum([len(run.signals)])                              # has any rank received a signal to stop?
        if stop or run.due(step, s.save_every) or run.is_best(step):
            run.folder.save(step, model, optimizer, run.log)
        if stop:
            return stage.stopped(run, step, world)
    # ------------------------------------------------------------------------------------------------------------------
    return stage.finish(run, s, world, folder)


if __name__ == "__main__":
    engine.run_script(main, Settings, __doc__)
