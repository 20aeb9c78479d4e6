"""Makes the runs of a grid in several processes of this machine."""

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import jax

from memopt.comparison.grid import Grid
from memopt.comparison.records import Run, read_records, results_file
from memopt.comparison.worker import SECONDS_BETWEEN_LOOKS, IncompleteError, OutOfTimeError, Worker


def work_in_processes(
    grid: Grid,
    directory: Path,
    jobs: int,
    *,
    minutes: float | None,
    progress: Callable[[Sequence[Run]], None],
) -> None:
    """Makes all runs that are not finished, in processes that share the cores.

    A process that is killed leaves its runs to the others, with a warning.

    Args:
        grid: The runs.
        directory: The directory of the results, which exists.
        jobs: How many processes to start.
        minutes: As in `memopt.comparison.compare`.
        progress: Called with all records when there may be new ones.

    Raises:
        ValueError: They would share a GPU.
        IncompleteError: Methods could not be trained, or all processes were killed.
        OSError: The results cannot be written.
        OutOfTimeError: As many runs were made as fit into the minutes.
    """
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"jobs must be 1 on a {jax.default_backend()}: start a process for each device, with "
            "CUDA_VISIBLE_DEVICES=0 and so on; they share the runs of an --output."
        )
    context = multiprocessing.get_context("spawn")
    errors: SimpleQueue[Exception] = context.SimpleQueue()
    share = _cores(jobs)
    processes = [
        context.Process(target=_work, args=(grid, directory, minutes, cores, errors), daemon=True)
        for cores in share
    ]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            progress(read_records(results_file(directory, grid.target_loss)))
    finally:
        for process in processes:
            process.kill()  # a run that is not finished leaves nothing behind
    if killed := [process.exitcode for process in processes if process.exitcode]:
        told = f"{len(killed)} of {jobs} processes ended early ({_reason(killed[0])})"
        if len(killed) == jobs:
            raise IncompleteError(
                f"{told}; all finished runs are kept: give the same command again for the others."
            )
        warnings.warn(f"{told}; the others took their runs over.", stacklevel=3)
    raised = []
    while not errors.empty():
        raised.append(errors.get())
    for kind in (OSError, IncompleteError, OutOfTimeError, ValueError):
        for error in raised:
            if isinstance(error, kind):
                raise error


def _cores(jobs: int) -> list[list[int]]:
    """Returns the cores of each process; none if they cannot be shared out."""
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    return [cores[number::jobs] for number in range(jobs)]


def _work(
    grid: Grid,
    directory: Path,
    minutes: float | None,
    cores: list[int],
    errors: "SimpleQueue[Exception]",
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that has started this one ends it
    if cores:
        os.sched_setaffinity(0, cores)
    worker = Worker(grid, directory, minutes=minutes, alone=False, progress=lambda runs: None)
    try:
        worker.work()
    except (OutOfTimeError, ValueError, OSError) as error:
        errors.put(error)


def _reason(code: int) -> str:
    """Returns a few words on an exit code.

    Example:
        >>> _reason(-9), _reason(1)
        ('killed by SIGKILL, as for lack of memory', 'exit code 1')
    """
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, as for lack of memory"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
