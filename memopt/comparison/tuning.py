"""Tuning: coordinate descent over the learning rate and options, with a fixed number of runs."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

#: The learning rate moves away from its start by at most so many factors of two.
LARGEST_MOVE = 12


class Point(NamedTuple):
    """A setting of an optimizer.

    Attributes:
        rate: Logarithm of the learning rate to base 2.
        choices: For each option that is tuned, the index of its value.
    """

    rate: float
    choices: tuple[int, ...] = ()

    @property
    def learning_rate(self) -> float:
        """The highest learning rate."""
        return 2.0**self.rate


class _SpentError(Exception):
    """All runs are used up."""


def tune(
    loss: Callable[[Point], float], start: float, options: Sequence[int] = (), *, runs: int
) -> tuple[Point, dict[Point, float]]:
    """Finds a setting of low loss, with the same number of runs for every optimizer.

    The learning rate is tried on a grid of powers of two, until the best of them has a worse one on
    either side; then the other values of each option at that rate; again from there, until nothing
    improves. Runs that are left refine the rate by half powers of two. When all runs are used up
    and the best rate is the lowest or the highest one tried, the grid grows further.

    Args:
        loss: Trains with a setting and returns the loss, infinite for a run that diverged. It is
            called once for each setting, and must answer alike whenever the search is repeated.
        start: Logarithm to base 2 of the first learning rate.
        options: For each option, how many values it has; it starts with the first.
        runs: How many settings to try.

    Returns:
        The best setting, and the losses of all that were tried, in this order.

    Example:
        >>> best, tried = tune(lambda p: (p.rate + 9) ** 2, start=-7, runs=6)
        >>> best.rate, [point.rate for point in tried]
        (-9, [-7, -8, -9, -10, -9.5, -8.5])
    """
    tried: dict[Point, float] = {}

    def attempt(point: Point, *, beyond: bool = False) -> None:
        if point not in tried:
            if len(tried) >= runs and not beyond:
                raise _SpentError
            tried[point] = loss(point)

    def best() -> Point:
        """The first of the lowest loss; if all have diverged, that of the lowest rate."""
        return min(tried, key=lambda p: (tried[p], p.rate if math.isinf(tried[p]) else 0))

    try:
        attempt(Point(start, (0,) * len(options)))
        _descend(attempt, best, options)
        while True:
            _refine(attempt, best(), tried)
    except _SpentError:
        pass
    while (rate := _beyond(best(), tried)) is not None and abs(rate - start) <= LARGEST_MOVE:
        attempt(best()._replace(rate=rate), beyond=True)
    return best(), tried


def _descend(
    attempt: Callable[[Point], None], best: Callable[[], Point], options: Sequence[int]
) -> None:
    """Moves along one coordinate after another until none improves."""
    before = None
    while before != best():
        before = best()
        near = None
        while near != best():
            near = best()
            for step in (-1, 1):
                attempt(near._replace(rate=near.rate + step))
                if best() != near:
                    break
        for option, count in enumerate(options):
            at = best()
            for value in range(count):
                choices = (*at.choices[:option], value, *at.choices[option + 1 :])
                attempt(at._replace(choices=choices))


def _refine(attempt: Callable[[Point], None], best: Point, tried: Mapping[Point, float]) -> None:
    """Tries the nearest learning rate that was not, in steps of half a power of two."""
    steps = (sign * n / 2 for n in itertools.count(1) for sign in (-1, 1))
    attempt(next(p for step in steps if (p := best._replace(rate=best.rate + step)) not in tried))


def _beyond(best: Point, tried: Mapping[Point, float]) -> float | None:
    """The next rate outside of those tried, if the best is at their end; None if it is inside."""
    rates = [point.rate for point in tried]
    if best.rate == min(rates):
        return best.rate - 1
    return best.rate + 1 if best.rate == max(rates) else None
