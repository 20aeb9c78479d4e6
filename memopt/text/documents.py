"""Finds text in files, JSON lines, the standard library and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from memopt.text.files import Files, read_files

if TYPE_CHECKING:
    from memopt.text.streams import Stream

#: A corpus; both have `split`, `epochs`, `once` and `describe`.
Documents: TypeAlias = "Files | Stream"


def find_documents(specs: Sequence[str] = ("python",)) -> Documents:
    """Finds the text that `specs` name.

    A spec is

    - `python`: the source of Python's own standard library (about 8 MB), without what some
      distributions leave out (tests, tkinter, idlelib …) and without generated tables;
    - a file, a directory (every text file in it, recursively; hidden files are left out) or a glob
      (`"books/**/*.txt"`). A name ending in `.jsonl` is read as JSON lines, one document a line;
    - `hf:NAME` or `hf:NAME:CONFIG`, a dataset of the Hugging Face hub or a local directory,
      streamed by `datasets`.

    JSON lines and datasets take the text from the field `text`, or from the one named after `#`:
    `pages.jsonl#content`, `hf:NAME#content`. Bytes that are not UTF-8 are read as U+FFFD.

    Args:
        specs: What to read. Files named twice are read once. `hf:` must be the only one.

    Returns:
        The documents, in an order that depends on the names only.

    Raises:
        ValueError: Nothing matches, a file is not text, all is empty, the first line of a JSON
            lines file has no such field, or `hf:` is mixed with files.
        ImportError: `hf:` is asked for and `datasets` is not installed.

    Example:
        >>> training, validation = find_documents(["python"]).split(0.05)
        >>> len(training) > len(validation) > 0
        True
    """
    if not specs:
        raise ValueError("data is empty: name a file, a directory, a glob, 'python' or 'hf:NAME'.")
    streams = [spec for spec in specs if spec.startswith("hf:")]
    if not streams:
        return read_files(specs)
    if len(specs) > 1:
        raise ValueError(f"data {streams[0]!r} cannot be mixed with other data: give it alone.")
    from memopt.text.streams import open_stream  # needs Grain, which files do not

    return open_stream(streams[0])
