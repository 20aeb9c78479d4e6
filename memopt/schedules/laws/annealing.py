"""Annealing law: the loss after every step of a run, from the learning rates of its steps."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize, nnls
from scipy.signal import lfilter
from scipy.special import huber

from memopt.errors import check_between

#: How much of a fall of the rate still counts a step later, in the paper.
DECAY = 0.999

#: Errors of the logarithm of the loss above this count linearly, in the paper.
DELTA = 1e-3

#: Exponents from which the search starts.
EXPONENTS = (0.1, 0.3, 1.0)

#: Points that fit four parameters and leave one to show an error.
MIN_POINTS = 5

#: How far the highest rate may be from those of the fitted curves, as a part of it.
SAME_PEAK = 0.01


class Curve(NamedTuple):
    """Losses of a run. A tuple of the three does as well.

    Attributes:
        rates: Learning rate of every step, (T,).
        steps: Numbers of steps, 1 … T, after which the loss was measured, (n,).
        losses: The losses, (n,).
    """

    rates: Any
    steps: Any
    losses: Any


class AnnealingLaw(NamedTuple):
    """The law L = L0 + A·S1^−alpha − C·S2 with its parameters; see `fit_annealing`.

    Attributes:
        L0: Loss that an endless run approaches.
        A: Loss above L0 where S1 is 1.
        C: Fall of the loss for each unit of S2.
        alpha: Exponent of S1.
        decay: λ, the part of a fall of the rate that counts a step later.
        peaks: Lowest and highest of the fitted curves' highest rates.
    """

    L0: float
    A: float
    C: float
    alpha: float
    decay: float
    peaks: tuple[float, float]

    def predict(self, rates: Any) -> np.ndarray:
        """Returns the loss after every step, (T,): infinite until a rate is above 0.

        It warns if the highest rate is not that of the fitted curves. During warm-up, the law has
        not been checked.

        Args:
            rates: Learning rate of every step, (T,).

        Raises:
            ValueError: Rates are not finite, below 0, or all 0.
        """
        rates = _check_rates("rates", rates)
        low, high = self.peaks
        peak = float(rates.max())
        if not low * (1 - SAME_PEAK) <= peak <= high * (1 + SAME_PEAK):
            fitted = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
            warnings.warn(
                f"rates go up to {peak:.3g}, and the annealing law was fitted to curves that go up "
                f"to {fitted}: it is valid for the highest rate that it was fitted to.",
                stacklevel=2,
            )
        s1, s2 = areas(rates, self.decay)
        with np.errstate(divide="ignore"):
            return self.L0 + self.A * s1**-self.alpha - self.C * s2


def areas(rates: Any, decay: float = DECAY) -> tuple[np.ndarray, np.ndarray]:
    """Returns the law's two areas after every step, S1 and S2, each (T,).

    With rates η_1 … η_T, after s steps S1 = Σ_{i≤s} η_i and
    S2 = Σ_{i≤s} Σ_{k=2}^{i} (η_{k−1} − η_k) λ^{i−k}: the inner sum starts with the change from the
    first rate to the second. Warm-up, the rise of the rates from the first step on, counts in S1;
    in S2 it does not, since there is no annealing yet that it would undo. Later rises count as
    negative. Both take O(T).

    The authors' code, known from copies of it, takes all rates of the warm-up for the highest one
    and refers to section 3.4 of the paper, which was not read. Here they are as they were, so that
    S1 is smaller, by half of the highest rate for each step of a linear warm-up.

    Args:
        rates: Learning rate of every step, (T,).
        decay: λ.

    Example:
        >>> s1, s2 = areas([1.0, 1.0, 0.5, 0.5], decay=0.5)
        >>> s1.tolist(), s2.tolist()
        ([1.0, 2.0, 2.5, 3.0], [0.0, 0.0, 0.5, 0.75])
    """
    rates = np.asarray(rates, float)
    falls = np.concatenate([[0.0], rates[:-1] - rates[1:]])
    falls[: 1 + _warmup_steps(rates)] = 0
    return np.cumsum(rates), np.cumsum(lfilter([1.0], [1.0, -decay], falls))


def fit_annealing(
    curves: Sequence[Curve | tuple[Any, Any, Any]], *, decay: float | Sequence[float] = DECAY
) -> AnnealingLaw:
    """Fits the annealing law to the curves of one or a few runs.

    The law is L = L0 + A·S1^−alpha − C·S2: a power of the sum of the rates, less what their fall
    gives, see `areas`. As in the paper, the parameters minimize the Huber loss (δ = 0.001) of
    errors in the logarithm of the loss, by L-BFGS-B from several starts: exponents, each with the
    other parameters by least squares. No parameter is below 0. The unit of the rates does not
    matter, since S1 and S2 are scaled before the fit.

    Range: the paper fits runs of tens of thousands of steps, of one model, batch and highest rate,
    and predicts other schedules of the same; `AnnealingLaw.predict` warns if the highest rate is
    another. Losses measured during warm-up are left out. Doubts:

    - With λ = 0.999, a fall of the rate takes about 1000 steps to have its effect, a small part of
      the paper's runs. For runs of a few thousand steps or fewer, or decays of a few hundred, give
      candidates for λ. It is chosen on the curves that are fitted, so that a prediction of
      another curve remains one.
    - Do not trust it for decays unlike the fitted ones. In our runs of 3000 steps, fitted to
      constant and cosine, it predicts the last loss of schedules that decay throughout within 1%,
      and that of WSD 3 to 4% too low; fitted to all, still 2 to 3% (`benchmarks.schedules`).
    - By the law, higher rates are always better, and steps with a rate of 0 lower the loss, as the
      paper's reviewers note. It does not tell the best highest rate, nor when training diverges.
    - It describes losses and is not derived. Its parameters make up for each other: L0 of a short
      curve says little about an endless run, and may be 0.

    Args:
        curves: One or more runs, `Curve` or tuples (rates, steps, losses). In one at least, the
            rate falls before the last loss: else nothing tells C.
        decay: λ, between 0 and 1; of several, the one with the best fit is taken.

    Raises:
        ValueError: Fewer than 5 losses after warm-up, a loss that is not a finite positive number,
            rates that are not finite, below 0 or all 0, steps outside 1 … T, or no falling rate.

    References:
        Tissue et al., Scaling Law with Learning Rate Annealing, 2024,
        https://arxiv.org/abs/2408.11029

    Example:
        >>> rates = np.linspace(1e-3, 1e-4, 5000)
        >>> steps = np.arange(500, 5001, 500)
        >>> law = AnnealingLaw(2.0, 0.5, 0.3, 0.4, decay=0.999, peaks=(1e-3, 1e-3))
        >>> found = fit_annealing([(rates, steps, law.predict(rates)[steps - 1])])
        >>> [round(x, 3) for x in found[:4]]
        [2.0, 0.5, 0.3, 0.4]
    """
    decays = (decay,) if isinstance(decay, int | float) else tuple(decay)
    if not curves or not decays:
        raise ValueError("curves and decay must each have one or more, got none.")
    for each in decays:
        check_between("decay", each, 0, 1)
    checked = [_check_curve(f"curve {i}", *curve) for i, curve in enumerate(curves)]
    losses = np.concatenate([curve.losses for curve in checked])
    if len(losses) < MIN_POINTS:
        raise ValueError(
            f"curves must have {MIN_POINTS} losses or more after warm-up, got {len(losses)}."
        )
    peaks = [float(curve.rates.max()) for curve in checked]
    fits = []
    for each in decays:
        at_points = [[x[c.steps - 1] for x in areas(c.rates, each)] for c in checked]
        s1, s2 = (np.concatenate(parts) for parts in zip(*at_points, strict=True))
        if not s2.max() > 0:
            raise ValueError("curves must have a learning rate that falls before the last loss.")
        objective, (l0, a, c, alpha) = _fit(s1 / s1.max(), s2 / s2.max(), losses)
        law = AnnealingLaw(
            L0=float(l0),
            A=float(a * s1.max() ** alpha),
            C=float(c / s2.max()),
            alpha=float(alpha),
            decay=float(each),
            peaks=(min(peaks), max(peaks)),
        )
        fits.append((objective, law))
    return min(fits)[1]


def _fit(s1: np.ndarray, s2: np.ndarray, losses: np.ndarray) -> tuple[float, np.ndarray]:
    """The lowest objective, and L0, A, C, alpha there."""

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        l0, a, c, alpha = x
        power = s1**-alpha
        predicted = np.maximum(l0 + a * power - c * s2, 1e-9)
        error = np.log(predicted / losses)
        slopes = np.stack([np.ones_like(s1), power, -s2, -a * power * np.log(s1)])
        gradient = slopes @ (np.clip(error, -DELTA, DELTA) / predicted)
        return float(huber(DELTA, error).sum()) / DELTA**2, gradient / DELTA**2

    def start(alpha: float) -> np.ndarray:
        design = np.stack([np.ones_like(s1), s1**-alpha, -s2], axis=1)
        return np.append(nnls(design / losses[:, None], np.ones_like(losses))[0], alpha)

    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 20_000, "maxfun": 40_000}
    bounds = [(0.0, None)] * 3 + [(1e-3, 10.0)]
    found = [
        minimize(objective, start(alpha), jac=True, bounds=bounds, options=options)
        for alpha in EXPONENTS
    ]
    best = min(found, key=lambda result: result.fun)
    return float(best.fun), best.x


def _warmup_steps(rates: np.ndarray) -> int:
    """How many steps the rate rises from the first on."""
    return int(np.logical_and.accumulate(np.diff(rates) > 0).sum())


def _check_rates(name: str, rates: Any) -> np.ndarray:
    rates = np.asarray(rates, float)
    if rates.ndim != 1 or not (np.isfinite(rates).all() and (rates >= 0).all() and rates.any()):
        raise ValueError(
            f"{name} must be a sequence of finite learning rates, none below 0 and not all 0, got "
            f"{np.array2string(rates, threshold=6)}."
        )
    return rates


def _check_curve(name: str, rates: Any, steps: Any, losses: Any) -> Curve:
    rates = _check_rates(f"rates of {name}", rates)
    steps, losses = np.asarray(steps), np.asarray(losses, float)
    if steps.shape != losses.shape or steps.ndim != 1:
        raise ValueError(
            f"steps and losses of {name} must be sequences of one length, got the shapes "
            f"{steps.shape} and {losses.shape}."
        )
    if steps.size and not (
        np.issubdtype(steps.dtype, np.integer) and 1 <= steps.min() <= steps.max() <= len(rates)
    ):
        raise ValueError(
            f"steps of {name} must be whole numbers from 1 to {len(rates)}, got "
            f"{np.array2string(steps, threshold=6)}."
        )
    bad = ~(np.isfinite(losses) & (losses > 0))
    if bad.any():
        raise ValueError(
            f"losses of {name} must be finite and above 0, got {losses[bad][0]} after step "
            f"{steps[bad][0]}: leave such points out."
        )
    kept = steps > _warmup_steps(rates)
    return Curve(rates, steps[kept].astype(int), losses[kept])
