"""Documents in files, with random access.

Text is read in *pieces*: a whole document, or 64 KiB of a long one, so that no file is ever held in
memory and one long book shuffles as well as a thousand pages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from memopt.text.sources import Sources

if TYPE_CHECKING:
    import grain

#: Longest piece of a text file, in bytes.
PIECE_BYTES = 2**16
#: With fewer documents than this, the tail of each is held out instead of whole documents.
FEW_DOCUMENTS = 100


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        content: Text or, of a record, what `Records.read` returns.
        begins: Whether the document begins here.
        ends: Whether the document ends here.
        name: The file and line, or the dataset and position, of a record.
    """

    content: Any
    begins: bool
    ends: bool
    name: str = ""


class OtherKindError(ValueError):
    """A record holds something else than what is asked for; says what to do about it."""


class Records(NamedTuple):
    """How records are read.

    Attributes:
        noun: Name of what they hold: "text".
        field: The field that holds it, if no other is named.
        read: Returns it, given the record and the field; raises `ValueError` if there is none, and
            says why, after a name for the record.
        in_every_file: Whether files of any name are JSON lines.
    """

    noun: str
    field: str
    read: Callable[[Any, str], Any]
    in_every_file: bool = False


class File(NamedTuple):
    """A file of text, or of records in JSON.

    Attributes:
        path: Its path.
        name: Its name relative to the directory or glob that found it; decides its split.
        size: Bytes of its text, as UTF-8.
        field: The field of a record that holds the text; None for plain text.
        digest: A hash of its text.
        begin: Where its text begins, in the file or among the decoded copies.
        decoded: Whether it is read from a decoded copy.
    """

    path: str
    name: str
    size: int
    field: str | None
    digest: str
    begin: int = 0
    decoded: bool = False

    def read(self, sources: Sources, start: int, stop: int) -> bytes:
        """Returns bytes of its text."""
        return sources.read(self.path, self.begin + start, stop - start, decoded=self.decoded)


#: Bytes `start` to `stop` of a file; `line` is the number of the JSON line, from 1, or 0 in text.
PIECE = np.dtype([("file", "i4"), ("line", "i8"), ("start", "i8"), ("stop", "i8")])
_NO_PIECES = np.empty(0, PIECE)


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """Documents in files, with random access to their pieces.

    Attributes:
        files: The files.
        pieces: Byte ranges, an array of `PIECE`.
        sources: Where they are read from.
        records: What their records hold.
    """

    files: tuple[File, ...]
    pieces: np.ndarray
    sources: Sources
    records: Records

    def __len__(self) -> int:
        """The number of pieces."""
        return len(self.pieces)

    def __getitem__(self, index: int) -> Piece:
        """Reads piece `index`.

        Raises:
            ValueError: The file has changed since it was found.
            OSError: The file cannot be read any more.
        """
        number, line, start, stop = self.pieces[index].tolist()
        file = self.files[number]
        content = file.read(self.sources, start, stop)
        if file.field is None:
            return Piece(content.decode("utf-8", "replace"), start == 0, stop == file.size)
        try:
            document = read_line(content, file.field, self.records)
            return Piece(document, True, True, f"{file.path}, line {line}")
        except ValueError as error:
            raise ValueError(
                f"{file.path} has changed since it was found: line {line} {error}"
            ) from error

    @property
    def chunk(self) -> int:
        """Pieces to read at a time; larger for corpora of many, short pieces."""
        return max(2, min(len(self) // 1000, 16))

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
        held = self._hashes(self.pieces) < validation_fraction
        if np.count_nonzero(_begins(self.pieces)) < FEW_DOCUMENTS or held.all() or not held.any():
            return self._split_tails(validation_fraction)
        return self._part(self.pieces[~held]), self._part(self.pieces[held])

    def _split_tails(self, fraction: float) -> tuple[Files, Files]:
        heads, tails = [_NO_PIECES], [_NO_PIECES]
        for number in np.unique(self.pieces["file"]).tolist():
            pieces = self.pieces[self.pieces["file"] == number]
            if self.files[number].field is None:
                start, stop = pieces["start"][0].item(), pieces["stop"][-1].item()
                cut = self._boundary(number, math.floor(stop - (stop - start) * fraction))
                head, tail = self._cut(number, start, cut), self._cut(number, cut, stop)
            else:
                lines = len(pieces) - math.ceil(len(pieces) * fraction)
                head, tail = pieces[:lines], pieces[lines:]
            if not len(head):  # too short to cut
                head, tail = tail, head
            heads.append(head)
            tails.append(tail)
        if not any(map(len, tails)):
            return self._split_documents(fraction)
        return self._part(np.concatenate(heads)), self._part(np.concatenate(tails))

    def _split_documents(self, fraction: float) -> tuple[Files, Files]:
        """Holds out whole documents, those with the smallest hashes; or the end of the only one."""
        begins, number = _begins(self.pieces), self.pieces["file"][0].item()
        count, size = np.count_nonzero(begins), self.files[number].size
        if count > 1:
            order = np.argsort(self._hashes(self.pieces[begins]), kind="stable")
            held_out = order[: min(math.ceil(count * fraction), count - 1)]
            held = np.isin(np.cumsum(begins) - 1, held_out)
            return self._part(self.pieces[~held]), self._part(self.pieces[held])
        cut = 0
        if self.files[number].field is None:
            cut = self._boundary(number, math.floor(size - size * fraction), at_line=False)
        if not 0 < cut < size:
            raise ValueError(
                f"data is too small to hold out a validation part of {fraction:g}: it is a single "
                "document; give another file or record, or --eval-data."
            )
        return self._part(self._cut(number, 0, cut)), self._part(self._cut(number, cut, size))

    def _part(self, pieces: np.ndarray) -> Files:
        return dataclasses.replace(self, pieces=pieces)

    def _hashes(self, pieces: np.ndarray) -> np.ndarray:
        names = np.array([zlib.crc32(os.fsencode(file.name)) for file in self.files], np.uint64)
        return uniform(names[pieces["file"]], pieces["line"])

    def _cut(self, number: int, start: int, stop: int) -> np.ndarray:
        cuts = cut_text(self.files[number], self.sources, start, stop)
        return np.array([(number, 0, *cut) for cut in cuts], PIECE)

    def _boundary(self, number: int, position: int, *, at_line: bool = True) -> int:
        return _boundary(self.files[number], self.sources, position, at_line=at_line)

    def epochs(self, seed: int) -> grain.MapDataset:
        """Repeats the pieces without end, shuffled anew in each epoch."""
        return self._shuffled(seed).repeat().map(self.__getitem__)

    def once(self) -> grain.MapDataset:
        """Returns every piece once, in a shuffled order that never changes."""
        return self._shuffled(seed=0).map(self.__getitem__)

    def _shuffled(self, seed: int) -> grain.MapDataset:
        import grain

        return grain.MapDataset.range(len(self)).shuffle(seed=seed)

    def listing(self) -> list[list[Any]]:
        """Returns name, size, field and digest of each file, to be given to `renamed`."""
        return [[file.name, file.size, file.field, file.digest] for file in self.files]

    def renamed(self, listing: list[list[Any]]) -> Files | None:
        """Returns the same files with the names and in the order of a listing.

        Names decide which documents are held out, and the order. So the same content under other
        names gives the same batches.

        Args:
            listing: What `listing` returned.

        Returns:
            The files, or None if the content is not the same.
        """
        numbers: dict[tuple[Any, ...], list[int]] = {}
        for number, file in enumerate(self.files):
            numbers.setdefault((file.size, file.field, file.digest), []).append(number)
        order = []
        for _, *content in listing:
            if not (same := numbers.get(tuple(content))):
                return None
            order.append(same.pop(0))
        if len(order) < len(self.files):
            return None
        pieces = self.pieces.copy()
        pieces["file"] = np.argsort(order)[pieces["file"]]
        pieces = pieces[np.argsort(pieces["file"], kind="stable")]
        names = (name for name, *_ in listing)
        files = (self.files[i]._replace(name=name) for i, name in zip(order, names, strict=True))
        return dataclasses.replace(self, files=tuple(files), pieces=pieces)

    def describe(self) -> dict[str, Any]:
        """Returns the number of files and bytes, a hash of names and pieces, and one of content."""
        listing = json.dumps([(file.name, file.size, file.field) for file in self.files])
        digest = hashlib.sha256(listing.encode() + self.pieces.tobytes()).hexdigest()
        content = hashlib.sha256("".join(file.digest for file in self.files).encode()).hexdigest()
        count = len(np.unique(self.pieces["file"]))
        size = int((self.pieces["stop"] - self.pieces["start"]).sum())
        return {"files": count, "bytes": size, "digest": digest, "content": content}


def cut_text(file: File, sources: Sources, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cuts bytes `start` to `stop` of a text file into pieces, where lines begin if possible."""
    positions = range(start + PIECE_BYTES, stop, PIECE_BYTES)
    cuts = {_boundary(file, sources, at) for at in positions}
    return itertools.pairwise(sorted({start, stop} | {at for at in cuts if at < stop}))


def _boundary(file: File, sources: Sources, position: int, *, at_line: bool = True) -> int:
    """Finds the start of a line, or at least of a character, at or soon after `position`."""
    if position == 0:
        return 0
    window = file.read(sources, position - 1, min(position - 1 + 2**10, file.size))
    newline = window.find(b"\n") if at_line else -1
    if newline >= 0:
        return position + newline
    continuation = itertools.takewhile(lambda byte: byte & 0xC0 == 0x80, window[1:5])
    return position + len(list(continuation))


def _begins(pieces: np.ndarray) -> np.ndarray:
    """Whether a document begins at each piece."""
    return (pieces["line"] > 0) | (pieces["start"] == 0)


def read_line(line: bytes, field: str, records: Records) -> Any:
    """Returns what a JSON line holds.

    Raises:
        ValueError: It does not; says why, after a name for the line.
    """
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    return records.read(record, field)


def text_of(record: Any, field: str) -> str:
    """Returns the text in a field of a record.

    Raises:
        OtherKindError: It holds a chat.
        ValueError: There is none; says why, after a name for the record.
    """
    fields = record if isinstance(record, dict) else {}
    if isinstance(text := fields.get(field), str):
        return text
    if isinstance(fields.get("messages", fields.get("conversations")), list):
        raise OtherKindError("looks like a chat: add --format chats")
    found = (
        f"{text!r:.20} in it" if field in fields else f"its fields: {', '.join(fields) or 'none'}"
    )
    raise ValueError(f"has no text in the field {field!r} ({found})")


#: What data for pretraining holds.
TEXT = Records("text", "text", text_of)


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
