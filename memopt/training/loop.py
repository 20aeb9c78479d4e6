"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
from rich.console import Console

from memopt.models import llama
from memopt.text.batches import Batch
from memopt.training.metrics import Display, MetricsLog
from memopt.training.prepare import Training
from memopt.training.processes import agree_to_stop, writes
from memopt.training.release import release_step
from memopt.training.step import Metrics, TrainState, evaluate, train_step

Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


class Stopped(Exception):
    """A run ended before its last step.

    Attributes:
        exit_code: What the process should exit with.
        saved: Whether where it was is saved. It is, unless only one of several processes stopped.
    """

    def __init__(self, reason: str, exit_code: int = 1, saved: bool = True):
        super().__init__(reason)
        self.exit_code = exit_code
        self.saved = saved


def train(run: Training, console: Console) -> tuple[TrainState, jax.stages.Compiled]:
    """Trains to the last step, and saves it.

    Args:
        run: The run; its `state` is used up.
        console: Where to show progress.

    Returns:
        The state after the last step, and the compiled step.

    Raises:
        Stopped: A signal, steps that are not finite, or data that cannot be read ended it earlier.
    """
    options, steps = run.config.run, run.config.optimization.steps
    state, start = run.state, int(run.state.step)
    with (
        jax.set_mesh(run.mesh),
        contextlib.closing(run.checkpoints),
        contextlib.closing(run.batches),
        contextlib.closing(MetricsLog(run.directory, start))
        if writes()
        else contextlib.nullcontext() as log,
        Display(console, steps, start) as display,
        _signals() as caught,
    ):
        (step, compiled), loss = compile_step(run, run.tx, state), jax.jit(run.loss)
        try:
            for number in range(start + 1, steps + 1):
                _stop_if_caught(caught, number - 1)
                began = time.perf_counter()
                state, outcome = step(state, run.place(_next_batch(run)))
                metrics = {name: value.item() for name, value in outcome.items()}
                metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - began)
                if number % options.eval_every == 0 or number == steps:
                    batches = map(run.place, run.validation)
                    metrics["val_loss"] = evaluate(state.params, batches, loss)
                if log:
                    log.write(number, metrics)
                display.update(number, metrics)
                _stop_if_stuck(metrics, run.config.optimization.max_skipped, number)
                if number % options.checkpoint_every == 0 or number == steps:
                    run.save(state, metrics.get("val_loss"))
        except Stopped as stopped:
            if stopped.saved:
                run.save(state)
            raise
    return state, compiled


def compile_step(
    run: Training, tx: optax.GradientTransformation, state: TrainState
) -> tuple[Step, jax.stages.Compiled]:
    """Compiles the training step of a run, with its own or another optimizer.

    Args:
        run: The run.
        tx: The optimizer.
        state: The state, or its shapes and shardings.

    Returns:
        `train_step`, or `release_step`, from (state, batch) to (state, metrics), the state donated;
        and what was compiled for it, to be asked: called by itself it refuses arrays of 4 bits.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    options = run.config.optimization
    whole = {"tx": tx, "learning_rate": run.learning_rate, "accumulation": options.accumulation}
    if options.release:
        whole |= {"shardings": shardings.params}
        model = llama.stacked_model(run.model_config)
        step = functools.partial(release_step, model=model, **whole)
    else:
        step = functools.partial(train_step, loss=run.loss, **whole)
    with jax.set_mesh(run.mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        return jitted, jitted.lower(state, run.place(run.validation[0])).compile()


def _next_batch(run: Training) -> Batch:
    try:
        return next(run.batches)
    except (OSError, ValueError) as error:
        alone = jax.process_count() > 1
        raise Stopped(f"the data cannot be read: {error}", saved=not alone) from error


def _stop_if_stuck(metrics: dict[str, float], limit: int, step: int) -> None:
    if metrics["skipped_in_row"] >= limit:
        raise Stopped(
            f"the loss or its gradients were not finite in the {limit} steps up to {step}, which "
            "changed nothing: lower --learning-rate, or look at the data."
        )


def _stop_if_caught(caught: list[signal.Signals], step: int) -> None:
    if number := agree_to_stop(caught[0] if caught else 0):
        raise Stopped(f"stopped by {signal.Signals(number).name} after step {step}.", 128 + number)


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGTERM and Ctrl-C instead of dying of them; a second one works as usual."""
    caught: list[signal.Signals] = []

    def handle(number: int, _: object) -> None:
        name = signal.Signals(number)
        caught.append(name)
        signal.signal(name, usual[name])

    usual = {name: signal.signal(name, handle) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for name, handler in usual.items():
            signal.signal(name, handler)
