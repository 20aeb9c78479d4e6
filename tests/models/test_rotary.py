"""Rotary angles against formulas written a second time, from the papers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from memopt.models.config import preset
from memopt.models.rotary import inverse_frequencies, rotary_tables, rotate


def llama3_by_cases(config) -> list[float]:
    """Llama 3's rule in its three cases, by wavelength."""
    scaling, frequencies = config.rope_scaling, []
    for pair in range(config.head_dim // 2):
        frequency = 1.0 / config.rope_theta ** (2 * pair / config.head_dim)
        wavelength = 2 * math.pi / frequency
        context = scaling.original_max_seq_len
        if wavelength > context / scaling.low_freq_factor:
            frequency /= scaling.factor
        elif wavelength >= context / scaling.high_freq_factor:
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            smooth = (context / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequencies.append(frequency)
    return frequencies


def test_llama3_scaling_is_the_rule_in_three_cases():
    config = preset("llama-3.2-1b")
    ours = inverse_frequencies(config)
    np.testing.assert_allclose(ours, llama3_by_cases(config), rtol=1e-12)
    plain = config.rope_theta ** -(np.arange(32) / 32)
    kinds = {"kept": np.isclose(ours, plain), "stretched": np.isclose(ours, plain / 32)}
    blended = ~(kinds["kept"] | kinds["stretched"])
    assert kinds["kept"].any()
    assert kinds["stretched"].any()
    assert blended.any()


def test_rotation_is_a_complex_product():
    config = preset("60m")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 64)).astype(np.float32)
    positions = rng.integers(0, 100, (2, 5))
    ours = rotate(jnp.asarray(x), rotary_tables(config, jnp.asarray(positions)))

    angles = positions[..., None, None] * 10000.0 ** -(np.arange(32) / 32)
    turned = (x[..., :32] + 1j * x[..., 32:]) * np.exp(1j * angles)
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag], -1), atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_keeps_the_dtype(dtype):
    tables = rotary_tables(preset("60m"), jnp.arange(4)[None])
    assert rotate(jnp.ones((1, 4, 2, 64), dtype), tables).dtype == dtype
