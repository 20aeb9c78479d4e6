"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), half-split as at Hugging Face."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from memopt.models.config import LlamaConfig, RopeScaling


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angle per position of each pair of channels.

    Args:
        config: Gives `head_dim`, `rope_theta` and `rope_scaling`.

    Returns:
        float64 array `(head_dim // 2,)`.

    Example:
        >>> from memopt.models.config import preset
        >>> inverse_frequencies(preset("60m")).shape
        (32,)

    """
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    keep = _kept(config, scaling, frequencies)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def _kept(config: LlamaConfig, scaling: RopeScaling, frequencies: np.ndarray) -> Any:
    """The share of each frequency that is not divided by the factor."""
    if scaling.kind == "linear":
        return 0.0
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_seq_len * frequencies / (2 * np.pi)
        return np.clip((turns - low) / (high - low), 0.0, 1.0)

    def pair(turns: float) -> float:
        """Index, among the pairs of channels, of a number of turns in the original context."""
        wavelength = scaling.original_max_seq_len / (2 * math.pi * turns)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The bounds, and the width of an empty blend, are transformers'.
    first, last = max(first, 0), min(last, config.head_dim - 1)
    pairs = np.arange(config.head_dim // 2)
    return 1 - np.clip((pairs - first) / ((last - first) or 0.001), 0.0, 1.0)


def rotary_tables(config: LlamaConfig, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles.

    Args:
        config: Gives `head_dim`, `rope_theta` and `rope_scaling`.
        positions: Integers `(batch, seq)`; a leading axis of 1 serves every row.

    Returns:
        Two float32 arrays `(batch, seq, head_dim // 2)`.

    Example:
        >>> from memopt.models.config import preset
        >>> cos, sin = rotary_tables(preset("60m"), jnp.arange(4)[None])
        >>> cos.shape
        (1, 4, 32)

    """
    angles = positions[..., None].astype(jnp.float32) * jnp.float32(inverse_frequencies(config))
    scale = attention_factor(config)
    return scale * jnp.cos(angles), scale * jnp.sin(angles)


def attention_factor(config: LlamaConfig) -> float:
    """The factor that yarn multiplies queries and keys by; 1 for all others.

    Args:
        config: Gives `rope_scaling`.

    Example:
        >>> from memopt.models.config import preset
        >>> attention_factor(preset("60m"))
        1.0

    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(max(1.0, scaling.factor)) + 1


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """Turn each pair of channels `(i, i + head_dim/2)` by its angle.

    Args:
        x: `(batch, seq, heads, head_dim)`.
        tables: What `rotary_tables` returns.

    Returns:
        Shape and dtype of `x`; the rotation itself is in float32.

    Example:
        >>> from memopt.models.config import preset
        >>> x = jnp.ones((1, 1, 2, 64))
        >>> still = rotate(x, rotary_tables(preset("60m"), jnp.zeros((1, 1), jnp.int32)))
        >>> bool((still == x).all())
        True

    """
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
