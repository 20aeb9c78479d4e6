"""Updates computed where shorter sides are whole: the same, wherever a mesh splits parameters."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt.optimizers.registry import METHODS

SHAPES = {
    "blocks": {
        "up": {"kernel": ((4, 16, 64), jax.P(None, "fsdp", "tensor"))},
        "down": {"kernel": ((4, 64, 16), jax.P(None, "tensor", "fsdp"))},
        "o": {"kernel": ((4, 16, 16), jax.P(None, "tensor", "fsdp"))},
        "odd": {"kernel": ((3, 8, 10), jax.P(None, "fsdp"))},  # neither 3 nor 10 / 4
        "few": {"kernel": ((2, 8, 12), jax.P(None, "fsdp"))},  # 12 / 4, not 2
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


def on(mesh):
    """Puts an array where its partition says."""
    return lambda x: jax.device_put(x[0], NamedSharding(mesh, x[1]))


def train(tx, seeds, place, places=None):
    params = tree(0, place)
    shardings = memopt.state_sharding(tx, places) if places else None
    state = jax.jit(tx.init, out_shardings=shardings)(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for seed in seeds:
        params, state = step(params, state, tree(seed, place))
    return params


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name != "galore" else [])
        for name, method in METHODS.items()
        if method.sums_projections
    ],
)
@pytest.mark.parametrize(
    "one_layer_at_a_time",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["stack", "by layer"],
)
def test_the_numbers_stay(name, one_layer_at_a_time):
    mesh = make_mesh(AxisType.Auto)
    tx, params = memopt.optimizer(name, RATE), tree(0, on(mesh))
    places = memopt.unshard_short_side(params, one_layer_at_a_time=one_layer_at_a_time)
    with jax.set_mesh(mesh):
        found = train(memopt.reshard_update(tx, params, places), (1, 2, 3), on(mesh), places)
    expected = train(tx, (1, 2, 3), lambda x: x[0])
    chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("one_layer_at_a_time", [False, True], ids=["all layers", "one layer"])
def test_the_shorter_side_is_whole_while_the_optimizer_runs(one_layer_at_a_time):
    mesh, seen = make_mesh(AxisType.Auto), {}

    def watch(updates, state, params=None):
        for path, u in jax.tree_util.tree_leaves_with_path(updates):
            note = lambda sharding, path=path, u=u: seen.update(
                {path[1].key: sharding.shard_shape(u.shape)}
            )
            jax.debug.inspect_array_sharding(u, callback=note)
        return jax.tree.map(jnp.sin, updates), state

    watching = optax.GradientTransformation(lambda params: optax.EmptyState(), watch)
    params = tree(0, on(mesh))
    places = memopt.unshard_short_side(params, one_layer_at_a_time=one_layer_at_a_time)
    tx = memopt.reshard_update(watching, params, places)
    blocks = (
        jax.tree.map(lambda p: p[0], params["blocks"]) if one_layer_at_a_time else params["blocks"]
    )
    updates = jax.jit(lambda x: tx.update({"blocks": x}, optax.EmptyState())[0])(blocks)["blocks"]
    if one_layer_at_a_time:
        shapes = {"up": (16, 8), "down": (8, 16), "o": (16, 2), "odd": (2, 10), "few": (8, 3)}
    else:
        shapes = {"up": (1, 16, 32), "down": (1, 32, 16), "o": (2, 16, 4)}
        shapes |= {"odd": (3, 2, 10), "few": (2, 8, 3)}
    assert seen == shapes | {"norm": seen["norm"]}
    lies = lambda tree: {
        k: v["kernel"].sharding.shard_shape(v["kernel"].shape)
        for k, v in tree.items()
        if k != "norm"
    }
    assert lies(updates) == lies(blocks)


def test_state_lies_where_it_is_used():
    params = tree(0, on(make_mesh(AxisType.Auto)))
    places = memopt.unshard_short_side(params)
    found = memopt.state_sharding(memopt.galore(RATE, rank=4), places)
    state = found.inner_states["matrices"].inner_state[0]
    at = lambda tree: tree["blocks"]["up"]["kernel"].spec
    assert at(state.inner.mu) == jax.P("fsdp", None, "tensor")  # (4, r, 64)
    assert at(state.projector[0]) == jax.P("fsdp", None, None)  # (4, 16, r)


def test_explicit_axes_say_themselves_where_arrays_are():
    mesh = make_mesh(AxisType.Explicit)
    params = tree(0, on(mesh))
    places = memopt.unshard_short_side(params)
    assert jax.tree.map(lambda x: x.sharding, places) == jax.tree.map(lambda x: x.sharding, params)
    tx = memopt.reshard_update(optax.identity(), params, places)
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(tx.update)(params, tx.init(params))
    chex.assert_trees_all_equal(updates, params)
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)


def test_quantized_parameters_are_placed_as_dense_ones():
    blocks = tree(0, on(make_mesh(AxisType.Auto)))["blocks"]
    params = {"blocks": {name: blocks[name] for name in ("up", "odd", "norm")}}
    codes = memopt.quantize_params(params, "int8")
    places = memopt.unshard_short_side(codes)
    assert jax.tree.map(lambda x: x.sharding, places) == jax.tree.map(
        lambda x: x.sharding, memopt.unshard_short_side(params)
    )


def test_an_array_of_no_known_place():
    params = {"up": {"kernel": on(make_mesh(AxisType.Auto))((jnp.ones((8, 16)), jax.P()))}}
    tx = memopt.reshard_update(optax.identity(), params, params)
    with pytest.raises(ValueError, match=r"params has no 'down/kernel', only \['up/kernel'\]"):
        tx.update({"down": params["up"]}, tx.init(params))
    with pytest.raises(ValueError, match=r"only one of them has \['down', 'up/kernel'\]"):
        memopt.reshard_update(optax.identity(), params, {"down": params["up"]["kernel"]})
