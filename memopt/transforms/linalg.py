"""Products and factorisations for stacks of matrices."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding

from memopt.shapes import Basis, Square


def product(subscripts: str, a: Array, b: Array) -> Array:
    """Computes ``jnp.einsum`` of two stacks in full precision.

    Args:
        subscripts: as for ``jnp.einsum``, with ``...`` for the stack axes.
        a: the first stack.
        b: the second stack, or one matrix for all matrices of `a`.

    Example:
        >>> product("...mn,...nr->...mr", jnp.ones((5, 2, 3)), jnp.ones((3, 4))).shape
        (5, 2, 4)
    """
    return jnp.einsum(subscripts, a, b, precision="highest")


def replicate_axis(x: Array, axis: int) -> Array:
    """Replicates `x` along an axis of length r, if all mesh axes are Auto.

    Otherwise XLA may split products along r and the gradient along the projected side; it would
    then gather gradients, or sum full-size updates, instead of the small arrays of the subspace.
    """
    mesh = jax.typeof(x).sharding.mesh
    if set(mesh.axis_types) != {AxisType.Auto}:
        return x
    spec: list[Any] = [jax.P.UNCONSTRAINED] * x.ndim
    spec[axis] = None
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, jax.P(*spec)))


Across = Callable[..., Array]
"""Places a matrix on a mesh: split along an axis over all devices, or whole on each of them."""


def by_matrix(f: Callable[..., Array], x: Array, *others: Array) -> Array:
    """Applies a function to the matrices of a stack; on a mesh no device gathers more than others.

    If the number of matrices is divisible by that of devices, each gets as many whole ones.
    Otherwise all devices work on one matrix after the other.

    Args:
        f: takes `x` and `others`, and as `across` a function that it calls on a matrix and the axis
            along which it may be split, or on one that each device needs whole.
        x: ``(*stack, m, n)``.
        *others: arrays with the same stack.
    """
    mesh, names = _mesh_of(x)
    if not names:
        return f(x, *others, across=lambda x, axis=None: x)
    stack = x.shape[:-2]
    count, devices = math.prod(stack), math.prod(mesh.shape[name] for name in names)
    steps = _steps_to_matrices(names) if count % devices == 0 else _steps_to_rows(names)
    flat = [_reshard(a.reshape(count, *a.shape[len(stack) :]), steps) for a in (x, *others)]
    if count % devices == 0:
        done = f(*flat, across=lambda x, axis=None: x)
    else:
        done = jax.lax.map(lambda each: f(*each, across=_place), flat)
    return _reshard(done, steps[::-1]).reshape(*stack, *done.shape[1:])


def distributed(f: Callable[..., Any], *stacks: Array) -> Any:
    """Applies a function of square matrices to stacks, on a mesh with the same number per device.

    Args:
        f: maps stacks to an array or a tuple of arrays with the same stack axes.
        *stacks: ``(*stack, side, side)``, all of the same shape.

    Example:
        >>> distributed(jnp.linalg.inv, 2 * jnp.eye(2)).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    mesh, names = _mesh_of(stacks[0])
    if not names:
        return f(*stacks)
    stack, side = stacks[0].shape[:-2], stacks[0].shape[-1]
    count, devices = math.prod(stack), math.prod(mesh.shape[name] for name in names)
    steps = _steps_to_rows(names)

    def share(x: Array) -> Array:
        x = _reshard(x.reshape(count, side, side), steps)
        return _place(jnp.pad(x, ((0, -count % devices), (0, 0), (0, 0))), 0)

    local = jax.shard_map(
        f, mesh=mesh, in_specs=jax.P(names), out_specs=jax.P(names), axis_names=set(names)
    )
    back = lambda x: _reshard(_place(x, 1)[:count], steps[::-1]).reshape(*stack, *x.shape[1:])
    return jax.tree.map(back, local(*map(share, stacks)))


def _mesh_of(x: Array) -> tuple[Any, tuple[str, ...]]:
    """The mesh that an array is on, and its axes of more than one device that are not manual."""
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return mesh, tuple(a for a, kind in kinds if kind == AxisType.Auto and mesh.shape[a] > 1)


_Split = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
"""The axes of a mesh over which stack, rows and columns are split."""


def _steps_to_matrices(names: tuple[str, ...]) -> Sequence[_Split]:
    """Splits a stack over all devices, so that each has whole matrices.

    It takes two steps, because XLA gathers an array whole on each device where one of its axes
    gains or loses two axes of the mesh to two others. Of stacks on two axes of the mesh, this one
    still gathers those whose columns are split over both.
    """
    return (names[:1], names[1:], ()), (names, (), ())


def _steps_to_rows(names: tuple[str, ...]) -> Sequence[_Split]:
    """Splits the rows of each matrix over all devices.

    It gathers only stacks that are split over all devices.
    """
    return ((), names[:1], names[1:]), ((), names, ())


def _reshard(x: Array, steps: Sequence[_Split]) -> Array:
    for stack, rows, cols in steps:
        x = _split(x, {0: stack, -2: rows, -1: cols})
    return x


def _place(x: Array, axis: int | None = None) -> Array:
    """Splits an axis over all devices; without an axis, all get the whole."""
    return _split(x, {} if axis is None else {axis: _mesh_of(x)[1]})


def _split(x: Array, axes: Mapping[int, tuple[str, ...]]) -> Array:
    """Splits axes of an array over axes of the mesh, if those divide them."""
    mesh, names = _mesh_of(x)
    if not names:
        return x
    spec: list[Any] = [None] * x.ndim
    for axis, over in axes.items():
        if x.shape[axis] % math.prod(mesh.shape[name] for name in over):
            return x
        spec[axis] = over
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, jax.P(*spec)))


def for_stack(basis: Basis, like: Array) -> Basis:
    """Broadcasts a basis to the stack, so that products do not copy a transposed gradient."""
    return jnp.broadcast_to(basis, (*like.shape[:-2], *basis.shape[-2:]))


def lengths_of(basis: Basis) -> Array:
    """The length of each basis vector, ``(*stack, 1, r)``; 1 for one of zeros.

    Example:
        >>> lengths_of(jnp.array([[3.0, 0.0], [4.0, 0.0]])).tolist()
        [[5.0, 1.0]]
    """
    lengths = jnp.sqrt(jnp.square(basis).sum(-2, keepdims=True))
    return jnp.where(lengths > 0, lengths, 1)


def orthonormal(matrices: Basis) -> Basis:
    """Orthonormal columns that span the columns of a stack of side×r matrices, r ≤ side.

    Rank-deficient matrices, zero included, are completed with arbitrary directions.

    Example:
        >>> q = orthonormal(jnp.array([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]]))
        >>> jnp.abs(q.T @ q - jnp.eye(2)).max() < 1e-6
        Array(True, dtype=bool)
    """
    return _per_matrix(lambda x: jnp.linalg.qr(x)[0], matrices)


def leading_eigenvectors(symmetric: Square, r: int) -> Basis:
    """The eigenvectors of the r largest eigenvalues, largest first: ``(*stack, side, r)``.

    The entry of largest magnitude is made positive, so that rounding does not flip the sign.

    Example:
        >>> leading_eigenvectors(jnp.diag(jnp.array([1.0, 3.0, 2.0])), 1)[:, 0].tolist()
        [0.0, 1.0, 0.0]
    """

    def leading(x: Array) -> Array:
        vectors = jnp.linalg.eigh(x)[1][..., ::-1][..., :r]
        index = jnp.abs(vectors).argmax(-2, keepdims=True)
        return vectors * jnp.where(jnp.take_along_axis(vectors, index, -2) < 0, -1.0, 1.0)

    return _per_matrix(leading, symmetric)


def _per_matrix(f: Callable[[Array], Array], matrices: Array) -> Array:
    """Applies ``f`` to a stack of matrices.

    On CPUs it maps over one matrix at a time: a batched LAPACK call holds a thread of the pool
    that it waits for, so that calls of several devices that share the pool would deadlock.
    """

    def one_by_one(x: Array) -> Array:
        each = jax.lax.map(f, x.reshape(-1, *x.shape[-2:]))
        return each.reshape(*x.shape[:-2], *each.shape[-2:])

    return jax.lax.platform_dependent(matrices, cpu=one_by_one, default=f)
