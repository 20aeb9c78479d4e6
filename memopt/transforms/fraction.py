"""Clipping of the largest fraction of all entries."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.axis_types import on_auto_axes
from memopt.checked import checked
from memopt.errors import check_choice, check_static
from memopt.matrices import Layout, Matrices
from memopt.state.owners import FIRST, is_state_array, owners
from memopt.state.precision import check_real
from memopt.transforms.per_matrix import per_matrix
from memopt.transforms.selection import kth_magnitude, share_of
from memopt.transforms.stored_update import update_of_state


@checked
def clip_by_fraction(
    fraction: float, *, per: str = "tree", matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Clips the largest fraction of all entries to the size of the smallest of them.

    With τ the ⌊ρN⌋-th largest magnitude of N entries, counted from 0, and ρ = fraction::

        U ← max(−τ, min(U, τ))

    By default τ is one number for all entries of all arrays that it is given. It is exact and found
    without sorting or gathering: its bits, three at a time, by counting the entries above seven
    candidates, which reads the updates 11 times in float32, 5 times in bfloat16; on a mesh only
    counts are exchanged. If fewer than ⌊ρN⌋ entries differ from zero, nothing is clipped (the
    authors' code makes all of them zero). No state.

    Place it before a momentum, as `optax.trace`; before both moments of Adam, of which only the
    first should see clipped gradients, by `memopt.clip_first_moment`; or after Adam, to clip the
    finished update. The paper clips 0.1 of the gradients of SGD and 0.5 of those of Adam and
    Adafactor.

    Args:
        fraction: ρ, at least 0 and below 1.
        per: "tree", or "matrix" for a threshold of its own for each matrix of a stack and each
            vector, with N its entries; a released step can do only this.
        matrices: with ``per="matrix"``, which leaves are matrices, and which axes are their rows
            and columns; see `memopt.matrices`.

    Raises:
        ValueError: if `fraction` is out of range or `per` unknown.

    References:
        Pan & Li, Toward Understanding Why Adam Converges Faster Than SGD for Transformers, 2023,
        https://arxiv.org/abs/2306.00204, Algorithm 1.

    Example:
        >>> tx = clip_by_fraction(0.5)
        >>> g = {"a": jnp.array([1.0, -8.0]), "b": jnp.array([3.0, 0.5])}
        >>> updates, _ = tx.update(g, tx.init(g))
        >>> updates["a"].tolist(), updates["b"].tolist()                   # τ = 1
        ([1.0, -1.0], [1.0, 0.5])
    """
    check_static("fraction", fraction)
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be at least 0 and below 1, got {fraction}.")
    check_choice("per", per, ("tree", "matrix"))
    if per == "matrix":
        return per_matrix(functools.partial(clip_matrix, fraction=fraction), matrices=matrices)

    def init(params: Any) -> optax.EmptyState:
        check_real(params)
        return optax.EmptyState()

    def clip(updates: Any) -> Any:
        leaves = jax.tree.leaves(updates)
        size = sum(u.size for u in leaves)
        if not size:
            return updates
        threshold = kth_magnitude(leaves, 1 + share_of(fraction, size))
        return jax.tree.map(lambda u: _clipped(u, threshold), updates)

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        return on_auto_axes(clip, (updates,), like=updates), state

    return optax.GradientTransformationExtraArgs(init, update)


class ClipFirstMomentState(NamedTuple):
    """State of `clip_first_moment`.

    Attributes:
        clip: the state of the clipping transformation.
        inner: the state of the inner one.
    """

    clip: Any
    inner: Any


@checked
def clip_first_moment(
    inner: optax.GradientTransformation, clip: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Averages clipped gradients in the first moment, and gradients as they are in the second.

    For any Adam-like transformation whose update is a function of the moments that it stores. The
    new first moments are those of a step with clipped gradients, all other state is that of a step
    with the gradients as they are, and the update is what this state gives. Nothing is computed
    twice once it is compiled. State: that of both.

    Args:
        inner: any Optax transformation with a first moment, such as ``optax.scale_by_adam``.
        clip: maps gradients to clipped ones, such as `memopt.clip_by_fraction`.

    Returns:
        A transformation whose state is a `ClipFirstMomentState`.

    Raises:
        ValueError: by the update, if `inner` keeps no first moment, or its update also depends on
            the gradient itself, as with Nesterov momentum.

    References:
        Pan & Li, Toward Understanding Why Adam Converges Faster Than SGD for Transformers, 2023,
        https://arxiv.org/abs/2306.00204, Algorithm 1.

    Example:
        >>> tx = clip_first_moment(optax.scale_by_adam(eps=0.0), optax.clip(1.0))
        >>> g = jnp.array([4.0, 0.5])
        >>> [round(float(u), 3) for u in tx.update(g, tx.init(g))[0]]
        [0.25, 1.0]
    """
    inner, clip = map(optax.with_extra_args_support, (inner, clip))

    def init(params: Any) -> ClipFirstMomentState:
        return ClipFirstMomentState(clip.init(params), inner.init(params))

    def update(updates: Any, state: ClipFirstMomentState, params: Any = None, **extra: Any) -> Any:
        clipped, clip_state = clip.update(updates, state.clip, params, **extra)
        _, as_given = inner.update(updates, state.inner, params, **extra)
        _, of_clipped = inner.update(clipped, state.inner, params, **extra)
        kinds = owners(as_given, updates)
        is_first = jax.tree.map(lambda array: array.kind == FIRST, kinds, is_leaf=is_state_array)
        if jax.tree.leaves(updates) and not any(jax.tree.leaves(is_first)):
            name = getattr(inner.init, "__qualname__", str(inner)).partition(".")[0]
            raise ValueError(f"inner must keep a first moment in floats, got {name}.")
        choose = lambda first, given, of_clipped: of_clipped if first else given
        new = jax.tree.map(choose, is_first, as_given, of_clipped)
        updates = update_of_state(inner, new, updates, params, **extra)
        return updates, ClipFirstMomentState(clip_state, new)

    return optax.GradientTransformationExtraArgs(init, update)


def clip_matrix(layout: Layout, u: Array, *, fraction: float) -> Array:
    """Clips the largest fraction of the entries of each matrix, or vector, of a stack."""
    if not u.size:
        return u
    size = math.prod(u.shape[axis] for axis in layout.core)
    return _clipped(u, kth_magnitude([u], 1 + share_of(fraction, size), layout.core))


def _clipped(u: Array, threshold: Array) -> Array:
    threshold = jnp.where(threshold > 0, threshold, jnp.inf).astype(u.dtype)
    return jnp.clip(u, -threshold, threshold)
