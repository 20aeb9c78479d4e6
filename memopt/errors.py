"""Checks whose errors name the argument, the given value and what is allowed."""

import difflib
import inspect
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_choice(argument: str, given: Any, allowed: Iterable[Any]) -> None:
    """Raises unless `given` is one of `allowed`, and suggests the closest.

    Raises:
        ValueError: names the argument, the closest allowed value and all allowed values.

    Example:
        >>> check_choice("side", "rihgt", ["left", "right"])
        Traceback (most recent call last):
        ValueError: side 'rihgt' is unknown; did you mean 'right'? Allowed: left, right.
    """
    allowed = list(allowed)
    if given in allowed:
        return
    names = [str(x) for x in allowed]
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(given).lower(), lower, n=1)
    guess = f"; did you mean {lower[near[0]]!r}?" if near else "."
    raise ValueError(f"{argument} {given!r} is unknown{guess} Allowed: {', '.join(names)}.")


def check_at_least(argument: str, given: Any, least: float) -> None:
    """Raises if `given` is a number below `least`; traced values are not checked.

    Raises:
        ValueError: names the argument, the given value and the smallest allowed one.
    """
    if isinstance(given, numbers.Real) and not float(given) >= least:
        raise ValueError(f"{argument} must be at least {least}, got {given}.")


def check_above_zero(argument: str, given: Any) -> None:
    """Raises if `given` is a number that is not positive; traced values are not checked.

    Raises:
        ValueError: names the argument and the given value.
    """
    if isinstance(given, numbers.Real) and not float(given) > 0:
        raise ValueError(f"{argument} must be above 0, got {given}.")


def check_between(argument: str, given: Any, low: float, high: float) -> None:
    """Raises if `given` is a number that is not between two others; traced values are not checked.

    Raises:
        ValueError: names the argument, the two numbers and the given one.
    """
    if isinstance(given, numbers.Real) and not low < float(given) < high:
        raise ValueError(f"{argument} must be between {low} and {high}, got {given}.")


def check_given(argument: str, given: Any, what: str) -> None:
    """Raises unless an extra argument of an update is given.

    Raises:
        ValueError: names the argument, what it is, and how it is passed.

    Example:
        >>> check_given("value", None, "the loss")
        Traceback (most recent call last):
        ValueError: value, the loss, must be given: call update(updates, state, params, value=…).
    """
    if given is None:
        call = f"update(updates, state, params, {argument}=…)"
        raise ValueError(f"{argument}, {what}, must be given: call {call}.")


def check_static(argument: str, given: Any) -> None:
    """Raises unless an argument that decides shapes or the program is a number.

    Raises:
        TypeError: names the argument, and how `optax.inject_hyperparams` leaves it alone.
    """
    if not isinstance(given, numbers.Real):
        raise TypeError(
            f"{argument} must be a number, since shapes or the program depend on it, got {given}; "
            f"pass static_args={argument!r} to optax.inject_hyperparams."
        )


def check_precision(**given: Any) -> None:
    """Raises if a hyperparameter is an array of floats narrower than float32.

    Args:
        **given: the given values, of any kind.

    Raises:
        ValueError: names the argument and its dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> check_precision(b2=jnp.bfloat16(0.999))
        Traceback (most recent call last):
        ValueError: b2 must be float32 or wider, got bfloat16, which rounds decays; for ...
    """
    for name, value in given.items():
        dtype = getattr(value, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
            raise ValueError(
                f"{name} must be float32 or wider, got {dtype}, which rounds decays; for "
                "parameters in that dtype, pass hyperparam_dtype=jnp.float32 to "
                "optax.inject_hyperparams."
            )


def check_unused(function: Callable[..., Any], why: str, **given: Any) -> None:
    """Raises unless arguments without effect have their default values.

    Traced values are not checked.

    Args:
        function: the function that has these arguments.
        why: the reason why they have no effect.
        **given: the given values.

    Raises:
        ValueError: names the argument, why it has no effect, and the given value.

    Example:
        >>> def draw(seed=0): ...
        >>> check_unused(draw, "nothing is drawn", seed=3)
        Traceback (most recent call last):
        ValueError: seed must be left out, since nothing is drawn, got 3.
    """
    parameters = inspect.signature(function).parameters
    for name, value in given.items():
        try:  # NumPy, because under jit jnp would trace the comparison even of concrete values
            differs = bool(np.any(np.asarray(value) != parameters[name].default))
        except jax.errors.TracerArrayConversionError:
            continue
        if differs:
            raise ValueError(f"{name} must be left out, since {why}, got {value}.")


class IncompatiblePairingError(ValueError):
    """Raised if a projector, a recombination and a refresh rule cannot be combined."""
