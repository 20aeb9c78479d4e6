"""Runs that a controller steers: what a decision changes, and how a killed run goes on."""

import dataclasses
import functools
import json
import math
import re
import shutil
from types import SimpleNamespace

import chex
import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from memopt.choices import Choice
from memopt.json_lines import read_json_lines
from memopt.training import loop
from memopt.training.config import Architecture, Config, Optimization, Run, Text
from memopt.training.control import Control, Controller, Losses, Plan, Seen
from memopt.training.controllers.registry import CONTROLLERS
from memopt.training.describe import describe_controller, describe_run
from memopt.training.loop import Stopped, train
from memopt.training.open import open_run
from memopt.training.report import plot_loss
from memopt.training.steering import ControlError, Steering, Trials, describe_change
from memopt.training.writing import WriteError
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


@pytest.fixture(autouse=True, scope="module")
def controllers():
    with pytest.MonkeyPatch.context() as patch:
        # A trial puts the batches back, for which a window is packed again.
        patch.setattr("memopt.text.batches.WINDOW_TOKENS", 2**10)
        for make in (follows, grows, tries):
            patch.setitem(CONTROLLERS, make.__name__, Choice(make, "In tests."))
        yield


@pytest.fixture
def config(tmp_path, text):
    return options(tmp_path / "run", text)


def options(output, text):
    return Config(
        architecture=Architecture(model="nano"),
        text=Text(data=(str(text),), batch_size=4, seq_len=32, eval_tokens=256),
        optimization=Optimization(steps=12, learning_rate=1e-2, optimizer="lion"),
        run=Run(output=output, mesh="data=1", eval_every=4, checkpoint_every=4),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text, controllers):
    """Maps options to a run with them that was not stopped: its config, state and `Training`."""

    @functools.cache
    def trained(**given):
        config = change(options(tmp_path_factory.mktemp("whole") / "run", text), **given)
        return config, *run(config)

    return trained


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


def killed(config, output, step):
    """Copies a run as if it had been killed with this step saved last; returns how to resume it."""
    shutil.copytree(config.run.output, output)
    for checkpoint in (output / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    assert (output / "checkpoints" / f"{step}").exists()
    return resumed(change(config, output=output))


def lines(config):
    return [
        {name: x for name, x in line.items() if name != "tokens_per_second"}
        for line in read_json_lines(config.run.output / "metrics.jsonl")
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


@pytest.mark.parametrize("release", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_grown_batch_is_the_sum_of_its_batches_and_length_and_schedule_count_batches(
    whole, release
):
    config, _, opened = whole(controller="grows", accumulation=1 + release, release=release)
    found = lines(config)
    assert [line["batches"] for line in found] == [1, 2, 4, 6, 10, 12]  # 1 1 2 2 4, and the rest
    assert [line["tokens"] for line in found] == [128 * n for n in (1, 1, 2, 2, 4, 2)]
    rate = opened.setup.learning_rate
    expected = [float(rate(before)) for before in (0, 1, 2, 4, 6, 10)]
    np.testing.assert_allclose([line["learning_rate"] for line in found], expected, rtol=1e-6)
    assert [line["step"] for line in found if "val_loss" in line] == [3, 5, 6]  # batches 4, 8, 12


def test_the_plot_of_a_controlled_run_counts_batches(whole, monkeypatch):
    drawn = {}
    draw = lambda curves, image, **titles: drawn.update(titles, curves=curves)
    monkeypatch.setattr("memopt.training.report.plot_curves", draw)
    config, *_ = whole(controller="grows", accumulation=1, release=False)
    plot_loss(config.run.output / "metrics.jsonl", config.run.output / "loss.png")
    assert drawn["x"] == "batches"
    assert [drawn["curves"][name][0] for name in ("training", "validation")] == [
        [1, 2, 4, 6, 10, 12],
        [4, 10, 12],
    ]


def test_a_step_of_two_batches_is_that_of_one_batch_with_all_rows(config):
    config = change(config, controller="follows")
    setup = describe_run(config, trace=False)
    twice = describe_run(change(config, controller=None, batch_size=8), trace=False)
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
    ("name", "release"),
    [
        ("grows", False),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in (("grows", True), ("tries", True))),
    ],
)
def test_a_run_that_was_stopped_makes_the_same_decisions(whole, tmp_path, name, release):
    config, state, _ = whole(controller=name, accumulation=1 + release, release=release)
    again = change(config, output=tmp_path / "again")
    with pytest.raises(Stopped):
        run(again, stop_after=9)  # for "grows", the third batch of the four of a step
    chex.assert_trees_all_equal(run(resumed(again))[0], state)
    assert lines(again) == lines(config)


def test_a_trial_puts_everything_back_and_is_not_repeated(whole, tmp_path):
    config, state, _ = whole(controller="tries")
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
    found, _ = train(opened, Console(quiet=True))
    chex.assert_trees_all_equal(found, state)
    assert lines(again) == lines(config)
    assert len(taken) == 3 + 8  # one trial and the other steps


def test_a_trial_ends_where_a_step_is_not_applied_and_harms_nothing(config):
    rates = (1e30, 1e-2)
    config = change(config, controller="tries", controller_option=(f"rates={rates}",), steps=3)
    _, opened = run(config)
    losses, others = opened.steering.state["found"]
    assert math.isnan(losses[-1])
    assert len(losses) < 3 == len(others)
    assert np.isfinite(others).all()


def test_steps_that_stop_a_run_count_the_batches_they_used(config):
    config = change(config, controller="grows", max_skipped=2, learning_rate=1e38)
    config = change(config, controller_option=("every=1",))
    with pytest.raises(Stopped, match="not finite"):
        run(config)
    opened = open_run(resumed(config))
    last = lines(config)[-1]
    assert (opened.steering.seen.step, opened.batches_used) == (last["step"], last["batches"])
    assert int(opened.state.step) == last["step"]
    opened.batches.close()


def test_a_damaged_line_of_trials_is_told_and_its_trial_repeated(tmp_path):
    path, keys = tmp_path / "trials.jsonl", [(4, rate, 3, None) for rate in (1e-3, 1e-2)]
    for key in keys:
        Trials(path, 4, keep=True).add(key, Losses([1, 2, 3], [3.0, 2.5, 2.0]))
    path.write_text(path.read_text()[:-20])
    with pytest.warns(UserWarning, match=r"trials.jsonl': line 2 is damaged and left out"):
        trials = Trials(path, 12, keep=True)
    assert [bool(trials.find(key)) for key in keys] == [True, False]


def test_trials_of_other_data_are_forgotten(config, tmp_path):
    config = change(config, controller="tries")
    with pytest.raises(Stopped):
        run(config, stop_after=5)  # in the second trial before the first step
    assert Trials(config.run.output / "trials.jsonl", 0, keep=True).find((0, 1e-3, 3, None))
    other = nano.write_text(tmp_path / "other.txt", words=10_000)
    opened = open_run(change(resumed(config), data=(str(other),), accept_data_change=True))
    opened.batches.close()
    assert not opened.steering.trials.find((0, 1e-3, 3, None))


def steering(*sources, state=None):
    made = Controller(dict, None)
    schedule = optax.constant_schedule(1.0)
    return Steering("mine", made, frozenset(sources or {""}), schedule, None, state or {})


@pytest.mark.parametrize(
    ("decision", "says"),
    [
        (None, "must return its state, a dictionary, and a Control, got None"),
        (({}, None), "must return its state, a dictionary, and a Control, got ({}, None)"),
        ((None, Control()), "must return its state, a dictionary, and a Control"),
        (({"x": jax}, Control()), "must have a state that JSON can hold"),
        (({}, Control(batches=0)), "must give batches of 1 or more, got 0"),
        (({}, Control(batches=2.0)), "must give batches of 1 or more, got 2.0"),
        (({}, Control(learning_rate=math.nan)), "must give a learning_rate that is finite"),
        (({}, Control(learning_rate="high")), "must give a learning_rate that is finite"),
        (({}, Control(weights={"a": 1.0})), "must give weights of all named sources (a, b)"),
        (({}, Control(weights={"a": 0.5, "c": 0.5})), "must give weights of all named sources"),
        (({}, Control(weights={"a": 1.5, "b": -0.5})), "must give positive weights"),
        (({}, Control(weights={"a": 0.5, "b": 0.6})), "must give weights of sum 1"),
        (({}, Control(note=3)), "must give a note that is text, got 3"),
        (({}, Control(metrics={"x": "high"})), "must give metrics that are numbers by name"),
    ],
)
def test_a_decision_that_cannot_be_is_refused_in_a_sentence(decision, says):
    with pytest.raises(ControlError, match=rf"^controller 'mine' {re.escape(says)}.*\.$"):
        steering("a", "b").decide(decision)
    with pytest.raises(ControlError, match=r"weights of all named sources \(none\)"):
        steering().decide(({}, Control(weights={"": 1.0})))


def test_a_decision_is_what_json_makes_of_it():
    """So that a run sees what it will see when it is resumed."""
    made = steering("a", "b")
    control = Control(np.float32(0.5), 2, {"a": np.float32(0.25), "b": 0.75}, "", {"x": np.int8(1)})
    decided = json.loads(json.dumps(made.decide(({"rates": (1, 2)}, control))))
    assert decided[0] == {"rates": [1, 2]}
    assert Control(**decided[1]) == Control(0.5, 2, {"a": 0.25, "b": 0.75}, "", {"x": 1.0})


def test_a_decision_that_cannot_be_ends_a_run_with_all_saved(config, monkeypatch):
    late = lambda state, seen, trial: (state, Control(batches=0 if seen.step == 2 else 1))
    entry = Choice(lambda plan: Controller(dict, late), "In tests.")
    monkeypatch.setitem(CONTROLLERS, "late", entry)
    config = change(config, controller="late")
    with pytest.raises(Stopped, match="controller 'late' must give batches of 1 or more") as error:
        run(config)
    assert error.value.saved
    monkeypatch.setitem(CONTROLLERS, "late", Choice(follows, "In tests."))
    assert len(lines(config)) == 2
    opened = open_run(resumed(config))
    opened.batches.close()
    assert opened.batches_used == 2


def test_records_of_before_tell_the_batches_of_the_last_step():
    """Their controllers kept in their states where it began."""
    seen = {"step": 3, "batches": 7, "metrics": {}}
    made = steering()
    made.restore({"state": {"batches": 4, "used": 3}, "applied": 7, "seen": seen})
    assert (made.state, made.seen) == ({"batches": 4}, Seen(3, 7, {}, step_batches=4))
    made.restore({"state": {}, "applied": 7, "seen": seen})
    assert made.seen.step_batches == 1
    made.restore(json.loads(json.dumps({**made.record(), "seen": {**seen, "step_batches": 2}})))
    assert made.seen.step_batches == 2


class Processes:
    """Process 0 and another one: what the first sends, the other is told."""

    def __init__(self, monkeypatch):
        self.sent, self.is_first = [], True
        monkeypatch.setattr(loop, "broadcast", self.broadcast)
        monkeypatch.setattr(loop, "is_main_process", lambda: self.is_first)

    def broadcast(self, value):
        if self.is_first:
            self.sent.append(json.loads(json.dumps(value)))
            return value
        return self.sent.pop(0)


class Decisions(loop._Loop):
    """The decisions of a run that takes no step."""

    def __init__(self, tmp_path, controller):
        self.step = self.batches = 0
        self.tried, self.shown = [], []
        self._display = SimpleNamespace(note=lambda batches, line: self.shown.append(line))
        trials = Trials(tmp_path / "trials.jsonl", 0, keep=True)
        made = steering()
        self.steering = dataclasses.replace(made, controller=controller, trials=trials)

    def _try(self, *asked):
        self.tried.append(asked)
        return Losses([1], [asked[0]])

    def decide(self):
        self._decide(self.steering)
        return self.steering.control


def test_other_processes_try_and_take_over_what_the_first_decides(tmp_path, monkeypatch):
    def update(state, seen, trial):
        losses = [trial(rate, 1).losses[0] for rate in (0.2, 0.1, 0.2)]
        return {"losses": losses}, Control(learning_rate=min(losses))

    processes = Processes(monkeypatch)
    first = Decisions(tmp_path, Controller(dict, update))
    assert first.decide().learning_rate == 0.1
    processes.is_first = False
    other = Decisions(tmp_path, Controller(dict, None))
    assert other.decide() == first.steering.control
    assert other.tried == first.tried == [(0.2, 1, None), (0.1, 1, None)]  # no trial twice
    assert other.steering._after == first.steering._after == {"losses": [0.2, 0.1, 0.2]}
    assert not processes.sent


def test_if_the_first_process_cannot_write_its_trials_all_end(tmp_path, monkeypatch):
    processes = Processes(monkeypatch)
    update = lambda state, seen, trial: trial(0.1, 1)
    first = Decisions(tmp_path, Controller(dict, update))
    monkeypatch.setattr("memopt.training.steering.write_whole", fail_to_write)
    with pytest.raises(WriteError, match=r"trials.jsonl' cannot be written \(.*no space"):
        first.decide()
    processes.is_first = False
    with pytest.raises(Stopped, match=r"^process 0: .*trials.jsonl' cannot be written") as error:
        Decisions(tmp_path, Controller(dict, None)).decide()
    assert not error.value.saved


def test_if_the_first_process_cannot_decide_all_end(tmp_path, monkeypatch):
    processes = Processes(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        Decisions(tmp_path, Controller(dict, lambda state, seen, trial: 1 / 0)).decide()
    processes.is_first = False
    with pytest.raises(Stopped, match=r"^process 0: ZeroDivisionError: division by zero$"):
        Decisions(tmp_path, Controller(dict, None)).decide()


def fail_to_write(path, content):
    raise OSError(28, "no space left on device")


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
