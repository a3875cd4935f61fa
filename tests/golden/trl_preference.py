"""Makes trl/preference.json and trl/kto.json: losses and gradients of trl (pip install trl), for log-probabilities of
answer tokens.

    python tests/golden/trl_preference.py      # trl's own functions, on CPU, float64 (ORPO: trl rounds to float32)
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer import dpo_trainer, kto_trainer

LENGTHS = [[1, 3], [5, 2], [4, 4], [2, 6]]         # tokens of the chosen and of the rejected answer
P, T = len(LENGTHS), 6


def tokens(seed):
    """(2 P, T): log p of the tokens of the chosen answers, then of the rejected ones; 0 behind an answer"""
    g = torch.Generator().manual_seed(seed)
    x = -3 * torch.rand(2 * P, T, generator=g, dtype=torch.float64)
    lengths = torch.tensor(LENGTHS).T.flatten()
    return x * (torch.arange(T) < lengths[:, None])


def outputs(x):
    return SimpleNamespace(log_probs=x, entropy=x, mean_logits=x, is_top1=x < 0)


def dpo(kind, beta, policy, reference):
    mask = torch.cat([torch.zeros(2 * P, 1), (policy != 0).double()], 1).long()
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x,
                                  unwrap_model=lambda m: m)
    trainer = SimpleNamespace(
        accelerator=accelerator, model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=False, ref_model=lambda **how: outputs(reference), f_divergence_type="reverse_kl",
        loss_types=[kind], loss_weights=[1.0], beta=beta, label_smoothing=0.0, use_weighting=False, _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    with patch.object(dpo_trainer, "disable_gradient_checkpointing", lambda *a: open("/dev/null")), \
            patch.object(dpo_trainer, "is_peft_model", lambda m: False):
        return dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **how: outputs(policy), inputs, False)


def case(ours, kind, beta, gamma, per_token):
    policy, reference = tokens(0).requires_grad_(), tokens(1)
    if kind in ("simpo", "orpo"):
        means = policy.sum(1) / (policy != 0).sum(1)
        trainer = SimpleNamespace(beta=beta, simpo_gamma=gamma, alpha=0.0, loss_type="simpo", label_smoothing=0.0,
                                  accelerator=SimpleNamespace(device="cpu"))
        loss = (CPOTrainer.cpo_loss(trainer, *means.chunk(2))[0] if kind == "simpo" else
                -ORPOTrainer.odds_ratio_loss(trainer, *means.chunk(2))[0]).mean()
    else:
        loss = dpo(kind, beta, policy, reference)
    slope, = torch.autograd.grad(loss, policy)
    # all tokens of an answer have the same gradient: (P, 2)
    return dict(loss=ours, beta=beta, gamma=gamma, length_norm=per_token, value=loss.item(),
                gradient=slope[:, 0].view(2, P).T.tolist())


def kto(beta, weights, shift):
    """2 P answers, of which the first P are desirable. The mismatched ones are more probable than the reference by
    `shift` per token"""
    policy, reference, other, before = (tokens(seed) for seed in (0, 1, 2, 3))
    policy.requires_grad_()
    mask = torch.cat([torch.zeros(2 * P, 1), (policy != 0).double()], 1).long()
    found = iter([other + shift * (other != 0), policy, before, reference])             # in the order of trl's passes

    def model(**how):
        return outputs(next(found))
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        accelerator=accelerator, model=SimpleNamespace(training=True), ref_model=model, aux_loss_enabled=False,
        precompute_ref_logps=False, calculate_KL=True, loss_type="kto", beta=beta, desirable_weight=weights[0],
        undesirable_weight=weights[1], _tp_size=1, args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0)
    trainer._compute_kl_logps = lambda model, batch: kto_trainer.KTOTrainer._compute_kl_logps(trainer, model, batch)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "KL_input_ids": mask,
              "KL_attention_mask": mask, "KL_completion_mask": mask,
              "label": torch.tensor([True] * P + [False] * P)}
    with patch.object(kto_trainer, "disable_gradient_checkpointing", lambda *a: open("/dev/null")), \
            patch.object(kto_trainer, "is_peft_model", lambda m: False):
        loss = kto_trainer.KTOTrainer._compute_loss(trainer, model, inputs, False)
    slope, = torch.autograd.grad(loss, policy)
    policy, reference, other, before = (x.detach().sum(1).tolist() for x in (
        policy, reference, other + shift * (other != 0), before))
    return dict(beta=beta, weights=weights, policy=policy, reference=reference, other=other, other_reference=before,
                value=loss.item(), gradient=slope[:, 0].tolist())


if __name__ == "__main__":
    cases = [case("dpo", "sigmoid", 0.1, 0.0, False), case("dpo", "sigmoid", 2.0, 0.0, False),
             case("dpo", "sigmoid_norm", 0.5, 0.0, True), case("ipo", "ipo", 0.3, 0.0, True),
             case("simpo", "simpo", 2.0, 1.4, True), case("orpo", "orpo", 0.7, 0.0, True)]
    sums = [x.sum(1).view(2, P).T.tolist() for x in (tokens(0), tokens(1))]
    made = dict(trl=trl.__version__, lengths=LENGTHS, policy=sums[0], reference=sums[1], cases=cases)
    (Path(__file__).parent / "trl/preference.json").write_text(json.dumps(made, indent=1))
    cases = [kto(0.1, [1.0, 1.0], 0.0), kto(0.5, [1.0, 1.33], 1.0), kto(2.0, [0.5, 1.0], -1.0)]
    made = dict(trl=trl.__version__, cases=cases)
    (Path(__file__).parent / "trl/kto.json").write_text(json.dumps(made, indent=1))
