"""Makes transformations that treat each matrix separately from a rule for one parameter."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from memopt.axis_types import on_auto_axes
from memopt.checked import checked
from memopt.matrices import Matrices, Selection, every_matrix, map_matrices
from memopt.state.precision import check_real, zeros_of


@checked
def per_matrix(
    rule: Callable[..., Any],
    state_type: Any = optax.EmptyState,
    like: Callable[..., Any] = lambda layout, param: (),
    *,
    schedules: Mapping[str, optax.Schedule] | None = None,
    reads_params: bool = False,
    matrices: Matrices = None,
    default: Selection = every_matrix,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation from a rule that updates one parameter.

    Args:
        rule: maps ``(layout, update, *arrays)`` to the new update, or, if the state keeps arrays,
            to a tuple of the new update and the new arrays. It must treat each matrix of a stack
            separately and in the same way.
        state_type: the NamedTuple class of the state. A first field ``count`` counts steps, int32;
            each other field is a tree with an array for each parameter. By default no state.
        like: maps ``(layout, parameter)`` to arrays, one for each such field. It is evaluated
            abstractly: the state starts with zeros of these shapes and dtypes.
            ``memopt.trees.NOTHING`` keeps no array.
        schedules: keyword arguments of the rule, as functions of the number of previous steps.
        reads_params: whether the rule also takes the parameter, after the arrays.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`.
        default: the selection without `matrices`, and that which `memopt.out_in` turns.

    Returns:
        A transformation whose state is a `state_type`.

    Raises:
        ValueError: if a parameter is complex, or the rule reads parameters and `update` is called
            without them.

    Example:
        >>> def subtract_mean(layout, u):
        ...     return u - u.mean(layout.core, keepdims=True)
        >>> tx = per_matrix(subtract_mean)
        >>> layers = jnp.array([[[1.0, 3.0]], [[5.0, 9.0]]])
        >>> tx.update(layers, tx.init(layers))[0].tolist()
        [[[-1.0, 1.0]], [[-2.0, 2.0]]]
    """
    counted = state_type._fields[:1] == ("count",)
    if not counted and ("count" in state_type._fields or schedules):
        raise ValueError(
            f"state_type must have count as its first field, got {state_type.__name__} with "
            f"{state_type._fields}."
        )
    kept = len(state_type._fields) - counted

    def map_rule(f: Callable[..., Any], *trees: Any, outputs: int) -> tuple[Any, ...]:
        new = map_matrices(f, *trees, matrices=matrices, default=default, outputs=outputs)
        return new if outputs > 1 else (new,)

    def init(params: Any) -> Any:
        check_real(params)
        zeros = lambda layout, p: zeros_of(lambda p: like(layout, p), p)
        arrays = map_rule(zeros, params, outputs=kept) if kept else ()
        count = (jnp.zeros((), jnp.int32),) if counted else ()
        return state_type(*count, *arrays)

    def step(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        count, arrays = state[:counted], state[counted:]
        scalars = {name: schedule(*count) for name, schedule in (schedules or {}).items()}
        trees = (*arrays, params) if reads_params else arrays
        rule_now = functools.partial(rule, **scalars)
        updates, *arrays = map_rule(rule_now, updates, *trees, outputs=1 + kept)
        return updates, state_type(*map(optax.safe_increment, count), *arrays)

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        if reads_params and params is None:
            raise ValueError("params must be given to update(updates, state, params), got None.")
        return on_auto_axes(step, (updates, state, params), like=(updates, state))

    return optax.GradientTransformationExtraArgs(init, update)
