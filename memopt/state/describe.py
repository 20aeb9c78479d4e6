"""What an optimizer takes each parameter for, and what it keeps of it."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import optax

from memopt.matrices import Layout, layout_of, layouts_seen
from memopt.parameters import MATRIX, VECTOR, Parameter, read_parameters
from memopt.state.bytes import state_bytes


class Described(NamedTuple):
    """What an optimizer takes a parameter for.

    Attributes:
      name: its keys joined by ``/``.
      shape: of the array.
      kind: "matrix", "embedding", "position", "router", "head" or "vector".
      axes: the axes of rows, of columns and of the stack, as text; "" if it treats entries alike.
      why: what says so.
      kept_by: the transformations that keep something of it.
      state: bytes of state kept of it; None if the optimizer refuses the parameters.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    axes: str
    why: str
    kept_by: tuple[str, ...]
    state: int | None


@dataclasses.dataclass(frozen=True)
class Description:
    """What `describe` found; ``print`` shows it as a table.

    Attributes:
      rows: of each parameter, in the order of the tree.
      refused: why the optimizer cannot work with these parameters, "" if it can.
    """

    rows: tuple[Described, ...]
    refused: str = ""

    def __getitem__(self, name: str) -> Described:
        return {row.name: row for row in self.rows}[name]

    def __str__(self) -> str:
        header = ("leaf", "shape", "taken for", "rows, columns, stack", "kept by", "bytes", "why")
        cells = [
            (r.name, _shape(r.shape), r.kind, r.axes, _kept_by(r), _bytes(r.state), r.why)
            for r in self.rows
        ]
        lines = list(_aligned([header, *cells]))
        return "\n".join([*lines, *([f"refused: {self.refused}"] if self.refused else [])])

    def by_kind(self) -> Iterator[str]:
        """A line for each kind of parameter, and for each method that kinds get."""
        groups: dict[tuple[str, str], list[Described]] = collections.defaultdict(list)
        for row in self.rows:
            groups[row.kind, _kept_by(row)].append(row)
        cells = []
        for (kind, kept_by), rows in groups.items():
            state = sum(row.state or 0 for row in rows)
            names = ", ".join(row.name for row in rows[:2]) + ", …" * (len(rows) > 2)
            cells.append((f"{len(rows)}", kind, kept_by, f"{state:,} bytes", names))
        return _aligned(cells)


def describe(tx: optax.GradientTransformation, params: Any) -> Description:
    """Shows what an optimizer takes each parameter for; evaluates shapes only.

    Args:
      tx: any Optax transformation.
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place, bare or in boxes of Flax or
        Haliax.

    Returns:
      A row for each parameter: whether it is a matrix, and of which axes, an embedding, a
      position, a router, a head or a vector; what says so (its name, the axis names in its box,
      the module around it, `matrices`); the transformations that keep state of it, and how much.

    Example:
      >>> import jax, memopt
      >>> shape = lambda *s: jax.ShapeDtypeStruct(s, "float32")
      >>> params = {"q": shape(64, 4, 16), "o": shape(4, 16, 64), "head": shape(64, 512)}
      >>> found = describe(memopt.apollo_mini(1e-2), params)
      >>> found["q"].axes, found["q"].state, found["head"].kept_by
      ('rows 0, cols 1 2', 516, ('scale_by_adam',))
      >>> for line in found.by_kind():
      ...     print(line)
      1  head    scale_by_adam                           262,144 bytes  head
      2  matrix  scale_by_uncorrected_adam, in_subspace    1,032 bytes  o, q
    """
    parameters = read_parameters(params)
    table, refused = None, ""
    with layouts_seen() as layouts:
        try:
            table = state_bytes(tx, params)
        except ValueError as error:
            refused = f"{error}"
    rows = []
    for p in parameters:
        kind, axes, why = _taken_for(p, layouts.get(p.name))
        kept = (table.kept_by[p.name], table[p.name]) if table else ((), None)
        rows.append(Described(p.name, p.shape, kind, axes, why, *kept))
    return Description(tuple(rows), refused)


def _taken_for(p: Parameter, layout: Layout | None) -> tuple[str, str, str]:
    """The kind of a parameter, its axes and what says so, by what an optimizer did with it."""
    why = f"{p.why}, but {p.doubt}" if p.doubt else p.why
    if layout is None:
        return p.kind, "", why
    if not layout.is_matrix:
        return (VECTOR, "", "matrices= says so") if p.kind == MATRIX else (p.kind, "", why)
    if p.matrix is None or layout.axes != layout_of(p.name, p, p.matrix).axes:
        why = "matrices= says so"
    sides = zip(("rows", "cols", "stack"), layout.axes, strict=True)
    text = ", ".join(f"{side} {' '.join(map(str, axes))}" for side, axes in sides if axes)
    return (MATRIX if p.kind == VECTOR else p.kind), text, why


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _kept_by(row: Described) -> str:
    return ", ".join(row.kept_by) or ("?" if row.state is None else "nothing kept")


def _bytes(state: int | None) -> str:
    return "?" if state is None else f"{state:,}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of cells in columns; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(n)
            if cell.removesuffix(" bytes").replace(",", "").isdecimal()
            else cell.ljust(n)
            for cell, n in zip(row, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()
