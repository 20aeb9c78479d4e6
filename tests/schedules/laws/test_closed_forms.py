"""Laws in closed form, against what is computed independently, and their ranges."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from memopt.schedules import laws, schedule
from memopt.schedules.laws import AdamSettings, OutsideRangeWarning

#: Non-embedding parameters and tokens within the range of Step Law.
POINTS = [(2.15e8, 1e10), (5.36e8, 2.8e10), (1.07e9, 1e11)]


@pytest.mark.parametrize(("parameters", "tokens"), POINTS)
def test_step_law_is_what_the_paper_prints(parameters, tokens) -> None:
    """The paper rounds the constants, by less than 0.5% over these sizes but for their powers."""
    rate, batch = laws.step_law(parameters, tokens)
    n, d = np.log([parameters, tokens])
    np.testing.assert_allclose(rate, np.exp(np.log(1.79) - 0.713 * n + 0.307 * d), rtol=0.02)
    np.testing.assert_allclose(batch, np.exp(np.log(0.58) + 0.571 * d), rtol=0.02)
    np.testing.assert_allclose(rate, np.exp(np.log(1.797) - 0.7129 * n + 0.3075 * d), rtol=1e-12)
    np.testing.assert_allclose(batch, np.exp(np.log(0.5807) + 0.5709 * d), rtol=1e-12)


@pytest.mark.parametrize("point", [(1e6, 1e10), (5e9, 1e10), (5e8, 1e8), (5e8, 1e13)])
def test_step_law_warns_outside_of_its_range(point) -> None:
    with pytest.warns(OutsideRangeWarning, match=r"Step Law .* is not from"):
        laws.step_law(*point)


def test_power_is_the_law_in_the_schedule() -> None:
    steps, warmup, tokens = 4000, 1000, 2**20
    rate = schedule(
        "power", 0.02, steps, warmup_steps=warmup, tokens_per_step=tokens, decay_steps=10
    )
    for step in (warmup, 2000, 3500):
        expected = laws.power(step * tokens, tokens / 4096)
        np.testing.assert_allclose(rate(jnp.asarray(step)), expected, rtol=1e-5)
        np.testing.assert_allclose(
            expected, min(0.02, 256 * 4 * np.exp(-0.51 * np.log(step * tokens))), rtol=1e-12
        )


def test_power_is_the_papers_figure_and_its_cap_binds_for_26_billion_tokens() -> None:
    with pytest.warns(OutsideRangeWarning):  # 10T tokens, with the fit for a constant rate
        assert round(laws.power(1e13, 1024, a=4.6), 4) == 0.0011
    assert laws.power(2.5e10, 1024) == 0.02
    assert laws.power(2.8e10, 1024) < 0.02


def test_surge_is_the_peak_at_the_noise_batch_and_symmetric_in_the_logarithm() -> None:
    assert laws.surge(64, 64, peak=3e-3) == 3e-3
    rates = [laws.surge(b, 64, peak=3e-3) for b in (1, 2, 4)]
    np.testing.assert_allclose(
        rates, [6e-3 / (np.sqrt(64 / b) + np.sqrt(b / 64)) for b in (1, 2, 4)]
    )
    with pytest.warns(OutsideRangeWarning, match="surge"):
        above = laws.surge(64 * 16, 64, peak=3e-3)
    np.testing.assert_allclose(above, laws.surge(64 / 16, 64, peak=3e-3), rtol=1e-12)


def test_the_peak_comes_back_from_optimal_rates() -> None:
    batches = [2, 8, 32]
    rates = [laws.surge(b, 40, peak=5e-4) for b in batches]
    np.testing.assert_allclose(laws.surge_peak(batches, rates, 40), 5e-4, rtol=1e-12)
    with pytest.raises(ValueError, match="rates must be one for each"):
        laws.surge_peak([1, 2], [1e-3], 40)


def test_the_limit_of_large_batches_is_the_best_step_along_the_signs_of_a_quadratic() -> None:
    rng = np.random.default_rng(0)
    root, gradient = rng.normal(size=(6, 6)), rng.normal(size=6)
    hessian = root @ root.T
    found = laws.surge_limit(gradient, hessian)
    loss = lambda x: (
        -x * gradient @ np.sign(gradient)
        + x**2 / 2 * (np.sign(gradient) @ hessian @ np.sign(gradient))
    )
    assert loss(found) < min(loss(found * 0.999), loss(found * 1.001))
    with pytest.raises(ValueError, match="curvature"):
        laws.surge_limit(gradient, -hessian)


def test_the_noise_batch_comes_back_from_runs_to_a_target() -> None:
    noise, fewest = 300.0, 1000.0
    batches = np.array([30.0, 100.0, 300.0, 3000.0])
    steps = fewest * (1 + noise / batches)
    found = laws.fit_noise_batch(steps.tolist(), (steps * batches).tolist())
    np.testing.assert_allclose(found, [noise, fewest], rtol=1e-9)
    with pytest.raises(ValueError, match="steps must fall"):
        laws.fit_noise_batch([1000, 2000], [1000, 2000])
    with pytest.raises(ValueError, match="two different runs"):
        laws.fit_noise_batch([1000], [1000])


def test_the_critical_batch_is_the_power_of_the_loss() -> None:
    np.testing.assert_allclose(laws.critical_batch(3.0, 2e8, 0.25), 2e8 / 81, rtol=1e-12)
    assert laws.critical_batch(2.9) > laws.critical_batch(3.0)


def test_rules_for_another_batch_undo_themselves() -> None:
    assert laws.sqrt_rule(laws.sqrt_rule(0.3, 9), 1 / 9) == pytest.approx(0.3)
    start = AdamSettings(1e-3, 0.95, 0.99, 1e-8)
    there = laws.adam_rule(start, 2)
    np.testing.assert_allclose(there, [1e-3 * math.sqrt(2), 0.9, 0.98, 1e-8 / math.sqrt(2)])
    np.testing.assert_allclose(laws.adam_rule(there, 1 / 2), start, rtol=1e-12)


def test_adam_is_the_same_by_tokens_if_gradients_are_noise() -> None:
    """The deviation that noise alone gives the parameters, from the same number of rows."""

    def spread(settings: AdamSettings, batch: int) -> float:
        rng = np.random.default_rng(batch)
        noise = rng.normal(size=(4000, 2**13 // batch)).astype(np.float32) / np.sqrt(batch)
        m = v = w = np.zeros(4000)
        for t, g in enumerate(noise.T, 1):
            m = settings.b1 * m + (1 - settings.b1) * g
            v = settings.b2 * v + (1 - settings.b2) * g**2
            corrected = m / (1 - settings.b1**t), v / (1 - settings.b2**t)
            w = w - settings.learning_rate * corrected[0] / (np.sqrt(corrected[1]) + settings.eps)
        return float(w.std())

    small = AdamSettings(1e-3, 0.9875, 0.998)
    np.testing.assert_allclose(spread(laws.adam_rule(small, 4), 16), spread(small, 4), rtol=0.05)


def test_adam_rule_warns_and_refuses_too_large_batches() -> None:
    with pytest.warns(OutsideRangeWarning, match="b1=0.8"):
        laws.adam_rule(AdamSettings(1e-3), 2)
    with pytest.raises(ValueError, match="b1 for a batch 20 times as large"):
        laws.adam_rule(AdamSettings(1e-3), 20)


def test_time_transfer_is_in_proportion_to_the_tokens() -> None:
    assert laws.time_transfer(100.0, 10.0, 25.0) == 250.0
    with pytest.raises(ValueError, match="tokens must be above 0"):
        laws.time_transfer(100.0, 0.0, 25.0)
