"""Which axes of a parameter are its rows, its columns and its stack."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Names the axes of an array that are a matrix's rows and columns.

    Every axis that is not named is a *stack*: an array is as many separate matrices as its
    stack has entries (scanned layers, experts), and every transform of memopt treats each of
    them on its own, in one batched operation.

    Attributes:
      rows: the axis, or axes, that index rows; negative ones count from the end.
      cols: the axis, or axes, that index columns.

    Example:
      >>> Matrix()                        # a Dense kernel, scanned or not
      Matrix(rows=-2, cols=-1)
      >>> Matrix(rows=0, cols=(1, 2))     # an attention kernel (d, heads, head_dim)
      Matrix(rows=0, cols=(1, 2))
    """

    rows: int | tuple[int, ...] = -2
    cols: int | tuple[int, ...] = -1


Selection = Callable[[str, Any], Matrix | None]
"""Says of a leaf, by its name and its shape, which matrix it is, or None."""

Matrices = Any
"""A `Selection`, or a pytree (a prefix will do) of `Matrix` and None; None is the default."""


class Layout(NamedTuple):
    """The axes of one array, all counted from the front.

    An array that is no matrix is a stack of vectors along its last axis: `rows` is empty.

    Attributes:
      name: where the array stands in its tree, ``"blocks/mlp/up/kernel"``.
      stack: axes that only count matrices.
      rows: axes that index rows.
      cols: axes that index columns.
    """

    name: str
    stack: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether the array has rows and columns."""
        return bool(self.rows and self.cols)

    @property
    def core(self) -> tuple[int, ...]:
        """The axes of one matrix (or vector) of the stack."""
        return self.rows + self.cols

    def shape(self, array: Any) -> tuple[int, ...]:
        """The shape ``(*stack, m, n)`` of the matrices of `array`."""
        stack, m, n = ([array.shape[a] for a in axes] for axes in self[1:])
        return (*stack, math.prod(m), math.prod(n))

    def to_matrices(self, array: Array) -> Array:
        """`array` as ``(*stack, m, n)``; untouched where it already is."""
        shape = self.shape(array)
        order = self.stack + self.core
        if order != tuple(range(array.ndim)):
            array = array.transpose(order)
        return array if array.shape == shape else array.reshape(shape)

    def from_matrices(self, matrices: Array, like: Any) -> Array:
        """The inverse of `to_matrices`: an array of the shape of `like`."""
        order = self.stack + self.core
        shape = tuple(like.shape[a] for a in order)
        if matrices.shape != shape:
            matrices = matrices.reshape(shape)
        if order != tuple(range(len(order))):
            matrices = matrices.transpose([order.index(a) for a in range(len(order))])
        return matrices


_NORM_OR_BIAS = re.compile(r"norm|bias|(^|[/_])ln(_|\d|/|$)|(^|/)(scale|gain|gamma|beta)(/|$)")
_EMBEDDING_OR_HEAD = re.compile(
    r"embed|(^|[/_])emb(_|/|$)|(^|/)w[tp]e(/|$)"
    r"|(^|/)((lm|output)_?head|head|unembed|logits|classifier)(/|$)"
)


def every_matrix(name: str, leaf: Any) -> Matrix | None:
    """Selects each array of two or more axes that is no norm and no bias, however stacked.

    Args:
      name: the leaf's name, its keys joined by ``/``.
      leaf: anything with a `shape`.

    Returns:
      ``Matrix(rows=-2, cols=-1)``, or None for what is a vector: fewer than two axes, a side
      of length one, or a name that contains ``norm`` or ``bias`` or says ``scale``.
    """
    shape = leaf.shape
    if len(shape) < 2 or min(shape[-2:]) < 2 or _NORM_OR_BIAS.search(name.lower()):
        return None
    return Matrix()


def hidden_matrices(name: str, leaf: Any) -> Matrix | None:
    """Selects the hidden matrices: `every_matrix` less the embeddings and the output head.

    This is the one place that says which leaves those are: any whose name contains ``embed``
    or has a part that reads ``emb``, ``wte``, ``wpe``, ``head``, ``lm_head``, ``output_head``,
    ``unembed``, ``logits`` or ``classifier``.

    Args:
      name: the leaf's name, its keys joined by ``/``.
      leaf: anything with a `shape`.

    Returns:
      ``Matrix(rows=-2, cols=-1)`` or None.

    Example:
      >>> kernel = jax.ShapeDtypeStruct((8, 512, 1376), "float32")
      >>> hidden_matrices("blocks/mlp/up/kernel", kernel)
      Matrix(rows=-2, cols=-1)
      >>> print(hidden_matrices("lm_head/kernel", kernel))
      None
    """
    if _EMBEDDING_OR_HEAD.search(name.lower()):
        return None
    return every_matrix(name, leaf)


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: the keys of its path joined by ``/``, less the `value` of a box."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def group_name(name: str) -> str:
    """A leaf's name less its numbers, which layers that are not stacked share with a stack.

    Example:
      >>> group_name("blocks/0/up/kernel"), group_name("layers_12/up/kernel")
      ('blocks/up/kernel', 'layers/up/kernel')
    """
    return re.sub(r"[/_]?\d+", "", name).lstrip("/")


def explicit_axes(x: Any) -> tuple[Any, ...] | None:
    """How each axis of an array is sharded over an explicit mesh; None if it is over none."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec if any(axis is not None for axis in spec) else None


def shard_count(x: Any, axis: int) -> int:
    """Over how many devices of an explicit mesh an axis is sharded; 1 if over none."""
    if explicit_axes(x) is None:
        return 1
    return x.shape[axis] // jax.typeof(x).sharding.shard_shape(x.shape)[axis]


def map_matrices(
    f: Callable[..., Any],
    tree: Any,
    *rest: Any,
    matrices: Matrices = None,
    default: Selection = hidden_matrices,
    outputs: int = 1,
) -> Any:
    """Maps ``f(layout, leaf, *rest)`` over a tree, telling it the axes of every leaf.

    Args:
      f: takes the leaf's `Layout`, the leaf, and what stands at its place in each of `rest`.
      tree: any pytree of arrays; empty nodes (None, ``MaskedNode``) stay as they are.
      *rest: pytrees of which `tree` is a prefix.
      matrices: which leaves are matrices, and of which axes: a callable `Selection`, a pytree
        of `Matrix` and None (a prefix of `tree` will do), or None for `default`.
      default: the selection that stands for None.
      outputs: the number of values `f` returns; more than one gives a tuple of trees.

    Returns:
      A tree like `tree`, or a tuple of `outputs` of them.

    Raises:
      ValueError: if a `Matrix` names axes the leaf does not have, or `matrices` lacks a leaf.
    """
    select = default if matrices is None else _selection(matrices)
    structure: Any
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    others = [structure.flatten_up_to(r) for r in rest]
    results = []
    for i, (path, leaf) in enumerate(leaves):
        name = leaf_name(path)
        layout = _layout(name, leaf, select(name, leaf))
        results.append(f(layout, leaf, *(other[i] for other in others)))
    if outputs == 1:
        return structure.unflatten(results)
    return tuple(structure.unflatten([r[k] for r in results]) for k in range(outputs))


def _selection(matrices: Matrices) -> Selection:
    """`matrices` as a callable; a pytree is looked up by the longest matching prefix."""
    if callable(matrices):
        return matrices
    is_entry = lambda x: x is None or isinstance(x, Matrix)
    entries = {
        leaf_name(path): entry
        for path, entry in jax.tree_util.tree_leaves_with_path(matrices, is_leaf=is_entry)
    }

    def select(name: str, leaf: Any) -> Matrix | None:
        prefix = name
        while prefix not in entries:
            if not prefix:
                raise ValueError(
                    f"matrices has no entry for {name!r}; it has {sorted(entries)}. "
                    "Give every leaf, or a part of the tree above it, a Matrix or None."
                )
            prefix = prefix.rpartition("/")[0]
        return entries[prefix]

    return select


def _layout(name: str, leaf: Any, matrix: Matrix | None) -> Layout:
    ndim = len(leaf.shape)
    if matrix is None:
        return Layout(name, tuple(range(ndim - 1)), (), tuple(range(ndim))[-1:])
    if not isinstance(matrix, Matrix):
        raise ValueError(f"matrices must give a Matrix or None for {name!r}, got {matrix!r}.")
    rows, cols = (_axes(name, leaf, matrix, axes) for axes in (matrix.rows, matrix.cols))
    if len({*rows, *cols}) != len(rows + cols) or not (rows and cols):
        raise ValueError(
            f"{matrix} must name each axis once, and at least one for rows and one for columns; "
            f"{name!r} has shape {tuple(leaf.shape)}."
        )
    return Layout(name, tuple(a for a in range(ndim) if a not in rows + cols), rows, cols)


def _axes(name: str, leaf: Any, matrix: Matrix, axes: int | tuple[int, ...]) -> tuple[int, ...]:
    axes = axes if isinstance(axes, tuple) else (axes,)
    ndim = len(leaf.shape)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{matrix} names axis {axis}, but {name!r} has shape {tuple(leaf.shape)}: "
                f"its axes are {-ndim} to {ndim - 1}."
            )
    return tuple(axis % ndim for axis in axes)
