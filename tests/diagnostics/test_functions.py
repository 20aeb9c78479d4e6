"""Spectra, codec errors and sharpness against NumPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import codecs, diagnostics


def matrices(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_singular_values_of_a_stack_are_those_of_each_matrix():
    x = matrices(3, 5, 4)
    expected = [np.linalg.svd(np.float64(one), compute_uv=False) for one in x]
    np.testing.assert_allclose(diagnostics.singular_values(x), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e30])
def test_the_stable_rank_is_that_of_the_spectrum_whatever_the_scale(scale):
    spectrum = 0.8 ** np.arange(6)
    u, v = (np.linalg.qr(matrices(n, 6, seed=n))[0] for n in (12, 9))
    x = jnp.stack([u * spectrum @ v.T, u[:, :1] @ v[:, :1].T]) * scale
    found = diagnostics.stable_rank(x)
    np.testing.assert_allclose(found, [np.square(spectrum).sum(), 1], rtol=1e-3)


def test_the_stable_rank_of_zeros_is_not_a_number():
    assert np.isnan(diagnostics.stable_rank(jnp.zeros((3, 4))))


def test_the_codec_error_is_that_of_encoding_and_decoding():
    x = matrices(16, 256)
    codec = codecs.Integers(bits=8)
    coded = codec.encode(x, jnp.full(x.shape, 2**31, jnp.uint32))
    expected = np.linalg.norm(codec.decode(coded) - x) / np.linalg.norm(x)
    np.testing.assert_allclose(diagnostics.codec_error(x, codec), expected, rtol=1e-6)
    nearest, stochastic = (
        diagnostics.codec_error(x, codec, key) for key in (None, jax.random.key(0))
    )
    assert 1.3 < stochastic / nearest < 1.5  # √2 in expectation, of uniform errors


def test_a_codec_for_squares_differs_from_that_for_signed_numbers():
    x = jnp.square(matrices(16, 256))
    signed, unsigned = (diagnostics.codec_error(x, "int8", kind=k) for k in ("signed", "unsigned"))
    assert unsigned < signed
    with pytest.raises(ValueError, match="kind 'squares' is unknown"):
        diagnostics.codec_error(x, "int8", kind="squares")


def test_the_directional_sharpness_is_the_quadratic_form_of_the_hessian():
    x = matrices(7, 3)
    loss = lambda params, x: jnp.log1p(jnp.exp(x @ params["w"] + params["b"])).sum()
    params = {"w": jnp.array([0.3, -0.2, 0.1]), "b": jnp.array(0.5)}
    direction = {"w": jnp.array([1.0, 2.0, -1.0]), "b": jnp.array(0.5)}
    flat = lambda p: jnp.append(p["w"], p["b"])
    hessian = jax.hessian(lambda v: loss({"w": v[:3], "b": v[3]}, x))(flat(params))
    d = flat(direction)
    expected = d @ hessian @ d / (d @ d)
    found = diagnostics.directional_sharpness(loss, params, direction, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_error_of_a_codec_does_not_depend_on_the_scale():
    x = jax.random.normal(jax.random.key(0), (64, 256))
    errors = [float(diagnostics.codec_error(scale * x, "int8")) for scale in (1.0, 2.0**-100)]
    np.testing.assert_allclose(*errors, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sharpness_does_not_depend_on_the_length_of_the_direction(dtype, size):
    loss = lambda w: w[0] ** 2 + 5 * w[1] ** 2
    w = jnp.ones(2, dtype)
    found = diagnostics.directional_sharpness(loss, w, size * jnp.array([1.0, -1.0]))
    assert float(found) == pytest.approx(6, rel=float(jnp.finfo(dtype).eps))
