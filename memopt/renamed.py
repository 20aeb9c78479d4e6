"""Names that have changed, and still work for one release."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


def finder(module: str, namespace: Mapping[str, Any], names: Mapping[str, str]) -> Callable:
    """Makes a module's `__getattr__`, which finds old names with a `DeprecationWarning`.

    Args:
      module: the name under which users know it.
      namespace: its `globals()`.
      names: new names by old ones.

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
    """Lets a function be called by old names of its arguments, with a `DeprecationWarning`.

    Args:
      **names: new names by old ones.

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
    """Keyword arguments under the names that a function of `keywords` has for them now."""
    names = getattr(function, "__renamed__", {})
    for old in names.keys() & options.keys():
        name = function.__name__
        message = f"{name}({old}=…) is now {name}({names[old]}=…)."
        warnings.warn(message, DeprecationWarning, stacklevel=3)
    return {names.get(key, key): value for key, value in options.items()}
