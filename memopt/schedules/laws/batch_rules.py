"""Rules that scale hyperparameters when the batch changes."""

import math
from typing import NamedTuple

from memopt.errors import check_above_zero, check_between
from memopt.schedules.laws.ranges import warn_outside


class AdamSettings(NamedTuple):
    """Hyperparameters of Adam.

    Attributes:
        learning_rate: η.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
    """

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


def sqrt_rule(learning_rate: float, factor: float) -> float:
    """Returns SGD's learning rate for a batch that is `factor` times as large: η √factor.

    It keeps the covariance of the updates.

    Range: SGD, as Train longer derives it, on images. Doubts: others keep η/B instead, the linear
    rule, which follows from a stochastic differential equation and holds up to the critical batch;
    which is better depends on the task.

    Args:
        learning_rate: η.
        factor: The new batch divided by the old one.

    Raises:
        ValueError: The factor is not above 0.

    References:
        Hoffer et al., Train longer, generalize better, 2017, https://arxiv.org/abs/1705.08741;
        against it, Malladi et al., 2022, https://arxiv.org/abs/2205.10287, section 1.

    Example:
        >>> sqrt_rule(0.1, 4)
        0.2
    """
    check_above_zero("factor", factor)
    return learning_rate * math.sqrt(factor)


def adam_rule(settings: AdamSettings, factor: float) -> AdamSettings:
    """Returns Adam's settings for a batch that is `factor` times as large: the same run by tokens.

    η √k, 1 − β → k (1 − β) for both decays, ε / √k, with k the factor.

    Range: batches well below the critical batch, where noise dominates the gradient; the last rule
    of k (1 − β) < 1 is a hard limit, at which the decays are 0. Steps must be many in the averages'
    memory. The weight decay of AdamW, which is multiplied by η, is not part of the theory; to keep
    its effect a token, multiply it by √k too.

    Args:
        settings: The settings that are known to be good.
        factor: k, the new batch divided by the old one.

    Warns:
        OutsideRangeWarning: k is above 0.1 / (1 − β1), so that the new β1 is below 0.9.

    Raises:
        ValueError: k is not above 0, or so large that a decay would not stay above 0.

    References:
        Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, 2022,
        https://arxiv.org/abs/2205.10287, definition 5.3; the same for a batch divided by k in
        Hilton et al., Batch size-invariance for policy optimization, 2021,
        https://arxiv.org/abs/2110.00641, without ε.

    Example:
        >>> found = adam_rule(AdamSettings(1e-3, b1=0.9, b2=0.999, eps=1e-8), 1 / 4)
        >>> [round(x, 10) for x in found]
        [0.0005, 0.975, 0.99975, 2e-08]
    """
    check_above_zero("factor", factor)
    rate, b1, b2, eps = settings
    decays = {name: 1 - factor * (1 - b) for name, b in (("b1", b1), ("b2", b2))}
    for name, new in decays.items():
        check_between(f"{name} for a batch {factor:g} times as large", new, 0, 1)
    root = math.sqrt(factor)
    warn_outside("Adam's batch-size invariance", {"b1": (0.9, 1)}, b1=round(decays["b1"], 12))
    return AdamSettings(rate * root, eps=eps / root, **decays)
