"""Functions that are chosen by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

from memopt.docstrings import argument_help, keyword_defaults


@dataclasses.dataclass(frozen=True)
class Choice:
    """A function that is chosen by its name in a table.

    Attributes:
        make: the function; its keyword-only arguments are the options.
        when: when to choose it.
        source: where it is from.
        needs: what it needs besides its options.
    """

    make: Callable[..., Any]
    when: str
    source: str = ""
    needs: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        """The options with their defaults."""
        return keyword_defaults(self.make)

    @property
    def help(self) -> dict[str, str]:
        """The descriptions of the options, from the docstring."""
        return argument_help(self.make)
