"""Batches of a step from a number of rows, for controllers of the batch size."""

import math

from memopt.training.control import Plan, Seen


def whole_batches(rows: float, plan: Plan, most: int) -> int:
    """Returns the next of 1, 2, 4, 8 … batches that holds so many rows, at most `most`.

    Each size is compiled once, hence powers of two.

    Args:
        rows: How many; may be infinite.
        plan: The run.
        most: The largest number of batches.

    Example:
        >>> plan = Plan(100, 10, 1e-3, 4, 2, {"": 1.0})  # batches of 4 rows
        >>> [whole_batches(rows, plan, most=6) for rows in (0, 4, 5, 9, 17, math.inf)]
        [1, 1, 2, 4, 6, 6]
    """
    if rows >= most * plan.batch_size:
        return most
    return min(most, 1 << (max(1, math.ceil(rows / plan.batch_size)) - 1).bit_length())


def is_measured(seen: Seen) -> bool:
    """Whether the last step was applied and all that it measured is finite."""
    applied = seen.metrics.get("skipped_in_row") == 0
    measured = (x for name, x in seen.metrics.items() if name.startswith(("micro_", "gradient_")))
    return applied and all(map(math.isfinite, measured))


def micro_batches(seen: Seen, plan: Plan) -> tuple[int, int]:
    """Returns the rows of a micro-batch, and how many the last step had.

    Example:
        >>> micro_batches(Seen(3, 6, {}, step_batches=4), Plan(100, 10, 1e-3, 8, 2, {"": 1.0}))
        (4, 8)
    """
    return plan.batch_size // plan.accumulation, plan.accumulation * seen.step_batches
