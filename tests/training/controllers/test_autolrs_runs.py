"""Runs that AutoLRS steers, of a model small enough to train here."""

import io
import json
import re

import chex
import numpy as np
import pytest
from rich.console import Console

from memopt.training.config import Architecture, Config, Optimization, Run, Text
from memopt.training.loop import train
from memopt.training.open import open_run
from tests.training.test_loop import change
from tests.training.test_steering import killed, lines, resumed, run

OPTIONS = ("candidates=2", "trial_steps=4", "stage_steps=8", "most_stage_steps=8")


@pytest.fixture
def config(tmp_path, text, monkeypatch):
    """Two batches of warm-up, and stages that end after 10 and 18; the second is validated."""
    monkeypatch.setattr("memopt.text.batches.WINDOW_TOKENS", 2**10)  # packed after each trial
    return Config(
        architecture=Architecture(model="nano"),
        text=Text(data=(str(text),), batch_size=4, seq_len=32, eval_tokens=256),
        optimization=Optimization(
            steps=18,
            warmup=1 / 9,
            learning_rate=1e-2,
            optimizer="lion",
            controller="autolrs",
            controller_option=OPTIONS,
        ),
        run=Run(output=tmp_path / "run", mesh="data=1", eval_every=8, checkpoint_every=5),
    )


def trials(config):
    path = config.run.output / "trials.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"release": True, "accumulation": 2, "state": "int8"}, marks=pytest.mark.slow),
        pytest.param({"weights": "int8", "mesh": "data=2,fsdp=2"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_in_a_search_makes_the_same_decisions_and_no_trial_twice(
    config, tmp_path, options
):
    config = change(config, **options)
    whole, opened = run(config)
    found, tried = lines(config), trials(config)
    assert [(step, steps, every) for step, _, steps, every, *_ in tried] == [
        *[(2, 4, None)] * 2,
        *[(10, 4, 1)] * 2,
    ]
    chosen = opened.steering.state["learning_rate"]
    assert chosen in [rate for step, rate, *_ in tried if step == 10]
    np.testing.assert_allclose([line["learning_rate"] for line in found[10:]], chosen, rtol=1e-6)
    again = killed(config, tmp_path / "again", step=10)
    path = again.run.output / "trials.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))  # in the last one
    state, _ = run(again)
    chex.assert_trees_all_equal(state, whole)
    assert lines(again) == found
    assert trials(again) == tried


@pytest.mark.slow
def test_a_run_that_is_given_another_schedule_and_too_few_steps_for_a_trial_goes_on(config):
    config = change(config, steps=10)
    _, opened = run(config)
    found = opened.steering.state["learning_rate"]
    config = change(resumed(config), steps=13, schedule="linear")
    output = io.StringIO()
    opened = open_run(config)
    train(opened, Console(file=output, width=200))
    assert [line["learning_rate"] for line in lines(config)[10:]] == [np.float32(found)] * 3
    said = "batch 10/13  learning rate .*, the batches after 10 are too few for trials: the lea"
    assert len(re.findall(said, output.getvalue())) == 1
    assert len(trials(config)) == 2


@pytest.mark.slow
def test_a_run_whose_candidates_all_overflow_keeps_its_schedule(config):
    options = ("lr_min=1e29", "lr_max=1e30", *OPTIONS)
    _, opened = run(change(config, controller_option=options, steps=10))
    assert opened.steering.state["learning_rate"] is None
    assert [score for _, score in opened.steering.state["tried"]] == [1e6] * 2
    rates = [line["learning_rate"] for line in lines(config)]
    expected = [float(opened.setup.learning_rate(step)) for step in range(10)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
