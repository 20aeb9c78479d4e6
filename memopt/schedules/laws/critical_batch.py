"""Critical batch by the loss."""

from memopt.errors import check_above_zero

#: Losses at which Kaplan et al. measured it, read off their figure 10.
CRITICAL_BATCH_RANGES = {"loss": (3.0, 10.0)}


def critical_batch(loss: float, scale: float = 2e8, alpha: float = 0.21) -> float:
    """Returns the critical batch in tokens at a loss: B* / L^(1/α).

    With it, a run takes twice the fewest steps and twice the fewest tokens to that loss. It depends
    on the loss, not on the model's size.

    Range: the default constants are Kaplan et al.'s, for training losses on WebText2 in their 50257
    tokens, measured from about 3 to 10 nats a token, with models of 3M and 85M parameters; a loss
    per byte, or of other tokens, needs constants of its own, from `fit_steps_law`.

    Doubts: the constants are quoted without having been recomputed. The authors write B* ≈ 2e8 in
    the text, and 2.1e8 in figure 10 and table 5; they are "not especially confident" far outside
    of their losses. At a loss of 3, other α from 0.2 to 0.22 change the batch by a third each way.

    Args:
        loss: L, in nats a token.
        scale: B*, in tokens.
        alpha: α.

    Raises:
        ValueError: One is not above 0.

    References:
        Kaplan et al., Scaling Laws for Neural Language Models, 2020,
        https://arxiv.org/abs/2001.08361, section 5.1, equation 5.3.

    Example:
        >>> f"{critical_batch(3.0):.2g}"
        '1.1e+06'
    """
    for name, value in (("loss", loss), ("scale", scale), ("alpha", alpha)):
        check_above_zero(name, value)
    return scale / loss ** (1 / alpha)
