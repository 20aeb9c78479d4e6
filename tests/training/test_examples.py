"""The examples' models of other libraries: released as in ordinary steps, resumed exactly."""

import contextlib
import functools
import importlib
import re
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from examples.training import make_optimizer, train
from memopt.training import Checkpoints, evaluate, init_state, release_step, train_step

RATE = optax.constant_schedule(1e-2)
NAMES = ("nnx_dropout", "linen_experts", "equinox_vision")
STEPS = {"equinox_vision": 60}  # until it has learnt something
MARKS = {"nnx_dropout": pytest.mark.slow, "equinox_vision": pytest.mark.integrations}
examples = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in NAMES]
)


@functools.cache
def load(name):
    """The example's StackedModel, its parameters, and its batches."""
    example = importlib.import_module(f"examples.{name}")
    return *example.make_model(), example.make_batch


@examples
@pytest.mark.slow
def test_released_steps_are_the_ordinary_ones(name):
    model, params, make_batch = load(name)
    tx = optax.sgd(RATE, momentum=0.9)
    options = {"tx": tx, "learning_rate": RATE, "rng": jax.random.key(1)}
    found = []
    for step in (
        functools.partial(train_step, loss=functools.partial(model.loss, remat=True), **options),
        functools.partial(release_step, model=model, **options),
    ):
        state, step = init_state(params, tx), jax.jit(step)
        for number in range(2):
            state, metrics = step(state, make_batch(number))
        found.append((state, metrics))
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-6)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), found[0][0].params, params)
    assert all(jax.tree.leaves(moved))


@examples
def test_it_learns_in_few_bytes_and_is_saved(name, tmp_path):
    model, params, make_batch = load(name)
    state, losses = train(model, params, make_batch, tmp_path, steps=STEPS.get(name, 16))
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    held_out = [make_batch(1000), make_batch(1001)]
    assert evaluate(state.params, held_out, jax.jit(model.loss)) < 0.9 * losses[0]

    sizes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    kept = memopt.state_bytes(make_optimizer(RATE), params)
    assert kept.total == sizes(state.opt_state)
    assert kept.total < 2.5 * sum(x.size for x in jax.tree.leaves(params))
    assert sizes(state.params) < 0.35 * sizes(params)

    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        saved, _ = checkpoints.restore(state)
    chex.assert_trees_all_equal(saved, state)


@examples
@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint_as_if_never_stopped(name, tmp_path):
    model, params, make_batch = load(name)
    whole, losses = train(model, params, make_batch, tmp_path, steps=12)
    shutil.rmtree(tmp_path / "12")
    resumed, rest = train(model, params, make_batch, tmp_path, steps=12)
    assert len(losses) == 12
    assert rest == losses[10:]
    chex.assert_trees_all_equal(resumed, whole)


def test_three_functions_are_the_scanned_module():
    model, params, make_batch = load("linen_experts")
    whole = importlib.import_module("examples.linen_experts").Model()
    loss = lambda params, batch: whole.apply({"params": params}, batch)
    found = [jax.jit(jax.value_and_grad(f, has_aux=True)) for f in (loss, model.loss)]
    chex.assert_trees_all_close(*(f(params, make_batch(0)) for f in found), rtol=1e-4, atol=1e-4)


def test_the_page_shows_the_examples_as_they_are():
    root = Path(memopt.__file__).parents[1]
    page = (root / "docs/own_models.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown = [block for block in blocks if "return StackedModel(" in block and ">>>" not in block]
    assert len(shown) == len(NAMES)
    for name, block in zip(NAMES, shown, strict=True):
        assert block in (root / f"examples/{name}.py").read_text()
