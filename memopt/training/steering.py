"""A controller in a run: its state and decisions, and the trials it asked for."""

import dataclasses
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import optax

from memopt.training.control import Control, Controller, Losses, Seen, State
from memopt.training.writing import write_whole, writing

#: Metrics that a controller is not told, since another machine measures others.
TIMED = {"tokens_per_second"}

#: How far the sum of a controller's weights may be from 1: as far as float32 rounds.
ROUNDING = 1e-6


class ControlError(ValueError):
    """A controller returned what it may not; names the controller."""


@dataclasses.dataclass
class Steering:
    """A controller in a run.

    Attributes:
        name: The controller's name.
        controller: The controller.
        sources: The names of the data's sources; one without a name is "".
        schedule: The run's learning rate, a function of the batches whose steps were applied.
        trials: What the controller has tried.
        state: The controller's state before it is told of `seen`.
        seen: What it is told next.
        applied: Batches whose steps were applied.
        control: What applies to the next step.
    """

    name: str
    controller: Controller
    sources: frozenset[str]
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

    def metrics(self, batches: int, weights: Mapping[str, float]) -> dict[str, Any]:
        """Returns what a controlled run's step adds to its metrics.

        Args:
            batches: Batches used up by then.
            weights: The share of each named source in them.
        """
        found = {"batches": batches} | {f"weight {name}": x for name, x in weights.items()}
        return {name: np.asarray(x) for name, x in {**found, **self.control.metrics}.items()}

    def see(self, step: int, batches: int, metrics: Mapping[str, float]) -> None:
        """Adds a step to `seen`.

        Args:
            step: Steps taken.
            batches: Batches used up in them.
            metrics: The metrics of the last one.
        """
        if self._after is not None:
            self.state = self._after
        new = batches - self.seen.batches
        if metrics["skipped_in_row"] == 0:
            self.applied += new
        told = {name: value for name, value in metrics.items() if name not in TIMED}
        self.seen = Seen(step, batches, told, new)

    def decide(self, decision: Any) -> tuple[State, dict[str, Any]]:
        """Takes what the controller's `update` returned: how the next step is taken.

        Returns:
            The new state and the fields of `control`, JSON-serialisable.

        Raises:
            ControlError: It is not what a controller may return.
        """
        match decision:
            case (dict() as state, Control() as control):
                self._check(control)
            case _:
                self._fail("must return its state, a dictionary, and a Control", decision)
        try:
            self._after = json.loads(json.dumps(state))  # as a resumed run has it
        except (TypeError, ValueError):
            self._fail("must have a state that JSON can hold", state)
        self.control = control._replace(
            learning_rate=None if control.learning_rate is None else float(control.learning_rate),
            weights=control.weights and _floats(control.weights),
            metrics=_floats(control.metrics),
        )
        return self._after, self.control._asdict()

    def _check(self, control: Control) -> None:
        rate, batches, weights, note, metrics = control
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            self._fail("must give batches of 1 or more", batches)
        if rate is not None and not (isinstance(rate, Real) and 0 <= rate < math.inf):
            self._fail("must give a learning_rate that is finite and not below 0, or None", rate)
        if weights is not None:
            named = self.sources - {""}
            if not (isinstance(weights, Mapping) and named and weights.keys() == named):
                names = ", ".join(sorted(named)) or "none"
                self._fail(f"must give weights of all named sources ({names}), or None", weights)
            shares = list(weights.values())
            if not all(isinstance(x, Real) and x > 0 for x in shares):
                self._fail("must give positive weights", dict(weights))
            if not abs(math.fsum(shares) - 1) <= ROUNDING:
                self._fail("must give weights of sum 1", dict(weights))
        if not isinstance(note, str):
            self._fail("must give a note that is text", note)
        if not all(isinstance(x, Real) for x in metrics.values()):
            self._fail("must give metrics that are numbers by name", metrics)

    def _fail(self, rule: str, found: Any) -> NoReturn:
        raise ControlError(f"controller {self.name!r} {rule}, got {found!r}.")

    def record(self) -> dict[str, Any]:
        """Returns what a checkpoint holds: the state before `decide`, and what it is told."""
        return {"state": self.state, "applied": self.applied, "seen": self.seen._asdict()}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Goes on from what `record` returned."""
        self.state, self.applied = dict(record["state"]), record["applied"]
        seen = dict(record["seen"])
        # Before `step_batches` was recorded, states held where the last step began, if at all.
        began = self.state.pop("used", seen["batches"] - 1)
        self.seen = Seen(**{"step_batches": seen["batches"] - began, **seen})


def _floats(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(x) for name, x in numbers.items()}


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

    def add(self, key: tuple[Any, ...], losses: Losses) -> None:
        """Adds a trial, and writes the file.

        Args:
            key: As in `find`.
            losses: Its losses.

        Raises:
            WriteError: The file cannot be written.
        """
        self._found[key] = losses
        lines = [json.dumps([*key, *found]) + "\n" for key, found in self._found.items()]
        with writing(repr(str(self._path))):
            write_whole(self._path, "".join(lines).encode())


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
