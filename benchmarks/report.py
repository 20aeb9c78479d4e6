"""Measurements of a benchmark and their results: a JSON file, and a plot beside it."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GIB = 2**30


def save(report: dict[str, Any], path: Path, plot: Callable[[Path], None] | None = None) -> None:
    """Writes a report, making its directory, and a PNG of the same name.

    The file is whole at every moment: a run that is stopped loses nothing it had written.

    Args:
      report: JSON-serialisable.
      path: the JSON file.
      plot: draws the image file it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(report, indent=2) + "\n")
    new.replace(path)
    if plot is not None:
        plot(path.with_suffix(".png"))


def milliseconds(run: Callable[[], Any]) -> float:
    """The time of a function that waits for what it starts."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the extremes of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
