"""Runs that start from the parameters of another one, grown or not; see also test_loop."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import memopt
from memopt.cli.pretrain import parse
from memopt.json_lines import read_json_lines
from memopt.optimizers.registry import METHODS
from memopt.training.loop import train
from memopt.training.open import open_run

pytestmark = pytest.mark.slow
STEPS = 6


@pytest.fixture(scope="module")
def first(tmp_path_factory, text):
    """A run of the nano model on one device: its directory and last state."""
    output = tmp_path_factory.mktemp("first") / "run"
    flags = (
        f"--model=nano --data {text} --batch-size=8 --seq-len=32 --eval-tokens=512 --mesh=data=1 "
        f"--steps={STEPS} --checkpoint-every=3 --option=b1=0.8 --optimizer=lion --output={output}"
    )
    return output, train(open_run(parse(flags.split())), Console(quiet=True))[0]


@pytest.fixture
def start(first, tmp_path):
    """Opens a run that starts from the first."""
    flags = f"--init={first[0]} --mesh=data=1 --output={tmp_path / 'new'}"
    return lambda *options: open_run(parse([*flags.split(), *options]))


def twice(tree):
    return jax.tree.map(lambda x: np.concatenate([x, x]), tree)


def test_a_grown_run_goes_on_with_a_state_under_a_new_schedule(first, start, tmp_path):
    directory, last = first
    before = sorted(path.name for path in directory.rglob("*"))
    run = start("--grow=2", "--carry-state")
    assert before == sorted(path.name for path in directory.rglob("*"))
    assert run.origin == (
        f"from step {STEPS} of {directory}, its 2 layers 2 times; the optimizer's state is taken "
        "over, too"
    )
    options = run.config.optimization
    assert (options.optimizer, options.option) == ("lion", ("b1=0.8",))
    assert [phase.count for phase in options.phases] == [6]
    recorded = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (recorded["init"], recorded["num_layers"]) == (str(directory), 4)

    expected = memopt.grow_depth(last.params, last.opt_state, 2, tx=run.setup.tx)
    chex.assert_trees_all_equal((run.state.params, run.state.opt_state), expected)
    assert int(run.state.step) == 0
    moved, state = [], run.state
    for _ in range(2):
        kept = jax.tree.map(jnp.copy, state.params)
        state, metrics = run.setup.jitted(state, next(run.batches))
        change = jax.tree.map(lambda a, b: float(abs(a - b).max()), kept, state.params)
        moved.append((metrics["learning_rate"].item(), max(jax.tree.leaves(change))))
    rate = float(run.setup.learning_rate(1))  # Lion moves by it
    assert moved == [(0, 0), (pytest.approx(rate), pytest.approx(rate, rel=1e-3))]
    run.checkpoints.close()


def test_a_grown_run_starts_its_optimizer_anew_and_learns(first, start, tmp_path):
    directory, last = first
    run = start("--grow=2")
    chex.assert_trees_all_equal(run.state.params["blocks"], twice(last.params["blocks"]))
    chex.assert_trees_all_equal(run.state.params["embed"], last.params["embed"])
    chex.assert_trees_all_equal(run.state.opt_state, run.setup.tx.init(run.state.params))
    assert run.config.text == parse(["--resume", f"--output={directory}"]).text
    assert run.origin.endswith("; the optimizer's state starts anew")
    state = train(run, Console(quiet=True))[0]
    assert int(state.step) == STEPS
    lines = read_json_lines(tmp_path / "new" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_resumed_it_does_not_need_the_other_run(first, start, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(first[0], gone)
    run = start(f"--init={gone}", "--grow=2", "--carry-state")
    run.checkpoints.close()  # killed before its first step
    shutil.rmtree(gone)
    resumed = open_run(parse(["--resume", f"--output={tmp_path / 'new'}"]))
    chex.assert_trees_all_equal(resumed.state, run.state)
    assert resumed.config.flat() == run.config.flat()
    assert resumed.origin == ""


def test_another_optimizer_and_other_codes_start_from_the_parameters(first, start):
    run = start("--optimizer=adamw", "--weights=int8", "--param-dtype=bfloat16")
    assert run.config.optimizer_options == {}
    assert run.config.highest_learning_rate == METHODS["adamw"].learning_rate
    chex.assert_trees_all_equal_shapes_and_dtypes(run.state, run.setup.state)
    weights = memopt.dequantize_params(run.state.params)
    chex.assert_trees_all_close(weights, jax.tree.map(jnp.bfloat16, first[1].params), atol=0.01)
    run.checkpoints.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num-layers=3"], "grow=1: num_layers is 2 there and 3 here. Leave out --model"),
        (["--grow=2", "--num-layers=2"], "grow=2: num_layers is 4 there and 2 here"),
        (["--model=tiny"], "hidden_size is 16 there and 192 here"),
        (["--grow=0"], "grow must be at least 1, got 0"),
        (["--carry-state", "--optimizer=adamw"], "optimizer is 'lion' in .* and 'adamw' here"),
        (["--carry-state", "--option=b1=0.7"], "option is {'b1': 0.8} in .* and {'b1': 0.7} here"),
        (["--carry-state", "--state=int8"], "state is None in .* and 'int8' here"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(start, tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        start(*options)
    assert not (tmp_path / "new").exists()


def test_a_run_without_a_checkpoint_cannot_be_started_from(first, start, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(first[0] / "config.json", tmp_path / "empty")
    with pytest.raises(ValueError, match="has no checkpoint to start from yet"):
        start(f"--init={tmp_path / 'empty'}")
