"""Critical batch by the loss."""

from memopt.errors import check_above_zero


def critical_batch(loss: float, scale: float = 2e8, alpha: float = 0.21) -> float:
    """Returns the critical batch in tokens at a loss: B* / L^(1/α).

    With it, a run takes twice the fewest steps and twice the fewest tokens to that loss. It depends
    on the loss, not on the model's size.

    Range: the default constants are Kaplan et al.'s, for WebText2 in their 50257 tokens and losses
    from about 2.5 to 7 nats a token; a loss per byte, or of other tokens, needs constants of its
    own, from `fit_step_loss`.

    Doubts: the constants are quoted without having been recomputed. At a loss of 3, other α from
    0.2 to 0.22 change the batch by a third each way.

    Args:
        loss: L, in nats a token.
        scale: B*, in tokens.
        alpha: α.

    Raises:
        ValueError: One is not above 0.

    References:
        Kaplan et al., Scaling Laws for Neural Language Models, 2020,
        https://arxiv.org/abs/2001.08361, section 5.1.

    Example:
        >>> f"{critical_batch(3.0):.2g}"
        '1.1e+06'
    """
    for name, value in (("loss", loss), ("scale", scale), ("alpha", alpha)):
        check_above_zero(name, value)
    return scale / loss ** (1 / alpha)
