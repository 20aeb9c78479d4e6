"""AdAdaGrad's batch size: as large as a test of the gradient's variance asks for."""

import math
from typing import Literal

from memopt.errors import check_above_zero, check_at_least
from memopt.schedules.laws import noise_scale
from memopt.training.control import Control, Controller, Plan, Seen, State, Trial
from memopt.training.controllers.whole_batches import (
    is_measured,
    micro_batches,
    whole_batches,
)
from memopt.training.measure import Measure

Test = Literal["norm", "inner_product"]


def adadagrad(
    plan: Plan,
    *,
    test: Test = "norm",
    eta: float = 0.5,
    theta: float = 0.5,
    nu: float = 1.0,
    every: int = 1,
    most: int = 16,
) -> Controller:
    """Grows the batch when its gradient is too noisy for its length.

    With Var the variance of one row's gradient g_i, estimated without bias from the micro-batches
    of a step, and ḡ that step's gradient, a batch should have at least so many rows::

        norm:           Σ Var(g_i) / (η² ‖ḡ‖²)                            Σ over all parameters
        inner_product:  Var⟨g_i, ḡ⟩ / (θ² ‖ḡ‖⁴)                           and also
                        Σ Var(g_i − ⟨g_i, ḡ⟩ ḡ / ‖ḡ‖²) / (ν² ‖ḡ‖²)        orthogonal to ḡ

    The batch never shrinks. It does not pay where a step takes longer in proportion to its batch:
    on one device, unless the update is slow. A larger batch makes less progress a token. The
    learning rate is the schedule's, whatever the batch. Any optimizer may be used; the paper's are
    AdaGrad and AdaGrad-Norm (`memopt.adagrad_norm`).

    Ours: variances between micro-batches in place of those between rows, which would take a
    gradient of each row (as between workers in Lau et al., Adaptive Batch Size Schedules for
    Distributed Training of Language Models, 2024, https://arxiv.org/abs/2412.21124); batches of the
    run times 1, 2, 4, 8 …, rounded up, of which each is compiled once; and one inner product of
    whole gradients, as in the paper, while the authors' code adds the variances of one for each
    parameter. Every step is measured: "inner_product" computes each gradient twice.

    The metrics show how many rows the test asked for as `tested_rows`.

    With `release` what enters each block is kept for all micro-batches of a step: its memory grows
    with the batch.

    Args:
        plan: The run; its batches are worked through in two micro-batches or more.
        test: "norm", or "inner_product", which lets noise pass that turns no step around, and so
            grows the batch later.
        eta: The η of the norm test; smaller is stricter. Theirs is 0.1 (MNIST, ImageNet) or 0.5
            (CIFAR).
        theta: The θ of the inner-product test.
        nu: The ν of its orthogonality test.
        every: Steps from test to test.
        most: Batches of a step at most.

    Raises:
        ValueError: An option is out of range.

    References:
        Lau et al., AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods, 2024,
        https://arxiv.org/abs/2402.11215, and their code, for the defaults.
    """
    for name, value in {"eta": eta, "theta": theta, "nu": nu}.items():
        check_above_zero(name, value)
    check_at_least("every", every, 1)
    check_at_least("most", most, 1)

    def update(state: State, seen: Seen, trial: Trial) -> tuple[State, Control]:
        if not is_measured(seen) or seen.step % every:
            return state, Control(batches=state["batches"])
        shape = micro_batches(seen, plan)
        rows = (
            norm_test(seen, *shape, eta)
            if test == "norm"
            else inner_product_test(seen, *shape, theta, nu)
        )
        batches = max(state["batches"], whole_batches(rows, plan, most))
        return {"batches": batches}, Control(batches=batches, metrics={"tested_rows": rows})

    measure: Measure = "norms" if test == "norm" else "inner_products"
    return Controller(lambda: {"batches": 1}, update, measure)


def norm_test(seen: Seen, micro_rows: int, micro_batches: int, eta: float) -> float:
    """Returns the rows that the norm test asks for."""
    square = seen.metrics["gradient_norm"] ** 2
    noise = noise_scale(seen.metrics["micro_square"], square, micro_rows, micro_batches)
    return _ratio(noise.trace, eta**2 * square)


def inner_product_test(
    seen: Seen, micro_rows: int, micro_batches: int, theta: float, nu: float
) -> float:
    """Returns the rows that the inner-product test and the orthogonality test ask for."""
    square = seen.metrics["gradient_norm"] ** 2
    if square == 0:
        return norm_test(seen, micro_rows, micro_batches, nu)
    along = seen.metrics["micro_dot_square"]
    across = seen.metrics["micro_square"] - along / square
    shape = micro_rows, micro_batches
    return max(
        _ratio(noise_scale(along, square**2, *shape).trace, theta**2 * square**2),
        _ratio(noise_scale(across, 0.0, *shape).trace, nu**2 * square),
    )


def _ratio(variance: float, bound: float) -> float:
    if variance <= 0:  # rounding may leave less than none
        return 1.0
    return variance / bound if bound > 0 else math.inf
