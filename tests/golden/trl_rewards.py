"""Makes trl/rewards.json: GRPO losses and gradients of trl (pip install trl), for log-probabilities of answer tokens.

    python tests/golden/trl_rewards.py      # trl's own function, on CPU, float64
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.trainer.grpo_trainer import GRPOTrainer

LENGTHS, T, LONGEST = [3, 1, 5, 2, 4], 5, 8


def case(normalise, low, high, kl):
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).double()
    now, old, reference = (-3 * torch.rand(len(LENGTHS), T, generator=g, dtype=torch.float64) * mask for _ in range(3))
    old, advantage = now + 0.4 * (old - now), torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0], dtype=torch.float64)
    now.requires_grad_()
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x,
                                  reduce=lambda x, **how: x)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **how: (now, now.detach(), None), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=kl,
        loss_type=normalise, epsilon_low=low, epsilon_high=high, use_vllm=False, max_completion_length=LONGEST,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None), model=SimpleNamespace(training=False),
        accelerator=accelerator, _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)))
    ids = mask.long()
    inputs = dict(prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=ids, advantages=advantage,
                  old_per_token_logps=old, ref_per_token_logps=reference, num_items_in_batch=mask.sum())
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    slope, = torch.autograd.grad(loss, now)
    flat = {name: x[mask > 0].tolist() for name, x in (("log_p", now), ("old", old), ("reference", reference),
                                                       ("gradient", slope))}
    return dict(normalise=normalise, clip_low=low, clip_high=high, kl=kl, advantage=advantage.tolist(),
                value=loss.item(), **flat)


if __name__ == "__main__":
    cases = [case("grpo", 0.2, 0.2, 0.04), case("dapo", 0.2, 0.28, 0.0), case("dr_grpo", 0.1, 0.3, 0.0)]
    made = dict(trl=trl.__version__, lengths=LENGTHS, longest=LONGEST, cases=cases)
    (Path(__file__).parent / "trl/rewards.json").write_text(json.dumps(made))
