"""Text files opened as UTF-8, whatever their encoding and compression.

Plain files are read in place. All others (compressed, UTF-16, UTF-32, values in JSON) are decoded
once into a temporary file, which has no name and is gone when the process ends, however it ends.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import importlib
import io
import json
import os
import re
import stat
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

#: So many bytes at the beginning of a file say what it is.
HEAD_BYTES = 2**13
#: A file is read and decoded in parts of so many bytes.
CHUNK_BYTES = 2**20
#: Files that are held open at a time; the usual limit of a process is 1,024.
OPEN_FILES = 64

# How files begin that are not plain UTF-8. Groups are named after the module or the encoding that
# reads them. A mark of UTF-32 begins like one of UTF-16.
_BEGINNING = re.compile(
    rb"(?P<gzip>\x1f\x8b\x08)|(?P<bz2>BZh[1-9]1AY&SY)|(?P<lzma>\xfd7zXZ\0)"
    rb"|(?P<zstandard>\x28\xb5\x2f\xfd)|(?P<utf_8_sig>\xef\xbb\xbf)"
    rb"|(?P<utf_32>\xff\xfe\0\0|\0\0\xfe\xff)|(?P<utf_16>\xff\xfe|\xfe\xff)"
)


class UnreadableError(Exception):
    """A file cannot be read as text.

    Attributes:
        kind: Why, to count such files by: "without text".
        reason: Why, after the name of the file: "is not text: it holds zero bytes".
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class Sources:
    """Random access to the text of files, from several threads."""

    def __init__(self) -> None:
        open_file = lambda path: _Descriptor(os.open(path, os.O_RDONLY))
        self._opened = functools.lru_cache(OPEN_FILES)(open_file)
        self._copies_end = 0

    @functools.cached_property
    def _copies(self) -> _Descriptor:
        number, name = tempfile.mkstemp(prefix="memopt-")
        os.unlink(name)
        return _Descriptor(number)

    def read(self, path: str, begin: int, size: int, *, decoded: bool) -> bytes:
        """Reads bytes of a file in place, or of the decoded copies.

        Raises:
            ValueError: There are not so many.
            OSError: The file cannot be read.
        """
        content = (self._copies if decoded else self._opened(path)).read(begin, size)
        if len(content) < size:
            raise ValueError(f"{path} has become shorter since it was found.")
        return content

    def open(self, path: str, *, is_json: bool) -> tuple[BinaryIO, int, bool]:
        """Opens the text of a file, to be read from there to the end.

        Args:
            path: The file.
            is_json: Whether it may hold one JSON value, to be read as a line for each record.

        Returns:
            A stream of UTF-8, where in `read` it begins, and whether it is a decoded copy.

        Raises:
            UnreadableError: It is no file, or damaged, or compressed by what is not installed.
            ValueError: There is no room for a decoded copy.
        """
        stream: BinaryIO
        stream, kind = _open(path)
        begin, decoded = 0, False
        if kind == "utf_8_sig":
            begin = stream.seek(len(codecs.BOM_UTF8))
        elif kind:
            with stream:
                begin, decoded = self._keep(path, _decode(stream, kind)), True
            stream = self._copy(begin)
        if is_json:
            records = _records(stream)
            stream.seek(begin)
            if records is not None:
                stream.close()
                begin, decoded = self._keep(path, records), True
                stream = self._copy(begin)
        return stream, begin, decoded

    def _copy(self, begin: int) -> BinaryIO:
        stream = open(self._copies.number, "rb", closefd=False)  # noqa: SIM115
        stream.seek(begin)
        return stream

    def _keep(self, path: str, chunks: Iterable[bytes]) -> int:
        """Adds a copy to the temporary file, and returns where it begins."""
        begin = self._copies_end
        with open(self._copies.number, "wb", buffering=0, closefd=False) as file:
            file.seek(begin)
            for chunk in chunks:
                try:
                    while chunk:  # a disk that becomes full takes a part first
                        chunk = chunk[file.write(chunk) :]
                except OSError as error:
                    raise ValueError(
                        f"data {path!r} cannot be unpacked into {tempfile.gettempdir()!r} "
                        f"({error.strerror}): name a directory with more room in the environment "
                        "variable TMPDIR, or unpack it yourself."
                    ) from error
            self._copies_end = file.tell()
            file.truncate()
        return begin


class _Descriptor:
    """An open file, closed when nothing refers to it any more."""

    def __init__(self, number: int):
        self.number = number
        weakref.finalize(self, os.close, number)

    def read(self, begin: int, size: int) -> bytes:
        content = os.pread(self.number, size, begin)
        while len(content) < size:  # one call reads 2 GiB at most
            more = os.pread(self.number, size - len(content), begin + len(content))
            if not more:
                break
            content += more
        return content


def _open(path: str) -> tuple[io.BufferedReader, str | None]:
    """Opens a file, and returns what it is other than plain UTF-8."""
    with _unreadable():
        stream: Any = open(path, "rb", HEAD_BYTES, opener=_at_once)  # noqa: SIM115
        try:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise UnreadableError("no regular file", "is no regular file")
            return stream, _kind(stream)
        except BaseException:
            stream.close()
            raise


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    """Turns errors of reading into `UnreadableError`."""
    try:
        yield
    except UnreadableError:
        raise
    except Exception as error:  # each kind of compression has errors of its own
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UnreadableError(f"unreadable: {why}", f"cannot be read: {why}") from error


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else a pipe waits until something writes to it


def _kind(stream: io.BufferedReader) -> str | None:
    beginning = _BEGINNING.match(stream.peek(HEAD_BYTES))
    return beginning and beginning.lastgroup


def _decode(stream: BinaryIO, kind: str | None) -> Iterator[bytes]:
    """Reads a stream of a kind to its end, as UTF-8."""
    with contextlib.ExitStack() as opened:
        with _unreadable():
            if kind and not kind.startswith("utf"):
                unpacked = opened.enter_context(_decompress(stream, kind))
                stream, kind = unpacked, _kind(unpacked)
        text = None
        if kind and kind.startswith("utf"):
            text = opened.enter_context(io.TextIOWrapper(stream, kind, "replace", newline=""))
        while True:
            with _unreadable():
                chunk = text.read(CHUNK_BYTES).encode() if text else stream.read(CHUNK_BYTES)
            if not chunk:
                return
            yield chunk


def _decompress(stream: BinaryIO, module: str) -> io.BufferedReader:
    """Decompresses a stream with `gzip`, `bz2`, `lzma` or `zstandard`."""
    try:
        library: Any = importlib.import_module(module)
    except ImportError as error:
        needs = f"compressed by what needs the package {module}"
        raise UnreadableError(needs, f"is {needs}: pip install {module}") from error
    if module == "zstandard":  # its `open` ends after the first of several frames
        decompressor = library.ZstdDecompressor()
        return io.BufferedReader(decompressor.stream_reader(stream, read_across_frames=True))
    return io.BufferedReader(library.open(stream))


def _records(stream: BinaryIO) -> Iterator[bytes] | None:
    """The records of one JSON value, a line each; None if the stream holds JSON lines."""
    begin = stream.tell()
    first = next((line for line in stream if line.strip()), b"")
    if isinstance(_json(first), dict):
        return None
    stream.seek(begin)
    value = _json(stream.read())
    if value is None:
        return None
    records = value if isinstance(value, list) else [value]
    return (json.dumps(record).encode() + b"\n" for record in records)


def _json(content: bytes) -> Any:
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError):
        return None
