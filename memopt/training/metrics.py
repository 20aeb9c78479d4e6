"""Records and shows a run: metrics.jsonl, TensorBoard events, progress."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: Without a terminal, a line of progress at most this often.
SECONDS_BETWEEN_LINES = 5.0


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of a run.

    Each step is one line, a JSON object; what is not finite is null. Every line is handed to the
    operating system at once, so that none is lost when the process is killed.

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


class Display:
    """Progress on the screen: a bar in a terminal, plain lines elsewhere.

    Args:
        console: Where to show it.
        steps: All steps of the run.
        start: Steps already taken.
    """

    def __init__(self, console: Console, steps: int, start: int):
        self._console = console
        self._steps = steps
        self._clock: tuple[float, int] | None = None  # after the first step, which compiles
        self._shown = -math.inf
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[line]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, completed=start, line="compiling …")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of a step."""
        line = (
            f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  "
            f"|g| {metrics['gradient_norm']:.2f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        )
        self._progress.update(self._task, completed=step, line=line)
        now = time.monotonic()
        began, first = self._clock = self._clock or (now, step)
        due = now - self._shown > SECONDS_BETWEEN_LINES or step == self._steps
        if due and not self._console.is_terminal:
            self._shown = now
            left = (now - began) / max(step - first, 1) * (self._steps - step)
            self.note(f"step {step}/{self._steps}  {line}  {left:.0f} s left")

    def note(self, line: str) -> None:
        """Prints a line that stays, above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
