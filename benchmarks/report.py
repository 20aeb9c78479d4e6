"""Saves the results of a benchmark as a JSON file and a plot."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


def milliseconds(run: Callable[[], Any]) -> float:
    """Times a function that waits for its own results."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the extremes of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
