"""The temporary arrays that a compiled program holds over time, from the compiler's own records.

XLA's compilers for CPUs, GPUs and TPUs write the same files to ``xla_dump_to``: which arrays share
the memory of temporaries (the buffer assignment), from when to when each is needed (live ranges),
and the scheduled program.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memopt.planning import hlo

#: Packages and files whose lines do not tell which part of the model or the optimizer it is.
LIBRARIES = ("jax", "flax", "optax")
WRAPPERS = ("memopt/models/observed.py",)

_ALLOCATION = re.compile(r"allocation \d+: size (\d+), (.*):$")
_VALUE = re.compile(
    r" value: <\d+ (\S+?)({[\d,]*})?( \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$"
)
_RANGE = re.compile(r"    (\S+?)({[\d,]*}):(\d+)-(\d+)$")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array in the memory of temporaries.

    Attributes:
        bytes: Its size, padding included.
        shape: Its dtype and shape, such as "bf16[4,192,512]".
        op: The JAX operation that makes it, such as "jvp()/while/body/dot_general"; of an array of
            the compiler's own, "compiler: " and its name, or "copy of " and the argument's.
        source: The line of the model or the optimizer that it comes from, such as
            "memopt/models/llama.py:165"; "" if JAX recorded none.
    """

    bytes: int
    shape: str
    op: str
    source: str


class Files(NamedTuple):
    """Files that a compiler wrote about a program.

    Attributes:
        text: The scheduled program.
        assignment: The buffer assignment.
        ranges: The live ranges.
    """

    text: str
    assignment: str
    ranges: str


def read_files(directory: Path) -> Files | None:
    """Reads what a compiler wrote about the one program it compiled; None if it wrote nothing.

    Args:
        directory: `xla_dump_to`.
    """
    texts = []
    for ending in (".txt", "-buffer-assignment.txt", "-live-range.txt"):
        found = [path.read_text() for path in directory.glob(f"*after_optimizations{ending}")]
        if not found:
            return None
        texts.append(max(found, key=len))  # of a small helper program, too
    return Files(*texts)


class _Value(NamedTuple):
    """One array of the assignment: where it is in memory, and when."""

    name: str
    element: int | None
    is_phi: bool
    size: int
    offset: int
    shape: str
    start: int
    end: int


class Assignment:
    """The temporary arrays of a program, with the moments at which each is held.

    On a TPU only those in its main memory count.
    """

    def __init__(self, files: Files) -> None:
        """Reads what a compiler wrote.

        Args:
            files: The files.
        """
        self._values = list(_values(files))
        self._totals = _totals(self._values)
        self._program = _Program(files.text)
        self._described: dict[tuple[_Value, ...], Buffer] = {}

    def at_peak(self) -> list[Buffer]:
        """Returns the arrays that are held when most bytes of them are, the largest first."""
        return self._at(int(self._totals.argmax())) if self._values else []

    def over_time(self, moments: int) -> list[list[Buffer]]:
        """Returns the arrays held in each part of the program, each list as that of `at_peak`.

        The instructions are cut into parts of equal length. The arrays of a part are those of the
        moment in it when most bytes are held. The body of a loop appears once.

        Args:
            moments: The number of parts; there are fewer if the program is shorter.
        """
        if not self._values:
            return []
        parts = np.array_split(np.arange(len(self._totals)), min(moments, len(self._totals)))
        return [self._at(part[self._totals[part].argmax()]) for part in parts]

    def _at(self, moment: int) -> list[Buffer]:
        places: dict[int, list[_Value]] = collections.defaultdict(list)
        for value in self._values:
            if value.start <= moment <= value.end:
                places[value.offset].append(value)
        held = [self._describe(tuple(here)) for here in places.values()]
        return sorted(held, key=lambda buffer: -buffer.bytes)

    def _describe(self, here: tuple[_Value, ...]) -> Buffer:
        """One array of those that share a place; a loop's own name says less than an operation."""
        if here in self._described:
            return self._described[here]
        for group in here, [value for one in here for value in _same(one, self._values)]:
            origins = [(self._program.origin(value.name, value.element), value) for value in group]
            known = lambda pair: (pair[0] is not None, not pair[1].is_phi, pair[1].start)
            origin, value = max(origins, key=known)
            if origin:
                break
        op, source = self._program.describe(origin) if origin else (f"compiler: {value.name}", "")
        shape = re.sub(r"{[^}]*}", "", value.shape)
        found = Buffer(max(value.size for value in here), shape, op, source)
        return self._described.setdefault(here, found)


def _values(files: Files) -> Iterator[_Value]:
    """The arrays in the main memory's temporaries."""
    ranges = {
        (found[1], found[2]): (int(found[3]), int(found[4]))
        for found in map(_RANGE.match, files.ranges.splitlines())
        if found
    }
    is_temporary = False
    for line in files.assignment.splitlines():
        if head := _ALLOCATION.match(line):
            is_temporary = "preallocated-temp" in head[2] and "color" not in head[2]
        elif is_temporary and (found := _VALUE.match(line)):
            name, index, phi, size, offset, shape = found.groups()
            if span := ranges.get((name, index or "{}")):
                first = re.match(r"{(\d+)", index or "")
                which = int(first[1]) if first else None
                yield _Value(name, which, bool(phi), int(size), int(offset), shape, *span)


def _totals(values: Sequence[_Value]) -> np.ndarray:
    """The bytes alive at each moment; arrays at one place count once."""
    events: dict[int, list[tuple[int, _Value]]] = collections.defaultdict(list)
    for value in values:
        events[value.start].append((1, value))
        events[value.end + 1].append((-1, value))
    alive: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    total, totals = 0, np.zeros(max(events, default=0), np.int64)
    for time in range(len(totals)):
        for change, value in events.get(time, ()):
            sizes = alive[value.offset]
            total -= max(+sizes, default=0)
            sizes[value.size] += change
            total += max(+sizes, default=0)
        totals[time] = total
    return totals


def _same(one: _Value, values: Iterable[_Value]) -> list[_Value]:
    """The values of an array that is updated in place, by loops, from its first to its last one."""
    place = lambda value: (value.offset, value.size, value.shape)
    found, rest = [one], [value for value in values if place(value) == place(one)]
    for value in sorted(rest, key=lambda value: value.start):
        if value.start <= found[-1].end <= value.end:
            found.append(value)
    for value in sorted(rest, key=lambda value: -value.end):
        if value.start <= found[0].start <= value.end:
            found.insert(0, value)
    return found


class _Program:
    """A program's instructions, and the operations and lines that they come from."""

    def __init__(self, text: str) -> None:
        computations, _ = hlo.parse(text)
        self._lines, self._frames = computations, hlo.frames(text)
        self._by_name = {one.name: one for lines in computations.values() for one in lines}
        self._inside = {one.name: name for name, lines in computations.items() for one in lines}
        self._loops = {
            name: one
            for one in self._by_name.values()
            if one.opcode == "while"
            for name in one.named("body")
        }

    def origin(self, name: str, index: int | None) -> hlo.Instruction | None:
        """The instruction of an operation of JAX that makes an array, through the compiler's own.

        Args:
            name: The instruction that defines the array.
            index: Which element of its tuple the array is, if it is one.
        """
        for _ in range(20):  # copies of loops' elements into loops, at most
            one = self._by_name.get(name)
            if one is None:
                return None
            loop = one if one.opcode == "while" else self._loops.get(self._inside[name])
            if loop and index is not None and one.opcode in ("while", "parameter"):
                made = self._by_name[loop.operands[0]]
                if made.opcode == "tuple":
                    name, index = made.operands[index], None
                    continue
            inner = [i for called in one.named("calls") for i in self._lines[called]]
            for made in (one, *reversed(inner)):
                if made.source and (made.frame or one.opcode == "parameter"):
                    return made
            if one.opcode == "get-tuple-element" and (
                found := re.search(r"index=(\d+)", one.attributes)
            ):
                index = int(found[1])
            if not one.operands:
                return None
            name = one.operands[0]
        return None

    def describe(self, one: hlo.Instruction) -> tuple[str, str]:
        """The operation and the line of an instruction."""
        if one.opcode == "parameter":
            return f"copy of {one.source}", ""
        return one.source.partition("/")[2] or one.source, find_source(self._frames, one.frame or 0)


def find_source(frames: Mapping[int, hlo.Frame], frame: int) -> str:
    """Returns the innermost line of a stack that is no library's, as "package/file.py:line".

    Example:
        >>> stack = {1: hlo.Frame("/home/me/train.py", 3, 0)}
        >>> stack |= {2: hlo.Frame("/lib/site-packages/flax/nnx/linear.py", 9, 1)}
        >>> find_source(stack, 2)
        '/home/me/train.py:3'
    """
    while found := frames.get(frame):
        parts = Path(found.file).parts
        packages = parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts
        if packages[0] not in LIBRARIES and not found.file.endswith(WRAPPERS):
            return f"{_short(found.file)}:{found.line}"
        frame = found.outer
    return ""


#: The directory that holds memopt.
ROOT = Path(__file__).parents[2]


def absolute(file: str) -> Path:
    """The path of a file that a buffer's source names."""
    return ROOT / file


def _short(file: str) -> str:
    """A path from the directory that holds memopt, if it is in it."""
    return str(Path(file).relative_to(ROOT)) if Path(file).is_relative_to(ROOT) else file
