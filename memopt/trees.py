"""Trees of arrays, with or without the boxes of other libraries.

A box is a pytree node that holds one array and metadata of its axes: Flax's `nnx.Variable`, linen's
`Partitioned` and `LogicallyPartitioned`, Haliax's `NamedArray`. They are recognised by their
attributes, so that none of these libraries is imported. Functions mapped over a tree receive the
array in a box. A result with the array's shape is put back into such a box; any other has no box,
because the metadata, in particular its sharding, would be wrong for it.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

NOTHING = optax.MaskedNode()
"""Marks a parameter for which no array is kept, as in the states of ``optax.masked``."""


def is_box(x: Any) -> bool:
    """Whether a node of a tree is another library's box that holds an array."""
    return is_boxed(x) and hasattr(_inside(x), "shape")


def is_boxed(x: Any) -> bool:
    """Whether a node of a tree is another library's box, whatever it holds."""
    return _metadata(x) is not None


def open_box(x: Any) -> Any:
    """Returns the content of a box; any other object is returned unchanged."""
    return _inside(x) if is_boxed(x) else x


def refill(box: Any, value: Any) -> Any:
    """Puts a value in a box like `box` if it has the shape of the box's array."""
    if not is_box(box) or getattr(value, "shape", None) != _inside(box).shape:
        return value
    structure: Any = jax.tree.structure(box, is_leaf=lambda x: x is not box)
    return structure.unflatten([value])


def axis_names(x: Any) -> tuple[str | None, ...] | None:
    """The axis names of the array in a box, with None for an unnamed axis; None without names."""
    if not is_box(x):
        return None
    names = _metadata(x)
    names = getattr(names, "spec", names)  # for a NamedSharding
    found = [name if isinstance(name, str) else None for name in names]
    return (*found, *(None,) * (len(_inside(x).shape) - len(found))) if any(found) else None


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf or box: the keys of its path joined by ``/``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], Any]:
    """Flattens a tree into named leaves, with boxes as leaves, and its structure.

    Args:
        tree: any pytree; empty nodes (None, ``MaskedNode``) are part of the structure.
        is_leaf: returns whether another node is a leaf.

    Example:
        >>> named_leaves({"up": {"kernel": 1}, "norm": None})[0]
        [('up/kernel', 1)]
    """
    stop = is_box if is_leaf is None else lambda x: is_box(x) or is_leaf(x)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)
    return [(leaf_name(path), leaf) for path, leaf in leaves], structure


def map_named(
    f: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Maps ``f(name, array, *rest)`` over a tree, opening and refilling boxes.

    Args:
        f: takes an array's name, the array, and the corresponding node of each of `rest`.
        tree: any pytree.
        *rest: pytrees of which `tree` is a prefix.
        is_leaf: returns whether another node is a leaf.

    Example:
        >>> map_named(lambda name, x, y: (name, x + y), {"a": 1, "b": 2}, {"a": 3, "b": 4})
        {'a': ('a', 4), 'b': ('b', 6)}
    """
    leaves, structure = named_leaves(tree, is_leaf)
    columns = [[open_box(x) for x in structure.flatten_up_to(r)] for r in rest]
    results = [
        refill(leaf, f(name, open_box(leaf), *others))
        for (name, leaf), *others in zip(leaves, *columns, strict=True)
    ]
    return structure.unflatten(results)


def transpose_tuples(kept: Any, tree: Any, count: int) -> tuple[Any, ...]:
    """Transposes a tree of tuples to a tuple of trees; missing entries become `NOTHING`.

    Each leaf is then an array or `NOTHING`, as ``nnx.Optimizer`` requires, and the number of trees
    does not depend on `tree`, as ``optax.tree_map_params`` requires.

    Args:
        kept: a tree like `tree`, with a tuple of arrays in place of each leaf.
        tree: any pytree.
        count: the number of trees.

    Raises:
        ValueError: if a tuple has more than `count` arrays.

    Example:
        >>> transpose_tuples({"a": (1, 2), "b": (3,)}, {"a": 0, "b": 0}, 2)
        ({'a': 1, 'b': 3}, {'a': 2, 'b': MaskedNode()})
    """
    _, structure = named_leaves(tree)
    rows = structure.flatten_up_to(kept)
    most = max(map(len, rows), default=0)
    if most > count:
        raise ValueError(
            f"count must be at least {most}, the number of arrays of a leaf, got {count}."
        )
    return tuple(
        structure.unflatten([k[i] if i < len(k) else NOTHING for k in rows]) for i in range(count)
    )


def untranspose_tuples(arrays: tuple[Any, ...], tree: Any) -> Any:
    """Inverts `transpose_tuples`.

    Example:
        >>> untranspose_tuples(({"a": 1, "b": 3}, {"a": 2, "b": NOTHING}), {"a": 0, "b": 0})
        {'a': (1, 2), 'b': (3,)}
    """
    leaves, structure = named_leaves(tree)
    columns = [structure.flatten_up_to(a) for a in arrays]
    rows = zip(*columns, strict=True) if columns else [()] * len(leaves)
    return structure.unflatten(
        [tuple(x for x in row if not isinstance(x, optax.MaskedNode)) for row in rows]
    )


def _metadata(x: Any) -> Any:
    """The axis names of a box, () if it has none; None if `x` is not a box."""
    kind = type(x)
    if hasattr(kind, "get_metadata") and hasattr(kind, "get_value"):  # nnx.Variable
        return x.get_metadata().get("out_sharding") or ()
    if hasattr(kind, "replace_boxed"):  # linen's AxisMetadata
        return getattr(x, "names", None) or ()
    # Haliax knows no axes of an array that Equinox has filtered out.
    axes = getattr(x, "axes", None) if jax.tree.leaves(getattr(x, "array", None)) else None
    if isinstance(axes, tuple) and all(hasattr(axis, "name") for axis in axes):  # Haliax
        return [axis.name for axis in axes]
    return None


def _inside(x: Any) -> Any:
    """The only child of a node; None if it has none or several."""
    children = jax.tree.leaves(x, is_leaf=lambda child: child is not x)
    return children[0] if len(children) == 1 else None
