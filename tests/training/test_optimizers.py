"""Every optimizer of Optax in the training step, which gives it what it needs; and released."""

import jax
import numpy as np
import pytest

import memopt
from memopt.optimizers.registry import METHODS
from memopt.training.config import Architecture, Config, Optimization, Run, Text
from memopt.training.describe import describe_run
from tests.optimizers.kinds import slow_unless

STEPS = 70
RATES = {"optax_lars": 1.0}
"""The learning rates of those that hardly move at the default."""
NOT_RELEASED = {
    **dict.fromkeys(
        ("dadapt_adamw", "dog", "dowg", "mechanic", "momo", "momo_adam", "prodigy"),
        "depends on .* too, .* but the gradients are never held together",
    ),
    **dict.fromkeys(
        ("optax_adafactor", "optax_lamb", "optax_lars", "optax_muon"), "treats its layers together"
    ),
    "optax_sm3": "has no place for each of its layers",
    "sophia": r"evaluates the loss once more \(obj_fn\), which has no place",
}
"""Optimizers that look beyond a matrix, and why they cannot be released."""


def config(**optimization):
    return Config(
        architecture=Architecture(model="nano"),
        text=Text(data=("nowhere",), tokenizer="nowhere", batch_size=8, seq_len=32),
        optimization=Optimization(schedule="constant", warmup=0.0, **optimization),
        run=Run(mesh="data=1"),
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=slow_unless(name == "momo")) for name in memopt.available("optax")],
)
def test_an_optimizer_trains_with_what_the_step_gives_it(name):
    """A batch of three of 257 ids: that no others occur is learnt by all of them."""
    setup = describe_run(config(optimizer=name, learning_rate=RATES.get(name)))
    expected = RATES.get(name, 1.0 if METHODS[name].finds_step else 5e-3)
    assert float(setup.learning_rate(0)) == pytest.approx(expected)
    draw = np.random.default_rng(0)
    rows = {k: draw.integers(1, 4, x.shape).astype(x.dtype) for k, x in setup.batch.items()}
    with jax.set_mesh(setup.mesh):
        state, batch = setup.jit_init(0)(), setup.place(rows)
        losses = []
        for _ in range(STEPS):
            state, metrics = setup.jitted(state, batch)
            losses.append(float(metrics["loss"]))
        total, tokens = jax.jit(setup.loss)(setup.eval_params(state), batch)
    assert state.skipped == 0
    assert losses[-1] < 0.95 * losses[0]
    assert total / tokens < 0.95 * losses[0]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=slow_unless(name in ("dog", "optax_sm3")))
        for name in memopt.available("optax")
    ],
)
def test_an_optimizer_is_released_or_refused_in_a_sentence(name):
    """Before there is any file or array."""
    released = config(optimizer=name, release=True)
    if name in NOT_RELEASED:
        with pytest.raises(ValueError, match=f"optimizer '{name}' .*{NOT_RELEASED[name]}"):
            describe_run(released)
    else:
        describe_run(released)
