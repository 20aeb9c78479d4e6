"""Grids of comparisons: which runs there are, and which records are theirs."""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from memopt.comparison.cells import Cell, Program, count_parameters, text_identity
from memopt.comparison.protocol import Protocol
from memopt.comparison.records import Run
from memopt.comparison.rows import BASELINE, Row, fixed_options, tuned_options
from memopt.comparison.tuning import Point


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


class Progressed(NamedTuple):
    """How far a comparison is.

    Attributes:
        done: Cost of the finished runs.
        planned: Cost of all runs.
        runs: Finished runs.
        planned_runs: All runs.
    """

    done: float
    planned: float
    runs: int
    planned_runs: int


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
        target_loss: As in `memopt.comparison.compare`.
    """

    protocol: Protocol
    rows: tuple[Row, ...]
    batch_sizes: tuple[int, ...]
    target_loss: float | None = None

    @property
    def units(self) -> list[Unit]:
        """All rows at the first size, then at the next."""
        models, batches = self.protocol.models, self.batch_sizes
        return [Unit(size, row, batch) for size in models for batch in batches for row in self.rows]

    @property
    def text(self) -> str:
        """A digest of the text."""
        return text_identity(self.protocol.data)

    def cell(self, unit: Unit, steps: int, point: Point, seed: int) -> Cell:
        """Returns the run of a unit for so many steps at a setting."""
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

    def holds(self, run: Run) -> bool:
        """Whether a record is of this grid."""
        return (
            _unit_of(run) in self._names
            and run.get("target_loss") == self.target_loss
            and run["text"] == self.text
            and run["eval_tokens"] == self.protocol.eval_tokens
            and run["seq_len"] == self.protocol.seq_len
            and (self.target_loss is not None or run["steps"] == self.protocol.steps)
            and (not run["tuned"] or run["seed"] in self.protocol.seeds)
        )

    def progress(self, runs: Sequence[Run]) -> Progressed:
        """Returns how far the grid is, where a run costs as much as its model has parameters.

        Runs beyond the budget, as the grid of a method grows, are known when they are made.
        """
        done = collections.Counter(map(_unit_of, filter(self.holds, runs)))
        sizes = {size: count_parameters(model) for size, model in self.protocol.models.items()}
        found, planned = [], []
        for size, row, batch_size in self.units:
            count = done[size, row.name, batch_size]
            least = self.protocol.runs_of(row) + len(self.protocol.seeds)
            found.append((sizes[size], count))
            planned.append((sizes[size], max(count, least)))
        cost = lambda pairs: sum(size * count for size, count in pairs)
        total = lambda pairs: sum(count for _, count in pairs)
        return Progressed(cost(found), cost(planned), total(found), total(planned))

    @functools.cached_property
    def _names(self) -> set[tuple[str, str, int]]:
        return {(size, row.name, batch_size) for size, row, batch_size in self.units}


def _unit_of(run: Run) -> tuple[str, str, int]:
    return run["size"], run["method"], run["batch_size"]
