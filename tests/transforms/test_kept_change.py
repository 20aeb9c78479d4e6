"""The largest changes are kept, exactly so many, and all other weights return to the base."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt import keep_largest_change
from memopt.models import StackedModel
from memopt.training.release import release_step
from memopt.training.step import init_state
from memopt.transforms.kept_change import among_largest

FRACTION, EVERY = 0.3, 3
SHAPES = {"blocks": {"up": (3, 8, 10), "norm": (3, 8)}, "embed": (20, 7), "shift": ()}


def draw(seed):
    normal = np.random.default_rng(seed).normal
    is_shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda s: jnp.asarray(normal(size=s), "float32"), SHAPES, is_leaf=is_shape)


def selected(changed, base, core):
    """The weights after a selection, by sorting each matrix."""
    changed, base = (np.asarray(x, float).reshape(-1, core) for x in (changed, base))
    result = base.copy()
    for row, (w, start) in enumerate(zip(changed, base, strict=True)):
        order = np.argsort(-np.abs(w - start), kind="stable")[: int(FRACTION * core)]
        result[row, order] = w[order]
    return result


def test_equals_a_selection_by_sorting():
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), keep_largest_change(None, FRACTION, EVERY))
    plain = optax.sgd(0.1, momentum=0.9)
    base = params = expected = draw(0)
    state, momentum = tx.init(params), plain.init(params)
    cores = {"blocks": {"up": 80, "norm": 8}, "embed": 140, "shift": 1}
    update = jax.jit(tx.update)
    for t in range(2 * EVERY):
        updates, state = update(draw(10 + t), state, params)
        params = optax.apply_updates(params, updates)
        updates, momentum = plain.update(draw(10 + t), momentum)
        expected = optax.apply_updates(expected, updates)
        if (t + 1) % EVERY == 0:
            select = lambda w, b, core: jnp.asarray(selected(w, b, core).reshape(w.shape), w.dtype)
            expected = jax.tree.map(select, expected, base, cores)
            kept = jax.tree.map(lambda w, b: int((abs(w - b) > 1e-5).sum()), params, base)
            assert kept == {"blocks": {"up": 3 * 24, "norm": 3 * 2}, "embed": 42, "shift": 0}
        chex.assert_trees_all_close(params, expected, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal(state[-1].base, base)


@pytest.mark.parametrize("count", [0, 1, 5, 11, 12])
def test_of_equal_numbers_the_first_are_chosen(count):
    x = np.array([[0, 2, 2, 0], [2, 1, 5e-42, 0], [2, 0, np.inf, 2]], np.float32)
    chosen = np.zeros(12, bool)
    chosen[np.argsort(-x.ravel(), kind="stable")[:count]] = True
    stack = jnp.asarray(np.stack([x, np.zeros_like(x), x]))
    found = jax.jit(among_largest, static_argnums=(1, 2))(stack, count, (1, 2))
    np.testing.assert_array_equal(found[::2], np.stack([chosen.reshape(3, 4)] * 2))
    assert int(found[1].sum()) == count  # of zeros, too


def test_the_number_is_exact_where_the_changes_are_an_expression():
    """XLA for CPUs computes cheap operands again, with other roundings."""
    normal = np.random.default_rng(0).normal
    w, g = (jnp.asarray(normal(scale=0.3, size=(4, 6, 8)), "float32") for _ in range(2))
    tx = keep_largest_change(None, FRACTION, 1)
    update = jax.jit(lambda w, g: tx.update(g, tx.init(w), 1.5 * w)[0]).lower(w, g)
    update = update.compile({"xla_backend_optimization_level": 3})
    assert (update(w, g) == g).sum((1, 2)).tolist() == [int(FRACTION * 48)] * 4


def test_float64_changes_are_compared_in_all_their_bits():
    with jax.enable_x64(True):
        x = jnp.asarray([1 + 2e-15, 1.0, 1 + 4e-15, 1 + 3e-15])
        assert among_largest(x, 2, (0,)).tolist() == [False, False, True, True]


@pytest.mark.parametrize("codec", [None, "int8"])
def test_the_base_may_be_other_values_and_codes(codec):
    base, params = draw(1), draw(0)
    tx = keep_largest_change(base, 0.0, 1, codec=codec)
    state = jax.jit(tx.init)(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, after = jax.jit(tx.update)(zeros, state, params)
    chex.assert_trees_all_equal(after.base, state.base)
    returned = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(returned, jax.jit(memopt.dequantize_params)(state.base), atol=1e-6)
    chex.assert_trees_all_close(returned, base, atol=0.02 if codec else 1e-6)
    if codec:
        assert state.base["embed"].codes.dtype == jnp.int8
        kept = memopt.state_bytes(
            keep_largest_change(None, 0.0, 1, codec=codec), {"w": jnp.ones((256, 512))}
        )
        assert kept["w"] == 256 * (512 + 3 * 4)
    part = jax.eval_shape(
        optax.masked(tx, {k: k != "embed" for k in base}).init, params
    ).inner_state
    assert isinstance(part.base["embed"], optax.MaskedNode)  # the base of a part is its part


def test_parameters_and_state_can_both_be_donated():
    params = draw(0)
    tx = keep_largest_change(None, 0.5, 1)
    step = jax.jit(lambda p, s: tx.update(p, s, p), donate_argnums=(0, 1))
    step(params, tx.init(params))


@pytest.mark.parametrize("codec", [None, "int8"])
def test_a_released_step_can_select_a_layer_at_a_time(codec):
    model = StackedModel(
        embed=lambda rest, batch: batch @ rest["in"],
        block=lambda w, x, batch: jnp.tanh(x @ w["up"]),
        head=lambda rest, x, batch: (jnp.square(x).sum(), jnp.asarray(len(x))),
    )
    params = {"in": jnp.ones((3, 8)), "blocks": {"up": jnp.ones((2, 8, 8))}}
    tx = optax.chain(memopt.lion(1e-2), keep_largest_change(None, FRACTION, 2, codec=codec))
    options = {"model": model, "tx": tx, "learning_rate": optax.constant_schedule(1e-2)}
    state = jax.eval_shape(functools.partial(init_state, tx=tx), params)
    after, _ = jax.eval_shape(functools.partial(release_step, **options), state, jnp.ones((4, 3)))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_a_mesh_the_base_follows_its_parameter_and_only_counts_are_sent(axis_type):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    whole = {"up": jnp.asarray(np.random.default_rng(0).integers(-3, 3, (3, 16, 32)), "float32")}
    sharding = NamedSharding(mesh, jax.P(None, "a", "b"))
    params = jax.device_put(whole, sharding)
    tx = keep_largest_change(jax.tree.map(jnp.zeros_like, whole), FRACTION, 1)
    state = memopt.init_sharded(tx, params)
    assert state.base["up"].sharding == sharding
    with jax.set_mesh(mesh):
        update = jax.jit(tx.update).lower(params, state, params).compile()
        updates, _ = update(params, state, params)
    text = update.as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    expected, _ = tx.update(whole, tx.init(whole), whole)
    chex.assert_trees_all_equal(updates, expected)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: keep_largest_change(None, 1.5, 1), "fraction must be between 0 and 1, got 1.5"),
        (lambda: keep_largest_change(None, 0.5, 0), "every must be at least 1, got 0"),
        (
            lambda: keep_largest_change({"v": jnp.ones(3)}, 0.5, 1).init({"w": jnp.ones(3)}),
            "base must have an entry for 'w'",
        ),
        (
            lambda: keep_largest_change({"w": jnp.ones(2)}, 0.5, 1).init({"w": jnp.ones(3)}),
            r"base has shape \(2,\) for 'w', the parameter \(3,\)",
        ),
    ],
)
def test_bad_options_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("call", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_base_that_does_not_fit_is_refused(call):
    tx = keep_largest_change({"w": jnp.ones(2)}, 0.5, 1)
    with pytest.raises(ValueError, match=r"base has shape \(2,\) for 'w', the parameter \(3,\)"):
        call(tx.init)({"w": jnp.ones(3)})


def test_a_fraction_counts_as_it_is_written():
    tx = keep_largest_change(None, 0.29, 1)
    w = jnp.zeros(100)
    updates, _ = tx.update(jnp.arange(1.0, 101.0), tx.init(w), w)
    assert int((updates != 0).sum()) == 29
