"""A batch size that follows the measured critical batch."""

import math

from memopt.errors import check_above_zero, check_at_least, check_between
from memopt.schedules.laws import noise_scale
from memopt.training.control import Control, Controller, Plan, Seen, State, Trial
from memopt.training.controllers.whole_batches import (
    is_measured,
    micro_batches,
    whole_batches,
)


def noise_ramp(
    plan: Plan,
    *,
    share: float = 1.0,
    decay: float = 0.98,
    shrinks: bool = False,
    most: int = 16,
) -> Controller:
    """Makes the batch a share of the gradient noise scale, which estimates the critical batch.

    The noise scale tr Σ / ‖G‖² is the batch, in rows, whose gradient is as much noise as signal:
    smaller batches make nearly as much progress a token, larger ones less. It grows while the loss
    falls. tr Σ and ‖G‖² are measured from the micro-batches of each step, see
    `memopt.schedules.laws.noise_scale`, and averaged over steps before they are divided; the weight
    of the averages is divided out. The batch changes when it is above 1 − 1/e, after
    1 / (1 − decay) steps. It is the run's batch times 1, 2, 4, 8 …, rounded up, of which each is
    compiled once.

    It does not pay if the noise scale is below the run's batch throughout; nor where a step takes
    longer in proportion to its batch: on one device, unless the update is slow. The noise scale is
    that of SGD: Adam's critical batch is of the same order, not equal. The learning rate is the
    schedule's, whatever the batch.

    The metrics show the noise scale in rows, of the averages, as `noise_scale`.

    With `release` what enters each block is kept for all micro-batches of a step: its memory grows
    with the batch.

    Args:
        plan: The run; its batches are worked through in two micro-batches or more.
        share: The batch as a share of the noise scale.
        decay: The decay of the averages a step; 0.98 averages over about 50 steps.
        shrinks: Let the batch shrink, too.
        most: Batches of a step at most.

    Raises:
        ValueError: An option is out of range.

    References:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018,
        https://arxiv.org/abs/1812.06162, section 2 and appendix A.1.
    """
    check_above_zero("share", share)
    check_between("decay", decay, 0.0, 1.0)
    check_at_least("most", most, 1)
    average = lambda old, new: decay * old + (1 - decay) * new

    def update(state: State, seen: Seen, trial: Trial) -> tuple[State, Control]:
        if not is_measured(seen):
            return state, Control(batches=state["batches"])
        noise = noise_scale(
            seen.metrics["micro_square"],
            seen.metrics["gradient_norm"] ** 2,
            *micro_batches(seen, plan),
        )
        new = {
            "trace": average(state["trace"], noise.trace),
            "square": average(state["square"], noise.square),
            "weight": average(state["weight"], 1.0),
        }
        batches = state["batches"]
        scale = new["trace"] / new["square"] if new["square"] > 0 else math.inf
        if new["weight"] >= 1 - 1 / math.e and new["trace"] > 0:
            batches = whole_batches(share * scale, plan, most)
            batches = batches if shrinks else max(batches, state["batches"])
        state = new | {"batches": batches}
        return state, Control(batches=batches, metrics={"noise_scale": scale})

    start = {"batches": 1, "trace": 0.0, "square": 0.0, "weight": 0.0}
    return Controller(lambda: dict(start), update, "norms")
