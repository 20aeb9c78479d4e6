"""Runs optimizers on projections of the gradients to a subspace of each matrix."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import AxisType

from memopt.axis_types import on_auto_axes, spec_of, varying_as
from memopt.checked import checked
from memopt.errors import IncompatiblePairingError, check_at_least, check_choice
from memopt.internals import trace
from memopt.matrices import Layout, Matrices, Matrix, map_matrices
from memopt.names import MATRIX, VECTOR
from memopt.parameters import Parameter, known, reading_whole_trees
from memopt.state.precision import (
    bounded,
    bounded_squares,
    check_real,
    float32_zeros,
    statistics_dtype,
    to_float32,
)
from memopt.state.quantized_state import QuantizedState
from memopt.transforms.moments import CarryOver, check_moments_are_known, first_moment
from memopt.transforms.projectors import MatrixSpec, Projector, RefreshClock
from memopt.transforms.recombine import Recombine, Subspace
from memopt.trees import NOTHING, transpose_tuples, untranspose_tuples


class InSubspaceState(NamedTuple):
    """State of `in_subspace`.

    Attributes:
        count: steps taken, int32.
        projector: one tree for each array that the projector keeps per matrix; empty for bases
            drawn from a seed.
        inner: the inner optimizer's state for the projected gradients.
        recombine: the array that the recombination keeps for each leaf.
    """

    count: Array  # type: ignore[assignment]
    projector: tuple[Any, ...]
    inner: Any
    recombine: Any


@checked
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

        P ← projector                      refreshed every `refresh_every` steps
        R = PᵀG or G P                     the gradient in the subspace
        N = inner(R)                       any optimizer
        U = recombine(G, R, N)             a full-size update

    A leaf that is not a matrix is passed to `inner` without projection.

    Args:
        inner: any Optax transformation; it receives float32 arrays of r×n or m×r numbers, and as
            parameters their projections, PᵀW or W P. It must not keep parameters in its state, as
            ``optax.contrib.schedule_free`` does.
        projector: the rule that gives each matrix a subspace; see `memopt.projectors`.
        recombine: the rule that forms a full-size update; see `memopt.recombine`.
        refresh_every: steps between two refreshes of the subspace; the first step has one.
        on_refresh: what happens to the inner state at a refresh. "keep" leaves it unchanged;
            "reset" initializes it again; "reset_moments" does so except for the step count, so that
            Adam's bias correction continues; "carry" transforms the moments to the new subspace, as
            does a `CarryOver`, which has options.
        refresh_phase: shifts refreshes: they happen at step 0 and at steps where ``(step +
            refresh_phase) % refresh_every == 0``. With several numbers, matrices are assigned to
            them in turn, by name, so that no step refreshes all of them; the state is then an
            ``optax.partition``.
        matrices: which leaves are projected, and which axes are their rows and columns; by
            default the hidden matrices, see `memopt.hidden_matrices`.

    Returns:
        A transformation whose state is an `InSubspaceState`.

    Raises:
        ValueError: if `refresh_every` is below one, or a rank does not fit its matrix.
        IncompatiblePairingError: if projector, recombination and `on_refresh` cannot be combined;
            by `init`, if the inner optimizer keeps parameters, or moments that cannot be carried.

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
        return partition_by_phase(
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
    find_specs = functools.partial(map_matrices, matrix_spec, matrices=matrices)

    def init(params: Any) -> InSubspaceState:
        check_real(params)
        specs = find_specs(params)
        start = functools.partial(_start, projector, recombine)
        low, rule, kept = map_matrices(start, params, specs, matrices=matrices, outputs=3)
        with _as_projections(projector, specs):
            inner_state = inner.init(low)
            check_keeps_no_values(inner.init, low)
        if isinstance(carry, CarryOver):
            _check_can_be_carried(inner_state, low, projector)
        kept = transpose_tuples(kept, params, projector.keeps)
        return InSubspaceState(jnp.zeros((), jnp.int32), kept, inner_state, rule)

    def step(specs: Any, updates: Any, state: InSubspaceState, params: Any, extra: Any) -> Any:
        clock = RefreshClock.at(state.count, refresh_every, refresh_phase)
        on = functools.partial(map_matrices, matrices=matrices)

        enter = functools.partial(enter_subspace, projector, recombine, clock)
        kept = untranspose_tuples(state.projector, updates)
        old = _momentum(state.inner, on(functools.partial(_low_shape, projector), updates, specs))
        spaces, low, kept = on(enter, updates, specs, kept, state.recombine, old, outputs=3)

        if params is not None:
            params = on(_projected, updates, specs, spaces, params)

        with _as_projections(projector, specs):
            inner_state, carried = _refresh(inner, carry, clock, state.inner, low, spaces)
            momentum = _momentum(inner_state, low)
            low_updates, inner_state = inner.update(low, inner_state, params, **extra)

        leave = functools.partial(leave_subspace, recombine, carried)
        ends = (updates, spaces, low_updates, old, momentum, state.recombine)
        updates, rule = on(leave, *ends, outputs=2)
        kept = transpose_tuples(kept, updates, projector.keeps)
        count = optax.safe_increment(state.count)
        return updates, InSubspaceState(count, kept, inner_state, rule)

    def update(updates: Any, state: InSubspaceState, params: Any = None, **extra: Any) -> Any:
        extra = without_loss(extra, OF_PARAMETERS)
        on_specs = functools.partial(step, find_specs(updates))
        return on_auto_axes(on_specs, (updates, state, params, extra), like=(updates, state))

    return optax.GradientTransformationExtraArgs(init, update)


def matrix_spec(layout: Layout, array: Any) -> MatrixSpec | None:
    """The spec of a parameter's or gradient's matrices; None if it is not a matrix."""
    if not layout.is_matrix:
        return None
    shape = layout.shape(array)
    return MatrixSpec(
        layout.name, shape, statistics_dtype(array), array.dtype, _split(layout, array)
    )


def _split(layout: Layout, array: Any) -> jax.P | None:
    """The mesh axes that split the matrices; None unless all axes of the mesh are Explicit."""
    mesh = jax.typeof(array).sharding.mesh
    if mesh.empty or set(mesh.axis_types) != {AxisType.Explicit}:
        return None
    spec = (*spec_of(array), *(None,) * array.ndim)[: array.ndim]
    if any(spec[axis] for side in (layout.rows, layout.cols) for axis in side[1:]):
        return None  # rows or columns of several axes, split in the middle
    return jax.P(*(spec[axis] for axis in (*layout.stack, layout.rows[0], layout.cols[0])))


def _start(
    projector: Projector, recombine: Recombine, layout: Layout, p: Any, spec: MatrixSpec | None
) -> tuple[Any, Any, tuple[Array, ...]]:
    """Initial arrays: a projected gradient of zeros, and those the two rules keep."""
    low = projected_zeros(projector, p, spec)
    if spec is None:
        return low, NOTHING, ()
    rule, kept = recombine.init(spec), projector.init(spec)
    return low, *jax.tree.map(functools.partial(varying_as, p), (rule, kept))


def projected_zeros(projector: Projector, p: Any, spec: MatrixSpec | None) -> Array:
    """Zeros in the shape of the projected gradient, or of the parameter if it is not a matrix."""
    if spec is None:
        return float32_zeros(p)
    return varying_as(p, jnp.zeros(projector.projected_shape(spec), spec.dtype))


def _low_shape(
    projector: Projector, layout: Layout, g: Array, spec: MatrixSpec | None
) -> jax.ShapeDtypeStruct:
    shape = g.shape if spec is None else projector.projected_shape(spec)
    return jax.ShapeDtypeStruct(shape, statistics_dtype(g))


def _projected(
    layout: Layout, g: Array, spec: MatrixSpec | None, space: Subspace | None, p: Array
) -> Array:
    """A parameter in its gradient's subspace."""
    if spec is None or space is None:
        return to_float32(p)
    return space.projector.down(spec, space.basis, layout.to_matrices(to_float32(p)))


def enter_subspace(
    projector: Projector,
    recombine: Recombine,
    clock: RefreshClock,
    layout: Layout,
    gradient: Array,
    spec: MatrixSpec | None,
    kept: tuple[Array, ...],
    rule: Any,
    momentum: Array | None,
) -> tuple[Subspace | None, Array, tuple[Array, ...]]:
    """Projects a gradient.

    Args:
        projector: gives the basis.
        recombine: may correct the gradient first, and may need its squares.
        clock: the clock of this step.
        layout: the axes of the gradient.
        gradient: an array of the parameter's shape.
        spec: the spec of its matrices; None if it is not a matrix and not projected.
        kept: the projector's arrays.
        rule: the recombination's array.
        momentum: the inner optimizer's first moment in the previous step's subspace, or None.

    Returns:
        The subspace, the projected gradient in float32, and the projector's new arrays. Entries
        that are too large to be squared are bounded, see `memopt.state.precision.bounded`.
    """
    if spec is None:
        return None, bounded(gradient), ()
    g = recombine.correct(layout.to_matrices(to_float32(gradient)), rule)
    basis, new = projector.basis_at(spec, kept, g, clock, momentum)
    squares = None
    if recombine.needs_squares:
        low, squares = projector.down_and_squares(spec, basis, g)
        squares = bounded_squares(squares, spec.shape[-2 if projector.is_left(spec) else -1])
    else:
        low = projector.down(spec, basis, g)
    low = bounded(low)
    previous = lambda: projector.previous_basis(spec, kept, g, clock)
    return Subspace(projector, spec, bounded(g), basis, low, squares, previous), low, new


def leave_subspace(
    recombine: Recombine,
    carried: Array,
    layout: Layout,
    gradient: Array,
    space: Subspace | None,
    low_update: Array,
    old_momentum: Array | None,
    momentum: Array | None,
    rule: Any,
) -> tuple[Array, Any]:
    """Recombines the inner optimizer's update with the gradient.

    Args:
        recombine: the rule.
        carried: whether moments were carried to a new subspace at this step.
        layout: the axes of the gradient.
        gradient: an array of the parameter's shape.
        space: the gradient's subspace; None if it is not projected.
        low_update: the inner optimizer's update.
        old_momentum: the inner optimizer's first moment before this step, or None.
        momentum: the first moment after the refresh, if there was one.
        rule: the recombination's array.

    Returns:
        The update, in the gradient's shape and dtype, and the recombination's new array.
    """
    if space is None:
        return low_update.astype(gradient.dtype), NOTHING
    space = dataclasses.replace(
        space,
        low_update=low_update,
        old_momentum=old_momentum,
        momentum=momentum,
        is_carried=carried,
    )
    u, rule = recombine.update(space, rule)
    return layout.from_matrices(u, gradient).astype(gradient.dtype), rule


def _refresh(
    inner: optax.GradientTransformation,
    on_refresh: str | CarryOver,
    clock: RefreshClock,
    state: Any,
    low: Any,
    spaces: Any,
) -> tuple[Any, Array]:
    """Applies `on_refresh` to the inner state if this step refreshes.

    Returns:
        The new inner state, and whether its moments were carried over.
    """
    never = jnp.zeros((), bool)
    if isinstance(on_refresh, CarryOver):
        now = clock.refresh_now & (clock.step > 0)
        over = lambda: on_refresh(state, low, spaces, clock.step)
        return jax.lax.cond(now, over, lambda: state), now
    if on_refresh == "keep":
        return state, never
    fresh = _reset(inner.init(low), state, counts_too=on_refresh == "reset")
    choose = functools.partial(jnp.where, clock.refresh_now)
    return jax.tree.map(choose, fresh, state), never


def _as_projections(projector: Projector, specs: Any) -> contextlib.AbstractContextManager[None]:
    """A context in which projected gradients are read as stacks of matrices."""
    is_spec = lambda x: isinstance(x, MatrixSpec)
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    return as_stacks_of_matrices([(spec, projector.projected_shape(spec)) for spec in leaves])


def as_stacks_of_matrices(
    projections: Sequence[tuple[MatrixSpec, tuple[int, ...]]],
) -> contextlib.AbstractContextManager[None]:
    """A context in which arrays are read as the matrices that they are projections of.

    Args:
        projections: the spec of the gradient of each, and its shape.
    """

    def parameter(spec: MatrixSpec, shape: tuple[int, ...]) -> Parameter:
        kind, matrix = (MATRIX, Matrix()) if len(shape) > 1 else (VECTOR, None)
        return Parameter(spec.name, shape, spec.dtype, kind, matrix, "it is a projection")

    return known(list(itertools.starmap(parameter, projections)))


OF_PARAMETERS = "is a function of the parameters and not of their projections"


def without_loss(extra: dict[str, Any], why: str) -> dict[str, Any]:
    """Returns extra arguments with a loss that an inner optimizer cannot evaluate, and why."""

    def refuse(_: Any) -> Any:
        raise IncompatiblePairingError(f"inner must not evaluate the loss (obj_fn), which {why}.")

    return extra | {"obj_fn": refuse} if "obj_fn" in extra else extra


def _momentum(inner_state: Any, like: Any) -> Any:
    """The inner optimizer's first moment, or a tree of None."""
    moment = first_moment(inner_state, like)
    return jax.tree.map(lambda _: None, like) if moment is None else moment


def _reset(fresh: Any, state: Any, *, counts_too: bool) -> Any:
    """Returns the fresh state, with the step counts of `state` unless they are reset too."""
    if counts_too:
        return fresh
    is_count = lambda x: x.shape == () and jnp.issubdtype(x.dtype, jnp.integer)
    return jax.tree.map(lambda new, old: old if is_count(old) else new, fresh, state)


def _check_pairing(projector: Projector, recombine: Recombine, on_refresh: str | CarryOver) -> None:
    recombine.check(projector)
    name = type(projector).__name__
    if not projector.per_matrix and on_refresh == "keep":
        raise IncompatiblePairingError(
            f"on_refresh='keep' would hand the moments of one layer to the next that a {name} "
            "projector selects. Use 'reset', 'reset_moments' or 'carry'."
        )
    if projector.moves and on_refresh != "keep":
        raise IncompatiblePairingError(
            f"on_refresh must be 'keep', got {on_refresh!r}: a {name} projector updates its basis "
            "at every step and has no refreshes after the first."
        )


def _check_can_be_carried(inner_state: Any, low: Any, projector: Projector) -> None:
    is_quantized = lambda x: isinstance(x, QuantizedState)
    if any(map(is_quantized, jax.tree.leaves(inner_state, is_leaf=is_quantized))):
        raise IncompatiblePairingError(
            "on_refresh='carry' cannot carry moments that the inner optimizer stores quantised. "
            "Use memopt.quantize_state(in_subspace(...)), or 'keep', 'reset' or 'reset_moments'."
        )
    check_moments_are_known(
        inner_state,
        low,
        needed_by="on_refresh='carry'",
        otherwise=", or use 'keep', 'reset' or 'reset_moments'",
        per_matrix=projector.per_matrix,
    )


def check_keeps_no_values(init: Callable[[Any], Any], params: Any) -> None:
    """Raises `IncompatiblePairingError` if a state depends on the values of parameters.

    Their projections are not known before the first gradient, and differ after a refresh.

    Args:
        init: the inner optimizer's.
        params: projected parameters.
    """
    if any(trace(init, params).needed().reads):
        raise IncompatiblePairingError(
            "inner must not keep values of its parameters in its state, since a refresh changes "
            f"them, got {getattr(init, '__qualname__', str(init)).partition('.')[0]}."
        )


def partition_by_phase(
    phases: Sequence[int], matrices: Matrices, make: Callable[[int], optax.GradientTransformation]
) -> optax.GradientTransformationExtraArgs:
    """Partitions the tree by phase; the same matrix of all layers has the same phase."""
    if not phases:
        raise ValueError("refresh_phase must be a number or a sequence of at least one, got none.")

    def labels(tree: Any) -> Any:
        groups: dict[str, int] = {}

        def label(layout: Layout, array: Any) -> int:
            spec = matrix_spec(layout, array)
            return 0 if spec is None else groups.setdefault(spec.group, len(groups)) % len(phases)

        return map_matrices(label, tree, matrices=matrices)

    parts = {i: make(phase) for i, phase in enumerate(phases)}
    return reading_whole_trees(optax.partition(parts, labels))
