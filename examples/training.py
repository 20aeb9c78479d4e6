"""Text, and a loop of released steps with checkpoints, for all examples."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import memopt
from memopt.models import StackedModel
from memopt.training import Checkpoints, TrainState, evaluate, init_state, release_step

ROOT = Path(__file__).parents[1]
CHECKPOINT_EVERY = 10


def make_optimizer(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Adam whose two moments are 8 bits each."""
    return optax.chain(
        memopt.quantize_state(optax.scale_by_adam(), "int8"),
        optax.scale_by_learning_rate(learning_rate),
    )


def train(
    model: StackedModel,
    params: Any,
    make_batch: Callable[[int], dict[str, Any]],
    directory: str | os.PathLike[str],
    *,
    steps: int,
) -> tuple[TrainState, list[float]]:
    """Trains with int8 weights and 8-bit state, from the newest checkpoint if there is one.

    Args:
        model: The model.
        params: Its initial parameters.
        make_batch: Maps the number of a step to its batch.
        directory: Holds the checkpoints.
        steps: Where to stop.

    Returns:
        The state after the last step, and the loss of each step taken.
    """
    rate = optax.warmup_constant_schedule(0.0, 3e-3, 5)
    tx = make_optimizer(rate)
    step = functools.partial(release_step, model=model, tx=tx, learning_rate=rate)
    step = jax.jit(functools.partial(step, rng=jax.random.key(0)), donate_argnums=0)

    init = lambda params: init_state(memopt.quantize_params(params, "int8"), tx)
    state, losses = jax.jit(init)(params), []
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        state, _ = checkpoints.restore(state) or (state, {})
        for number in range(int(state.step), steps):
            state, metrics = step(state, make_batch(number))
            losses.append(float(metrics["loss"]))
            if (number + 1) % CHECKPOINT_EVERY == 0 or number + 1 == steps:
                checkpoints.save(state, {})
    return state, losses


def run(
    model: StackedModel, params: Any, make_batch: Callable[[int], dict[str, Any]], steps: int = 100
) -> None:
    """Trains in the directory that the command line names; prints the state's bytes and losses."""
    if len(sys.argv) != 2:
        sys.exit("Give one argument, the directory to keep checkpoints in.")
    tx = make_optimizer(optax.constant_schedule(0.0))
    kept = memopt.state_bytes(tx, params).total
    print(f"state: {kept:,} bytes for {sum(x.size for x in jax.tree.leaves(params)):,} parameters")
    state, losses = train(model, params, make_batch, sys.argv[1], steps=steps)
    held_out = map(make_batch, range(10_000, 10_004))
    loss = evaluate(state.params, held_out, jax.jit(model.loss))
    print(f"loss of steps {[round(loss, 2) for loss in losses[::20]]}, on other data {loss:.2f}")


@functools.cache
def read_text() -> bytes:
    """Reads memopt's documentation."""
    return b"".join(path.read_bytes() for path in sorted(ROOT.glob("docs/*.md")))


def text_batch(number: int, *, rows: int, length: int) -> dict[str, np.ndarray]:
    """Cuts rows of bytes from the text, at places that the number of the step decides."""
    text = read_text()
    starts = np.random.default_rng(number).integers(0, len(text) - length, rows)
    tokens = np.stack([np.frombuffer(text, np.uint8, length + 1, start) for start in starts])
    return {"inputs": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}
