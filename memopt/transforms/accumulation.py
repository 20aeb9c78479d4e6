"""Gradient accumulation over micro-steps, at full size or in a subspace."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from memopt.axis_types import on_auto_axes
from memopt.checked import checked
from memopt.errors import IncompatiblePairingError, check_at_least, check_choice
from memopt.matrices import Layout, Matrices, map_matrices
from memopt.renamed import keywords
from memopt.state.precision import float32_zeros, to_float32, zeros_of
from memopt.transforms.projectors import Projector, RefreshClock, by_name
from memopt.transforms.projectors.random import RandomProjector
from memopt.transforms.projectors.replay import Replay
from memopt.transforms.subspace import matrix_spec, projected_zeros, without_loss

EveryK = int | Callable[[Array], Array]


class AccumulateState(NamedTuple):
    """State of `accumulate` and `accumulate_in_subspace`.

    Attributes:
        micro_step: micro-steps taken, int32.
        sum: the sum of the cycle's gradients, or of their projections.
        inner: the inner optimizer's state.
    """

    micro_step: Array
    sum: Any
    inner: Any


class AccumulateByScheduleState(NamedTuple):
    """State of the same where `every_k_schedule` is a function.

    Attributes:
        micro_step: micro-steps of this cycle taken, int32.
        sum: as in `AccumulateState`.
        inner: as in `AccumulateState`.
        cycle: cycles finished, int32.
    """

    micro_step: Array
    sum: Any
    inner: Any
    cycle: Array


@keywords(every="every_k_schedule")
@checked
def accumulate(
    inner: optax.GradientTransformation, every_k_schedule: EveryK
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer once every k micro-steps, on the mean of their gradients.

    It replaces ``optax.MultiSteps``, which computes the inner update at every micro-step and
    discards it; here the inner update is one branch of a ``lax.cond`` whose other branch does
    nothing. Between updates of `inner`, zeros are returned.

    `inner` receives the mean, rounded once to the gradients' dtype, as from one large batch. A
    micro-gradient that is not finite makes the mean of its cycle not finite; wrap this in
    ``optax.apply_if_finite`` to skip such micro-steps without counting them. State: one float32
    number per parameter, and the state of `inner`.

    Args:
        inner: any Optax transformation.
        every_k_schedule: k, the micro-steps in a cycle; or a function that maps the number of
            finished cycles to k, which must be at least one.

    Returns:
        A transformation whose state is an `AccumulateState` or `AccumulateByScheduleState`.

    Raises:
        ValueError: if k is a number below one.

    Example:
        >>> tx = accumulate(optax.sgd(1.0), every_k_schedule=2)
        >>> state = tx.init(jnp.zeros(1))
        >>> for g in [1.0, 3.0, 5.0, 5.0]:
        ...     u, state = tx.update(jnp.array([g]), state)
        ...     print(float(u[0]))
        0.0
        -2.0
        0.0
        -5.0
    """
    down = lambda layout, g, cycle: to_float32(g)
    up = lambda layout, mean, g, cycle: mean
    start = lambda _, p: float32_zeros(p)
    return _accumulate(inner, every_k_schedule, start, down, up)


@keywords(every="every_k_schedule")
@checked
def accumulate_in_subspace(
    inner: optax.GradientTransformation,
    every_k_schedule: EveryK,
    rank: int | float = 0.25,
    *,
    projector: Projector | str = "gaussian",
    seed: int | Array = 0,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Accumulates the gradients of hidden matrices in random subspaces (Flora).

    For each matrix, over a cycle of k micro-steps::

        C ← C + PᵀG  or  C + G P        r·q numbers, q the longer side, in place of m·n
        G ≈ P C / k  or  C Pᵀ / k

    and `inner` runs on that unbiased estimate of the mean: E[P Pᵀ] = identity. P is drawn from
    (seed, parameter, cycle) when it is needed and never stored. Leaves that are not hidden
    matrices are summed exactly; everything else is as in `accumulate`. State: r·q float32 numbers
    per matrix, and the state of `inner`.

    Args:
        inner: any Optax transformation; it receives full-size gradients.
        every_k_schedule: k, as in `accumulate`.
        rank: r, or a fraction of each matrix's shorter side.
        projector: "gaussian", "rademacher" or "sparse"; or a random projector, which has its own
            rank and seed (an orthogonal one is biased, unless its rank is the whole side); or a
            replay, whose steps are cycles.
        seed: the seed of the projections.
        matrices: which leaves are projected, and which axes are their rows and columns; by
            default the hidden matrices, see `memopt.hidden_matrices`.

    Returns:
        A transformation whose state is an `AccumulateState` or `AccumulateByScheduleState`.

    Raises:
        ValueError: if k or `rank` is below one, a rank does not fit its matrix, the projector is of
            another kind, or rank or seed is given together with a projector that has its own.

    References:
        Hao et al., Flora, 2024, https://arxiv.org/abs/2402.03293, Algorithm 1.

    Example:
        >>> tx = accumulate_in_subspace(optax.sgd(1.0), 8, rank=2)
        >>> state = tx.init({"w": jnp.zeros((3, 16, 8)), "norm": jnp.zeros(8)})
        >>> state.sum["w"].shape, state.sum["norm"].shape
        ((3, 16, 2), (8,))
    """
    if isinstance(projector, str):
        check_choice("projector", projector, ("gaussian", "rademacher", "sparse"))
    space = by_name(projector, accumulate_in_subspace, rank=rank, seed=seed)
    if not isinstance(space, RandomProjector | Replay):
        raise ValueError(f"projector must be a random one or a replay, got {space}.")
    unseen: Any = None  # bases must not depend on the gradients of the cycle

    def start(layout: Layout, p: Any) -> Array:
        return projected_zeros(space, p, matrix_spec(layout, p))

    def down(layout: Layout, g: Array, cycle: RefreshClock) -> Array:
        spec = matrix_spec(layout, g)
        if spec is None:
            return to_float32(g)
        basis = space.basis(spec, unseen, cycle)
        return space.down(spec, basis, layout.to_matrices(to_float32(g)))

    def up(layout: Layout, mean: Array, g: Array, cycle: RefreshClock) -> Array:
        spec = matrix_spec(layout, g)
        if spec is None:
            return mean
        return layout.from_matrices(space.up(spec, space.basis(spec, unseen, cycle), mean), g)

    return _accumulate(inner, every_k_schedule, start, down, up, matrices)


def _accumulate(
    inner: optax.GradientTransformation,
    every_k_schedule: EveryK,
    start: Callable[[Layout, Any], Array],
    down: Callable[[Layout, Array, RefreshClock], Array],
    up: Callable[[Layout, Array, Array, RefreshClock], Array],
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds ``down(g)`` to ``start(p)`` over a cycle, then runs `inner` on ``up`` of the mean."""
    is_whole = jnp.issubdtype(
        getattr(every_k_schedule, "dtype", type(every_k_schedule)), np.integer
    )
    if not callable(every_k_schedule) and not is_whole:
        raise ValueError(
            f"every_k_schedule must be a whole number or a function, got {every_k_schedule!r}."
        )
    check_at_least("every_k_schedule", every_k_schedule, 1)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> AccumulateState | AccumulateByScheduleState:
        total, zero = map_matrices(start, params, matrices=matrices), jnp.zeros((), jnp.int32)
        if callable(every_k_schedule):
            return AccumulateByScheduleState(zero, total, inner.init(params), zero)
        return AccumulateState(zero, total, inner.init(params))

    def step(updates: Any, state: Any, params: Any, extra: Any) -> Any:
        k: Any = every_k_schedule
        if callable(every_k_schedule):
            cycle, step = state.cycle, state.micro_step
            k = jnp.asarray(every_k_schedule(cycle)).astype(jnp.int32)
        else:
            cycle, step = jnp.divmod(state.micro_step, jnp.int32(k))
        begins, ends = step == 0, step + 1 >= k
        clock = RefreshClock.at(cycle, 1)

        def add(layout: Layout, g: Array, total: Array) -> Array:
            g = down(layout, g, clock)
            return jnp.where(begins, g, total + g)

        total = map_matrices(add, updates, state.sum, matrices=matrices)

        def end() -> tuple[Any, Any]:
            lift = lambda layout, g, total: up(layout, total / k, g, clock).astype(g.dtype)
            mean = map_matrices(lift, updates, total, matrices=matrices)
            return inner.update(mean, state.inner, params, **extra)

        # Zeros with the dtypes that `inner` returns, which may differ from the gradients'.
        wait = lambda: (zeros_of(lambda: end()[0]), state.inner)
        updates, inner_state = jax.lax.cond(ends, end, wait)
        if callable(every_k_schedule):
            step, cycle = jnp.where(ends, 0, step + 1), jnp.where(ends, cycle + 1, cycle)
            return updates, AccumulateByScheduleState(step, total, inner_state, cycle)
        count = optax.safe_increment(state.micro_step)
        return updates, AccumulateState(count, total, inner_state)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if extra.get("statistics") is not None:
            raise IncompatiblePairingError(
                "statistics are of the last micro-batch only: accumulate gradients and statistics "
                "inside the training step, with train_step(accumulation=…)."
            )
        extra = without_loss(extra, "is that of the last micro-batch only")
        return on_auto_axes(step, (updates, state, params, extra), like=(updates, state))

    return optax.GradientTransformationExtraArgs(init, update)
