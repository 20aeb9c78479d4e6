"""The training loop."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
from rich.console import Console

from memopt.training.metrics import Display, MetricsLog
from memopt.training.open import Training
from memopt.training.processes import StopAgreement, is_main_process
from memopt.training.profile import Profile
from memopt.training.step import Metrics, TrainState, evaluate_sources
from memopt.training.writing import closing

#: Returns validation losses by name.
Validate: TypeAlias = Callable[[], dict[str, float]]


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
        WriteError: Its metrics or a checkpoint cannot be written.
    """
    setup, options, steps = run.setup, run.config.run, run.config.optimization.steps
    state, start = run.state, int(run.state.step)
    max_skipped = run.config.optimization.max_skipped
    traced = options.profile if is_main_process() else 0
    with (
        jax.set_mesh(setup.mesh),
        closing(run.lock),
        closing(run.checkpoints),
        closing(run.batches),
        closing(MetricsLog(run.directory, start, run.config))
        if is_main_process()
        else contextlib.nullcontext() as log,
        Display(console, steps, start) as display,
        contextlib.closing(Profile(run.directory / "profile", console, start, traced)) as profile,
        _signals() as caught,
    ):
        metrics = LateMetrics(log, display, int(state.skipped_in_row), max_skipped)
        agree = StopAgreement()
        compiled, loss = setup.compile(), jax.jit(setup.loss)
        validate = lambda: evaluate_sources(
            setup.eval_params(state),
            {name: map(setup.place, batches) for name, batches in run.validation.items()},
            run.shares,
            loss,
        )
        try:
            for number in range(start + 1, steps + 1):
                if signum := agree(caught[0] if caught else 0):
                    reason = f"stopped by {signal.Signals(signum).name} after step {number - 1}."
                    raise Stopped(reason, 128 + signum)
                run.checkpoints.check()
                profile.before(number, metrics.read)
                began, batch = time.perf_counter(), _next_batch(run)
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    state, outcome = setup.jitted(state, batch)
                evaluates = number % options.eval_every == 0 or number == steps
                metrics.add(number, outcome, began, validate if evaluates else None)
                if number % options.checkpoint_every == 0 or number == steps:
                    metrics.read()
                    run.save(state, metrics.latest.get("val_loss"))
        except Stopped as stopped:
            metrics.read()
            if stopped.saved:
                run.save(state)
                run.checkpoints.wait()
            raise
        run.checkpoints.wait()  # while signals do not end the process
    return state, compiled


class LateMetrics:
    """Metrics of steps, each read when the next step is dispatched: no device waits for the host.

    Args:
        log: Where to write them, if anywhere.
        display: Where to show them.
        skipped_in_row: How many of the latest steps were skipped, before the first one here.
        max_skipped: How many stop the run.

    Attributes:
        latest: Those that were read last.
    """

    def __init__(
        self, log: MetricsLog | None, display: Display, skipped_in_row: int, max_skipped: int
    ):
        self._log, self._display, self._max_skipped = log, display, max_skipped
        self._unread: tuple[int, Metrics, float, Validate | None] | None = None
        self._read_at = 0.0
        self.latest: dict[str, float] = {"skipped_in_row": skipped_in_row}

    def add(
        self,
        number: int,
        outcome: Metrics,
        began: float,
        validate: Validate | None = None,
    ) -> None:
        """Takes the metrics of a step that was dispatched, and reads those of the one before.

        Args:
            number: The step.
            outcome: Its metrics, on the devices.
            began: When the host began with it, in seconds of `time.perf_counter`.
            validate: Returns the validation losses after it, which are then waited for.

        Raises:
            Stopped: Too many steps in a row were skipped. It is noticed before another is taken.
        """
        before, self._unread = self._unread, (number, outcome, began, validate)
        if before:
            self._record(*before)
        if validate or self.latest["skipped_in_row"] + 1 >= self._max_skipped:
            self.read()

    def read(self) -> None:
        """Waits for the step that was added last, unless its metrics are read already.

        Raises:
            Stopped: As `add`.
        """
        if self._unread:
            unread, self._unread = self._unread, None
            self._record(*unread)

    def _record(
        self,
        number: int,
        outcome: Metrics,
        began: float,
        validate: Validate | None,
    ) -> None:
        metrics = {name: value.item() for name, value in outcome.items()}
        began, self._read_at = max(began, self._read_at), time.perf_counter()
        metrics["tokens_per_second"] = metrics["tokens"] / (self._read_at - began)
        if validate:
            metrics |= validate()
        self.latest = metrics
        if self._log:
            self._log.write(number, metrics)
        self._display.show(number, metrics)
        if metrics["skipped_in_row"] >= self._max_skipped:
            raise Stopped(
                f"the loss or its gradients were not finite in the {metrics['skipped_in_row']} "
                f"steps up to {number}, which changed nothing: lower --learning-rate, or look at "
                "the data."
            )


def _next_batch(run: Training) -> Any:
    try:
        return next(run.batches)
    except (OSError, ValueError) as error:
        saved = jax.process_count() == 1
        raise Stopped(f"the data cannot be read: {error}", saved=saved) from error


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGTERM, Ctrl-C and SIGHUP, which then do not end the process; a second one does.

    A second SIGHUP does not, since a closed terminal sends several. An ignored SIGHUP (nohup) stays
    ignored.
    """
    caught: list[signal.Signals] = []

    def handle(number: int, _: object) -> None:
        caught.append(signal.Signals(number))
        if number != signal.SIGHUP:
            signal.signal(number, usual[number])

    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers += (signal.SIGHUP,)
    usual = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
