"""Kinds of the parameters in a tree, and their rows and columns."""

import contextlib
import contextvars
import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from memopt.axes import LAST_TWO, Axes, Matrix, as_tuple, axes_of
from memopt.names import MATRIX, VECTOR, Entry, kinds_of
from memopt.trees import axis_names, named_leaves, open_box


class Parameter(NamedTuple):
    """A parameter as it was read; selections of matrices take it in place of the array.

    Attributes:
      name: its keys joined by ``/``.
      shape: of the array.
      dtype: of the array.
      kind: "matrix", "embedding", "position", "router", "head" or "vector".
      matrix: its rows and columns; None for a vector.
      why: the reason for `kind` and `matrix`.
      doubt: the reason against `matrix`, "" if there is none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    kind: str
    matrix: Matrix | None
    why: str
    doubt: str = ""

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def warn_of_doubt(self) -> None:
        """Warns once if `matrix` is in doubt, with the `matrices` that settles it."""
        if self.doubt:
            _warn_once(
                f"{self.name!r} of shape {self.shape} is taken for {self.matrix}, {self.why}, but "
                f"{self.doubt}; settle it by matrices=lambda name, leaf: {self.matrix} if name == "
                f"{self.name!r} else memopt.hidden_matrices(name, leaf); see memopt.describe."
            )


_KNOWN: contextvars.ContextVar[Mapping[str, Parameter] | None] = contextvars.ContextVar(
    "memopt_known_parameters", default=None
)

_NAMED: dict[tuple[str, tuple[int, ...]], tuple[str | None, ...]] = {}
"""Axis names by name and shape of a parameter, where shapes alone would be read otherwise.

`nnx.Optimizer` and MaxText open the boxes between ``tx.init`` and ``tx.update``. A bare array with
the name and shape of one that was boxed is taken for the same parameter.
"""


def read_parameters(tree: Any) -> list[Parameter]:
    """Reads the kind, rows and columns of each parameter of a tree, in the order of its leaves.

    Args:
      tree: any pytree of arrays or ``jax.ShapeDtypeStruct``, in boxes or bare.

    Example:
      >>> import jax
      >>> params = {"q": (64, 4, 16), "o": (4, 16, 64), "lm_head": (64, 512)}
      >>> params = {name: jax.ShapeDtypeStruct(s, "float32") for name, s in params.items()}
      >>> for p in read_parameters(params):
      ...     print(p.name, p.kind, p.matrix, p.why, sep="; ")
      lm_head; head; Matrix(rows=-2, cols=-1); 'lm_head' in its name
      o; matrix; Matrix(rows=(0, 1), cols=2); its heads are axes of 'q' too
      q; matrix; Matrix(rows=0, cols=(1, 2)); its heads are axes of 'o' too
    """
    nodes, _ = named_leaves(tree)
    arrays = [(name, open_box(node)) for name, node in nodes]
    said = _KNOWN.get() or {}
    if all(name in said for name, _ in arrays):
        return [said[name]._replace(shape=tuple(x.shape), dtype=x.dtype) for name, x in arrays]
    shapes = [(name, tuple(x.shape)) for name, x in arrays]
    names = [axis_names(node) for _, node in nodes]
    if any(names):
        _remember(shapes, names)
    entries = tuple(
        Entry(*shape, own or _NAMED.get(shape)) for shape, own in zip(shapes, names, strict=True)
    )
    found = zip(arrays, _read(entries), strict=True)
    return [
        Parameter(name, tuple(x.shape), x.dtype, *(said[name][3:] if name in said else what))
        for (name, x), what in found
    ]


def read_parameter(name: str, leaf: Any) -> Parameter:
    """Reads a parameter from its own name and shape, without the tree around it.

    Args:
      name: its keys joined by ``/``.
      leaf: anything with a `shape`; a `Parameter` is returned unchanged.
    """
    if isinstance(leaf, Parameter):
        return leaf
    shape = tuple(leaf.shape)
    (what,) = _read((Entry(name, shape, None),))
    found = Parameter(name, shape, getattr(leaf, "dtype", None), *what)
    return found._replace(doubt="")  # the tree around it may settle it


@contextlib.contextmanager
def known(parameters: Sequence[Parameter]) -> Iterator[None]:
    """Fixes the kind and the axes of parameters by name, whatever shapes are then read.

    Example:
      >>> import jax
      >>> w = jax.ShapeDtypeStruct((8, 4), "float32")
      >>> with known([Parameter("w", w.shape, w.dtype, "matrix", Matrix(1, 0), "as said")]):
      ...     read_parameters({"w": w.update(shape=(8, 5))})[0].matrix
      Matrix(rows=1, cols=0)
    """
    token = _KNOWN.set({**(_KNOWN.get() or {}), **{p.name: p for p in parameters}})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _remember(
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    names: Sequence[tuple[str | None, ...] | None],
) -> None:
    """Stores the axis names that change how a parameter is read."""
    rows = [Entry(*shape, own) for shape, own in zip(shapes, names, strict=True)]
    without = _read(tuple(e._replace(axes=None) for e in rows))
    for shape, e, a, b in zip(shapes, rows, _read(tuple(rows)), without, strict=True):
        if e.axes and a[:2] != b[:2]:
            _NAMED[shape] = e.axes
        elif e.axes and _NAMED.get(shape, e.axes) != e.axes:
            del _NAMED[shape]


@functools.lru_cache(maxsize=256)
def _read(entries: tuple[Entry, ...]) -> tuple[tuple[str, Matrix | None, str, str], ...]:
    """Kind, matrix, reason and doubt of each parameter."""
    axes, kinds = axes_of(entries), kinds_of(entries)
    return tuple(_parameter(e, axes.get(e.name, LAST_TWO), kinds.get(e.name)) for e in entries)


def _parameter(
    entry: Entry, axes: Axes, kind: tuple[str, str] | None
) -> tuple[str, Matrix | None, str, str]:
    if len(entry.shape) < 2:
        return VECTOR, None, "it has fewer than two axes", ""
    if kind and kind[0] == VECTOR:
        return VECTOR, None, kind[1], ""
    if axes.matrix is None:
        return VECTOR, None, axes.why, ""
    sides = (axes.matrix.rows, axes.matrix.cols)
    if min(math.prod(entry.shape[a] for a in as_tuple(side)) for side in sides) < 2:
        return VECTOR, None, "it has a side of fewer than two", ""
    return (kind[0], axes.matrix, kind[1], "") if kind else (MATRIX, *axes)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
