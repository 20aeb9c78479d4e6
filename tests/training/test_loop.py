"""Runs from start to end: what they write, how they stop, how they go on."""

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import memopt
from memopt.json_lines import read_json_lines
from memopt.models import llama
from memopt.optimizers.registry import FORMERLY_OPTAX, METHODS, available
from memopt.training.config import Architecture, Config, Optimization, Run, Text
from memopt.training.describe import describe_run
from memopt.training.lock import LOCK
from memopt.training.loop import LateMetrics, Stopped, _signals, train
from memopt.training.metrics import MetricsLog
from memopt.training.open import Training, open_run
from memopt.training.report import plot_diagnostics, plot_loss, sample_text
from memopt.training.setup import Setup
from memopt.training.step import evaluate
from memopt.training.writing import WriteError
from memopt.trees import named_leaves
from tests.training.disks import files_of_at_most, limit_files


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """A run of twelve steps of the nano model on one device: its options and its last state."""
    config = Config(
        architecture=Architecture(model="nano"),
        text=Text(data=(str(text),), batch_size=8, seq_len=32, eval_tokens=512),
        optimization=Optimization(steps=12, learning_rate=1e-2),
        run=Run(
            output=tmp_path_factory.mktemp("finished") / "run",
            mesh="data=1",
            eval_every=4,
            checkpoint_every=4,
        ),
    )
    return config, run(config)[0]


@pytest.fixture
def config(finished, tmp_path):
    """The options of `finished`, to be written elsewhere."""
    return change(finished[0], output=tmp_path / "run")


class Disturbed:
    """Batches of which one, when it is asked for, comes with a disturbance."""

    def __init__(self, batches, number, disturb):
        self._batches, self._left, self._disturb = batches, number, disturb

    def __next__(self):
        self._left -= 1
        if self._left == 0:
            self._disturb()
        return next(self._batches)

    def __getattr__(self, name):
        return getattr(self._batches, name)


def change(config, **options):
    """Replaces options by name, whatever group they are in."""
    groups = {group.name: getattr(config, group.name) for group in dataclasses.fields(config)}
    for name, group in groups.items():
        own = {key: options.pop(key) for key in list(options) if hasattr(group, key)}
        groups[name] = dataclasses.replace(group, **own)
    assert not options
    return Config(**groups)


def run(config, console=None):
    return train(open_run(config), console or Console(quiet=True))


def metrics(config):
    return read_json_lines(config.run.output / "metrics.jsonl")


def without_speed(lines):
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def test_a_run_learns_and_its_directory_holds_everything(finished):
    config, state = finished
    directory, lines = config.run.output, metrics(config)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 8, 12]
    assert lines[-1]["val_loss"] < lines[0]["loss"] - 0.5
    for name in ("loss", "learning_rate", "tokens_per_second", "gradient_norm"):
        assert all(np.isfinite(line[name]) for line in lines)
    assert all(line["tokens"] == 8 * 32 for line in lines)
    assert max(line["learning_rate"] for line in lines) == pytest.approx(
        config.optimization.learning_rate
    )
    assert json.loads((directory / "config.json").read_text()) == config.flat()
    assert sorted(int(path.name) for path in (directory / "checkpoints").iterdir()) == [4, 8, 12]
    assert list((directory / "tensorboard").glob("events*"))
    assert not (directory / LOCK).read_text()  # it was released
    assert state.step == 12
    plot_loss(directory / "metrics.jsonl", directory / "loss.png")
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_starts_from_another_one_that_is_grown_with_its_optimizer(finished, config):
    before, last = finished
    options = {"grow": 2, "num_layers": 4, "carry_state": True}
    run = open_run(change(config, init=before.run.output, **options))
    assert run.origin.startswith(f"from step 12 of {before.run.output}, its 2 layers 2 times")
    assert run.config.phases[0].count == 12
    grown = memopt.grow_depth(last.params, last.opt_state, 2, tx=run.setup.tx)
    chex.assert_trees_all_equal((run.state.params, run.state.opt_state), grown)
    assert int(run.state.step) == 0
    state, metrics = run.setup.jitted(run.state, next(run.batches))
    assert metrics["learning_rate"] == run.setup.learning_rate(0) == 0
    chex.assert_trees_all_equal(state.params, grown[0])  # nothing moves before the warm-up
    run.checkpoints.close()


@pytest.mark.slow
def test_parameters_to_evaluate_may_be_others_than_those_trained(config):
    """A schedule-free optimizer averages another point than the one it takes gradients at."""
    changed = change(config, optimizer="schedule_free", release=True, steps=4)
    opened = open_run(changed)
    batches, setup = [*opened.validation[""]], opened.setup
    state, _ = train(opened, Console(quiet=True))
    averaged = memopt.eval_params("schedule_free", state.opt_state, state.params)
    with jax.set_mesh(setup.mesh):
        losses = [
            evaluate(params, map(setup.place, batches), jax.jit(setup.loss))
            for params in (averaged, state.params)
        ]
    [found] = [line["val_loss"] for line in metrics(changed) if "val_loss" in line]
    assert found == pytest.approx(losses[0], rel=1e-6)
    assert found != pytest.approx(losses[1], rel=1e-4)


def test_a_finished_run_is_resumed_to_its_end_with_nothing_to_do(finished):
    config, state = finished
    lines = metrics(config)
    resumed = open_run(change(config, resume=True))
    chex.assert_trees_all_equal(resumed.state, state)
    prompt, continuation = sample_text(resumed, state.params, prompt_tokens=8, new_tokens=5)
    assert len(prompt) == 8
    assert isinstance(continuation, str)
    again, _ = train(resumed, Console(quiet=True))
    chex.assert_trees_all_equal(again, state)
    assert metrics(config) == lines


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(finished, config):
    stopping = open_run(config)
    assert f'"process": {os.getpid()}' in (config.run.output / LOCK).read_text()
    stopping.batches = Disturbed(stopping.batches, 6, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped, match="SIGTERM after step 6") as stopped:
        train(stopping, Console(quiet=True))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert metrics(config)[-1]["step"] == 6
    with (config.run.output / "metrics.jsonl").open("a") as file:  # as if killed a bit later
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    state, _ = run(change(config, resume=True))
    chex.assert_trees_all_equal(state, finished[1])
    assert without_speed(metrics(config)) == without_speed(metrics(finished[0]))


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_read(config, monkeypatch):
    opened, events = open_run(config), []
    dispatch, write = opened.setup.jitted, MetricsLog.write

    def jitted(state, batch):
        events.append("dispatch")
        return dispatch(state, batch)

    def record(log, step, metrics):
        events.append(f"read {step}")
        write(log, step, metrics)

    jitted.lower = dispatch.lower
    vars(opened.setup)["jitted"] = jitted
    monkeypatch.setattr(MetricsLog, "write", record)
    train(opened, Console(quiet=True))
    before_evaluation = ["dispatch", "dispatch", "read 1", "dispatch", "read 2", "dispatch"]
    assert events[:9] == [*before_evaluation, "read 3", "read 4", "dispatch"]
    assert events[9:11] == ["dispatch", "read 5"]
    assert events[-1] == "read 12"


def test_every_checkpoint_finds_the_metrics_of_its_steps_written(config, monkeypatch):
    opened, save, saved = open_run(change(config, checkpoint_every=3)), Training.save, []

    def check(run, state, val_loss=None):
        [*_, line] = metrics(config)
        saved.append(line["step"])
        assert (line["step"], line.get("val_loss")) == (state.step, val_loss)
        save(run, state, val_loss)

    monkeypatch.setattr(Training, "save", check)
    train(opened, Console(quiet=True))
    assert saved == [3, 6, 9, 12]


@pytest.mark.parametrize("max_skipped", [1, 10])
def test_a_validation_loss_is_of_its_step_however_soon_its_metrics_are_read(max_skipped):
    written, values = [], {"skipped_in_row": jnp.int32(0), "tokens": jnp.int32(8)}
    log = SimpleNamespace(write=lambda step, metrics: written.append(metrics.get("val_loss")))
    display = SimpleNamespace(show=lambda *_: None)
    late = LateMetrics(log, display, 0, max_skipped)
    for number, validate in ((1, None), (2, lambda: {"val_loss": 3.0}), (3, None)):
        late.add(number, values, 0.0, validate)
        assert len(written) == (number if validate or max_skipped == 1 else number - 1)
    assert written[:2] == [None, 3.0]


def test_batches_are_placed_ahead_and_the_position_is_that_of_the_one_handed_out(
    config, monkeypatch
):
    placed, place = [], Setup.place
    count = lambda setup, batch: placed.append(batch) or place(setup, batch)
    monkeypatch.setattr(Setup, "place", count)
    opened = open_run(change(config, mesh="data=2"))
    first = next(opened.batches)
    for name, array in first.items():
        assert array.sharding == opened.setup.batch[name].sharding
    deadline = time.monotonic() + 20
    while len(placed) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(placed) >= 4  # three more than were asked for
    position = opened.batches.get_state()
    second = next(opened.batches)
    opened.batches.set_state(position)
    chex.assert_trees_all_equal(next(opened.batches), second)
    opened.batches.close()


def test_diagnostics_of_a_resumed_run_are_those_of_one_that_was_not_stopped(config, tmp_path):
    options = {"optimizer": "lion", "steps": 6, "eval_every": 6, "checkpoint_every": 3}
    recording = change(config, log_diagnostics=2, **options)
    plain, _ = run(change(recording, log_diagnostics=0, output=tmp_path / "plain"))
    state, _ = run(recording)
    chex.assert_trees_all_equal(state.params, plain.params)
    chex.assert_trees_all_equal(state.opt_state.inner, plain.opt_state)
    path = config.run.output / "diagnostics.jsonl"
    whole = read_json_lines(path)
    assert [(line["step"], line["updates"]) for line in whole] == [(1, 1), (3, 3), (5, 5)]
    norms = np.array(whole[-1]["update_to_weight"]["blocks/mlp/up/kernel"])
    assert norms.shape == (2,)
    assert (norms > 0).all()
    plot_diagnostics(path, config.run.output / "diagnostics.png")
    shutil.rmtree(config.run.output / "checkpoints" / "6")
    run(change(recording, resume=True))
    assert read_json_lines(path) == whole
    with pytest.raises(ValueError, match="log_diagnostics"):
        open_run(change(recording, resume=True, log_diagnostics=1))


@pytest.mark.slow
def test_a_run_with_diagnostics_is_continued_with_and_without(config, tmp_path):
    recording = change(config, steps=3, eval_every=3, checkpoint_every=3, log_diagnostics=2)
    state, _ = run(recording)
    for every in (0, 3):
        changes = {"init": config.run.output, "carry_state": True, "log_diagnostics": every}
        carried = open_run(change(recording, output=tmp_path / f"every {every}", **changes))
        found = carried.state.opt_state
        chex.assert_trees_all_equal(found.inner if every else found, state.opt_state.inner)
        assert not every or int(found.count) == 0
        carried.checkpoints.close()


def test_a_profile_holds_the_steps_that_were_asked_for(config, capsys):
    run(change(config, steps=6, eval_every=6, profile=2), Console(width=200))
    [folder] = (config.run.output / "profile" / "plugins" / "profile").iterdir()
    assert f"profile in {config.run.output / 'profile'}\n" in capsys.readouterr().out
    assert [path.stat().st_size > 0 for path in folder.glob("*.xplane.pb")] == [True]
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"]
    assert steps == [4, 5]
    assert "profile" not in json.loads((config.run.output / "config.json").read_text())


@pytest.mark.slow  # beside test_profile
def test_a_profile_that_cannot_be_written_is_warned_about_and_the_run_goes_on(config):
    opened = open_run(change(config, steps=4, eval_every=5, profile=1))
    (config.run.output / "profile").touch()
    with pytest.warns(UserWarning, match=r"the profile cannot be written \("):
        state, _ = train(opened, Console(quiet=True))
    assert state.step == 4


def test_a_profile_longer_than_the_run_is_refused_before_anything_is_written(config):
    with pytest.raises(ValueError, match="profile=10 needs 13 steps, of which 3 warm up, but the"):
        open_run(change(config, profile=10))
    assert not config.run.output.exists()


@pytest.mark.filterwarnings("ignore:TensorBoard events cannot:UserWarning")
def test_metrics_that_cannot_be_written_end_a_run_and_its_checkpoint_is_whole(config):
    opened = open_run(config)
    log = config.run.output / "metrics.jsonl"

    def fill():
        opened.checkpoints.wait()
        limit_files(log.stat().st_size + 30)

    opened.batches = Disturbed(opened.batches, 6, fill)
    with files_of_at_most(10**9), pytest.raises(WriteError, match=r"metrics.jsonl' cannot be wri"):
        train(opened, Console(quiet=True))
    assert opened.checkpoints.newest() == 4
    assert open_run(change(config, resume=True)).state.step == 4


@pytest.mark.filterwarnings("ignore:TensorBoard events cannot:UserWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of TensorStore
@pytest.mark.parametrize("signum", [None, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_checkpoint_that_cannot_be_written_ends_a_run_and_the_one_before_is_whole(
    config, capfd, signum
):
    """Also one that a signal asks for: nobody is told that it is saved."""

    def fill():
        opened.checkpoints.wait()
        limit_files(20_000)
        if signum:
            signal.raise_signal(signum)

    def wait_for_failure():
        with contextlib.suppress(WriteError):
            opened.checkpoints.wait()

    opened = open_run(config)
    opened.batches = Disturbed(Disturbed(opened.batches, 7, fill), 9, wait_for_failure)
    with files_of_at_most(10**9), pytest.raises(WriteError, match=r"checkpoints' .*File too large"):
        train(opened, Console(quiet=True))
    assert opened.checkpoints.newest() == 4
    assert metrics(config)[-1]["step"] < 12
    assert not capfd.readouterr().err  # of Orbax
    assert open_run(change(config, resume=True)).state.step == 4


def test_a_closed_terminal_is_a_signal_to_save_unless_it_is_ignored():
    """The shell and the kernel send a SIGHUP each; nohup has it ignored."""
    usual = signal.getsignal(signal.SIGHUP)  # ignored, if nohup runs the tests
    for handler, expected in ((signal.SIG_DFL, [signal.SIGHUP] * 2), (signal.SIG_IGN, [])):
        signal.signal(signal.SIGHUP, handler)
        with _signals() as caught:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
        assert caught == expected
        assert signal.signal(signal.SIGHUP, usual) == handler


def test_on_a_mesh_the_numbers_are_the_same_and_the_state_is_split(finished, config):
    state, _ = run(change(config, mesh="data=2,fsdp=4"))
    for one, other in zip(metrics(finished[0]), metrics(config), strict=True):
        for name in ("loss", "gradient_norm", "learning_rate"):
            np.testing.assert_allclose(one[name], other[name], rtol=2e-3)
    kernel = state.params["blocks"]["mlp"]["gate"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 4, 32)


def test_what_was_saved_on_one_mesh_goes_on_on_another(finished):
    config, state = finished
    resumed = open_run(change(config, mesh="fsdp=8", resume=True))
    chex.assert_trees_all_equal(jax.device_get(resumed.state), jax.device_get(state))
    resumed.batches.close()


def test_state_shaped_like_a_parameter_lies_with_it(config):
    setup = describe_run(change(config, optimizer="adamw", mesh="fsdp=4"))
    state = setup.state
    for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
        for m, p in zip(*map(jax.tree.leaves, (moment, state.params)), strict=True):
            assert m.sharding == p.sharding or not any(p.sharding.spec)  # of a norm: spread
            assert "fsdp" in m.sharding.spec
    assert state.opt_state[0].count.sharding.spec == jax.P()
    compiled = setup.compile()
    assert compiled.output_shardings[0] == jax.tree.map(lambda x: x.sharding, state)


def test_steps_that_are_not_finite_stop_the_run_and_change_nothing(config, monkeypatch):
    true_loss = llama.loss

    def loss(model, batch):
        total, tokens = true_loss(model, batch)
        return total * jnp.nan, tokens

    monkeypatch.setattr(llama, "loss", loss)
    monkeypatch.setattr("memopt.training.open.describe_run", describe_run)
    opened = open_run(change(config, max_skipped=3))
    before = jax.device_get(opened.state)
    with pytest.raises(Stopped, match="3 steps up to 3") as stopped:
        train(opened, Console(quiet=True))
    assert stopped.value.exit_code == 1
    assert [line["loss"] for line in metrics(config)] == [None] * 3
    monkeypatch.setattr(llama, "loss", true_loss)
    saved = open_run(change(config, resume=True, max_skipped=3)).state
    chex.assert_trees_all_equal(saved.params, before.params)
    chex.assert_trees_all_equal(saved.opt_state, before.opt_state)
    assert (saved.step, saved.skipped, saved.skipped_in_row) == (3, 3, 3)


def test_data_that_cannot_be_read_stops_the_run_after_saving(config):
    def fail():
        raise ValueError("pages.jsonl, line 3 is not JSON")

    opened = open_run(config)
    opened.batches = Disturbed(opened.batches, 3, fail)
    with pytest.raises(Stopped, match=r"cannot be read: pages.jsonl, line 3 is not JSON"):
        train(opened, Console(quiet=True))
    assert open_run(change(config, resume=True)).state.step == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": "tiny"}, "model is 'nano' there and 'tiny' here"),
        ({"optimizer": "adamw"}, "optimizer is 'apollo_mini' there and 'adamw' here"),
        ({"option": ("weight_decay=0.1",)}, "option is"),
        ({"learning_rate": 1.0, "seed": 3}, "learning_rate is .*; seed is 0 there and 3 here"),
        ({"batch_size": 4}, "batch_size is 8 there and 4 here"),
    ],
)
def test_resuming_something_else_says_what_differs(finished, options, named):
    with pytest.raises(ValueError, match=named):
        open_run(change(finished[0], resume=True, **options))


def test_a_run_of_optax_s_optimizer_of_the_same_name_says_how_it_goes_on(finished, tmp_path):
    """Its config.json names the optimizer as it was called then; its arrays are others."""
    copy = change(finished[0], optimizer="lamb", output=tmp_path / "copy", resume=True)
    shutil.copytree(finished[0].run.output, copy.run.output)
    path = copy.run.output / "config.json"
    path.write_text(path.read_text().replace("apollo_mini", "lamb"))
    with pytest.raises(ValueError, match=r"no checkpoint .*write 'optax_lamb' for it in"):
        open_run(copy)


@pytest.mark.parametrize("name", FORMERLY_OPTAX)
def test_states_of_optax_s_optimizer_of_the_same_name_are_told_from_ours(name):
    params, rate = {"w": jnp.ones((4, 8))}, optax.linear_schedule(1e-2, 0.0, 10)
    ours, theirs = (
        named_leaves(jax.eval_shape(memopt.optimizer(n, rate).init, params))[0]
        for n in (name, f"optax_{name}")
    )
    assert dict(ours).keys() != dict(theirs).keys()


def test_with_more_steps_a_resumed_run_goes_on_with_its_schedule_and_records_it(config):
    short = change(config, steps=4)
    run(short)
    state, _ = run(change(short, steps=6, resume=True))
    assert state.step == 6
    rates = [line["learning_rate"] for line in metrics(config)]
    np.testing.assert_allclose(rates[4:], short.optimization.learning_rate / 10, rtol=1e-6)
    recorded = json.loads((config.run.output / "config.json").read_text())
    assert recorded["steps"] == 6
    assert Config.from_flat(recorded).phases == short.phases


@pytest.mark.slow
@pytest.mark.parametrize("name", available("memopt"))
def test_every_method_trains(config, name):
    """A few steps that fit the text better, with a state that a checkpoint holds."""
    options = {"option": ("rank=4",)} if METHODS[name].has_free_rank else {}
    config = change(config, optimizer=name, steps=4, learning_rate=2e-2, **options)
    state, *_ = run(config)
    assert jax.tree.all(jax.tree.map(lambda x: jnp.isfinite(x).all(), state))
    losses = [line["loss"] for line in metrics(config) if "loss" in line]
    assert losses[-1] < losses[0]
