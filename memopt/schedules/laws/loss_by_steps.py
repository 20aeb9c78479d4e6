"""Kaplan's law: the loss by parameters, steps and batch."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Unpack

import numpy as np
from scipy.optimize import brentq

from memopt.schedules.laws.critical_batch import critical_batch
from memopt.schedules.laws.fitting import Bootstrap, LossFit, fit_loss, heights

#: Exponents to start from: of parameters, of steps, and of the loss in the critical batch.
EXPONENTS_N, EXPONENTS_S, EXPONENTS_B = (0.05, 0.1, 0.2, 0.5), (0.2, 0.5, 0.8, 1.2), (0.1, 0.2, 0.4)


class StepsLaw(NamedTuple):
    """Loss (N_c / N)^α_N + (S_c / S_min)^α_S with S_min = S / (1 + B_crit / B).

    B_crit = B* / L^(1/α_B) depends on the loss itself, see `critical_batch`.

    Attributes:
        parameter_scale: N_c.
        alpha_n: α_N.
        step_scale: S_c.
        alpha_s: α_S.
        batch_scale: B*, in the unit of the batches.
        alpha_b: α_B.

    Example:
        >>> kaplan = StepsLaw(6.5e13, 0.077, 2.1e3, 0.76, 2e8, 0.21)
        >>> round(kaplan(parameters=1e8, steps=1e5, batch=5e5), 2)
        2.94
    """

    parameter_scale: float
    alpha_n: float
    step_scale: float
    alpha_s: float
    batch_scale: float
    alpha_b: float

    def __call__(self, parameters: float, steps: float, batch: float) -> float:
        """Returns the loss of a model of N parameters after S steps with batches of B."""
        lowest = (self.parameter_scale / parameters) ** self.alpha_n

        def excess(log_loss: float) -> float:
            critical = critical_batch(math.exp(log_loss), self.batch_scale, self.alpha_b)
            by_steps = (self.step_scale * (1 + critical / batch) / steps) ** self.alpha_s
            return log_loss - math.log(lowest + by_steps)

        low = high = math.log(lowest)  # the loss is above; excess grows with it
        while excess(high) < 0:
            high += 1
        return math.exp(brentq(excess, low, high, xtol=1e-14) if high > low else low)


def fit_steps_law(
    parameters: Sequence[float],
    steps: Sequence[float],
    batches: Sequence[float],
    losses: Sequence[float],
    **bootstrap: Unpack[Bootstrap],
) -> LossFit[StepsLaw]:
    """Fits Kaplan's L(N, S, B) to runs or to points of their curves.

    The critical batch in the fit is that at the observed loss, which makes the law explicit.

    Range: sizes between those of the runs, after the warm-up; `LossFit.predict` warns outside of
    them. The law knows no schedule: all points should have decayed by the same share of their run,
    or not at all.

    Doubts: α_B and B* are known only as far
    as the runs' batches are on both sides of the critical batch, and α_B only if the losses spread;
    look at their intervals. Points of one curve are not independent, so that the bootstrap over
    points is too narrow: give one point a run for intervals. Kaplan's exponent of N comes from runs
    whose schedules did not end with them; prefer `fit_token_law` for the choice of N.

    Args:
        parameters: N of each.
        steps: S.
        batches: B, in tokens or rows; the critical batch is in the same.
        losses: The loss, in nats a token.
        **bootstrap: See `memopt.schedules.laws.Bootstrap`.

    Raises:
        ValueError: There are fewer than 7 points, or values that are not above 0.

    References:
        Kaplan et al., Scaling Laws for Neural Language Models, 2020,
        https://arxiv.org/abs/2001.08361, equations 5.3, 5.4 and 5.6; table 3 has their constants.

    Example:
        >>> kaplan = StepsLaw(6.5e13, 0.077, 2.1e3, 0.76, 2e8, 0.21)
        >>> runs = [(n, s, b) for n in (1e6, 1e8) for s in (3e3, 1e5) for b in (3e4, 3e5, 3e6)]
        >>> fit = fit_steps_law(*zip(*runs), [kaplan(*run) for run in runs], resamples=0)
        >>> f"{fit.law(1e7, 1e4, 1e5) / kaplan(1e7, 1e4, 1e5):.4f}"
        '1.0000'
    """

    def least_steps(x: np.ndarray, runs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Log of S_min by the numbers log B* and 1/α_B."""
        batch, power = x
        log_ratio = batch - power * np.log(runs["loss"]) - np.log(runs["batch"])
        return np.log(runs["steps"]) - np.logaddexp(0, log_ratio)

    def log_loss(x: np.ndarray, runs: Mapping[str, np.ndarray]) -> np.ndarray:
        n, alpha_n, s, alpha_s = x[:4]
        by_model = n - alpha_n * np.log(runs["parameters"])
        return np.logaddexp(by_model, s - alpha_s * least_steps(x[4:], runs))

    def starts(runs: Mapping[str, np.ndarray]) -> Iterable[np.ndarray]:
        middle = np.log(runs["loss"]).mean()
        critical = np.quantile(np.log(runs["batch"]), [0, 0.5, 1])
        grid = itertools.product(EXPONENTS_N, EXPONENTS_S, EXPONENTS_B, critical)
        for alpha_n, alpha_s, alpha_b, log_batch in grid:
            batch = np.array([log_batch + middle / alpha_b, 1 / alpha_b])
            by_steps = np.exp(-alpha_s * least_steps(batch, runs))
            terms = np.stack([runs["parameters"] ** -alpha_n, by_steps], axis=1)
            n, s = np.log(heights(terms, runs["loss"]))
            yield np.array([n, alpha_n, s, alpha_s, *batch])

    def make(x: np.ndarray) -> StepsLaw:
        n, alpha_n, s, alpha_s, batch, power = map(float, x)
        scales = np.exp([n / alpha_n, s / alpha_s, batch]).tolist()
        return StepsLaw(scales[0], alpha_n, scales[1], alpha_s, scales[2], 1 / power)

    runs = {"parameters": parameters, "steps": steps, "batch": batches, "loss": losses}
    return fit_loss(make, log_loss, starts, runs, numbers=6, **bootstrap)
