"""Bytes of state, leaf by leaf."""

import jax
import jax.numpy as jnp
import optax
import pytest

import memopt

PARAMS = {"a": {"w": jnp.ones((6, 4))}, "b": jnp.ones(3, jnp.bfloat16), "none": None}


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.adamw(1e-3), {"a/w": 2 * 96, "b": 2 * 6, "shared": 4}),
        (optax.sgd(1e-3), {"a/w": 0, "b": 0, "shared": 0}),
        (optax.sgd(1e-3, momentum=0.9), {"a/w": 96, "b": 6, "shared": 0}),
        (memopt.adafactor(1e-3), {"a/w": 40, "b": 12, "shared": 4}),
        (
            optax.chain(
                optax.masked(optax.scale_by_adam(), {"a": True, "b": False}),
                optax.scale_by_schedule(lambda t: 1.0),
            ),
            {"a/w": 192, "b": 0, "shared": 8},
        ),
    ],
    ids=["adamw", "sgd", "momentum", "adafactor", "masked"],
)
def test_bytes_by_leaf(tx, expected):
    params = {k: v for k, v in PARAMS.items() if k != "none"}
    table = memopt.state_bytes(tx, params)
    assert {**table.states, "shared": table.shared} == expected
    assert table.total == sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
    assert table.parameters == {"a/w": 96, "b": 6}


def test_a_tree_that_is_one_array_and_none_leaves():
    assert memopt.state_bytes(optax.adam(1e-3), jnp.ones(5)).total == 44
    assert memopt.state_bytes(optax.adam(1e-3), PARAMS)["b"] == 12


def test_prints_a_table():
    text = str(memopt.state_bytes(optax.adamw(1e-3), {"w": jnp.ones((1000, 4))}))
    assert "32,000" in text
    assert text.splitlines()[-1].split() == ["total", "16,000", "32,004"]
