"""Reads HLO text: what a compiled program moves between devices, and where its code comes from."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax

KINDS = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter"),
)

_HEAD = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"(ROOT )?%(\S+) = (.+?) ([\w-]+)\((.*?)\)(?:, (.*))?$")
_ARRAY = re.compile(r"(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]({[^}]*})?")


def text(compiled: jax.stages.Compiled) -> str:
    """The compiled program's text, or "" if jaxlib cannot read it (a v5p's newer compiler)."""
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:
        return ""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
      name: the name without ``%``.
      shape: the shape of the result, as HLO writes it.
      opcode: the operation.
      given: the text between the parentheses.
      attributes: the text after the parentheses.
      is_root: whether the computation returns the result.
    """

    name: str
    shape: str
    opcode: str
    given: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([^\s,)]+)", self.given)

    @property
    def source(self) -> str:
        """The Python function calls that it comes from; "" for the compiler's own instructions."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def frame(self) -> int | None:
        """The number of its stack frame in `frames`."""
        found = re.search(r"stack_frame_id=(\d+)", self.attributes)
        return int(found[1]) if found else None

    def named(self, attribute: str) -> list[str]:
        """The computations that an attribute names."""
        found = re.search(rf"{attribute}=(?:{{([^}}]*)}}|(%\S+?)(?:,|$))", self.attributes)
        return re.findall(r"%([^\s,]+)", found[1] or found[2]) if found else []


def parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """Parses a program: its computations by name, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", []
    for line in map(str.strip, hlo.splitlines()):
        if head := _HEAD.match(line):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, given, attributes = found.groups()
            lines.append(Instruction(name, shape, opcode, given, attributes or "", bool(root)))
    return computations, entry


class Frame(NamedTuple):
    """A place in Python code.

    Attributes:
        file: The path of the file.
        line: The number of the line.
        outer: The number of the frame that called it; 0 if there is none.
    """

    file: str
    line: int
    outer: int


def frames(hlo: str) -> dict[int, Frame]:
    """Reads the stack frames of a program by number; none if JAX recorded none.

    Args:
        hlo: The program's text.

    Example:
        >>> text = '''FileNames
        ... 1 "model.py"
        ... FileLocations
        ... 1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=9}
        ... StackFrames
        ... 1 {file_location_id=1 parent_frame_id=1}
        ... '''
        >>> frames(text)
        {1: Frame(file='model.py', line=7, outer=0)}
    """
    files = {
        int(n): name for n, name in re.findall(r'^(\d+) "(.*)"$', _section(hlo, "FileNames"), re.M)
    }
    lines = {
        int(n): (files[int(file)], int(line))
        for n, file, line in re.findall(
            r"^(\d+) {file_name_id=(\d+) .*?\bline=(\d+)", _section(hlo, "FileLocations"), re.M
        )
    }
    found = re.findall(
        r"^(\d+) {file_location_id=(\d+)(?: parent_frame_id=(\d+))?",
        _section(hlo, "StackFrames"),
        re.M,
    )
    # XLA writes one more than the number of the outer frame, which is 0 where there is none.
    return {int(n): Frame(*lines[int(place)], int(outer or 1) - 1) for n, place, outer in found}


def _section(hlo: str, name: str) -> str:
    """The lines of a table at the head of a program."""
    found = re.search(rf"^{name}\n((?:\d.*\n)*)", hlo, re.M)
    return found[1] if found else ""


def shape_bytes(shape: str, where: Callable[[str], bool] = lambda layout: True) -> int:
    """The bytes of the arrays in an HLO shape whose layout passes the filter."""
    arrays = (found for found in _ARRAY.finditer(shape) if where(found[3] or ""))
    return sum(int(found[1] or 8) * _numbers(found[2]) // 8 for found in arrays)


def largest_array(shape: str) -> int:
    """The size of the largest array of a shape."""
    return max((_numbers(found[2]) for found in _ARRAY.finditer(shape)), default=0)


def _numbers(dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d)


class Collective(NamedTuple):
    """A collective operation.

    Attributes:
      kind: one of `KINDS`.
      bytes: the bytes that one device sends or receives, whichever is more; for an all-reduce,
        those of a reduce-scatter and an all-gather.
      largest: the size of the largest array that it reads or writes on a device.
      times: how often it runs in one execution of the program.
      source: the Python function calls that it comes from.
    """

    kind: str
    bytes: int
    largest: int
    times: int
    source: str


def collectives(hlo: str, *, refresh: bool = False) -> list[Collective]:
    """Finds the collectives of a program.

    Those in the body of a loop are counted for each iteration. An asynchronous pair counts once, as
    does a collective that the TPU compiler spreads over several fusions to overlap it with
    computation.

    Args:
      hlo: ``compiled.as_text()``.
      refresh: for each conditional, count the branch that moves the most instead of the one that
        moves the least.

    Raises:
      ValueError: if the number of iterations of a loop with collectives is unknown.
    """
    program = _Program(hlo, refresh)
    return program.inside(program.entry)


def by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Sums collectives by kind: {kind: {"bytes": bytes moved, "count": number of runs}}."""
    sums: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"bytes": 0, "count": 0})
    for one in found:
        sums[one.kind]["bytes"] += one.times * one.bytes
        sums[one.kind]["count"] += one.times
    return dict(sorted(sums.items()))


def total_bytes(found: list[Collective]) -> int:
    """The total bytes of some collectives."""
    return sum(one.times * one.bytes for one in found)


class _Program:
    """The computations of a program, and the collectives found in each."""

    def __init__(self, hlo: str, refresh: bool) -> None:
        self.choose: Callable[..., list[Collective]] = max if refresh else min
        self.computations, self.entry = parse(hlo)
        self.by_name = {i.name: i for lines in self.computations.values() for i in lines}
        self.inside = functools.cache(self._inside)

    def _inside(self, computation: str) -> list[Collective]:
        """The collectives of a computation and of all computations that it calls."""
        found: list[Collective] = []
        lines = self.computations[computation]
        starts = any('"AsyncCollectiveStart"' in one.attributes for one in lines)
        for one in lines:
            kind = one.opcode.removesuffix("-done")
            if kind in KINDS:
                # On a TPU, fusions that overlap with a collective name it; the first starts it.
                if starts or "async_collective_fusion_config" not in one.attributes:
                    found.append(self._collective(kind, one))
            elif one.opcode == "while":
                (body,) = one.named("body")
                if each := self.inside(body):
                    turns = self._turns(one)
                    found += [c._replace(times=c.times * turns) for c in each]
            elif one.opcode == "conditional":
                names = one.named("branch_computations")
                names = names or one.named("true_computation") + one.named("false_computation")
                found += self.choose(map(self.inside, names), key=total_bytes)
            elif one.opcode in ("async-start", "call", "fusion"):
                for name in one.named("to_apply") + one.named("calls"):
                    found += self.inside(name)
        return found

    def _collective(self, kind: str, one: Instruction) -> Collective:
        """Reads a collective; `one` may be the end of an asynchronous pair."""
        start = self.by_name[one.operands[0]] if one.opcode.endswith("-done") else one
        shapes = one.shape, " ".join(self.by_name[name].shape for name in start.operands)
        size = max(map(shape_bytes, shapes)) * (2 if kind == "all-reduce" else 1)
        return Collective(kind, size, max(map(largest_array, shapes)), 1, start.source)

    def _turns(self, loop: Instruction) -> int:
        """The iterations of a loop, as annotated or from its counter's start, step and limit."""
        if said := re.search(r'"known_trip_count":{"n":"(\d+)"}', loop.attributes):
            return int(said[1])
        (condition,), (body,) = loop.named("condition"), loop.named("body")
        test, end = self._root(condition), self._root(body)
        if test.opcode == "compare" and "direction=LT" in test.attributes:
            counter, limit = map(self._behind, test.operands)
            index = self._index(counter)
            start = self.by_name[loop.operands[0]]
            first, last = self._value(start.operands[index or 0]), self._value(limit.name, start)
            step = self._behind(end.operands[index or 0])
            by = [self._value(name, start) for name in step.operands]
            width = next((n for n in by if n), None) if step.opcode == "add" else None
            if None not in (index, first, last, width):
                return -(-(last - first) // width)  # type: ignore[operator]
        raise ValueError(f"the loop {loop.name!r} does not say how often it turns.")

    def _root(self, computation: str) -> Instruction:
        return next(i for i in self.computations[computation] if i.is_root)

    def _index(self, one: Instruction) -> int | None:
        """The index of a tuple's element that an instruction reads."""
        found = re.search(r"index=(\d+)", one.attributes)
        return int(found[1]) if found and one.opcode == "get-tuple-element" else None

    def _behind(self, name: str) -> Instruction:
        """The instruction whose result this one copies."""
        one = self.by_name[name]
        is_copy = one.opcode in ("bitcast", "convert", "copy", "copy-done", "copy-start")
        return self._behind(one.operands[0]) if is_copy else one

    def _value(self, name: str, carried: Instruction | None = None) -> int | None:
        """The number that an instruction returns, if it is constant or carried into a loop."""
        one = self._behind(name)
        if one.opcode == "constant":
            return int(one.given) if one.given.isdecimal() else None
        index = self._index(one)
        if carried and index is not None and carried.opcode == "tuple":
            return self._value(carried.operands[index])
        return None
