"""A gradient that is not finite leaves its own matrix, or the step, as it was; others go on."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from benchmarks.extra_arguments import with_extra_arguments
from memopt.optimizers.registry import METHODS
from memopt.state.owners import is_state_array, owners
from tests.optimizers.kinds import slow_unless

LAYERS = 3
SHAPES = {"up": (LAYERS, 8, 12), "embedding": (20, 8), "norm": (LAYERS, 8)}
RATE = 1e-2


def draw(seed):
    normal = np.random.default_rng(seed).normal
    return {name: jnp.asarray(normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def hit(gradient, value):
    """Makes one entry of a layer's matrix, and one of another layer's vector, not finite."""
    up, norm = gradient["up"].at[1, 2, 3].set(value), gradient["norm"].at[2, 4].set(-value)
    return gradient | {"up": up, "norm": norm}


def make(name):
    if name == "adamw_8bit":
        return memopt.quantize_state(optax.adamw(RATE), min_size=8)
    options = {"rank": 2} if METHODS[name].has_free_rank else {}
    return with_extra_arguments(memopt.optimizer)(name, RATE, **options)


def steps(tx, params, gradients):
    """Parameters and state after each step."""

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    found = [(params, jax.jit(tx.init)(params))]
    for g in gradients:
        found.append(step(*found[-1], g))
    return found


def by_layer(state, params, name):
    """The state arrays of a parameter that have its layers."""
    index = sorted(SHAPES).index(name)
    arrays = jax.tree.leaves(owners(state, params), is_leaf=is_state_array)
    pairs = zip(arrays, jax.tree.leaves(state), strict=True)
    return [x for a, x in pairs if a.parameter == index and x.shape[:1] == (LAYERS,)]


ALSO = ("adamw", "adamw_8bit")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=slow_unless(name in ("adafactor", "galore")))
        for name in (*ALSO, *memopt.available("memopt"))
    ],
)
def test_a_matrix_that_is_hit_stays_and_others_go_on(name):
    gradients = [draw(seed) for seed in range(1, 6)]
    inner, whole = make(name), steps(make(name), draw(0), gradients)
    tx = memopt.skip_nonfinite(inner)
    holed = steps(tx, draw(0), [*gradients[:2], hit(gradients[2], jnp.nan), *gradients[3:]])
    for name, missing in (("up", 1), ("norm", 2), ("embedding", None)):
        left = np.arange(SHAPES[name][0]) != missing
        (before, old), (after, new), (_, clean) = holed[2], holed[3], whole[3]
        # Up to the rounding of one program or another.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        close(after[name][left], whole[3][0][name][left])
        np.testing.assert_array_equal(after[name][~left], before[name][~left])
        arrays = (by_layer(state, draw(0), name) for state in (old.inner, new.inner, clean))
        for old_x, new_x, clean_x in zip(*arrays, strict=True):
            wide = lambda x: np.asarray(x, np.float32)
            np.testing.assert_array_equal(wide(new_x[~left]), wide(old_x[~left]))
            # Codes rounded otherwise may be the ones beside.
            close(wide(new_x[left]), wide(clean_x[left]), atol=1 if "8bit" in name else 1e-6)
    params, state = holed[-1]
    chex.assert_tree_all_finite((params, state))
    assert jnp.any(params["up"][1] != holed[3][0]["up"][1])
    skipped = {name: x.tolist() for name, x in state.skipped.items()}
    assert skipped == {"up": [0, 1, 0], "norm": [0, 0, 1], "embedding": 0}


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_a_step_is_skipped_whole_with_its_counts(value):
    gradients = [draw(seed) for seed in range(1, 4)]
    tx = memopt.skip_nonfinite(optax.adam(optax.linear_schedule(RATE, 0.0, 5)), per="tree")
    clean = steps(tx, draw(0), gradients)
    holed = steps(tx, draw(0), [*gradients[:2], hit(gradients[0], value), gradients[2]])
    chex.assert_trees_all_equal(holed[3][0], holed[2][0])
    chex.assert_trees_all_equal(holed[4][0], clean[3][0])
    chex.assert_trees_all_equal(holed[4][1].inner, clean[3][1].inner)
    assert holed[4][1].skipped == 1


def test_a_norm_of_all_gradients_leaves_out_what_is_hit():
    """So does the norm that training steps pass."""
    params, gradient = draw(0), draw(1)
    zeros = jax.tree.map(jnp.zeros_like, hit(gradient, jnp.nan))
    rest = {
        "up": gradient["up"].at[1].set(0),
        "norm": gradient["norm"].at[2].set(0),
        "embedding": gradient["embedding"],
    }
    tx = optax.chain(memopt.clip_by_gradient_norm(1.0, previous=True), optax.sgd(1.0))
    expected = optax.tree.norm(rest)
    wrapped = memopt.skip_nonfinite(tx)
    update = functools.partial(wrapped.update, hit(gradient, jnp.nan), wrapped.init(params))
    for norm in ({}, {"gradient_norm": jnp.float32(jnp.nan)}):
        _, state = update(zeros, **norm)
        np.testing.assert_allclose(state.inner[0].norm, expected, rtol=1e-6)


@pytest.mark.parametrize("per", ["matrix", "tree"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_a_mesh_the_same_is_skipped(axis_type, per):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type, axis_type))
    specs = {"up": jax.P(None, "a", "b"), "embedding": jax.P("b"), "norm": jax.P(None, "a")}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    tx = memopt.skip_nonfinite(make("adafactor"), per)
    gradients = [draw(1), hit(draw(2), jnp.inf)]
    expected = steps(tx, draw(0), gradients)[-1]
    with jax.set_mesh(mesh):
        place = functools.partial(jax.device_put, device=shardings)
        found = steps(tx, place(draw(0)), [*map(place, gradients)])[-1]
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-5)
    if per == "matrix":
        assert found[1].skipped["up"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("per", ["matrix", "tree"])
def test_models_of_their_own_on_each_device_count_for_themselves(per):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    tx = memopt.skip_nonfinite(optax.sgd(1.0, momentum=0.9), per)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=jax.P("model"), out_specs=jax.P("model"))
    def train(gradients):
        def step(carry, g):
            updates, state = tx.update(g, carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        params = 0 * gradients[0, 0]
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), gradients[0])
        return params[None], state.skipped[None]

    gradients = jnp.ones((4, 2, 3, 5)).at[2, 1, 0, 0].set(jnp.nan)
    params, skipped = jax.jit(train)(gradients)
    assert skipped.tolist() == [0, 0, 1, 0]
    np.testing.assert_allclose(params[:, 0, 0], [-2.9, -2.9, -1.0, -2.9], rtol=1e-6)


@pytest.mark.parametrize("factored", [False, True])
def test_moments_of_several_tasks_are_kept_for_the_matrix_that_is_hit(factored):
    tx = memopt.skip_nonfinite(memopt.tag(1e-2, tasks=3, factored=factored))  # as many as layers
    params = {"blocks": {"kernel": jnp.ones((3, 4, 6))}}
    update = jax.jit(lambda g, state: tx.update(g, state, params, task=2)[1])
    before = update(params, tx.init(params))
    hit = {"blocks": {"kernel": params["blocks"]["kernel"].at[1, 0, 0].set(jnp.nan)}}
    after = update(hit, before)
    for old, new in zip(*map(jax.tree.leaves, (before.inner, after.inner)), strict=True):
        if new.shape[:2] == (3, 3):  # tasks, layers
            moved = jnp.any(new != old, range(2, new.ndim))
            assert not moved[:, 1].any()
            assert moved[2].tolist() == [True, False, True]


def test_layers_may_count_on_any_axis():
    """Factored moments have the array's other axes; moments in a subspace begin with the stack."""
    axes = {"w": memopt.Matrix(rows=0, cols=2)}
    params = {"w": jnp.ones((6, 3, 4))}
    gradient = {"w": params["w"].at[5, 1, 2].set(jnp.nan)}
    inner = optax.chain(memopt.scale_by_factored_matrix_rms(matrices=axes), optax.trace(0.9))
    tx = memopt.skip_nonfinite(inner, matrices=axes)
    _, state = tx.update(params, tx.init(params))
    updates, after = tx.update(gradient, state)
    assert after.skipped["w"].tolist() == [0, 1, 0]
    assert [bool(jnp.all(updates["w"][:, i] == 0)) for i in range(3)] == [False, True, False]
    arrays = [x for x in jax.tree.leaves((state.inner, after.inner)) if x.ndim]
    for old, new in zip(arrays[:3], arrays[3:], strict=True):
        layer = old.shape.index(3)
        same = jnp.all(old == new, [a for a in range(old.ndim) if a != layer])
        assert same[1]
        assert old.ndim < 3 or same.tolist() == [False, True, False]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="per 'layer' is unknown"):
        memopt.skip_nonfinite(optax.sgd(1.0), per="layer")
    with pytest.raises(ValueError, match="matrices must be left out, since per='tree'"):
        memopt.skip_nonfinite(optax.sgd(1.0), per="tree", matrices=memopt.out_in)
