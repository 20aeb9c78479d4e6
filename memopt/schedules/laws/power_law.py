"""Power scheduler: a learning rate that falls as a power of the tokens seen."""

from memopt.errors import check_above_zero
from memopt.schedules.laws.ranges import warn_outside
from memopt.schedules.shapes import POWER_A, POWER_B, power_rate

#: From the end of the paper's warm-up to the end of its longest run.
POWER_RANGES = {"tokens_seen": (1e9, 1.25e12)}


def power(
    tokens_seen: float,
    batch_sequences: float,
    *,
    a: float = POWER_A,
    b: float = POWER_B,
    peak: float = 0.02,
) -> float:
    """Returns the learning rate min(peak, batch · a · n^b), n the tokens already trained on.

    It is the law inside the schedule "power" (`memopt.schedules.schedule`), without its warm-up and
    its last decay.

    Range: `POWER_RANGES`, and the paper's µP only: the learning rates of internal matrices are
    divided by m, the growth of the width from 256, see the schedule's description. Without it 0.02
    is far too high.

    Doubts: the cap binds long, for the first 26B tokens with 1024 sequences. a = 4.6 in the paper
    is for another use, the best constant rate for a planned number of tokens.

    Args:
        tokens_seen: n.
        batch_sequences: Sequences of 4096 tokens in a batch.
        a: The factor.
        b: The exponent.
        peak: The cap.

    Warns:
        OutsideRangeWarning: n is outside of the range.

    Raises:
        ValueError: n or the batch is not above 0.

    References:
        Shen et al., Power Scheduler, 2024, https://arxiv.org/abs/2408.13359v2, equations 5 to 8.

    Example:
        >>> f"{power(1e12, 1024):.4f}"
        '0.0031'
    """
    check_above_zero("tokens_seen", tokens_seen)
    check_above_zero("batch_sequences", batch_sequences)
    warn_outside("The power law", POWER_RANGES, tokens_seen=tokens_seen)
    return min(peak, power_rate(tokens_seen, batch_sequences, a, b))
