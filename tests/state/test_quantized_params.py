"""Parameters in fewer bits: what updates add up to, abstract and sharded."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt.state.quantized_params import is_quantized
from tests.optimizers.kinds import slow_unless

CODECS = ("int8", "int4", "float8", "bfloat16", "bfloat16+8")


def normal(seed, shape=(8, 64, 300)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tree(seed=0):
    """A stack, an embedding of odd width, a norm; sizes divide into blocks or do not."""
    return {
        "blocks": {"up": normal(seed, (4, 64, 256)), "norm": normal(seed + 1, (4, 64))},
        "embed": normal(seed + 2, (96, 200)),
    }


SPECS = {
    "blocks": {"up": jax.P(None, "a", "b"), "norm": jax.P(None, "a")},
    "embed": jax.P("a", "b"),
}


@jax.jit
def moved(params, update, steps):
    """Parameters after some equal updates."""
    body = lambda step, p: memopt.apply_rounded_updates(p, update, step)
    return jax.lax.fori_loop(0, steps, body, params)


def test_bfloat16_weights_move_by_updates_that_optax_loses():
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    update = {"w": jnp.full((64, 64), 1e-4)}
    lost = functools.reduce(lambda p, _: optax.apply_updates(p, update), range(50), params)
    assert (lost["w"] == 1).all()
    kept = moved(params, update, 2000)["w"]
    assert kept.dtype == jnp.bfloat16
    # Every weight by itself is within two of bfloat16's steps, their mean within three hundredths:
    # over twelve seeds it is off by 0.009 ± 0.011 of them.
    assert (np.abs(kept.astype(jnp.float32) - 1.2) <= 2 * 2**-7).all()
    assert abs(kept.astype(jnp.float32).mean() - 1.2) < 0.03 * 2**-7


def test_weights_move_alike_whatever_the_steps_go_up_by():
    """Multiples of a Fibonacci number are close together in a golden-ratio sequence."""

    @jax.jit
    def spread(stride):
        add = lambda i, w: memopt.apply_rounded_updates(w, jnp.full((32, 64), 1e-4), i * stride)
        moved = jax.lax.fori_loop(0, 1000, add, jnp.ones((32, 64), jnp.bfloat16))
        moved = moved.astype(jnp.float32) - 1
        return moved.std() / moved.mean()

    assert spread(1) < 0.1
    for stride in (21, 377, 987, 1597, 4181, 10946):  # the last three: up to 5 in one sequence
        assert spread(stride) < 1  # with independent bits 0.28


@pytest.mark.parametrize("codec", CODECS)
def test_small_updates_add_up_to_their_sum(codec):
    params, update = {"w": normal(0, (32, 300))}, {"w": 1e-4 * normal(1, (32, 300))}
    steps = 2000
    stored = memopt.quantize_params(params, codec)
    start = memopt.dequantize_params(stored)["w"]
    after = memopt.dequantize_params(moved(stored, update, steps))["w"]
    change = np.asarray(after - start, float)
    expected = steps * np.asarray(update["w"], float)
    slope = (change * expected).sum() / (expected**2).sum()
    # The error of each weight is about one code, or two; those of four bits are 0.4 apart here.
    code = {"int8": 0.03, "int4": 0.45, "float8": 0.4, "bfloat16": 2**-6, "bfloat16+8": 2**-13}
    assert np.abs(change - expected).max() <= 3 * code[codec]
    assert abs(slope - 1) <= 4 * code[codec] / np.sqrt((expected**2).sum()) + 1e-3
    assert abs((change - expected).mean()) <= 4 * code[codec] / np.sqrt(expected.size) + 1e-5


@pytest.mark.parametrize("codec", CODECS)
def test_parameters_that_do_not_change_keep_their_codes(codec):
    stored = memopt.quantize_params(tree(), codec)
    zeros = jax.tree.map(jnp.zeros_like, tree())
    chex.assert_trees_all_equal(moved(stored, zeros, 100), stored)
    nothing = {"blocks": {"up": None, "norm": None}, "embed": None}
    chex.assert_trees_all_equal(memopt.apply_rounded_updates(stored, nothing, 0), stored)
    # A block of which one weight moves keeps the codes of the others.
    one = jax.tree.map(lambda z: z.at[(0,) * z.ndim].set(1e-3), zeros)
    after = moved(stored, one, 1)
    differ = after["embed"].codes != stored["embed"].codes
    assert not differ.at[0, 0].set(False).any()


def test_bfloat16_and_remainder_stays_near_float32():
    params = {"w": normal(0, (64, 256))}
    stored = memopt.quantize_params(params, "bfloat16+8")
    apply = jax.jit(memopt.apply_rounded_updates)
    for step in range(50):
        update = {"w": 1e-3 * normal(step + 1, (64, 256))}
        params, stored = optax.apply_updates(params, update), apply(stored, update, step)
    dequantized = memopt.dequantize_params(stored)["w"]
    error = jnp.abs(dequantized - params["w"])
    # A step's rounding is by up to 2⁻¹⁵; fifty by chance would be at a median of 2⁻¹³.
    assert jnp.median(error / jnp.abs(params["w"])) < 2**-14.5
    assert jnp.abs((dequantized - params["w"]).mean()) < 2**-20


@pytest.mark.parametrize("codec", CODECS)
def test_abstract_parameters_are_like_real_ones(codec):
    stored = memopt.quantize_params(tree(), codec)
    abstract = memopt.quantize_params(jax.eval_shape(tree), codec)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, stored)
    back = jax.eval_shape(memopt.dequantize_params, abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, tree())


@pytest.mark.parametrize("codec", CODECS)
def test_abstract_parameters_keep_their_shardings(codec):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    place = lambda x, spec: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    )
    stored = memopt.quantize_params(jax.tree.map(place, tree(), SPECS), codec)
    embed = stored["embed"]
    assert embed.codes.sharding.spec == jax.P("a", "b")
    for scale in embed.scales:  # of 200 numbers, two: not to be divided by four
        whole = scale.shape[-1] % 4 != 0
        assert scale.sharding.spec == (jax.P("a", None) if whole else jax.P("a", "b"))
        scale.sharding.shard_shape(scale.shape)
    assert stored["blocks"]["norm"].sharding.spec == jax.P(None, "a")


def train(codec, params, updates):
    stored = memopt.quantize_params(params, codec)
    step = lambda i, stored: memopt.apply_rounded_updates(stored, updates, i)
    return jax.lax.fori_loop(0, 3, step, stored)


@functools.cache
def trained_on_one_device(codec):
    return jax.jit(train, static_argnums=0)(codec, tree(), tree(9))


@pytest.mark.parametrize(
    ("codec", "axis_type"),
    [
        pytest.param(codec, axis_type, id=f"{axis_type.name.lower()}-{codec}", marks=marks)
        for codec in CODECS
        for axis_type, marks in (
            (AxisType.Auto, slow_unless(codec == "int8")),
            (AxisType.Explicit, slow_unless(codec != "float8")),  # its state is like int8's
        )
    ],
)
def test_sharded_is_unsharded(codec, axis_type):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    with jax.set_mesh(mesh):
        placed = jax.device_put((tree(), tree(9)), (shardings, shardings))
        sharded = jax.jit(train, static_argnums=0)(codec, *placed)
        read = jax.jit(memopt.dequantize_params)(sharded)
    chex.assert_trees_all_equal(sharded, trained_on_one_device(codec))
    if axis_type == AxisType.Explicit:
        assert read["embed"].sharding.spec == jax.P("a", "b")


def test_dtypes_are_kept_and_trees_may_have_no_leaves():
    params = {"w": normal(0, (8, 16)).astype(jnp.bfloat16), "none": None, "n": jnp.ones(3)}
    stored = memopt.quantize_params(params)
    assert is_quantized(stored["w"])
    assert memopt.dequantize_params(stored)["w"].dtype == jnp.bfloat16
    assert memopt.dequantize_params(stored["w"]).shape == (8, 16)
    updates = {"w": jnp.ones((8, 16), jnp.bfloat16), "none": None, "n": jnp.ones(3)}
    after = memopt.apply_rounded_updates(stored, updates, 0)
    assert after["none"] is None
    assert (after["n"] == 2).all()
    for nothing in (None, {}, {"a": None}):
        assert memopt.quantize_params(nothing) == nothing
        assert memopt.dequantize_params(nothing) == nothing
        assert memopt.apply_rounded_updates(nothing, nothing, 0) == nothing


def test_which_leaves_are_stored_is_a_selection():
    stored = memopt.quantize_params(tree(), matrices=memopt.hidden_matrices)
    assert is_quantized(stored["blocks"]["up"])
    assert not is_quantized(stored["embed"])


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match="codec 'int9' is unknown; did you mean 'int8'"):
        memopt.quantize_params(tree(), "int9")
