"""Compares memopt with runs recorded from the authors' own implementations.

    python -m benchmarks.parity [--runs galore flora ...]

Each run takes 50 steps on the problem of ``tests/yardstick``. An error is the largest difference
of a parameter after 1, 2, 5, 10, 25 or 50 steps, relative to its displacement from the start. The
tolerance is 3e-4, or ten times the effect of one relative ulp in the gradients on the authors'
code; for two runs that round their parameters twice per step, it is one ulp of them per step.
Kernels are (out, in), as in torch, and transposed, (in, out), as in Flax. Prints a table and writes
it as JSON.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.report import Report
from memopt.errors import check_choice
from tests.optimizers import recorded_runs
from tests.yardstick import yardstick


class Options(NamedTuple):
    """The options of this benchmark.

    Attributes:
        runs: names of recordings; by default all of them.
        output: the JSON file.
    """

    runs: tuple[str, ...] = tuple(recorded_runs.RUNS)
    output: Path = Path(__file__).parent / "results" / "parity.json"


def measure(run: str) -> dict[str, Any]:
    """The largest errors of one run, and the largest ratio of an error to its tolerance."""
    meta = yardstick.load(run)[2]
    allowed = recorded_runs.tolerances(run)
    largest, part = {}, 0.0
    for orientation, transpose in (("out_in", False), ("in_out", True)):
        errors = recorded_runs.errors(run, transpose)
        found = [
            (float(e), float(allowed[leaf][t]))
            for leaf, at in errors.items()
            for t, e in at.items()
        ]
        largest[orientation] = max(found)
        part = max(part, *(error / tolerance for error, tolerance in found))
    error, tolerance = max(largest.values())
    return {
        "method": recorded_runs.RUNS[run],
        "run": run,
        "from": f"{meta['source']} {meta['version']}",
        **{f"error_{orientation}": e for orientation, (e, _) in largest.items()},
        "error": error,
        "tolerance": tolerance,
        "error_over_tolerance": part,
    }


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The records as a table for the terminal."""
    shown = Table(title="Largest errors against recorded runs, over the displacement")
    columns = ("method", "run", "from", "(out, in)", "(in, out)", "tolerance", "error ÷ tolerance")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i < 3 else "right")
    for r in results:
        shown.add_row(
            *(r["method"], r["run"], r["from"].split(" commit")[0]),
            *(f"{r[key]:.1e}" for key in ("error_out_in", "error_in_out", "tolerance")),
            f"{r['error_over_tolerance']:.2f}",
        )
    return shown


def main(arguments: Sequence[str]) -> None:
    """Measures the runs, prints the table and writes the file."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        for run in options.runs:
            check_choice("run", run, recorded_runs.RUNS)
    except ValueError as error:
        sys.exit(f"error: {error}")
    console = Console(stderr=True)
    results = [measure(run) for run in track(options.runs, "runs", console=console)]
    Console().print(table(results))
    Report("parity", arguments, options.output, results).save()
    if any(r["error_over_tolerance"] > 1 for r in results):
        sys.exit("error: some errors are larger than their tolerance.")


if __name__ == "__main__":
    main(sys.argv[1:])
