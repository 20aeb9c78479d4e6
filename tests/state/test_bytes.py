"""Bytes of state, leaf by leaf."""

import jax
import jax.numpy as jnp
import optax
import pytest

import memopt
from memopt import projectors, recombine
from tests.optimizers.kinds import SUMS_LIKE_PARAMETERS

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


def test_a_table_prints_a_line_for_each_parameter():
    text = str(memopt.state_bytes(optax.adamw(1e-3), {"w": jnp.ones((1000, 4))}))
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["w", "16,000", "32,000", "2·(1000×4)"],
        ["shared", "0", "4", "1", "int32"],
        ["total", "16,000", "32,004"],
    ]


def test_a_table_has_a_formula_for_each_parameter():
    params = {"w": jnp.ones((8, 16, 4), jnp.bfloat16), "b": jnp.ones(5)}
    tx = optax.chain(
        memopt.in_subspace(
            optax.scale_by_adam(),
            projectors.gaussian(2),
            recombine.scale_gradient("matrix", memopt.GrowthLimiter()),
        ),
        optax.trace(0.9),
        optax.scale_by_schedule(lambda t: 1.0),
    )
    table = memopt.state_bytes(tx, params)
    assert table.formulas == {"b": "3·5", "w": "2·(8×16×2) + 8 + 8×16×4 bfloat16"}
    assert table.shared_formula == "3 int32"
    assert memopt.state_bytes(optax.sgd(1e-3), params).formulas == {"b": "0", "w": "0"}


@pytest.mark.parametrize("name", memopt.available())
def test_a_formula_comes_to_its_bytes(name):
    def value(formula):
        terms = (term.partition(" ") for term in formula.split(" + "))
        numbers = lambda size: eval(size.replace("×", "*").replace("·", "*"))
        return sum(numbers(s) * jnp.dtype(dtype or "float32").itemsize for s, _, dtype in terms)

    params = {"up": jnp.ones((3, 8, 16), jnp.bfloat16), "embed": jnp.ones((8, 4)), "b": jnp.ones(5)}
    if name in SUMS_LIKE_PARAMETERS:
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    table = memopt.state_bytes(memopt.optimizer(name, 1e-3), params)
    assert {leaf: value(formula) for leaf, formula in table.formulas.items()} == table.states
    assert value(table.shared_formula) == table.shared


def test_states_of_a_chain_are_not_taken_for_parameters():
    """A chain of two has as many states as a tuple of two has parameters."""
    params = (jnp.zeros((4, 2)), jnp.zeros(3))
    counted = memopt.state_bytes(optax.adam(1e-3), params)
    assert counted.states == {"0": 2 * 4 * 8, "1": 2 * 4 * 3}
    assert counted.shared == 4
