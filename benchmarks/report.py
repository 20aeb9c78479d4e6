"""Saves the results of a benchmark as a JSON file and a plot."""

import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

GIB = 2**30


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


def measure_cells(
    names: Sequence[str],
    columns: Sequence[str],
    found: Callable[[str, str], str],
    results: dict[str, dict[str, str]],
    path: Path,
) -> None:
    """Measures rows of a table of words; prints and saves each cell as it is found.

    Args:
      names: the rows to measure.
      columns: the columns.
      found: maps a row and a column to a word.
      results: the words of all rows, to which these are added.
      path: the JSON file.
    """
    command = shlex.join(["python", "-m", f"benchmarks.{path.stem}", *sys.argv[1:]])
    for name in names:
        results[name] = {}
        for column in columns:
            results[name][column] = found(name, column)
            Console().print(f"{name:28} {column:20} {results[name][column]}")
            save({"command": command, "jax": jax.__version__, "results": results}, path)


def replace_table(page: Path, old: str, new: str) -> None:
    """Replaces the part of a page that a regular expression finds."""
    text = page.read_text()
    found = re.search(old, text, re.MULTILINE)
    assert found is not None
    page.write_text(text.replace(found[0], new))


def milliseconds(run: Callable[[], Any]) -> float:
    """Times a function that waits for its own results."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the extremes of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
