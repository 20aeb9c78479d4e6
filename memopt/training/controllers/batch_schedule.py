"""A batch size by a schedule."""

from memopt import schedules
from memopt.training.control import Control, Controller, Plan, Seen, State, Trial


def batch_schedule(
    plan: Plan,
    *,
    shape: str = "doubling",
    first: int = 1,
    last: int = 8,
    length: int | None = None,
) -> Controller:
    """Grows the batch by a schedule of the tokens used up, see `memopt.schedules.batch_schedule`.

    It does not pay where a step takes longer in proportion to its batch: on one device, unless the
    update is slow. The learning rate is the schedule's, whatever the batch. Each new size is
    compiled once.

    With `release` what enters each block is kept for all micro-batches of a step: its memory grows
    with the batch.

    Args:
        plan: The run.
        shape: "doubling" or "ramp", or another of `memopt.schedules.batch_names()`.
        first: Batches of a step at the beginning.
        last: Batches of a step at the end.
        length: Batches that are used up until then; by default half of the run.

    Raises:
        ValueError: The shape is unknown, or a number is out of range.
    """
    length = max(1, plan.steps // 2) if length is None else length
    schedules.batch_schedule(shape, first, last, length)  # refuses what cannot be

    def update(state: State, seen: Seen, trial: Trial) -> tuple[State, Control]:
        # The length at the beginning, also if the run is made longer.
        grow = schedules.batch_schedule(shape, first, last, state["length"])
        return state, Control(batches=grow(seen.batches))

    return Controller(lambda: {"length": length}, update)
