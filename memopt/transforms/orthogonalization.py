"""Orthogonalises updates by Newton–Schulz iterations and scales them by their shape (Muon)."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.typing import DTypeLike

from memopt.axis_types import on_auto_axes
from memopt.errors import check_at_least, check_static
from memopt.matrices import Layout, Matrices, every_matrix, map_matrices
from memopt.renamed import keywords
from memopt.shapes import Stack
from memopt.state.precision import bounded, check_real
from memopt.transforms.per_matrix import per_matrix

NEWTON_SCHULZ_COEFFS = (3.4445, -4.7750, 2.0315)
"""Muon's polynomial: the steepest at zero that keeps singular values near one."""


@keywords(steps="ns_steps", coefficients="ns_coeffs", copied_over="replica_axis")
def orthogonalize(
    ns_steps: int = 5,
    ns_coeffs: Sequence[float] | Sequence[Sequence[float]] = NEWTON_SCHULZ_COEFFS,
    eps: float = 1e-7,
    *,
    dtype: DTypeLike | None = None,
    replica_axis: str = "data",
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces each matrix U S Vᵀ by an approximation of U Vᵀ, using only matrix products.

    For an m×n matrix G, m ≤ n (otherwise for its transpose)::

        X = G / (‖G‖ + ε)
        X ← a X + (b A + c A²) X,    A = X Xᵀ        `ns_steps` times

    With the default coefficients singular values end between 0.7 and 1.2. No state.

    Matrices of equal sides form one batch, whatever parameters they belong to. On a mesh they are
    distributed over the devices: each matrix is on one device during the iterations, and data
    moves only before and after them. A vector is a matrix of one row.

    Args:
        ns_steps: the number of iterations.
        ns_coeffs: a, b and c; or three numbers for each step, which then sets the number of steps.
        eps: added to the norm.
        dtype: the dtype of the iterations; by default float32, or wider if the updates are.
        replica_axis: the mesh axis over which parameters are replicated, if there is one. It
            affects what is communicated, not the results.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`.

    Returns:
        A transformation whose update takes the extra argument `leaf_by_leaf`. A training step that
        never holds all gradients sets it, so that parameters are not batched.

    Raises:
        ValueError: if `ns_steps` is below 1, or `ns_coeffs` are not three numbers per step.

    References:
        Jordan et al., Muon, 2024, https://kellerjordan.github.io/posts/muon/.

    Example:
        >>> g = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.0, -2.0]])
        >>> u, _ = orthogonalize(10, (1.5, -0.5, 0.0)).update({"w": g}, optax.EmptyState())
        >>> print(u["w"].round(3) + 0.0)
        [[ 1.  0.  0.]
         [ 0.  0. -1.]]
    """
    _polynomials(ns_steps, ns_coeffs)
    iterate = functools.partial(
        newton_schulz, ns_steps=ns_steps, ns_coeffs=ns_coeffs, eps=eps, dtype=dtype
    )

    def update(
        updates: Any, state: Any, params: Any = None, *, leaf_by_leaf: bool = False, **_: Any
    ) -> tuple[Any, Any]:
        def orthogonal(updates: Any) -> Any:
            on = functools.partial(map_matrices, matrices=matrices, default=every_matrix)
            structure: Any
            leaves, structure = jax.tree.flatten(on(_to_landscape, updates))
            if leaf_by_leaf:
                done = list(map(iterate, leaves))
            else:
                done = _in_batches(iterate, leaves, replica_axis)
            return on(_from_landscape, updates, structure.unflatten(done))

        return on_auto_axes(jax.jit(orthogonal), (updates,), like=updates), state

    def init(params: Any) -> optax.EmptyState:
        check_real(params)
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(init, update)


def newton_schulz(
    x: Stack,
    ns_steps: int = 5,
    ns_coeffs: Sequence[float] | Sequence[Sequence[float]] = NEWTON_SCHULZ_COEFFS,
    eps: float = 1e-7,
    *,
    dtype: DTypeLike | None = None,
) -> Stack:
    """Runs the iterations of `orthogonalize` on an array of matrices.

    Args:
        x: ``(*stack, m, n)``.
        ns_steps: as in `orthogonalize`.
        ns_coeffs: as in `orthogonalize`.
        eps: as in `orthogonalize`.
        dtype: as in `orthogonalize`.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: as in `orthogonalize`.

    Example:
        >>> g = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> newton_schulz(g, 20, (1.5, -0.5, 0.0)).round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    polynomials = _polynomials(ns_steps, ns_coeffs)
    x = jnp.asarray(x)
    is_tall = x.shape[-2] > x.shape[-1]

    def step(y: Array, polynomial: Array) -> tuple[Array, None]:
        a, b, c = polynomial
        gram = jnp.einsum("...mn,...pn->...mp", y, y)
        return a * y + (b * gram + c * (gram @ gram)) @ y, None

    def iterate(x: Array) -> Array:
        y = bounded(x.mT if is_tall else x)
        y = y.astype(dtype or y.dtype)
        norm = jnp.sqrt(jnp.square(y).sum((-2, -1), keepdims=True))
        y = jax.lax.scan(step, y / (norm + eps), jnp.asarray(polynomials, y.dtype))[0]
        return (y.mT if is_tall else y).astype(x.dtype)

    return on_auto_axes(iterate, (x,), like=x)


def _polynomials(ns_steps: int, ns_coeffs: Any) -> np.ndarray:
    """The coefficients of each step."""
    check_static("ns_steps", ns_steps)
    check_at_least("ns_steps", ns_steps, 1)
    polynomials = np.asarray(ns_coeffs, float)
    if polynomials.ndim not in (1, 2) or polynomials.shape[-1] != 3:
        raise ValueError(
            f"ns_coeffs must be three numbers, or three for each step, got {ns_coeffs!r}."
        )
    return polynomials if polynomials.ndim == 2 else np.tile(polynomials, (ns_steps, 1))


def scale_by_matrix_shape(
    consistent_rms: float | None = None, *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Scales the update of an m×n matrix, with m inputs and n outputs, by its shape.

    The factor is √max(1, n/m), or, with `consistent_rms`, consistent_rms · √max(m, n), which gives
    orthogonal updates that root mean square. No state.

    Args:
        consistent_rms: the root mean square of every update; 0.2 is about AdamW's.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. Rows are inputs, see `memopt.out_in`; a vector is a matrix of one
            row.

    References:
        Jordan et al., Muon, 2024, https://kellerjordan.github.io/posts/muon/; Liu et al., Muon is
        Scalable for LLM Training, 2025, https://arxiv.org/abs/2502.16982, section 2.2.

    Example:
        >>> u, _ = scale_by_matrix_shape().update({"w": jnp.ones((2, 8))}, optax.EmptyState())
        >>> float(u["w"][0, 0])
        2.0
    """
    return per_matrix(
        functools.partial(multiply_by_shape, consistent_rms=consistent_rms), matrices=matrices
    )


def multiply_by_shape(layout: Layout, u: Array, *, consistent_rms: float | None) -> Array:
    """Multiplies the update of each m×n matrix by √max(1, n/m) or consistent_rms · √max(m, n)."""
    m, n = layout.shape(u)[-2:]
    if consistent_rms is None:
        return u * math.sqrt(max(1, n / m))
    return (u * (consistent_rms * math.sqrt(max(m, n)))).astype(u.dtype)


def _to_landscape(layout: Layout, u: Array) -> Array:
    """Reshapes an update to a stack of matrices with no more rows than columns."""
    x = layout.to_matrices(u)
    x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    return x.mT if x.shape[-2] > x.shape[-1] else x


def _from_landscape(layout: Layout, u: Array, x: Array) -> Array:
    """Inverts `_to_landscape`."""
    *_, m, n = shape = layout.shape(u)
    return layout.from_matrices((x.mT if m > n else x).reshape(shape), u)


def _in_batches(
    f: Callable[[Array], Array], stacks: Sequence[Array], replica_axis: str
) -> list[Array]:
    """Applies ``f`` to every stack, in one call for all matrices of the same shape."""
    kinds: dict[Any, list[int]] = {}
    for i, x in enumerate(stacks):
        kinds.setdefault((x.shape[1:], x.dtype), []).append(i)
    done: dict[int, Array] = {}
    for kind in kinds.values():
        batch = _across_devices(f, [stacks[i] for i in kind], replica_axis)
        done.update(zip(kind, batch, strict=True))
    return [done[i] for i in range(len(stacks))]


def _across_devices(
    f: Callable[[Array], Array], stacks: Sequence[Array], replica_axis: str
) -> list[Array]:
    """Applies ``f`` to stacks of matrices of one shape, with the same number on each device.

    The stacks are first resharded to a common layout, rows over the whole mesh, in which they can
    be concatenated. XLA reshards from any layout to it, except that an array that is split over
    two axes and replicated over a third must not change all three at once: XLA would gather it on
    every device. The intermediate layouts avoid that.
    """
    mesh = jax.typeof(stacks[0]).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = [name for name, kind in kinds if kind != AxisType.Manual]
    split = tuple(name for name in names if name != replica_axis)
    everywhere = (*split, *(name for name in names if name == replica_axis))
    devices = math.prod(mesh.shape[name] for name in names)

    def place(x: Array, *spec: Any) -> Array:
        if not names or any(n % devices for n, axes in zip(x.shape, spec, strict=False) if axes):
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, jax.P(*spec)))

    x = jnp.concatenate([place(x, None, split) for x in stacks])
    x = place(jnp.pad(x, ((0, -len(x) % devices), (0, 0), (0, 0))), None, everywhere)
    x = place(f(place(x, everywhere)), everywhere)
    x = place(place(x, None, everywhere), None, split)
    ends = itertools.accumulate(map(len, stacks))
    return [place(x[end - len(y) : end], None, split) for y, end in zip(stacks, ends, strict=True)]
