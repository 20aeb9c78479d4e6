"""The codec of averages of Gram matrices, and where it is used."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from memopt import codecs
from memopt.state.rounding import NEAREST, rounding_bits
from memopt.trees import named_leaves

CODEC = codecs.Gram()
CODE = 1 / (127 * 128)  # the distance of two fine codes


def grams(size=1.0, spread=3.0, shape=(3, 24, 40), seed=0):
    """Averages of G Gᵀ whose rows have very different sizes."""
    draw = np.random.default_rng(seed)
    g = draw.normal(size=shape) * np.exp(spread * draw.normal(size=(*shape[:-1], 1)))
    return jnp.asarray(size * g @ np.swapaxes(g, -1, -2), jnp.float32)


def correlations(x):
    root = np.sqrt(np.diagonal(np.asarray(x, float), axis1=-2, axis2=-1))
    return np.asarray(x, float) / root[..., None] / root[..., None, :]


@jax.jit
def there_and_back(x, bits=NEAREST):
    return CODEC.decode(CODEC.encode(x, bits))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_the_diagonal_is_exact_and_pairs_have_sixteen_thousandths(size):
    x = grams(size)
    coded = CODEC.encode_nearest(x)
    assert (coded.codes.dtype, coded.codes.shape) == (jnp.int8, x.shape)
    assert [s.shape for s in coded.side_data] == [(*x.shape[:-1], 1)]
    for bits in (NEAREST, 0, 2**32 - 1, rounding_bits(x.shape, "left", 3)):
        back = there_and_back(x, jnp.asarray(bits, jnp.uint32))
        off = np.abs(correlations(back) - correlations(x))
        assert off.max() <= CODE * 1.01
        np.testing.assert_array_equal(back, back.mT)
        np.testing.assert_array_equal(jnp.diagonal(back, 0, 1, 2), jnp.diagonal(x, 0, 1, 2))
    assert off.max() > CODE / 4


def test_pairs_may_differ_by_rounding():
    """Covers entries whose nearest coarse code differs from that of their mirror image."""
    middles = (np.arange(-127, 127) + 0.5) / 127
    pair = lambda a, b: jnp.array([[1.0, a], [b, 1.0]], jnp.float32)
    for off in (-1e-5, 1e-5):
        x = jnp.stack([pair(r, r + off) for r in middles])
        np.testing.assert_allclose(there_and_back(x)[:, 0, 1], x[:, 1, 0], atol=1.01 * CODE)


def test_rounding_is_unbiased_over_the_steps():
    x, count = grams(), 256
    mean = jnp.mean(
        jax.vmap(lambda t: there_and_back(x, rounding_bits(x.shape, "left", t)))(jnp.arange(count)),
        0,
    )
    off = np.abs(correlations(mean) - correlations(x)).max()
    assert off <= CODE * np.log(count) / count


def test_small_eigenvalues_are_not_drowned():
    """Those of a gradient of low rank with a little noise, which 8 bits an entry would lose."""
    draw = np.random.default_rng(1)
    g = draw.normal(size=(64, 4)) @ draw.normal(size=(4, 256)) + 0.1 * draw.normal(size=(64, 256))
    x = jnp.asarray(g @ g.T, jnp.float32)
    exact = np.linalg.eigvalsh(np.asarray(x, float))
    off = lambda back: np.abs(np.linalg.eigvalsh(np.asarray(back, float)) / exact - 1).max()
    tapered = codecs.Tapered()
    bits = rounding_bits(x.shape, "left", 0)
    assert exact[-1] > 2e4 * exact[0]
    assert off(there_and_back(x, bits)) < 0.1
    assert off(tapered.decode(tapered.encode(x, bits))) > 100


def test_zeros_stay_and_numbers_that_are_not_finite_are_not_lost():
    x = grams().at[0].set(0).at[1, 3].set(0).at[1, :, 3].set(0)
    back = there_and_back(x)
    assert not back[0].any()
    assert not back[1, 3].any()
    assert not back[1, :, 3].any()
    for bad in (jnp.nan, jnp.inf):
        back = there_and_back(x.at[2, 5, 7].set(bad))
        assert jnp.isnan(back[2, 5]).all()
        np.testing.assert_array_equal(back[:2], there_and_back(x)[:2])


@pytest.mark.parametrize("codec", ["int8", "int4", "flash8", "bfloat16", ("bfloat16", "int8")])
def test_factors_have_it_whatever_other_arrays_have(codec):
    tx = memopt.quantize_state(memopt.soap(1e-3, block_size=64), codec)
    state = tx.init({"up": jnp.ones((128, 64)), "norm": jnp.ones(64)})
    factors = [
        (name, x) for name, x in named_leaves(state)[0] if re.search(r"/(left|right)/", name)
    ]
    found = {(name.split("/")[0], x.dtype.name, x.shape[-1]) for name, x in factors}
    if "bfloat16" in codec:
        assert found == {("codes", "bfloat16", 64)}
    else:
        assert found == {("codes", "int8", 64), ("scales", "float32", 1)}


def test_soap_in_8_bits_takes_the_steps_of_float32():
    """Trains with factors whose eigenvalues are six orders of magnitude apart."""
    draw = np.random.default_rng(2)
    scales = np.logspace(0, -3, 64)
    g = draw.normal(size=(30, 64, 64)) * scales[:, None] * scales
    params = {"up": jnp.zeros((64, 64))}

    def steps(tx):
        def step(state, g):
            updates, state = tx.update({"up": g}, state, params)
            return state, updates["up"]

        return jax.lax.scan(step, tx.init(params), jnp.asarray(g, jnp.float32))[1]

    exact = memopt.soap(1.0, refresh_every=5)
    off = lambda a, b: jnp.linalg.norm(a - b) / jnp.linalg.norm(b)
    found = {
        "factors": memopt.quantize_state(exact, {"/(left|right)/": "int8"}),
        "all": memopt.quantize_state(exact),
        "exact": exact,
    }
    found = jax.jit(lambda: {name: steps(tx) for name, tx in found.items()})()
    assert off(found["factors"], found["exact"]) < 1e-3
    assert off(found["all"], found["exact"]) < 0.3
