"""Numbers in a small floating-point format, relative to the largest of their row."""

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
    """Small floating-point numbers relative to the largest of their row: the map for moments.

    Codes are 2^mantissa_bits an octave over 2^exponent_bits − 1 octaves, and as many more,
    evenly spaced, from there to zero. A code is the upper end of the float32 word of the number
    plus a small constant, so that coding is an addition and a shift. Second moments divide:
    without a sign no number is rounded to zero.

    The scale of a row (the array's last axis) is a power of two that leaves `headroom` octaves
    above the largest number *of the step before*, whose octave is kept beside the scale: this
    step's is not known before all of the row is, and a second look would cost a pass over the
    gradient. The new octave is read off the codes. A number that outgrows even the headroom is
    cut off for one step, and its row is marked to be fitted anew; so is a matrix of zeros, whose
    size is unknown. A row far below the rest of its matrix takes the matrix's scale, because any
    step may lift it to there. The highest code marks numbers that are not finite.

    Attributes:
      exponent_bits: the octaves are one less than 2 to this power.
      mantissa_bits: an octave has 2 to this power codes.
      signed: whether numbers may be negative.
      headroom: octaves above the largest number of the step before.
    """

    exponent_bits: int = 5
    mantissa_bits: int = 2
    signed: bool = True
    headroom: int = 4

    floor: ClassVar[float] = 2.0**-5
    """A row's largest number counts as at least this part of its matrix's."""

    def __post_init__(self) -> None:
        check_choice("exponent_bits", self.exponent_bits, range(2, 7))
        most = 8 - self.signed - self.exponent_bits
        check_choice("mantissa_bits", self.mantissa_bits, range(most + 1))
        check_choice("headroom", self.headroom, range(7))

    @property
    def _last(self) -> int:
        """The code of numbers that are not finite; the one before is that of the largest."""
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1

    @property
    def _dropped(self) -> int:
        """The bits of a float32's mantissa that a code leaves out."""
        return 23 - self.mantissa_bits

    @property
    def _origin(self) -> float:
        """The constant added before coding; the octave above the last begins at 2."""
        return 2.0 ** (1 - 2**self.exponent_bits)

    @property
    def _offset(self) -> int:
        """The upper bits of the word of `_origin`, which coding subtracts: zero has code 0."""
        return int(np.float32(self._origin).view(np.int32)) >> self._dropped

    def is_unfit(self, side_data: tuple[Array, ...]) -> Array:
        """Whether the octave of some row is unknown."""
        return jnp.isinf(side_data[1]).any()

    def fit(self, side_data: tuple[Array, ...], x: Array) -> tuple[Array, ...]:
        """Takes unknown octaves from `x`, as if it were the numbers of the step before."""
        scale, octave = side_data
        return scale, jnp.where(jnp.isinf(octave), _octave(x), octave)

    def encode(self, x: Numbers, bits: Bits, like: Coded | None = None) -> Coded:
        """Adds a random rest to a float32 and keeps its upper bits."""
        before = _octave(x) if like is None else like.side_data[1]
        scale = self._scale(before)
        codes, largest = jax.lax.platform_dependent(
            x,
            bits,
            cpu=lambda x, bits: self._encode_on_cpu(x, bits, scale),
            default=lambda x, bits: self._encode_in_one_pass(x, bits, scale),
        )
        now = self._octave_of(largest) * scale
        now = jnp.where(largest > (not self.signed), now, before)  # zeros remember their last
        unknown = (scale == 0) | (largest == self._last - 1)
        scale = jnp.where(largest < self._last, scale, jnp.nan)
        return Coded(codes, (scale, jnp.where(unknown, jnp.inf, now)))

    def _encode_on_cpu(self, x: Array, bits: Array, scale: Array) -> tuple[Array, Array]:
        """The codes, and the largest magnitude of each row's, read off the stored codes."""
        codes = self._stored(x, self._mark_nonfinite(x, self._magnitudes(x, bits, scale)))
        # Reductions of a stored array, with nothing before them, are the cheapest.
        largest = codes.max(-1, keepdims=True).astype(jnp.int32)
        least = codes.min(-1, keepdims=True).astype(jnp.int32) if self.signed else 0
        return codes, jnp.maximum(largest, -least)

    def _encode_in_one_pass(self, x: Array, bits: Array, scale: Array) -> tuple[Array, Array]:
        """The codes, and the magnitude of each row's largest number, found beside them."""
        # Of integers XLA for TPUs would make another pass over gradient and codes.
        codes = self._stored(x, self._magnitudes(x, bits, scale).astype(jnp.float32))
        largest = jnp.abs(x).max(-1, keepdims=True)
        magnitudes = self._magnitudes(largest, jnp.zeros((), jnp.uint32), scale)
        return codes, self._mark_nonfinite(largest, magnitudes)

    def _magnitudes(self, x: Array, bits: Array, scale: Array) -> Array:
        """The codes of absolute values, int32, from 0 to the one before `_last`."""
        y = jnp.abs(x) * reciprocal(scale) + self._origin
        y = jnp.minimum(y, self._float(self._last - 1))
        words = jax.lax.bitcast_convert_type(y, jnp.int32)
        words += (bits >> (32 - self._dropped)).astype(jnp.int32)
        return (words >> self._dropped) - self._offset

    def _mark_nonfinite(self, x: Array, magnitudes: Array) -> Array:
        """Puts `_last` in place of the codes of numbers that are not finite."""
        return jnp.where(jnp.isfinite(x), magnitudes, self._last)

    def _stored(self, x: Array, magnitudes: Array) -> Array:
        """Codes with the signs of `x`, in 8 bits; without signs none is zero."""
        if self.signed:
            return jnp.where(x < 0, -magnitudes, magnitudes).astype(jnp.int8)
        return jnp.maximum(magnitudes, 1).astype(jnp.uint8)

    def decode(self, coded: Coded) -> Numbers:
        """The float32 whose word begins with a code, times its row's scale."""
        codes = coded.codes.astype(jnp.int32)
        magnitudes = jnp.abs(codes) if self.signed else codes
        words = (magnitudes + self._offset) << self._dropped
        y = jax.lax.bitcast_convert_type(words, jnp.float32) - self._origin
        return (jnp.where(codes < 0, -y, y) if self.signed else y) * coded.side_data[0]

    def _octave_of(self, codes: Array) -> Array:
        """The power of two up to a code's number, the scale apart."""
        words = (codes + self._offset) >> self.mantissa_bits << 23
        return jax.lax.bitcast_convert_type(words, jnp.float32)

    def _float(self, code: int) -> np.float32:
        """The float32 whose word begins with a code."""
        return np.int32((code + self._offset) << self._dropped).view(np.float32)

    def _scale(self, octaves: Array) -> Array:
        """The power of two by which a row's numbers are below 2."""
        if octaves.ndim > 1:
            matrix = jnp.where(jnp.isfinite(octaves), octaves, 0).max(-2, keepdims=True)
            octaves = jnp.maximum(octaves, self.floor * matrix)
        return jnp.where(
            octaves > 2.0**-120, jnp.minimum(octaves, 2.0**120) * 2.0**self.headroom, 0
        )


def _octave(x: Array) -> Array:
    """The power of two up to a row's largest magnitude: 0 if zeros, infinite if not finite.

    The row is the last axis, kept with length one.
    """
    words = jax.lax.bitcast_convert_type(jnp.abs(x).max(-1, keepdims=True), jnp.uint32)
    return jax.lax.bitcast_convert_type(words >> 23 << 23, jnp.float32)
