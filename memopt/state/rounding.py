"""Random bits for stochastic rounding."""

import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from memopt.shapes import Bits

_GOLDEN = np.uint32(0x9E3779B9)  # 2³² divided by the golden ratio

NEAREST = np.uint32(2**31)
"""The bits with which numbers are rounded to nearest."""


def rounding_bits(
    shape: tuple[int, ...], name: str, step: Array | int, seed: int | Array = 0
) -> Bits:
    """Returns 32 random bits for each number of an array, which decide its rounding.

    They are a product of hashes of (seed, name), row and column, plus `step` times 2³²/φ. At each
    step they are uniform; over the steps, those of one number are a golden-ratio sequence.
    Rounding errors therefore stay within about one code instead of adding up as a random walk,
    which a second moment of decay 0.999 would multiply by 22. Every 8192 steps the sequence goes on
    at another place, as multiples of a Fibonacci number, such as 1597, would otherwise repeat. All
    matrices of a stack have the same bits, however it is sharded.

    Args:
        shape: the shape of the array; its last two axes are row and column.
        name: the name of the array. Numbers in it are ignored, so that all layers have the same
            bits, stacked or not.
        step: the number of previous steps.
        seed: the seed of the hash.

    Returns:
        An array of uint32 of the given shape.

    References:
        Low-discrepancy rounding: Weyl's sequence, in Kuipers & Niederreiter, Uniform distribution
        of sequences, 1974; the hash is that of Wellons, Prospecting for hash functions, 2018.

    Example:
        >>> rounding_bits((3, 4, 5), "w", step=0).shape
        (3, 4, 5)
        >>> first, second = (rounding_bits((4, 5), "w", step) for step in (0, 1))
        >>> bool((second == first + np.uint32(0x9E3779B9)).all())
        True
    """
    stream = jnp.asarray(seed).astype(jnp.uint32) * _GOLDEN + np.uint32(
        zlib.crc32(re.sub(r"[/_]?\d+", "", name).lstrip("/").encode())
    )
    bits = jnp.broadcast_to(_hashed(stream) | 1, shape)
    for axis in range(len(shape))[-2:]:
        # Constant hashes need one multiplication per number; hashing each position takes three.
        start = len(shape) - axis << 16  # rows and columns have different hashes
        places = np.arange(start, start + shape[axis], dtype=np.uint32)
        bits = bits * jax.lax.broadcast_in_dim(_hashed(places) | 1, shape, (axis,))
    step = jnp.asarray(step).astype(jnp.uint32)
    return bits + step * _GOLDEN + _hashed(step >> 13)


def uniform(bits: Bits) -> Array:
    """Converts 32 random bits to a float32 in [0, 1).

    Example:
        >>> uniform(jnp.asarray(NEAREST)).item()
        0.5
    """
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def _hashed(x: Any) -> Any:
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
