"""Random bits that decide how numbers are rounded."""

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
"""The bits that round to the nearest."""


def rounding_bits(
    shape: tuple[int, ...], name: str, step: Array | int, seed: int | Array = 0
) -> Bits:
    """32 random bits for each number of an array, by which it is rounded up or down.

    They are a product of hashes, of (seed, name), row and column, plus `step` times 2³²/φ: uniform
    at every step, and over the steps of one number a golden-ratio sequence. So rounding errors do
    not add up as a random walk would, which a second moment of decay 0.999 multiplies by 22, but
    stay within about a code. Every matrix of a stack has the same bits, however it is sharded.

    Args:
      shape: of the array; its last two axes are the place in the matrix.
      name: of the array; its numbers do not count: layers have the same bits, stacked or not.
      step: steps taken.
      seed: another seed, other bits.

    Returns:
      uint32 of that shape.

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
        # Constants: one multiplication a number, where a hash of the place takes three.
        start = len(shape) - axis << 16  # rows and columns have other hashes
        places = np.arange(start, start + shape[axis], dtype=np.uint32)
        bits = bits * jax.lax.broadcast_in_dim(_hashed(places) | 1, shape, (axis,))
    return bits + jnp.asarray(step).astype(jnp.uint32) * _GOLDEN


def _hashed(x: Any) -> Any:
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
