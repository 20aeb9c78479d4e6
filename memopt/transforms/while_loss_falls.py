"""Applies a transformation for as long as the loss falls."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.checked import checked
from memopt.errors import check_between, check_given


class WhileLossFallsState(NamedTuple):
    """State of `while_loss_falls`.

    Attributes:
        count: steps taken, int32.
        loss: the average loss, float32.
        fall: the average decrease of that average in a step, float32.
        largest: the largest `fall` so far, float32.
        applied: 1 as long as the transformation is applied, then 0, int32.
        inner: the transformation's state.
    """

    count: Array  # type: ignore[assignment]
    loss: Array
    fall: Array
    largest: Array
    applied: Array
    inner: Any


@checked
def while_loss_falls(
    inner: optax.GradientTransformation, share: float = 0.1, decay: float = 0.98
) -> optax.GradientTransformationExtraArgs:
    """Applies `inner` until the loss has nearly stopped falling, and not afterwards.

    From the loss ℓ of each step, given as ``update(updates, state, params, value=ℓ)``::

        L ← d L + (1 − d) ℓ                        L = ℓ at the first step
        F ← d F + (1 − d) (L_before − L)
        stop as soon as F ≤ share · max(F so far), after 2/(1 − d) steps

    From then on, updates and the state of `inner` are left as they are, at no cost. The two
    averages keep a few bad batches from stopping it; it does not start again. A loss that is not
    finite is not counted. State: five numbers.

    MKOR-H falls back to its first-order optimizer when second-order information stops to help;
    its authors publish no rule for that: this one is memopt's.

    Args:
        inner: any transformation of updates.
        share: the share of the largest decrease below which `inner` is no longer applied.
        decay: d.

    Raises:
        ValueError: at an update, if `value` is missing.

    Example:
        >>> tx = while_loss_falls(optax.scale(2.0), decay=0.5)
        >>> state = tx.init(jnp.ones(1))
        >>> for loss in (8, 4, 2, 1, 1, 1, 1, 1, 1, 1):
        ...     updates, state = tx.update(jnp.ones(1), state, value=loss)
        ...     print(int(updates[0]), end=" ")
        2 2 2 2 2 2 2 2 2 1
    """
    check_between("decay", decay, 0, 1)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> WhileLossFallsState:
        zero = jnp.zeros((), jnp.float32)
        count, applied = jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)
        return WhileLossFallsState(count, zero, zero, zero, applied, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        value = extra.get("value")
        check_given("value", value, "the loss of this step")
        count, before, fall, largest, applied, kept = state
        now = jnp.asarray(value, jnp.float32)
        counts = jnp.isfinite(now)
        keep = lambda new, old: jnp.where(counts, new, old).astype(jnp.float32)
        loss = keep(jnp.where(count == 0, now, decay * before + (1 - decay) * now), before)
        drop = jnp.where(count == 0, 0.0, before - loss)
        fall = keep(decay * fall + (1 - decay) * drop, fall)
        largest = jnp.maximum(largest, fall)
        count = jnp.where(counts, optax.safe_increment(count), count)
        stalled = (count > 2 / (1 - decay)) & (fall <= share * largest)
        applied = jnp.where(stalled, 0, applied)
        updates, kept = jax.lax.cond(
            applied > 0,
            lambda: inner.update(updates, kept, params, **extra),
            lambda: (updates, kept),
        )
        return updates, WhileLossFallsState(count, loss, fall, largest, applied, kept)

    return optax.GradientTransformationExtraArgs(init, update)
