"""Records measures of an optimizer's steps in its state."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from memopt.axis_types import on_auto_axes
from memopt.checked import checked
from memopt.diagnostics.functions import stable_rank
from memopt.diagnostics.measures import Measure, of_matrices, rms, update_to_weight
from memopt.errors import check_at_least
from memopt.state.precision import zeros_of
from memopt.state.quantized_state import QuantizedState
from memopt.trees import named_leaves

DEFAULT: Mapping[str, Measure] = {
    "gradient_rms": rms("gradient"),
    "update_rms": rms("update"),
    "update_to_weight": update_to_weight(),
    "gradient_stable_rank": of_matrices(stable_rank, "gradient"),
    "update_stable_rank": of_matrices(stable_rank, "update"),
}
"""The measures that `with_diagnostics` records by default."""


class WithDiagnosticsState(NamedTuple):
    """State of `with_diagnostics`.

    Attributes:
        count: steps taken, int32.
        inner: the optimizer's state.
        measures: the state of each measure, by name.
        values: its last values, by name; before the first NaN, and 0 for integers.
    """

    count: Array  # type: ignore[assignment]
    inner: Any
    measures: dict[str, Any]
    values: dict[str, Any]


@checked
def with_diagnostics(
    tx: optax.GradientTransformation,
    measures: Mapping[str, Measure] = DEFAULT,
    *,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Records what an optimizer does to each matrix, in its state. Its updates are unchanged.

    Values are read by `recorded`. Between measurements a step costs nothing more.

    Args:
        tx: any transformation; wrap it around a whole optimizer, so that "update" is what is added
            to the parameters.
        measures: measures by name; see `memopt.diagnostics`.
        every: steps between measurements; the first step has one.

    Returns:
        A transformation whose state is a `WithDiagnosticsState`.

    Raises:
        ValueError: if `every` is below one; by `update`, if the parameters are not given.

    Example:
        >>> import memopt
        >>> from memopt import diagnostics, projectors
        >>> params = {"up": {"kernel": jnp.ones((3, 8, 16))}}            # three layers
        >>> measures = {"energy": diagnostics.projected_energy(projectors.svd(2))}
        >>> tx = diagnostics.with_diagnostics(memopt.muon(0.1), measures)
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> for name, values in diagnostics.recorded(state)["energy"].items():
        ...     print(name, values.round(3))
        up/kernel [1. 1. 1.]
    """
    check_at_least("every", every, 1)
    tx = optax.with_extra_args_support(tx)

    def measured(seen: dict[str, Any], kept: dict[str, Any]) -> tuple[Any, Any]:
        found = {name: one.update(seen, kept[name]) for name, one in measures.items()}
        values = {name: value for name, (value, _) in found.items()}
        return values, {name: state for name, (_, state) in found.items()}

    def init(params: Any) -> WithDiagnosticsState:
        kept = {name: one.init(params) for name, one in measures.items()}
        seen = dict.fromkeys(("gradient", "update", "parameter"), params)
        zeros = zeros_of(lambda seen, kept: measured(seen, kept)[0], seen, kept)
        is_inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
        values = jax.tree.map(lambda x: x + jnp.nan if is_inexact(x) else x, zeros)
        return WithDiagnosticsState(jnp.zeros((), jnp.int32), tx.init(params), kept, values)

    def step(gradients: Any, state: WithDiagnosticsState, params: Any, extra: Any) -> Any:
        count, inner, kept, values = state
        updates, inner = tx.update(gradients, inner, params, **extra)
        seen = {"gradient": gradients, "update": updates, "parameter": params}
        values, kept = jax.lax.cond(
            count % every == 0, lambda: measured(seen, kept), lambda: (values, kept)
        )
        count = optax.safe_increment(count)
        return updates, WithDiagnosticsState(count, inner, kept, values)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError("params must be given to update(updates, state, params), got None.")
        return on_auto_axes(step, (updates, state, params, extra), like=(updates, state))

    return optax.GradientTransformationExtraArgs(init, update)


def recorded(state: Any) -> dict[str, dict[str, np.ndarray]]:
    """Reads the last values of `with_diagnostics` from a state.

    Args:
        state: the state of a transformation that contains `with_diagnostics`, in ``optax.chain``
            and other wrappers, too.

    Returns:
        For each measure the arrays by the parameter's name, with one entry, or several, for each
        matrix of a stack.

    Raises:
        ValueError: if there is no `with_diagnostics`, or several have a measure of the same name.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    states = list(_find(state))
    if not states:
        raise ValueError("state must be of an optimizer in memopt.diagnostics.with_diagnostics.")
    for one in states:
        for name, tree in one.values.items():
            if name in found:
                raise ValueError(f"measure {name!r} is recorded twice; give them different names.")
            found[name] = {leaf: np.asarray(x) for leaf, x in named_leaves(tree)[0]}
    return found


def _find(state: Any) -> Iterator[WithDiagnosticsState]:
    known = WithDiagnosticsState | QuantizedState
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, known)):
        if isinstance(node, QuantizedState):
            yield from _find(node.codes)
        elif isinstance(node, WithDiagnosticsState):
            yield node
            yield from _find(node.inner)
