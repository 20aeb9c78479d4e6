"""A model grown in depth computes what one stacked by hand does, and so does its optimizer."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt import grow_depth
from memopt.models import llama
from tests.optimizers.kinds import slow_unless
from tests.optimizers.test_common import CASES, CELLS, SHAPES, compiled_case, draw, plain, train
from tests.training.nano import NANO

FACTOR = 3
QUICK = ("adafactor",)
IN_TURNS = "galore_in_turns"  # when a layer's basis is refreshed depends on how many there are
BY_LAYERS = "frugal_blocks"  # keeps the moments of half of the layers
SHARED = ("apollo_as_released", "online_subspace_descent", "frugal_orthogonal", "galore_at_random")
"""Optimizers with arrays for all layers together, whose first axis does not count layers."""


def tiled(tree):
    """The tree with its layers stacked by hand."""
    stack = lambda x: jnp.asarray(np.concatenate([np.asarray(x)] * FACTOR))
    return tree | {"blocks": jax.tree.map(stack, tree["blocks"])}


def test_a_grown_llama_runs_its_layers_in_turns():
    params = llama.init_params(NANO, seed=0)
    batch = {"inputs": jnp.arange(20).reshape(2, 10), "targets": jnp.arange(1, 21).reshape(2, 10)}
    grown, state = grow_depth(params, (), FACTOR)
    assert state == ()
    chex.assert_trees_all_equal(grown, tiled(params))
    deep = llama.stacked_model(dataclasses.replace(NANO, num_layers=3 * NANO.num_layers))
    blocks = params["blocks"]
    rest = {name: x for name, x in params.items() if name != "blocks"}

    def by_hand():
        model = llama.stacked_model(NANO)
        x = model.embed(rest, batch)
        layers = [jax.tree.map(lambda w: w[0], blocks), jax.tree.map(lambda w: w[1], blocks)]
        for i in range(FACTOR * NANO.num_layers):
            x = model.block(layers[i % NANO.num_layers], x, batch)
        return model.head(rest, x, batch)

    def scanned():
        x = deep.embed(rest, batch)
        x, _ = jax.lax.scan(lambda x, w: (deep.block(w, x, batch), None), x, grown["blocks"])
        return deep.head(rest, x, batch)

    chex.assert_trees_all_close(jax.jit(scanned)(), jax.jit(by_hand)(), rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=slow_unless(name in QUICK))
        for name in CASES
        if name not in {BY_LAYERS, *CELLS}
    ],
)
def test_the_state_is_that_of_copies_with_equal_gradients(name):
    tree = lambda seed: draw(SHAPES, seed)
    grown = grow_depth(*plain(name), FACTOR, tx=CASES[name].make(1e-2))
    copies = train(compiled_case(name), tiled(tree(0)), lambda t: tiled(tree(t)))
    chex.assert_trees_all_equal_shapes_and_dtypes(grown, copies)
    if name != IN_TURNS:
        chex.assert_trees_all_close(grown, copies, rtol=2e-5, atol=1e-6)
    if name not in SHARED:
        chex.assert_trees_all_equal(grow_depth(*plain(name), FACTOR), grown)


@pytest.mark.parametrize("name", [BY_LAYERS, *SHARED])
def test_axes_that_are_not_certain_are_refused(name):
    params = jax.eval_shape(lambda: draw(SHAPES, 0))
    tx = CASES[name].make(1e-2)
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(ValueError, match="tx must be given: the state array"):
        jax.eval_shape(lambda params, state: grow_depth(params, state, 2), params, state)
    if name == BY_LAYERS:
        with pytest.raises(ValueError, match="state cannot grow"):
            jax.eval_shape(lambda params, state: grow_depth(params, state, 2, tx=tx), params, state)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_codes_grow_with_their_scales(codec):
    params = {"blocks": {"up": jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 160)))}}
    stored = jax.jit(lambda params: memopt.quantize_params(params, codec))(params)
    read = jax.jit(memopt.dequantize_params)
    chex.assert_trees_all_equal(read(grow_depth(stored, (), FACTOR)[0]), tiled(read(stored)))


def test_layers_may_be_another_axis_of_another_branch():
    params = {"decoder": {"up": jnp.ones((4, 2, 8)), "norm": jnp.ones((4, 2))}, "out": jnp.ones(3)}
    for tx in (optax.adam(1e-3), memopt.adafactor(1e-3)):
        options = {"tx": tx, "layers": "decoder", "axis": 1}
        grown, state = grow_depth(params, tx.init(params), FACTOR, **options)
        shapes = {"decoder": {"up": (4, 6, 8), "norm": (4, 6)}, "out": (3,)}
        assert jax.tree.map(jnp.shape, grown) == shapes
        chex.assert_trees_all_equal(state, tx.init(grown))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_a_mesh_arrays_stay_where_they_are(axis_type):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    specs = {"blocks": {"up": jax.P("a", None, "b")}, "embed": jax.P("b", None)}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params = {"blocks": {"up": jnp.ones((4, 16, 8))}, "embed": jnp.ones((8, 4))}
    params = jax.device_put(params, shardings)
    tx = optax.trace(0.9)
    state = memopt.init_sharded(tx, params)
    with jax.set_mesh(mesh):
        grow = jax.jit(lambda params, state: grow_depth(params, state, FACTOR, tx=tx))
        grown, state = grow(params, state)
    if axis_type == AxisType.Explicit:
        assert jax.tree.map(lambda x: x.sharding, grown) == shardings
    assert state.trace["blocks"]["up"].shape == grown["blocks"]["up"].shape == (12, 16, 8)


SEPARATE = {"blocks": [{"up": jnp.ones((4, 8))}] * 2}
STACKED = {"blocks": {"up": jnp.ones((2, 4, 8))}}


@pytest.mark.parametrize(
    ("grow", "sentence"),
    [
        (lambda: grow_depth(STACKED, (), 0), "factor must be at least 1, got 0"),
        (lambda: grow_depth(STACKED, (), 2, axis=-1), "axis must be at least 0, got -1"),
        (lambda: grow_depth(SEPARATE, (), 2), r"'blocks/0/up' of shape \(4, 8\) is of one layer"),
        (lambda: grow_depth(STACKED, (), 2, layers="layers"), "'layers' is no branch of params"),
        (
            lambda: grow_depth({"blocks": {"a": jnp.ones((2, 3)), "b": jnp.ones((4, 3))}}, (), 2),
            "must have one number of layers, got 2 in 'blocks/a', 4 in 'blocks/b'",
        ),
        (
            lambda: grow_depth(STACKED, optax.adam(1.0).init(STACKED), 2, tx=optax.sgd(1.0)),
            "state has 3 arrays, that of tx 0",
        ),
        (
            lambda: grow_depth(STACKED, optax.sm3(1.0).init(STACKED), 2),
            "tx must be given: the state array",
        ),
        (
            lambda: grow_depth(STACKED, optax.flatten(optax.adam(1.0)).init(STACKED), 2),
            "tx must be given: the state array",
        ),
    ],
)
def test_what_cannot_grow_is_refused(grow, sentence):
    with pytest.raises(ValueError, match=sentence):
        grow()
