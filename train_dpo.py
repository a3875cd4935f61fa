"""Preference optimisation, after stage 2: of two answers to a question, make the chosen one more probable. KTO reads
good and bad answers that stand alone.

    python demo/questions.py                                       # questions about new scenes of the toy world
    python eval.py --model=runs/sft --data=runs/toy/questions_more.jsonl --images=runs/toy/images \\
        --answers=runs/toy/answers_more.jsonl
    python -m tools.pairs runs/toy/answers_more.jsonl --out=runs/toy/pairs.jsonl --right=3     # chosen: truth
    torchrun train_dpo.py                                          # on these pairs, on a CPU
    torchrun train_dpo.py --lora_r=32 --lr=1e-4 --out=runs/dpo_lora
    torchrun train_dpo.py --loss=kto --out=runs/kto                # the answers of the pairs, one by one
    torchrun --nproc_per_node=8 train_dpo.py --init=DIR --data=FILE --images=DIR --lr=5e-7 --epochs=1      # eight GPUs

A row of the data has a question and two answers (formats/preferences.py). batch_size counts pairs; with KTO it counts
answers (run/unpaired.py). The reference is the model before training (run/reference.py): with adapters, the model
without them; else its log-probabilities are computed in one pass before training. There is one model in memory.

Settings are given as --key=value or in recipe files; `python train_dpo.py --help` prints them all.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

import engine
import train_sft
from config import setting
from loss import dpo_loss, ipo_loss, kto_loss, orpo_loss, sequence_log_probs, simpo_loss
from run import preference, stage, unpaired


class Method(NamedTuple):
    loss: callable                               # loss.py
    refers: bool                                 # does the loss read the reference?
    per_token: bool = False                      # is log p always divided by the number of tokens?
    sft: float = 0.0                             # weight of the SFT term in the paper
    form: preference.Form = preference.Form()    # of the data: pairs, or answers that stand alone


METHODS = {"dpo": Method(dpo_loss, True), "ipo": Method(ipo_loss, True), "simpo": Method(simpo_loss, False, True),
           "orpo": Method(orpo_loss, False, True, 1.0), "kto": Method(kto_loss, True, form=unpaired.UNPAIRED)}


@dataclass
class Settings(train_sft.Settings):
    stage = "dpo"
    data: str = setting("toy", "rows with chosen and rejected, or toy; a.json:0.7,b.json:0.3 mixes", resume="free",
                        group="data")
    init: str = "runs/sft"
    epochs: float = 1.0
    loss: str = setting("dpo", "of a pair", choices=tuple(METHODS))
    lr: float = 1e-5
    warmup: float = 0.1
    out: str = "runs/dpo"

    connector_lr: float = setting(0.0, "of the connector; 0 = lr, or frozen if adapters train", 0, resume="say",
                                  group="stage 2")
    beta: float = setting(0.1, "how much a difference of log p counts; of orpo: weight of the odds", 1e-9,
                          group="preference")
    gamma: float = setting(1.0, "of simpo: the margin that is wanted", 0)
    length_norm: bool = setting(False, "log p per token; simpo and orpo always have it")
    sft: float = setting(-1.0, "weight of -log p per token of the chosen answer; -1 = 1 for orpo, else 0", -1)
    desirable_weight: float = setting(1.0, "of kto: how much a good answer counts", 0)
    undesirable_weight: float = setting(1.0, "of kto: how much a bad answer counts", 0)


def who_prefers(s, model):
    """As train_sft.who_trains. With adapters and without connector_lr, the adapters alone train: then the model without
    them is the reference."""
    table = train_sft.who_trains(s, model)
    if s.lora_r and not s.connector_lr:
        del table["multi_modal_projector.*"]
    return table


def preference_loss(s, reference, model, b):
    """-> the sum of the losses of the P pairs of b, and for log.jsonl (2, 5): sums over these pairs, and their number

        margin, accuracy    reward of the chosen answer minus that of the rejected one; is it positive? reward: beta
                            times policy - reference, or times policy if the loss has no reference
        kl                  (policy - reference)^2 / 2 of an answer, mean of both: an estimate of the KL divergence, in
                            nats per answer (Schulman 2020, joschu.net/blog/kl-approx.html, k2)
        chosen, rejected    log p of the answers"""
    method = METHODS[s.loss]
    before = reference(model, b)                                                                       # (P, 2)
    log_p, lengths = (x.view(-1, 2) for x in sequence_log_probs(model, b.batch, 2 * len(b.keys)))      # (P, 2)
    before, unit = before.to(log_p.dtype), lengths if s.length_norm or method.per_token else 1
    losses = method.loss(log_p / unit, before / unit, s.beta, s.gamma)                                 # (P,)
    if weight := method.sft if s.sft < 0 else s.sft:
        losses = losses - weight * log_p[:, 0] / lengths[:, 0]
    log_p = log_p.detach()
    reward = s.beta * (log_p - before) / unit
    margin, kl = reward[:, 0] - reward[:, 1], (log_p - before).square().mean(1) / (2 if method.refers else torch.nan)
    facts = torch.stack([x.double().sum() for x in (margin, margin > 0, kl, log_p[:, 0], log_p[:, 1])])
    return losses.sum(), torch.stack([facts, torch.full_like(facts, len(log_p))])


def main(s):
    world, model, folder = preference.begin_preference(s)
    lrs = engine.choose(model, stage.training_table(s, who_prefers(s, model)), world.dtype, world.device)
    refers, form = METHODS[s.loss].refers, METHODS[s.loss].form
    run, reference, measured = preference.prepare_preference(s, world, model, folder, lrs, refers, form)
    pair_loss = partial(unpaired.unpaired_loss if s.loss == "kto" else preference_loss, s, reference)

    # ---- the loop: as in every stage, but a sum over pairs -----------------------------------------------------------
    model, optimizer, start, steps = run.model, run.optimizer, run.start, run.steps
    for step, batch in zip(range(start, steps), run.batches):
        lr = engine.set_lr(optimizer, step, steps, s.warmup)
        n, = world.sum([sum(len(b.keys) for b in batch.micro)])            # n: pairs of the step, all ranks
        batch = batch._replace(micro=measured(model, batch.micro))         # z0 of KTO; nothing for pairs
        total, facts = 0.0, 0.0
        for b in batch.micro:
            with engine.sync_gradients(model, enabled=b is batch.micro[-1]):
                with world.autocast():
                    loss, about = pair_loss(model, b.to(world.device))     # a sum over the pairs of b
                (loss * world.size / n).backward()                         # * world.size: DDP and FSDP divide by it
            total += loss.detach()
            facts = facts + about
        if step == start and batch.micro:                                  # batch.micro is [] if no sample is usable
            engine.check_gradients(model)
        result = engine.update(model, optimizer, total, n, world, s.grad_clip)

        run.log.count(step, batch, result | preference.means(facts, n, world))
        if step == start:
            run.folder.begin(start)
        if run.due(step, s.log_every):
            run.log.write(step, lr)
        if run.due(step, s.eval_every):
            run.validation.measure(step, model, pair_loss, run.log)
        if run.due(step, s.sample_every):
            run.validation.answers(step, model, run.log)
        stop, = world.sum([len(run.signals)])                              # has any rank received a signal to stop?
        if stop or run.due(step, s.save_every) or run.is_best(step):
            run.folder.save(step, model, optimizer, run.log)
        if stop:
            return stage.stopped(run, step, world)
    # ------------------------------------------------------------------------------------------------------------------
    return preference.finish_preference(run, s, world, folder)


if __name__ == "__main__":
    engine.run_script(main, Settings, __doc__)
