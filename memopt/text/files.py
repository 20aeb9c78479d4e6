"""Text in files: plain text, JSON lines, the standard library.

Text is read in *pieces*: a whole document, or 64 KiB of a long one, so that no file is ever held in
memory and one long book shuffles as well as a thousand pages.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import json
import math
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import grain

#: Longest piece of a text file, in bytes.
PIECE_BYTES = 2**16
#: With fewer documents than this, the tail of each is held out instead of whole documents.
FEW_DOCUMENTS = 100

# Folders of the standard library that some distributions leave out or that hold no source.
_SKIPPED = {"ensurepip", "idlelib", "idle_test", "lib2to3", "tkinter", "turtledemo", "venv"}
_SKIPPED |= {"distutils", "test", "tests"}
_SKIPPED |= {"site-packages", "dist-packages", "pydoc_data", "encodings"}


class Piece(NamedTuple):
    """Consecutive text of one document.

    Attributes:
        text: The text.
        begins: Whether the document begins here.
        ends: Whether the document ends here.
    """

    text: str
    begins: bool
    ends: bool


@dataclasses.dataclass(frozen=True)
class File:
    """A file of text, or of JSON lines.

    Attributes:
        path: Its path.
        name: Its name relative to the directory or glob that found it; decides its split.
        size: Its size in bytes.
        field: The field of a JSON line that holds the text; None for plain text.
    """

    path: Path
    name: str
    size: int
    field: str | None


# `line` is the number of the JSON line, from 1; 0 in plain text.
_PIECE = np.dtype([("file", "i4"), ("line", "i8"), ("start", "i8"), ("stop", "i8")])
_NO_PIECES = np.empty(0, _PIECE)


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """Documents in files, with random access to their pieces.

    Attributes:
        files: The files.
        pieces: Byte ranges, a structured array: file, line, start, stop.
    """

    files: tuple[File, ...]
    pieces: np.ndarray

    def __len__(self) -> int:
        """The number of pieces."""
        return len(self.pieces)

    def __getitem__(self, index: int) -> Piece:
        """Reads piece `index`.

        Raises:
            ValueError: A JSON line is no object with the text field; names the line.
        """
        number, line, start, stop = self.pieces[index].tolist()
        file = self.files[number]
        with file.path.open("rb") as stream:
            stream.seek(start)
            text = stream.read(stop - start).decode("utf-8", "replace")
        if file.field is None:
            return Piece(text, start == 0, stop == file.size)
        where = f"{file.path}, line {line}"
        try:
            record = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}.") from error
        return Piece(text_field(record, file.field, where), True, True)

    def split(self, validation_fraction: float = 0.05) -> tuple[Files, Files]:
        """Splits by document: a hash of its name (and line) decides, never its position.

        Adding a file moves no other. A corpus of fewer than 100 documents is too small for that:
        there, the last `validation_fraction` of every file (of its bytes or lines) is held out.

        Args:
            validation_fraction: Share of the documents to hold out, between 0 and 1.

        Returns:
            The (training, validation) documents.

        Raises:
            ValueError: The fraction is not between 0 and 1, or nothing is left to hold out.
        """
        check_fraction(validation_fraction)
        names = np.array([zlib.crc32(file.name.encode()) for file in self.files], np.uint64)
        held = uniform(names[self.pieces["file"]], self.pieces["line"]) < validation_fraction
        documents = np.count_nonzero((self.pieces["line"] > 0) | (self.pieces["start"] == 0))
        if documents < FEW_DOCUMENTS or held.all() or not held.any():
            return self._split_tails(validation_fraction)
        return Files(self.files, self.pieces[~held]), Files(self.files, self.pieces[held])

    def _split_tails(self, fraction: float) -> tuple[Files, Files]:
        heads, tails = [_NO_PIECES], [_NO_PIECES]
        for number in np.unique(self.pieces["file"]):
            file, pieces = self.files[number], self.pieces[self.pieces["file"] == number]
            if file.field is None:
                start, stop = pieces["start"][0], pieces["stop"][-1]
                cut = _boundary(file, math.floor(stop - (stop - start) * fraction))
                head = _cut_text(file, number, start, cut)
                tail = _cut_text(file, number, cut, stop)
            else:
                lines = len(pieces) - math.ceil(len(pieces) * fraction)
                head, tail = pieces[:lines], pieces[lines:]
            if not len(head):  # too short to cut
                head, tail = tail, head
            heads.append(head)
            tails.append(tail)
        if not any(map(len, tails)):
            raise ValueError(
                f"data is too small to hold out a validation part of {fraction:g}: "
                "give more text, or a larger validation fraction."
            )
        return Files(self.files, np.concatenate(heads)), Files(self.files, np.concatenate(tails))

    def epochs(self, seed: int) -> grain.MapDataset:
        """Repeats the pieces without end, shuffled anew in each epoch."""
        import grain

        return grain.MapDataset.source(self).shuffle(seed=seed).repeat()

    def once(self) -> grain.MapDataset:
        """Returns every piece once, in a shuffled order that never changes."""
        import grain

        return grain.MapDataset.source(self).shuffle(seed=0)

    def describe(self) -> dict[str, Any]:
        """Returns the number of files and bytes, and a hash of names, sizes and pieces."""
        listing = json.dumps([(file.name, file.size, file.field) for file in self.files])
        digest = hashlib.sha256(listing.encode() + self.pieces.tobytes()).hexdigest()
        count = len(np.unique(self.pieces["file"]))
        size = int((self.pieces["stop"] - self.pieces["start"]).sum())
        return {"files": count, "bytes": size, "digest": digest}


def read_files(specs: Sequence[str]) -> Files:
    """The documents in the files that `specs` name; see `memopt.text.documents`.

    Raises:
        ValueError: Nothing matches, a file is not text, all is empty, or the first line of a JSON
            lines file has no such field.
    """
    found = {file.path.resolve(): file for spec in specs for file in _match(spec)}
    files = tuple(file for file in found.values() if file.size)
    pieces = np.concatenate([_NO_PIECES, *itertools.starmap(_cut, enumerate(files))])
    if not len(pieces):
        raise ValueError(f"data {', '.join(map(repr, specs))} holds no text: every file is empty.")
    documents = Files(files, pieces)
    for first in np.unique(pieces["file"], return_index=True)[1].tolist():
        if files[pieces["file"][first]].field is not None:
            documents[first]  # refuses a wrong field now, not in an hour
    return documents


def _match(spec: str) -> list[File]:
    """The files that a spec names, sorted by name."""
    pattern, _, field = (spec, "", "") if Path(spec).exists() else spec.partition("#")
    path = Path(pattern).expanduser()
    paths: Iterable[Path]
    if spec == "python":
        root = Path(sysconfig.get_path("stdlib"))
        paths = _standard_library(root)
    elif path.is_file():
        root, paths = path.parent, [path]
        if not _is_text(path):
            raise ValueError(f"data {str(path)!r} is not text: it holds zero bytes.")
    elif path.is_dir():
        visible = lambda p: not any(part[0] == "." for part in p.relative_to(path).parts)
        root, paths = path, filter(visible, path.rglob("*"))
    else:
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        root, paths = Path(*plain), map(Path, glob.glob(str(path), recursive=True))
    named = sorted((p.relative_to(root).as_posix(), p) for p in paths if p.is_file())
    files = [
        File(p, name, p.stat().st_size, (field or "text") if p.suffix == ".jsonl" else None)
        for name, p in named
        if _is_text(p)
    ]
    if not files:
        raise ValueError(
            f"data {spec!r} matches no text file: give a file, a directory, a glob, 'python' or "
            "'hf:NAME'."
        )
    return files


def _is_text(path: Path) -> bool:
    with path.open("rb") as stream:
        return b"\0" not in stream.read(2**13)


def _standard_library(root: Path) -> Iterator[Path]:
    """The modules in `root` that are on every machine that has Python."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
        if "config-" not in folder:
            modules = [name for name in names if not name.startswith("_sysconfigdata")]
            yield from (Path(folder, name) for name in modules if name.endswith(".py"))


def _cut(number: int, file: File) -> np.ndarray:
    """The pieces of one file."""
    if file.field is None:
        return _cut_text(file, number, 0, file.size)
    return np.fromiter(_cut_lines(number, file), _PIECE)


def _cut_lines(number: int, file: File) -> Iterator[tuple[int, int, int, int]]:
    stop = 0
    with file.path.open("rb") as stream:
        for line, content in enumerate(stream, 1):
            start, stop = stop, stop + len(content)
            if content.strip():
                yield number, line, start, stop


def _cut_text(file: File, number: int, start: int, stop: int) -> np.ndarray:
    """The pieces of bytes `start` to `stop` of a text file."""
    cuts = {_boundary(file, at) for at in range(start + PIECE_BYTES, stop, PIECE_BYTES)}
    ends = sorted({start, stop} | {at for at in cuts if at < stop})
    return np.array([(number, 0, a, b) for a, b in itertools.pairwise(ends)], _PIECE)


def _boundary(file: File, position: int) -> int:
    """Finds the start of a line, or at least of a character, at or soon after `position`."""
    if position == 0:
        return 0
    with file.path.open("rb") as stream:
        stream.seek(position - 1)
        window = stream.read(2**10)
    newline = window.find(b"\n")
    if newline >= 0:
        return position + newline
    continuation = itertools.takewhile(lambda byte: byte & 0xC0 == 0x80, window[1:5])
    return position + len(list(continuation))


def text_field(record: Any, field: str, where: str) -> str:
    """The text in a field of a record.

    Raises:
        ValueError: There is none; names the record and its fields.
    """
    fields = record if isinstance(record, dict) else {}
    if isinstance(text := fields.get(field), str):
        return text
    raise ValueError(
        f"{where} has no text in the field {field!r} (its fields are {', '.join(fields) or 'none'})"
        ": name the field that holds the text after '#', as in 'pages.jsonl#content'."
    )


def uniform(key: np.ndarray | int, index: np.ndarray | int) -> np.ndarray:
    """Uniform numbers in [0, 1) from (key, index), the same on every machine: SplitMix64."""
    with np.errstate(over="ignore"):
        step = (np.asarray(index, np.uint64) + 1) * 0x9E3779B97F4A7C15
        z = (np.asarray(key, np.uint64) << 32) + step
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        return np.asarray(z ^ (z >> 31)) / 2.0**64


def check_fraction(fraction: float) -> None:
    """Raises `ValueError` unless a share of the documents is between 0 and 1."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction={fraction} must be between 0 and 1.")
