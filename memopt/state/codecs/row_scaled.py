"""Codecs whose scales come from the previous step, so that encoding is one pass."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from memopt.checked import check_fields
from memopt.errors import check_choice
from memopt.reductions import largest_magnitude
from memopt.shapes import Bits, Numbers
from memopt.state.codecs.base import Codec, Coded, reciprocal

_ONE = 127 << 23  # the bits of 1.0


class RowScaled(Codec):
    """Base class of codecs of 8 bits with a scale per row, from its numbers at the *previous* step.

    The octave of a number is the largest power of two up to it. The scale of a row (the array's
    last axis) is the octave of its largest number at the previous step times 2^headroom. That of
    this step is known only after the whole row, and would cost another pass over the gradient; its
    octave is computed from the codes, and stored with the scale for the next step. A number that
    exceeds even the headroom is clipped for one step, and its row is marked to be fitted again, as
    is a matrix of zeros, whose magnitude is unknown. A row far below the largest of its matrix has
    a larger scale, so that it may grow to the largest row's octave in one step. The highest code
    marks numbers that are not finite.

    Subclasses map numbers from 0 to 2 to codes and back. Without a sign no number is rounded to
    zero, because updates are divided by second moments.

    Attributes:
        signed: whether numbers may be negative.
        headroom: the number of octaves above the largest number of the previous step.
    """

    signed: bool
    headroom: int

    @property
    @abc.abstractmethod
    def _last(self) -> int:
        """The code of numbers that are not finite; the code below is that of the largest number."""

    @property
    @abc.abstractmethod
    def _origin(self) -> float:
        """The constant added to absolute values, so that small ones are evenly spaced."""

    @property
    @abc.abstractmethod
    def _largest(self) -> int:
        """The bits, as int32, of the largest number that can be encoded."""

    @abc.abstractmethod
    def _rounded(self, words: Array, bits: Bits) -> Array:
        """The codes, int32, of numbers with `_origin` added, given by their bits as int32."""

    @abc.abstractmethod
    def _numbers(self, magnitudes: Array) -> Array:
        """The numbers that codes, int32, stand for, with `_origin` added."""

    @property
    def _floor(self) -> float:
        """A row's octave counts as at least this fraction of the largest in its matrix."""
        return 2.0 ** -(self.headroom + 1)

    def _split(self, side_data: tuple[Array, ...]) -> tuple[Array, Array]:
        """The scale of each row, and the octave of its largest number."""
        (both,) = side_data
        return both[..., :1], both[..., 1:]

    def _join(self, scale: Array, octave: Array) -> tuple[Array, ...]:
        """The side data of these scales and octaves."""
        return (jnp.concatenate([scale, octave], -1),)

    def is_unfit(self, side_data: tuple[Array, ...]) -> Array:
        """Whether the octave of some row is unknown."""
        return jnp.isinf(self._split(side_data)[1]).any()

    def fit(self, side_data: tuple[Array, ...], x: Array) -> tuple[Array, ...]:
        """Computes unknown octaves from `x`, as if it were the numbers of the previous step."""
        scale, octave = self._split(side_data)
        return self._join(scale, jnp.where(jnp.isinf(octave), _octave_of_row(x), octave))

    def encode(self, x: Numbers, bits: Bits, like: Coded | None = None) -> Coded:
        """Scales each row, rounds absolute values to codes stochastically, and adds the signs."""
        before = _octave_of_row(x) if like is None else self._split(like.side_data)[1]
        scale = self._scale(before)
        codes, largest = jax.lax.platform_dependent(
            x,
            bits,
            cpu=lambda x, bits: self._encode_on_cpu(x, bits, scale),
            default=lambda x, bits: self._encode_in_one_pass(x, bits, scale),
        )
        now = _octave(self._numbers(largest)) * scale
        now = jnp.where(largest > (not self.signed), now, before)  # rows of zeros keep theirs
        unknown = (scale == 0) | (largest == self._last - 1)
        scale = jnp.where(largest < self._last, scale, jnp.nan)
        return Coded(codes, self._join(scale, jnp.where(unknown, jnp.inf, now)))

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
        return self._rounded(jnp.minimum(_word(y), self._largest), bits)

    def _mark_nonfinite(self, x: Array, magnitudes: Array) -> Array:
        """Replaces the codes of numbers that are not finite by `_last`."""
        return jnp.where(jnp.isfinite(x), magnitudes, self._last)

    def _stored(self, x: Array, magnitudes: Array) -> Array:
        """Adds the signs of `x` and casts to 8 bits; without signs no code is zero."""
        if self.signed:
            return jnp.where(x < 0, -magnitudes, magnitudes).astype(jnp.int8)
        return jnp.maximum(magnitudes, 1).astype(jnp.uint8)

    def decode(self, coded: Coded) -> Numbers:
        """Multiplies the number of a code by its row's scale."""
        codes = coded.codes.astype(jnp.int32)
        scale, _ = self._split(coded.side_data)
        y = self._numbers(jnp.abs(codes) if self.signed else codes) - self._origin
        return (jnp.where(codes < 0, -y, y) if self.signed else y) * scale

    def _scale(self, octaves: Array) -> Array:
        """The scale of each row, a power of two, relative to which its numbers are below 2."""
        if octaves.ndim > 1:
            matrix = jnp.where(jnp.isfinite(octaves), octaves, 0).max(-2, keepdims=True)
            octaves = jnp.maximum(octaves, matrix * self._floor)
        return jnp.where(
            octaves > 2.0**-120, jnp.minimum(octaves, 2.0**120) * 2.0**self.headroom, 0
        )


@dataclasses.dataclass(frozen=True)
class Tapered(RowScaled):
    """Floating-point numbers with fewer bits of mantissa the smaller they are, for moments.

    Of 2^b codes (b is 7 with a sign, 8 without), half are evenly shared by the `octaves` octaves
    below twice the largest number's octave, a quarter by the `octaves` below, and so on, down to
    one code per octave; below, codes are evenly spaced down to zero. With the defaults that is 16
    codes in each of the upper four octaves, then 8, 4, 2 and 1. In the headroom there is one code
    per octave. See `RowScaled` for the scale.

    Read as an integer, the bits of a float32 are roughly its logarithm. Dividing that integer by
    `octaves` gives the bits of, roughly, the root of this degree, whose leading bits as a
    fixed-point number are the code. Between neighbouring codes the map is linear, so that
    stochastic rounding is unbiased.

    Attributes:
        signed: whether numbers may be negative.
        octaves: 4, 8 or 16.
        headroom: the number of octaves above the largest number of the previous step.
    """

    signed: bool = True
    octaves: int = 4
    headroom: int = 3

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("octaves", self.octaves, (4, 8, 16))
        check_choice("headroom", self.headroom, range(7))

    @property
    def _bits(self) -> int:
        return 8 - self.signed

    @property
    def _shift(self) -> int:
        """The logarithm of `octaves`: a shift by it divides a word."""
        return self.octaves.bit_length() - 1

    @property
    def _zero(self) -> int:
        """The position, which is the root times 2^b, that has code 0."""
        return max(self.octaves, self.headroom + 1 + (not self.signed))  # else `_last` is too large

    @property
    def _last(self) -> int:
        # At most 255, or 128 with a sign, which is stored as -128.
        return 2**self._bits - self._zero + self.headroom + 1

    @property
    def _origin(self) -> float:
        # There is one code per octave from the position `octaves` up.
        below = (self._bits - self._shift) * self.octaves + self.octaves - self._zero
        return 2.0 ** (1 - self.headroom - below)

    @property
    def _largest(self) -> int:
        return 128 << 23  # of 2.0

    @property
    def _base(self) -> int:
        """The bits of the number at the lower end of the headroom, whose root is taken as 1."""
        return (128 - self.headroom) << 23

    def _rounded(self, words: Array, bits: Bits) -> Array:
        words -= self._base
        root = _float(jnp.minimum(words >> self._shift, 0) + _ONE)
        position = _word(root + 1) - _ONE  # the mantissa of root + 1 is a fixed-point root
        position += jnp.maximum(words, 0) >> self._bits
        dropped = 23 - self._bits
        position += (bits >> (32 - dropped)).astype(jnp.int32)
        return (position >> dropped) - self._zero

    def _numbers(self, magnitudes: Array) -> Array:
        position = magnitudes + self._zero
        root = _word(position.astype(jnp.float32)) - (_ONE + (self._bits << 23))
        headroom = (position - 2**self._bits) << 23
        return _float(jnp.maximum(root << self._shift, headroom) + self._base)


@dataclasses.dataclass(frozen=True)
class Dynamic(RowScaled):
    """Floating-point numbers that are as precise in all octaves, for moments.

    There are 2^mantissa_bits codes per octave over 2^exponent_bits − 1 octaves, and as many more,
    evenly spaced, below them down to zero. A code is the upper bits of the float32 word of the
    number plus a small constant, so that encoding is an addition and a shift. See `RowScaled` for
    the scale.

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

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("exponent_bits", self.exponent_bits, range(2, 7))
        most = 8 - self.signed - self.exponent_bits
        check_choice("mantissa_bits", self.mantissa_bits, range(most + 1))
        check_choice("headroom", self.headroom, range(7))

    @property
    def _last(self) -> int:
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1

    @property
    def _dropped(self) -> int:
        """The number of mantissa bits of a float32 that a code drops."""
        return 23 - self.mantissa_bits

    @property
    def _origin(self) -> float:
        return 2.0 ** (1 - 2**self.exponent_bits)

    @property
    def _offset(self) -> int:
        """The upper bits of the word of `_origin`, subtracted so that zero has code 0."""
        return int(np.float32(self._origin).view(np.int32)) >> self._dropped

    @property
    def _largest(self) -> int:
        return (self._last - 1 + self._offset) << self._dropped

    def _rounded(self, words: Array, bits: Bits) -> Array:
        words += (bits >> (32 - self._dropped)).astype(jnp.int32)
        return (words >> self._dropped) - self._offset

    def _numbers(self, magnitudes: Array) -> Array:
        return _float((magnitudes + self._offset) << self._dropped)

    # As in earlier releases, whose states can be read.

    @property
    def _floor(self) -> float:
        return 2.0**-5

    def _split(self, side_data: tuple[Array, ...]) -> tuple[Array, Array]:
        scale, octave = side_data
        return scale, octave

    def _join(self, scale: Array, octave: Array) -> tuple[Array, ...]:
        return scale, octave


def _octave_of_row(x: Array) -> Array:
    """The largest power of two up to a row's largest magnitude.

    It is 0 for a row of zeros, and infinite if a number is not finite. Rows are along the last
    axis, which is kept with length one.
    """
    return _octave(largest_magnitude(x, -1, keepdims=True))


def _octave(x: Array) -> Array:
    """The largest power of two up to `x`, which is not negative."""
    return _float(_word(x) >> 23 << 23)


def _word(x: Array) -> Array:
    """The bits of a float32 as int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(word: Array) -> Array:
    """The float32 with these bits."""
    return jax.lax.bitcast_convert_type(word, jnp.float32)
