"""The training loss is a weighted sum over supervised tokens. The training loop divides it by the sum of their weights
on all ranks. Usually every weight is 1: then the loss of a step is the mean over its supervised tokens."""

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
