"""Programs that show a run: TensorBoard, Weights & Biases, MLflow.

They decide nothing. One that fails is warned about once, and the run goes on without it.
"""

import contextlib
import importlib.util
import os
import queue
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from memopt.training.config import Config
from memopt.training.writing import why, write_whole

#: Seconds between flushes of TensorBoard events, tensorboardX's default.
SECONDS_BETWEEN_FLUSHES = 120.0

#: Seconds that a run waits for a server: to begin, and at its end to take the last metrics. In
#: between it never waits.
SECONDS_TO_OPEN, SECONDS_TO_CLOSE = 30.0, 60.0

#: Metrics in a request to MLflow; it takes up to 1000.
METRICS_PER_REQUEST = 500

#: The project of Weights & Biases, and MLflow's experiment, unless the environment names one.
PROJECT = "memopt"

Rows = list[tuple[int, Mapping[str, float]]]


def check_trackers(names: Iterable[str]) -> None:
    """Raises unless the packages of these trackers are installed.

    Raises:
        ValueError: Names the package.

    Example:
        >>> check_trackers(["tensorboard"])
    """
    for name in names:
        if name in SERVICES:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:  # or a directory of that name
                raise ValueError(f"log {name} needs the package {name!r}: pip install {name}.")


def open_trackers(config: Config, directory: Path, start: int) -> list["Tracker"]:
    """Opens the trackers that a run's `log` names.

    Args:
        config: The options of the run, which go along.
        directory: The run's directory.
        start: The first step to come.
    """
    trackers: list[Tracker] = []
    for name in dict.fromkeys(config.run.log):
        if name == "tensorboard":
            trackers.append(Events(directory / name, start))
        else:
            trackers.append(Background(name, partial(SERVICES[name], directory, config.flat())))
    return trackers


class Tracker(Protocol):
    """Takes the metrics of a run; never raises."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of one step."""

    def close(self, done: bool = True) -> None:
        """Ends; `done` is whether the last step has been taken."""


class Events:
    """TensorBoard events. If they cannot be written, that is warned about once, and no more are.

    They are written without a thread: that of tensorboardX's writer ends at a full disk, and then
    its queue blocks the run.

    Args:
        directory: Where the file is made.
        start: The first step to come; TensorBoard drops events of it and later ones from before.
    """

    def __init__(self, directory: Path, start: int):
        from tensorboardX import record_writer, summary  # slow to import
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event, self._scalar, self._summary = Event, summary.scalar, summary.Summary
        self._records: Any = None
        self._flushed = time.monotonic()
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        begin = SessionLog(status=SessionLog.START)
        with self._writing():
            directory.mkdir(exist_ok=True)
            self._records = record_writer.RecordWriter(str(directory / name))
            self._add(file_version="brain.Event:2")
            self._add(step=start, session_log=begin)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of one step."""
        values = self._summary()
        for name, value in metrics.items():
            values.MergeFrom(self._scalar(name, value))
        with self._writing():
            self._add(step=step, summary=values)
            if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
                self._flushed = time.monotonic()
                self._records.flush()

    def close(self, done: bool = True) -> None:
        """Closes the file."""
        with self._writing():
            if self._records:
                self._records.close()

    def _add(self, **content: Any) -> None:
        if self._records:
            event = self._event(wall_time=time.time(), **content)
            self._records.write(event.SerializeToString())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            records, self._records = self._records, None
            with contextlib.suppress(OSError):  # it still holds what it could not write
                if records:
                    records.close()
            warnings.warn(
                f"TensorBoard events cannot be written ({why(error)}): the run goes on without "
                "them.",
                stacklevel=4,
            )


class Service(Protocol):
    """A tracker whose methods may raise, and may wait for a server."""

    def write(self, rows: Rows) -> None:
        """Sends the metrics of some steps."""

    def close(self, done: bool) -> None:
        """Ends; `done` is whether the last step has been taken."""


class Background:
    """A service that is called in a thread, so that no step waits for a server.

    Args:
        name: Its name.
        make: Opens it.
    """

    def __init__(self, name: str, make: Callable[[], Service]):
        self._name = name
        self._rows: queue.SimpleQueue[tuple[int, Mapping[str, float]] | bool] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._opened = threading.Event()
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, args=(make,), daemon=True
        )
        self._thread.start()
        self._opened.wait(SECONDS_TO_OPEN)
        self._drop_if_failed()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands over the metrics of one step."""
        if self._thread:
            self._rows.put((step, dict(metrics)))
            self._drop_if_failed()

    def close(self, done: bool = True) -> None:
        """Waits until all is sent, but not for long."""
        if self._thread:
            self._rows.put(done)
            self._thread.join(SECONDS_TO_CLOSE)
            if self._thread.is_alive():
                self._error = TimeoutError(f"no answer within {SECONDS_TO_CLOSE:.0f} s")
            self._drop_if_failed()

    def _drop_if_failed(self) -> None:
        if self._error is None:
            return
        self._thread = None
        reason = f"{self._error}".strip().splitlines() or [type(self._error).__name__]
        warnings.warn(
            f"{self._name} does not take the metrics ({reason[0]}): the run goes on without it.",
            stacklevel=3,
        )

    def _run(self, make: Callable[[], Service]) -> None:
        try:
            service = make()
            self._opened.set()
            while True:
                rows, done = self._waiting()
                service.write(rows)
                if done is not None:
                    return service.close(done)
        except Exception as error:
            self._error = error
            self._opened.set()

    def _waiting(self) -> tuple[Rows, bool | None]:
        """Waits for a row; returns all rows that are there, and how the run ended, if it has."""
        rows: Rows = []
        while not rows or not self._rows.empty():
            found = self._rows.get()
            if isinstance(found, bool):
                return rows, found
            rows.append(found)
        return rows, None


class WeightsAndBiases:
    """A run of Weights & Biases, its files in the run's directory.

    Args:
        directory: The run's directory, which keeps its id.
        options: The options of the run.
    """

    def __init__(self, directory: Path, options: dict[str, Any]):
        import wandb

        identifier = _kept_id(directory, "wandb") or secrets.token_hex(4)
        _keep_id(directory, "wandb", identifier)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=directory.name,
            dir=directory,
            id=identifier,
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        self._run.config.update(options, allow_val_change=True)
        self._start = self._run.step  # a resumed run takes some steps again

    def write(self, rows: Rows) -> None:
        """Logs the steps that the run does not have yet."""
        for step, metrics in rows:
            if step >= self._start:
                self._run.log(metrics, step=step)

    def close(self, done: bool) -> None:
        """Waits until all is sent."""
        self._run.finish(exit_code=0 if done else 1)


class MLflow:
    """A run of MLflow, wherever MLFLOW_TRACKING_URI says.

    Args:
        directory: The run's directory, which keeps its id.
        options: The options of the run; MLflow keeps those that the run began with.
    """

    def __init__(self, directory: Path, options: dict[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric, self._last = MlflowClient(), Metric, 0
        identifier = _kept_id(directory, "mlflow")
        if identifier is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            run = self._client.create_run(experiment, run_name=directory.name)
            identifier = run.info.run_id
            _keep_id(directory, "mlflow", identifier)
            params = [Param(key, str(value)) for key, value in options.items()]
            self._client.log_batch(identifier, params=params)
        else:
            self._client.update_run(identifier, status="RUNNING")
            history = self._client.get_metric_history(identifier, "loss")
            self._last = max((metric.step for metric in history), default=0)
        self._id = identifier

    def write(self, rows: Rows) -> None:
        """Logs the steps that the run does not have yet: a resumed run takes some again."""
        now = round(time.time() * 1000)
        metrics = [
            self._metric(name, value, now, step)
            for step, values in rows
            if step > self._last
            for name, value in values.items()
        ]
        for begin in range(0, len(metrics), METRICS_PER_REQUEST):
            part = metrics[begin : begin + METRICS_PER_REQUEST]
            self._client.log_batch(self._id, metrics=part)

    def close(self, done: bool) -> None:
        """Says how the run ended."""
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")


#: The services by their names, which are those of their packages.
SERVICES: dict[str, Callable[[Path, dict[str, Any]], Service]] = {
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def _kept_id(directory: Path, name: str) -> str | None:
    path = directory / f"{name}.id"
    return path.read_text().strip() if path.exists() else None


def _keep_id(directory: Path, name: str, identifier: str) -> None:
    write_whole(directory / f"{name}.id", f"{identifier}\n".encode())
