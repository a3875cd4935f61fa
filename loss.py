"""What is minimised. A loss is a sum over supervised tokens; the loop divides it once by their count over all ranks."""

from kernels.cross_entropy import IGNORE, linear_cross_entropy


def supervised(labels):
    """labels (N,): -> how many tokens of the packed sequence are supervised"""
    return int((labels != IGNORE).sum())


def token_loss(model, batch):
    """-> () sum of -log p(label) over the supervised tokens of a Batch"""
    return model(*batch, head=linear_cross_entropy)
