"""Forecasts of losses by a falling exponential, as AutoLRS makes them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.interpolate import UnivariateSpline
from scipy.optimize import least_squares

#: Rounds in which outliers of training losses are dropped, and the share of losses in each.
ROUNDS, SHARE = 10, 0.03

#: The exponential's decay between the first and the last loss, |b| times their distance: at least
#: nearly a straight line, at most a fall between two of a hundred losses.
DECAYS = 0.01, 100.0

#: Decays that are tried, evenly spaced on a logarithmic scale, before the best one is refined.
TRIED = 41


class Exponential(NamedTuple):
    """The curve L(t) = a·e^(bt) + c with b < 0, which approaches c.

    Attributes:
        a: its height above c at t = 0; below 0, it rises.
        b: how fast it approaches c.
        c: its limit.
    """

    a: float
    b: float
    c: float

    def __call__(self, step: float) -> float:
        """Returns L at a step."""
        return self.a * math.exp(self.b * step) + self.c


def forecast(
    steps: Sequence[float], losses: Sequence[float], at: float, *, validation: bool = False
) -> float:
    """Forecasts a loss from those of the first steps.

    Outliers are dropped, see `drop_outliers`, and an exponential is fitted to the other losses. The
    authors' code fits it to a spline through them, which is a parabola unless losses are large, and
    then not exact for losses that do follow an exponential. Once it compares validation losses, it
    takes the last of them in place of the forecast if one is not below the loss at which the first
    search began; that is left out here.

    A forecast ten times as far ahead as the losses reach is good to about their noise if the curve
    flattens within them.
    Otherwise its error may be many times their noise.

    Args:
        steps: the steps of the losses, increasing.
        losses: at least 4.
        at: the step whose loss is forecast.
        validation: whether they are validation losses, which are fewer and less noisy.

    Returns:
        The forecast; NaN if a loss is not finite.

    Raises:
        ValueError: if there are fewer than 4 losses, all finite, or not as many as steps.

    References:
        Jin et al., AutoLRS, 2021, https://arxiv.org/abs/2105.10762, and their code.

    Example:
        >>> steps = range(1, 101)
        >>> round(forecast(steps, [2 * 0.98**t + 3 for t in steps], at=1000), 6)
        3.0
        >>> forecast(steps, [math.nan] * 100, at=1000)
        nan
    """
    x, y = np.asarray(steps, float), np.asarray(losses, float)
    if not np.isfinite(y).all():
        return math.nan
    if len(x) != len(y) or len(y) < 4:
        raise ValueError(f"losses must be at least 4, one a step, got {len(y)} of {len(x)} steps.")
    return fit_exponential(*drop_outliers(x, y, validation=validation))(at)


def drop_outliers(
    steps: np.ndarray, losses: np.ndarray, *, validation: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Drops losses in the first half of the steps that are far from a spline of degree 2.

    Degree, rounds, share and the rule for validation losses are those of the authors' code.

    Args:
        steps: the steps, (n,), increasing.
        losses: the losses, (n,), with n ≥ 4.
        validation: whether one loss is dropped, once; otherwise, 3% are in each of 10 rounds.

    Returns:
        The remaining steps and losses. Of those that are dropped in a round, the ones in the second
        half stay.
    """
    middle = steps[(len(steps) - 1) // 2]
    for _ in range(1 if validation else ROUNDS):
        dropped = 1 if validation else round(SHARE * len(steps))
        distance = np.abs(losses - UnivariateSpline(steps, losses, k=2)(steps))
        keep = (np.argsort(np.argsort(distance)) < len(steps) - dropped) | (steps > middle)
        steps, losses = steps[keep], losses[keep]
    return steps, losses


def fit_exponential(steps: np.ndarray, losses: np.ndarray) -> Exponential:
    """Fits an exponential by least squares.

    For each b, a and c are the solution of a linear problem, so that only b is searched: in a grid,
    and from its best point by SciPy.

    Args:
        steps: the steps, (n,), increasing.
        losses: the losses, (n,), finite, with n ≥ 3.
    """
    first, length = steps[0], steps[-1] - steps[0]

    def solve(logarithm: float) -> tuple[np.ndarray, np.ndarray]:
        decaying = np.exp(-math.exp(logarithm) * (steps - first) / length)
        matrix = np.stack([decaying, np.ones_like(decaying)], axis=1)
        solution = np.linalg.lstsq(matrix, losses, rcond=None)[0]
        return solution, matrix @ solution - losses

    grid = np.log(np.geomspace(*DECAYS, TRIED))
    best = min(grid, key=lambda logarithm: np.square(solve(logarithm)[1]).sum())
    found = least_squares(
        lambda x: solve(x[0])[1],
        np.clip(best, grid[0] + 1e-6, grid[-1] - 1e-6),
        bounds=(grid[0], grid[-1]),
        **dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15),
    )
    logarithm = float(found.x[0])
    (a, c), _ = solve(logarithm)
    b = -math.exp(logarithm) / float(length)
    return Exponential(float(a) * math.exp(-b * float(first)), b, float(c))
