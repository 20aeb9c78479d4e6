"""Several arrays for each leaf, as several trees."""

from typing import Any

import jax


def by_array(kept: Any, tree: Any) -> tuple[Any, ...]:
    """A tree of tuples as a tuple of trees, () where there is nothing.

    What stands at a leaf's place is then an array or (), as ``nnx.Optimizer`` wants it.

    Args:
      kept: like `tree`, with a tuple of arrays in place of each leaf.
      tree: any pytree.

    Example:
      >>> by_array({"a": (1, 2), "b": (), "c": (3,)}, {"a": 0, "b": 0, "c": 0})
      ({'a': 1, 'b': (), 'c': 3}, {'a': 2, 'b': (), 'c': ()})
    """
    structure: Any = jax.tree.structure(tree)
    rows = structure.flatten_up_to(kept)
    count = max(map(len, rows), default=0)
    return tuple(
        structure.unflatten([k[i] if i < len(k) else () for k in rows]) for i in range(count)
    )


def by_leaf(arrays: tuple[Any, ...], tree: Any) -> Any:
    """The inverse of `by_array`.

    Example:
      >>> by_leaf(({"a": 1, "b": ()}, {"a": 2, "b": ()}), {"a": 0, "b": 0})
      {'a': (1, 2), 'b': ()}
    """
    structure: Any = jax.tree.structure(tree)
    columns = [structure.flatten_up_to(a) for a in arrays]
    nothing = lambda x: isinstance(x, tuple)
    rows = zip(*columns, strict=True) if columns else [()] * structure.num_leaves
    return structure.unflatten([tuple(x for x in row if not nothing(x)) for row in rows])
