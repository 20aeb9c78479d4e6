"""Skips gradients that are not finite, and counts them."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.axis_types import on_auto_axes
from memopt.checked import checked
from memopt.errors import check_choice, check_unused
from memopt.matrices import Layout, Matrices, every_matrix, map_matrices
from memopt.parameters import init_shapes
from memopt.reductions import total
from memopt.state.following import Axis, Follower, followers
from memopt.state.owners import StateArray, is_state_array, owners
from memopt.state.precision import where_applied, zeros_of
from memopt.transforms.gradient_norm import global_norm
from memopt.trees import map_named


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite` with ``per="tree"``.

    Attributes:
        skipped: steps skipped, int32.
        inner: the state of the inner transformation.
    """

    skipped: Array
    inner: Any


class SkipNonfiniteMatricesState(NamedTuple):
    """State of `skip_nonfinite` with ``per="matrix"``.

    Attributes:
        skipped: a tree with the number of skipped steps of each matrix, int32 arrays of the stacks'
            shapes.
        inner: the state of the inner transformation.
    """

    skipped: Any
    inner: Any


@checked
def skip_nonfinite(
    inner: optax.GradientTransformation, per: str = "matrix", *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Skips gradients with an entry that is infinite or NaN.

    Wrap it around a whole optimizer. With ``per="matrix"`` each matrix of a stack, and each vector,
    is skipped separately: if its gradient is not finite, its update is zero and the state kept for
    it is unchanged, while all others are updated. `inner` sees a gradient of zeros in its place, so
    that no norm over several parameters becomes NaN. Step counts advance: a schedule, a bias
    correction or a refresh of a subspace goes on without the skipped matrix. State that is kept for
    several matrices together is updated as by a gradient of zeros.

    With ``per="tree"`` one such entry anywhere skips the whole step, counts included, as if there
    had been no step.

    State: an int32 number per matrix and per vector, or one; and the state of `inner`. The wrapper
    reads each gradient once more. In memopt's own training steps, which skip whole steps,
    ``per="matrix"`` takes their place if it is the outermost transformation; ``per="tree"`` makes a
    released step exact, at the price of a second backward pass.

    Args:
        inner: any Optax transformation, such as a whole optimizer or a `memopt.quantize_state`.
        per: "matrix" or "tree".
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. By default `memopt.matrices.every_matrix`.

    Returns:
        A transformation whose state is a `SkipNonfiniteMatricesState` or a `SkipNonfiniteState`.

    Raises:
        ValueError: if `per` is unknown, or `matrices` given with ``per="tree"``.

    Example:
        >>> tx = skip_nonfinite(optax.adam(0.1))
        >>> params = {"layers": jnp.ones((2, 4, 4))}
        >>> gradient = {"layers": params["layers"].at[1, 0, 0].set(jnp.nan)}
        >>> updates, state = tx.update(gradient, tx.init(params), params)
        >>> [round(float(abs(u).max()), 4) for u in updates["layers"]]
        [0.1, 0.0]
        >>> state.skipped["layers"].tolist()
        [0, 1]
    """
    check_choice("per", per, ("matrix", "tree"))
    inner = optax.with_extra_args_support(inner)
    if per == "matrix":
        return _skip_matrices(inner, matrices)
    check_unused(skip_nonfinite, "per='tree' looks at no matrix", matrices=matrices)
    return _skip_steps(inner)


def skips_matrices(state: Any) -> bool:
    """Whether an optimizer's state is that of `skip_nonfinite` with ``per="matrix"``."""
    return isinstance(state, SkipNonfiniteMatricesState)


def all_finite(tree: Any) -> Array:
    """Whether all numbers of a tree are finite, a bool."""
    finite = jnp.ones((), bool)
    for x in jax.tree.leaves(tree):
        finite &= ~_any_nonfinite(x, tuple(range(x.ndim)))
    return finite


def _skip_steps(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    def init(params: Any) -> SkipNonfiniteState:
        # Inside shard_map the count varies as the parameters do.
        zero = zeros_of(lambda params: all_finite(params).astype(jnp.int32), params)
        return SkipNonfiniteState(zero, inner.init(params))

    def step(updates: Any, state: SkipNonfiniteState, params: Any, extra: Any) -> Any:
        # A released step never holds all gradients, but knows their norm.
        by_leaf = extra.get("leaf_by_leaf", False)
        finite = jnp.isfinite(extra["gradient_norm"]) if by_leaf else all_finite(updates)
        apply = lambda: inner.update(updates, state.inner, params, **extra)
        hold = lambda: (zeros_of(lambda: apply()[0]), state.inner)
        # In the other order XLA for CPUs copies the whole state.
        updates, inner_state = jax.lax.cond(finite, apply, hold)
        return updates, SkipNonfiniteState(state.skipped + ~finite, inner_state)

    return _on_auto_axes(init, step)


def _skip_matrices(
    inner: optax.GradientTransformationExtraArgs, matrices: Matrices
) -> optax.GradientTransformationExtraArgs:
    on = functools.partial(map_matrices, matrices=matrices, default=every_matrix)

    @functools.lru_cache(maxsize=8)
    def find(structure: Any, shapes: Sequence[jax.ShapeDtypeStruct]) -> Any:
        """The `Place` of each state array, for gradients of this structure and these shapes."""
        gradients = structure.unflatten(shapes)
        layouts: list[Layout] = []
        on(lambda layout, x: layouts.append(layout), gradients)
        state = init_shapes(inner.init, gradients)
        kept = jax.tree.leaves(owners(state, gradients), is_leaf=is_state_array)
        stacks = [[Axis(a, 1) for a in layout.stack] for layout in layouts]
        follow = followers(inner, gradients, stacks) if any(stacks) else [None] * len(kept)

        def place(array: StateArray, follower: Follower | None) -> Place:
            if array.parameter is None:
                return Place(None, None)
            stack = layouts[array.parameter].stack
            mine = {of: axis for axis, of in follower.axes} if follower else {}
            known = all(a in mine for a in stack)
            return Place(array.parameter, tuple(mine[a] for a in stack) if known else None)

        outline: Any = jax.tree.structure(state)
        return outline.unflatten(map(place, kept, follow))

    def init(params: Any) -> SkipNonfiniteMatricesState:
        count = lambda layout, p: zeros_of(lambda p: _hit(layout, p).astype(jnp.int32), p)
        return SkipNonfiniteMatricesState(on(count, params), inner.init(params))

    def step(updates: Any, state: SkipNonfiniteMatricesState, params: Any, extra: Any) -> Any:
        hit = on(_hit, updates)
        zero = lambda layout, x, hit: jnp.where(jnp.expand_dims(hit, layout.core), 0, x)
        gradients = on(zero, updates, hit)
        if "gradient_norm" in extra and not extra.get("leaf_by_leaf"):
            extra = {**extra, "gradient_norm": global_norm(gradients)}
        new_updates, new = inner.update(gradients, state.inner, params, **extra)

        hits = jax.tree.leaves(hit)

        def choose(_: str, new: Array, old: Array, place: Place) -> Array:
            if place.parameter is None:
                is_float = jnp.issubdtype(new.dtype, jnp.floating)
                return jnp.where(jnp.isfinite(new), new, old) if is_float else new
            if place.axes is None:
                return new
            return where_applied(~_along(hits[place.parameter], place.axes, new.ndim), new, old)

        shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(updates))
        places = find(jax.tree.structure(updates), tuple(shapes))
        inner_state = map_named(choose, new, state.inner, places)
        skipped = jax.tree.map(jnp.add, state.skipped, hit)
        return on(zero, new_updates, hit), SkipNonfiniteMatricesState(skipped, inner_state)

    return _on_auto_axes(init, step)


def _hit(layout: Layout, g: Array) -> Array:
    """Whether each matrix of a stack has an entry that is not finite, in the stack's shape."""
    return _any_nonfinite(g, layout.core)


def _any_nonfinite(x: Array, axes: tuple[int, ...]) -> Array:
    """Whether any number along some axes is infinite or NaN.

    Times zero it is NaN, and a sum takes XLA for CPUs a fifth of the time of an `all`.
    """
    return jnp.isnan(total(0 * x, axes))


class Place(NamedTuple):
    """The place of each matrix in a state array.

    Attributes:
        parameter: the index of the parameter that the array belongs to; None if there is none.
        axes: for each axis of the parameter's stack the axis of the array that follows it; None if
            one has none, so that several matrices share a place.
    """

    parameter: int | None
    axes: tuple[int, ...] | None


def _along(hit: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """Returns `hit` with its axes at those of an array of `ndim` axes.

    Example:
        >>> _along(jnp.ones((5, 2)), (3, 1), 4).shape
        (1, 2, 1, 5)
    """
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    others = [a for a in range(ndim) if a not in axes]
    return jnp.expand_dims(hit.transpose(order), others)


def _on_auto_axes(init: Any, step: Any) -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return on_auto_axes(step, (updates, state, params, extra), like=(updates, state))

    return optax.GradientTransformationExtraArgs(init, update)
