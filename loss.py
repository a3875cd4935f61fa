"""The training loss is a weighted sum over supervised tokens. The training loop divides it by the sum of their weights
on all ranks. Usually every weight is 1: then the loss of a step is the mean over its supervised tokens."""

import torch
import torch.nn.functional as F

from kernels.cross_entropy import IGNORE, linear_cross_entropy


def supervised(labels):
    """labels (N,) -> number of supervised tokens in the packed sequence"""
    return int((labels != IGNORE).sum())


def total_weight(batch):
    """-> sum of the weights of the supervised tokens of a data.Batch: their number, if every weight is 1"""
    return float(batch.weights.double().sum()) if len(batch.weights) else supervised(batch.labels)


def token_loss(model, batch):
    """-> scalar: the sum of -weight * log p(label) over the supervised tokens of the data.Batch"""
    return model(*batch, head=linear_cross_entropy)


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
