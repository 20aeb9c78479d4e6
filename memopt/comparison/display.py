"""Progress of a comparison: a line for each finished run, and the time that is left."""

import math
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from memopt.comparison.grid import Progressed
from memopt.comparison.records import Run


class Display(Progress):
    """A bar in a terminal, and a line for each finished run.

    Args:
        console: Where to show it.
        measure: Maps all records to how far the comparison is.
    """

    def __init__(self, console: Console, measure: Callable[[Sequence[Run]], Progressed]):
        columns = (BarColumn(bar_width=20), TextColumn("{task.fields[line]}"))
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._measure, self._shown = measure, set[str]()
        self._first: tuple[float, float] | None = None
        self.add_task("", line="")

    def show(self, records: Sequence[Run]) -> None:
        """Shows what is new among the records.

        Args:
            records: Those of all finished runs; those of the first call are not shown.
        """
        at, now = self._measure(records), time.monotonic()
        if self._first is None:
            self._first = at.done, now
            self._shown |= {_name(record) for record in records}
        left = _left(at, *self._first, now)
        line = f"run {at.runs}/{at.planned_runs}{left}"
        for record in records:
            if (name := _name(record)) not in self._shown:
                self._shown.add(name)
                self.console.print(
                    f"{describe(record)}  {line}", markup=False, highlight=False, soft_wrap=True
                )
        (task,) = self.tasks
        self.update(task.id, completed=at.done, total=at.planned, line=line)


def describe(record: Run) -> str:
    """Says what a run came to, in a line.

    Example:
        >>> describe(
        ...     {
        ...         "size": "2M",
        ...         "method": "lion",
        ...         "options": {"b2": 0.99},
        ...         "learning_rate": 2**-10,
        ...         "seed": 0,
        ...         "tuned": True,
        ...         "steps": 400,
        ...         "batch_size": 8,
        ...         "val_loss": 1.6,
        ...         "seconds": 61.2,
        ...     }
        ... )
        '2M  lion  2^-10 b2=0.99  400×8  seed 0  loss 1.6000  (61 s)'
    """
    rate = math.log2(record["learning_rate"])
    options = "".join(f" {name}={value}" for name, value in record["options"].items())
    loss = "diverged" if record["val_loss"] is None else f"loss {record['val_loss']:.4f}"
    seed = f"seed {record['seed']}" if record["tuned"] else "tuning"
    return (
        f"{record['size']}  {record['method']}  2^{rate:g}{options}  "
        f"{record['steps']}×{record['batch_size']}  {seed}  {loss}  ({record['seconds']:.0f} s)"
    )


def _name(record: Run) -> str:
    return f"{record['method']} {record['key']}"


def _left(at: Progressed, done: float, began: float, now: float) -> str:
    """The time that is left, at the speed since the beginning."""
    if at.done <= done:
        return ""
    minutes = round((now - began) * (at.planned - at.done) / (at.done - done) / 60)
    return f", {minutes // 60}:{minutes % 60:02} hours left"
