"""AutoLRS: the learning rate of each stage of a run by Bayesian optimization."""

import math
import warnings
from collections.abc import Sequence

import numpy as np

from memopt.errors import check_at_least
from memopt.schedules.forecast import forecast
from memopt.training.control import Control, Controller, Losses, Plan, Seen, State, Trial

#: The score of a learning rate whose losses are not finite, the authors'.
WORST = 1e6

#: Steps of a trial, at least: a forecast needs as many losses.
FEWEST = 4

#: Validation losses of a trial, about: one every τ'/16 steps.
VALIDATIONS = 16

#: Learning rates that can be tried, evenly spaced on a logarithmic scale.
GRID = 1001

#: By default learning rates from 1/64 to 4 times that of the run are tried.
LOWEST, HIGHEST = 1 / 64, 4.0


def autolrs(
    plan: Plan,
    *,
    lr_min: float | None = None,
    lr_max: float | None = None,
    candidates: int = 10,
    trial_steps: int = 100,
    stage_steps: int = 1000,
    most_stage_steps: int = 8000,
    kappa: float = 1e6,
    seed: int = 0,
) -> Controller:
    """Tries learning rates before each stage of a run, and keeps the one with the best forecast.

    After the warm-up, with the schedule's learning rates, a run is cut into stages of τ steps, each
    with a constant learning rate. Before a stage, candidates are tried for τ' steps each, from the
    same state and on the same batches, and the loss after τ steps is forecast from theirs. τ and τ'
    double from stage to stage until τ is `most_stage_steps`. Stages up to the first one of that
    length are judged by training losses, later ones by validation losses every τ'/16 steps. The
    last stage is as long as there are steps left, and its trials are shorter in proportion; if they
    had fewer than 4 steps, the stage before goes on. So it does if a run is resumed with another
    schedule that has too few steps for a trial.

    The search takes `candidates` · τ' / τ as many steps as the run: by default as many again, so
    that the run costs twice its steps, and evaluations besides.

    If the losses of all candidates are not finite, the learning rate of the stage before stays;
    until a stage has found one, the schedule is followed.

    Args:
        plan: The run.
        lr_min: The lowest learning rate that is tried; by default 1/64 of the run's highest one.
        lr_max: The highest learning rate that is tried; by default 4 times the run's highest one.
        candidates: Learning rates that are tried before a stage.
        trial_steps: Steps of a trial before the first stage, τ'; at least 4.
        stage_steps: Steps of the first stage, τ.
        most_stage_steps: Steps of the longest stages.
        kappa: The weight of uncertainty in choosing the next candidate: by default nothing else
            counts, and candidates spread evenly; with 2 they gather about the best.
        seed: Decides the first candidate of each stage.

    Raises:
        ImportError: If scikit-learn is missing.
        ValueError: If an option is out of range, or a new run has too few steps for one trial.

    References:
        Jin et al., AutoLRS, 2021, https://arxiv.org/abs/2105.10762; the defaults are their code's.
    """
    low = LOWEST * plan.learning_rate if lr_min is None else lr_min
    high = HIGHEST * plan.learning_rate if lr_max is None else lr_max
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"lr_min and lr_max must be above 0, the second above the first, got {low} and {high}."
        )
    check_at_least("candidates", candidates, 1)
    check_at_least("trial_steps", trial_steps, FEWEST)
    check_at_least("stage_steps", stage_steps, trial_steps)
    check_at_least("most_stage_steps", most_stage_steps, stage_steps)
    check_at_least("kappa", kappa, 0)
    _check_installed()

    def length(number: int) -> int:
        return min(stage_steps * 2 ** (number - 1), most_stage_steps)

    def trial_length(number: int, steps: int) -> int:
        """Steps of a trial for a stage that may be shorter than others."""
        return trial_steps * length(number) // stage_steps * steps // length(number)

    after = plan.steps - plan.warmup_steps
    if not plan.begins and trial_length(1, min(length(1), after)) < FEWEST:
        raise ValueError(
            f"controller autolrs needs at least {math.ceil(FEWEST * stage_steps / trial_steps)} "
            f"steps after the warm-up, got {after}: raise --steps or trial_steps."
        )

    def init() -> State:
        return {"stage": 0, "ends": 0, "learning_rate": None, "tried": [], "search_steps": 0}

    def update(state: State, seen: Seen, trial: Trial) -> tuple[State, Control]:
        number, begins = state["stage"] + 1, max(plan.warmup_steps, state["ends"])
        steps = min(length(number), plan.steps - seen.batches)
        tried_for = trial_length(number, steps)
        if seen.batches < begins:
            return state, control(state)
        if tried_for < FEWEST:
            return state, control(state, goes_on_from=begins)
        validates = number > 1 and length(number - 1) == most_stage_steps
        every = max(1, tried_for // VALIDATIONS) if validates else None
        tried: list[list[float]] = []
        for _ in range(candidates):
            rate = next_rate(tried, low, high, kappa=kappa, seed=(seed, number))
            losses = trial(rate, tried_for, validate_every=every)
            whole = len(losses.losses) == tried_for // (every or 1)
            tried.append([rate, score(losses, steps, validation=validates) if whole else WORST])
        best, least = min(tried, key=lambda x: x[1])
        state = {
            "stage": number,
            "ends": seen.batches + steps,
            "learning_rate": best if least < WORST else state["learning_rate"],
            "tried": tried,
            "search_steps": state["search_steps"] + candidates * tried_for,
        }
        return state, control(state)

    def control(state: State, goes_on_from: int | None = None) -> Control:
        rate, tried = state["learning_rate"], state["tried"]
        keeps = "the schedule goes on" if rate is None else "the learning rate stays"
        if goes_on_from is not None:
            note = f"the batches after {goes_on_from} are too few for trials: {keeps}"
        elif not state["stage"]:
            note = f"the schedule up to batch {plan.warmup_steps}, then learning rates of trials"
        else:
            found = ", ".join(
                f"{score:.4f} with {rate:.3g}" for rate, score in tried if score < WORST
            )
            note = (
                f"stage {state['stage']} up to batch {state['ends']} in place of the schedule, "
                f"searched for {state['search_steps']} steps so far, "
            ) + (f"forecast losses {found}" if found else f"no candidate stays finite: {keeps}")
        return Control(rate, note=note)

    return Controller(init, update)


def score(losses: Losses, at: int, *, validation: bool) -> float:
    """Returns the forecast of the loss at a step; `WORST` if it is not finite."""
    found = forecast(losses.steps, losses.losses, at, validation=validation)
    return found if math.isfinite(found) else WORST


def next_rate(
    tried: Sequence[Sequence[float]],
    low: float,
    high: float,
    *,
    kappa: float,
    seed: Sequence[int],
) -> float:
    """Returns the learning rate to try next.

    The first one is drawn log-uniformly. After it, a Gaussian process of the logarithm is fitted to
    the scores, and the rate, of those not tried, with the least lower confidence bound is next: the
    mean less κ standard deviations.

    Args:
        tried: The rates tried before, with their scores.
        low: The lowest rate.
        high: The highest one.
        kappa: The weight κ of the standard deviation.
        seed: Decides the first one.

    Example:
        >>> tried = [(1e-3, 3.2), (1e-2, 3.0), (1e-1, 1e6)]
        >>> rate = next_rate(tried, 1e-4, 1e-1, kappa=1e6, seed=(0, 1))
        >>> round(rate, 7)  # as far as possible from all of them
        0.0001
    """
    grid = np.geomspace(low, high, GRID)
    if not tried:
        return float(np.random.default_rng(seed).choice(grid))
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern

    scale = lambda rates: np.log(np.divide(rates, low))[:, None] / math.log(high / low)
    rates, scores = np.transpose(tried)
    # Between 0.1 and 1 of the interval, the uncertainty grows with the distance from what is known.
    process = GaussianProcessRegressor(
        Matern(length_scale_bounds=(0.1, 1.0), nu=2.5), alpha=1e-6, normalize_y=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound
        mean, deviation = process.fit(scale(rates), scores).predict(scale(grid), return_std=True)
    bound = np.where(np.isin(grid, rates), np.inf, mean - kappa * deviation)
    return float(grid[np.argmin(bound)])


def _check_installed() -> None:
    try:
        import sklearn.gaussian_process  # noqa: F401
    except ImportError:
        raise ImportError(
            "controller autolrs needs scikit-learn: pip install 'memopt[autolrs]'."
        ) from None
