"""Finds the files that hold the text, and reads each once to check, hash and cut it."""

from __future__ import annotations

import collections
import glob
import hashlib
import itertools
import os
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from memopt.text.files import PIECE, TEXT, File, Files, OtherKindError, Records, cut_text, read_line
from memopt.text.sources import CHUNK_BYTES, HEAD_BYTES, Sources, UnreadableError

#: A warning names so many files or records.
NAMED = 3
#: After so long a line of progress is shown, and then again after so long each.
SECONDS_OF_SILENCE, SECONDS_BETWEEN_LINES = 1.0, 5.0

# Names of files that hold records, perhaps before the ending of a compressed file.
_RECORDS = (".jsonl", ".ndjson", ".json")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

# Folders of the standard library that some distributions leave out or that hold no source.
_SKIPPED = {"ensurepip", "idlelib", "idle_test", "lib2to3", "tkinter", "turtledemo", "venv"}
_SKIPPED |= {"distutils", "test", "tests"}
_SKIPPED |= {"site-packages", "dist-packages", "pydoc_data", "encodings"}


class DataWarning(UserWarning):
    """A part of the data is left out."""


class Found(NamedTuple):
    """A file that a spec names; see `File`."""

    path: str
    name: str
    field: str | None


def read_files(
    specs: Sequence[str],
    *,
    records: Records = TEXT,
    bad_records: str = "skip",
    progress: Callable[[str], None] | None = None,
) -> Files:
    """Finds and reads the files that `specs` name; see `memopt.text.documents.find_documents`.

    Raises:
        ValueError: A spec names no text, all is empty, or a record is bad and `bad_records` is
            "stop".

    Warns:
        DataWarning: Files or records are left out.
    """
    matches = {spec: _match(spec, records) for spec in specs}
    found = {real: file for files in matches.values() for real, file in files.items()}
    reader = _Reader(found, records, stop=bad_records == "stop", progress=progress)
    pieces = np.fromiter(reader.pieces(), PIECE)
    for spec, files in matches.items():
        if files.keys() <= reader.left_out.keys():
            real, first = next(iter(files.items()))
            where = "" if spec.startswith(first.path) else f"names no {records.noun}: {first.path} "
            raise ValueError(f"data {spec!r} {where}{reader.left_out[real].reason}.")
    if not len(pieces):
        raise ValueError(
            f"data {', '.join(map(repr, specs))} holds no {records.noun}: every file is empty."
        )
    for line in reader.summary():
        warnings.warn(line, DataWarning, stacklevel=3)
    return Files(tuple(reader.files), pieces, reader.sources, records)


class _Reader:
    """Reads files from beginning to end.

    Attributes:
        sources: Where their text can be read again.
        files: Those that hold text.
        left_out: Why others do not, by their real path.
    """

    def __init__(
        self,
        found: dict[str, Found],
        records: Records,
        *,
        stop: bool,
        progress: Callable[[str], None] | None,
    ):
        self.sources = Sources()
        self.files: list[File] = []
        self.left_out: dict[str, UnreadableError] = {}
        self._found, self._records = found, records
        self._stop, self._progress = stop, progress
        self._files_read = self._bytes = self._count = self._skipped = 0
        self._named: list[str] = []
        self._due = time.monotonic() + SECONDS_OF_SILENCE

    def pieces(self) -> Iterator[tuple[int, int, int, int]]:
        """Yields the pieces of `files`, in order."""
        for real, file in self._found.items():
            is_json = file.field is not None and _ending(file.path) == ".json"
            read = self._read_text if file.field is None else self._read_records
            try:
                stream, begin, decoded = self.sources.open(file.path, is_json=is_json)
                with stream:
                    yield from read(file, stream, begin, decoded)
            except UnreadableError as error:
                self.left_out[real] = error
            except OSError as error:
                raise ValueError(f"data {file.path!r} cannot be read: {error.strerror}.") from error
            self._files_read += 1

    def summary(self) -> Iterator[str]:
        """Says in one line which files are left out, and in one which records."""
        kinds: dict[str, list[str]] = {}
        for real, error in self.left_out.items():
            kinds.setdefault(error.kind, []).append(self._found[real].name)
        if kinds:
            parts = ", ".join(counted(names, kind) for kind, names in kinds.items())
            yield f"data: left out {_number(len(self.left_out), 'file')}: {parts}."
        if self._skipped:
            count = f"{self._skipped:,} of {_number(self._count, 'record')}"
            more = "; …" * (self._skipped > NAMED)
            yield f"data: skipped {count}: {'; '.join(self._named[:NAMED])}{more}."

    def _read_text(
        self, found: Found, stream: BinaryIO, begin: int, decoded: bool
    ) -> Iterator[tuple[int, int, int, int]]:
        digest, size, number = hashlib.sha256(), 0, len(self.files)
        chunk = stream.read(CHUNK_BYTES)
        if b"\0" in chunk[:HEAD_BYTES]:
            raise UnreadableError("without text", "is not text: it holds zero bytes")
        while chunk:
            digest.update(chunk)
            size += len(chunk)
            self._advance(len(chunk))
            chunk = stream.read(CHUNK_BYTES) if len(chunk) == CHUNK_BYTES else b""
        if size:
            file = File(found.path, found.name, size, None, digest.hexdigest(), begin, decoded)
            self.files.append(file)
            yield from ((number, 0, *cut) for cut in cut_text(file, self.sources, 0, size))

    def _read_records(
        self, found: Found, stream: BinaryIO, begin: int, decoded: bool
    ) -> Iterator[tuple[int, int, int, int]]:
        digest, size, number, field = hashlib.sha256(), 0, len(self.files), found.field or ""
        count, skipped, noun = 0, 0, self._records.noun
        advice = f"; name the field that holds the {noun} after '#', as in 'pages.jsonl#content'"
        named: list[str] = []
        for line, content in enumerate(stream, 1):
            digest.update(content)
            start, size = size, size + len(content)
            self._advance(len(content))
            if not content.strip():
                continue
            count += 1
            try:
                read_line(content, field, self._records)
            except ValueError as error:
                skipped += 1
                advice = "" if isinstance(error, OtherKindError) else advice
                if len(named) < NAMED:
                    named.append(f"{found.path}, line {line} {error}")
                if self._stop:
                    raise ValueError(
                        f"data: {named[0]}: repair it, or leave it out with --bad-records skip."
                    ) from error
            else:
                yield number, line, start, size
        if skipped and skipped == count:
            raise UnreadableError(
                f"without {noun} in the field {field!r}",
                f"holds no {noun}, since {named[0]}{advice}",
            )
        if size:
            file = File(found.path, found.name, size, field, digest.hexdigest(), begin, decoded)
            self.files.append(file)
        self._count += count
        self._skipped += skipped
        self._named += named

    def _advance(self, count: int) -> None:
        self._bytes += count
        if self._progress and time.monotonic() > self._due:
            self._due = time.monotonic() + SECONDS_BETWEEN_LINES
            files = f"{self._files_read:,} of {_number(len(self._found), 'file')}"
            self._progress(f"reading the data: {files}, {self._bytes / 1e6:,.0f} MB")


def counted(names: Sequence[str], kind: str) -> str:
    """Counts files of a kind and names the first of them.

    Example:
        >>> counted(["a.png", "b.png", "c.png", "d.png"], "without text")
        '4 without text (a.png, b.png, c.png, …)'
    """
    return f"{len(names):,} {kind} ({', '.join(names[:NAMED])}{', …' * (len(names) > NAMED)})"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _match(spec: str, records: Records) -> dict[str, Found]:
    """The files that a spec names, by their real paths, sorted by name."""
    pattern, _, field = (spec, "", "") if Path(spec).exists() else spec.partition("#")
    path = Path(pattern).expanduser()
    paths: Iterable[tuple[str, str]]
    if spec == "python":
        root = Path(sysconfig.get_path("stdlib"))
        paths = _with_real(_standard_library(root))
    elif path.is_file():
        root, paths = path.parent, _with_real([str(path)])
    elif path.is_dir():
        root, paths = path, _walk(str(path))
    else:
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        matching = glob.iglob(str(path), recursive=True)
        paths = _with_real(match for match in matching if not os.path.isdir(match))
    prefix = os.path.join(root, "")
    found = {}
    for name, file, real in sorted((file.removeprefix(prefix), file, real) for file, real in paths):
        is_record = records.in_every_file or bool(field) or _ending(file) in _RECORDS
        found[real] = Found(file, name, (field or records.field) if is_record else None)
    if not found:
        raise ValueError(
            f"data {spec!r} matches no text file: give a file, a directory, a glob, 'python' or "
            "'hf:NAME'."
        )
    return found


def _ending(path: str) -> str:
    """The ending of a name without that of its compression, in lower case: ".jsonl"."""
    stem, ending = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if ending in _COMPRESSED else ending


def _with_real(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((path, os.path.realpath(path)) for path in paths)


def _walk(root: str) -> Iterator[tuple[str, str]]:
    """The files in a folder and all below, with real paths, but for hidden ones; each folder once.

    Links to folders come last: what is linked to within `root` keeps its own name.
    """
    seen, folders = set(), collections.deque([root])
    while folders:
        folder = folders.popleft()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        try:
            entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
        except OSError:
            yield folder, real  # opened later, it says why
            continue
        for entry in entries:
            is_link = entry.is_symlink()
            if os.path.isdir(entry.path) if is_link else entry.is_dir():
                (folders.append if is_link else folders.appendleft)(entry.path)
            elif is_link:
                yield entry.path, os.path.realpath(entry.path)
            else:
                yield entry.path, f"{real}/{entry.name}"


def _standard_library(root: Path) -> Iterator[str]:
    """The modules in `root` that are on every machine that has Python."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
        if "config-" not in folder:
            modules = [name for name in names if not name.startswith("_sysconfigdata")]
            yield from (os.path.join(folder, name) for name in modules if name.endswith(".py"))
