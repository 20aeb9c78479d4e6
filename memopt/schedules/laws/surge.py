"""Surge: the best learning rate of sign-like optimizers, by batch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memopt.errors import check_above_zero
from memopt.schedules.laws.ranges import warn_outside


class NoiseBatchFit(NamedTuple):
    """A line through steps and examples to a target.

    Attributes:
        noise_batch: B_n, in what the examples are counted in.
        fewest_steps: S_min, the steps with batches of any size.
    """

    noise_batch: float
    fewest_steps: float


def surge(batch: float, noise_batch: float, peak: float) -> float:
    """Returns the best learning rate for a batch: peak / (½ (√(B_n/B) + √(B/B_n))).

    It rises as √B for small batches, is the peak at B_n, and falls again.

    Range: Theorem 3 holds for B ≪ πσ²/2µ², µ and σ the mean and the deviation of an example's
    gradient. From B_n alone this cannot be checked; above it the fall is warned of, since for large
    batches Theorem 4 has a constant above zero instead, `surge_limit`.

    Doubts: derived for updates by the sign of the gradient, checked with Adam. B_n grows as the
    loss falls, so that one learning rate does not stay the best.

    Args:
        batch: B, in tokens for language models, or in rows if B_n is too.
        noise_batch: B_n, from `fit_noise_batch` or `noise_scale`.
        peak: The highest of the best learning rates, from `surge_peak`.

    Warns:
        OutsideRangeWarning: B is above B_n.

    Raises:
        ValueError: One is not above 0.

    References:
        Li et al., Surge Phenomenon in Optimal Learning Rate and Batch Size Scaling, 2024,
        https://arxiv.org/abs/2405.14578, theorem 3.

    Example:
        >>> surge(25, 100, peak=1e-3), surge(100, 100, peak=1e-3)
        (0.0008, 0.001)
    """
    for name, value in (("batch", batch), ("noise_batch", noise_batch), ("peak", peak)):
        check_above_zero(name, value)
    warn_outside("The surge law", {"batch": (0, noise_batch)}, batch=batch)
    return peak / _balance(batch, noise_batch)


def surge_peak(batches: Sequence[float], rates: Sequence[float], noise_batch: float) -> float:
    """Returns the peak for `surge`: the mean of η · ½ (√(B_n/B) + √(B/B_n)).

    Args:
        batches: Batches, above 0.
        rates: The best learning rate of each.
        noise_batch: B_n.

    Raises:
        ValueError: There are none, not as many of both, or B_n or a batch is not above 0.

    References:
        As `surge`.

    Example:
        >>> surge_peak([25, 400], [8e-4, 8e-4], noise_batch=100)
        0.001
    """
    if len(batches) != len(rates) or not batches:
        raise ValueError(
            f"rates must be one for each of at least 1 batches, got {len(rates)} of {len(batches)}."
        )
    for name, value in (("noise_batch", noise_batch), *(("batches", x) for x in batches)):
        check_above_zero(name, value)
    each = (rate * _balance(b, noise_batch) for b, rate in zip(batches, rates, strict=True))
    return math.fsum(each) / len(batches)


def surge_limit(gradient: np.ndarray, hessian: np.ndarray) -> float:
    """Returns the best learning rate with large batches: Σ|µ_i| / ΣΣ sign µ_i sign µ_j H_ij.

    Range: Theorem 4, for B ≫ πσ²/2µ². Late in training it is more likely to be above the peak of
    Theorem 3.

    Args:
        gradient: µ, the true gradient, (n,).
        hessian: H, (n, n).

    Raises:
        ValueError: The loss does not curve up along the signs, so that no step is the best.

    References:
        As `surge`, theorem 4.

    Example:
        >>> surge_limit(np.array([1.0, -3.0]), np.diag([2.0, 2.0]))
        1.0
    """
    signs = np.sign(gradient)
    curvature = float(signs @ hessian @ signs)
    check_above_zero("the curvature along the signs", curvature)
    return float(np.abs(gradient).sum()) / curvature


def fit_noise_batch(steps: Sequence[float], examples: Sequence[float]) -> NoiseBatchFit:
    """Fits B_n to runs with several batches to the same loss: 1/S = −B_n/E + 1/S_min.

    The line is fitted by least squares.

    Range: each run at the best learning rate of its batch, all to one target; B_n is that of about
    this loss.

    Args:
        steps: S, steps of each run to the target.
        examples: E, examples it saw until then: steps times batch. In tokens, B_n is in tokens.

    Raises:
        ValueError: There are not two different runs, or they lie on no such line, since more
            examples did not go with fewer steps.

    References:
        As `surge`, with the line of McCandlish et al., 2018, https://arxiv.org/abs/1812.06162.

    Example:
        >>> found = fit_noise_batch([1100, 200, 110], [11_000, 20_000, 110_000])
        >>> round(found.noise_batch), round(found.fewest_steps)
        (100, 100)
    """
    if len(steps) != len(examples) or len({*examples}) < 2:
        raise ValueError(
            f"examples must be of two different runs or more, with steps for each, got "
            f"{len(examples)} examples and {len(steps)} steps."
        )
    for x in (*steps, *examples):
        check_above_zero("steps and examples", x)
    slope, top = np.polyfit(1 / np.asarray(examples, float), 1 / np.asarray(steps, float), 1)
    if not (slope < 0 < top):
        raise ValueError(
            f"steps must fall as examples grow, got a line of slope {slope:.3g} through "
            "(1/examples, 1/steps): give runs to one target, each at the best rate of its batch."
        )
    return NoiseBatchFit(float(-slope), float(1 / top))


def _balance(batch: float, noise_batch: float) -> float:
    ratio = math.sqrt(batch / noise_batch)
    return (1 / ratio + ratio) / 2
