"""Ranges in which laws were fitted or derived, and the warning outside of them."""

import warnings
from collections.abc import Mapping

#: The lowest and the highest value of each quantity by name.
Ranges = Mapping[str, tuple[float, float]]


class OutsideRangeWarning(UserWarning):
    """Warns that a law is used where nobody has checked it."""


def outside(ranges: Ranges, **given: float) -> list[str]:
    """Says which quantities are outside of a law's range.

    Args:
        ranges: The range of each quantity, ends included.
        **given: Their values.

    Example:
        >>> outside({"tokens": (2e9, 1e11)}, tokens=1e6)
        ['tokens=1e+06 is not from 2e+09 to 1e+11']
    """
    return [
        f"{name}={given[name]:.3g} is not from {low:.3g} to {high:.3g}"
        for name, (low, high) in ranges.items()
        if not low <= given[name] <= high
    ]


def warn_outside(law: str, ranges: Ranges, **given: float) -> None:
    """Warns if a quantity is outside of a law's range.

    Args:
        law: The law's name.
        ranges: As in `outside`.
        **given: As in `outside`.
    """
    if found := outside(ranges, **given):
        message = f"{law} is used outside of its range: {'; '.join(found)}."
        warnings.warn(message, OutsideRangeWarning, stacklevel=3)
