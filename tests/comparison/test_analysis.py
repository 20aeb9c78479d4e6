"""Losses over seeds, steps to a loss, and fronts of runs whose results are known."""

import math
import random
import statistics

import pytest
from scipy.stats import norm, ttest_ind, ttest_rel

from memopt.comparison.analysis import (
    PROBABILITY,
    decide,
    least_difference,
    paired_difference,
    pareto_front,
    rate_range,
    sensitivity,
    steps_to_loss,
    summarize,
    unfinished,
    z_score,
)
from memopt.comparison.report import sections
from tests.comparison.synthetic import run, seeds


def by_method(runs, **options):
    [group] = summarize(runs, **options)
    return {s.method: s for s in group}


BASE = seeds("adamw", 2.0, 2.02, 1.98)


def test_a_paired_z_has_the_probability_of_students_paired_test():
    base, others = {0: 2.0, 1: 2.3, 2: 1.8, 5: 2.1}, {5: 2.11, 0: 2.03, 2: 1.82, 1: 2.35, 7: 9.0}
    seeds = [0, 1, 2, 5]
    expected = ttest_rel([others[seed] for seed in seeds], [base[seed] for seed in seeds])
    found = paired_difference(others, base)
    assert found.z > 0
    assert 2 * norm.sf(found.z) == pytest.approx(expected.pvalue)
    assert found.loss / found.standard_error == pytest.approx(expected.statistic)


def test_a_paired_difference_needs_a_common_seed_and_a_spread_two():
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert paired_difference({0: math.inf, 1: 1.0}, {0: 1.0, 1: 1.0}) is None
    assert paired_difference({0: 1.5}, {0: 1.0}) == (0.5, None, None)
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}) == (0.0, 0.0, 0.0)
    assert paired_difference({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0}).z == math.inf


@pytest.mark.parametrize("others", [[1.9, 1.95, 1.97], [2.5, 2.4], [2.0, 2.01, 2.02, 2.05]])
def test_z_has_the_probability_of_students_t_test(others):
    base = [2.0, 2.02, 1.98]
    expected = ttest_ind(others, base)
    z = z_score(others, base)
    assert 2 * norm.sf(abs(z)) == pytest.approx(expected.pvalue)
    assert math.copysign(1, z) == math.copysign(1, expected.statistic)


def test_chance_alone_is_rarely_called_a_difference():
    draw = random.Random(0)
    verdicts = [
        decide(z_score([draw.gauss(0, 1) for _ in range(3)], [draw.gauss(0, 1) for _ in range(3)]))
        for _ in range(2000)
    ]
    wrong = sum(verdict != "no difference" for verdict in verdicts) / len(verdicts)
    assert wrong == pytest.approx(PROBABILITY, abs=3 * math.sqrt(PROBABILITY / len(verdicts)))


def test_least_difference_is_where_the_verdict_changes():
    base, others = [2.0, 2.02, 1.98], [2.0, 2.03, 1.97]
    edge = least_difference(others, base)
    verdict = lambda shift: decide(z_score([x + shift for x in others], base))
    assert verdict(0.999 * edge) == "no difference"
    assert verdict(1.001 * edge) == "worse"
    assert verdict(-1.001 * edge) == "better"


def test_verdicts_against_the_baseline():
    found = by_method(
        BASE
        + seeds("muon", 1.6, 1.62, 1.58)
        + seeds("adafactor", 2.01, 2.03, 1.97)
        + seeds("lion", 2.5, 2.52, 2.48)
    )
    verdicts = {name: s.verdict for name, s in found.items()}
    assert verdicts == {
        "muon": "better",
        "adafactor": "no difference",
        "lion": "worse",
        "adamw": "unknown",
    }
    assert [*found] == ["muon", "adamw", "adafactor", "lion"]  # by their losses
    assert found["muon"].difference.loss == pytest.approx(-0.4)
    assert found["muon"].spread == pytest.approx(statistics.stdev([1.6, 1.62, 1.58]))
    assert found["muon"].perplexity == pytest.approx(math.exp(1.6))


def test_one_seed_decides_nothing():
    found = by_method(BASE + seeds("muon", 1.0))["muon"]
    assert (found.verdict, found.difference.z, found.spread) == ("unknown", None, None)
    assert found.difference.loss == pytest.approx(-1.0)
    assert (
        by_method(seeds("adamw", 2.0) + seeds("muon", 1.0, 1.1, 0.9))["muon"].verdict == "unknown"
    )


def test_equal_losses_without_spread_are_the_same():
    assert decide(z_score([2.0, 2.0], [2.0, 2.0])) == "no difference"
    assert decide(z_score([1.9, 1.9], [2.0, 2.0])) == "better"


@pytest.mark.parametrize("lost", [None, math.inf, math.nan])
def test_a_diverged_seed_is_worse(lost):
    found = by_method(BASE + seeds("lion", 1.5, lost, 1.5))["lion"]
    assert (found.verdict, found.loss, found.difference.loss) == ("worse", math.inf, None)
    assert found.steps_to_target is None
    assert not found.on_front


def test_nothing_is_compared_with_a_baseline_that_diverged_or_is_missing():
    lost = by_method(seeds("adamw", 2.0, None, 2.0) + seeds("lion", None, 2.0, 2.0))
    assert lost["lion"].verdict == "unknown"
    assert lost["lion"].difference.speed_up is None
    missing = by_method(seeds("lion", 2.0, 2.0))["lion"]
    assert missing.verdict == "unknown"
    assert missing.difference is missing.steps_to_target is None


def test_steps_and_tokens_to_the_baselines_loss_are_interpolated():
    found = by_method(BASE + seeds("muon", 1.0, 1.0, 1.0) + seeds("lion", 2.5, 2.5, 2.5))
    assert found["muon"].steps_to_target == pytest.approx(200 / 3)  # from 4 to 1 in 100 steps
    assert found["muon"].tokens_to_target == pytest.approx(6400 * 2 / 3)
    assert found["muon"].difference.speed_up == pytest.approx(1.5)
    assert found["adamw"].steps_to_target == 100
    assert found["lion"].steps_to_target is found["lion"].difference.speed_up is None


def test_steps_to_a_given_loss():
    found = by_method(BASE, target_loss=3.0)["adamw"]
    assert found.steps_to_target == pytest.approx(50)


@pytest.mark.parametrize(
    ("curve", "step"),
    [
        ([(10, 3.0), (20, 1.0), (30, 2.5)], None),  # a dip below 2 is not an end below it
        ([(10, 3.0), (20, 1.0), (30, 2.5), (40, 1.5)], 35),
        ([(10, 1.0), (20, 0.5)], 10),  # at the first evaluation already
        ([(10, 3.0), (20, 2.0)], 20),
        ([(10, math.inf), (20, 1.0)], 20),
        ([(10, 1.0), (20, math.nan)], None),
        ([], None),
    ],
)
def test_steps_to_a_loss_of_two(curve, step):
    assert steps_to_loss(curve, 2.0) == step


def test_the_front_is_that_of_its_definition():
    draw = random.Random(1)
    points = [(draw.randrange(6), float(draw.randrange(6))) for _ in range(40)]
    expected = [
        not any((a < x and b <= y) or (a <= x and b < y) for a, b in points) for x, y in points
    ]
    assert pareto_front(points) == expected
    assert any(expected)


def test_the_front_of_ties_zero_bytes_and_diverged_runs():
    points = [(0, 3.0), (0, 3.0), (0, 3.1), (5, 2.0), (7, 2.0), (9, math.inf)]
    assert pareto_front(points) == [True, True, False, True, False, False]
    assert pareto_front([]) == []


def test_sizes_are_compared_apart_and_may_lack_methods():
    small = [dict(r, size="0.5M") for r in seeds("adamw", 3.0, 3.0) + seeds("lion", 2.9, 2.9)]
    large, little = summarize(BASE + small)
    assert [s.method for s in large] == ["adamw"]
    assert [(s.method, s.run["size"]) for s in little] == [("lion", "0.5M"), ("adamw", "0.5M")]
    assert little[0].difference.loss == pytest.approx(-0.1)


def test_methods_without_all_their_seeds_are_unfinished():
    runs = [*BASE, *seeds("muon", 1.0, 1.1, 1.2), *seeds("sgd", 3.0, 3.1)]
    runs += [run("lion", tuned=False), run("lion", tuned=False, rate=0.002)]
    runs += [run("adamw", tuned=False, steps=200)]  # of another protocol
    assert [s.method for s in summarize(runs)[0]] == ["muon", "adamw", "sgd"]
    found = [(one["method"], one["steps"], *counts) for one, *counts in unfinished(runs)]
    assert found == [("sgd", 100, 0, 2), ("lion", 100, 2, 0), ("adamw", 200, 1, 0)]


def test_learning_rates_are_compared_with_the_same_options_and_seed():
    tuning = [run(loss=x, rate=r, seed=9, tuned=False) for r, x in ((1, 3.0), (2, 2.0), (4, None))]
    other = [run(loss=1.0, rate=r, seed=9, tuned=False, options={"b": r}) for r in (1, 2)]
    assert sensitivity([*BASE, *other, *tuning], BASE[0]) == ((1, 3.0), (2, 2.0), (4, math.inf))
    found = by_method([*BASE, *other, *tuning, *seeds("muon", 1.0, rate=0.02)])
    assert found["adamw"].settings == 6
    assert found["muon"].difference.learning_rate_ratio == pytest.approx(20)


def test_learning_rates_of_the_tuned_options_are_preferred():
    tuning = [run(loss=2.0 + r, rate=r, seed=9, tuned=False) for r in (1, 2)]
    other = [dict(r, options={"b": 1}, val_loss=9.0) for r in tuning]
    tuned = run(options={"b": 1})
    assert sensitivity([*tuning, *other], tuned) == ((1, 9.0), (2, 9.0))
    assert sensitivity([*other, *tuning], run()) == ((1, 3.0), (2, 4.0))


@pytest.mark.parametrize(
    ("losses", "low", "high", "whole"),
    [
        ([2.04, 2.0, 2.04], 2**-0.5, 2**0.5, True),
        ([2.2, 2.0, 2.01, 2.03], 2**-0.1, 2**1.5, True),
        ([2.01, 2.0, 2.2], 0.5, 2**0.1, False),
        ([2.0, 2.04], 1, 2**0.5, False),
        ([math.inf, 2.0, 2.04], 1, 2**0.5, True),
        ([2.0, 2.5, 2.0], 1, 2**0.04, False),  # the first of equal ones, and no island
    ],
)
def test_range_of_rates_within_a_hundredth_of_the_least_loss(losses, low, high, whole):
    found = rate_range([(2.0**n, loss) for n, loss in enumerate(losses)])
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.whole is whole


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(1, math.inf), (2, math.inf)]])
def test_no_range_of_rates(points):
    assert rate_range(points) is None


def test_time_of_a_step():
    runs = [run(seed=i, step_seconds=x) for i, x in enumerate((None, 0.2, 0.4))]
    assert by_method(runs)["adamw"].step_seconds == pytest.approx(0.3)
    assert by_method([run(step_cpu_seconds=0.7)])["adamw"].step_cpu_seconds == pytest.approx(0.7)
    assert by_method([run(step_seconds=None)])["adamw"].step_seconds is None


def test_runs_of_other_experiments_are_not_averaged():
    runs = [
        *seeds("adamw", 2.0, 2.1),
        *seeds("adamw", 1.0, 1.1, steps=200),
        *seeds("adamw", 3.0, text="another"),
    ]
    found = {(s.run["steps"], s.losses) for [s] in summarize(runs)}
    assert found == {(100, (2.0, 2.1)), (200, (1.0, 1.1)), (100, (3.0,))}


@pytest.mark.parametrize(
    "earlier", [{"rate": 0.002}, {"options": {"b1": 0.8}}, {"source": "before"}]
)
def test_of_a_methods_settings_the_last_one_counts(earlier):
    [[found]] = summarize([*seeds("adamw", 9.0, 9.0, **earlier), *seeds("adamw", 2.0, 2.1)])
    assert found.losses == (2.0, 2.1)
    assert found.left_out == 2
    shown = sections([[found]])
    assert shown[0].remark == "2 runs of earlier settings are left out."
