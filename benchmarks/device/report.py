"""Formats rows as tables and as a plot."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import MARKDOWN
from rich.table import Table

from benchmarks.device.jobs import Record
from benchmarks.report import GIB


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        title: the figure's name and unit.
        read: reads it from a row; raises KeyError or TypeError if the row has none.
        form: its format specification, see `format`.
    """

    title: str
    read: Callable[[Record], Any]
    form: str = ".2f"


COMPILED = Column("compile s", lambda row: row["compile_seconds"], ".1f")
TRAINING = (
    Column("peak GiB", lambda row: row["peak_bytes"] / GIB),
    Column("compiler's GiB", lambda row: row["compiler_bytes"] / GIB),
    Column("rows", lambda row: row["batch_size"], "d"),
    Column("tokens/s", lambda row: row["tokens_per_second"], ",.0f"),
    Column("first loss", lambda row: row["losses"][0]),
    Column("last loss", lambda row: row["losses"][-1]),
    COMPILED,
)
COLUMNS = {
    "memory": TRAINING,
    "update": (
        Column("ms", lambda row: row["milliseconds"]["median"]),
        Column("÷ optax.adamw", lambda row: row["ratio"]["median"]),
        Column("GB/s", lambda row: row["bytes_per_second"] / 1e9, ",.0f"),
        Column("of a copy", lambda row: row["share_of_copy"], ".0%"),
        Column("state GB", lambda row: row["state_bytes"] / 1e9),
        COMPILED,
    ),
    "release": TRAINING,
    "attention": (
        Column("forward ms", lambda row: row["forward"]["milliseconds"]["median"]),
        Column("TFLOP/s", lambda row: row["forward"]["tflops"], ".0f"),
        Column("both ms", lambda row: row["forward and backward"]["milliseconds"]["median"]),
        Column("TFLOP/s", lambda row: row["forward and backward"]["tflops"], ".0f"),
    ),
    "models": TRAINING,
    "tests": (
        Column("passed", lambda row: row["passed"], "d"),
        Column("failed", lambda row: len(row["failed"]), "d"),
    ),
}
TITLES = {
    "memory": "LLaMA-7b under a cap of 12 GB",
    "update": "One optimizer step on the parameters of LLaMA-1b",
    "release": "LLaMA-1b, and with the largest batch under a cap of 24 GB",
    "attention": "Causal attention of 32 heads of 128",
    "models": "Other models",
    "tests": "Tests",
}


def _cells(row: Record) -> list[str]:
    def cell(column: Column) -> str:
        try:
            return format(column.read(row), column.form)
        except (KeyError, TypeError):
            return ""

    return [cell(column) for column in COLUMNS[row["piece"]]]


def line(row: Record) -> str:
    """Formats a row as one line for the terminal."""
    pairs = zip(COLUMNS[row["piece"]], _cells(row), strict=True)
    figures = [f"{column.title} {cell}" for column, cell in pairs if cell]
    what = row.get("error") or ", ".join(figures)
    return f"{row['piece']}: {row['name']}: {what} ({row['seconds']:.0f} s)"


def tables(rows: Sequence[Record]) -> list[Table]:
    """Formats a Markdown table for each piece, and one for the kernels of slow rows."""
    found = []
    for piece, columns in COLUMNS.items():
        mine = [row for row in rows if row["piece"] == piece]
        if not mine:
            continue
        shown = Table(title=f"{TITLES[piece]}, {mine[0]['device']}", box=MARKDOWN)
        shown.add_column("", no_wrap=True)
        for column in columns:
            shown.add_column(column.title, justify="right")
        for row in mine:
            shown.add_row(row["name"], *_cells(row))
        found.append(shown)
    errors = Table(title="Failed", box=MARKDOWN)
    errors.add_column("")
    errors.add_column("error", overflow="fold")
    for row in rows:
        if "error" in row:
            errors.add_row(row["name"], row["error"])
    found += [errors] * bool(errors.row_count)
    kernels = Table(title="The longest kernels", box=MARKDOWN)
    for title in ("", "kernel", "instruction"):
        kernels.add_column(title, overflow="fold")
    for title in ("calls", "ms", "share"):
        kernels.add_column(title, justify="right")
    for row in rows:
        for one in row.get("kernels", ()):
            numbers = (str(one["calls"]), f"{one['milliseconds']:.3f}", f"{one['share']:.0%}")
            kernels.add_row(row["name"], one["kernel"], one["operation"], *numbers)
    return found + [kernels] * bool(kernels.row_count)


def plot(rows: Sequence[Record], path: Path) -> None:
    """Draws the memory of training, and the bandwidth that optimizer steps reached, as bars."""
    from matplotlib.figure import Figure

    trained = [row for row in rows if row.get("compiler_bytes") and row["piece"] != "attention"]
    measured = [(i, row["peak_bytes"]) for i, row in enumerate(trained) if row["peak_bytes"]]
    updated = [row for row in rows if "share_of_copy" in row]
    height = 1.2 + 0.3 * max(len(trained), len(updated))
    figure = Figure(figsize=(13, height), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    places = range(len(trained))
    memory.barh(
        [i - 0.2 for i, _ in measured],
        [peak / GIB for _, peak in measured],
        0.4,
        label="measured",
    )
    memory.barh(
        [i + 0.2 for i in places],
        [row["compiler_bytes"] / GIB for row in trained],
        0.4,
        label="the compiler's",
        color="C7",
    )
    names = [f"{row['model']}: {row['name']}" for row in trained]
    memory.set_yticks(places, names, fontsize=8)
    memory.set_xlabel("peak of a training step, GiB")
    memory.legend()
    colors = {"memopt": "C0", "optax": "C7", "torch": "C1", "copy": "C2"}
    speed.barh(
        range(len(updated)),
        [row["share_of_copy"] for row in updated],
        color=[colors[row["library"]] for row in updated],
    )
    speed.set_yticks(range(len(updated)), [row["name"] for row in updated], fontsize=8)
    speed.axvline(1, color="black", linewidth=1)
    speed.set_xlabel("bytes a step must move ÷ its time, of a copy's bandwidth")
    for axes in (memory, speed):
        axes.invert_yaxis()
    figure.suptitle(rows[0]["device"])
    figure.savefig(path, dpi=110)
