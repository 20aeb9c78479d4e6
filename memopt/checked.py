"""Checks that arguments are what a function's annotations say."""

import functools
import inspect
import numbers
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memopt.errors import check_precision

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function check its arguments by `check_arguments` first.

    Example:
        >>> @checked
        ... def every(steps: int = 10): ...
        >>> every(1.5)
        Traceback (most recent call last):
        TypeError: steps must be a whole number, got 1.5.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **options).arguments
        except TypeError:  # whose words are those of Python
            return function(*args, **options)
        check_arguments(signature, given)
        return function(*args, **options)

    return call


def check_arguments(signature: inspect.Signature, given: Mapping[str, Any]) -> None:
    """Raises unless arguments are of the kinds that a signature annotates.

    Numbers may be arrays, which `optax.inject_hyperparams` makes of them; their values are not
    checked, but a float must have float32 or more. Arguments that may be strings are not checked:
    each is checked against the names that it allows.

    Args:
        signature: that of a function or dataclass.
        given: arguments by name; others are ignored.

    Raises:
        TypeError: names the argument, what it must be, and what was given.
        ValueError: if an array that stands for a float is narrower than float32.
    """
    for name, parameter in signature.parameters.items():
        if name not in given or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value, kinds = given[name], _members(parameter.annotation)
        if str in kinds or not all(map(_is_understood, kinds)):
            continue
        if not any(_is_of(value, kind) for kind in kinds):
            wanted = list(dict.fromkeys(filter(None, (_words(kind, kinds) for kind in kinds))))
            text = " or ".join(filter(None, (", ".join(wanted[:-1]), wanted[-1])))
            raise TypeError(f"{name} must be {text}, got {reprlib.repr(value)}.")
        if float in kinds:
            check_precision(**{name: value})


def check_fields(instance: Any) -> None:
    """Checks the fields of a dataclass instance as `check_arguments` does arguments."""
    check_arguments(inspect.signature(type(instance)), vars(instance))


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone; without `Array` beside a number."""
    is_union = get_origin(annotation) in (Union, types.UnionType)
    members = get_args(annotation) if is_union else (annotation,)
    is_number = {int, float} & set(filter(_is_understood, members))
    return tuple(kind for kind in members if not (is_number and kind is jax.Array))


def _plain(kind: Any) -> Any:
    """The class of an annotation, such as `Sequence` of ``Sequence[int]``."""
    return get_origin(kind) or kind


def _is_understood(kind: Any) -> bool:
    without = Any, inspect.Parameter.empty  # which are classes
    return isinstance(_plain(kind), type) and kind not in without


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated kind."""
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if kind in (int, float):
        if isinstance(value, jax.Array | np.ndarray | np.generic):
            is_int = jnp.issubdtype(value.dtype, jnp.integer)
            is_real = is_int or jnp.issubdtype(value.dtype, jnp.floating)
            # `optax.inject_hyperparams` makes float arrays of whole numbers, too.
            whole = value.ndim == 0 and (is_int or (is_real and isinstance(value, jax.Array)))
            return is_real if kind is float else whole
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if kind is jax.Array:
        return isinstance(value, jax.Array | np.ndarray | np.generic)
    if kind is optax.GradientTransformation:  # or what has the same functions, as MultiSteps
        return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
    if _plain(kind) is Sequence:
        (entry,) = get_args(kind)
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
        return is_sequence and (not _is_understood(entry) or all(_is_of(x, entry) for x in value))
    return isinstance(value, _plain(kind))


def _words(kind: Any, kinds: tuple[Any, ...]) -> str:
    """Names an annotated kind in a sentence; "" for an int beside a float, whose name covers it."""
    if kind is int:
        return "" if float in kinds else "a whole number"
    if kind is types.NoneType:
        return "None"
    if kind in _WORDS:
        return _WORDS[kind]
    return _WORDS.get(_plain(kind), f"a {_plain(kind).__name__}")


_WORDS = {
    jax.Array: "an array",
    bool: "True or False",
    float: "a number",
    optax.GradientTransformation: "an Optax transformation",
    Callable: "a function",
    Sequence: "a sequence",
    Mapping: "a mapping",
}
