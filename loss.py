"""The training loss is a weighted sum over supervised tokens. The training loop divides it by the sum of their weights
on all ranks. Usually every weight is 1: then the loss of a step is the mean over its supervised tokens."""

import torch
import torch.nn.functional as F

from kernels.cross_entropy import IGNORE, linear_cross_entropy, row_losses


def supervised(labels):
    """labels (N,) -> number of supervised tokens in the packed sequence"""
    return int((labels != IGNORE).sum())


def total_weight(batch):
    """-> sum of the weights of the supervised tokens of a data.Batch: their number, if every weight is 1"""
    return float(batch.weights.double().sum()) if len(batch.weights) else supervised(batch.labels)


def token_loss(model, batch):
    """-> scalar: the sum of -weight * log p(label) over the supervised tokens of the data.Batch"""
    return model(*batch, head=linear_cross_entropy)


def sequence_log_probs(model, batch, D):
    """data.Batch with D documents -> (D,) the sum of log p(label) over the supervised tokens of each document, and (D,)
    the number of these tokens. Only one chunk of logits exists at a time, in the forward and the backward pass."""
    losses = model(*batch, head=row_losses)                                                            # (R,)
    document = (batch.pos == 0).cumsum(0) - 1                              # (N,) a document begins at position 0
    document = document[batch.rows if len(batch.rows) else batch.labels != IGNORE]                     # (R,)
    zeros = losses.new_zeros(D)
    return zeros.index_add(0, document, -losses), zeros.index_add(0, document, torch.ones_like(losses))


# ---- preference: two answers to one question ------------------------------------------------------------------------
# policy, reference (P, 2): log p of the chosen and of the rejected answer of P pairs, under the trained model and under
# the model before training; with length normalisation, log p divided by the number of tokens. Each -> (P,)

def dpo_loss(policy, reference, beta, gamma):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7). gamma is not read.

        l = -log sigmoid(beta ((policy_c - reference_c) - (policy_r - reference_r)))"""
    gain = policy - reference
    return -F.logsigmoid(beta * (gain[:, 0] - gain[:, 1]))


def ipo_loss(policy, reference, beta, gamma):
    """IPO (Azar et al. 2023, arXiv 2310.12036, equation 17; their tau is beta). gamma is not read.

        l = ((policy_c - reference_c) - (policy_r - reference_r) - 1 / (2 beta))^2"""
    gain = policy - reference
    return (gain[:, 0] - gain[:, 1] - 1 / (2 * beta)).square()


def simpo_loss(policy, reference, beta, gamma):
    """SimPO (Meng et al. 2024, arXiv 2405.14734, equation 6), for log p per token. reference is not read.

        l = -log sigmoid(beta policy_c - beta policy_r - gamma)"""
    return -F.logsigmoid(beta * (policy[:, 0] - policy[:, 1]) - gamma)


def orpo_loss(policy, reference, beta, gamma):
    """ORPO (Hong et al. 2024, arXiv 2403.07691, equations 4, 6 and 7, without its SFT term; their lambda is beta), for
    log p per token. odds = p / (1 - p); p is at most 1 - 2^-20, so odds are finite. reference, gamma are not read.

        l = -beta log sigmoid(log odds_c - log odds_r)"""
    policy = policy.clamp(max=-(2.0**-20))
    odds = policy - torch.log(-torch.expm1(policy))                                                    # (P, 2)
    return -beta * F.logsigmoid(odds[:, 0] - odds[:, 1])


def kto_loss(policy, reference, zero, desirable, beta, weights):
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306, section 4), for P answers that stand alone: policy, reference, and
    is the answer desirable, each (P,). zero: max(0, mean of policy - reference) over answers to other questions, an
    estimate of the KL divergence; it has no gradient. weights: w of desirable and of undesirable answers. -> (P,)

        l = w (1 - sigmoid(beta (policy - reference - zero)))      desirable
        l = w (1 - sigmoid(beta (zero - policy + reference)))      undesirable"""
    gain = beta * (policy - reference - zero)
    return torch.where(desirable, weights[0] * torch.sigmoid(-gain), weights[1] * torch.sigmoid(gain))


# ---- rewards: several answers of the model to one question ----------------------------------------------------------

def group_advantages(rewards, scaled):
    """rewards (P, G) of G answers to each of P questions -> (P, G): how much better an answer is than its group.
    GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2) divides by the standard deviation of the group, plus 1e-4.
    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) does not (scaled=False). Equal rewards: all advantages are 0."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if scaled else centred


def clipped_loss(log_p, old, advantage, low, high):
    """PPO's clipped objective as GRPO uses it (arXiv 2402.03300, equation 3), for R tokens: log p now, log p when the
    answer was generated, advantage of the answer, each (R,). DAPO (Yu et al. 2025, arXiv 2503.14476, equation 10) has
    high > low. -> (R,)

        l = -min(r A, clip(r, 1 - low, 1 + high) A), r = exp(log_p - old)"""
    ratio = (log_p - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def kl_estimate(log_p, reference):
    """-> (R,) estimate of the KL divergence from the reference at generated tokens (arXiv 2402.03300, equation 4; k3 of
    Schulman 2020). It is never negative."""
    difference = reference - log_p
    return torch.expm1(difference) - difference


# ---- contrast: images and their texts -------------------------------------------------------------------------------

def clip_loss(image, text, scale):
    """CLIP (Radford et al. 2021, arXiv 2103.00020, figure 3), images and texts of n pairs: (n, E), vectors of length 1;
    scale (2,): t, its second entry is not read. -> (n,), whose mean is the symmetric cross-entropy:

        l_i = -1/2 log softmax_j(exp(t) x_i . y_j)[i] - 1/2 log softmax_j(exp(t) x_j . y_i)[i]"""
    logits = scale[0].exp() * image @ text.T                                                           # (n, n)
    return -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()) / 2


def siglip_loss(image, text, scale):
    """SigLIP (Zhai et al. 2023, arXiv 2303.15343, equation 1), as clip_loss; scale (2,): t and b. -> (n,), whose mean
    is the pairwise sigmoid loss. z_ij is 1 if i = j, else -1. As in the paper's algorithm 1, b is added to t x . y:

        l_i = -sum_j log sigmoid(z_ij (exp(t) x_i . y_j + b))"""
    logits = scale[0].exp() * image @ text.T + scale[1]                                                # (n, n)
    z = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(z * logits).sum(1)
