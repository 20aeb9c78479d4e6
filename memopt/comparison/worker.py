"""Makes the runs of a grid in this process, beside others that work on the same one."""

import functools
import hashlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from memopt.comparison.cells import Cell, train
from memopt.comparison.grid import Grid, Unit
from memopt.comparison.protocol import TUNING_SEED
from memopt.comparison.records import (
    Run,
    append_record,
    loss_of,
    make_record,
    read_records,
    results_file,
)
from memopt.comparison.rows import first_rate, tuned_options
from memopt.comparison.targets import fewest_steps
from memopt.comparison.tuning import Point, tune
from memopt.training.lock import Lock

#: Seconds between two looks at what other processes have done.
SECONDS_BETWEEN_LOOKS = 1.0


class OutOfTimeError(Exception):
    """The next run would not end within the minutes that were given."""


class IncompleteError(ValueError):
    """Some runs could not be made; all others were."""


class _MissingError(Exception):
    """A run that another one waits for is not finished."""


class Worker:
    """Makes runs one after another, and writes their records.

    Args:
        grid: The runs.
        directory: The directory of the results, which exists.
        minutes: As in `memopt.comparison.compare`.
        alone: Whether no other process works beside this one, as far as is known.
        progress: Called with all records when there may be new ones.
    """

    def __init__(
        self,
        grid: Grid,
        directory: Path,
        *,
        minutes: float | None,
        alone: bool,
        progress: Callable[[Sequence[Run]], None],
    ):
        self._grid, self._directory, self._progress = grid, directory, progress
        self._path = results_file(directory, grid.target_loss)
        self._minutes, self._alone = minutes, alone
        self._began, self._longest = time.monotonic(), 0.0

    def work(self) -> None:
        """Makes all runs that are neither finished nor being made by another process.

        Raises:
            OutOfTimeError: As many runs were made as fit into the minutes.
            IncompleteError: Methods could not be trained; all others were.
        """
        failed = dict[Unit, str]()
        left = self._grid.units
        while left:
            waiting = []
            for unit in left:
                if (exact := unit._replace(row=unit.row.exact)) in failed:
                    failed[unit] = failed[exact]
                    continue
                try:
                    if not self._finish(unit):
                        waiting.append(unit)
                except (OutOfTimeError, OSError):
                    raise
                except Exception as error:  # a user's function may raise any
                    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                    failed[unit] = f"{unit.row.name} at {unit.size}: {kind}{error}"
            if len(waiting) == len(left):
                self._progress(read_records(self._path))
                time.sleep(SECONDS_BETWEEN_LOOKS)
            left = waiting
        if failed:
            reasons = "; ".join(dict.fromkeys(failed.values()))
            raise IncompleteError(f"some methods cannot be trained, all others were ({reasons}).")

    def _finish(self, unit: Unit) -> bool:
        """Makes the runs of a unit; False if another process makes them, or others they need."""
        text = f"{unit.size} {unit.row.name} {unit.batch_size} {self._grid.target_loss}"
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        directory = self._directory / "locks" / name
        directory.mkdir(parents=True, exist_ok=True)
        lock = Lock(directory)
        try:
            lock.acquire()
        except ValueError:  # another process has it
            return False
        try:
            self._make_runs(unit)
        except _MissingError:
            return False
        finally:
            lock.close()
        return True

    def _make_runs(self, unit: Unit) -> None:
        protocol, target, row = self._grid.protocol, self._grid.target_loss, unit.row
        exact, steps = unit._replace(row=row.exact), protocol.steps
        done = read_records(self._path)

        def loss(steps: int, point: Point) -> float:
            return self._loss(exact, steps, point, TUNING_SEED, done, may_train=exact == unit)

        best, _ = tune(
            functools.partial(loss, steps),
            first_rate(row),
            [len(values) for values in tuned_options(row).values()],
            runs=protocol.runs_of(row.exact),
        )
        if target is not None:
            found = fewest_steps(loss, steps, best, target)
            if found is None:
                return
            steps, best = found
        for seed in protocol.seeds:
            self._loss(unit, steps, best, seed, done)

    def _loss(
        self,
        unit: Unit,
        steps: int,
        point: Point,
        seed: int,
        done: list[Run],
        *,
        may_train: bool = True,
    ) -> float:
        """The final loss of a run, which is made unless its record is among those done."""
        cell = self._grid.cell(unit, steps, point, seed)
        same = [run for run in done if run["key"] == cell.key]
        found = next(filter(functools.partial(self._is_of, unit), same), None)
        if found is None:
            if not may_train:
                raise _MissingError
            # A row of another name, or with another target, may have come to the same run.
            found = self._named(same[0] if same else self._train(unit, cell), unit)
            append_record(self._path, found)
            done.append(found)
            self._progress(read_records(self._path))
        return loss_of(found)

    def _train(self, unit: Unit, cell: Cell) -> Run:
        self._check_time()
        began, tuned = time.monotonic(), cell.seed != TUNING_SEED
        outcome = train(cell, evaluate_pieces=tuned, alone=self._alone)
        self._longest = max(self._longest, time.monotonic() - began)
        return make_record(unit.size, unit.row, cell, outcome, tuned=tuned)

    def _named(self, run: Run, unit: Unit) -> Run:
        """The record as one of a unit and of the grid's target."""
        run = {**run, "method": unit.row.name, "tuned_as": unit.row.exact.name}
        if self._grid.target_loss is not None:
            run["target_loss"] = self._grid.target_loss
        return run

    def _is_of(self, unit: Unit, run: Run) -> bool:
        return self._named(run, unit) == run

    def _check_time(self) -> None:
        """Ends the work if another run would take too long, or nobody waits for it any more."""
        used = time.monotonic() - self._began
        if self._minutes is not None and used + self._longest > 60 * self._minutes:
            raise OutOfTimeError
        starter = multiprocessing.parent_process()
        if starter is not None and not starter.is_alive():
            sys.exit("memopt: the command was killed; finished runs are kept.")
