"""The result files of the benchmarks: how each was made, on which machine, and what came out."""

import json
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from rich.console import Console

from memopt.machine import core_count, cpu_model, versions
from memopt.markdown import markdown_table as markdown_table

GIB = 2**30
PACKAGES = ("memopt", "jax", "jaxlib", "optax")

#: The compilers for TPUs and GPUs; that for CPUs is part of jaxlib.
COMPILERS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


class Report:
    """The result file of a benchmark.

    It begins with the command that makes the whole file, settings, the machine and versions.

    Args:
        benchmark: the name of the module in `benchmarks`.
        arguments: the command's arguments; none of those that only choose rows of the file.
        path: the JSON file.
        results: the list or dict of results, to which may be added before each `save`.
        packages: packages whose versions matter besides `PACKAGES`.
        settings: further entries of the file that describe the run.

    Attributes:
        results: the list or dict that was given.
    """

    def __init__(
        self,
        benchmark: str,
        arguments: Sequence[str],
        path: Path,
        results: Any,
        packages: Sequence[str] = (),
        **settings: Any,
    ):
        self.results = results
        self._path = path
        self._head = {
            "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *arguments]),
            **settings,
            "device": jax.devices()[0].device_kind,
            "cpu": cpu_model(),
            "cores": core_count(),
            "versions": {"python": platform.python_version()} | versions((*PACKAGES, *packages)),
        }

    def content(self, **more: Any) -> dict[str, Any]:
        """Everything the file holds, with further entries at its end."""
        return {**self._head, "results": self.results, **more}

    def save(self, plot: Callable[[Path], None] | None = None, **more: Any) -> None:
        """Writes the file, and the plot, with what results there are; `more` as of `content`."""
        save(self.content(**more), self._path, plot)


def read_results(path: Path, settings: Mapping[str, Any] | None = None) -> Any:
    """The results in a file; an empty list if there is no file.

    Args:
        path: the JSON file.
        settings: the settings that they must have.

    Raises:
        ValueError: if they have others.
    """
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    for name, value in (settings or {}).items():
        if report[name] != value:
            raise ValueError(
                f"{name} must be {report[name]}, as of the runs in {path}, or --output another "
                f"file, got {value}."
            )
    return report["results"]


def save(report: dict[str, Any], path: Path, plot: Callable[[Path], None] | None = None) -> None:
    """Writes a report, and a PNG of the same name, and creates their directory.

    The file is replaced atomically: a run that is stopped loses nothing that it had written.

    Args:
        report: a JSON-serialisable dict.
        path: the JSON file.
        plot: draws the image file with the given path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(report, indent=2) + "\n")
    new.replace(path)
    if plot is not None:
        plot(path.with_suffix(".png"))


class Rows(NamedTuple):
    """The options of a benchmark that writes a table of words.

    Attributes:
        optimizers: rows of the table to measure; by default all.
    """

    optimizers: tuple[str, ...]


def measure_cells(
    rows: Sequence[str],
    columns: Iterable[str],
    found: Callable[[str, str], str],
    path: Path,
    description: str | None,
) -> None:
    """Measures the rows that the command line names; prints and saves each cell as it is found.

    Args:
        rows: all rows.
        columns: the columns.
        found: maps a row and a column to a word.
        path: the JSON file, {row: {column: word}}; rows that are not measured stay.
        description: what ``--help`` prints.
    """
    options = tyro.cli(Rows, default=Rows(tuple(rows)), description=description)
    results = read_results(path) or {}
    report = Report(path.stem, (), path, results)
    for name in options.optimizers:
        results[name] = {}
        for column in columns:
            results[name][column] = found(name, column)
            Console().print(f"{name:28} {column:20} {results[name][column]}")
            report.save()


def table_of_cells(
    title: str,
    rows: Iterable[str],
    columns: Sequence[str],
    results: Mapping[str, Mapping[str, str]],
) -> str:
    """The table of `measure_cells` in Markdown, of the rows that were measured.

    Args:
        title: the title of the first column.
        rows: all rows, in their order.
        columns: the columns.
        results: the words, {row: {column: word}}.
    """
    lines = [f"| {' | '.join([title, *columns])} |", "|---" + "|:-:" * len(columns) + "|"]
    for name in rows:
        if name in results:
            words = [results[name].get(column, "–") for column in columns]
            lines.append(f"| {' | '.join([f'`{name}`', *words])} |")
    return "\n".join((*lines, ""))


def milliseconds(run: Callable[[], Any]) -> float:
    """Times a function that waits for its own results."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the extremes of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
