"""Fits of laws of the loss to finished runs, with bootstrap intervals."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar

import numpy as np
from scipy.optimize import least_squares, nnls

from memopt.errors import check_above_zero, check_between
from memopt.schedules.laws.ranges import Ranges, warn_outside

Law = TypeVar("Law")  # maps sizes to a loss

#: Where the Huber loss of differences of logarithms becomes linear; Hoffmann et al. (2022).
DELTA = 1e-3

#: Starting points that are refined; the others are only ranked.
REFINED = 8


class Bootstrap(TypedDict, total=False):
    """Options of the intervals of a fit.

    Attributes:
        resamples: How often the runs are drawn anew, with replacement; by default 200.
        level: Probability of the intervals; by default 0.9.
        seed: Decides what is drawn; by default 0.
    """

    resamples: int
    level: float
    seed: int


class Prediction(NamedTuple):
    """A predicted loss with its bootstrap interval.

    Attributes:
        loss: By the law that fits all runs.
        low: The lower end of the interval.
        high: The upper end.
    """

    loss: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class LossFit(Generic[Law]):
    """A law of the loss that was fitted to runs.

    Attributes:
        law: The law that fits them.
        resampled: The laws that fit runs drawn from them with replacement.
        ranges: The lowest and highest value of each argument of the law in the runs.
        level: The probability of the intervals.
    """

    law: Law
    resampled: tuple[Law, ...]
    ranges: Ranges
    level: float

    def interval(self, quantity: Callable[[Law], float]) -> tuple[float, float]:
        """Returns the bootstrap interval of a quantity, between percentiles.

        It covers the noise of the runs, not that the form of the law may be wrong.

        Args:
            quantity: Maps a law to it, such as ``lambda law: law.alpha``.
        """
        values = [quantity(law) for law in self.resampled]
        low, high = np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)

    def predict(self, **point: float) -> Prediction:
        """Predicts the loss of a run.

        Args:
            **point: The arguments of the law, by name.

        Warns:
            OutsideRangeWarning: One is outside of those of the runs.
        """
        warn_outside("The fitted law", self.ranges, **point)
        loss: Callable[[Any], float] = lambda law: law(**point)
        return Prediction(loss(self.law), *self.interval(loss))


def fit_loss(
    make: Callable[[np.ndarray], Law],
    log_loss: Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray],
    starts: Callable[[Mapping[str, np.ndarray]], Iterable[np.ndarray]],
    runs: Mapping[str, Any],
    *,
    numbers: int,
    resamples: int = 200,
    level: float = 0.9,
    seed: int = 0,
) -> LossFit[Law]:
    """Fits a law by the Huber loss of the differences of logarithms.

    The papers minimise it by L-BFGS from a grid. Here, of a grid of exponents the best points are
    refined by SciPy's `least_squares`, which minimises the same function and needs no gradients.

    Args:
        make: Makes a law of the numbers that are fitted.
        log_loss: Maps these numbers and runs to the logarithms of their losses, (n,).
        starts: Returns numbers to start from, best first or not.
        runs: The arguments of the law and `loss`, (n,) each, by name.
        numbers: How many numbers are fitted; there must be more runs.
        resamples: See `Bootstrap`.
        level: See `Bootstrap`.
        seed: See `Bootstrap`.

    Raises:
        ValueError: There are too few runs, not as many of each, or values that are not above 0.
    """
    check_between("level", level, 0, 1)
    arrays = {name: np.asarray(values, float) for name, values in runs.items()}
    sizes = {name: len(x) for name, x in arrays.items()}
    if len({*sizes.values()}) != 1:
        raise ValueError(f"runs must have one value of each, got {sizes}.")
    n = sizes["loss"]
    if n <= numbers:
        raise ValueError(f"losses must be of more than {numbers} runs, got {n}.")
    for name, x in arrays.items():
        check_above_zero(name, float(np.min(x, where=~np.isnan(x), initial=math.inf)))
        if not np.isfinite(x).all():
            raise ValueError(f"{name} must be finite.")

    def refine(start: np.ndarray, runs: Mapping[str, np.ndarray], **loss: Any) -> Any:
        residuals = lambda x: log_loss(x, runs) - np.log(runs["loss"])
        return least_squares(residuals, start, x_scale="jac", **loss)

    def cost(start: np.ndarray) -> float:
        return float(np.abs(log_loss(start, arrays) - np.log(arrays["loss"])).sum())

    huber: Any = {"loss": "huber", "f_scale": DELTA}
    ranked = sorted(starts(arrays), key=cost)[:REFINED]
    squares = [refine(start, arrays).x for start in ranked]  # good, but for outliers
    refined = [refine(start, arrays, **huber) for start in (*ranked, *squares)]
    best = min(refined, key=lambda found: found.cost).x
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(n, size=n) for _ in range(resamples))
    again = (
        refine(best, {name: x[rows] for name, x in arrays.items()}, **huber).x for rows in drawn
    )
    ranges = {name: (float(x.min()), float(x.max())) for name, x in arrays.items()}
    del ranges["loss"]
    return LossFit(make(best), tuple(make(x) for x in again), ranges, level)


def heights(terms: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Returns the factors above 0 by which the columns of `terms` add up to about the losses.

    The rows are weighted so that relative errors count.

    Args:
        terms: (n, k), above 0.
        losses: (n,).
    """
    found, _ = nnls(terms / losses[:, None], np.ones_like(losses))
    return np.maximum(found, 1e-3 * losses.min() / terms.max(axis=0))
