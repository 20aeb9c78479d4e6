"""Records and shows a run: metrics.jsonl, TensorBoard events, progress."""

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

#: Without a terminal, a line of progress at most this often.
SECONDS_BETWEEN_LINES = 5.0


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of a run.

    Each step is one line, a JSON object; numbers that are not finite are null. Every line is
    handed to the operating system at once, so that none is lost when the process is killed.

    Args:
        directory: The run's directory.
        step: The step the run starts from; lines of later steps are from before a restart, and are
            removed: the steps will be taken again.
    """

    def __init__(self, directory: Path, step: int):
        from tensorboardX import SummaryWriter  # slow to import

        self._path = directory / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["step"] <= step]
        draft = self._path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
        draft.replace(self._path)
        self._file = self._path.open("a")
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of one step."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`; a last line that was cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Display(Progress):
    """Progress on the screen: a bar in a terminal, plain lines elsewhere.

    Args:
        console: Where to show it.
        steps: All steps of the run.
        start: Steps already taken.
    """

    def __init__(self, console: Console, steps: int, start: int):
        columns = (MofNCompleteColumn(), BarColumn(bar_width=20), "{task.fields[line]}", "left")
        bar = console.is_terminal
        super().__init__("step", *columns, TimeRemainingColumn(), console=console, disable=not bar)
        self._shown = -math.inf
        self.add_task("", total=steps, completed=start, line="compiling …")

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of a step."""
        (task,) = self.tasks
        line = (
            f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  "
            f"|g| {metrics['gradient_norm']:.2f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        )
        self.update(task.id, completed=step, line=line)
        now = time.monotonic()
        due = now - self._shown > SECONDS_BETWEEN_LINES or task.finished
        if due and self.disable:
            self._shown = now
            line = f"step {step}/{task.total}  {line}  {task.time_remaining or 0:.0f} s left"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
