"""The annealing law, against its definition and curves of known parameters."""

import math
import re
import warnings

import numpy as np
import pytest

from memopt.schedules.laws import AnnealingLaw, Curve, fit_annealing
from memopt.schedules.laws.annealing import areas

PEAK, STEPS, WARMUP = 2e-3, 4000, 100
LAW = AnnealingLaw(1.9, 0.55, 0.12, 0.37, decay=0.995, peaks=(PEAK, PEAK))


def with_warmup(rates: np.ndarray) -> np.ndarray:
    return np.concatenate([PEAK * np.arange(WARMUP) / WARMUP, rates])


CONSTANT = with_warmup(np.full(STEPS, PEAK))
COSINE = with_warmup(PEAK * (0.55 + 0.45 * np.cos(np.pi * np.arange(STEPS) / STEPS)))
LINEAR = with_warmup(np.linspace(PEAK, 0, STEPS // 2))


def curve(rates: np.ndarray, every: int = 100) -> Curve:
    steps = np.arange(every, len(rates) + 1, every)
    return Curve(rates, steps, LAW.predict(rates)[steps - 1])


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_areas_are_the_papers_sums(decay: float) -> None:
    rates = np.random.default_rng(0).uniform(size=50)
    rates[0] = rates.max()  # no warm-up
    s1, s2 = areas(rates, decay)
    inner = lambda i: sum((rates[k - 1] - rates[k]) * decay ** (i - k) for k in range(1, i + 1))
    np.testing.assert_allclose(s1, [rates[: s + 1].sum() for s in range(50)])
    np.testing.assert_allclose(s2, [sum(inner(i) for i in range(s + 1)) for s in range(50)])


def test_warmup_counts_in_the_first_area_alone() -> None:
    s1, s2 = areas(COSINE)
    after1, after2 = areas(COSINE[WARMUP:])
    np.testing.assert_allclose(s1[WARMUP:], after1 + COSINE[:WARMUP].sum())
    np.testing.assert_allclose(s2[WARMUP:], after2)
    assert not s2[:WARMUP].any()
    assert areas([2.0, 1.0, 2.0], 0.5)[1].tolist() == [
        0,
        1,
        0.5,
    ]  # a later rise is annealing undone


@pytest.mark.parametrize("curves", [[CONSTANT, COSINE], [COSINE]])
def test_parameters_of_exact_curves_are_found(curves: list[np.ndarray]) -> None:
    found = fit_annealing([curve(rates) for rates in curves], decay=0.995)
    np.testing.assert_allclose(found[:4], LAW[:4], rtol=1e-6)
    assert found[4:] == LAW[4:]
    steps = slice(WARMUP, None)
    np.testing.assert_allclose(found.predict(LINEAR)[steps], LAW.predict(LINEAR)[steps], rtol=1e-5)


def test_units_of_rates_do_not_matter() -> None:
    scaled = [curve(rates)._replace(rates=1e6 * rates) for rates in (CONSTANT, COSINE)]
    found = fit_annealing(scaled, decay=0.995)
    np.testing.assert_allclose([found.L0, found.alpha], [LAW.L0, LAW.alpha], rtol=1e-6)
    predicted = found.predict(1e6 * LINEAR)[WARMUP:]
    np.testing.assert_allclose(predicted, LAW.predict(LINEAR)[WARMUP:], rtol=1e-5)


def test_the_best_of_several_decays_is_taken() -> None:
    curves = [curve(CONSTANT), curve(COSINE)]
    assert fit_annealing(curves, decay=[0.98, 0.999, 0.995, 0.99]).decay == 0.995


def test_an_outlier_changes_little() -> None:
    curves = [curve(CONSTANT), curve(COSINE)]
    curves[1].losses[10] *= 1.5
    predicted = fit_annealing(curves, decay=0.995).predict(LINEAR)[-1]
    assert predicted == pytest.approx(LAW.predict(LINEAR)[-1], rel=1e-3)


def test_losses_in_warmup_are_left_out() -> None:
    exact = curve(COSINE)
    more = Curve(COSINE, np.append(exact.steps, [1, WARMUP]), np.append(exact.losses, [9.0, 9.0]))
    assert fit_annealing([more]) == fit_annealing(
        [exact._replace(steps=exact.steps[1:], losses=exact.losses[1:])]
    )


def test_another_highest_rate_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"rates go up to 0\.004.* up to 0\.002: "):
        LAW.predict(2 * COSINE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LAW.predict(COSINE)[0] == math.inf  # its rate is 0


EXACT = curve(COSINE)


@pytest.mark.parametrize(
    ("curves", "options", "message"),
    [
        ([], {}, "curves and decay must each have one or more, got none."),
        ([EXACT], {"decay": 1.0}, "decay must be between 0 and 1, got 1.0."),
        (
            [(COSINE, [50, 1000, 2000, 3000, 4000], [3.0, 2, 2, 2, 2])],
            {},
            "curves must have 5 losses or more after warm-up, got 4.",
        ),
        (
            [EXACT, (COSINE, [500, 600], [2.0, math.nan])],
            {},
            "losses of curve 1 must be finite and above 0, got nan after step 600: "
            "leave such points out.",
        ),
        (
            [EXACT._replace(losses=[1.0])],
            {},
            "steps and losses of curve 0 must be sequences of one length, got the shapes (41,) and "
            "(1,).",
        ),
        (
            [(COSINE, [0, 4100], [2.0, 2.0])],
            {},
            "steps of curve 0 must be whole numbers from 1 to 4100, got [   0 4100].",
        ),
        (
            [([-1.0, 1.0], [], [])],
            {},
            "rates of curve 0 must be a sequence of finite learning rates, none below 0 and not "
            "all 0, got [-1.  1.].",
        ),
        (
            [curve(CONSTANT)],
            {},
            "curves must have a learning rate that falls before the last loss.",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(curves, options, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fit_annealing(curves, **options)
