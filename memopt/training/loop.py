"""The training loop."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from rich.console import Console

from memopt.training.control import Control, Losses
from memopt.training.metrics import DiagnosticsLog, Display, MetricsLog
from memopt.training.open import Training
from memopt.training.processes import StopAgreement, broadcast, is_main_process
from memopt.training.profile import Profile
from memopt.training.steering import ControlError, Steering, describe_change
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
    setup, start = run.setup, int(run.state.step)
    traced = run.config.run.profile if is_main_process() else 0
    with (
        jax.set_mesh(setup.mesh),
        closing(run.lock),
        closing(run.checkpoints),
        closing(run.batches),
        closing(MetricsLog(run.directory, start, run.config))
        if is_main_process()
        else contextlib.nullcontext() as log,
        closing(
            DiagnosticsLog(
                run.directory, start, run.config.run.log_diagnostics if is_main_process() else 0
            )
        ) as diagnostics,
        Display(
            console,
            run.config.optimization.steps,
            run.batches_used,
            unit=run.unit,
        ) as display,
        contextlib.closing(Profile(run.directory / "profile", console, start, traced)) as profile,
        _signals() as caught,
    ):
        compiled = setup.compile()
        loop = _Loop(run, log, diagnostics, display, profile, caught)
        try:
            loop.run()
        except Stopped as stopped:
            loop.metrics.read()
            if stopped.saved:
                run.save(loop.state)
                run.checkpoints.wait()
            raise
        run.checkpoints.wait()  # while signals do not end the process
    return loop.state, compiled


class _Loop:
    """Takes the steps of a run.

    Attributes:
        state: The state after the last step.
        step: Steps taken.
        batches: Batches used up in them.
        metrics: Reads the metrics.
    """

    def __init__(
        self,
        run: Training,
        log: MetricsLog | None,
        diagnostics: DiagnosticsLog,
        display: Display,
        profile: Profile,
        caught: list[signal.Signals],
    ):
        self._training, self._display, self._profile, self._caught = run, display, profile, caught
        self._diagnostics = diagnostics
        self._agree, self._loss = StopAgreement(), jax.jit(run.setup.loss)
        self.state, self.step, self.batches = run.state, int(run.state.step), run.batches_used
        skipped = int(run.state.skipped_in_row)
        self.metrics = LateMetrics(log, display, skipped, run.config.optimization.max_skipped)
        self._compiled = {1}

    def run(self) -> None:
        """Takes all steps; in a controlled run each by what the metrics of the last have led to."""
        run, options = self._training, self._training.config.run
        steering, length = run.steering, run.config.optimization.steps
        if steering and self.batches < length:
            self._decide(steering)
        while self.batches < length:
            self._check_signals()
            run.checkpoints.check()
            count = min(steering.control.batches, length - self.batches) if steering else 1
            before = self.batches
            self._profile.before(self.step + 1, self.metrics.read)
            began = time.perf_counter()
            with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
                outcome = self._take(count, steering.learning_rate if steering else None)
            self.step, self.batches = self.step + 1, before + count
            is_due = lambda every, before=before: (
                self.batches // every > before // every or self.batches == length
            )
            validate = self._validate if is_due(options.eval_every) else None
            self._diagnostics.see(self.step, self.state.opt_state)
            if steering:
                outcome = {**outcome, **steering.metrics(self.batches, run.batches.weights)}
            try:
                self.metrics.add(self.step, outcome, began, validate)
                if steering:
                    self.metrics.read()
            finally:  # also if too many steps were skipped, which is saved
                if steering:
                    steering.see(self.step, self.batches, self.metrics.latest)
            if is_due(options.checkpoint_every):
                self.metrics.read()
                run.save(self.state, self.metrics.latest.get("val_loss"))
            if steering and self.batches < length:
                self._decide(steering)

    def _check_signals(self) -> None:
        if signum := self._agree(self._caught[0] if self._caught else 0):
            at = f"{self._training.unit} {self.batches}"
            reason = f"stopped by {signal.Signals(signum).name} after {at}."
            raise Stopped(reason, 128 + signum)

    def _take(self, count: int, learning_rate: np.float32 | None) -> Metrics:
        """Takes a step with so many batches; without a controller, with one and the schedule."""
        run = self._training
        position = run.batches.get_state() if count > 1 else None
        try:
            batches = tuple(_next_batch(run) for _ in range(count))
        except Stopped:
            if position:
                run.batches.set_state(position)  # the first ones are not used up
            raise
        if count not in self._compiled:
            self._compiled.add(count)
            self._display.note(self.batches, f"a step of {count} batches is compiled")
        inputs = batches if learning_rate is None else (batches, learning_rate)
        self.state, outcome = run.setup.jitted(self.state, *inputs)
        return outcome

    def _validate(self) -> dict[str, float]:
        run, setup = self._training, self._training.setup
        batches = {name: map(setup.place, found) for name, found in run.validation.items()}
        return evaluate_sources(setup.eval_params(self.state), batches, run.shares, self._loss)

    def _decide(self, steering: Steering) -> None:
        before = steering.control
        if is_main_process():
            self._lead(steering)
        else:
            self._follow(steering)
        weights = steering.control.weights
        if weights is not None and weights != before.weights:
            self._training.batches.set_weights(weights)
        if change := describe_change(before, steering.control):
            self._display.note(self.batches, change)

    def _lead(self, steering: Steering) -> None:
        """Lets the controller decide, in process 0; tells the others what to try and what it is."""
        alone = True  # the others wait to be told; else they take steps, too

        def trial(learning_rate: float, steps: int, *, validate_every: int | None = None) -> Losses:
            nonlocal alone
            key = self.step, *(asked := (float(learning_rate), steps, validate_every))
            found = steering.trials.find(key)
            if not found:
                broadcast({"try": asked})
                alone = False
                found = self._try(*asked)
                alone = True
                steering.trials.add(key, found)
            return found

        try:
            decision = steering.controller.update(steering.state, steering.seen, trial)
            try:
                broadcast({"decided": steering.decide(decision)})
            except ControlError as error:
                raise Stopped(f"{error}", saved=jax.process_count() == 1) from error
        except Exception as error:  # a controller's own, too: the others wait to be told
            if alone:
                kind = "" if isinstance(error, Stopped | OSError) else f"{type(error).__name__}: "
                broadcast({"failed": f"{kind}{error}"})
            raise

    def _follow(self, steering: Steering) -> None:
        """Takes part in what process 0 tries, and takes over what it decides."""
        while "try" in (told := broadcast(None)):
            self._try(*told["try"])
        if "failed" in told:
            raise Stopped(f"process 0: {told['failed']}", saved=False)
        state, control = told["decided"]
        steering.decide((state, Control(**control)))

    def _try(self, learning_rate: float, steps: int, validate_every: int | None) -> Losses:
        """Runs a `Trial` from a checkpoint of the present state."""
        run = self._training
        run.save(self.state, self.metrics.latest.get("val_loss"))
        run.checkpoints.wait()
        position = run.batches.get_state()
        try:
            found = self._losses(learning_rate, steps, validate_every)
        finally:
            del self.state  # frees its memory
            self.state, _ = run.checkpoints.read(self.step, run.setup.state)
            run.batches.set_state(position)
        last = found.losses[-1] if found.losses else math.nan
        tried = f"tried learning rate {learning_rate:.3g} for {steps} steps: loss {last:.4f}"
        self._display.note(self.batches, tried)
        return found

    def _losses(self, learning_rate: float, steps: int, validate_every: int | None) -> Losses:
        """Takes steps with a learning rate until one is not applied."""
        at, losses = [], []
        for count in range(1, steps + 1):
            self._check_signals()
            outcome = self._take(1, np.float32(learning_rate))
            loss = outcome["loss"].item() if outcome["skipped_in_row"].item() == 0 else math.nan
            if math.isnan(loss) or validate_every is None or count % validate_every == 0:
                at.append(count)
                losses.append(
                    self._validate()["val_loss"] if validate_every and loss == loss else loss
                )
            if math.isnan(loss):
                break
        return Losses(at, losses)


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
