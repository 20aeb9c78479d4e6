"""Runs functions of arrays on Explicit mesh axes under Auto axes.

JAX puts the sharding of an array over Explicit mesh axes into its type, and every operation must
infer, or be given, the type of its result. memopt computes under Auto axes, where the compiler
chooses shardings, and returns arrays with the types of those it was given.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from memopt.internals import is_traced


def on_auto_axes(f: Callable[..., Any], args: Sequence[Any], like: Any) -> Any:
    """Computes ``f(*args)`` under Auto axes, with results sharded like `like`.

    Without Explicit axes this is ``f(*args)``. No mesh need be set.

    Args:
        f: any traceable function.
        args: its arguments, trees of arrays and other objects.
        like: a tree with the structure of the result, of arrays, shapes or ``jax.P``.

    Example:
        >>> mesh = jax.make_mesh((1,), ("fsdp",))  # Explicit axes
        >>> x = jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh, jax.P("fsdp")))
        >>> flat = on_auto_axes(lambda x: x.reshape(2, 4), (x,), jax.P(None, "fsdp"))
        >>> jax.typeof(flat)
        ShapedArray(float32[2,4@fsdp])
    """
    structure: Any
    result: Any
    leaves, structure = jax.tree.flatten(args)
    given = [x for x in leaves if isinstance(x, jax.Array)]
    mesh = explicit_mesh(given)
    if mesh is None:
        return f(*args)

    def run(*arrays: jax.Array) -> list[Any]:
        rest = iter(arrays)
        filled = [next(rest) if isinstance(x, jax.Array) else x for x in leaves]
        return jax.tree.leaves(f(*structure.unflatten(filled)))

    explicit = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    wanted, result = jax.tree.flatten(like)
    shardings = [NamedSharding(mesh, x if isinstance(x, jax.P) else spec_of(x)) for x in wanted]
    computed = jax.sharding.auto_axes(run, axes=explicit, out_sharding=shardings)
    return result.unflatten(jax.jit(computed)(*given))


def explicit_mesh(arrays: Sequence[jax.Array]) -> Any:
    """The mesh with Explicit axes that arrays are on, or None."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def spec_of(x: Any) -> jax.P:
    """The Explicit mesh axes that split each axis of an array, from its type."""
    return jax.typeof(x).sharding.spec


def varying_as(like: Any, x: jax.Array) -> jax.Array:
    """Makes an array vary over the same manual axes as `like` does, inside ``jax.shard_map``.

    Arrays made anew vary over no axis, and could not stand in the place of those that do.

    Args:
        like: an array, or its shape with the type of one.
        x: numbers of any shape and dtype.

    Example:
        >>> varying_as(jnp.ones(3), jnp.zeros(2))
        Array([0., 0.], dtype=float32)
    """
    if isinstance(like, jax.Array) and not is_traced(like):
        # It varies over no axis; on a mesh of one device JAX would give the zero its sharding.
        return x
    return x + jnp.zeros_like(like, shape=(), dtype=x.dtype)


def varying_as_any(tree: Any, x: jax.Array) -> jax.Array:
    """Makes an array vary over every manual axis that some array of a tree varies over."""
    return functools.reduce(lambda x, like: varying_as(like, x), jax.tree.leaves(tree), x)
