"""The search for a setting, with losses that are known."""

import math

import pytest

from memopt.comparison.targets import fewest_steps, length
from memopt.comparison.tuning import LARGEST_MOVE, Point, tune


def bowl(rate, choices=()):
    """A loss whose least is at a rate and at choices."""
    return lambda point: (
        (point.rate - rate) ** 2
        + sum(4.0 * (a != b) for a, b in zip(point.choices, choices, strict=True))
    )


@pytest.mark.parametrize("best", [-9, -8, -6, -5])
@pytest.mark.parametrize("choice", [0, 1, 2])
def test_finds_the_least(best, choice):
    found, _ = tune(bowl(best, (choice,)), -7, [3], runs=14)
    assert found == Point(best, (choice,))


def test_several_options_are_tuned():
    found, _ = tune(bowl(-8, (2, 1)), -7, [3, 2], runs=12)
    assert found == Point(-8, (2, 1))


def test_rate_and_option_that_depend_on_each_other_are_found():
    loss = lambda point: (point.rate - (-9 if point.choices[0] else -7)) ** 2 - point.choices[0] * 6
    found, _ = tune(loss, -7, [2], runs=12)
    assert found == Point(-9, (1,))


@pytest.mark.parametrize("best", [-8, -7.5, -7, -6])
@pytest.mark.parametrize("options", [[], [2], [3], [3, 2]])
def test_every_method_has_the_same_number_of_runs(best, options):
    _, tried = tune(bowl(best, (0,) * len(options)), -7, options, runs=8)
    assert len(tried) == 8


def test_no_setting_is_tried_twice():
    calls = []
    tune(lambda point: calls.append(point) or bowl(-7.3, (1,))(point), -7, [3], runs=12)
    assert len(calls) == len(set(calls)) == 12


@pytest.mark.parametrize("best", [-12, -2])
def test_grid_grows_past_the_budget_until_the_best_is_inside(best):
    found, tried = tune(bowl(best), -7, runs=3)
    assert found.rate == best
    assert {best - 1, best + 1} <= {point.rate for point in tried}


def test_left_runs_refine_the_rate():
    found, _ = tune(bowl(-7.4), -7, runs=8)
    assert found.rate == -7.5


def test_diverged_runs_lead_to_lower_rates():
    found, _ = tune(lambda point: math.inf if point.rate > -10 else -point.rate, -7, runs=8)
    assert found.rate == -10


def test_a_rate_without_effect_stays():
    found, tried = tune(lambda point: 2.0, -7, [2], runs=4)
    assert (found.rate, len(tried)) == (-7, 4)


def test_a_method_that_always_diverges_comes_to_an_end():
    _, tried = tune(lambda point: math.inf, -7, runs=8)
    assert len(tried) <= 8 + 2 * LARGEST_MOVE


def test_a_repeated_search_asks_for_the_same_runs():
    runs = [tune(bowl(-8.4, (2,)), -7, [3], runs=9)[1] for _ in range(2)]
    assert list(runs[0]) == list(runs[1])


@pytest.mark.parametrize(
    ("target", "steps"), [(0.4, 280), (0.2, 560), (0.05, 2260), (100 / 400, 400), (1.0, 100)]
)
def test_shortest_run_that_reaches_a_target(target, steps):
    drift = lambda steps: -9 - math.log2(steps / 400) / 2  # of the best rate with the length
    loss = lambda steps, point: 100 / steps + abs(point.rate - round(drift(steps)))
    found, point = fewest_steps(loss, 400, Point(-9, (1,)), target)
    assert loss(found, point) <= target
    assert found == steps
    assert point.choices == (1,)


def test_target_out_of_reach():
    assert fewest_steps(lambda steps, point: 1.0, 400, Point(-9), 0.5) is None


def test_target_that_the_shortest_run_reaches():
    found, _ = fewest_steps(lambda steps, point: 1.0, 400, Point(-9), 2.0)
    assert found == length(400, -100) == 20
