"""Runs whose batch a controller decides, of a model small enough to train here."""

import chex
import numpy as np
import pytest

from memopt.training.config import Architecture, Config, Optimization, Run, Text
from tests.optimizers.kinds import slow_unless
from tests.training.test_loop import change
from tests.training.test_steering import killed, lines, run

OPTIONS = {
    "adadagrad": ("eta=0.2", "every=4", "most=2"),
    "adadagrad_inner": ("test=inner_product", "theta=0.2", "nu=0.2", "every=4", "most=2"),
    "noise_ramp": ("share=20", "decay=0.75", "most=2"),
    "batch_schedule": ("last=2", "length=4"),
}
"""One batch a step at first, and two after step 4."""


@pytest.fixture
def config(tmp_path, text):
    return Config(
        architecture=Architecture(model="nano"),
        text=Text(data=(str(text),), batch_size=4, seq_len=32, eval_tokens=256),
        optimization=Optimization(steps=10, learning_rate=1e-2, optimizer="lion", accumulation=2),
        run=Run(output=tmp_path / "run", mesh="data=1", eval_every=8, checkpoint_every=3),
    )


MESH = {"mesh": "data=2"}
CASES = [
    pytest.param(name, options, marks=slow_unless(options == MESH and name == "adadagrad"))
    for name in OPTIONS
    for options in (
        {},
        MESH,
        {"release": True, "state": "int8", "mesh": "fsdp=2"},
        {"weights": "int8", "mesh": "data=2"},
    )
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_run_that_was_killed_takes_the_same_batches_and_tokens_drive_its_schedule(
    config, tmp_path, name, options
):
    given = {"controller": name.removesuffix("_inner"), "controller_option": OPTIONS[name]}
    config = change(config, **given, **options)
    whole, opened = run(config)
    found = lines(config)
    used = [0, *(line["batches"] for line in found)]
    taken = np.diff(used)
    assert taken.tolist() == [1, 1, 1, 1, 2, 2, 2]
    acts_on = {"adadagrad": "tested_rows", "noise_ramp": "noise_scale"}.get(given["controller"])
    assert acts_on is None or any(acts_on in line for line in found)
    assert [line["tokens"] for line in found] == [4 * 32 * n for n in taken]
    expected = [float(opened.setup.learning_rate(batches)) for batches in used[:-1]]
    np.testing.assert_allclose([line["learning_rate"] for line in found], expected, rtol=1e-6)
    again = killed(config, tmp_path / "again", step=3)
    state, _ = run(again)
    chex.assert_trees_all_equal(state, whole)
    assert lines(again) == found
