"""Schedules of the learning rate, by name."""

import math
import numbers
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memopt import renamed
from memopt.errors import check_at_least, check_choice
from memopt.schedules.shapes import SHAPES, Span, as_length, warn_without_effect


def names() -> tuple[str, ...]:
    """Returns the names that `schedule` knows.

    Example:
        >>> names()[:3]
        ('constant', 'linear', 'cosine')
    """
    return tuple(SHAPES)


@renamed.keywords(peak_value="peak")
def schedule(
    name: str,
    peak: float,
    steps: int,
    *,
    init_value: float = 0.0,
    warmup_steps: int = 0,
    end_value: float | None = None,
    **options: Any,
) -> optax.Schedule:
    """A linear warm-up to the peak, then a named shape.

    Args:
        name: one of `names()`; `memopt schedules` lists them.
        peak: the highest learning rate, reached after the warm-up.
        steps: length of the whole schedule, in steps or in tokens.
        init_value: the learning rate at the beginning of the warm-up.
        warmup_steps: length of the warm-up.
        end_value: the learning rate at `steps` and after; by default 0, or the share of the peak in
            `memopt.schedules.SHAPES`. "constant", "inverse_sqrt" and "power" do not use it.
        **options: those of the shape, which `memopt schedules NAME` lists, such as `decay_steps` of
            "wsd".

    Returns:
        A function of the step count, as Optax's schedules are. The count is an integer or a float,
        or an array of them, at which the function is differentiable almost everywhere.

    Raises:
        ValueError: the name or an option is unknown, a rate is below 0, or the parts are longer
            than the whole.

    Warns:
      UserWarning: a part of the schedule has so few steps that no step is trained with it.

    Example:
        >>> rate = schedule("wsd", 1e-2, 100, warmup_steps=10, decay_steps=20)
        >>> [round(float(rate(t)), 4) for t in (0, 5, 10, 80, 90, 100)]
        [0.0, 0.005, 0.01, 0.01, 0.005, 0.0]
        >>> schedule("wsd", 1e-2, 100, decay=20)
        Traceback (most recent call last):
        ValueError: option of wsd: 'decay' is unknown; did you mean 'decay_steps'? Allowed: ...
    """
    check_choice("schedule", name, SHAPES)
    shape = SHAPES[name]
    _check_options(name, options)
    for argument, given in (("peak", peak), ("init_value", init_value), ("end_value", end_value)):
        _check_finite(argument, given)
        check_at_least(argument, given, 0)
    check_at_least("steps", steps, 1)
    check_at_least("warmup_steps", warmup_steps, 0)
    if warmup_steps >= steps:
        raise ValueError(f"warmup_steps={warmup_steps} must leave room in steps={steps}.")
    if end_value is None:
        end_value = (shape.end or 0.0) * peak
    span = Span(peak, end_value, as_length(steps), as_length(warmup_steps))
    if warmup_steps and span.rest < 2 and not shape.extends:
        warn_without_effect(f"a fall after warmup_steps={warmup_steps} of steps={steps}")
    made = shape.make(span, **options)
    after = lambda count: made(jnp.clip(count, 0, span.rest))
    top = peak if shape.starts_at_peak else after(0)
    warmup = optax.linear_schedule(init_value, top, span.warmup_steps)
    joined = optax.join_schedules([warmup, after], [span.warmup_steps])

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        value = joined(_in_range(count))
        return jnp.where(value < 0, 0.0, value)  # compiled, an end of 0 may be rounded to below 0

    return rate


def in_steps(tokens_schedule: optax.Schedule, tokens_per_step: int) -> optax.Schedule:
    """Turns a schedule of tokens into one of steps.

    Tokens are counted in floats, which are exact up to 2^24 and right to 7 digits beyond.

    Args:
        tokens_schedule: a function of the number of tokens trained on.
        tokens_per_step: tokens of a batch.

    Raises:
        ValueError: `tokens_per_step` is below 1.

    Example:
        >>> by_tokens = schedule("linear", 1.0, 2**40)
        >>> rate = in_steps(by_tokens, 2**20)
        >>> [float(rate(step)) for step in (0, 2**18, 2**19, 2**20)]
        [1.0, 0.75, 0.5, 0.0]
    """
    check_at_least("tokens_per_step", tokens_per_step, 1)
    return lambda count: tokens_schedule(float(tokens_per_step) * count)


def _in_range(count: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """A count that JAX does not wrap around: Python's and NumPy's integers are longer than its."""
    if isinstance(count, int | np.integer | np.ndarray) and np.any(np.abs(count) >= 2**31):
        return np.asarray(count, np.float32)
    return count


def _check_finite(name: str, value: Any) -> None:
    """Raises if a number that is not traced is infinite or not a number."""
    if isinstance(value, numbers.Real) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Raises if an option is unknown, or no number, or no whole one, where one belongs."""
    defaults = SHAPES[name].defaults
    types = get_type_hints(SHAPES[name].make)
    for option, value in options.items():
        if not defaults:
            raise ValueError(f"schedule {name!r} has no options, got {option}={value}.")
        check_choice(f"option of {name}:", option, defaults)
        default = defaults[option]
        if isinstance(default, str | bool) or value is default:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real | jax.Array):
            raise ValueError(f"option {option} of {name} must be a number, got {value!r}.")
        _check_finite(f"option {option} of {name}", value)
        whole = int in (types.get(option), *get_args(types.get(option)))
        if whole and not float(value).is_integer():
            raise ValueError(f"option {option} of {name} must be a whole number, got {value!r}.")
