"""Products and factorisations of stacks of matrices, sharded or not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding

from memopt.matrices import explicit_axes, shard_count


def product(subscripts: str, a: Array, b: Array, *, like: Any = None) -> Array:
    """``jnp.einsum`` of two stacks in full precision; axes of explicit meshes are told apart.

    An axis of the result is sharded as it is in `a`, else as in `b`; what both would shard by
    the same mesh axis the second leaves whole, and a sum over sharded axes ends in one
    all-reduce of the result.

    Args:
      subscripts: as for ``jnp.einsum``, with ``...`` for the stack's axes.
      a: the first stack.
      b: the second; without stack axes it serves all of `a`.
      like: the sharding of the result instead.

    Example:
      >>> product("...mn,...nr->...mr", jnp.ones((5, 2, 3)), jnp.ones((3, 4))).shape
      (5, 2, 4)
    """
    inputs, output = subscripts.split("->")
    terms = [term.removeprefix("...") for term in inputs.split(",")]
    specs = [tuple(jax.typeof(x).sharding.spec) for x in (a, b)]
    sharding = None
    if like is not None and any(axis is not None for axis in like.spec):
        sharding = like
    elif any(axis is not None for spec in specs for axis in spec):
        stacks = [spec[: -len(term)] for term, spec in zip(terms, specs, strict=True)]
        ndim = max(map(len, stacks))
        stacks = [(None,) * (ndim - len(stack)) + stack for stack in stacks]
        stack = [first or second for first, second in zip(*stacks, strict=True)]
        named = [dict(zip(t, s[-len(t) :], strict=True)) for t, s in zip(terms, specs, strict=True)]
        wanted = stack + [named[0].get(i) or named[1].get(i) for i in output.removeprefix("...")]
        sharding = jax.P(*_once(wanted))
    return jnp.einsum(subscripts, a, b, precision="highest", out_sharding=sharding)


def _once(spec: list) -> list:
    """`spec` less every mesh axis that stands in it a second time."""
    used: set[str] = set()
    result = []
    for entry in spec:
        axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        result.append(None if used & set(axes) else entry)
        used |= set(axes)
    return result


def whole(matrices: Array) -> Array:
    """`matrices` with neither rows nor columns sharded over an explicit mesh.

    For what is small, a basis, before it goes into a factorisation.
    """
    spec = explicit_axes(matrices)
    if spec is None or spec[-2:] == (None, None):
        return matrices
    return jax.sharding.reshard(matrices, jax.P(*spec[:-2], None, None))


def turned(matrices: Array, axis: int) -> Array:
    """`matrices` with one of their axes, -2 or -1, whole, and the other sharded in its place.

    Each device gives away most of its part and gets as much: none holds more than before.
    """
    spec = explicit_axes(matrices)
    if spec is None or spec[axis] is None:
        return matrices
    names = lambda entry: entry if isinstance(entry, tuple) else (entry,) if entry else ()
    both = (*names(spec[-3 - axis]), *names(spec[axis]))
    if matrices.shape[-3 - axis] % (shard_count(matrices, -2) * shard_count(matrices, -1)):
        return matrices
    last = (None, both) if axis == -2 else (both, None)
    return jax.sharding.reshard(matrices, jax.P(*spec[:-2], *last))


def undivided(x: Array, axis: int) -> Array:
    """`x` with an axis, of r dimensions, whole on every device, where mesh axes are automatic.

    What uses it may be split along r, and the gradient along the projected side; XLA would then
    gather gradients, or sum up updates of full size, rather than what is in the subspace.
    """
    mesh = jax.typeof(x).sharding.mesh
    if set(mesh.axis_types) != {AxisType.Auto}:
        return x
    spec: list[Any] = [jax.P.UNCONSTRAINED] * x.ndim
    spec[axis] = None
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, jax.P(*spec)))


def for_stack(basis: Array, like: Array) -> Array:
    """The basis once for each matrix: a batched product that copies no transposed gradient."""
    stack = tuple(jax.typeof(like).sharding.spec[:-2])
    sharding = jax.P(*stack, None, None) if any(stack) else None
    shape = (*like.shape[:-2], *basis.shape[-2:])
    return jnp.broadcast_to(basis, shape, out_sharding=sharding)


def orthonormal(matrices: Array) -> Array:
    """Orthonormal columns that span the columns of a stack of side×r matrices, r ≤ side.

    What is rank-deficient, zero too, is filled up with any directions.

    Example:
      >>> q = orthonormal(jnp.array([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]]))
      >>> jnp.abs(q.T @ q - jnp.eye(2)).max() < 1e-6
      Array(True, dtype=bool)
    """
    return _per_matrix(lambda x: jnp.linalg.qr(x)[0], matrices)


def leading_eigenvectors(symmetric: Array, r: int) -> Array:
    """The eigenvectors of the r largest eigenvalues, largest first: ``(*stack, side, r)``.

    The largest entry of each is positive, so that a vector does not turn round with the
    rounding of its matrix.

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
    """``f`` of a stack whose matrices are whole; it need not know of explicit axes.

    On CPUs one matrix after another: LAPACK's calls of a batch hold a thread of the pool they wait
    for, and those of several devices that share it, as on a laptop, would wait for ever.
    """

    def one_by_one(x: Array) -> Array:
        each = jax.lax.map(f, x.reshape(-1, *x.shape[-2:]))
        return each.reshape(*x.shape[:-2], *each.shape[-2:])

    by_platform = lambda x: jax.lax.platform_dependent(x, cpu=one_by_one, default=f)
    spec = explicit_axes(matrices)
    if spec is None:
        return by_platform(matrices)
    sharding = jax.P(*spec[:-2], None, None)
    return jax.sharding.auto_axes(by_platform, out_sharding=sharding)(whole(matrices))
