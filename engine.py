"""The verbs of training."""

import math


def lr_at(step, steps, warmup, lr, floor=0.0):
    """Learning rate of update `step` (0 .. steps - 1): a linear rise over `warmup` updates, then half a cosine down to floor * lr."""
    if step < warmup:
        return lr * (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t)))
