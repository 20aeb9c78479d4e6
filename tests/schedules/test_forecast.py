"""Forecasts against the curves that losses are drawn from, and against SciPy's general fit."""

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from memopt.schedules.forecast import DECAYS, drop_outliers, fit_exponential, forecast

STEPS = np.arange(1.0, 101.0)


def exponential(t, a, b, c):
    return a * np.exp(b * t) + c


@pytest.mark.parametrize("time", [5, 20, 100, 1000])
@pytest.mark.parametrize("a", [2.0, -0.5])
def test_an_exponential_without_noise_is_recovered_exactly(time, a):
    losses = exponential(STEPS, a, -1 / time, 3.0)
    np.testing.assert_allclose(fit_exponential(STEPS, losses), (a, -1 / time, 3.0), rtol=1e-6)
    for validation in (False, True):
        found = forecast(STEPS, losses, 1000, validation=validation)
        np.testing.assert_allclose(found, exponential(1000, a, -1 / time, 3.0), rtol=1e-9)


def test_the_fit_is_that_of_scipys_curve_fit_with_noise():
    losses = exponential(STEPS, 2.0, -0.03, 3.0)
    losses += 0.05 * np.random.default_rng(0).standard_normal(len(losses))
    expected, _ = curve_fit(exponential, STEPS, losses, p0=(1.0, -0.05, 2.0))
    np.testing.assert_allclose(fit_exponential(STEPS, losses), expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_outliers_in_the_first_half_do_not_move_the_forecast(seed):
    draw = np.random.default_rng(seed)
    losses = exponential(STEPS, 2.0, -0.03, 3.0) + 0.01 * draw.standard_normal(100)
    losses[draw.choice(np.arange(30, 50), 5, replace=False)] += 1.5
    assert forecast(STEPS, losses, 1000) == pytest.approx(3.0, abs=0.03)
    assert fit_exponential(STEPS, losses)(1000) != pytest.approx(3.0, abs=0.1)  # with them


def test_three_percent_are_dropped_a_round_and_of_validation_losses_one():
    losses = exponential(STEPS, 0.001, -0.03, 3.0)
    spikes = np.arange(3, 33)
    losses[spikes] += 5.0 + spikes % 7
    kept, _ = drop_outliers(STEPS, losses)
    assert len(kept) < 100 - 20
    assert set(STEPS[50:]) <= set(kept)
    few, spoilt = STEPS[:16], np.linspace(3.5, 3.0, 16)
    spoilt[[2, 5, 12]] += 0.5, 0.9, 2.0
    kept, _ = drop_outliers(few, spoilt, validation=True)
    assert len(kept) == 16  # the farthest is in the second half
    spoilt[12] = 3.1
    kept, _ = drop_outliers(few, spoilt, validation=True)
    assert sorted(set(few) - set(kept)) == [6.0]


def test_constant_losses_stay_as_they_are():
    assert forecast(STEPS, np.full(100, 2.5), 1000) == pytest.approx(2.5, abs=1e-9)


def test_rising_losses_are_forecast_to_rise():
    """A straight line goes on nearly straight."""
    losses = 3 + 0.01 * STEPS
    assert losses[-1] < forecast(STEPS, losses, 1000) <= 3 + 0.01 * 1000
    assert forecast(STEPS, losses, 1000) > 12
    growing = np.exp(0.05 * STEPS)  # no exponential with b < 0
    found = forecast(STEPS, growing, 1000)
    assert math.isfinite(found)
    assert found > growing[-1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_have_no_forecast(bad):
    losses = exponential(STEPS, 2.0, -0.03, 3.0)
    losses[-1] = bad
    assert math.isnan(forecast(STEPS, losses, 1000))


def test_the_decay_stays_within_bounds():
    for losses in (3 - 0.01 * STEPS, np.where(STEPS == 1, 9.0, 3.0)):
        decay = -fit_exponential(STEPS, losses).b * 99
        assert DECAYS[0] * (1 - 1e-9) <= decay <= DECAYS[1] * (1 + 1e-9)


@pytest.mark.parametrize("count", [3, 0])
def test_fewer_than_four_losses_are_refused(count):
    with pytest.raises(ValueError, match=f"losses must be at least 4.*got {count}"):
        forecast(range(count), [1.0] * count, 10)


def test_four_losses_suffice():
    steps = np.arange(1.0, 5.0)
    losses = exponential(steps, 1.0, -0.5, 3.0)
    assert forecast(steps, losses, 8) == pytest.approx(exponential(8, 1.0, -0.5, 3.0))
    assert math.isfinite(forecast(steps, losses, 8, validation=True))
