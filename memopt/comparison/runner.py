"""Compares optimizers: makes the runs of a grid that have not been made."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from memopt.comparison.cells import text_identity
from memopt.comparison.display import Display
from memopt.comparison.grid import Grid, rows_of
from memopt.comparison.processes import work_in_processes
from memopt.comparison.protocol import PRESETS, Protocol
from memopt.comparison.records import Run, read_records, results_file
from memopt.comparison.rows import ROWS
from memopt.comparison.worker import Worker
from memopt.errors import check_at_least


def compare(
    output: str | Path,
    protocol: Protocol = PRESETS["cpu"],
    *,
    methods: Sequence[str] = (),
    target_loss: float | None = None,
    over: Literal["batch_size"] | None = None,
    jobs: int = 1,
    minutes: float | None = None,
    console: Console | None = None,
) -> list[Run]:
    """Tunes optimizers, each with the same number of runs, and trains them at the tuned settings.

    Finished runs are in OUTPUT/compare.jsonl, one JSON object a line, and are never repeated: give
    the same call again after an interruption, or at the same time in another process.

    Args:
        output: The directory of the results.
        protocol: The models, text and steps that all runs have in common, as of
            `memopt.comparison.make_protocol`.
        methods: Names of rows, as `memopt.comparison.Row` reads them; by default
            `memopt.comparison.rows.ROWS`. The exact twins of rows with fewer bits are added, and
            so is the baseline, AdamW.
        target_loss: Find the fewest steps in which each method comes to this loss, with a schedule
            as long as each run and the learning rate retuned for it, in place of the loss after the
            protocol's steps; the results are in OUTPUT/targets.jsonl. Rows with fewer bits train as
            long as their exact twins.
        over: "batch_size": find them at every batch size of the protocol.
        jobs: Processes to run, which share the cores. More than one need
            ``if __name__ == "__main__":`` in the caller's program.
        minutes: Stop before a run that would end later than this after the start, if it takes as
            long as the longest run so far; the first one is always made. None: make all.
        console: Where to show progress; None: nowhere.

    Returns:
        The records of all finished runs of these rows and this protocol, for
        `memopt.comparison.summarize`; `write_report` reads them from `output`.

    Raises:
        ValueError: A name is unknown, or `over` is given without `target_loss`.
        IncompleteError: Optimizers cannot work in this way; all others are finished.
        OutOfTimeError: As many runs were made as fit into `minutes`.
        WriteError: The results cannot be written.

    Example:
        >>> protocol = make_protocol("cpu", sizes=["0.5M"], steps=100)  # doctest: +SKIP
        >>> runs = compare("comparison", protocol, methods=["muon"])  # doctest: +SKIP
    """
    check_at_least("jobs", jobs, 1)
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes must be at least 0, got {minutes}.")
    if over and target_loss is None:
        raise ValueError("over must be given with target_loss, the loss to be reached.")
    if target_loss is not None and not math.isfinite(target_loss):
        raise ValueError(f"target_loss must be finite, got {target_loss}.")
    batch_sizes = protocol.batch_sizes if over else (protocol.batch_size,)
    grid = Grid(protocol, rows_of(methods or ROWS), batch_sizes, target_loss)
    directory = Path(output)
    path = results_file(directory, target_loss)
    text_identity(protocol.data)  # raises, before anything is written, if there is no such text
    directory.mkdir(parents=True, exist_ok=True)
    with Display(console or Console(quiet=True), grid.progress) as display:
        display.show(read_records(path))
        if jobs > 1:
            work_in_processes(grid, directory, jobs, minutes=minutes, progress=display.show)
        else:
            Worker(grid, directory, minutes=minutes, alone=True, progress=display.show).work()
        runs = read_records(path)
        display.show(runs)
    return [run for run in runs if grid.holds(run)]
