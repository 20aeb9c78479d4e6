"""Deprecated names that still work for one release."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


def finder(module: str, namespace: Mapping[str, Any], names: Mapping[str, str]) -> Callable:
    """Makes a module's `__getattr__` that finds old names with a `DeprecationWarning`.

    Args:
        module: the module's public name.
        namespace: the module's `globals()`.
        names: a mapping from old names to new ones.

    Example:
        >>> getattr_ = finder("library", {"new": 1}, {"old": "new"})
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     getattr_("old"), str(caught[-1].message)
        (1, 'library.old is now library.new.')
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} is now {module}.{names[name]}."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return namespace[names[name]]

    return find


def keywords(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function accept old names of its arguments, with a `DeprecationWarning`.

    Args:
        **names: a mapping from old names to new ones.

    Example:
        >>> square = keywords(number="x")(lambda x: x * x)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     square(number=3), str(caught[-1].message)
        (9, '<lambda>(number=…) is now <lambda>(x=…).')
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> R:
            return function(*args, **current(call, options))

        setattr(call, "__renamed__", names)  # noqa: B010
        return cast(Callable[P, R], call)

    return decorate


def current(function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces old names of keyword arguments of a function decorated by `keywords`."""
    names = getattr(function, "__renamed__", {})
    for old in names.keys() & options.keys():
        name = function.__name__
        if names[old] in options:
            raise TypeError(f"{name} got both {names[old]!r} and its old name {old!r}.")
        message = f"{name}({old}=…) is now {name}({names[old]}=…)."
        warnings.warn(message, DeprecationWarning, stacklevel=3)
    return {names.get(key, key): value for key, value in options.items()}
