"""Ends a command with one sentence when something is wrong."""

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn


def fail(message: object, exit_code: int = 2) -> NoReturn:
    """Ends the process with a sentence on stderr."""
    print(f"memopt: {message}", file=sys.stderr)
    sys.exit(exit_code)


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Ends the process with an error's sentence, if it is of what was given or of a file."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        fail(error)
