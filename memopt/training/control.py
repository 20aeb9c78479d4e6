"""Controllers: what decides between steps how a run goes on.

A controller is a pair of pure functions, as an Optax transformation is. After each step `update` is
told its metrics, and says how the next steps are taken: with which learning rate, from how many
batches, from which mixture of the data. Its state is a JSON object, which each checkpoint holds
with what `update` was told last: a run that was killed makes the same decisions again. Of several
processes the first one decides for all.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from memopt.training.measure import Measure

#: A controller's state, JSON-serialisable; floats survive JSON exactly.
State = dict[str, Any]


class Plan(NamedTuple):
    """The run that a controller is made for.

    Attributes:
        steps: Its length, in batches; the schedule counts batches, too.
        warmup_steps: Batches in which the learning rate warms up.
        learning_rate: The highest learning rate of its schedule.
        batch_size: Rows of a batch.
        accumulation: Micro-batches of a batch.
        sources: Names of the sources of its data, with their weights at the beginning; one source
            that has no name is "".
        begins: Batches before the present schedule: 0, unless a resumed run was given another one.
    """

    steps: int
    warmup_steps: int
    learning_rate: float
    batch_size: int
    accumulation: int
    sources: Mapping[str, float]
    begins: int = 0


class Seen(NamedTuple):
    """The run after a step, as a controller is told.

    Attributes:
        step: Steps taken.
        batches: Batches used up in them.
        metrics: The last step's metrics by name, with `val_loss`, and "val_loss NAME" for each
            named source, if it was evaluated; empty before the first step.
        step_batches: Batches used up in the last step.
    """

    step: int
    batches: int
    metrics: Mapping[str, float]
    step_batches: int = 1


class Control(NamedTuple):
    """Settings of the next step.

    Attributes:
        learning_rate: The learning rate, in place of the schedule with its warm-up; None: that of
            the schedule.
        batches: Batches that a step uses; each in as many micro-batches as before. A new number is
            compiled for once.
        weights: Positive share of each named source of the data, of sum 1; None: those of the step
            before, or of a resumed run's checkpoint.
        note: A line for the user, shown when it changes.
        metrics: Numbers by name to record with the metrics of the next step.
    """

    learning_rate: float | None = None
    batches: int = 1
    weights: Mapping[str, float] | None = None
    note: str = ""
    metrics: Mapping[str, float] = MappingProxyType({})


class Losses(NamedTuple):
    """Losses in a trial, by the number of its steps after which they were taken.

    Attributes:
        steps: From 1 on.
        losses: Training losses, or validation losses if they were asked for; NaN from the first
            step on that was not applied.
    """

    steps: Sequence[int]
    losses: Sequence[float]


class Trial(Protocol):
    """Trains for a number of steps, and restores all as it was before."""

    def __call__(
        self, learning_rate: float, steps: int, *, validate_every: int | None = None
    ) -> Losses:
        """Returns the losses of steps with a constant learning rate, on the batches to come.

        Each step takes one batch. The state is saved before, as a checkpoint like others.

        Args:
            learning_rate: The learning rate.
            steps: How many steps.
            validate_every: Return validation losses after so many steps each; None: the training
                loss of each step.
        """


class Controller(NamedTuple):
    """A pair of pure functions.

    Attributes:
        init: Returns the state before the first step.
        update: Maps the state, what was seen after a step, and what tries a learning rate, to the
            new state and what applies to the next step. It is called before the first step, too.
        measure: What every step has to measure, if anything; its batches are then worked through
            in two micro-batches or more.
    """

    init: Callable[[], State]
    update: Callable[[State, Seen, Trial], tuple[State, Control]]
    measure: Measure | None = None
