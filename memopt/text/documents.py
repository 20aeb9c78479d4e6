"""Finds text in files, JSON lines, the standard library and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from memopt.errors import check_choice
from memopt.text.files import TEXT, Files, Records
from memopt.text.finding import read_files

if TYPE_CHECKING:
    from memopt.text.streams import Stream

#: A corpus; both have `split`, `epochs`, `once` and `describe`.
Documents: TypeAlias = "Files | Stream"


def find_documents(
    specs: Sequence[str] = ("python",),
    *,
    records: Records = TEXT,
    bad_records: str = "skip",
    progress: Callable[[str], None] | None = None,
) -> Documents:
    """Finds the text that `specs` name, and reads every file once to check it.

    A spec is

    - `python`: the source of Python's own standard library (about 8 MB), without what some
      distributions leave out (tests, tkinter, idlelib …) and without generated tables;
    - a file, a directory (every text file in it, recursively; hidden files are left out) or a glob
      (`"books/**/*.txt"`);
    - `hf:NAME` or `hf:NAME:CONFIG`, a dataset of the Hugging Face hub or a local directory,
      streamed by `datasets`.

    Files named `.jsonl` or `.ndjson`, in small or capital letters, hold JSON lines, one document a
    line. So do those named `.json` if the first line is an object; otherwise they hold one value,
    which must fit into memory: an array of records, or one record. The text is in the field `text`,
    or in the one named after `#`: `pages.jsonl#content`, `hf:NAME#content`. With `#`, files of any
    other name are JSON lines, too.

    Text is UTF-8 (other bytes are read as U+FFFD) or, with a byte order mark, UTF-16 or UTF-32. It
    may be compressed by gzip, bzip2, xz or, if the package `zstandard` is installed, zstd. Whatever
    is not plain UTF-8 is decoded first, into a temporary file that needs as much room in `TMPDIR`
    as the text has bytes.

    Args:
        specs: What to read. Files named twice are read once. `hf:` must be the only one.
        records: What records hold: text or, as `memopt.text.chats.CHATS`, chats; then every file
            is JSON lines.
        bad_records: What to do about records that are not JSON, not UTF-8, or without text in the
            field: "skip" them with a warning, or "stop" with an error.
        progress: Called with a line to show, now and then if reading takes more than a second.

    Returns:
        The documents, in an order that depends on the names only.

    Raises:
        ValueError: Nothing matches, a spec names no text, all is empty, `hf:` is mixed with files,
            or a record is bad and `bad_records` is "stop".
        ImportError: `hf:` is asked for and `datasets` is not installed.

    Warns:
        DataWarning: Files that are not text or cannot be read, or bad records, are left out. Names
            the first ones.

    Example:
        >>> training, validation = find_documents(["python"]).split(0.05)
        >>> len(training) > len(validation) > 0
        True
    """
    if not specs:
        raise ValueError("data is empty: name a file, a directory, a glob, 'python' or 'hf:NAME'.")
    check_choice("bad_records", bad_records, ("skip", "stop"))
    streams = [spec for spec in specs if spec.startswith("hf:")]
    if not streams:
        return read_files(specs, records=records, bad_records=bad_records, progress=progress)
    if len(specs) > 1:
        raise ValueError(f"data {streams[0]!r} cannot be mixed with other data: give it alone.")
    from memopt.text.streams import open_stream  # needs Grain, which files do not

    return open_stream(streams[0], records=records, bad_records=bad_records)
