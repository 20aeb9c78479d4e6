"""Codecs of 16 and 24 bits, without scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from memopt.shapes import Bits, Numbers
from memopt.state.codecs.base import Codec, Coded


@dataclasses.dataclass(frozen=True)
class BFloat16(Codec):
    """bfloat16 with stochastic rounding and no side data."""

    def encode(self, x: Numbers, bits: Bits, like: Coded | None = None) -> Coded:
        """Adds a random lower half to a float32 and keeps its upper half."""
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)
        upper = jnp.minimum(words + (bits >> 16), _largest(words)) >> 16 << 16
        rounded = jax.lax.bitcast_convert_type(upper, jnp.float32)
        return Coded(jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16))

    def decode(self, coded: Coded) -> Numbers:
        """Widens the codes to float32."""
        return coded.codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class BFloat16AndRemainder(Codec):
    """bfloat16 and eight further bits of the mantissa: a float32 without its last eight bits.

    The bfloat16 part is rounded to nearest, so that a model may compute with it alone.
    """

    def encode(self, x: Numbers, bits: Bits, like: Coded | None = None) -> Coded:
        """Returns the nearest bfloat16, and the difference in 256ths of its last place."""
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)
        largest = _largest(words) - 0x8000  # its upper half rounds to a finite bfloat16
        rounded = jnp.minimum(words + (bits >> 24), largest) >> 8
        special = jnp.where(jnp.isnan(x), np.uint32(0x7FC000), words >> 8)
        words = jnp.where(jnp.isfinite(x), rounded, special)
        upper = (words + 0x80) >> 8
        remainder = (words - (upper << 8)).astype(jnp.int32).astype(jnp.int8)
        codes = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
        return Coded(codes, (remainder,))

    def decode(self, coded: Coded) -> Numbers:
        """Adds the two parts."""
        upper = jax.lax.bitcast_convert_type(coded.codes, jnp.uint16).astype(jnp.int32)
        words = (upper << 8) + coded.side_data[0].astype(jnp.int32)
        return jax.lax.bitcast_convert_type(words << 8, jnp.float32)


def _largest(words: Array) -> Array:
    """The words of the largest finite float32, with the signs of `words`."""
    return (words & np.uint32(0x80000000)) | np.uint32(0x7F7FFFFF)
