"""Batches of a step from a number of rows, for controllers of the batch size."""

import math

from memopt.errors import check_at_least
from memopt.training.control import Plan, Seen


def whole_batches(rows: float, plan: Plan, most: int) -> int:
    """Returns the next of 1, 2, 4, 8 … batches that holds so many rows, at most `most`.

    Each size is compiled once, hence powers of two.

    Args:
        rows: How many; may be infinite.
        plan: The run.
        most: The largest number of batches.

    Example:
        >>> plan = Plan(100, 10, 1e-3, 4, 2, 32, 10, {"": 1.0})  # batches of 4 rows
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


def check_micro_batches(controller: str, plan: Plan, most: int) -> None:
    """Raises unless there are micro-batches to compare.

    Raises:
        ValueError: Names the option, and what to change.
    """
    if plan.accumulation < 2:
        raise ValueError(
            f"controller {controller!r} compares the gradients of micro-batches: --accumulation "
            f"must be at least 2, got {plan.accumulation}."
        )
    check_at_least("most", most, 1)
