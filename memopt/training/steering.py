"""A controller in a run: its state and decisions, and the trials it asked for."""

import dataclasses
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optax

from memopt.training.control import Control, Controller, Losses, Seen, State, Trial
from memopt.training.writing import WriteError, why, write_whole

#: Metrics that a controller is not told, since another machine measures others.
TIMED = {"tokens_per_second"}


@dataclasses.dataclass
class Steering:
    """A controller in a run.

    Attributes:
        controller: The controller.
        schedule: The run's learning rate, a function of the batches whose steps were applied.
        trials: What the controller has tried.
        state: The controller's state before it is told of `seen`.
        seen: What it is told next.
        applied: Batches whose steps were applied.
        control: What applies to the next step.
    """

    controller: Controller
    schedule: optax.Schedule
    trials: "Trials"
    state: State
    seen: Seen = dataclasses.field(default_factory=lambda: Seen(0, 0, {}))
    applied: int = 0
    control: Control = dataclasses.field(default_factory=Control)
    _after: State | None = None

    @property
    def learning_rate(self) -> np.float32:
        """The learning rate of the next step."""
        rate = self.control.learning_rate
        return np.float32(self.schedule(self.applied) if rate is None else rate)

    def metrics(self, batches: int) -> dict[str, Any]:
        """Returns what a controlled run's step adds to its metrics.

        Args:
            batches: Batches used up by then.
        """
        shares = self.control.weights or {}
        found = {"batches": batches} | {f"weight {name}": x for name, x in shares.items()}
        return {name: np.asarray(value) for name, value in found.items()}

    def see(self, step: int, batches: int, metrics: Mapping[str, float]) -> None:
        """Adds a step to `seen`.

        Args:
            step: Steps taken.
            batches: Batches used up in them.
            metrics: The metrics of the last one.
        """
        if self._after is not None:
            self.state = self._after
        if metrics["skipped_in_row"] == 0:
            self.applied += batches - self.seen.batches
        told = {name: value for name, value in metrics.items() if name not in TIMED}
        self.seen = Seen(step, batches, told)

    def decide(self, trial: Trial) -> None:
        """Lets the controller decide how the next step is taken."""
        self._after, control = self.controller.update(self.state, self.seen, trial)
        rate, batches = control.learning_rate, control.batches
        if not (isinstance(batches, int) and batches >= 1):
            raise ValueError(f"the controller's batches must be 1 or more, got {batches!r}.")
        if rate is not None and not 0 <= rate < math.inf:
            raise ValueError(f"the controller's learning_rate must be finite, got {rate!r}.")
        self.control = control

    def record(self) -> dict[str, Any]:
        """Returns what a checkpoint holds: the state before `decide`, and what it is told."""
        return {"state": self.state, "applied": self.applied, "seen": self.seen._asdict()}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Goes on from what `record` returned."""
        self.state, self.applied = record["state"], record["applied"]
        self.seen = Seen(**record["seen"])


def describe_change(before: Control, after: Control) -> str:
    """Says what a controller has changed, "" for nothing.

    Example:
        >>> describe_change(Control(), Control(learning_rate=3e-3, batches=2))
        'learning rate 0.003, 2 batches a step'
    """
    parts = []
    if after.learning_rate != before.learning_rate:
        rate = after.learning_rate
        parts.append(
            "the schedule's learning rate" if rate is None else f"learning rate {rate:.3g}"
        )
    if after.batches != before.batches:
        plural = "es" * (after.batches > 1)
        parts.append(f"{after.batches} batch{plural} a step")
    if after.weights is not None and after.weights != before.weights:
        parts.append(" ".join(f"{name} {share:.1%}" for name, share in after.weights.items()))
    if after.note and after.note != before.note:
        parts.append(after.note)
    return ", ".join(parts)


class Trials:
    """The trials of a run, kept in a file so that none is repeated after a kill.

    Args:
        path: The file, of a JSON object a line.
        step: The run's step; what was tried at later ones is forgotten.
        keep: Whether what was tried at this step is kept: not, if the run's data has changed.
    """

    def __init__(self, path: Path, step: int, *, keep: bool):
        self._path, self._found = path, dict(_read(path))
        for key in list(self._found):
            if key[0] > step or (key[0] == step and not keep):
                del self._found[key]

    def find(self, key: tuple[Any, ...]) -> Losses | None:
        """Returns the losses of a trial, by step, learning rate, steps and `validate_every`."""
        return self._found.get(key)

    def add(self, key: tuple[Any, ...], losses: Losses, *, write: bool) -> None:
        """Adds a trial.

        Args:
            key: As in `find`.
            losses: Its losses.
            write: Whether this process writes the file.

        Raises:
            WriteError: The file cannot be written.
        """
        self._found[key] = losses
        if write:
            lines = [json.dumps([*key, *found]) + "\n" for key, found in self._found.items()]
            try:
                write_whole(self._path, "".join(lines).encode())
            except OSError as error:
                raise WriteError(
                    f"{str(self._path)!r} cannot be written ({why(error)}): make room or repair "
                    "the disk."
                ) from error


def _read(path: Path) -> Iterator[tuple[tuple[Any, ...], Losses]]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            step, rate, tried, every, steps, losses = json.loads(line)
        except (ValueError, TypeError):
            warnings.warn(
                f"{str(path)!r}: line {number} is damaged and left out; its trial is repeated.",
                stacklevel=2,
            )
        else:
            yield (step, rate, tried, every), Losses(steps, losses)
