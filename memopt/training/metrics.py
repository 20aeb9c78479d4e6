"""Records and shows a run: metrics.jsonl, trackers, progress."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from memopt.diagnostics import recorded
from memopt.json_lines import finite, read_json_lines
from memopt.training.config import Config
from memopt.training.trackers import open_trackers
from memopt.training.writing import write_whole, writing

#: Without a terminal, a line of progress at most this often.
SECONDS_BETWEEN_LINES = 5.0


class StepLog:
    """A file of a run with one line, a JSON object, for each step that has one.

    Numbers that are not finite are null. Every line is handed to the operating system at once, so
    that none is lost when the process is killed.

    Args:
        path: The file.
        step: The step the run starts from; lines of later steps are from before a restart, and are
            removed: the steps will be taken again.

    Attributes:
        last: The last line; empty if there is none.

    Raises:
        WriteError: It cannot be written.
    """

    def __init__(self, path: Path, step: int):
        self._name = repr(str(path))
        with writing(self._name):
            kept = [line for line in read_json_lines(path) if line["step"] <= step]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = path.open("a")
        self.last: dict[str, Any] = kept[-1] if kept else {}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the line of a step.

        Args:
            step: The step.
            values: Numbers, and lists and dicts of them.

        Raises:
            WriteError: The file cannot be written.
        """
        self.last = {"step": step, **finite(values)}
        with writing(self._name):
            self._file.write(json.dumps(self.last) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file.

        Raises:
            WriteError: It cannot be written.
        """
        with writing(self._name):
            self._file.close()


class MetricsLog:
    """`metrics.jsonl` of a run with the metrics of each step, and its trackers.

    Metrics of one source of the data have its name after a space, which trackers get as "/".

    Args:
        directory: The run's directory.
        step: As in `StepLog`.
        config: The options of the run, whose `log` names the trackers.

    Raises:
        WriteError: `metrics.jsonl` cannot be written.
    """

    def __init__(self, directory: Path, step: int, config: Config | None = None):
        self._log = StepLog(directory / "metrics.jsonl", step)
        config = config or Config()
        self._steps = config.optimization.steps
        self._used = self._log.last.get("batches", step)
        self._trackers = open_trackers(config, directory, step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of one step.

        Raises:
            WriteError: `metrics.jsonl` cannot be written.
        """
        self._log.write(step, metrics)
        self._used = metrics.get("batches", step)
        grouped = {name.replace(" ", "/"): value for name, value in metrics.items()}
        for tracker in self._trackers:
            tracker.write(step, grouped)

    def close(self) -> None:
        """Closes the file and the trackers.

        Raises:
            WriteError: `metrics.jsonl` cannot be written.
        """
        for tracker in self._trackers:
            tracker.close(done=self._used == self._steps)
        self._log.close()


class DiagnosticsLog:
    """`diagnostics.jsonl` of a run with the values of `memopt.diagnostics.with_diagnostics`.

    A line has the step after which the values were read, and as `updates` the number of the update
    that they are of: the same number, unless steps were skipped. A measure is an object with a
    number for each parameter, or a list of one for each layer.

    Args:
        directory: The run's directory.
        step: As in `StepLog`.
        every: Steps between measurements; 0 writes nothing.

    Raises:
        WriteError: It cannot be written.
    """

    def __init__(self, directory: Path, step: int, every: int):
        self._every = every
        self._log = StepLog(directory / "diagnostics.jsonl", step) if every else None

    def see(self, step: int, opt_state: Any) -> None:
        """Writes the values that a step has measured, if it was its turn.

        Args:
            step: The step.
            opt_state: The optimizer's state after it, which is waited for if values are due.

        Raises:
            WriteError: The file cannot be written.
        """
        if self._log is None or (step - 1) % self._every:
            return
        updates = (int(opt_state.count) - 1) // self._every * self._every + 1
        if updates > self._log.last.get("updates", 0):
            values = {
                name: {parameter: x.tolist() for parameter, x in found.items()}
                for name, found in recorded(opt_state).items()
            }
            self._log.write(step, {"updates": updates, **values})

    def close(self) -> None:
        """Closes the file.

        Raises:
            WriteError: It cannot be written.
        """
        if self._log:
            self._log.close()


class Display(Progress):
    """Progress on the screen: a bar in a terminal, plain lines elsewhere.

    Args:
        console: Where to show it.
        steps: All steps of the run.
        start: Steps already taken.
        unit: Shown before their number; a controlled run counts batches.
    """

    def __init__(self, console: Console, steps: int, start: int, unit: str = "step"):
        columns = (MofNCompleteColumn(), BarColumn(bar_width=20), "{task.fields[line]}", "left")
        bar = console.is_terminal
        super().__init__(unit, *columns, TimeRemainingColumn(), console=console, disable=not bar)
        self._shown, self._unit = -math.inf, unit
        self.add_task("", total=steps, completed=start, line="compiling …")

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of a step; a controlled run counts batches."""
        (task,) = self.tasks
        step = int(metrics.get("batches", step))
        line = (
            f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  "
            f"|g| {metrics['gradient_norm']:.2f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        )
        self.update(task.id, completed=step, line=line)
        now = time.monotonic()
        due = now - self._shown > SECONDS_BETWEEN_LINES or task.finished
        if due and self.disable:
            self._shown = now
            left = task.time_remaining
            line += f"  {left:.0f} s left" if left is not None else ""
            self._print(step, line)
        if "val_loss" in metrics:
            named = [
                f"{name.removeprefix('val_loss ')} {loss:.4f}"
                for name, loss in metrics.items()
                if name.startswith("val_loss ")
            ]
            of_sources = f" ({', '.join(named)})" if named else ""
            self._print(step, f"validation loss {metrics['val_loss']:.4f}{of_sources}")

    def note(self, step: int, line: str) -> None:
        """Shows a line about a step."""
        self._print(step, line)

    def _print(self, step: int, line: str) -> None:
        line = f"{self._unit} {step}/{self.tasks[0].total}  {line}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
