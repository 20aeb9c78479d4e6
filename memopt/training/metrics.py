"""Records and shows a run: metrics.jsonl, trackers, progress."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from memopt.json_lines import read_json_lines
from memopt.training.config import Config
from memopt.training.trackers import open_trackers
from memopt.training.writing import WriteError, why, write_whole

#: Without a terminal, a line of progress at most this often.
SECONDS_BETWEEN_LINES = 5.0


class MetricsLog:
    """`metrics.jsonl` of a run, and its trackers.

    Each step is one line, a JSON object; numbers that are not finite are null. Metrics of one
    source of the data have its name after a space, which trackers get as "/". Every line is
    handed to the operating system at once, so that none is lost when the process is killed.

    Args:
        directory: The run's directory.
        step: The step the run starts from; lines of later steps are from before a restart, and are
            removed: the steps will be taken again.
        config: The options of the run, whose `log` names the trackers.

    Raises:
        WriteError: `metrics.jsonl` cannot be written.
    """

    def __init__(self, directory: Path, step: int, config: Config | None = None):
        self._path = directory / "metrics.jsonl"
        with self._writing():
            kept = [line for line in read_metrics(self._path) if line["step"] <= step]
            write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = self._path.open("a")
        config = config or Config()
        self._steps = config.optimization.steps
        self._last = kept[-1].get("batches", step) if kept else step
        self._trackers = open_trackers(config, directory, step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of one step.

        Raises:
            WriteError: `metrics.jsonl` cannot be written.
        """
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        with self._writing():
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
        self._last = metrics.get("batches", step)
        grouped = {name.replace(" ", "/"): value for name, value in metrics.items()}
        for tracker in self._trackers:
            tracker.write(step, grouped)

    def close(self) -> None:
        """Closes the file and the trackers.

        Raises:
            WriteError: `metrics.jsonl` cannot be written.
        """
        for tracker in self._trackers:
            tracker.close(done=self._last == self._steps)
        with self._writing():
            self._file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteError(
                f"{str(self._path)!r} cannot be written ({why(error)}): make room or repair the "
                "disk."
            ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`; leaves out lines that are not whole.

    The last line may be cut short, by a kill or a full disk. Any other is warned about.
    """
    return read_json_lines(path)


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
