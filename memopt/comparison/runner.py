"""Runs the cells of a comparison that have not been run, alone or beside other processes."""

import collections
import dataclasses
import functools
import hashlib
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from rich.console import Console

from memopt.comparison.cells import Cell, Program, count_parameters, text_identity, train
from memopt.comparison.display import Display, Progressed
from memopt.comparison.protocol import PRESETS, TUNING_SEED, Protocol
from memopt.comparison.records import RESULTS, TARGETS, append_record, read_records, record
from memopt.comparison.rows import (
    BASELINE,
    ROWS,
    Row,
    first_rate,
    fixed_options,
    tuned_options,
)
from memopt.comparison.targets import fewest_steps
from memopt.comparison.tuning import Point, tune
from memopt.errors import check_at_least, check_choice
from memopt.optimizers.registry import find_method
from memopt.training.lock import Lock

#: Seconds between two looks at what other processes have done.
SECONDS_BETWEEN_LOOKS = 1.0

#: Exit code of a process that stops before a run too long for the minutes left.
OUT_OF_TIME = 75  # EX_TEMPFAIL of sysexits.h


class OutOfTimeError(Exception):
    """The next run would not end within the minutes that were given."""


class _MissingError(Exception):
    """A run that another one waits for is not finished."""


class Unit(NamedTuple):
    """A row at one size and batch: the runs that tune it, and those at the tuned setting.

    Attributes:
        size: The name of the size.
        row: The row.
        batch_size: Rows of a batch.
    """

    size: str
    row: Row
    batch_size: int


def compare(
    output: str | Path,
    preset: str | Protocol = "cpu",
    *,
    methods: Sequence[str] = (),
    sizes: Sequence[str] = (),
    seeds: Sequence[int] = (),
    target_loss: float | None = None,
    over: Literal["batch_size"] | None = None,
    jobs: int = 1,
    minutes: float | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Tunes optimizers, each with the same number of runs, and trains them at the tuned settings.

    Finished runs are in OUTPUT/compare.jsonl, one JSON object a line, and are never repeated: give
    the same call again after an interruption, or at the same time in another process.

    Args:
        output: The directory of the results.
        preset: A name in `memopt.comparison.protocol.PRESETS`, or a protocol.
        methods: Names of rows, as of `memopt.comparison.rows.Row`; by default
            `memopt.comparison.rows.ROWS`. The exact twins of rows with fewer bits are added, and
            so is the baseline, AdamW.
        sizes: Sizes of the protocol; by default all.
        seeds: Seeds of the runs that count; by default those of the protocol.
        target_loss: Find the fewest steps in which each method comes to this loss, with a schedule
            as long as each run and the learning rate retuned for it, in place of the loss after the
            protocol's steps; the results are in OUTPUT/targets.jsonl. Rows with fewer bits train as
            long as their exact twins.
        over: "batch_size": find them at every batch size of the protocol.
        jobs: Processes to run; cores are shared out between them, and so are GPUs, one each. More
            than one need ``if __name__ == "__main__":`` in the caller's program.
        minutes: Stop before a run that would end later than this after the start, by the longest
            run so far; None: run all.
        console: Where to show progress; None: nowhere.

    Returns:
        The records of all runs of these rows, sizes and seeds that are finished, with the keys
        that `memopt.comparison.records.record` describes.

    Raises:
        ValueError: A name is unknown, an optimizer cannot work in this way, or `over` is given
            without `target_loss`.
        WriteError: The results cannot be written.
    """
    if isinstance(preset, str):
        check_choice("preset", preset, PRESETS)
        preset = PRESETS[preset]
    check_at_least("jobs", jobs, 1)
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes must be at least 0, got {minutes}.")
    if over and target_loss is None:
        raise ValueError("over must be given with target_loss, the loss to be reached.")
    if target_loss is not None and not math.isfinite(target_loss):
        raise ValueError(f"target_loss must be finite, got {target_loss}.")
    protocol = preset.with_sizes(tuple(sizes)) if sizes else preset
    protocol = dataclasses.replace(protocol, seeds=tuple(seeds)) if seeds else protocol
    grid = Grid(
        protocol,
        rows_of(methods or ROWS),
        protocol.batch_sizes if over else (protocol.batch_size,),
        Path(output),
        target_loss=target_loss,
        jobs=jobs,
        minutes=minutes,
    )
    grid.directory.mkdir(parents=True, exist_ok=True)
    with Display(console or Console(quiet=True), grid.progress) as display:
        display.show(read_records(grid.path))
        if jobs > 1:
            _in_processes(grid, display)
        else:
            grid.work(display.show)
        records = read_records(grid.path)
        display.show(records)
    return [record for record in records if grid.holds(record)]


def rows_of(methods: Sequence[str]) -> tuple[Row, ...]:
    """Returns rows by their names: the baseline, other exact ones, then those tuned as others.

    Example:
        >>> [row.name for row in rows_of(["muon, state int8", "lion"])]
        ['adamw', 'muon', 'lion', 'muon, state int8']
    """
    given = [Row.parse(name) for name in methods]
    exact = [Row(BASELINE), *(row.exact for row in given)]
    return tuple(dict.fromkeys([*exact, *given]))


@dataclasses.dataclass(frozen=True)
class Grid:
    """All runs of a comparison.

    Attributes:
        protocol: What they have in common.
        rows: The rows; those tuned as another one come after it.
        batch_sizes: Rows of a batch.
        directory: The directory of the results.
        target_loss: As in `compare`.
        jobs: Processes that work on them at the same time, as far as is known.
        minutes: As in `compare`.
    """

    protocol: Protocol
    rows: tuple[Row, ...]
    batch_sizes: tuple[int, ...]
    directory: Path
    target_loss: float | None = None
    jobs: int = 1
    minutes: float | None = None

    @property
    def path(self) -> Path:
        """The file of the results."""
        return self.directory / (RESULTS if self.target_loss is None else TARGETS)

    @property
    def units(self) -> list[Unit]:
        """All rows at the first size, then at the next."""
        models, batches = self.protocol.models, self.batch_sizes
        return [Unit(size, row, batch) for size in models for batch in batches for row in self.rows]

    def progress(self, records: Sequence[dict[str, Any]]) -> Progressed:
        """Returns how far the grid is, where a run costs as much as its model has parameters.

        Runs beyond the budget, as the grid of a method grows, are known when they are made.
        """
        done = collections.Counter(map(_unit_of, filter(self.holds, records)))
        sizes = {size: count_parameters(model) for size, model in self.protocol.models.items()}
        found, planned = [], []
        for size, row, batch_size in self.units:
            runs = done[size, row.name, batch_size]
            least = self.protocol.runs_of(row) + len(self.protocol.seeds)
            found.append((sizes[size], runs))
            planned.append((sizes[size], max(runs, least)))
        cost = lambda pairs: sum(size * runs for size, runs in pairs)
        count = lambda pairs: sum(runs for _, runs in pairs)
        return Progressed(cost(found), cost(planned), count(found), count(planned))

    def holds(self, record: dict[str, Any]) -> bool:
        """Whether a record is of this grid."""
        return (
            _unit_of(record) in self._names
            and record.get("target_loss") == self.target_loss
            and self._is_of_protocol(record)
            and (not record["tuned"] or record["seed"] in self.protocol.seeds)
        )

    def _is_of_protocol(self, record: dict[str, Any]) -> bool:
        """Whether a record's run had this text and as many tokens."""
        wanted = {
            "text": self.text,
            "eval_tokens": self.protocol.eval_tokens,
            "seq_len": self.protocol.seq_len,
        }
        if self.target_loss is None:
            wanted["steps"] = self.protocol.steps
        return all(record.get(name) == value for name, value in wanted.items())

    @functools.cached_property
    def _names(self) -> set[tuple[str, str, int]]:
        return {(size, row.name, batch_size) for size, row, batch_size in self.units}

    def work(self, progress: Callable[[list[dict[str, Any]]], None]) -> None:
        """Runs all that is neither finished nor being run by another process.

        Args:
            progress: Called with all records when there may be new ones.

        Raises:
            OutOfTimeError: As many runs were made as fit into the minutes.
            ValueError: Methods could not be trained; all others were.
        """
        for row in self.rows:
            find_method(row.optimizer)  # a user's function, which another process has not entered
        worker, failed = _Worker(self, progress), dict[Unit, str]()
        left = self.units
        while left:
            waiting = []
            for unit in left:
                if (exact := unit._replace(row=unit.row.exact)) in failed:
                    failed[unit] = failed[exact]
                    continue
                try:
                    if not worker.finish(unit):
                        waiting.append(unit)
                except (OutOfTimeError, OSError):
                    raise
                except Exception as error:  # a user's function may raise any
                    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                    failed[unit] = f"{unit.row.name} at {unit.size}: {kind}{error}"
            if len(waiting) == len(left):
                progress(read_records(self.path))
                time.sleep(SECONDS_BETWEEN_LOOKS)
            left = waiting
        if failed:
            reasons = "; ".join(dict.fromkeys(failed.values()))
            raise ValueError(f"some methods cannot be trained, all others were ({reasons}).")

    def cell(self, unit: Unit, steps: int, point: Point, seed: int) -> Cell:
        """Returns the run of a row for so many steps at a setting."""
        protocol, row = self.protocol, unit.row
        tuned = tuned_options(row)
        options = fixed_options(row)
        options |= {
            name: values[i] for (name, values), i in zip(tuned.items(), point.choices, strict=True)
        }
        program = Program(
            optimizer=row.optimizer,
            options=tuple(sorted(options.items())),
            state=row.state,
            weights=row.weights,
            release=row.release,
            model=protocol.models[unit.size],
            batch_size=unit.batch_size,
            seq_len=protocol.seq_len,
        )
        return Cell(
            program=program,
            seed=seed,
            learning_rate=point.learning_rate,
            steps=steps,
            schedule=protocol.schedule_of(row),
            warmup=protocol.warmup,
            final_learning_rate=protocol.final_learning_rate,
            data=protocol.data,
            text=self.text,
            eval_tokens=protocol.eval_tokens,
        )

    @property
    def text(self) -> str:
        """A digest of the text."""
        return text_identity(self.protocol.data)


class _Worker:
    """Runs cells in this process."""

    def __init__(self, grid: Grid, progress: Callable[[list[dict[str, Any]]], None]):
        self._grid, self._progress = grid, progress
        self._began, self._longest = time.monotonic(), 0.0

    def finish(self, unit: Unit) -> bool:
        """Makes the runs of a unit; False if another process does, or must finish another first."""
        what = f"{unit.size} {unit.row.name} {unit.batch_size} {self._grid.target_loss}"
        name = hashlib.sha256(what.encode()).hexdigest()[:16]
        directory = self._grid.directory / "locks" / name
        directory.mkdir(parents=True, exist_ok=True)
        lock = Lock(directory)
        try:
            lock.acquire()
        except ValueError:  # another process has it
            return False
        try:
            self._run(unit)
        except _MissingError:
            return False
        finally:
            lock.close()
        return True

    def _run(self, unit: Unit) -> None:
        grid, row = self._grid, unit.row
        exact, steps = unit._replace(row=row.exact), grid.protocol.steps
        done = read_records(grid.path)

        def loss(steps: int, point: Point) -> float:
            return self._loss(exact, steps, point, TUNING_SEED, done, may_train=exact == unit)

        best, _ = tune(
            functools.partial(loss, steps),
            first_rate(row),
            [len(values) for values in tuned_options(row).values()],
            runs=grid.protocol.runs_of(row.exact),
        )
        if grid.target_loss is not None:
            found = fewest_steps(loss, steps, best, grid.target_loss)
            if found is None:
                return
            steps, best = found
        for seed in grid.protocol.seeds:
            self._loss(unit, steps, best, seed, done)

    def _loss(
        self,
        unit: Unit,
        steps: int,
        point: Point,
        seed: int,
        done: list[dict[str, Any]],
        *,
        may_train: bool = True,
    ) -> float:
        cell = self._grid.cell(unit, steps, point, seed)
        same = [record for record in done if record["key"] == cell.key]
        target = {} if self._grid.target_loss is None else {"target_loss": self._grid.target_loss}
        named = {"method": unit.row.name, "tuned_as": unit.row.exact.name, **target}
        found = next((record for record in same if named.items() <= record.items()), None)
        if found is None:
            if not may_train:
                raise _MissingError
            # A row of another name, or with another target, may have come to the same run.
            found = {**named, **(same[0] if same else self._train(unit, cell)), **named}
            append_record(self._grid.path, found)
            done.append(found)
            self._progress(read_records(self._grid.path))
        return math.inf if found["val_loss"] is None else found["val_loss"]

    def _train(self, unit: Unit, cell: Cell) -> dict[str, Any]:
        grid, began = self._grid, time.monotonic()
        limit = grid.minutes
        if limit is not None and began - self._began + self._longest > 60 * limit:
            raise OutOfTimeError
        tuned = cell.seed != TUNING_SEED
        outcome = train(cell, evaluate_pieces=tuned, alone=grid.jobs == 1)
        self._longest = max(self._longest, time.monotonic() - began)
        return record(unit.size, unit.row, cell, outcome, tuned=tuned)


def _unit_of(record: dict[str, Any]) -> tuple[str, str, int]:
    return record["size"], record["method"], record["batch_size"]


def _in_processes(grid: Grid, display: Display) -> None:
    """Runs a grid in several processes, and shows what they do.

    Raises:
        ValueError: They would share a GPU, or one of them has failed.
        OutOfTimeError: As `Grid.work`.
    """
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"jobs must be 1 on a {jax.default_backend()}: start a process for each device, with "
            "CUDA_VISIBLE_DEVICES=0 and so on; they share the runs of an --output."
        )
    context = multiprocessing.get_context("spawn")
    arguments = [(grid, number) for number in range(grid.jobs)]
    processes = [context.Process(target=_work, args=each, daemon=True) for each in arguments]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            display.show(read_records(grid.path))
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    codes = {process.exitcode for process in processes} - {0}
    if OUT_OF_TIME in codes:
        raise OutOfTimeError
    if codes:
        raise ValueError(
            f"a process ended early (exit code {codes.pop()}); finished runs are kept."
        )


def _work(grid: Grid, number: int) -> None:
    """Works on a grid in a process of its own, with a share of the cores."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number :: grid.jobs] or cores)
    try:
        grid.work(lambda records: None)
    except OutOfTimeError:
        sys.exit(OUT_OF_TIME)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"memopt: {error}")
