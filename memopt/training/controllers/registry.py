"""The table of controllers."""

from collections.abc import Mapping
from typing import Any, get_type_hints

from memopt.choices import Choice
from memopt.errors import check_choice
from memopt.training.config import check_type
from memopt.training.control import Controller, Plan
from memopt.training.controllers.adadagrad import adadagrad
from memopt.training.controllers.autolrs import autolrs
from memopt.training.controllers.batch_schedule import batch_schedule
from memopt.training.controllers.dynamic_mixture import dynamic_mixture
from memopt.training.controllers.noise_ramp import noise_ramp

#: For controllers that estimate the noise of gradients.
MICRO_BATCHES = "--accumulation 2 or more, since it compares the gradients of micro-batches"

CONTROLLERS: dict[str, Choice] = {
    "adadagrad": Choice(
        adadagrad,
        "Choose it if many devices share a step and the batch should grow as soon as its gradient "
        "is too noisy; it does not pay on one device, where a larger batch only takes longer.",
        "https://arxiv.org/abs/2402.11215",
        MICRO_BATCHES,
    ),
    "autolrs": Choice(
        autolrs,
        "Choose it if no schedule is known to suit the model or the data: it finds the learning "
        "rate of each stage by trials. It does not pay if one is known, since it doubles the "
        "steps, nor in runs of fewer than some thousand steps.",
        "https://arxiv.org/abs/2105.10762",
        "scikit-learn: pip install 'memopt[autolrs]'",
    ),
    "batch_schedule": Choice(
        batch_schedule,
        "Choose it if many devices share a step and the growth of the batch is known beforehand; "
        "it does not pay on one device, where a larger batch only takes longer.",
    ),
    "dynamic_mixture": Choice(
        dynamic_mixture,
        "Choose it if the data has several sources and you know what loss each should reach; it "
        "does not pay without such references, or if one source alone matters.",
        "https://arxiv.org/abs/2310.06694",
        "--data NAME=SOURCE of two or more, and the option reference",
    ),
    "noise_ramp": Choice(
        noise_ramp,
        "Choose it if many devices share a step and the batch should stay near the critical one; "
        "it does not pay if the run's batch is above that throughout, nor on one device.",
        "https://arxiv.org/abs/1812.06162",
        MICRO_BATCHES,
    ),
}
"""Every controller by name.

Each maps a `Plan`, and options by keyword with annotated types, to a `Controller`.
"""


def controller(name: str, plan: Plan, options: Mapping[str, Any]) -> Controller:
    """Returns a controller by name.

    Args:
        name: One of `CONTROLLERS`.
        plan: The run.
        options: Its options by keyword.

    Raises:
        ValueError: There is no such controller or option, one is of another type, or it cannot work
            in this run.
    """
    check_choice("controller", name, CONTROLLERS)
    entry = CONTROLLERS[name]
    types = get_type_hints(entry.make)
    for option, value in options.items():
        check_choice(f"option of {name}:", option, entry.defaults)
        check_type(option, value, types[option])
    made = entry.make(plan, **options)
    if made.measure and plan.accumulation < 2:
        raise ValueError(
            f"controller {name!r} compares the gradients of micro-batches: --accumulation must be "
            f"at least 2, got {plan.accumulation}."
        )
    return made
