"""Reads the arguments of functions, with the descriptions in their docstrings."""

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any


def argument_help(function: Callable) -> dict[str, str]:
    """Returns the descriptions of a function's arguments, from its docstring.

    Args:
        function: a function with a docstring of Google's style.

    Example:
        >>> argument_help(argument_help)
        {'function': "a function with a docstring of Google's style."}
    """
    base = getattr(function, "__options_of__", None)
    found = argument_help(base) if base else {}
    section = re.search(
        r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(function) or "", re.DOTALL | re.MULTILINE
    )
    for entry in re.split(r"^(?=\S)", textwrap.dedent(section[1]) if section else "", flags=re.M):
        name, _, text = entry.partition(":")
        if text:
            found[name.partition("(")[0].strip()] = " ".join(text.split())
    return found


def keyword_defaults(function: Callable) -> dict[str, Any]:
    """Returns the keyword-only arguments of a function with their defaults.

    Args:
        function: the function.

    Example:
        >>> keyword_defaults(sorted)
        {'key': None, 'reverse': False}
    """
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
