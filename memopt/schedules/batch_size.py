"""Schedules of the batch size, by name."""

from collections.abc import Callable

from memopt.choices import Choice
from memopt.errors import check_at_least, check_choice

#: Maps how many batches of the data are used up to how many of them the next step takes.
BatchSchedule = Callable[[int], int]


def ramp(first: int, last: int, length: int) -> BatchSchedule:
    """Grows linearly, rounded down."""
    return lambda used: first + (last - first) * min(used, length) // length


def doubling(first: int, last: int, length: int) -> BatchSchedule:
    """Doubles after equal parts of the length, the last time at its end."""
    doublings = ((last - 1) // first).bit_length()
    return lambda used: min(last, first << min(used, length) * doublings // length)


BATCH_SHAPES: dict[str, Choice] = {
    "ramp": Choice(
        ramp,
        "small batches suffice early, when gradients agree; each new size is compiled for",
        "GPT-3, 2020, https://arxiv.org/abs/2005.14165, appendix B",
    ),
    "doubling": Choice(
        doubling,
        "as ramp, with few sizes to compile for",
        "Smith et al., 2018, https://arxiv.org/abs/1711.00489, with a factor of 2",
    ),
}
"""Every schedule of the batch size by name: functions of first, last and length."""


def batch_names() -> tuple[str, ...]:
    """Returns the names that `batch_schedule` knows.

    Example:
        >>> batch_names()
        ('ramp', 'doubling')
    """
    return tuple(BATCH_SHAPES)


def batch_schedule(name: str, first: int, last: int, length: int) -> BatchSchedule:
    """Makes a schedule by which a step takes more and more batches of the data.

    Args:
        name: one of `batch_names()`: "ramp" grows linearly, "doubling" doubles.
        first: how many batches a step takes at the beginning.
        last: how many it takes from `length` on.
        length: how many batches are used up until then.

    Returns:
        A function that maps how many batches are used up to how many the next step takes; both are
        whole numbers.

    Raises:
        ValueError: the name is unknown, or a number is too small.

    Example:
        >>> grow = batch_schedule("ramp", 1, 5, 100)
        >>> [grow(used) for used in (0, 24, 25, 99, 100, 1000)]
        [1, 1, 2, 4, 5, 5]
        >>> grow = batch_schedule("doubling", 1, 8, 90)
        >>> [grow(used) for used in (0, 29, 30, 60, 90)]
        [1, 1, 2, 4, 8]
    """
    check_choice("batch schedule", name, BATCH_SHAPES)
    for argument, given, least in (
        ("first", first, 1),
        ("last", last, first),
        ("length", length, 1),
    ):
        if not isinstance(given, int):
            raise ValueError(f"{argument} must be a whole number, got {given!r}.")
        check_at_least(argument, given, least)
    return BATCH_SHAPES[name].make(first, last, length)
