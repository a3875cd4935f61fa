"""What is minimised. Losses are sums; engine.train_step divides once, by a count taken before the first backward."""


def token_loss(model, batch):
    """Summed cross-entropy over the supervised tokens of one packed stream (nats) -> scalar."""
    return model(*batch)
