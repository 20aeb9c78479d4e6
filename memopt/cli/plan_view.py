"""Plans on the screen: their progress, whether they fit, and what takes the memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from memopt.planning.plan import Plan

#: The parts of the peak: their fields, what they are called, and how the bar shows them.
PARTS = (
    ("parameter_bytes", "weights", "█", "blue"),
    ("state_bytes", "optimizer state", "▓", "magenta"),
    ("gradient_bytes", "gradients", "▒", "yellow"),
    ("activation_bytes", "activations", "░", "green"),
    ("temporary_bytes", "temporaries", "▚", "red"),
)

#: Columns of the bar.
WIDTH = 72


@contextmanager
def show_progress(
    total: int | None = 1,
) -> Iterator[tuple[Callable[[str], None], Callable[[object], None]]]:
    """Shows on stderr what is worked on, how many of several plans are made, and for how long.

    Args:
        total: The number of plans; None if it is not known.

    Yields:
        A function that shows a line, and one to be called with each plan that is made.
    """
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    columns += [MofNCompleteColumn()] * (total != 1)
    columns += [TimeRemainingColumn()] * (total not in (1, None))
    # Compilers take minutes: the time left follows from all plans so far.
    progress = Progress(
        *columns, console=Console(stderr=True), transient=True, speed_estimate_period=1e9
    )
    with progress:
        task = progress.add_task("", total=total)
        yield (
            lambda line: progress.update(task, description=line),
            lambda made: progress.advance(task),
        )


def show(found: Plan, console: Console) -> None:
    """Prints a plan: whether it fits, the parts of the peak, the largest arrays, what moves."""
    where = f"{found.devices} × {found.chip}" if found.devices > 1 else found.chip
    console.print(f"{found.model} with {found.optimizer} on {where}: {_verdict(found)}")
    console.print(
        f"compiled for {found.compiled_for} by {found.compiler}; bytes are those of one device"
    )
    console.print(bar(found, WIDTH))
    parts = Table(box=None, pad_edge=False, show_header=False)
    for justify in ("left", "left", "right", "right"):
        parts.add_column(justify=justify)
    for field, name, fill, color in PARTS:
        size = getattr(found, field)
        share = f"{100 * size / found.peak_bytes:.0f}%"
        parts.add_row(Text(fill, color), name, shown(size), share)
    parts.add_row("", "peak", shown(found.peak_bytes), "")
    console.print(parts)
    if found.largest:
        console.print("largest temporaries at the peak")
        console.print(_largest(found))
    if found.traffic_bytes is not None:
        console.print(f"traffic      {shown(found.traffic_bytes)} read and written a step")
    if found.collectives:
        moved = ", ".join(
            f"{kind} {shown(one['bytes'])} in {one['count']}"
            for kind, one in found.collectives.items()
        )
        console.print(f"collectives  {moved}, a step")
    for note in found.notes:
        console.print(f"note         {note}")
    if found.command:
        console.print(f"to run it    {found.command}", soft_wrap=True)


def _verdict(found: Plan) -> str:
    sizes = f"{shown(found.peak_bytes)} of {shown(found.limit_bytes)}"
    guess = " by the CPU's compiler" * (found.compiled_for == "cpu" != found.chip)
    if found.fits:
        return f"fits{guess}, {sizes}, {shown(found.margin_bytes)} left"
    short = f", {shown(-found.margin_bytes)} short" if found.margin_bytes < 0 else ""
    return f"DOES NOT FIT{guess}, {sizes}{short}"


def shown(size: int) -> str:
    """A number of bytes in GiB, or in MiB if it is small.

    Example:
        >>> shown(3 * 2**29), shown(3 * 2**19)
        ('1.50 GiB', '1.50 MiB')
    """
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.2f} MiB"


def bar(found: Plan, width: int) -> Text:
    """Draws the parts of the peak as a bar; │ is the chip's limit.

    Args:
        found: The plan.
        width: Columns of the larger of the two, peak and limit.

    Example:
        >>> from types import SimpleNamespace
        >>> sizes = dict.fromkeys((field for field, *_ in PARTS), 1)
        >>> print(bar(SimpleNamespace(peak_bytes=5, limit_bytes=10, **sizes), 20))
        ██▓▓▒▒░░▚▚··········│
        >>> print(bar(SimpleNamespace(peak_bytes=5, limit_bytes=4, **sizes), 20))
        ████▓▓▓▓▒▒▒▒░░░░│▚▚▚▚
    """
    whole = max(found.peak_bytes, found.limit_bytes)
    cells: list[tuple[str, str]] = []
    end = 0
    for field, _, fill, color in PARTS:
        end += getattr(found, field)
        cells += [(fill, color)] * (round(width * end / whole) - len(cells))
    cells += [("·", "dim")] * (width - len(cells))
    cells.insert(round(width * found.limit_bytes / whole), ("│", "bold"))
    return Text.assemble(*cells)


def _largest(found: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("bytes", "array", "line", "operation"):
        table.add_column(column, justify="right" if column == "bytes" else "left", overflow="fold")
    for one in found.largest:
        op = one.op if one.op.startswith("copy of ") else one.op.rpartition("/")[2]
        table.add_row(shown(one.bytes), one.shape, one.source, op)
    return table
