"""Fits of laws of the loss recover what data was made with, and say how well."""

import dataclasses
import itertools

import numpy as np
import pytest

from memopt.schedules.laws import OutsideRangeWarning, StepsLaw, TokenLaw, fit_steps_law
from memopt.schedules.laws import fit_token_law as fit

TOKEN_LAW = TokenLaw(1.8, 450.0, 0.34, 900.0, 0.31)
SIZES = [(n, d) for n in (1e7, 4e7, 1.6e8, 6.4e8) for d in (3e8, 3e9, 3e10)]

STEPS_LAW = StepsLaw(5e13, 0.08, 2e3, 0.7, 1.5e8, 0.2)
POINTS = [
    (n, s, b) for n in (1e6, 1e7, 1e8) for s in (2e3, 1e4, 5e4) for b in (1e4, 1e5, 1e6)
]  # on both sides of the critical batch


def noisy(law, points, deviation: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=len(points)) * deviation
    return np.array([law(*point) for point in points]) * np.exp(noise)


def columns(points):
    return np.array(points).T


def test_the_law_of_tokens_comes_back_exactly() -> None:
    found = fit(*columns(SIZES), noisy(TOKEN_LAW, SIZES, 0.0), resamples=0)
    np.testing.assert_allclose(found.law, TOKEN_LAW, rtol=1e-4)


def test_the_law_of_steps_comes_back_exactly() -> None:
    found = fit_steps_law(*columns(POINTS), noisy(STEPS_LAW, POINTS, 0.0), resamples=0)
    np.testing.assert_allclose(found.law, STEPS_LAW, rtol=1e-4)


def test_the_loss_of_the_law_of_steps_solves_its_equation() -> None:
    n, s, b = 3e7, 7e3, 2e5
    loss = STEPS_LAW(n, s, b)
    least = s / (1 + STEPS_LAW.batch_scale / loss ** (1 / STEPS_LAW.alpha_b) / b)
    right = (STEPS_LAW.parameter_scale / n) ** STEPS_LAW.alpha_n
    right += (STEPS_LAW.step_scale / least) ** STEPS_LAW.alpha_s
    np.testing.assert_allclose(loss, right, rtol=1e-10)


def test_one_run_that_went_wrong_hardly_moves_the_fit() -> None:
    losses = noisy(TOKEN_LAW, SIZES, 0.0)
    losses[1] *= 1.2
    found = fit(*columns(SIZES), losses, resamples=0)
    at = {"parameters": 1e8, "tokens": 1e10}
    np.testing.assert_allclose(found.law(**at), TOKEN_LAW(**at), rtol=2e-3)


def test_intervals_cover_and_shrink_with_the_noise() -> None:
    at, truth = {"parameters": 1e8, "tokens": 1e10}, TOKEN_LAW(1e8, 1e10)
    many = list(itertools.product(np.geomspace(1e7, 6e8, 6), np.geomspace(3e8, 3e10, 5)))
    predict = lambda deviation, seed: fit(
        *columns(many), noisy(TOKEN_LAW, many, deviation, seed), resamples=20
    ).predict(**at)
    found = [predict(5e-3, seed) for seed in range(3)]
    assert all(x.low <= truth <= x.high for x in found)
    exact = predict(5e-5, 0)
    assert exact.high - exact.low < 0.1 * (found[0].high - found[0].low)


def test_a_wider_level_gives_a_wider_interval_of_a_constant() -> None:
    losses = noisy(STEPS_LAW, POINTS, 2e-3)
    alpha = lambda law: law.alpha_s
    wide = fit_steps_law(*columns(POINTS), losses, resamples=10, level=0.9)
    narrow = dataclasses.replace(wide, level=0.5).interval(alpha)
    low, high = wide.interval(alpha)
    assert low < narrow[0] < narrow[1] < high
    assert low < STEPS_LAW.alpha_s < high


def test_predictions_outside_of_the_runs_warn() -> None:
    found = fit(*columns(SIZES), noisy(TOKEN_LAW, SIZES, 0.0), resamples=2)
    with pytest.warns(OutsideRangeWarning, match=r"tokens=1e\+12"):
        found.predict(parameters=1e8, tokens=1e12)


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (5, {}, "more than 5 runs"),
        (12, {"losses": [-1.0] * 12}, "loss must be above 0"),
        (12, {"losses": [np.nan] * 12}, "loss must be finite"),
        (12, {"losses": [3.0] * 11}, "one value of each"),
        (12, {"level": 1.0}, "level"),
    ],
)
def test_runs_that_cannot_be_fitted_are_refused(rows, change, message) -> None:
    parameters, tokens = columns(SIZES[:rows])
    given = {"parameters": parameters, "tokens": tokens, "losses": [3.0] * rows, **change}
    with pytest.raises(ValueError, match=message):
        fit(**given)
