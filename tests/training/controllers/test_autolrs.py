"""AutoLRS's decisions: with stubs of its trials and of the search, and with the real search."""

import importlib
import json
import math
import sys

import numpy as np
import pytest

from memopt.training.control import Control, Losses, Plan, Seen
from memopt.training.controllers import controller

module = importlib.import_module("memopt.training.controllers.autolrs")
PLAN = Plan(
    steps=100,
    warmup_steps=10,
    learning_rate=0.1,
    batch_size=8,
    accumulation=1,
    sources={"": 1.0},
)
SMALL = {"candidates": 3, "trial_steps": 4, "stage_steps": 8, "most_stage_steps": 32}


class Trials:
    """Losses that fall from 3 to a limit that depends on the learning rate; counts its calls."""

    def __init__(self, limit):
        self.limit, self.calls = limit, []

    def __call__(self, learning_rate, steps, *, validate_every=None):
        self.calls.append((learning_rate, steps, validate_every))
        taken = range(validate_every or 1, steps + 1, validate_every or 1)
        limit = self.limit(learning_rate)
        return Losses(tuple(taken), tuple(limit + (3 - limit) * 0.5**t for t in taken))


@pytest.fixture
def rates(monkeypatch):
    """The learning rates that are asked for in place of the search's."""
    chosen = [0.3, 0.1, 0.2]
    monkeypatch.setattr(module, "next_rate", lambda tried, *_, **__: chosen[len(tried)])
    return chosen


def run(made, plan, trial, state=None, first=0):
    """Updates a controller before each batch; returns its states and what it said."""
    state = made.init() if state is None else state
    states, controls = [], []
    for batch in range(first, plan.steps):
        metrics = {"loss": 3.0} if batch else {}
        state, control = made.update(state, Seen(batch, batch, metrics), trial)
        state = json.loads(json.dumps(state, allow_nan=False))
        states.append(state)
        controls.append(control)
    return states, controls


def test_stages_double_and_are_judged_by_validation_losses_after_the_first_of_full_length(rates):
    trials = Trials(lambda rate: 1 + abs(rate - 0.1))
    states, controls = run(controller("autolrs", PLAN, SMALL), PLAN, trials)
    # Warm-up to 10, stages of 8, 16, 32 to 66, and of the 34 batches left one of 32 and none of 2.
    assert [c.learning_rate for c in controls] == [None] * 10 + [0.1] * 90
    assert [s["ends"] for s in states] == [0] * 10 + [18] * 8 + [34] * 16 + [66] * 32 + [98] * 34
    lengths = [(4, None), (8, None), (16, None), (16, 1)]
    assert trials.calls == [(rate, *length) for length in lengths for rate in rates]
    assert states[-1]["search_steps"] == 3 * (4 + 8 + 16 + 16)


def test_the_best_forecast_at_the_end_of_the_stage_decides(rates):
    """A candidate that falls slowly to a lower limit wins over one that is lower at first."""
    curves = {
        0.3: lambda t: 1.8 + math.exp(-t),
        0.1: lambda t: 1.0 + 2.0 * math.exp(-0.2 * t),
        0.2: lambda t: 2.5,
    }
    trial = lambda rate, steps, **_: Losses(range(1, 5), [curves[rate](t) for t in range(1, 5)])
    made = controller("autolrs", PLAN, SMALL)
    state, control = made.update(made.init(), Seen(10, 10, {}), trial)
    assert control == Control(
        learning_rate=0.1,
        note="stage 1 up to batch 18 in place of the schedule, searched for 12 steps so far, "
        f"forecast losses {curves[0.3](8):.4f} with 0.3, {curves[0.1](8):.4f} with 0.1, "
        "2.5000 with 0.2",
    )
    (_, first), (_, second), (_, third) = state.pop("tried")
    assert (first, third) == (pytest.approx(curves[0.3](8)), pytest.approx(2.5))
    assert second == pytest.approx(curves[0.1](8))
    assert curves[0.3](4) < curves[0.1](4)
    assert state == {"stage": 1, "ends": 18, "learning_rate": 0.1, "search_steps": 12}


def test_the_last_stage_and_its_trials_are_as_long_as_there_are_steps_left(rates):
    trials = Trials(lambda rate: 1 + rate)
    plan = PLAN._replace(steps=10 + 8 + 10)
    states, controls = run(controller("autolrs", plan, SMALL), plan, trials)
    assert [s["ends"] for s in states][18:] == [28] * 10
    assert [steps for _, steps, _ in trials.calls] == [4] * 3 + [5] * 3
    assert controls[-1].learning_rate == 0.1
    # 4 batches would leave two steps for a trial.
    trials, plan = Trials(lambda rate: 1 + rate), PLAN._replace(steps=10 + 8 + 4)
    states, controls = run(controller("autolrs", plan, SMALL), plan, trials)
    assert len(trials.calls) == 3
    assert controls[-1].learning_rate == 0.1


def test_until_the_first_stage_it_says_that_the_schedule_is_followed_no_longer(rates):
    made = controller("autolrs", PLAN, SMALL)
    _, control = made.update(made.init(), Seen(0, 0, {}), None)
    assert control == Control(note="the schedule up to batch 10, then learning rates of trials")


def test_a_resumed_run_with_too_few_steps_for_a_trial_keeps_its_learning_rate():
    """A new one of so few is refused."""
    short = {"steps": 43, "warmup_steps": 40}
    with pytest.raises(ValueError, match="needs at least 8 steps after the warm-up, got 3"):
        controller("autolrs", PLAN._replace(**short), SMALL)
    made = controller("autolrs", PLAN._replace(**short, begins=40), SMALL)
    state = made.init() | {"stage": 2, "ends": 34, "learning_rate": 0.2, "tried": [[0.2, 1.0]]}
    after, control = made.update(state, Seen(40, 40, {}), None)
    assert after == state
    assert control == Control(
        learning_rate=0.2,
        note="the batches after 40 are too few for trials: the learning rate stays",
    )


@pytest.mark.parametrize("before", [None, 0.2])
def test_if_no_candidate_stays_finite_the_learning_rate_stays(rates, before):
    trials = Trials(lambda rate: math.nan)
    made = controller("autolrs", PLAN, SMALL)
    first = {**made.init(), "learning_rate": before}
    state, control = made.update(first, Seen(10, 10, {}), trials)
    assert control.learning_rate == before
    keeps = "the learning rate stays" if before else "the schedule goes on"
    assert control.note.endswith(f"12 steps so far, no candidate stays finite: {keeps}")
    assert state["tried"] == [[rate, 1e6] for rate in rates]
    assert state["ends"] == 18
    json.dumps(state, allow_nan=False)


def test_a_candidate_that_does_not_stay_finite_is_not_taken(rates):
    trials = Trials(lambda rate: math.nan if rate == 0.1 else 1 + rate)
    made = controller("autolrs", PLAN, SMALL)
    _, control = made.update(made.init(), Seen(10, 10, {}), trials)
    assert control.learning_rate == 0.2


@pytest.mark.parametrize("end", [(math.nan,), ()])
def test_a_trial_that_ends_early_counts_as_one_that_does_not_stay_finite(rates, end):
    falling = Trials(lambda rate: 1 + rate)

    def trial(rate, steps, **options):
        found = falling(rate, steps, **options)
        if rate != 0.1:
            return found
        return Losses(found.steps[: 2 + len(end)], (*found.losses[:2], *end))

    made = controller("autolrs", PLAN, SMALL)
    state, control = made.update(made.init(), Seen(10, 10, {}), trial)
    assert control.learning_rate == 0.2
    assert state["tried"][1] == [0.1, 1e6]


def test_a_run_that_goes_on_from_any_state_makes_the_same_decisions():
    """The states are those of a checkpoint, and the search is the real one."""
    limit = lambda rate: 1 + abs(math.log(rate / 0.03))
    made = controller("autolrs", PLAN, SMALL)
    whole, trials = run(made, PLAN, Trials(limit)), Trials(limit)
    assert len({state["tried"][0][0] for state in whole[0] if state["tried"]}) == 4
    for kill in (5, 10, 11, 34, 70):
        made = controller("autolrs", PLAN, SMALL)
        states, controls = run(made, PLAN, trials, whole[0][kill - 1], kill)
        assert (states, controls) == (whole[0][kill:], whole[1][kill:])


def test_the_defaults_are_the_authors_and_cost_a_step_each(rates):
    trials = Trials(lambda rate: 1 + rate)
    rates += [0.2] * 7
    plan = PLAN._replace(steps=31_000, warmup_steps=0)
    made, state = controller("autolrs", plan, {}), None
    state, begins = made.init(), []
    while (at := state["ends"]) < plan.steps:
        begins.append(at)
        state, _ = made.update(state, Seen(at, at, {}), trials)
    assert begins == [0, 1000, 3000, 7000, 15_000, 23_000]
    assert state["search_steps"] == plan.steps
    lengths = [call[1:] for call in trials.calls[::10]]
    assert lengths == [(100, None), (200, None), (400, None), (800, None), (800, 50), (800, 50)]


def spread(rates, low=1e-4, high=1e-1):
    """The smallest and the largest distance of neighbours, as shares of the interval."""
    ends = [low, *rates, high]
    places = np.sort(np.log(np.divide(ends, low))) / np.log(high / low)
    inner = np.diff(np.sort(np.log(np.divide(rates, low))) / np.log(high / low))
    return inner.min(), np.diff(places).max()


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param(lambda rate: 3.0, id="constant"),
        pytest.param(lambda rate: 1e6, id="none finite"),
        pytest.param(lambda rate: 1e6 if rate > 0.01 else 3 + rate, id="some finite"),
        pytest.param(lambda rate: abs(math.log(rate / 0.005)), id="valley"),
        pytest.param(lambda rate: 3 + math.sin(1e6 * rate), id="noise"),
    ],
)
def test_with_kappa_1e6_candidates_spread_evenly_whatever_the_scores(losses):
    tried = []
    for _ in range(10):
        rate = module.next_rate(tried, 1e-4, 1e-1, kappa=1e6, seed=(0, 1))
        assert 1e-4 <= rate <= 1e-1
        tried.append((rate, losses(rate)))
    closest, farthest = spread([rate for rate, _ in tried])
    assert closest > 1 / 40
    assert farthest < 1 / 5


def test_with_a_small_kappa_candidates_gather_about_the_best_one():
    tried = []
    for _ in range(10):
        rate = module.next_rate(tried, 1e-4, 1e-1, kappa=1.0, seed=(0, 1))
        tried.append((rate, abs(math.log(rate / 0.005)) ** 2))
    near = [rate for rate, _ in tried if 0.002 < rate < 0.0125]
    assert len(near) >= 5
    assert len(set(tried)) == 10


def test_the_seed_and_the_stage_decide_the_first_candidate():
    first = lambda *seed: module.next_rate([], 1e-4, 1e-1, kappa=1e6, seed=seed)
    assert first(0, 1) == first(0, 1)
    assert len({first(0, 1), first(0, 2), first(1, 1)}) == 3


def test_candidates_lie_about_the_runs_learning_rate_unless_bounds_are_given(monkeypatch):
    bounds = []
    ask = lambda tried, low, high, **_: bounds.append((low, high)) or low
    monkeypatch.setattr(module, "next_rate", ask)
    for options in ({}, {"lr_min": 0.01, "lr_max": 0.5}):
        made = controller("autolrs", PLAN, {**SMALL, "candidates": 1, **options})
        made.update(made.init(), Seen(10, 10, {}), Trials(lambda rate: 1.0))
    assert bounds == [(0.1 / 64, 0.4), (0.01, 0.5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_min": 0.5, "lr_max": 0.1}, "lr_min and lr_max must be above 0.*got 0.5 and 0.1"),
        ({"lr_min": -1.0}, "got -1.0 and 0.4"),
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ({"trial_steps": 3}, "trial_steps must be at least 4, got 3"),
        ({"stage_steps": 50}, "stage_steps must be at least 100, got 50"),
        ({"most_stage_steps": 500}, "most_stage_steps must be at least 1000, got 500"),
        ({"kappa": -1.0}, "kappa must be at least 0, got -1.0"),
        ({"trial_steps": 4}, "needs at least 1000 steps after the warm-up, got 90"),
        ({"candidates": 2.5}, "option candidates must be int, got 2.5"),
        ({"lr_min": "low"}, r"option lr_min must be float \| None, got 'low'"),
        ({"taps": 4}, "option of autolrs: 'taps' is unknown"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        controller("autolrs", PLAN, options)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.gaussian_process", None)
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'memopt\[autolrs\]'"):
        controller("autolrs", PLAN, {})
