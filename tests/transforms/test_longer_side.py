"""Gradients split along their longer side: the same update, wherever a mesh splits parameters."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt.optimizers.registry import SUMS_PROJECTIONS

SHAPES = {
    "blocks": {
        "up": {"kernel": ((4, 16, 64), jax.P(None, "fsdp", "tensor"))},
        "down": {"kernel": ((4, 64, 16), jax.P(None, "tensor", "fsdp"))},
        "o": {"kernel": ((4, 16, 16), jax.P(None, "tensor", "fsdp"))},
        "odd": {"kernel": ((4, 8, 10), jax.P(None, "fsdp"))},  # 10 / 4
        "norm": {"scale": ((4, 16), jax.P())},
    },
    "embed": {"embedding": ((64, 16), jax.P("tensor", "fsdp"))},
}
RATE = 1e-2


def tree(seed, of=lambda name_and_spec: name_and_spec):
    """Random arrays of these shapes; `of` makes something of each and of its partition."""
    draw = lambda i, p: of((jax.random.normal(jax.random.key(100 * seed + i), p[0]), p[1]))
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return structure.unflatten([draw(i, p) for i, p in enumerate(leaves)])


def make_mesh(axis_type):
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)


def train(tx, seeds, place):
    params = tree(0, place)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for seed in seeds:
        params, state = step(params, state, tree(seed, place))
    return params


@pytest.mark.parametrize(
    "name",
    [n if n == "galore" else pytest.param(n, marks=pytest.mark.slow) for n in SUMS_PROJECTIONS],
)
def test_the_numbers_stay(name):
    mesh = make_mesh(AxisType.Auto)
    tx = memopt.optimizer(name, RATE)
    place = lambda x: jax.device_put(x[0], NamedSharding(mesh, x[1]))
    with jax.set_mesh(mesh):
        found = train(memopt.split_longer_side(tx, tree(0, place)), (1, 2, 3), place)
    expected = train(tx, (1, 2, 3), lambda x: x[0])
    chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("layers", [True, False], ids=["all layers", "one layer"])
def test_the_longer_side_is_split_while_the_optimizer_runs(layers):
    mesh, seen = make_mesh(AxisType.Auto), {}
    place = lambda x: jax.device_put(x[0], NamedSharding(mesh, x[1]))

    def watch(updates, state, params=None):
        for path, u in jax.tree_util.tree_leaves_with_path(updates):
            note = lambda sharding, path=path, u=u: seen.update(
                {path[1].key: sharding.shard_shape(u.shape)[-2:]}
            )
            jax.debug.inspect_array_sharding(u, callback=note)
        return jax.tree.map(jnp.sin, updates), state

    watching = optax.GradientTransformation(lambda params: optax.EmptyState(), watch)
    params = tree(0, place)
    tx = memopt.split_longer_side(watching, params)
    blocks = params["blocks"] if layers else jax.tree.map(lambda p: p[0], params["blocks"])
    updates = jax.jit(lambda x: tx.update({"blocks": x}, optax.EmptyState())[0])(blocks)["blocks"]
    shapes = {"up": (16, 8), "down": (8, 16), "o": (16, 2), "odd": (2, 10)}
    assert seen == shapes | {"norm": seen["norm"]}
    lies = lambda tree: {k: v["kernel"].sharding.spec[-2:] for k, v in tree.items() if k != "norm"}
    assert lies(updates) == lies(blocks)


def test_explicit_axes_say_themselves_where_arrays_are():
    mesh = make_mesh(AxisType.Explicit)
    place = lambda x: jax.device_put(x[0], NamedSharding(mesh, x[1]))
    params = tree(0, place)
    tx = memopt.split_longer_side(optax.identity(), params)
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(tx.update)(params, tx.init(params))
    chex.assert_trees_all_equal(updates, params)
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)


def test_a_matrix_of_no_known_place():
    mesh = make_mesh(AxisType.Auto)
    params = {"up": {"kernel": jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, jax.P()))}}
    tx = memopt.split_longer_side(optax.identity(), params)
    with pytest.raises(ValueError, match=r"params has no 'down/kernel', only \['up/kernel'\]"):
        tx.update({"down": params["up"]}, tx.init(params))
