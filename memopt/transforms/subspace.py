"""Optimizers that keep their state in a subspace of each matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.errors import check_at_least, check_choice
from memopt.matrices import Layout, Matrices, map_matrices
from memopt.state.precision import statistics_dtype, zeros_of
from memopt.transforms.projectors import Leaf, Projector, When
from memopt.transforms.recombine import Projected, Recombine


class InSubspaceState(NamedTuple):
    """State of `in_subspace`.

    Attributes:
      count: steps taken, int32.
      projector: for each leaf what its projector keeps, ``()`` for one drawn from a seed.
      inner: the inner optimizer's state, on the projected gradients.
      recombine: for each leaf what the recombination keeps.
    """

    count: Array  # type: ignore[assignment]
    projector: Any
    inner: Any
    recombine: Any


def in_subspace(
    inner: optax.GradientTransformation,
    projector: Projector,
    recombine: Recombine,
    refresh_every: int = 200,
    on_refresh: str = "keep",
    *,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer on projections of the gradients.

    For each matrix G of the stack, at each step::

        P ← projector                      anew every `refresh_every` steps
        R = PᵀG or G P                     the gradient in the subspace
        N = inner(R)                       any optimizer
        U = recombine(G, R, N)             an update of full size

    A leaf that is no matrix goes through `inner` as it is.

    Args:
      inner: any Optax transformation; it sees float32 arrays of r×n or m×r numbers.
      projector: how a matrix's subspace is found; see `memopt.projectors`.
      recombine: how the result is used; see `memopt.recombine`.
      refresh_every: steps between two refreshes of the subspace; the first step has one.
      on_refresh: what happens to the inner state then: "keep" leaves it as it is, "reset"
        begins anew.
      matrices: which leaves are projected, and which axes are their rows and columns; by
        default the hidden matrices, see `memopt.matrices.hidden_matrices`.

    Returns:
      A transformation whose state is an `InSubspaceState`.

    Raises:
      ValueError: if `refresh_every` is below one, or a rank does not fit its matrix.

    References:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507; Zhu et al., APOLLO, 2024,
      https://arxiv.org/abs/2412.05270.

    Example:
      >>> from memopt import projectors, recombine
      >>> tx = in_subspace(optax.scale_by_adam(), projectors.gaussian(2), recombine.lift())
      >>> state = tx.init({"w": jnp.zeros((3, 16, 8))})        # three layers of 16×8
      >>> state.inner.mu["w"].shape
      (3, 16, 2)
    """
    check_at_least("refresh_every", refresh_every, 1)
    check_choice("on_refresh", on_refresh, ("keep", "reset"))
    inner = optax.with_extra_args_support(inner)

    def enter(layout: Layout, g: Array, kept: Any, when: When) -> tuple[Any, Array, Any]:
        """The basis, the gradient in the subspace, and what the projector keeps."""
        if not layout.is_matrix:
            return (), g.astype(statistics_dtype(g)), ()
        leaf, g = _leaf(layout, g), _gradient(layout, g)
        basis, kept = projector.space(leaf, kept, g, when)
        return basis, projector.down(leaf, basis, g), kept

    def init(params: Any) -> InSubspaceState:

        def start(layout: Layout, p: Array) -> tuple[Any, Array, Any]:
            kept = projector.init(_leaf(layout, p)) if layout.is_matrix else ()
            low = zeros_of(lambda p: enter(layout, p, kept, When.first())[1], p)
            rule = zeros_of(lambda p: recombine.init(_gradient(layout, p)), p)
            return kept, low, rule if layout.is_matrix else ()

        kept, low, rule = map_matrices(start, params, matrices=matrices, outputs=3)
        return InSubspaceState(jnp.zeros((), jnp.int32), kept, inner.init(low), rule)

    def update(updates: Any, state: InSubspaceState, params: Any = None, **extra: Any) -> Any:
        when = When.at(state.count, refresh_every)
        bases, low, kept = map_matrices(
            lambda layout, g, kept: enter(layout, g, kept, when),
            updates,
            state.projector,
            matrices=matrices,
            outputs=3,
        )
        inner_state = state.inner
        if on_refresh == "reset":
            restart = lambda: inner.init(jax.tree.map(jnp.zeros_like, low))
            inner_state = jax.lax.cond(when.due, restart, lambda: inner_state)
        low_updates, inner_state = inner.update(low, inner_state, None, **extra)

        def leave(
            layout: Layout, g: Array, basis: Any, low_g: Array, low_u: Array, rule: Any
        ) -> tuple[Array, Any]:
            if not layout.is_matrix:
                return low_u.astype(g.dtype), ()
            leaf = _leaf(layout, g)
            up = lambda low: projector.up(leaf, basis, low)
            axis = -2 if projector.is_left(leaf) else -1
            space = Projected(_gradient(layout, g), low_g, low_u, axis, up)
            u, rule = recombine(space, rule)
            return layout.from_matrices(u, g).astype(g.dtype), rule

        updates, rule = map_matrices(
            leave, updates, bases, low, low_updates, state.recombine, matrices=matrices, outputs=2
        )
        count = optax.safe_increment(state.count)
        return updates, InSubspaceState(count, kept, inner_state, rule)

    return optax.GradientTransformationExtraArgs(init, update)


def _gradient(layout: Layout, g: Array) -> Array:
    return layout.to_matrices(g.astype(statistics_dtype(g)))


def _leaf(layout: Layout, array: Any) -> Leaf:
    return Leaf(layout.name, layout.shape(array), statistics_dtype(array))
