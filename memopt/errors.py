"""One-sentence errors that name the argument, what was given and what is allowed."""

import difflib
import numbers
from collections.abc import Iterable
from typing import Any


def check_choice(argument: str, given: Any, allowed: Iterable[Any]) -> None:
    """Raises unless `given` is one of `allowed`, suggesting the nearest.

    Raises:
      ValueError: naming the argument, the nearest allowed value and all of them.

    Example:
      >>> check_choice("side", "rihgt", ["left", "right"])
      Traceback (most recent call last):
      ValueError: side 'rihgt' is unknown; did you mean 'right'? Allowed: left, right.
    """
    allowed = list(allowed)
    if given in allowed:
        return
    names = [str(x) for x in allowed]
    near = difflib.get_close_matches(str(given), names, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"{argument} {given!r} is unknown{guess} Allowed: {', '.join(names)}.")


def check_at_least(argument: str, given: Any, least: float) -> None:
    """Raises if `given` is a number below `least`; a traced value passes.

    Raises:
      ValueError: naming the argument, the value given and the least allowed.
    """
    if isinstance(given, numbers.Real) and not float(given) >= least:
        raise ValueError(f"{argument} must be at least {least}, got {given}.")


class NoSuchPairing(ValueError):
    """A projector, a recombination and a rule for refreshes that make no sense together."""
