"""The noise scale, against a linear regression whose covariance is known."""

import itertools
import math

import numpy as np
import pytest

from memopt.schedules.laws import noise_scale, noise_scale_by_sizes

ROWS, MICRO_ROWS, MICRO_BATCHES = 4, 2, 2


@pytest.fixture(scope="module")
def gradients() -> np.ndarray:
    """The gradients of the squared errors of a linear regression, for each of its rows."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(ROWS, 3)), rng.normal(size=ROWS), np.array([0.5, -1.0, 2.0])
    return 2 * (x @ w - y)[:, None] * x


@pytest.fixture(scope="module")
def draws(gradients: np.ndarray) -> np.ndarray:
    """The gradients of the micro-batches in each batch that can be drawn, with replacement."""
    rows = np.array(list(itertools.product(range(ROWS), repeat=MICRO_ROWS * MICRO_BATCHES)))
    return gradients[rows].reshape(-1, MICRO_BATCHES, MICRO_ROWS, 3).mean(axis=2)


@pytest.fixture(scope="module")
def exact(gradients: np.ndarray) -> tuple[float, float]:
    """The trace of the rows' covariance, and the squared norm of their mean."""
    return gradients.var(axis=0).sum(), (gradients.mean(axis=0) ** 2).sum()


def squares(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (draws**2).sum(-1).mean(1), (draws.mean(1) ** 2).sum(-1)


def test_both_parts_are_unbiased_over_all_batches(draws, exact) -> None:
    found = [
        noise_scale(*of, MICRO_ROWS, MICRO_BATCHES) for of in zip(*squares(draws), strict=True)
    ]
    np.testing.assert_allclose(np.mean([n.trace for n in found]), exact[0], rtol=1e-12)
    np.testing.assert_allclose(np.mean([n.square for n in found]), exact[1], rtol=1e-12)


def test_the_ratio_of_averages_is_the_noise_scale_and_the_average_ratio_is_not(draws, exact):
    micro, whole = squares(draws)
    found = noise_scale(micro.mean(), whole.mean(), MICRO_ROWS, MICRO_BATCHES)
    np.testing.assert_allclose(found.batch, exact[0] / exact[1], rtol=1e-12)
    ratios = [
        noise_scale(*of, MICRO_ROWS, MICRO_BATCHES).batch for of in zip(micro, whole, strict=True)
    ]
    assert not np.isfinite(np.mean(ratios)) or abs(np.mean(ratios) / found.batch - 1) > 0.1


def test_the_trace_is_the_sample_variance_of_micro_batches(draws) -> None:
    for of in draws[:50]:
        micro, whole = squares(of[None])
        variance = of.var(axis=0, ddof=1).sum()
        found = noise_scale(micro[0], whole[0], MICRO_ROWS, MICRO_BATCHES).trace
        np.testing.assert_allclose(found, MICRO_ROWS * variance, rtol=1e-9, atol=1e-12)


def test_the_line_through_several_sizes_is_exact_over_all_batches(gradients, exact) -> None:
    sizes = (1, 2, 3, 5)
    means = [
        np.mean((gradients[list(itertools.product(range(ROWS), repeat=n)), :].mean(1) ** 2).sum(-1))
        for n in sizes
    ]
    found = noise_scale_by_sizes(sizes, means)
    np.testing.assert_allclose(found[:2], exact, rtol=1e-10)
    two = noise_scale_by_sizes(sizes[:2], means[:2])
    np.testing.assert_allclose(two, noise_scale(*means[:2], 1, 2), rtol=1e-10)


def test_a_gradient_hidden_by_noise_has_no_finite_noise_scale() -> None:
    assert noise_scale(3.0, 1.0, 1, 2).batch == math.inf
    assert math.isnan(noise_scale(0.0, -1.0 + 0.5, 1, 2).batch) is False
    assert math.isnan(noise_scale(-2.0, -1.5, 1, 2).batch)


def test_too_few_micro_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batches"):
        noise_scale(1.0, 1.0, 4, 1)
    with pytest.raises(ValueError, match="two sizes"):
        noise_scale_by_sizes([4, 4], [1.0, 2.0])
