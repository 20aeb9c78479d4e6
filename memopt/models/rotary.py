"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), half-split as at Hugging Face."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from memopt.models.config import LlamaConfig


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
    if scaling is None:
        return frequencies
    turns = scaling.original_max_seq_len * frequencies / (2 * np.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


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
    return jnp.cos(angles), jnp.sin(angles)


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
