"""Runs that a controller steers: what a decision changes, and how a killed run goes on."""

import json
import math

import chex
import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from memopt.docstrings import Choice
from memopt.training.config import Architecture, Config, Optimization, Run, Text
from memopt.training.control import Control, Controller, Plan
from memopt.training.controllers.registry import CONTROLLERS
from memopt.training.describe import describe_controller, describe_run
from memopt.training.loop import Stopped, train
from memopt.training.metrics import read_metrics
from memopt.training.open import open_run
from memopt.training.steering import Steering, Trials, describe_change
from tests.training import nano
from tests.training.test_loop import Disturbed, change


def follows(plan: Plan) -> Controller:
    """Changes nothing."""
    return Controller(init=dict, update=lambda state, seen, trial: (state, Control()))


def grows(plan: Plan, *, every: int = 2) -> Controller:
    """Doubles the batch after every so many steps, up to four batches."""

    def update(state, seen, trial):
        return {"sizes": [*state["sizes"], seen.step]}, Control(
            batches=min(4, 2 ** (seen.step // every))
        )

    return Controller(lambda: {"sizes": []}, update)


def tries(
    plan: Plan, *, rates: tuple = (1e-3, 1e-2), validate_every: int | None = None
) -> Controller:
    """Before step 1 and after step 4, tries learning rates for 3 steps and takes the best."""

    def update(state, seen, trial):
        if seen.step in (0, 4):
            found = {rate: trial(rate, 3, validate_every=validate_every).losses for rate in rates}
            best = min(found, key=lambda rate: (math.isnan(found[rate][-1]), found[rate][-1]))
            state = {"best": best, "found": list(found.values())}
        return state, Control(learning_rate=state["best"])

    return Controller(dict, update)


@pytest.fixture(autouse=True)
def controllers(monkeypatch):
    # A trial puts the batches back, for which a window is packed again.
    monkeypatch.setattr("memopt.text.batches.WINDOW_TOKENS", 2**10)
    for make in (follows, grows, tries):
        monkeypatch.setitem(CONTROLLERS, make.__name__, Choice(make, "In tests."))


@pytest.fixture
def config(tmp_path, text):
    return Config(
        architecture=Architecture(model="nano"),
        text=Text(data=(str(text),), batch_size=4, seq_len=32, eval_tokens=256),
        optimization=Optimization(steps=12, learning_rate=1e-2, optimizer="lion"),
        run=Run(output=tmp_path / "run", mesh="data=1", eval_every=4, checkpoint_every=4),
    )


def run(config, stop_after=None):
    """Trains; or until a signal arrives while batch `stop_after` is made."""
    opened = open_run(config)
    if stop_after:
        opened.batches = Disturbed(opened.batches, stop_after, lambda: stop(opened))
    return train(opened, Console(quiet=True))[0], opened


def stop(opened):
    raise ValueError("stopped")


def resumed(config):
    return change(config, resume=True)


def lines(config):
    return [
        {name: x for name, x in line.items() if name != "tokens_per_second"}
        for line in read_metrics(config.run.output / "metrics.jsonl")
    ]


def test_a_controller_that_changes_nothing_leaves_the_run_as_it_is(config, tmp_path):
    ordinary, _ = run(change(config, output=tmp_path / "ordinary"))
    controlled, _ = run(change(config, controller="follows"))
    chex.assert_trees_all_close(controlled, ordinary, rtol=1e-6, atol=1e-7)
    rates = [
        [line["learning_rate"] for line in lines(c)]
        for c in (config, change(config, output=tmp_path / "ordinary"))
    ]
    np.testing.assert_allclose(*rates, rtol=1e-6)


@pytest.mark.parametrize("release", [False, True])
def test_a_grown_batch_is_the_sum_of_its_batches_and_length_and_schedule_count_batches(
    config, release
):
    config = change(config, controller="grows", accumulation=2, release=release)
    _, opened = run(config)
    found = lines(config)
    assert [line["batches"] for line in found] == [1, 2, 4, 6, 10, 12]  # 1 1 2 2 4, and the rest
    assert [line["tokens"] for line in found] == [128 * n for n in (1, 1, 2, 2, 4, 2)]
    rate = opened.setup.learning_rate
    expected = [float(rate(before)) for before in (0, 1, 2, 4, 6, 10)]
    np.testing.assert_allclose([line["learning_rate"] for line in found], expected, rtol=1e-6)
    assert [line["step"] for line in found if "val_loss" in line] == [3, 5, 6]  # batches 4, 8, 12


def test_a_step_of_two_batches_is_that_of_one_batch_with_all_rows(config):
    config = change(config, controller="follows")
    setup = describe_run(config)
    twice = describe_run(change(config, controller=None, batch_size=8))
    with jax.set_mesh(setup.mesh):
        state = setup.jit_init(0)()
        opened = open_run(config)
        batches = next(opened.batches), next(opened.batches)
        opened.batches.close()
        rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        _, metrics = jax.jit(twice.step)(state, rows)
        rate = np.float32(metrics["learning_rate"])
        _, own = setup.jitted(state, batches, rate)
    np.testing.assert_allclose(own["loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(own["gradient_norm"], metrics["gradient_norm"], rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"release": True, "accumulation": 2}, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", ["grows", "tries"])
def test_a_run_that_was_stopped_makes_the_same_decisions(config, tmp_path, name, options):
    config = change(config, controller=name, **options)
    whole, _ = run(config)
    again = change(config, output=tmp_path / "again")
    with pytest.raises(Stopped):
        run(again, stop_after=7)
    state, _ = run(resumed(again))
    chex.assert_trees_all_equal(state, whole)
    assert lines(again) == lines(config)


def test_a_trial_puts_everything_back_and_is_not_repeated(config, tmp_path, monkeypatch):
    config = change(config, controller="tries")
    whole, _ = run(config)
    tried = (config.run.output / "trials.jsonl").read_text()
    assert [json.loads(line)[:3] for line in tried.splitlines()] == [
        [step, rate, 3] for step in (0, 4) for rate in (1e-3, 1e-2)
    ]
    again = change(config, output=tmp_path / "again")
    with pytest.raises(Stopped):
        run(again, stop_after=6 + 4 + 5)  # in the second trial after step 4
    kept = (again.run.output / "trials.jsonl").read_text()
    assert kept == "".join(tried.splitlines(keepends=True)[:3])
    opened, taken = open_run(resumed(again)), []
    jitted = opened.setup.jitted
    vars(opened.setup)["jitted"] = lambda *args: taken.append(args[2]) or jitted(*args)
    vars(opened.setup)["compile"] = lambda: None
    state, _ = train(opened, Console(quiet=True))
    chex.assert_trees_all_equal(state, whole)
    assert len(taken) == 3 + 8  # one trial and the other steps


def test_a_trial_ends_where_a_step_is_not_applied_and_harms_nothing(config):
    rates = (1e30, 1e-2)
    _, opened = run(change(config, controller="tries", controller_option=(f"rates={rates}",)))
    for losses, others in (opened.steering.state["found"],):
        assert math.isnan(losses[-1])
        assert len(losses) < 3 == len(others)
        assert np.isfinite(others).all()


def test_steps_that_stop_a_run_count_the_batches_they_used(config):
    config = change(config, controller="grows", max_skipped=2, learning_rate=1e38)
    config = change(config, controller_option=("every=1",), optimizer="sgd")
    with pytest.raises(Stopped, match="not finite"):
        run(config)
    opened = open_run(resumed(config))
    last = lines(config)[-1]
    assert (opened.steering.seen.step, opened.batches_used) == (last["step"], last["batches"])
    assert int(opened.state.step) == last["step"]
    opened.batches.close()


def test_batches_of_a_step_that_was_not_taken_are_not_used_up(config):
    config = change(config, controller="grows")
    whole, _ = run(config)
    again = change(config, output=config.run.output.parent / "again")
    opened = open_run(again)
    number = 9  # the third of the four of a step

    def fail():
        raise ValueError("stopped")

    opened.batches = Disturbed(opened.batches, number, fail)
    with pytest.raises(Stopped):
        train(opened, Console(quiet=True))
    state, _ = run(resumed(again))
    chex.assert_trees_all_equal(state, whole)


def test_a_damaged_line_of_trials_is_told_and_its_trial_repeated(config):
    config = change(config, controller="tries")
    run(config)
    path = config.run.output / "trials.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.warns(UserWarning, match=r"trials.jsonl': line 4 is damaged and left out"):
        trials = Trials(path, 12, keep=True)
    assert trials.find((4, 1e-3, 3, None))
    assert not trials.find((4, 1e-2, 3, None))


def test_trials_of_other_data_are_forgotten(config, tmp_path):
    config = change(config, controller="tries")
    with pytest.raises(Stopped):
        run(config, stop_after=5)  # in the second trial before the first step
    assert open_run(resumed(config)).steering.trials.find((0, 1e-3, 3, None))
    other = nano.write_text(tmp_path / "other.txt", words=10_000)
    opened = open_run(change(resumed(config), data=(str(other),), accept_data_change=True))
    assert not opened.steering.trials.find((0, 1e-3, 3, None))


@pytest.mark.parametrize("control", [Control(batches=0), Control(learning_rate=math.nan)])
def test_a_control_that_cannot_be_is_refused(control):
    steering = Steering(
        Controller(dict, lambda *_: ({}, control)), optax.constant_schedule(1.0), None, {}
    )
    with pytest.raises(ValueError, match=r"the controller's (batches|learning_rate) must be"):
        steering.decide(None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"controller": "grow"}, "controller 'grow' is unknown; did you mean 'grows'?"),
        ({"controller_option": ("every=3",)}, "controller_option goes with --controller."),
        ({"controller": "grows", "controller_option": ("evry=3",)}, "did you mean 'every'"),
        (
            {"controller": "grows", "controller_option": ("every=often",)},
            "option every must be int, got 'often'",
        ),
    ],
)
def test_an_unknown_controller_or_option_is_refused(config, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        describe_controller(change(config, **options))


def test_a_change_is_said_in_words():
    before, after = Control(), Control(0.003, 2, {"web": 0.25, "code": 0.75})
    assert describe_change(before, before) == ""
    assert describe_change(before, after) == (
        "learning rate 0.003, 2 batches a step, web 25.0% code 75.0%"
    )
    assert describe_change(after, Control(weights=after.weights)) == (
        "the schedule's learning rate, 1 batch a step"
    )
    assert describe_change(Control(note="one"), Control(note="two")) == "two"
    assert describe_change(Control(note="one"), Control(note="one")) == ""
