"""Polyak's step size, with any preconditioner."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.axis_types import on_auto_axes, varying_as_any
from memopt.checked import checked
from memopt.errors import check_at_least, check_choice, check_given
from memopt.reductions import total_over_trees
from memopt.state.precision import bounded
from memopt.trees import NOTHING

SMALLEST = 1e-13
"""The smallest ⟨G, U⟩ that is divided by, as in the authors' code."""


class ScaleByPolyakState(NamedTuple):
    """State of `scale_by_polyak`.

    Attributes:
        slack: the slack variable, float32; empty without one.
        inner: the preconditioner's state.
    """

    slack: Any
    inner: Any


@checked
def scale_by_polyak(
    preconditioner: optax.GradientTransformation | None = None,
    f_star: float = 0.0,
    *,
    cap: float | None = None,
    slack: str | None = None,
    slack_weight: float = 0.01,
) -> optax.GradientTransformationExtraArgs:
    """Scales the update of a preconditioner by Polyak's step size.

    With U = D⁻¹G the preconditioner's update, f the loss, q = ⟨G, U⟩ over all parameters, and
    λ = slack_weight::

        γ = (f − f_star)₊ / q                                       at most `cap`

        slack="L1":  γ̃ = (f − s + λ)₊ / (1 + q)      γ = min(γ̃, f / q)      s ← (s − λ + γ̃)₊
        slack="L2":  γ = (f − s/(1 + λ))₊ / (q + 1/(1 + λ))      s ← (s + γ) / (1 + λ)

        U ← γ U

    with f − f_star in place of f. Without a preconditioner this is ``optax.polyak_sgd``, whose
    default is a cap of 1; the paper has none. Nothing is updated if q < 1e-13. It needs the loss,
    as the extra argument `value`, as memopt's training step passes it. State: that of the
    preconditioner, and one number for a slack.

    Args:
        preconditioner: any Optax transformation whose update is D⁻¹G, such as
            `memopt.scale_by_hutchinson` or ``optax.scale_by_rms``; None means the identity.
        f_star: the smallest loss there is; 0 for models that can fit all data.
        cap: the largest step size; None means no cap.
        slack: "L1" or "L2", for a loss whose smallest value is not known; None means no slack.
        slack_weight: λ, the penalty of the slack.

    Returns:
        A transformation whose state is a `ScaleByPolyakState`. It raises a `ValueError` if `value`
        is missing.

    Raises:
        ValueError: if `slack` is unknown, or `cap` or `slack_weight` is negative.

    References:
        Abdukhakimov et al., Stochastic Gradient Descent with Preconditioned Polyak Step-size, 2023,
        https://arxiv.org/abs/2310.02093; Loizou et al., Stochastic Polyak Step-size for SGD, 2020,
        https://arxiv.org/abs/2002.10542.

    Example:
        >>> tx = optax.chain(scale_by_polyak(), optax.scale_by_learning_rate(1.0))
        >>> loss, w = lambda w: (w**2).sum(), jnp.array([1.0, 2.0])
        >>> g = jax.grad(loss)(w)
        >>> tx.update(g, tx.init(w), w, value=loss(w))[0].tolist()           # γ = 5 / 20
        [-0.5, -1.0]
    """
    check_choice("slack", slack, (None, "L1", "L2"))
    check_at_least("cap", cap, 0)
    check_at_least("slack_weight", slack_weight, 0)
    inner = optax.with_extra_args_support(preconditioner or optax.identity())

    def init(params: Any) -> ScaleByPolyakState:
        none = slack is None
        start = NOTHING if none else varying_as_any(params, jnp.zeros((), jnp.float32))
        return ScaleByPolyakState(start, inner.init(params))

    def rule(loss: Array, q: Array, s: Any) -> tuple[Array, Any]:
        """The step size and the new slack."""
        if slack is None:
            return loss / q, s
        if slack == "L1":
            step = jnp.maximum(loss - s + slack_weight, 0) / (1 + q)
            return jnp.minimum(step, loss / q), jnp.maximum(s - slack_weight + step, 0)
        shrink = 1 / (1 + slack_weight)
        step = jnp.maximum(loss - shrink * s, 0) / (q + shrink)
        return step, shrink * (s + step)

    def scale(gradients: Any, updates: Any, slack: Any, value: Any) -> tuple[Any, Any]:
        q = total_over_trees(lambda g, u: bounded(g) * bounded(u), gradients, updates)
        loss = jnp.maximum(jnp.asarray(value, q.dtype) - f_star, 0)
        applied = q >= SMALLEST
        step, new = rule(loss, jnp.where(applied, q, 1), slack)
        step = jnp.where(applied, step if cap is None else jnp.minimum(step, cap), 0)
        scaled = jax.tree.map(lambda u: (step * bounded(u)).astype(u.dtype), updates)
        keep = lambda new, old: jnp.where(applied, new, old).astype(old.dtype)
        return scaled, jax.tree.map(keep, new, slack)

    def update(
        updates: Any,
        state: ScaleByPolyakState,
        params: Any = None,
        *,
        value: Any = None,
        **extra: Any,
    ) -> Any:
        check_given("value", value, "the loss")
        value = jnp.reshape(value, ())
        new, inner_state = inner.update(updates, state.inner, params, value=value, **extra)
        like = (updates, state.slack)
        scaled, kept = on_auto_axes(scale, (updates, new, state.slack, value), like=like)
        return scaled, ScaleByPolyakState(kept, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
