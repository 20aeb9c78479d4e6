"""Describes how an optimizer treats each parameter, and the state that it keeps."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax

from memopt.checked import checked
from memopt.matrices import Layout, layout_of, layouts_seen
from memopt.names import MATRIX, VECTOR
from memopt.parameters import Parameter, init_shapes, read_parameters
from memopt.state.bytes import state_bytes


class Described(NamedTuple):
    """One row of a `Description`.

    Attributes:
        name: the parameter's keys joined by ``/``.
        shape: the shape of the array.
        kind: "matrix", "embedding", "position", "router", "head" or "vector"; "rest" for a matrix
            that `matrices` excludes.
        axes: the axes of rows, columns and stack, as text; "" if the optimizer treats the parameter
            elementwise.
        why: the reason for `kind` and `axes`.
        kept_by: the transformations that keep state for it.
        state: the bytes of that state; None if the optimizer refuses the parameters.
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
    """The result of `describe`; ``print`` shows it as a table.

    Attributes:
        rows: one for each parameter, in the order of the tree.
        refused: the optimizer's error for these parameters, "" if it accepts them.
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
        lines = list(_aligned([header, *cells], numbers=(5,)))
        return "\n".join([*([f"refused: {self.refused}"] if self.refused else []), *lines])

    def by_kind(self) -> Iterator[str]:
        """Yields a line for each kind of parameter and the transformations that keep its state."""
        groups: dict[tuple[str, str], list[Described]] = collections.defaultdict(list)
        for row in self.rows:
            groups[row.kind, _kept_by(row)].append(row)
        cells = []
        for (kind, kept_by), rows in groups.items():
            state = None if self.refused else sum(row.state or 0 for row in rows)
            cells.append((f"{len(rows)}", kind, kept_by, f"{_bytes(state)} bytes"))
        return _aligned(cells, numbers=(0, 3))


@checked
def describe(tx: optax.GradientTransformation, params: Any) -> Description:
    """Shows how an optimizer treats each parameter, from shapes alone.

    Args:
        tx: any Optax transformation.
        params: arrays or ``jax.ShapeDtypeStruct``, possibly in boxes of Flax or Haliax.

    Returns:
        A row for each parameter: its kind (matrix, embedding, position, router, head or vector),
        its rows and columns, the reason (its name, the axis names in its box, its module,
        `matrices`), the transformations that keep state for it, and the bytes of that state.

    Example:
        >>> import jax, memopt
        >>> shape = lambda *s: jax.ShapeDtypeStruct(s, "float32")
        >>> params = {"q": shape(64, 4, 16), "o": shape(4, 16, 64), "head": shape(64, 512)}
        >>> found = describe(memopt.apollo_mini(1e-2), params)
        >>> found["q"].axes, found["q"].state, found["head"].kept_by
        ('rows 0, cols 1 2', 516, ('scale_by_adam',))
        >>> for line in found.by_kind():
        ...     print(line)
        1  head    scale_by_adam                           262,144 bytes
        2  matrix  scale_by_uncorrected_adam, in_subspace    1,032 bytes
    """
    parameters = read_parameters(params)
    table, refused = None, ""
    with layouts_seen() as layouts:
        try:
            table = state_bytes(tx, params)
        except ValueError as error:
            refused = str(error)
        else:  # transformations without state read their matrices only in the update
            with contextlib.suppress(TypeError, ValueError):
                like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
                init_shapes(lambda p: tx.update(p, tx.init(p), p), like)
    rows = []
    for p in parameters:
        kind, axes, why = _taken_for(p, layouts.get(p.name))
        kept = (table.kept_by[p.name], table[p.name]) if table else ((), None)
        rows.append(Described(p.name, p.shape, kind, axes, why, *kept))
    return Description(tuple(rows), refused)


_SAID = "set by matrices=, or read without the rest of the tree"


def _taken_for(p: Parameter, layout: Layout | None) -> tuple[str, str, str]:
    """The kind, axes and reason of a parameter, given the layout that the optimizer used."""
    why = f"{p.why}, but {p.doubt}" if p.doubt else p.why
    if layout is None:
        return p.kind, "", why
    if not layout.is_matrix:
        return ("rest", "", _SAID) if p.kind == MATRIX else (p.kind, "", why)
    if p.matrix is None or layout.axes != layout_of(p.name, p, p.matrix).axes:
        why = _SAID
    sides = zip(("rows", "cols", "stack"), layout.axes, strict=True)
    text = ", ".join(f"{side} {' '.join(map(str, axes))}" for side, axes in sides if axes)
    return (MATRIX if p.kind == VECTOR else p.kind), text, why


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _kept_by(row: Described) -> str:
    return ", ".join(row.kept_by) or ("?" if row.state is None else "nothing kept")


def _bytes(state: int | None) -> str:
    return "?" if state is None else f"{state:,}"


def _aligned(rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> Iterator[str]:
    """Pads cells to columns; columns of numbers are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(n) if i in numbers else cell.ljust(n)
            for i, (cell, n) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
