"""The learning rates of runs that are resumed for more steps, or with another schedule."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest
from rich.console import Console

from memopt import schedules
from memopt.cli.pretrain import parse
from memopt.json_lines import read_json_lines
from memopt.training.config import Config, Optimization, Text
from memopt.training.describe import describe_run
from memopt.training.loop import train
from memopt.training.open import open_run
from memopt.training.phases import describe_phases, follow, resume

BEGUN = {"steps": 20, "learning_rate": 5e-3}
WARMUP = "from 0 to 0.005 in 2"  # a tenth of the steps


def options(batch=(8, 128), **given):
    batch_size, seq_len = batch
    return Config(
        text=Text(batch_size=batch_size, seq_len=seq_len),
        optimization=Optimization(**{"schedule": None, **given}),
    )


def begun(schedule, **given):
    return options(**BEGUN | {"schedule": schedule} | given)


def go_on(there, step=20, updates=None, **given):
    own = {name: getattr(there.optimization, name) for name in ("learning_rate", "steps")}
    updates = step if updates is None else updates
    return resume(there, options(**own | given), step=step, updates=updates)


def rates(config, counts=range(401)):
    return np.array(jax.jit(jax.vmap(follow(config.phases)))(np.array(counts)), float)


@pytest.mark.filterwarnings("ignore:.*has no effect on any step")  # of few steps
@pytest.mark.parametrize("step", [10, 20])
@pytest.mark.parametrize(
    "schedule",
    [name for name in schedules.names() if name not in ("constant", "inverse_sqrt", "power")],
)
def test_the_schedule_a_run_was_begun_with_goes_on_with_its_last_rate(schedule, step):
    there = begun(schedule, decay=0.9)
    extended = go_on(there, step, steps=40)
    np.testing.assert_array_equal(rates(extended, range(60)), rates(there, range(60)))
    warmup = "from 0 to 0.0002 in 2" if schedule == "one_cycle" else WARMUP  # it rises on
    then = "then 0.0005 until step 40"
    assert describe_phases(extended) == f"{schedule} of 20 steps, {warmup}, {then}"


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_a_schedule_without_a_decay_goes_on(schedule):
    there = begun(schedule)
    extended = go_on(there, 20, steps=40)
    np.testing.assert_array_equal(rates(extended, range(21)), rates(there, range(21)))
    whole = begun(schedule, steps=40, warmup=0.05)
    np.testing.assert_array_equal(rates(extended, range(60)), rates(whole, range(60)))
    assert describe_phases(extended) == f"{schedule} of 40 steps, {WARMUP}"
    if schedule == "inverse_sqrt":
        assert rates(extended, [40]) == pytest.approx(5e-3 * (2 / 40) ** 0.5)


@pytest.mark.filterwarnings("ignore:.*has no effect on any step")  # of few steps
@pytest.mark.parametrize("rewarm", [0.0, 0.1])
@pytest.mark.parametrize("schedule", schedules.names())
def test_each_schedule_replaces_another_for_the_remaining_steps(schedule, rewarm):
    """Without --rewarm never above the rate reached, with it up to the highest one."""
    given = {"schedule": schedule, "rewarm": rewarm, "steps": 120, "batch": (8, 4096)}
    named = go_on(begun("cosine"), **given)
    found = rates(named, range(130))
    np.testing.assert_allclose(found[:20], rates(begun("cosine"), range(20)), rtol=1e-6)
    assert found[20:].max() <= (5e-3 if rewarm else 5e-4) * (1 + 1e-6)
    assert np.isfinite(found).all()
    if rewarm and schedules.SHAPES[schedule].starts_at_peak:
        np.testing.assert_allclose(found[[20, 30]], [5e-4, 5e-3], rtol=1e-5)
    assert go_on(named, 70, **given).phases == named.phases


def test_power_counts_the_tokens_of_the_steps_before_it():
    there = begun("constant")
    named = go_on(there, schedule="power", steps=120, batch=(8, 4096))
    assert named.phases[-1].options == {"tokens_per_step": 2**15, "tokens_seen": 20 * 2**15}
    law = 8 * 4 * (60 * 2**15) ** -0.51
    lower = go_on(
        there, schedule="power", steps=120, batch=(8, 4096), learning_rate=1.0, rewarm=0.1
    )
    np.testing.assert_allclose(rates(lower, [60]), law, rtol=1e-5)
    assert "power of 100 steps (tokens_per_step=32768, tokens_seen=655360)" in describe_phases(
        named
    )
    given = options(schedule="power", schedule_option=("tokens_seen=5e6", "a=2"))
    assert given.phases[0].options == {"tokens_per_step": 1024, "tokens_seen": 5e6, "a": 2}


def test_power_moves_its_decay_to_the_new_last_step():
    power = {"steps": 100, "learning_rate": 1.0}
    there = begun("power", **power)
    extended = go_on(there, step=60, steps=200)
    whole = begun("power", **power | {"steps": 200, "warmup": 0.05})
    np.testing.assert_array_equal(rates(extended, range(220)), rates(whole, range(220)))
    with pytest.raises(ValueError, match="would have a learning rate of 0"):
        go_on(there, step=100, steps=200)


def test_options_of_a_schedule_are_kept_and_replaced_with_it():
    there = begun("restarts", schedule_option=("cycles=2", "cycles=5"))
    assert describe_phases(there) == f"restarts of 20 steps (cycles=5), {WARMUP}"
    assert Config.from_flat(json.loads(json.dumps(there.flat()))).phases == there.phases
    same = go_on(there, 10, schedule="restarts", schedule_option=("cycles=5",))
    assert same.phases == there.phases
    other = go_on(there, 10, schedule="restarts", schedule_option=("cycles=3",))
    assert [phase.options for phase in other.phases] == [{"cycles": 5}, {"cycles": 3}]


def test_a_schedule_of_ones_own_extends_as_its_row_says(monkeypatch):
    def late(span, *, decay_steps=None):
        return lambda count: span.peak * (count < span.rest - decay_steps)

    shape = schedules.Shape(late, "to see", end=None, extends=True)
    monkeypatch.setitem(schedules.SHAPES, "late", shape)
    extended = go_on(begun("late"), step=10, steps=40)
    assert describe_phases(extended) == f"late of 40 steps, {WARMUP}"
    np.testing.assert_allclose(rates(extended, [31, 32]), [5e-3, 0], rtol=1e-6)


def test_before_its_decay_wsd_goes_on_as_if_begun_with_the_new_steps():
    extended = go_on(begun("wsd"), step=16, steps=40)
    whole = begun("wsd", steps=40, warmup=0.05)
    np.testing.assert_array_equal(rates(extended, range(60)), rates(whole, range(60)))
    assert describe_phases(extended) == f"wsd of 40 steps, {WARMUP}"


def test_in_its_decay_wsd_decays_to_its_end_and_keeps_the_last_rate():
    there = begun("wsd")
    extended = go_on(there, step=17, steps=40)
    assert extended.phases == there.phases


@pytest.mark.filterwarnings("ignore:.*has no effect on any step")  # of few steps
def test_with_fewer_steps_wsd_decays_at_once_and_others_are_cut_off():
    decay = rates(go_on(begun("wsd", steps=40), step=11, steps=12))
    np.testing.assert_allclose(decay[10:13], [5e-3, 5e-3, 5e-4], rtol=1e-6)
    in_warmup = go_on(begun("wsd", steps=600), step=10, steps=30)
    assert (
        describe_phases(in_warmup) == "wsd of 600 steps, from 0 to 0.005 in 60, cut off at step 30"
    )
    cut = go_on(begun("cosine"), step=10, steps=15)
    assert cut.phases == begun("cosine").phases
    assert describe_phases(cut) == f"cosine of 20 steps, {WARMUP}, cut off at step 15"


def test_a_schedule_of_the_same_name_rewarms_once():
    extended = go_on(begun("cosine"), step=10, schedule="cosine", rewarm=0.2)
    again = "from step 11 cosine of 10 steps, from 0.00314 to 0.005 in 2"
    assert describe_phases(extended) == f"cosine of 20 steps, {WARMUP}, cut off at step 10; {again}"
    for step in (10, 15):
        assert go_on(extended, step=step, schedule="cosine", rewarm=0.2).phases == extended.phases


def test_steps_that_were_skipped_move_the_decay_of_wsd_no_further_than_in_any_run():
    extended = go_on(begun("wsd"), step=10, updates=8, steps=40)
    assert extended.phases == go_on(begun("wsd"), step=10, steps=40).phases


def test_a_schedule_given_by_name_starts_from_the_rate_reached():
    there = begun("constant")
    named = go_on(there, schedule="linear", steps=120)
    np.testing.assert_array_equal(rates(named, range(21)), rates(there, range(21)))
    expected = np.linspace(5e-3, 5e-4, 101)
    np.testing.assert_allclose(rates(named, range(20, 121)), expected, rtol=1e-5)
    assert describe_phases(named) == (
        f"constant of 20 steps, {WARMUP}; from step 21 linear of 100 steps, from 0.005"
    )


def test_a_schedule_rewarms_if_asked():
    named = go_on(begun("cosine"), schedule="cosine", rewarm=0.1, steps=120)
    found = rates(named)
    np.testing.assert_allclose(found[20:31], np.linspace(5e-4, 5e-3, 11), rtol=1e-5)
    assert (np.diff(found[30:121]) < 0).all()
    np.testing.assert_allclose(found[120:], 5e-4, rtol=1e-5)
    assert describe_phases(named) == (
        f"cosine of 20 steps, {WARMUP}; "
        "from step 21 cosine of 100 steps, from 0.0005 to 0.005 in 10"
    )


def test_a_new_schedule_may_have_another_highest_rate_and_starts_at_most_there():
    there = begun("constant")
    lower = {"schedule": "constant", "learning_rate": 1e-3, "steps": 40}
    np.testing.assert_allclose(rates(go_on(there, **lower))[20:], 1e-3, rtol=1e-6)
    rewarmed = rates(go_on(there, **lower | {"learning_rate": 9e-3, "rewarm": 0.5}))
    np.testing.assert_allclose(rewarmed[[20, 25, 30]], [5e-3, 7e-3, 9e-3], rtol=1e-6)


def test_steps_that_were_skipped_shift_a_new_schedule_as_they_shift_the_first():
    named = go_on(begun("cosine"), updates=17, schedule="linear", rewarm=0.1, steps=120)
    assert [(phase.step, phase.count) for phase in named.phases] == [(0, 0), (20, 17)]


def test_each_schedule_is_described_up_to_the_step_where_the_next_begins():
    extended = go_on(begun("cosine"), steps=40)
    early = go_on(begun("cosine"), step=10, schedule="linear", steps=40)
    late = go_on(extended, step=40, schedule="linear", rewarm=0.25, steps=80)
    assert describe_phases(early).startswith(
        f"cosine of 20 steps, {WARMUP}, cut off at step 10; from step 11"
    )
    assert describe_phases(late) == (
        f"cosine of 20 steps, {WARMUP}, then 0.0005 until step 40; "
        "from step 41 linear of 40 steps, from 0.0005 to 0.005 in 10"
    )


def test_the_same_command_again_changes_nothing():
    """A job that names its schedule may be queued again and again."""
    given = {"schedule": "cosine", "rewarm": 0.1, "steps": 120}
    once = go_on(begun("cosine"), **given)
    assert go_on(once, 70, **given).phases == once.phases
    assert go_on(once, 70, steps=120).phases == once.phases
    assert go_on(begun("cosine"), 10, schedule="cosine").phases == begun("cosine").phases
    plain = go_on(begun("cosine"), steps=120)
    assert go_on(plain, 70, steps=120).phases == begun("cosine").phases


def test_another_choice_at_the_same_step_replaces_the_last():
    once = go_on(begun("cosine"), schedule="linear", rewarm=0.1, steps=120)
    again = go_on(once, schedule="wsd", rewarm=0.2, steps=120)
    assert [phase.schedule for phase in again.phases] == ["cosine", "wsd"]
    assert go_on(begun("cosine"), 0, schedule="linear").phases == begun("linear").phases


def test_a_state_that_was_taken_over_counts_on():
    there = begun("cosine")
    there = there.with_phases(there.first_phase(count=100))
    named = go_on(there, schedule="linear", rewarm=0.1, steps=120)
    assert [phase.count for phase in named.phases] == [100, 120]
    setup = describe_run(dataclasses.replace(Config(), optimization=named.optimization))
    np.testing.assert_allclose(setup.learning_rate(30), 5e-3, rtol=1e-6)
    np.testing.assert_allclose(follow(named.phases)(130), 5e-3, rtol=1e-6)


@pytest.mark.parametrize(
    ("there", "given", "says"),
    [
        ({}, {"steps": 19}, "steps must be at least 20, which were taken, got 19"),
        ({}, {"schedule": "linear"}, "schedule 'linear' has no steps left: give more --steps than"),
        ({}, {"schedule": "cosin", "steps": 30}, "did you mean 'cosine'"),
        (
            {},
            {"schedule": "restarts", "schedule_option": ("cycle=3",), "steps": 30},
            "option of restarts: 'cycle' is unknown; did you mean 'cycles'",
        ),
        ({"final_learning_rate": 0.0}, {"steps": 30}, "a learning rate of 0, .* --rewarm"),
        (
            {"final_learning_rate": 0.0},
            {"steps": 30, "schedule": "linear"},
            "a learning rate of 0, .* --rewarm",
        ),
    ],
)
def test_what_cannot_go_on_is_refused(there, given, says):
    with pytest.raises(ValueError, match=says):
        describe_run(go_on(begun("cosine", **there), **given))


def test_options_of_earlier_versions_resume_as_they_say():
    old = begun("linear").flat()
    del old["phases"], old["schedule_option"]
    assert Config.from_flat(old).phases == begun("linear").phases
    carried = Config.from_flat(old | {"schedule_start": 7})
    assert [phase.count for phase in carried.phases] == [7]
    assert Config.from_flat(carried.flat()).phases == carried.phases
    saved = begun("linear").flat()
    [phase] = saved["phases"] = [dict(vars(begun("linear").first_phase()))]
    del phase["options"], saved["schedule_option"]
    assert Config.from_flat(saved).phases == begun("linear").phases


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("", "linear", [5e-4, 2.75e-3, 5e-3, 2.75e-3]),
        ("--schedule=power --schedule-option=a=1", "wsd_sqrt", None),
        ("--schedule=rex", "restarts --schedule-option=cycles=2", None),
        ("--schedule=one_cycle --schedule-option=div_factor=5", "power", None),
    ],
)
def test_an_extended_run_that_is_killed_ends_like_one_that_is_not(
    text, tmp_path, first, second, expected
):
    def run(name, flags):
        opened = open_run(parse([*flags.split(), f"--output={tmp_path / name}"]))
        state, _ = train(opened, Console(quiet=True))
        lines = read_json_lines(tmp_path / name / "metrics.jsonl")
        return opened.config, state, [line["learning_rate"] for line in lines]

    begin = f"--model=nano --data {text} --batch-size=8 --seq-len=32 --eval-tokens=512 {first}"
    _, _, begun = run("whole", f"{begin} --mesh=data=1 --steps=4 --checkpoint-every=2 --keep=9")
    extend = f"--resume --steps=8 --schedule={second} --rewarm=0.5"
    config, state, found = run("whole", extend)
    assert found[:4] == begun
    np.testing.assert_allclose(found, rates(config, range(8)), rtol=1e-5)
    if expected:
        np.testing.assert_allclose(found[4:], expected, rtol=1e-5)
    for saved, command in ((6, extend), (2, "--resume")):
        name = f"killed after {saved}"
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        for step in range(saved + 1, 9):
            shutil.rmtree(tmp_path / name / "checkpoints" / str(step), ignore_errors=True)
        _, again, rates_again = run(name, command)
        chex.assert_trees_all_equal(again, state)
        assert rates_again == found


def test_only_the_command_line_names_a_new_schedule(tmp_path):
    there = begun("linear", rewarm=0.5)
    (tmp_path / "config.json").write_text(json.dumps(there.flat()))
    resumed = parse(["--resume", f"--output={tmp_path}"])
    assert (resumed.optimization.schedule, resumed.optimization.rewarm) == (None, 0)
    named = parse(["--resume", f"--output={tmp_path}", "--schedule=linear"])
    assert named.optimization.schedule == "linear"
    (tmp_path / "config.json").write_text(
        json.dumps(begun("restarts", schedule_option=("cycles=3",)).flat())
    )
    assert parse(["--resume", f"--output={tmp_path}"]).schedule_options == {"cycles": 3}
    other = parse(["--resume", f"--output={tmp_path}", "--schedule=rex"])
    assert other.schedule_options == {}
    (tmp_path / "config.json").write_text(json.dumps(there.flat()))
    copied = parse([f"--config={tmp_path / 'config.json'}"])
    assert copied.optimization.schedule == "linear"
