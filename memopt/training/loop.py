"""The training loop."""

import contextlib
import signal
import time
from collections.abc import Iterator

import jax
from rich.console import Console

from memopt.text.batches import Batch
from memopt.training.metrics import Display, MetricsLog
from memopt.training.open import Training
from memopt.training.processes import agree_to_stop, is_main_process
from memopt.training.step import TrainState, evaluate


class Stopped(Exception):
    """A run ended before its last step.

    Attributes:
        exit_code: What the process should exit with.
        saved: Whether its state is saved; False if only one of several processes stopped.
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
    setup, options, steps = run.setup, run.config.run, run.config.optimization.steps
    state, start = run.state, int(run.state.step)
    with (
        jax.set_mesh(setup.mesh),
        contextlib.closing(run.checkpoints),
        contextlib.closing(run.batches),
        contextlib.closing(MetricsLog(run.directory, start))
        if is_main_process()
        else contextlib.nullcontext() as log,
        Display(console, steps, start) as display,
        _signals() as caught,
    ):
        compiled, loss = setup.compile(), jax.jit(setup.loss)
        try:
            for number in range(start + 1, steps + 1):
                if signum := agree_to_stop(caught[0] if caught else 0):
                    reason = f"stopped by {signal.Signals(signum).name} after step {number - 1}."
                    raise Stopped(reason, 128 + signum)
                began = time.perf_counter()
                state, outcome = setup.jitted(state, setup.place(_next_batch(run)))
                metrics = {name: value.item() for name, value in outcome.items()}
                metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - began)
                if number % options.eval_every == 0 or number == steps:
                    batches = map(setup.place, run.validation)
                    metrics["val_loss"] = evaluate(setup.eval_params(state), batches, loss)
                if log:
                    log.write(number, metrics)
                display.show(number, metrics)
                if metrics["skipped_in_row"] >= run.config.optimization.max_skipped:
                    raise Stopped(
                        f"the loss or its gradients were not finite in the "
                        f"{metrics['skipped_in_row']} steps up to {number}, which changed nothing: "
                        "lower --learning-rate, or look at the data."
                    )
                if number % options.checkpoint_every == 0 or number == steps:
                    run.save(state, metrics.get("val_loss"))
        except Stopped as stopped:
            if stopped.saved:
                run.save(state)
            raise
    return state, compiled


def _next_batch(run: Training) -> Batch:
    try:
        return next(run.batches)
    except (OSError, ValueError) as error:
        alone = jax.process_count() > 1
        raise Stopped(f"the data cannot be read: {error}", saved=not alone) from error


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGTERM and Ctrl-C, which then do not end the process; a second one does."""
    caught: list[signal.Signals] = []

    def handle(number: int, _: object) -> None:
        caught.append(signal.Signals(number))
        signal.signal(number, usual[number])

    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    usual = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
