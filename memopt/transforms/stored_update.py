"""The update that an optimizer's state gives, without a new gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memopt.axis_types import on_auto_axes
from memopt.checked import checked
from memopt.internals import trace
from memopt.state.precision import bounded, statistics_dtype


def update_of_state(
    tx: optax.GradientTransformation, state: Any, like: Any, params: Any = None, **extra: Any
) -> Any:
    """Returns the update as a function of the state that ``tx.update`` returns beside it.

    For Adam that is m̂ / (√v̂ + ε) with the moments and the count as they are stored. Schedules are
    read at the stored count, that of the coming step.

    Args:
        tx: a transformation.
        state: its state after some steps.
        like: a tree with the shapes and dtypes of the gradients.
        params: the parameters, if the update reads them.
        **extra: its other arguments.

    Raises:
        ValueError: if the update also depends on the gradient, as Nesterov's and Lion's do, or on
            numbers that are rounded before they are stored.
    """
    structure: Any = jax.tree.structure(like)
    count = structure.num_leaves
    update = optax.with_extra_args_support(tx).update

    def run(like: Any, params: Any, state: Any, extra: Any) -> Any:
        def step(gradients: Any, params: Any, state: Any) -> Any:
            updates, new = update(gradients, state, params, **extra)
            return structure.flatten_up_to(updates), jax.tree.leaves(new)

        stored, others = jax.tree.leaves(state), jax.tree.leaves((params, state))
        outputs = range(count, count + len(stored))
        part = trace(step, like, params, state).from_outputs(outputs).needed(range(count))
        if any(part.reads[:count]):
            raise ValueError(
                "the update depends on the gradient beside the state that is stored, as with "
                "Nesterov momentum, the sign of an interpolation, state in fewer bits, or leaves "
                "that optax.masked passes on (put the mask around the whole); predict_parameters "
                "takes any transformation that is wrapped in memopt.keep_update."
            )
        return structure.unflatten(part(*[None] * count, *others, *stored))

    return on_auto_axes(run, (like, params, state, extra), like=like)


@checked
def predict_parameters(
    tx: optax.GradientTransformation, state: Any, params: Any, steps: float | jax.Array
) -> Any:
    """Predicts the parameters after some steps, from the optimizer's state alone.

    Ŵ = W + steps · U, with U the update that the stored state gives, for every transformation whose
    update is a function of the state it returns: −η v for momentum v, −η m̂ / (√v̂ + ε) for Adam,
    with the count as stored. XGrad takes the gradient at Ŵ and updates W with it; a momentum of
    decay β with β steps, the update that comes without a gradient, is then Nesterov's. Nothing is
    stored. Entries that are not finite count as zero, as the
    bias correction's before the first step.

    Decay belongs to the update. XGrad leaves it out: pass the transformation made with
    ``weight_decay=0``, which has the same state.

    Args:
        tx: a transformation, such as a whole optimizer; in `memopt.keep_update` it may be any, and
            its last update is applied again.
        state: its state after the previous step.
        params: the parameters.
        steps: how many steps to predict, such as the delay of an asynchronous gradient.

    Returns:
        Parameters like `params`, at which to evaluate the loss.

    Raises:
        ValueError: if the update depends on the gradient beside the state that is stored.

    References:
        Guan, XGrad: Boosting Gradient-Based Optimizers With Weight Prediction, 2023,
        https://arxiv.org/abs/2305.18240.

    Example:
        >>> tx, w = optax.sgd(0.1, momentum=0.9), jnp.array([1.0])
        >>> _, state = tx.update(jnp.array([2.0]), tx.init(w), w)
        >>> predict_parameters(tx, state, w, steps=3).tolist()            # 1 - 3 · 0.1 · 2
        [0.3999999761581421]
    """

    def move(p: Any, u: Any) -> Any:
        u = bounded(u)
        moved = p.astype(statistics_dtype(p)) + steps * jnp.where(jnp.isfinite(u), u, 0)
        return moved.astype(p.dtype)

    return jax.tree.map(move, params, update_of_state(tx, state, params, params))


class KeepUpdateState(NamedTuple):
    """State of `keep_update`.

    Attributes:
        update: the last update, shaped like the parameters.
        inner: the state of the inner transformation.
    """

    update: Any
    inner: Any


@checked
def keep_update(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Stores the last update, so that `memopt.predict_parameters` can apply it again.

    For transformations whose update their state does not give, as Muon's and Lion's. Wrap what
    comes before decay and learning rate, to leave decay out and to follow the schedule; or a whole
    optimizer. State: mn numbers per matrix, in the gradient's dtype, and that of `inner`.

    Args:
        inner: any Optax transformation.

    Returns:
        A transformation whose state is a `KeepUpdateState`.

    Example:
        >>> import memopt
        >>> tx, w = keep_update(memopt.lion(0.25)), jnp.array([1.0])
        >>> _, state = tx.update(jnp.array([2.0]), tx.init(w), w)
        >>> predict_parameters(tx, state, w, steps=2).tolist()
        [0.5]
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> KeepUpdateState:
        return KeepUpdateState(jax.tree.map(jnp.zeros_like, params), inner.init(params))

    def update(updates: Any, state: KeepUpdateState, params: Any = None, **extra: Any) -> Any:
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        kept = jax.tree.map(lambda u, old: u.astype(old.dtype), updates, state.update)
        return kept, KeepUpdateState(kept, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
