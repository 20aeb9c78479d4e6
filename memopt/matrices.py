"""Selects which axes of a parameter are its rows, its columns and its stack."""

import contextlib
import contextvars
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jax import Array

from memopt.axes import Matrix as Matrix
from memopt.axes import as_tuple
from memopt.names import EMBEDDING, MATRIX, POSITION
from memopt.parameters import read_parameter, read_parameters
from memopt.trees import is_boxed, named_leaves, open_box, refill

Selection = Callable[[str, Any], Matrix | None]
"""Maps a leaf's name and `Parameter` to its `Matrix`, or to None if it is not selected."""

Matrices = Any
"""A `Selection`, or a pytree (or prefix) of `Matrix` and None; None means the default.

``optax.contrib.MuonDimensionNumbers`` are accepted as a `Matrix`: reduction axes are rows.
"""


_SEEN: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "memopt_layouts_seen", default=None
)


class Layout(NamedTuple):
    """The axes of one array, all counted from the front.

    An array that is not a matrix is a stack of vectors along its last axis: `rows` is empty.

    Attributes:
        name: the keys of its path joined by ``/``, such as ``"blocks/mlp/up/kernel"``.
        stack: the stack axes.
        rows: the axes that index rows.
        cols: the axes that index columns.
        kind: the kind of the parameter: "matrix", "embedding", "position", "router", "head" or
            "vector". An embedding keeps its kind when a method treats it as a matrix.
    """

    name: str
    stack: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    kind: str = MATRIX

    @property
    def is_matrix(self) -> bool:
        """Whether the array has rows and columns."""
        return bool(self.rows and self.cols)

    @property
    def axes(self) -> tuple[tuple[int, ...], ...]:
        """The axes of rows, of columns and of the stack."""
        return self.rows, self.cols, self.stack

    @property
    def core(self) -> tuple[int, ...]:
        """The axes of one matrix (or vector) of the stack."""
        return self.rows + self.cols

    def shape(self, array: Any) -> tuple[int, ...]:
        """The shape ``(*stack, m, n)`` of the matrices of `array`."""
        stack, m, n = ([array.shape[a] for a in axes] for axes in self[1:4])
        return (*stack, math.prod(m), math.prod(n))

    def to_matrices(self, array: Array) -> Array:
        """Transposes and reshapes `array` to ``(*stack, m, n)``, if it is not so already."""
        shape = self.shape(array)
        order = self.stack + self.core
        if order != tuple(range(array.ndim)):
            array = array.transpose(order)
        return array if array.shape == shape else array.reshape(shape)

    def from_matrices(self, matrices: Array, like: Any) -> Array:
        """Inverts `to_matrices`: returns an array of the shape of `like`."""
        order = self.stack + self.core
        shape = tuple(like.shape[a] for a in order)
        if matrices.shape != shape:
            matrices = matrices.reshape(shape)
        if order != tuple(range(len(order))):
            matrices = matrices.transpose([order.index(a) for a in range(len(order))])
        return matrices


def every_matrix(name: str, leaf: Any) -> Matrix | None:
    """Selects every matrix, including embeddings, heads and routers, stacked or not.

    Args:
        name: the leaf's name, its keys joined by ``/``.
        leaf: a `Parameter`; an array is read by its name and shape, without the tree around it.

    Returns:
        The rows and columns, `Parameter.matrix`; None for a vector, which has fewer than two axes,
        a side of length one, or the name of a norm, a bias or a scale.
    """
    parameter = read_parameter(name, leaf)
    parameter.warn_of_doubt("every_matrix")
    return parameter.matrix


def hidden_matrices(name: str, leaf: Any) -> Matrix | None:
    """Selects hidden matrices: `every_matrix` except embeddings, positions, routers and heads.

    `memopt.names` recognises these by the names that they have in many libraries;
    `memopt.describe` shows the result for each parameter.

    Args:
        name: the leaf's name, its keys joined by ``/``.
        leaf: a `Parameter`; an array is read by its name and shape, without the tree around it.

    Returns:
        A `Matrix` or None.

    Example:
        >>> import jax
        >>> kernel = jax.ShapeDtypeStruct((8, 512, 1376), "float32")
        >>> hidden_matrices("blocks/mlp/up/kernel", kernel)
        Matrix(rows=-2, cols=-1)
        >>> print(hidden_matrices("lm_head/kernel", kernel))
        None
    """
    parameter = read_parameter(name, leaf)
    if parameter.kind != MATRIX:
        return None
    parameter.warn_of_doubt("hidden_matrices")
    return parameter.matrix


@dataclasses.dataclass(frozen=True)
class Reoriented:
    """Selects the leaves that a method selects by default, and changes the axes of kernels.

    Embeddings and positions keep their axes: a token is a row in every library.

    Attributes:
        change: maps a leaf's name and its `Matrix` to another `Matrix`.
        default: selects the leaves; `map_matrices` puts a method's own selection here.

    Example:
        >>> import jax
        >>> out_in("mlp/layers/0/weight", jax.ShapeDtypeStruct((256, 64), "float32"))
        Matrix(rows=-1, cols=-2)
    """

    change: Callable[[str, Matrix], Matrix]
    default: Selection = hidden_matrices

    def __call__(self, name: str, leaf: Any) -> Matrix | None:
        """Returns the changed `Matrix` of a leaf; None if `default` does not select it."""
        matrix = self.default(name, leaf)
        is_table = read_parameter(name, leaf).kind in (EMBEDDING, POSITION)
        return matrix if matrix is None or is_table else self.change(name, matrix)


out_in = Reoriented(lambda _, matrix: Matrix(matrix.cols, matrix.rows))
"""Exchanges the rows and columns of kernels, for models that store them as (outputs, inputs).

Use it for Equinox; Flax, Haiku and Keras store (inputs, outputs), the default. The orientation
matters for Muon's scale, and for subspaces of square matrices, whose inputs are projected.
"""


def map_matrices(
    f: Callable[..., Any],
    tree: Any,
    *rest: Any,
    matrices: Matrices = None,
    default: Selection = hidden_matrices,
    outputs: int = 1,
) -> Any:
    """Maps ``f(layout, leaf, *rest)`` over a tree, with the axes of every leaf.

    Args:
        f: takes the leaf's `Layout`, the leaf, and the corresponding node of each of `rest`.
        tree: any pytree of arrays; empty nodes (None, ``MaskedNode``) are unchanged. If an array is
            in a box of another library, see `memopt.trees`, a result of its shape is put in the
            same kind of box; any other result has none.
        *rest: pytrees of which `tree` is a prefix.
        matrices: which leaves are matrices, and which axes are their rows and columns: a callable
            `Selection`, a pytree of `Matrix` and None (or a prefix of `tree`), or None for
            `default`.
        default: the selection used for None.
        outputs: the number of values that `f` returns; more than one gives a tuple of trees.

    Returns:
        A tree like `tree`, or a tuple of `outputs` of them.

    Raises:
        ValueError: if a `Matrix` names axes that the leaf does not have, or `matrices` has no entry
            for a leaf.
    """
    select = selection(matrices, default)
    nodes, structure = named_leaves(tree)
    others = [[open_box(x) for x in structure.flatten_up_to(r)] for r in rest]
    seen, results = _SEEN.get(), []
    for (name, node), p, *other in zip(nodes, read_parameters(tree), *others, strict=True):
        leaf = open_box(node)
        layout = layout_of(name, leaf, select(name, p))._replace(kind=p.kind)
        if seen is not None:
            known = seen.setdefault(name, layout)
            seen[name] = known if known.is_matrix else layout
        result = f(layout, leaf, *other)
        results.append((result,) if outputs == 1 else result)
    trees = tuple(
        structure.unflatten(
            [refill(node, row[k]) for (_, node), row in zip(nodes, results, strict=True)]
        )
        for k in range(outputs)
    )
    return trees[0] if outputs == 1 else trees


def selection(matrices: Matrices, default: Selection) -> Selection:
    """Returns `matrices` as a callable, `default` for None.

    A pytree is looked up by the longest matching prefix of a name.
    """
    if matrices is None:
        return default
    if isinstance(matrices, Reoriented):
        return dataclasses.replace(matrices, default=default).__call__
    if callable(matrices):
        try:
            inspect.signature(matrices).bind("", None)
        except TypeError as error:
            raise ValueError(
                f"matrices must be a function of a name and a parameter, or a tree, got {matrices}."
            ) from error
        return matrices

    def is_entry(x: Any) -> bool:
        return x is None or isinstance(x, Matrix) or _is_dimension_numbers(x) or is_boxed(x)

    entries = {name: open_box(x) for name, x in named_leaves(matrices, is_entry)[0]}

    def select(name: str, leaf: Any) -> Matrix | None:
        prefix = name
        while prefix not in entries:
            if not prefix:
                raise ValueError(
                    f"matrices has no entry for {name!r}; it has {sorted(entries)}. "
                    "Give every leaf, or a branch that contains it, a Matrix or None."
                )
            prefix = prefix.rpartition("/")[0]
        return entries[prefix]

    return select


@contextlib.contextmanager
def layouts_seen() -> Iterator[dict[str, Layout]]:
    """Collects the layout that `map_matrices` uses for each parameter, by name.

    If a parameter is used both as a matrix and as a vector, the matrix is kept; of several layouts
    the first, which an optimizer uses before its wrappers do.
    """
    seen: dict[str, Layout] = {}
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def layout_of(name: str, leaf: Any, matrix: Any) -> Layout:
    """Returns the layout of an array for a `Matrix`, or of a vector for None.

    An array of no elements is a vector too: norms, means and ranks need sides of at least one.

    Raises:
        ValueError: if the matrix names axes that the array does not have.
    """
    ndim = len(leaf.shape)
    if matrix is None or 0 in leaf.shape:
        return Layout(name, tuple(range(ndim - 1)), (), tuple(range(ndim))[-1:])
    if _is_dimension_numbers(matrix):
        matrix = Matrix(matrix.reduction_axis, matrix.output_axis)
    if not isinstance(matrix, Matrix):
        raise ValueError(f"matrices must give a Matrix or None for {name!r}, got {matrix!r}.")
    rows, cols = (_axes(name, leaf, matrix, axes) for axes in (matrix.rows, matrix.cols))
    if len({*rows, *cols}) != len(rows + cols) or not (rows and cols):
        raise ValueError(
            f"{matrix} must name each axis once, and at least one for rows and one for columns; "
            f"{name!r} has shape {tuple(leaf.shape)}; see memopt.describe."
        )
    return Layout(name, tuple(a for a in range(ndim) if a not in rows + cols), rows, cols)


def _is_dimension_numbers(x: Any) -> bool:
    """Whether `x` is a `MuonDimensionNumbers`, without the slow import of ``optax.contrib``."""
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


def _axes(name: str, leaf: Any, matrix: Matrix, side: int | tuple[int, ...]) -> tuple[int, ...]:
    axes = as_tuple(side)
    ndim = len(leaf.shape)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{matrix} names axis {axis}, but {name!r} has shape {tuple(leaf.shape)}: "
                f"its axes are {-ndim} to {ndim - 1}; see memopt.describe."
            )
    return tuple(axis % ndim for axis in axes)
