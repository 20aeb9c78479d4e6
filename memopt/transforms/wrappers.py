"""Wrappers of whole optimizers: cautious updates, cautious weight decay, fixed norms."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from memopt.axis_types import on_auto_axes
from memopt.checked import checked
from memopt.errors import IncompatiblePairingError, check_between
from memopt.internals import is_traced
from memopt.matrices import Layout, Matrices, every_matrix, hidden_matrices, map_matrices
from memopt.reductions import total
from memopt.state.precision import bounded, check_real, statistics_dtype, to_float32
from memopt.transforms.accumulation import AccumulateByScheduleState, AccumulateState
from memopt.transforms.block_cycle import CycleBlocksState
from memopt.transforms.decay import as_schedule, decay_as_released, shrinking_weights
from memopt.transforms.norm_growth import matrix_norm
from memopt.transforms.per_matrix import per_matrix
from memopt.transforms.skip_nonfinite import SkipNonfiniteMatricesState, SkipNonfiniteState
from memopt.trees import NOTHING


class CautiousState(NamedTuple):
    """State of `cautious`.

    Attributes:
        inner: the optimizer's state.
    """

    inner: Any


class CautiousDecayState(NamedTuple):
    """State of the decay that `cautious_decay` appends.

    Attributes:
        count: steps taken, int32.
    """

    count: Array  # type: ignore[assignment]


class HyperballState(NamedTuple):
    """State of the step that `hyperball` appends.

    Attributes:
        count: steps taken, int32.
        radius: the norm of each matrix before its first step, float32, in the shape of the stack; 0
            before that step.
    """

    count: Array  # type: ignore[assignment]
    radius: Any


@checked
def cautious(
    tx: optax.GradientTransformation, min_kept: float = 1e-3, *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Takes an optimizer's step only where it goes down the gradient.

    For each matrix of a stack, and each vector, with the gradient G and the update U of `tx`, which
    is added to the parameters::

        K = 1 where U · G < 0, else 0
        U ← U · K / max(mean(K), min_kept)

    A momentum may point up the present gradient; such entries wait, and the others grow in their
    place. A decay inside `tx` is part of U; to keep it out, apply it outside, as `cautious_decay`
    does. State: that of `tx`.

    Args:
        tx: a whole optimizer, its learning rate included: its updates must point down. It may be
            wrapped in `cautious_decay` or `hyperball` afterwards, not before.
        min_kept: the least share of kept entries to divide by.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. By default `memopt.matrices.every_matrix`.

    Returns:
        A transformation whose state is a `CautiousState`.

    Raises:
        ValueError: if `min_kept` is not between 0 and 1.
        IncompatiblePairingError: by `init`, if `tx` is wrapped in one of these wrappers, or
            accumulates or skips gradients: that belongs outside.

    References:
        Liang et al., Cautious Optimizers, 2024, https://arxiv.org/abs/2411.16085, Algorithm 1. The
        paper divides by Σ K + 1, the authors' code by the mean, as here.

    Example:
        >>> tx = cautious(optax.sgd(0.1, momentum=0.9))
        >>> state = tx.init(jnp.ones(2))
        >>> for g in ([1.0, 1.0], [-0.1, 1.0]):                # momentum: [0.8, 1.9]
        ...     u, state = tx.update(jnp.array(g), state)
        >>> [round(float(x), 3) + 0.0 for x in u]
        [0.0, -0.38]
    """
    check_between("min_kept", min_kept, 0, 1)
    rule = functools.partial(keep_descent, min_kept=min_kept)
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> CautiousState:
        check_real(params)
        state = tx.init(params)
        _check_order("cautious", state)
        return CautiousState(state)

    def step(gradients: Any, state: Any, params: Any, extra: Any) -> Any:
        updates, inner = tx.update(gradients, state.inner, params, **extra)
        updates = map_matrices(rule, updates, gradients, matrices=matrices, default=every_matrix)
        return updates, CautiousState(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return on_auto_axes(step, (updates, state, params, extra), like=(updates, state))

    return optax.GradientTransformationExtraArgs(init, update)


def keep_descent(layout: Layout, u: Array, g: Array, *, min_kept: float) -> Array:
    """Computes the update of `cautious`."""
    descends = jnp.signbit(u) != jnp.signbit(g)
    kept = (descends & (u != 0) & (g != 0)).astype(statistics_dtype(u))
    size = max(1, math.prod(u.shape[a] for a in layout.core))
    share = jnp.expand_dims(total(kept, layout.core) / size, layout.core)
    return (to_float32(u) * kept / jnp.maximum(share, min_kept)).astype(u.dtype)


@checked
def cautious_decay(
    tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Decays weights only where the optimizer's step does not make them larger.

    With the update U of `tx`, which is added to the parameters::

        U ← U − learning_rate · weight_decay · W · (1 where U · W ≤ 0, else 0)

    The decay opposes no step of `tx`, so that it chooses among minima of the loss rather than
    shifts them. Entries that `tx` leaves as they are decay. State: that of `tx`, and the step
    count.

    Args:
        tx: a whole optimizer without weight decay, its learning rate included: its updates must
            point down. It may be `cautious`; wrap it in `hyperball` afterwards, not before.
        learning_rate: a number or a schedule; usually that of `tx`.
        weight_decay: the strength of the decay.
        mask: which leaves decay, as in ``optax.add_decayed_weights``.

    Returns:
        A transformation whose state is that of `tx`, then a `CautiousDecayState`.

    Raises:
        IncompatiblePairingError: by `init`, if `tx` is in `cautious_decay` or `hyperball` already,
            or accumulates or skips gradients, or updates layers in turns: that belongs outside.

    References:
        Chen et al., Cautious Weight Decay, 2025, https://arxiv.org/abs/2510.12402, Algorithm 1.

    Example:
        >>> tx = cautious_decay(optax.sgd(0.1), 0.1, weight_decay=0.5)
        >>> w, g = jnp.array([2.0, 2.0]), jnp.array([1.0, -1.0])
        >>> [round(float(x), 3) for x in tx.update(g, tx.init(w), w)[0]]
        [-0.2, 0.1]
    """
    decay = decay_as_released(
        shrinking_weights, learning_rate, weight_decay, mask, state_type=CautiousDecayState
    )
    return _append("cautious_decay", tx, decay)


@checked
def hyperball(
    tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the norm of each hidden matrix, and fixes the length of its steps relative to it.

    For each hidden matrix W of a stack, with R = ‖W‖ before its first step, the update U of `tx`,
    which is added to the parameters, and η = learning_rate::

        Y = W + η R U / ‖U‖
        W ← R Y / ‖Y‖

    Only the direction of U matters: its learning rate and scale do not. Other parameters,
    embeddings and norms among them, take the step of `tx`. Weight decay has no effect on the norms
    of matrices here. To replace a run with decay λ, start with η = √(lr · λ). State: that of `tx`,
    one number per matrix, and the step count.

    A matrix of zeros has no norm to keep, so that it could never move: `init` refuses it; where its
    values are not known, under ``jax.jit``, its first step is NaN.

    Args:
        tx: a whole optimizer, its learning rate included: its updates must point down. It may be in
            `cautious` or `cautious_decay`.
        learning_rate: η, a number or a schedule: the length of a step relative to the matrix.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. By default `memopt.hidden_matrices`.

    Returns:
        A transformation whose state is that of `tx`, then a `HyperballState`.

    Raises:
        ValueError: by `init`, if a matrix is zero; by `update`, if `params` are not given.
        IncompatiblePairingError: by `init`, if `tx` is in `hyperball` already, or accumulates or
            skips gradients: that belongs outside.

    References:
        Hyperball optimization, 2026, https://arxiv.org/abs/2606.16899; R is kept as in the code of
        NVIDIA's Emerging-Optimizers and of HeavyBall.

    Example:
        >>> tx = hyperball(optax.sgd(1.0), 0.1)
        >>> params = {"up": {"kernel": 3.0 * jnp.eye(2)}}
        >>> updates, _ = tx.update({"up": {"kernel": jnp.ones((2, 2))}}, tx.init(params), params)
        >>> after = optax.apply_updates(params, updates)["up"]["kernel"]
        >>> print(round(float(jnp.square(after).sum()), 3))                 # 2·3²
        18.0
    """

    def radius(layout: Layout, w: Any) -> Any:
        return matrix_norm(layout, w) if layout.is_matrix else NOTHING

    step = per_matrix(
        step_on_sphere,
        HyperballState,
        radius,
        schedules={"rate": as_schedule(learning_rate)},
        reads_params=True,
        matrices=matrices,
        default=hidden_matrices,
    )
    wrapped = _append("hyperball", tx, step)

    def init(params: Any) -> Any:
        state = wrapped.init(params)
        map_matrices(_check_not_zero, params, matrices=matrices)
        return state

    return optax.GradientTransformationExtraArgs(init, wrapped.update)


def step_on_sphere(
    layout: Layout, u: Array, radius: Array, w: Array, *, rate: Any
) -> tuple[Array, Array]:
    """Computes the update of `hyperball`, and the norm that it keeps."""
    if not layout.is_matrix:
        return u, radius
    norm = lambda x: jnp.expand_dims(matrix_norm(layout, x), layout.core)
    radius = jnp.where(radius > 0, radius, matrix_norm(layout, w))
    r, before, length = jnp.expand_dims(radius, layout.core), to_float32(w), norm(u)
    after = before + rate * r / jnp.where(length > 0, length, 1) * bounded(u)
    # A matrix of zeros without a gradient, such as an unused expert, stays; 0/0 would be NaN.
    moves = (length > 0) | (norm(after) > 0)
    after = after * jnp.where(moves, r / norm(after), 1)
    return (after - before).astype(u.dtype), radius


def _check_not_zero(layout: Layout, w: Any) -> None:
    """Raises if a matrix whose values are known is zero."""
    known = isinstance(w, jax.Array | np.ndarray) and not is_traced(w)
    if layout.is_matrix and known and not jnp.all(matrix_norm(layout, w)):
        raise ValueError(
            f"params[{layout.name!r}] has a matrix of zeros, which memopt.hyperball cannot move: "
            "start it from other values, or leave it out by matrices=."
        )


ORDER: dict[str, type] = {
    "cautious": CautiousState,
    "cautious_decay": CautiousDecayState,
    "hyperball": HyperballState,
}
"""The wrappers by name, from the inside out, with the state that each adds."""

SKIPPING: dict[type, str] = {
    optax.MultiStepsState: "optax.MultiSteps",
    optax.ApplyIfFiniteState: "optax.apply_if_finite",
    AccumulateState: "memopt.accumulate",
    AccumulateByScheduleState: "memopt.accumulate",
    SkipNonfiniteState: "memopt.skip_nonfinite",
    SkipNonfiniteMatricesState: "memopt.skip_nonfinite",
}
"""States of optimizers that do not step for every gradient.

Around them, weights would decay and steps would be counted at other gradients, too, and an update
would be compared with the last gradient instead of their mean.
"""


OF_OWN_POINTS: dict[str, str] = {"ScheduleFreeState": "optax.contrib.schedule_free"}
"""States of optimizers that compute their updates from points which they keep, by class.

They would undo what is changed of their updates. Names, without the slow import of
``optax.contrib``.
"""


def _check_order(wrapper: str, state: Any) -> None:
    """Raises if an optimizer's state shows a wrapper that belongs outside this one, or is it."""
    names = list(ORDER)
    outer = {ORDER[name]: f"memopt.{name}" for name in names[names.index(wrapper) :]} | SKIPPING
    own_points = lambda x: type(x).__name__ in OF_OWN_POINTS
    by_turns = lambda x: wrapper == "cautious_decay" and isinstance(x, CycleBlocksState)
    is_found = lambda x: type(x) in outer or own_points(x) or by_turns(x)
    for node in jax.tree.leaves(state, is_leaf=is_found):
        if by_turns(node):
            raise IncompatiblePairingError(
                "tx must not be in memopt.cycle_blocks before it is in memopt.cautious_decay: "
                "layers without a turn would decay; wrap memopt.cautious_decay in "
                "memopt.cycle_blocks."
            )
        if own_points(node):
            inner = OF_OWN_POINTS[type(node).__name__]
            raise IncompatiblePairingError(
                f"tx must not be in {inner} before it is in memopt.{wrapper}: its next points do "
                f"not depend on what that changes; wrap memopt.{wrapper} in {inner}."
            )
        if type(node) in outer:
            why = (
                "that does not step for every gradient, and belongs outside"
                if type(node) in SKIPPING
                else f"each wraps an optimizer once, in the order {', '.join(names)}"
            )
            raise IncompatiblePairingError(
                f"tx must not be in {outer[type(node)]} before it is in memopt.{wrapper}: {why}."
            )


def _append(
    wrapper: str, tx: optax.GradientTransformation, step: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Appends a step to an optimizer that is not in an outer wrapper."""
    chain = optax.chain(tx, step)

    def init(params: Any) -> Any:
        state = chain.init(params)
        _check_order(wrapper, state[0])
        return state

    return optax.GradientTransformationExtraArgs(init, chain.update)
