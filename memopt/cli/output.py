"""Output that decides nothing: a command goes on when nobody reads what it prints."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from memopt.training.writing import why


class _Lasting:
    """A text stream that turns to the null device when it cannot be written."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
            print(f"memopt: nothing more is shown ({why(error)})", file=sys.stderr)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Keeps standard output and error from raising, whatever is written and wherever it goes.

    If a pipe's reader has ended, a terminal is closed or a disk is full, the stream is dropped, and
    standard error, if it still works, says so. Characters that a terminal lacks are shown as `?`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    with contextlib.ExitStack() as stack:
        for redirect in (contextlib.redirect_stderr, contextlib.redirect_stdout):
            stream = sys.stderr if redirect is contextlib.redirect_stderr else sys.stdout
            if stream:
                lasting: Any = _Lasting(stream)
                stack.callback(lasting.flush)
                stack.enter_context(redirect(lasting))
        yield
