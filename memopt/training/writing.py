"""Writing the files of a run on a disk that may be full or broken."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TypeVar


class WriteError(OSError):
    """A file that a run cannot do without was not written; says which, why and what to do."""


class Closable(Protocol):
    """Anything with a method `close`."""

    def close(self) -> None:
        """Releases what it holds."""


T = TypeVar("T", bound=Closable)


@contextlib.contextmanager
def closing(thing: T) -> Iterator[T]:
    """Closes `thing` at the end; a failure then does not hide an earlier exception."""
    try:
        yield thing
    except BaseException:
        with contextlib.suppress(Exception):
            thing.close()
        raise
    thing.close()


@contextlib.contextmanager
def writing(what: str, advice: str = "make room or repair the disk") -> Iterator[None]:
    """Turns an error of the disk into one sentence.

    Args:
        what: What is written, such as a file's name in quotes.
        advice: What is to be done about it.

    Raises:
        WriteError: It cannot be written.

    Example:
        >>> with writing("'run/data.jsonl'"):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        memopt.training.writing.WriteError: 'run/data.jsonl' cannot be written (No space left ...
    """
    try:
        yield
    except OSError as error:
        raise WriteError(f"{what} cannot be written ({why(error)}): {advice}.") from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file by a rename: a process killed at any moment leaves the old one or the new one.

    Args:
        path: The file. Another one, with the suffix `.tmp`, is written first.
        content: What it will hold.

    Raises:
        OSError: It cannot be written; the old file is as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "config.json")
        >>> write_whole(path, b"{}")
        >>> [path.name for path in path.parent.iterdir()]
        ['config.json']
    """
    draft = path.with_suffix(".tmp")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()  # frees its part of a full disk
        raise


def why(error: Exception) -> str:
    """Returns the reason of a failed write in a few words.

    Example:
        >>> why(OSError(28, "No space left on device", "metrics.jsonl"))
        'No space left on device'
        >>> why(ValueError("RESOURCE_EXHAUSTED: Failed writing: ... [os_error_code='28']"))
        'No space left on device'
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = f"{error}" or type(error).__name__
    if code := re.search(r"os_error_code='(\d+)'", text):  # of tensorstore
        return os.strerror(int(code[1]))
    return text[:300].splitlines()[0]
