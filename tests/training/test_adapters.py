"""Adapters beside frozen weights: what is frozen stays to the bit, in either step."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import memopt
from memopt.models import llama
from memopt.models.stacked import StackedModel
from memopt.training import init_state, release_step, train_step
from tests.training.nano import NANO

RATE = optax.constant_schedule(3e-2)
CONFIG = dataclasses.replace(NANO, vocab_size=32)
frozen = jax.lax.stop_gradient


def adapted():
    """The nano model with adapters of rank 2 beside its queries, and its parameters."""
    plain, base = llama.stacked_model(CONFIG), llama.init_params(CONFIG)
    down = 0.3 * jax.random.normal(jax.random.key(1), (2, 16, 2))
    adapters = {"down": down, "up": jnp.zeros((2, 2, 16))}

    def block(layer, x, batch):
        low, rest = layer["adapters"], {k: frozen(v) for k, v in layer.items() if k != "adapters"}
        query = {"kernel": rest["attention"]["q"]["kernel"] + low["down"] @ low["up"]}
        return plain.block(rest | {"attention": rest["attention"] | {"q": query}}, x, batch)

    embed = lambda rest, batch: plain.embed(frozen(rest), batch)
    head = lambda rest, x, batch: plain.head(frozen(rest), x, batch)
    params = base | {"blocks": base["blocks"] | {"adapters": adapters}}
    return StackedModel(embed, block, head), params


def is_trained(params):
    trained = lambda path, _: jax.tree_util.DictKey("adapters") in path
    return jax.tree.map_with_path(trained, params)


def is_frozen(params):
    return jax.tree.map(lambda trained: not trained, is_trained(params))


def partitioned():
    labels = lambda params: jax.tree.map({True: "trained", False: "frozen"}.get, is_trained(params))
    return optax.partition({"trained": optax.adamw(RATE), "frozen": optax.set_to_zero()}, labels)


def masked():
    trained = optax.masked(optax.adamw(RATE), is_trained)
    return optax.chain(trained, optax.masked(optax.set_to_zero(), is_frozen))


@pytest.mark.parametrize("make", [partitioned, pytest.param(masked, marks=pytest.mark.slow)])
def test_adapters_learn_alike_in_both_steps_and_the_rest_stays_to_the_bit(make):
    (model, params), tx = adapted(), make()
    tokens = jax.random.randint(jax.random.key(0), (4, 9), 0, 32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    options = {"tx": tx, "learning_rate": RATE}
    steps = (
        functools.partial(release_step, model=model, **options),
        functools.partial(train_step, loss=model.loss, **options),
    )
    found = []
    for step in map(jax.jit, steps):
        state, first = step(init_state(params, tx), batch)
        for _ in range(9):
            state, last = step(state, batch)
        assert last["loss"] < first["loss"]
        found.append(state)
    chex.assert_trees_all_close(*(state.params for state in found), rtol=1e-3, atol=1e-4)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), found[0].params, params)
    assert moved == is_trained(params)
    adapters = params["blocks"]["adapters"]
    assert memopt.state_bytes(tx, params).total < 3 * sum(x.nbytes for x in adapters.values())
