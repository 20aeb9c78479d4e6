"""Optimizers that keep their state in a subspace of each matrix."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.errors import NoSuchPairing, check_at_least, check_choice
from memopt.matrices import Layout, Matrices, Matrix, explicit_axes, map_matrices
from memopt.names import MATRIX, VECTOR
from memopt.parameters import Parameter, init_shapes, known, reading_whole_trees
from memopt.state.precision import statistics_dtype, zeros_of
from memopt.state.quantize import QuantizedState
from memopt.transforms.moments import CarryOver, first_moment
from memopt.transforms.projectors import Leaf, Projector, When
from memopt.transforms.recombine import Projected, Recombine
from memopt.trees import NOTHING, by_array, by_leaf


class InSubspaceState(NamedTuple):
    """State of `in_subspace`.

    Attributes:
      count: steps taken, int32.
      projector: for each array that the projector keeps of a matrix, the tree of them: none for
        one drawn from a seed.
      inner: the inner optimizer's state, on the projected gradients.
      recombine: for each leaf what the recombination keeps.
    """

    count: Array  # type: ignore[assignment]
    projector: tuple[Any, ...]
    inner: Any
    recombine: Any


def in_subspace(
    inner: optax.GradientTransformation,
    projector: Projector,
    recombine: Recombine,
    refresh_every: int = 200,
    on_refresh: str | CarryOver = "keep",
    *,
    refresh_phase: int | Sequence[int] = 0,
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
      on_refresh: what happens to the inner state then. "keep" leaves it as it is; "reset" begins
        anew; "reset_moments" does so but for the step count, so that Adam's bias correction
        goes on; "carry" takes moments to the new subspace, as a `CarryOver` with its arguments
        does.
      refresh_phase: by how many steps refreshes after the first come early. Of several numbers
        the matrices take turns, by name, so that no step refreshes all of them; the state is
        then an ``optax.partition`` of such transformations.
      matrices: which leaves are projected, and which axes are their rows and columns; by
        default the hidden matrices, see `memopt.hidden_matrices`.

    Returns:
      A transformation whose state is an `InSubspaceState`.

    Raises:
      ValueError: if `refresh_every` is below one, or a rank does not fit its matrix.
      NoSuchPairing: if projector, recombination and `on_refresh` make no sense together.

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
    if isinstance(refresh_phase, Sequence):
        return _in_turns(
            refresh_phase,
            matrices,
            lambda phase: in_subspace(
                *(inner, projector, recombine, refresh_every, on_refresh),
                refresh_phase=phase,
                matrices=matrices,
            ),
        )
    check_at_least("refresh_every", refresh_every, 1)
    check_at_least("refresh_phase", refresh_phase, 0)
    if not isinstance(on_refresh, CarryOver):
        check_choice("on_refresh", on_refresh, ("keep", "reset", "reset_moments", "carry"))
    _check_pairing(projector, recombine, on_refresh)
    carry = CarryOver() if on_refresh == "carry" else on_refresh
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> InSubspaceState:
        projected = {}

        def start(layout: Layout, p: Array) -> tuple[Any, ...]:
            leaf = _leaf(layout, p)
            if leaf is None:
                return zeros_of(_wide, p), NOTHING, ()
            low = projected[layout.name] = jax.tree.map(jnp.zeros_like, projector.low(leaf))
            return low, zeros_of(recombine.init, leaf.gradient), projector.init(leaf)

        low, rule, kept = map_matrices(start, params, matrices=matrices, outputs=3)
        kept = by_array(kept, params, projector.keeps)
        with _as_projections(projected):
            inner_state = inner.init(low)
        if isinstance(carry, CarryOver):
            _check_can_be_carried(inner_state)
        return InSubspaceState(jnp.zeros((), jnp.int32), kept, inner_state, rule)

    def update(updates: Any, state: InSubspaceState, params: Any = None, **extra: Any) -> Any:
        given, typed = state, any(explicit_axes(x) for x in jax.tree.leaves(state))
        if typed:  # it may have been placed, where what is made anew has the types of `init`
            state = _typed_as(state, init_shapes(init, updates))
        when = When.at(state.count, refresh_every, refresh_phase)
        projected = {}

        def enter(layout: Layout, g: Array, kept: Any, rule: Any, momentum: Any) -> Any:
            """The subspace, the gradient within, and what the projector keeps."""
            leaf = _leaf(layout, g)
            if leaf is None:
                return None, _wide(g), ()
            g = recombine.correct(_gradient(layout, g), rule)
            basis, keep = projector.space(leaf, kept, g, when, momentum)
            old = lambda: projector.before(leaf, kept, g, when)
            if recombine.needs_squares:
                low, squares = projector.down_and_squares(leaf, basis, g)
            else:
                low, squares = projector.down(leaf, basis, g), None
            return _Space(projector, leaf, g, basis, squares, old), low, keep

        def low_shape(layout: Layout, g: Array) -> Any:
            leaf = _leaf(layout, g)
            if leaf is None:
                return g
            low = projected[layout.name] = projector.low(leaf)
            return low

        like = map_matrices(low_shape, updates, matrices=matrices)
        kept, before = by_leaf(state.projector, updates), _momentum(state.inner, like)
        read = (updates, kept, state.recombine, before)
        spaces, low, kept = map_matrices(enter, *read, matrices=matrices, outputs=3)

        inner_state, moved = state.inner, jnp.zeros((), bool)
        if isinstance(carry, CarryOver):
            turn = lambda tree, power: map_matrices(
                lambda _, g, space, m: m if space is None else space.carry(m, power),
                *(updates, spaces, tree),
                matrices=matrices,
            )
            moved = when.due & (state.count > 0)
            over = lambda: carry(state.inner, low, turn, state.count)
            inner_state = jax.lax.cond(moved, over, lambda: state.inner)
        elif on_refresh != "keep":
            counts_too = on_refresh == "reset"

            def anew() -> Any:
                with _as_projections(projected):
                    return _anew(inner.init(low), state.inner, counts_too=counts_too)

            inner_state = jax.lax.cond(when.due, anew, lambda: state.inner)
        after = _momentum(inner_state, like)
        with _as_projections(projected):
            low_updates, inner_state = inner.update(low, inner_state, None, **extra)

        def leave(layout: Layout, g: Array, space: Any, *ends: Any) -> tuple[Array, Any]:
            """The full-size update, and what the recombination keeps."""
            low_g, low_u, before, after, rule = ends
            if space is None:
                return low_u.astype(g.dtype), NOTHING
            lost = lambda: space.lost(before, after, moved)
            axis = -2 if projector.is_left(space.leaf) else -1
            rest = lambda: projector.rest(space.leaf, space.basis, space.gradient, low_g)
            full = (space.up, rest, space.squares, lost)
            u, rule = recombine(Projected(space.gradient, low_g, low_u, axis, *full), rule)
            return layout.from_matrices(u, g).astype(g.dtype), rule

        ends = (updates, spaces, low, low_updates, before, after, state.recombine)
        updates, rule = map_matrices(leave, *ends, matrices=matrices, outputs=2)
        count = optax.safe_increment(state.count)
        state = InSubspaceState(count, by_array(kept, updates, projector.keeps), inner_state, rule)
        return updates, _typed_as(state, given) if typed else state

    return optax.GradientTransformationExtraArgs(init, update)


def _as_projections(low: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Fixes that projections are stacks of matrices, whatever axes their parameters have.

    Args:
      low: projected gradients by the name of the parameter.
    """

    def parameter(name: str, x: Any) -> Parameter:
        kind, matrix = (MATRIX, Matrix()) if x.ndim > 1 else (VECTOR, None)
        return Parameter(name, x.shape, x.dtype, kind, matrix, "it is a projection")

    return known([parameter(name, x) for name, x in low.items()])


@dataclasses.dataclass(frozen=True)
class _Space:
    """The subspace of one parameter at one step, and the one it may replace."""

    projector: Projector
    leaf: Leaf
    gradient: Array
    basis: Array
    squares: Array | None
    old: Callable[[], Array]

    def up(self, low: Array) -> Array:
        return self.projector.up(self.leaf, self.basis, low)

    def carry(self, moment: Array, power: int) -> Array:
        return self.projector.carry(self.leaf, self.old(), self.basis, moment, power=power)

    def lost(self, before: Array | None, after: Array | None, moved: Array) -> Array:
        """What of a moment stays behind in the old subspace, in full size."""
        nothing = lambda: jnp.zeros_like(self.gradient)
        if before is None or after is None:
            return nothing()
        gone = lambda: self.projector.up(self.leaf, self.old(), before) - self.up(after)
        return jax.lax.cond(moved, gone, nothing)


def _momentum(inner_state: Any, like: Any) -> Any:
    """The inner optimizer's first moment; without one, None for each leaf."""
    moment = first_moment(inner_state, like)
    return jax.tree.map(lambda _: None, like) if moment is None else moment


def _anew(fresh: Any, state: Any, *, counts_too: bool) -> Any:
    """A fresh state, with the step counts of another unless they begin anew too."""
    if counts_too:
        return fresh
    is_count = lambda x: x.shape == () and jnp.issubdtype(x.dtype, jnp.integer)
    return jax.tree.map(lambda new, old: old if is_count(old) else new, fresh, state)


def _check_pairing(projector: Projector, recombine: Recombine, on_refresh: str | CarryOver) -> None:
    recombine.check(projector)
    name = type(projector).__name__
    if not projector.per_matrix and on_refresh == "keep":
        raise NoSuchPairing(
            f"on_refresh='keep' would hand the moments of one layer to the next that a {name} "
            "projector chooses. Take 'reset', 'reset_moments' or 'carry'."
        )
    if projector.moves and on_refresh != "keep":
        raise NoSuchPairing(
            f"a {name} projector moves its basis at every step and has no refreshes after the "
            f"first; on_refresh must be 'keep', got {on_refresh!r}."
        )


def _check_can_be_carried(inner_state: Any) -> None:
    is_quantized = lambda x: isinstance(x, QuantizedState)
    if any(map(is_quantized, jax.tree.leaves(inner_state, is_leaf=is_quantized))):
        raise NoSuchPairing(
            "on_refresh='carry' cannot carry moments that the inner optimizer keeps quantised. "
            "Take memopt.quantize_state(in_subspace(...)), or 'keep', 'reset' or 'reset_moments'."
        )


def _in_turns(
    phases: Sequence[int],
    matrices: Matrices,
    make: Callable[[int], optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """A partition of the tree; matrices of one name, whatever its numbers, stay together."""
    if not phases:
        raise ValueError("refresh_phase must be a number or several, got none.")

    def labels(tree: Any) -> Any:
        turns: dict[str, int] = {}

        def label(layout: Layout, array: Any) -> int:
            leaf = _leaf(layout, array)
            return 0 if leaf is None else turns.setdefault(leaf.group, len(turns)) % len(phases)

        return map_matrices(label, tree, matrices=matrices)

    parts = {i: make(phase) for i, phase in enumerate(phases)}
    return reading_whole_trees(optax.partition(parts, labels))


def _typed_as(state: Any, like: Any) -> Any:
    """A state whose arrays are sharded over explicit axes as others are."""

    def move(x: Array, like: Any) -> Array:
        spec = jax.typeof(x).sharding.spec, jax.typeof(like).sharding.spec
        return x if spec[0] == spec[1] else jax.sharding.reshard(x, spec[1])

    return jax.tree.map(move, state, like)


def _wide(g: Array) -> Array:
    return g.astype(statistics_dtype(g))


def _gradient(layout: Layout, g: Array) -> Array:
    return layout.to_matrices(_wide(g))


def _leaf(layout: Layout, array: Any) -> Leaf | None:
    if not layout.is_matrix:
        return None
    g = jax.eval_shape(lambda x: _gradient(layout, x), array)
    return Leaf(layout.name, g.shape, g.dtype, g.sharding, array.dtype)
