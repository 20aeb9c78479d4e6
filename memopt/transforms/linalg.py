"""Products and factorisations of stacks of matrices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding

from memopt.shapes import Basis, Square


def product(subscripts: str, a: Array, b: Array) -> Array:
    """``jnp.einsum`` of two stacks in full precision.

    Args:
      subscripts: as for ``jnp.einsum``, with ``...`` for the stack's axes.
      a: the first stack.
      b: the second; without stack axes it serves all of `a`.

    Example:
      >>> product("...mn,...nr->...mr", jnp.ones((5, 2, 3)), jnp.ones((3, 4))).shape
      (5, 2, 4)
    """
    return jnp.einsum(subscripts, a, b, precision="highest")


def replicate_axis(x: Array, axis: int) -> Array:
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


def for_stack(basis: Basis, like: Array) -> Basis:
    """The basis once for each matrix: a batched product that copies no transposed gradient."""
    return jnp.broadcast_to(basis, (*like.shape[:-2], *basis.shape[-2:]))


def orthonormal(matrices: Basis) -> Basis:
    """Orthonormal columns that span the columns of a stack of side×r matrices, r ≤ side.

    What is rank-deficient, zero too, is filled up with any directions.

    Example:
      >>> q = orthonormal(jnp.array([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]]))
      >>> jnp.abs(q.T @ q - jnp.eye(2)).max() < 1e-6
      Array(True, dtype=bool)
    """
    return _per_matrix(lambda x: jnp.linalg.qr(x)[0], matrices)


def leading_eigenvectors(symmetric: Square, r: int) -> Basis:
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
    """``f`` of a stack of matrices.

    On CPUs one matrix after another: LAPACK's calls of a batch hold a thread of the pool they wait
    for, and those of several devices that share it, as on a laptop, would wait for ever.
    """

    def one_by_one(x: Array) -> Array:
        each = jax.lax.map(f, x.reshape(-1, *x.shape[-2:]))
        return each.reshape(*x.shape[:-2], *each.shape[-2:])

    return jax.lax.platform_dependent(matrices, cpu=one_by_one, default=f)
