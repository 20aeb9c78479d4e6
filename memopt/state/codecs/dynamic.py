"""A codec of small floating-point numbers, relative to the largest of their row."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from memopt.errors import check_choice
from memopt.shapes import Bits, Numbers
from memopt.state.codecs.base import Codec, Coded, reciprocal


@dataclasses.dataclass(frozen=True)
class Dynamic(Codec):
    """Small floating-point numbers relative to the largest of their row, for moments.

    There are 2^mantissa_bits codes per octave over 2^exponent_bits − 1 octaves, and as many more,
    evenly spaced, below them down to zero. A code is the upper bits of the float32 word of the
    number plus a small constant, so that encoding is an addition and a shift. Without a sign no
    number is rounded to zero, because updates are divided by second moments.

    The scale of a row (the array's last axis) is a power of two that leaves `headroom` octaves
    above the largest number *of the previous step*, whose octave is stored with the scale. The
    largest number of this step is known only after the whole row, and would cost another pass over
    the gradient; its octave is computed from the codes, for the next step. A number that exceeds
    even the headroom is clipped for one step, and its row is marked to be fitted again, as is a
    matrix of zeros, whose magnitude is unknown. A row far below the other rows of its matrix uses
    the matrix's scale, because it may grow to that magnitude in any step. The highest code marks
    numbers that are not finite.

    Attributes:
      exponent_bits: there are 2^exponent_bits − 1 octaves.
      mantissa_bits: there are 2^mantissa_bits codes per octave.
      signed: whether numbers may be negative.
      headroom: the number of octaves above the largest number of the previous step.
    """

    exponent_bits: int = 5
    mantissa_bits: int = 2
    signed: bool = True
    headroom: int = 4

    floor: ClassVar[float] = 2.0**-5
    """The largest number of a row counts as at least this fraction of its matrix's largest."""

    def __post_init__(self) -> None:
        check_choice("exponent_bits", self.exponent_bits, range(2, 7))
        most = 8 - self.signed - self.exponent_bits
        check_choice("mantissa_bits", self.mantissa_bits, range(most + 1))
        check_choice("headroom", self.headroom, range(7))

    @property
    def _last(self) -> int:
        """The code of numbers that are not finite; the code below is that of the largest number."""
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1

    @property
    def _dropped(self) -> int:
        """The number of mantissa bits of a float32 that a code drops."""
        return 23 - self.mantissa_bits

    @property
    def _origin(self) -> float:
        """The constant added before encoding; the octave after the last one starts at 2."""
        return 2.0 ** (1 - 2**self.exponent_bits)

    @property
    def _offset(self) -> int:
        """The upper bits of the word of `_origin`, subtracted so that zero has code 0."""
        return int(np.float32(self._origin).view(np.int32)) >> self._dropped

    def is_unfit(self, side_data: tuple[Array, ...]) -> Array:
        """Whether the octave of some row is unknown."""
        return jnp.isinf(side_data[1]).any()

    def fit(self, side_data: tuple[Array, ...], x: Array) -> tuple[Array, ...]:
        """Computes unknown octaves from `x`, as if it were the numbers of the previous step."""
        scale, octave = side_data
        return scale, jnp.where(jnp.isinf(octave), _octave(x), octave)

    def encode(self, x: Numbers, bits: Bits, like: Coded | None = None) -> Coded:
        """Adds random low bits to a float32 and keeps its upper bits."""
        before = _octave(x) if like is None else like.side_data[1]
        scale = self._scale(before)
        codes, largest = jax.lax.platform_dependent(
            x,
            bits,
            cpu=lambda x, bits: self._encode_on_cpu(x, bits, scale),
            default=lambda x, bits: self._encode_in_one_pass(x, bits, scale),
        )
        now = self._octave_of(largest) * scale
        now = jnp.where(largest > (not self.signed), now, before)  # rows of zeros keep theirs
        unknown = (scale == 0) | (largest == self._last - 1)
        scale = jnp.where(largest < self._last, scale, jnp.nan)
        return Coded(codes, (scale, jnp.where(unknown, jnp.inf, now)))

    def _encode_on_cpu(self, x: Array, bits: Array, scale: Array) -> tuple[Array, Array]:
        """Returns the codes, and each row's largest magnitude, computed from the stored codes."""
        codes = self._stored(x, self._mark_nonfinite(x, self._magnitudes(x, bits, scale)))
        # On CPUs, reductions are cheapest if they read a stored array.
        largest = codes.max(-1, keepdims=True).astype(jnp.int32)
        least = codes.min(-1, keepdims=True).astype(jnp.int32) if self.signed else 0
        return codes, jnp.maximum(largest, -least)

    def _encode_in_one_pass(self, x: Array, bits: Array, scale: Array) -> tuple[Array, Array]:
        """Returns the codes, and the magnitude of each row's largest number, in the same pass."""
        # With integers, XLA for TPUs would make another pass over gradient and codes.
        codes = self._stored(x, self._magnitudes(x, bits, scale).astype(jnp.float32))
        largest = jnp.abs(x).max(-1, keepdims=True)
        magnitudes = self._magnitudes(largest, jnp.zeros((), jnp.uint32), scale)
        return codes, self._mark_nonfinite(largest, magnitudes)

    def _magnitudes(self, x: Array, bits: Array, scale: Array) -> Array:
        """The codes of absolute values, int32, from 0 to ``_last - 1``."""
        y = jnp.abs(x) * reciprocal(scale) + self._origin
        y = jnp.minimum(y, self._float(self._last - 1))
        words = jax.lax.bitcast_convert_type(y, jnp.int32)
        words += (bits >> (32 - self._dropped)).astype(jnp.int32)
        return (words >> self._dropped) - self._offset

    def _mark_nonfinite(self, x: Array, magnitudes: Array) -> Array:
        """Replaces the codes of numbers that are not finite by `_last`."""
        return jnp.where(jnp.isfinite(x), magnitudes, self._last)

    def _stored(self, x: Array, magnitudes: Array) -> Array:
        """Adds the signs of `x` and casts to 8 bits; without signs no code is zero."""
        if self.signed:
            return jnp.where(x < 0, -magnitudes, magnitudes).astype(jnp.int8)
        return jnp.maximum(magnitudes, 1).astype(jnp.uint8)

    def decode(self, coded: Coded) -> Numbers:
        """Multiplies the float32 whose word starts with a code by its row's scale."""
        codes = coded.codes.astype(jnp.int32)
        magnitudes = jnp.abs(codes) if self.signed else codes
        words = (magnitudes + self._offset) << self._dropped
        y = jax.lax.bitcast_convert_type(words, jnp.float32) - self._origin
        return (jnp.where(codes < 0, -y, y) if self.signed else y) * coded.side_data[0]

    def _octave_of(self, codes: Array) -> Array:
        """The largest power of two up to a code's number, without the scale."""
        words = (codes + self._offset) >> self.mantissa_bits << 23
        return jax.lax.bitcast_convert_type(words, jnp.float32)

    def _float(self, code: int) -> np.float32:
        """The float32 whose word starts with a code."""
        return np.int32((code + self._offset) << self._dropped).view(np.float32)

    def _scale(self, octaves: Array) -> Array:
        """The scale of each row, a power of two, relative to which its numbers are below 2."""
        if octaves.ndim > 1:
            matrix = jnp.where(jnp.isfinite(octaves), octaves, 0).max(-2, keepdims=True)
            octaves = jnp.maximum(octaves, self.floor * matrix)
        return jnp.where(
            octaves > 2.0**-120, jnp.minimum(octaves, 2.0**120) * 2.0**self.headroom, 0
        )


def _octave(x: Array) -> Array:
    """The largest power of two up to a row's largest magnitude.

    It is 0 for a row of zeros, and infinite if a number is not finite. Rows are along the last
    axis, which is kept with length one.
    """
    words = jax.lax.bitcast_convert_type(jnp.abs(x).max(-1, keepdims=True), jnp.uint32)
    return jax.lax.bitcast_convert_type(words >> 23 << 23, jnp.float32)
