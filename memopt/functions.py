"""Functions of a user by their names."""

import hashlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def find_function(name: str) -> Callable[..., Any]:
    """Returns what ``module:function`` names; modules of the working directory are found, too.

    Raises:
        ValueError: if there is no such module or function.

    Example:
        >>> find_function("math:sqrt")(4)
        2.0
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{name!r} must be MODULE:FUNCTION, of a module to import: {error}."
        ) from error
    if not callable(found):
        raise ValueError(f"{name!r} must be MODULE:FUNCTION, got {found!r}.")
    return found


def digest_of_source(name: str) -> str:
    """Returns a digest of the file that defines the function ``module:function``.

    Raises:
        ValueError: if there is no such function.
    """
    function = find_function(name)
    file = inspect.getsourcefile(inspect.unwrap(function))
    content = Path(file).read_bytes() if file else repr(function).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def call_function(name: str, *args: Any, **options: Any) -> Any:
    """Returns what the function ``module:function`` returns.

    Raises:
        ValueError: if there is no such function, or it fails.

    Example:
        >>> call_function("math:sqrt")
        Traceback (most recent call last):
        ValueError: 'math:sqrt' failed (TypeError: math.sqrt() takes exactly one argument ...).
    """
    function = find_function(name)
    try:
        return function(*args, **options)
    except Exception as error:
        raise ValueError(f"{name!r} failed ({type(error).__name__}: {error}).") from error
