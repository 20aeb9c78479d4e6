"""Second moments of several tasks, mixed by how alike their gradients are (TAG)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.axis_types import on_auto_axes
from memopt.checked import checked
from memopt.errors import check_at_least, check_given, check_static
from memopt.matrices import Layout, Matrices, every_matrix, map_matrices
from memopt.reductions import total
from memopt.shapes import Stack
from memopt.state.precision import (
    average,
    bias_correction,
    bounded,
    check_real,
    statistics_dtype,
    zeros_of,
)
from memopt.transforms.linalg import product
from memopt.transforms.projectors.base import MatrixSpec
from memopt.transforms.projectors.random import Rademacher
from memopt.trees import NOTHING


class ScaleByTaskMomentsState(NamedTuple):
    """State of `scale_by_task_moments`. The first axis of every array counts tasks.

    Attributes:
        count: steps taken on each task, int32.
        mu_rows: of a factored matrix, the first moment of its sums over columns with random signs;
            else ``MaskedNode``.
        mu: of a factored matrix, that of its sums over rows; else the first moment.
        rows: of a factored matrix, the mean square over its columns; else ``MaskedNode``.
        cols: of a factored matrix, that over its rows; else the second moment.
    """

    count: Array  # type: ignore[assignment]
    mu_rows: Any
    mu: Any
    rows: Any
    cols: Any


@checked
def scale_by_task_moments(
    tasks: int = 1,
    similarity: float = 5.0,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    *,
    adam: bool = False,
    factored: bool = False,
    seed: int | Array = 0,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the root of the tasks' second moments, mixed by similarity.

    The update of a step on task t needs its number: ``update(updates, state, params, task=t)``. For
    each matrix, with moments M_τ and V_τ of its own for every task::

        M_t ← β₁ M_t + (1 − β₁) G
        V_t ← β₂ V_t + (1 − β₂) G²
        α_t = exp(−b)                              1 if no other task has been trained on
        α_τ = exp(−b · cos(M_t, M_τ))              other tasks τ
        U = G / (√(Σ_τ α_τ V_τ) + ε)

    The moments of other tasks do not change. A task whose gradients point away from those of
    another one takes small steps where the other had large gradients. A cosine with a zero vector
    is 0. State: 2T·mn numbers per matrix, in float32 or wider.

    Factored, V_τ ≈ R_τ C_τ / mean(R_τ) as in Adafactor, from mean squares over columns and rows,
    and cosines are estimated from the sums of M_τ over columns and over rows with random signs,
    which are drawn from the seed at each step. Their error is about √(2/min(m, n)) for matrices
    without outstanding rows and columns. State: 2T·(m + n) numbers per matrix.

    Args:
        tasks: the number of tasks, T. With one, `task` may be left out.
        similarity: b.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        adam: update with the first moment, and correct the bias of both by the steps k on this
            task: U = (M_t / (1 − β₁ᵏ)) / (√(Σ_τ α_τ V_τ / (1 − β₂ᵏ)) + ε).
        factored: keep 2T·(m + n) numbers; not with `adam`, which needs M_t. Vectors, and leaves
            that `matrices` excludes, are kept as they are.
        seed: the seed of the random signs.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`.

    Returns:
        A transformation whose state is a `ScaleByTaskMomentsState`. A task is a number from 0 to
        T − 1, in any order. A traced one beyond makes the updates NaN.

    Raises:
        ValueError: if `tasks` is below 1 or `adam` is `factored`; at an update, if the task is
            missing or is not one of them.

    References:
        Malviya et al., TAG: Task-based Accumulated Gradients for Lifelong learning, 2021,
        https://arxiv.org/abs/2105.05155.

    Example:
        >>> tx = scale_by_task_moments(2, b2=0.0, eps=0.0)
        >>> g = jnp.array([1.0, 2.0])
        >>> first, state = tx.update(g, tx.init(g), task=0)
        >>> second, state = tx.update(-g, state, task=1)
        >>> print(first / second)                           # cos = −1: √(e⁵ + e⁻⁵) times smaller
        [-12.182768 -12.182768]
    """
    check_static("tasks", tasks)
    check_at_least("tasks", tasks, 1)
    if adam and factored:
        raise ValueError(
            "factored must be False with adam=True, whose updates are first moments of full size."
        )
    is_factored = lambda layout: factored and layout.is_matrix
    maps = functools.partial(map_matrices, matrices=matrices, default=every_matrix)

    def moments(layout: Layout, g: Array) -> tuple[Any, Any, Any, Any]:
        """Returns what a gradient adds to each array."""
        if is_factored(layout):
            return _sums_and_mean_squares(layout, g, seed)
        return NOTHING, g, NOTHING, jnp.square(g)

    def init(params: Any) -> ScaleByTaskMomentsState:
        check_real(params)

        def zeros(layout: Layout, p: Array) -> Any:
            for_tasks = lambda x: jnp.broadcast_to(x, (tasks, *x.shape))
            new = lambda p: moments(layout, p.astype(statistics_dtype(p)))
            return zeros_of(lambda p: jax.tree.map(for_tasks, new(p)), p)

        count = jnp.zeros((tasks,), jnp.int32)
        return ScaleByTaskMomentsState(count, *maps(zeros, params, outputs=4))

    def step(updates: Any, state: ScaleByTaskMomentsState, task: Any) -> Any:
        current = jnp.arange(tasks) == task
        count = jnp.where(current, optax.safe_increment(state.count), state.count)

        def rule(layout: Layout, g: Array, *kept: Any) -> tuple[Any, ...]:
            new = moments(layout, bounded(g))
            first = _averaged(b1, current, kept[:2], new[:2])
            second = _averaged(b2, current, kept[2:], new[2:])
            axes = (-1,) if is_factored(layout) else tuple(1 + a for a in layout.core)
            cosines = _cosines(first, current, axes)
            alone = count.sum() == jnp.where(current, count, 0).sum()
            own = jnp.where(alone, 1.0, jnp.exp(-similarity * jnp.ones_like(cosines)))
            weights = jnp.where(_like(current, cosines), own, jnp.exp(-similarity * cosines))
            mixed = _mixed(layout, weights, second, like=g)
            u = bounded(g)
            if adam:
                u = _at(current, first[1])
                k = jnp.where(current, count, 0).sum()
                u /= bias_correction(b1, k, u.dtype)
                mixed /= bias_correction(b2, k, mixed.dtype)
            u = u / (jnp.sqrt(mixed) + eps)
            return (jnp.where(current.any(), u, jnp.nan).astype(g.dtype), *first, *second)

        new, *kept = maps(rule, updates, *state[1:], outputs=5)
        return new, ScaleByTaskMomentsState(count, *kept)

    def update(
        updates: Any, state: ScaleByTaskMomentsState, params: Any = None, **extra: Any
    ) -> Any:
        task = _checked(extra.get("task"), tasks)
        return on_auto_axes(step, (updates, state, task), like=(updates, state))

    return optax.GradientTransformationExtraArgs(init, update)


def _checked(task: Any, tasks: int) -> Any:
    """The number of the current task, unless it is known to be wrong."""
    if tasks > 1:
        check_given("task", task, f"the number of the current one of {tasks} tasks")
    task = 0 if task is None else task
    if jnp.shape(task) or not jnp.issubdtype(jnp.result_type(task), jnp.integer):
        raise ValueError(f"task must be one whole number, got {task}.")
    try:
        known = int(task)
    except jax.errors.ConcretizationTypeError:  # traced
        return task
    if not 0 <= known < tasks:
        raise ValueError(f"task must be between 0 and {tasks - 1}, got {task}.")
    return task


def _sums_and_mean_squares(
    layout: Layout, g: Array, seed: int | Array
) -> tuple[Array, Array, Array, Array]:
    """Sums over columns and over rows with random signs, and mean squares over them."""
    g = layout.to_matrices(g)
    m, n = g.ndim - 2, g.ndim - 1
    spec = MatrixSpec(layout.name, g.shape, g.dtype)
    signs = (
        Rademacher(1)
        .entries(spec.key(seed, jnp.int32(0)), (g.shape[m], g.shape[n]))
        .astype(g.dtype)
    )
    signed, square = g * jnp.broadcast_to(signs, g.shape), jnp.square(g)
    rows, cols = total(square, (n,)) / g.shape[n], total(square, (m,)) / g.shape[m]
    return total(signed, (n,)), total(signed, (m,)), rows, cols


def _like(current: Array, x: Array) -> Array:
    """A bool or number for each task, with the axes of an array that has tasks first."""
    return jnp.expand_dims(current, tuple(range(1, x.ndim)))


def _averaged(decay: Any, current: Array, kept: Any, new: Any) -> Any:
    """The moments after a step on the current task."""

    def one(old: Array, new: Array) -> Array:
        new = jnp.broadcast_to(new, old.shape)
        return jnp.where(_like(current, old), average(decay, old, new), old)

    return jax.tree.map(one, kept, new)


def _at(current: Array, x: Array) -> Array:
    """The array of the current task; zeros if there is none."""
    return jnp.where(_like(current, x), x, 0).sum(0)


def _cosines(moments: Any, current: Array, axes: tuple[int, ...]) -> Array:
    """Cosines of all tasks' first moments with the current one's, (tasks, *stack)."""

    def products(x: Array) -> tuple[Array, Array]:
        own = jnp.broadcast_to(_at(current, x), x.shape)
        summed = tuple(a % x.ndim for a in axes)
        return total(x * own, summed), total(jnp.square(x), summed)

    each = map(products, jax.tree.leaves(moments))
    inner, squares = (sum(parts) for parts in zip(*each, strict=True))
    own = jnp.broadcast_to(_at(current, squares), squares.shape)
    lengths, own = (jnp.where(s > 0, jnp.sqrt(s), jnp.inf) for s in (squares, own))
    return inner / lengths / own


def _mixed(layout: Layout, weights: Array, second: tuple[Any, Any], like: Array) -> Stack:
    """The weighted sum of the tasks' second moments, shaped like a gradient."""
    rows, cols = second
    if isinstance(rows, optax.MaskedNode):
        axes = tuple(a for a in range(1, cols.ndim) if a - 1 not in layout.stack)
        return (jnp.expand_dims(weights, axes) * cols).sum(0)
    mean = rows.mean(-1)
    weights = weights / jnp.where(mean > 0, mean, 1)
    weighted = jnp.expand_dims(weights, -1) * rows
    return layout.from_matrices(product("t...m,t...n->...mn", weighted, cols), like)
