"""The page of the command line: what `memopt COMMAND --help` prints."""

import contextlib
import functools
import io
import os
import pkgutil
import textwrap
from unittest import mock

from memopt.cli.main import COMMANDS

#: The line of a page at which the commands are described.
PLACE = "<!-- commands -->"

#: Columns of the text, which fit beside the navigation.
WIDTH = 92


@functools.cache
def text() -> str:
    """All commands with their options, in Markdown."""
    return "\n\n".join(
        f"## memopt {name}\n\n{line}\n\n```text\n{help_of(name)}\n```"
        for name, (_, line) in COMMANDS.items()
    )


def help_of(command: str) -> str:
    """Returns the `--help` of a command as it is printed to an ASCII file: no boxes, no colors.

    Args:
        command: one of the commands of memopt, such as "plan".
    """
    printed = io.StringIO()  # of no encoding, which tyro takes for ASCII
    with (
        mock.patch.dict(os.environ, COLUMNS=str(WIDTH)),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        pkgutil.resolve_name(COMMANDS[command][0])(["--help"])
    lines = printed.getvalue().splitlines()
    wrapped = (line if line.startswith(" ") else textwrap.fill(line, WIDTH) for line in lines)
    return "\n".join(wrapped)
