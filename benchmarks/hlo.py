"""The bytes that a compiled program moves between devices, read off its HLO text."""

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
    """The compiled program; "" if jaxlib cannot read what a newer compiler wrote, as a v5p's."""
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:
        return ""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without its ``%``.
      shape: of the result, as it is written.
      opcode: what it does.
      given: what stands between the parentheses.
      attributes: what stands after them.
      is_root: whether the computation returns it.
    """

    name: str
    shape: str
    opcode: str
    given: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Their names."""
        return re.findall(r"%([^\s,)]+)", self.given)

    @property
    def source(self) -> str:
        """The function calls of Python that it comes from; "" if it is the compiler's own."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def named(self, attribute: str) -> list[str]:
        """The computations that an attribute names."""
        found = re.search(rf"{attribute}=(?:{{([^}}]*)}}|(%\S+?)(?:,|$))", self.attributes)
        return re.findall(r"%([^\s,]+)", found[1] or found[2]) if found else []


def parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and the name of the one that it begins with."""
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


def shape_bytes(shape: str, where: Callable[[str], bool] = lambda layout: True) -> int:
    """Bytes of the arrays in a shape as HLO writes it, of those whose layout passes."""
    arrays = (found for found in _ARRAY.finditer(shape) if where(found[3] or ""))
    return sum(int(found[1] or 8) * _numbers(found[2]) // 8 for found in arrays)


def largest_array(shape: str) -> int:
    """The numbers in the largest array of a shape."""
    return max((_numbers(found[2]) for found in _ARRAY.finditer(shape)), default=0)


def _numbers(dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d)


class Collective(NamedTuple):
    """Something that devices do together.

    Attributes:
      kind: one of `KINDS`.
      bytes: what one device gives or gets, whichever is more; of an all-reduce, which is a
        reduce-scatter and an all-gather, both.
      largest: the numbers in the largest array that it takes or leaves on a device.
      times: how often it happens in a run of the program.
      source: the function calls of Python that it comes from.
    """

    kind: str
    bytes: int
    largest: int
    times: int
    source: str


def collectives(hlo: str, *, refresh: bool = False) -> list[Collective]:
    """The collectives of a program.

    What is in the body of a loop counts as often as the loop turns, an asynchronous pair once, and
    once a collective that a TPU's compiler spreads over several fusions, to work while it runs.

    Args:
      hlo: ``compiled.as_text()``.
      refresh: of each conditional count the branch that moves the most, instead of the one that
        moves the least.

    Raises:
      ValueError: if a loop with collectives does not say how often it turns.
    """
    program = _Program(hlo, refresh)
    return program.inside(program.entry)


def by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
    """{kind: {"bytes": all that it moves, "count": how often it happens}}."""
    sums: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"bytes": 0, "count": 0})
    for one in found:
        sums[one.kind]["bytes"] += one.times * one.bytes
        sums[one.kind]["count"] += one.times
    return dict(sorted(sums.items()))


def total_bytes(found: list[Collective]) -> int:
    """All bytes of some collectives."""
    return sum(one.times * one.bytes for one in found)


class _Program:
    """The computations of a program, and what is found in each."""

    def __init__(self, hlo: str, refresh: bool) -> None:
        self.choose: Callable[..., list[Collective]] = max if refresh else min
        self.computations, self.entry = parse(hlo)
        self.by_name = {i.name: i for lines in self.computations.values() for i in lines}
        self.inside = functools.cache(self._inside)

    def _inside(self, computation: str) -> list[Collective]:
        """The collectives of a computation and of all that it calls."""
        found: list[Collective] = []
        lines = self.computations[computation]
        starts = any('"AsyncCollectiveStart"' in one.attributes for one in lines)
        for one in lines:
            kind = one.opcode.removesuffix("-done")
            if kind in KINDS:
                # A TPU works while it runs: all that do so name it, the first starts it.
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
        """Reads a collective; `one` is the end of an asynchronous pair."""
        start = self.by_name[one.operands[0]] if one.opcode.endswith("-done") else one
        shapes = one.shape, " ".join(self.by_name[name].shape for name in start.operands)
        size = max(map(shape_bytes, shapes)) * (2 if kind == "all-reduce" else 1)
        return Collective(kind, size, max(map(largest_array, shapes)), 1, start.source)

    def _turns(self, loop: Instruction) -> int:
        """The turns of a loop: as it says, or by its counter's first value, step and limit."""
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
        """The part of a tuple that an instruction takes."""
        found = re.search(r"index=(\d+)", one.attributes)
        return int(found[1]) if found and one.opcode == "get-tuple-element" else None

    def _behind(self, name: str) -> Instruction:
        """The instruction that this one copies."""
        one = self.by_name[name]
        is_copy = one.opcode in ("bitcast", "convert", "copy", "copy-done", "copy-start")
        return self._behind(one.operands[0]) if is_copy else one

    def _value(self, name: str, carried: Instruction | None = None) -> int | None:
        """The number that an instruction gives, if it is constant; or carried into a loop."""
        one = self._behind(name)
        if one.opcode == "constant":
            return int(one.given) if one.given.isdecimal() else None
        index = self._index(one)
        if carried and index is not None and carried.opcode == "tuple":
            return self._value(carried.operands[index])
        return None
