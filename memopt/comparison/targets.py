"""The fewest steps to a target loss, with a schedule as long as each run."""

from collections.abc import Callable

from memopt.comparison.protocol import PIECES
from memopt.comparison.tuning import Point, tune

#: Lengths of runs lie a quarter of a factor of two apart, up to this factor from the first.
LENGTHS_PER_DOUBLING, LARGEST_FACTOR = 4, 16

#: Runs that retune the learning rate at each length: the last best, its half and its double.
RETUNING_RUNS = 3


def length(steps: int, index: int) -> int:
    """Returns the steps of a run, a multiple of 20.

    Example:
        >>> [length(400, index) for index in (-4, -1, 0, 1, 4)]
        [200, 340, 400, 480, 800]
    """
    return PIECES * max(1, round(steps * 2 ** (index / LENGTHS_PER_DOUBLING) / PIECES))


def fewest_steps(
    loss: Callable[[int, Point], float], steps: int, setting: Point, target: float
) -> tuple[int, Point] | None:
    """Finds the shortest run that comes to a loss, with the learning rate retuned at each length.

    The length is doubled or halved from the first until the target is reached by one and not by
    the other, and then bisected: longer runs are taken to come lower.

    Args:
        loss: Trains for so many steps with a setting and returns the loss at the end.
        steps: The first length.
        setting: The best setting at that length.
        target: The loss to reach.

    Returns:
        The length and its best setting; None if no run of up to 16 times the first length reaches
        the target.

    Example:
        >>> loss = lambda steps, point: 100 / steps + (point.rate + 9) ** 2
        >>> fewest_steps(loss, 400, Point(-9), target=0.4)
        (280, Point(rate=-9, choices=()))
    """
    best = {0: setting}

    def reaches(index: int) -> bool:
        at = length(steps, index)
        near = best[min(best, key=lambda other: abs(other - index))]
        found, tried = tune(
            lambda point: loss(at, near._replace(rate=point.rate)), near.rate, runs=RETUNING_RUNS
        )
        best[index] = near._replace(rate=found.rate)
        return tried[found] <= target

    up = not reaches(0)
    low = high = 0
    jump = LENGTHS_PER_DOUBLING if up else -LENGTHS_PER_DOUBLING
    while True:
        last, at = (high, high + jump) if up else (low, low + jump)
        if up and length(steps, at) > LARGEST_FACTOR * steps:
            return None
        if not up and length(steps, at) == length(steps, last):
            return length(steps, last), best[last]
        low, high = (last, at) if up else (at, last)
        if reaches(at) == up:
            break
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return length(steps, high), best[high]
