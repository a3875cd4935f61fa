"""The training loss is a sum over supervised tokens. The training loop divides it by their number on all ranks."""

from kernels.cross_entropy import IGNORE, linear_cross_entropy


def supervised(labels):
    """labels (N,) -> number of supervised tokens in the packed sequence"""
    return int((labels != IGNORE).sum())


def token_loss(model, batch):
    """-> scalar: the sum of -log p(label) over the supervised tokens of the data.Batch"""
    return model(*batch, head=linear_cross_entropy)
