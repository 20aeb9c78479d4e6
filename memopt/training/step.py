"""One training step and one evaluation, as pure functions of the state and a batch."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memopt.state.precision import to_float32, where_applied
from memopt.state.quantized_params import apply_rounded_updates, dequantize_params
from memopt.training.measure import Measure, check_measure, measured_metrics, sum_measured
from memopt.transforms.decay import as_schedule
from memopt.transforms.gradient_norm import global_norm
from memopt.transforms.layer_statistics import zero_statistics
from memopt.transforms.microbatches import split_microbatches
from memopt.transforms.skip_nonfinite import all_finite, skips_matrices
from memopt.trees import named_leaves, open_box

Batch = Mapping[str, Any]
Loss = Callable[..., tuple[jax.Array, jax.Array]]
Metrics = dict[str, jax.Array]
Predict = Callable[[Any, Any], Any]

#: Names under which profiles, and plans of memory, find the update and the reading of weights.
UPDATE, WEIGHTS = "update", "weights"


class TrainState(NamedTuple):
    """Everything a step reads and writes.

    Attributes:
        params: The parameters, any pytree.
        opt_state: The optimizer's state for them.
        step: int32 scalar, steps taken.
        skipped: int32 scalar, how many of them were not applied.
        skipped_in_row: int32 scalar, how many of the latest were not applied.
    """

    params: Any
    opt_state: optax.OptState
    step: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step; the parameters may be quantised.

    Raises:
        ValueError: A parameter is in float16, whose gradients would need their loss scaled.
    """
    dense = dequantize_params(params)
    for name, x in named_leaves(dense)[0]:
        if open_box(x).dtype == jnp.float16:
            raise ValueError(
                f"{name!r} must be in float32 or bfloat16, got float16, in which small gradients "
                "are zero, since the loss is not scaled."
            )
    step, skipped, skipped_in_row = jnp.zeros((3,), jnp.int32)
    opt_state = tx.init(dense)
    return TrainState(params, opt_state, step, skipped, skipped_in_row)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss: Loss,
    tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    accumulation: int = 1,
    rng: jax.Array | None = None,
    predict: Predict | None = None,
    observe: bool = False,
    measure: Measure | None = None,
) -> tuple[TrainState, Metrics]:
    """Takes one step; meant to be jitted with the state donated.

    The gradient is that of the loss summed over every token of the batch and divided by their
    number, however the batch is cut into micro-batches. When the loss or any gradient is not
    finite, parameters and optimizer state stay as they were and the step is counted as skipped; if
    `tx` is a `memopt.skip_nonfinite` with ``per="matrix"``, a gradient stops its own matrix only.
    Parameters in bfloat16 or from `memopt.quantize_params` are rounded stochastically.

    Args:
        state: The state before the step.
        batch: Arrays of shape (batch, ...).
        loss: Maps (params, batch) to (summed loss, number of tokens), both scalars.
        tx: The optimizer; is also given the mean loss of the batch, as `value`, and as a function
            of the parameters, `obj_fn`, and the norm of all gradients, `gradient_norm`.
        learning_rate: The rate that `tx` has, for the metrics: a number, or a schedule of the
            number of updates applied.
        accumulation: In how many micro-batches the batch is worked through, one after another;
            it divides the batch.
        rng: A key for dropout and the like, such as ``jax.random.key(0)``: `loss` then finds
            another one for each step and micro-batch as ``batch["rng"]``. It may be the same for
            all steps, since their number is folded into it.
        predict: Maps (optimizer state, parameters) to the parameters at which loss and gradient are
            taken, such as `memopt.predict_parameters` with an optimizer and a number of steps;
            the update is applied to the parameters themselves.
        observe: Whether to give `tx` the layers' `statistics` too; `loss` is then called with zeros
            from `memopt.zero_statistics` as `statistics`, to give them to `memopt.observe`.
        measure: "norms" or "inner_products", to tell from the gradients of at least two
            micro-batches how noisy theirs mean is. The inner products take a second pass over the
            micro-batches, the norms none; neither holds more gradients.

    Returns:
        The state after the step, and scalars: `loss`, `learning_rate`, `gradient_norm`, `tokens`,
        `skipped_in_row`. With `measure` also `micro_square`, the mean over micro-batches, by
        tokens, of ‖g_j‖², g_j the gradient of micro-batch j's own mean loss, and, with
        "inner_products", `micro_dot_square`, that of ⟨g_j, ḡ⟩², ḡ the gradient of the whole batch.

    Raises:
        ValueError: There is nothing to measure, since `accumulation` is 1.

    Example:
        >>> import functools, jax, jax.numpy as jnp, optax
        >>> def loss(w, batch):
        ...     return jnp.sum((batch["x"] @ w - batch["y"]) ** 2), jnp.asarray(2.0)
        >>> tx = optax.sgd(0.1)
        >>> step = functools.partial(train_step, loss=loss, tx=tx, learning_rate=0.1)
        >>> batch = {"x": jnp.eye(2), "y": jnp.ones(2)}
        >>> state, metrics = jax.jit(step)(init_state(jnp.zeros(2), tx), batch)
        >>> print(state.params, metrics["loss"])
        [0.1 0.1] 1.0
    """
    check_measure(measure, accumulation)
    with jax.named_scope(WEIGHTS):
        dense = dequantize_params(state.params)
    at = dense if predict is None else predict(state.opt_state, dense)
    pieces = cut_batch(batch, accumulation, rng, state.step)
    whole = batch if rng is None else {**batch, "rng": pieces["rng"][0]}
    point, gradient_of = (at, None), lambda pair, batch: loss(pair[0], batch)
    if observe:
        point = at, zero_statistics(at)
        gradient_of = lambda pair, batch: loss(pair[0], batch, statistics=pair[1])
    # Only one of a layer's statistics is a gradient: a divided loss would not divide the others.
    of_mean = accumulation == 1 and not observe
    mean_loss, found, tokens, measured = _mean_gradient(
        gradient_of, point, pieces, measure, of_mean
    )
    gradients, statistics = found
    norm = global_norm(gradients)
    applied = jnp.isfinite(mean_loss)
    if not skips_matrices(state.opt_state):
        applied &= all_finite(gradients)

    objective = lambda params: loss(params, whole)[0] / tokens
    extra = {"value": mean_loss, "obj_fn": objective, "gradient_norm": norm}
    extra |= {"statistics": statistics} if observe else {}
    with jax.named_scope(UPDATE):
        update = optax.with_extra_args_support(tx).update
        updates, opt_state = update(gradients, state.opt_state, dense, **extra)
        new = apply_rounded_updates(state.params, updates, state.step - state.skipped), opt_state
        choose = functools.partial(where_applied, applied)
        params, opt_state = jax.tree.map(choose, new, (state.params, state.opt_state))
    state = state._replace(params=params, opt_state=opt_state)
    metrics = {"loss": mean_loss, "gradient_norm": norm, "tokens": tokens, **measured}
    return finish_step(state, applied, learning_rate, metrics)


def finish_step(
    state: TrainState, applied: jax.Array, learning_rate: optax.ScalarOrSchedule, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """Advances the counters, and adds the learning rate and the skipped steps to the metrics.

    Args:
        state: The counters before the step; parameters and optimizer state after it.
        applied: Whether the step was applied, bool.
        learning_rate: As in `train_step`.
        metrics: The others, such as `loss`.
    """
    skipped_in_row = jnp.where(applied, 0, state.skipped_in_row + 1)
    rate = jnp.asarray(as_schedule(learning_rate)(state.step - state.skipped), jnp.float32)
    metrics = {**metrics, "learning_rate": rate, "skipped_in_row": skipped_in_row}
    skipped = state.skipped + ~applied
    counters = {"step": state.step + 1, "skipped": skipped, "skipped_in_row": skipped_in_row}
    return state._replace(**counters), metrics


def evaluate(params: Any, batches: Any, loss: Loss) -> float:
    """Returns the mean loss a token: the sum over all batches divided by all their tokens.

    Args:
        params: The parameters.
        batches: Iterable of batches.
        loss: As in `train_step`, jitted.
    """
    # One batch at a time: of several processes on CPUs, programs that overlap wait for each other.
    sums = [tuple(map(float, loss(params, batch))) for batch in batches]
    total, tokens = map(sum, zip(*sums, strict=True))
    return total / tokens


def evaluate_sources(
    params: Any, sources: Mapping[str, Any], shares: Mapping[str, float], loss: Loss
) -> dict[str, float]:
    """Returns the loss of each source as `val_loss NAME`, and their mean as `val_loss`.

    The mean is weighted by the shares: it estimates the loss that training on such a mixture
    minimises, and stays comparable when a controller changes the mixture.

    Args:
        params: The parameters.
        sources: Iterables of batches by the name of the source; one without a name is "".
        shares: The share of each source, of sum 1.
        loss: As in `train_step`, jitted.
    """
    losses = {name: evaluate(params, batches, loss) for name, batches in sources.items()}
    mean = math.fsum(shares[name] * value for name, value in losses.items())
    named = {f"val_loss {name}": value for name, value in losses.items() if name}
    return {"val_loss": mean, **named}


def cut_batch(batch: Batch, accumulation: int, rng: jax.Array | None, step: jax.Array) -> Any:
    """Cuts a batch into micro-batches, as arrays of shape (accumulation, rows, ...).

    Args:
        batch: Arrays of shape (batch, ...).
        accumulation: How many.
        rng: As in `train_step`; each micro-batch has a key of its own, ``"rng"``.
        step: The number of the step, folded into `rng`.
    """
    pieces = split_microbatches(batch, accumulation)
    if rng is None:
        return pieces
    if "rng" in batch:
        raise ValueError("rng must be left out if the batch has an array 'rng' of its own.")
    return {**pieces, "rng": jax.random.split(jax.random.fold_in(rng, step), accumulation)}


def _mean_gradient(
    loss: Loss, point: Any, pieces: Any, measure: Measure | None, of_mean: bool
) -> tuple[jax.Array, Any, jax.Array, Metrics]:
    """Returns the mean loss a token, its gradient in dtypes of the point, tokens, measurements.

    Args:
        loss: Maps (point, micro-batch) to (summed loss, number of tokens).
        point: A pair, of the parameters and what else the gradient is taken by.
        pieces: The micro-batches.
        measure: What to measure of the parameters' gradients.
        of_mean: Whether the only micro-batch's loss is divided before it is differentiated.
    """

    def one(piece: Any) -> tuple[Any, Any]:
        of_piece = lambda point: loss(point, piece)
        (gradients,), total, tokens = differentiate(of_piece, point, of_mean=of_mean)
        return ((total, tokens), gradients), tokens if measure else None

    sums, counts, measured = sum_measured(
        one, pieces, measure=measure, gradients_of=lambda sums: sums[1][0]
    )
    (total, tokens), gradients = sums
    tokens = jnp.maximum(tokens, 1)
    gradients = mean_gradients(gradients, 1 if of_mean else tokens, point)
    return total / tokens, gradients, tokens, measured_metrics(measured, counts)


def differentiate(
    loss: Loss, *points: Any, of_mean: bool
) -> tuple[tuple[Any, ...], jax.Array, jax.Array]:
    """Returns the gradients by each point, the summed loss and the number of tokens.

    Args:
        loss: Maps the points to (summed loss, number of tokens).
        *points: What to differentiate by.
        of_mean: Whether the gradients are those of the mean loss a token. It spares scaling them:
            XLA may keep gradients that it scales as a second copy.
    """
    total, pull, tokens = jax.vjp(loss, *points, has_aux=True)
    divisor = jnp.maximum(tokens, 1) if of_mean else jnp.ones(())
    return pull(1 / divisor.astype(total.dtype)), total, tokens


def mean_gradients(sums: Any, tokens: jax.Array | int, like: Any) -> Any:
    """Divides sums of gradients by the number of tokens, in the dtypes of `like`.

    By a product, which XLA for TPUs repeats for each reader; the result of a division it keeps, as
    a second copy of the gradients.
    """

    def mean(total: jax.Array, like: Any) -> jax.Array:
        total = to_float32(total)
        return (total * (1 / jnp.asarray(tokens, total.dtype))).astype(like.dtype)

    return jax.tree.map(mean, sums, like)
