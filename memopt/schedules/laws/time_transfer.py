"""Time Transfer: how the critical batch grows with the tokens of a run."""

from memopt.errors import check_above_zero


def time_transfer(critical: float, tokens: float, new_tokens: float) -> float:
    """Returns the critical batch for another length of the run: in proportion to its tokens.

    **Weak evidence**, reported only and nowhere a default: the law of the batch rests on a single
    jump between two best batches, the paper was rejected (ICLR), and its version 2 dropped the laws
    of the learning rate in three regimes that version 1 had.

    Args:
        critical: The critical batch of a run of `tokens`.
        tokens: Its tokens.
        new_tokens: The tokens of the other run.

    Raises:
        ValueError: One is not above 0.

    References:
        Filatov et al., Time Transfer: On Optimal Learning Rate and Batch Size In The Infinite Data
        Limit, 2024, https://arxiv.org/abs/2410.05838.

    Example:
        >>> time_transfer(1e5, tokens=1e9, new_tokens=4e9)
        400000.0
    """
    for name, value in (("critical", critical), ("tokens", tokens), ("new_tokens", new_tokens)):
        check_above_zero(name, value)
    return critical * new_tokens / tokens
