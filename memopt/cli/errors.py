"""Ends a command with one sentence when something is wrong."""

import sys
from typing import NoReturn


def fail(message: object, exit_code: int = 2) -> NoReturn:
    """Ends the process with a sentence on stderr."""
    print(f"memopt: {message}", file=sys.stderr)
    sys.exit(exit_code)
