"""Placeholder with token_logps alone, until the rest of scoring arrives."""


def token_logps(logps, batch, temperature=1.0, with_entropy=False):
    """log p(x_t | x_<t) in nats of every target in the batch, (B, T-1) fp32, 0 elsewhere."""
    def inputs(x):
        return None if x is None else x[:, :-1]

    all_scored = batch.n_targets == batch.n_tokens
    return logps(batch.tokens[:, :-1], batch.tokens[:, 1:],
                 loss_mask=None if all_scored else batch.loss_mask[:, 1:],
                 documents=inputs(batch.documents), positions=inputs(batch.positions),
                 temperature=temperature, with_entropy=with_entropy)
