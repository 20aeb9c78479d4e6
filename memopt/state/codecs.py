"""Codecs: numbers stored in 16, 8 or 4 bits, and rounded so that none of them freezes."""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from memopt.axis_types import on_auto_axes, spec_of
from memopt.errors import check_at_least, check_choice
from memopt.state.precision import zeros_of

BLOCK = 128
SUBLANES, LANES = 8, 128  # of the tiles in which a TPU keeps arrays of 32 bits


class Coded(NamedTuple):
    """Numbers as a codec stores them.

    Attributes:
      codes: of the array's shape.
      scales: what the codec keeps beside them, of that shape but for a shorter last axis.
    """

    codes: Array
    scales: tuple[Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """A way to store float32 numbers in few bits.

    Rounding is stochastic: a number between two that have codes becomes either, so that the
    expected one is the number itself. A change too small for the next code is not lost, it is
    made now and then. Where numbers share a scale, one that is not finite makes all NaN.
    """

    @abc.abstractmethod
    def encode(self, x: Array, bits: Array, like: Coded | None = None) -> Coded:
        """The codes of some numbers.

        Args:
          x: float32, ``(..., n)``.
          bits: uint32, broadcastable to it, that decide the rounding; see `memopt.state.dither`.
          like: the codes that these take the place of, whose scales stay where they still fit;
            None to fit new ones.
        """

    @abc.abstractmethod
    def decode(self, coded: Coded) -> Array:
        """The numbers, float32."""

    def is_unfit(self, scales: tuple[Array, ...]) -> Array | bool:
        """Whether numbers outgrew their scales, which `fit` must see to before the next `encode`.

        Only of a codec that goes by the scales of the step before; others look at the numbers.
        """
        return False

    def fit(self, scales: tuple[Array, ...], x: Array) -> tuple[Array, ...]:
        """The scales by which `encode` is to go for numbers like `x`."""
        return scales

    def init(self, x: Any) -> Coded:
        """The codes of zeros like `x`, of which only shape, dtype and sharding are looked at."""
        return zeros_of(lambda x: self.encode(x, jnp.zeros(x.shape, jnp.uint32)), x)


@dataclasses.dataclass(frozen=True)
class AsIs(Codec):
    """Numbers as they are."""

    def encode(self, x: Array, bits: Array, like: Coded | None = None) -> Coded:
        """As they are."""
        return Coded(x)

    def decode(self, coded: Coded) -> Array:
        """As they are."""
        return coded.codes


@dataclasses.dataclass(frozen=True)
class BFloat16(Codec):
    """bfloat16, rounded stochastically. Nothing but the codes is kept."""

    def encode(self, x: Array, bits: Array, like: Coded | None = None) -> Coded:
        """The upper half of a float32 to which a random lower half is added."""
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)
        rounded = jax.lax.bitcast_convert_type((words + (bits >> 16)) >> 16 << 16, jnp.float32)
        return Coded(jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16))

    def decode(self, coded: Coded) -> Array:
        """As float32."""
        return coded.codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class BFloat16AndRemainder(Codec):
    """bfloat16 and the next eight bits of the mantissa beside it: float32 but for its last eight.

    The bfloat16 half is the nearest to the number, so that a model may compute with it alone.
    """

    def encode(self, x: Array, bits: Array, like: Coded | None = None) -> Coded:
        """The nearest bfloat16, and the difference in 256ths of its last place."""
        words = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits >> 24) >> 8
        upper = (words + 0x80) >> 8
        remainder = (words - (upper << 8)).astype(jnp.int32).astype(jnp.int8)
        codes = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
        return Coded(codes, (remainder,))

    def decode(self, coded: Coded) -> Array:
        """Both halves put together."""
        upper = jax.lax.bitcast_convert_type(coded.codes, jnp.uint16).astype(jnp.int32)
        words = (upper << 8) + coded.scales[0].astype(jnp.int32)
        return jax.lax.bitcast_convert_type(words << 8, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Dynamic(Codec):
    """Small floating-point numbers relative to the largest of their row: the map for moments.

    Codes are 2^mantissa_bits an octave over 2^exponent_bits − 1 octaves, and as many more,
    evenly spaced, from there to zero. A code is the upper end of the float32 word of 1 + the
    number, as it were, so that coding it is an addition and a shift. Second moments divide:
    without a sign no number is rounded to zero.

    The scale of a row (the array's last axis) is a power of two that leaves `headroom` octaves
    above the largest number *of the step before*, whose octave is kept too: this step's is not
    known before all of the row is, and to look twice would cost a pass over the gradient. It is
    read off the codes. What outgrows even that is cut off for one step, and the row is to be
    fitted anew; so is a matrix of zeros, of which nothing is known. A row far below its matrix
    goes by the matrix, from which it may be lifted at any step. The highest code is of what is
    not finite.

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
        """The code of what is not finite; the one before is of the largest magnitude."""
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1

    @property
    def _dropped(self) -> int:
        """How many bits of a float32's mantissa a code leaves out."""
        return 23 - self.mantissa_bits

    @property
    def _origin(self) -> float:
        """What stands for zero; the octave above the last begins at 2."""
        return 2.0 ** (1 - 2**self.exponent_bits)

    @property
    def _offset(self) -> int:
        """The word of `_origin`, less what is left out of it."""
        return int(np.float32(self._origin).view(np.int32)) >> self._dropped

    def is_unfit(self, scales: tuple[Array, ...]) -> Array:
        """Whether of some row the octave is not known."""
        return jnp.isinf(scales[1]).any()

    def fit(self, scales: tuple[Array, ...], x: Array) -> tuple[Array, ...]:
        """The octave of each row whose own is not known, as if `x` were the step before's."""
        return scales[0], jnp.where(jnp.isinf(scales[1]), _octave(x), scales[1])

    def encode(self, x: Array, bits: Array, like: Coded | None = None) -> Coded:
        """A float32 of fewer bits, to whose mantissa a random rest is added."""
        before = _octave(x) if like is None else like.scales[1]
        scale = self._scale(before)

        def magnitude(x: Array, bits: Array) -> Array:
            y = jnp.abs(x) * _inverse(scale) + self._origin
            y = jnp.minimum(y, self._float(self._last - 1))
            words = jax.lax.bitcast_convert_type(y, jnp.int32)
            words += (bits >> (32 - self._dropped)).astype(jnp.int32)
            return (words >> self._dropped) - self._offset

        def finite(x: Array, codes: Array) -> Array:
            return jnp.where(jnp.isfinite(x), codes, self._last)

        def stored(x: Array, codes: Array) -> Array:
            codes = jnp.where(x < 0, -codes, codes) if self.signed else jnp.maximum(codes, 1)
            return codes.astype(jnp.int8 if self.signed else jnp.uint8)

        def on_cpu(x: Array, bits: Array) -> tuple[Array, Array]:
            codes = stored(x, finite(x, magnitude(x, bits)))
            # Reductions of a stored array, with nothing before them, are the cheapest.
            largest = codes.max(-1, keepdims=True).astype(jnp.int32)
            least = codes.min(-1, keepdims=True).astype(jnp.int32) if self.signed else 0
            return codes, jnp.maximum(largest, -least)

        def default(x: Array, bits: Array) -> tuple[Array, Array]:
            # Of integers XLA for TPUs would make another pass over gradient and codes.
            codes = stored(x, magnitude(x, bits).astype(jnp.float32))
            largest = jnp.abs(x).max(-1, keepdims=True)
            return codes, finite(largest, magnitude(largest, jnp.zeros((), jnp.uint32)))

        codes, largest = jax.lax.platform_dependent(x, bits, cpu=on_cpu, default=default)
        now = self._octave_of(largest) * scale
        now = jnp.where(largest > (not self.signed), now, before)  # zeros remember their last
        unknown = (scale == 0) | (largest == self._last - 1)
        scale = jnp.where(largest < self._last, scale, jnp.nan)
        return Coded(codes, (scale, jnp.where(unknown, jnp.inf, now)))

    def decode(self, coded: Coded) -> Array:
        """The float32 whose word begins with a code, times its row's scale."""
        codes = coded.codes.astype(jnp.int32)
        magnitudes = jnp.abs(codes) if self.signed else codes
        words = (magnitudes + self._offset) << self._dropped
        y = jax.lax.bitcast_convert_type(words, jnp.float32) - self._origin
        return (jnp.where(codes < 0, -y, y) if self.signed else y) * coded.scales[0]

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


@dataclasses.dataclass(frozen=True)
class Blockwise(Codec):
    """Integers or small floats relative to a scale for each block along the last axis.

    Scales are exact, from the numbers that are stored. But a scale that still fits stays: the
    codes of numbers that did not change then do not either. One that changes at each step
    would round every number anew each time.

    Attributes:
      block: numbers that share a scale, or None for the whole last axis.
    """

    block: int | None = BLOCK

    slack: ClassVar[float] = 1.125
    """A new scale leaves this much room above the block's largest number."""

    def __post_init__(self) -> None:
        if self.block is not None:
            check_at_least("block", self.block, 1)

    def _per_block(self, f: Callable[..., Array], x: Array) -> Array:
        """``f`` over each block of the last axis, the last one filled up with zeros."""

        def plain(x: Array) -> Array:
            return f(self._cut(x), -1)

        def tiled(x: Array) -> Array:
            return f(_tiles(x), -1).swapaxes(-2, -1).reshape(*x.shape[:-1], -1)

        spec = tuple(spec_of(x))
        if spec:
            parts = x.shape[-1] // jax.typeof(x).sharding.shard_shape(x.shape)[-1]
            whole_blocks = x.shape[-1] // parts % self._size(x) == 0
            spec = (*spec[:-1], spec[-1] if whole_blocks else None)
        return on_auto_axes(
            functools.partial(self._on_tiles, tiled, plain), (x,), like=jax.P(*spec)
        )

    def _scaled(self, f: Callable[..., Array], x: Array, *scales: Array) -> Array:
        """``f`` of numbers and of what there is for each of their blocks."""
        shape = x.shape
        scales = tuple(s.astype(jnp.float32) for s in scales)
        if all(s.shape[-1] == 1 for s in scales):
            return f(x.astype(jnp.float32), *scales)

        def plain(x: Array, *scales: Array) -> Array:
            blocks = self._cut(x.astype(jnp.float32))
            y = f(blocks, *(s[..., None] for s in scales))
            return y.reshape(*shape[:-1], -1)[..., : shape[-1]]

        def tiled(x: Array, *scales: Array) -> Array:
            rows = lambda s: s.reshape(*shape[:-2], -1, SUBLANES, s.shape[-1]).swapaxes(-2, -1)
            y = f(_tiles(x).astype(jnp.float32), *(rows(s)[..., None] for s in scales))
            return y.swapaxes(-3, -2).reshape(shape)

        on_tiles = functools.partial(self._on_tiles, tiled, plain)
        return on_auto_axes(on_tiles, (x, *scales), like=spec_of(x))

    def _size(self, x: Array) -> int:
        """The numbers in a block."""
        return min(self.block or x.shape[-1], x.shape[-1])

    def _cut(self, x: Array) -> Array:
        """The blocks as an axis of their own: ``(..., n)`` to ``(..., blocks, block)``."""
        n, block = x.shape[-1], self._size(x)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % block)])
        return x.reshape(*x.shape[:-1], -(-n // block), block)

    def _on_tiles(
        self, tiled: Callable[..., Array], plain: Callable[..., Array], *xs: Any
    ) -> Array:
        """On a TPU ``tiled``, if the blocks are the rows of its tiles: it need not copy then."""
        shape = xs[0].shape
        sides = len(shape) > 1 and shape[-2] % SUBLANES == shape[-1] % LANES == 0
        if not sides or self.block != LANES:
            return plain(*xs)
        return jax.lax.platform_dependent(*xs, tpu=tiled, default=plain)

    def _kept(self, old: Array, least: Array) -> Array:
        """The old scale where `least` is at most that, and more than half of it."""
        old = old.astype(jnp.float32)
        fresh = _up_to_bfloat16(least * self.slack)
        near = 1 + 1e-5  # what it was fitted to is that only up to rounding
        return jnp.where((least <= near * old) & (2 * least > old), old, fresh)


@dataclasses.dataclass(frozen=True)
class Integers(Blockwise):
    """Integer codes, evenly spaced or companded; see `Blockwise`.

    A code c of magnitudes up to C is worth (c/C)^power of the scale: with a power of 2 or 4
    numbers far below the largest of their block keep a relative precision.

    Attributes:
      bits: 8 or 4.
      power: 1 spaces codes evenly.
      signed: whether numbers may be negative.
    """

    bits: int = 8
    power: int = 1
    signed: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bits", self.bits, (4, 8))
        check_choice("power", self.power, (1, 2, 4))

    @property
    def _top(self) -> int:
        return 2 ** (self.bits - self.signed) - 1

    @property
    def _dtype(self) -> Any:
        return jnp.dtype(f"{'' if self.signed else 'u'}int{self.bits}")

    def encode(self, x: Array, bits: Array, like: Coded | None = None) -> Coded:
        """The code below, or the one above, as often as the number is nearer to it."""
        largest = self._per_block(jnp.max, jnp.abs(x))
        old = jnp.zeros_like(largest) if like is None else like.scales[0]
        scale = self._kept(old, largest)
        y = self._scaled(lambda x, inverse: jnp.abs(x) * inverse, x, _inverse(scale))
        below = jnp.floor(jnp.minimum(_root(y, self.power) * self._top, self._top))
        if self.power == 1:
            share = y * self._top - below
        else:
            value = lambda c: (c / self._top) ** self.power
            share = (y - value(below)) / (value(below + 1) - value(below))
        codes = jnp.minimum(below + (_uniform(bits) < share), self._top)
        codes = jnp.where(x < 0, -codes, codes) if self.signed else codes
        return Coded(codes.astype(self._dtype), (scale.astype(jnp.bfloat16),))

    def decode(self, coded: Coded) -> Array:
        """The power of a code, times its block's scale."""

        def value(code: Array, scale: Array) -> Array:
            y = code / self._top
            return (y if self.power == 1 else jnp.sign(y) * jnp.abs(y) ** self.power) * scale

        return self._scaled(value, coded.codes, *coded.scales)


@dataclasses.dataclass(frozen=True)
class Asymmetric(Blockwise):
    """Integers evenly spaced from the least number of a block to its largest; see `Blockwise`.

    The scale and the code of zero are kept for each block, in three bytes.

    Attributes:
      bits: 8 or 4.

    References:
      Zhu et al., APOLLO, 2024, https://arxiv.org/abs/2412.05270 (Q-APOLLO's weights).
    """

    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bits", self.bits, (4, 8))

    def encode(self, x: Array, bits: Array, like: Coded | None = None) -> Coded:
        """The code below, or the one above, as often as the number is nearer to it."""
        first, last = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        low = jnp.minimum(self._per_block(jnp.min, x), 0)
        high = jnp.maximum(self._per_block(jnp.max, x), 0)
        least = (high - low) / (last - first - 1)
        if like is None:
            step = _up_to_bfloat16(least * self.slack)
        else:
            step = self._kept(like.scales[0], least)
        inverse = _inverse(step)
        # The numbers in the middle of the codes, unless zero's old place will still do.
        zero = jnp.round((first + last - (high + low) * inverse) / 2)
        if like is not None:
            old, near = like.scales[1].astype(jnp.float32), 1e-3  # near: up to rounding
            fits = (low * inverse + old >= first - near) & (high * inverse + old <= last + near)
            zero = jnp.where(fits & (step == like.scales[0].astype(jnp.float32)), old, zero)
        y = self._scaled(lambda x, inverse, zero: x * inverse + zero, x, inverse, zero)
        codes = jnp.clip(jnp.floor(y + _uniform(bits)), first, last).astype(f"int{self.bits}")
        return Coded(codes, (step.astype(jnp.bfloat16), zero.astype(jnp.int8)))

    def decode(self, coded: Coded) -> Array:
        """The step times a code's distance from that of zero."""
        value = lambda code, step, zero: (code - zero) * step
        return self._scaled(value, coded.codes, *coded.scales)


@dataclasses.dataclass(frozen=True)
class Float8(Blockwise):
    """The hardware's float8 relative to a block's largest number; see `Blockwise`.

    Attributes:
      dtype: "float8_e4m3fn" or "float8_e5m2".
    """

    dtype: str = "float8_e4m3fn"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dtype", self.dtype, ("float8_e4m3fn", "float8_e5m2"))

    def encode(self, x: Array, bits: Array, like: Coded | None = None) -> Coded:
        """A float32 to whose mantissa a random rest is added, cut to the float8's."""
        info = jnp.finfo(self.dtype)
        top = float(info.max)
        largest = self._per_block(jnp.max, jnp.abs(x)) / top
        old = jnp.zeros_like(largest) if like is None else like.scales[0]
        scale = self._kept(old, largest)
        y = self._scaled(jnp.multiply, x, _inverse(scale))
        # Adding c, a power of two, to a number leaves it as many bits as the float8 has.
        exponent = jnp.maximum(jnp.frexp(y)[1] - 1, int(info.minexp))
        step = jnp.ldexp(jnp.float32(1), exponent - int(info.nmant))
        codes = jnp.clip(jnp.floor(y / step + _uniform(bits)) * step, -top, top)
        return Coded(codes.astype(self.dtype), (scale.astype(jnp.bfloat16),))

    def decode(self, coded: Coded) -> Array:
        """As float32, times the scale."""
        return self._scaled(jnp.multiply, coded.codes, *coded.scales)


class Named(NamedTuple):
    """The codecs that a name stands for.

    Attributes:
      weights: for parameters.
      signed: for first moments and whatever may be negative.
      unsigned: for second moments.
    """

    weights: Codec
    signed: Codec
    unsigned: Codec


_NAMED = {
    "int8": Named(Asymmetric(), Dynamic(5, 2), Dynamic(5, 3, signed=False)),
    "int4": Named(Asymmetric(bits=4), Integers(bits=4, power=2), Dynamic(5, 3, signed=False)),
    "float8": Named(Float8(), Float8(), Dynamic(5, 3, signed=False)),
    "bfloat16": Named(BFloat16(), BFloat16(), BFloat16()),
    "bfloat16+8": Named(*3 * (BFloat16AndRemainder(),)),
}


def named(codec: "str | Codec") -> Named:
    """The codecs that a name stands for; one that is given stands for itself.

    Raises:
      ValueError: if the name is unknown; the nearest is suggested.
    """
    if isinstance(codec, Codec):
        return Named(codec, codec, codec)
    check_choice("codec", codec, _NAMED)
    return _NAMED[codec]


def bits_of(dtype: Any) -> int:
    """How many bits a number of a dtype takes; numpy counts those of 4 bits as 8.

    Example:
      >>> bits_of(jnp.int4), bits_of(jnp.bfloat16)
      (4, 16)
    """
    dtype = jnp.dtype(dtype)
    return 4 if dtype.name in ("int4", "uint4") else 8 * dtype.itemsize


def _tiles(x: Array) -> Array:
    """Each tile of 8×128 as two axes: ``(..., m, n)`` to ``(..., m/8, n/128, 8, 128)``."""
    if x.dtype.itemsize == 1:
        x = x.astype(jnp.bfloat16)  # exact, and of the tiles of which a TPU makes float32 ones
    m, n = x.shape[-2:]
    x = x.reshape(*x.shape[:-2], m // SUBLANES, SUBLANES, n // LANES, LANES)
    return x.swapaxes(-3, -2)


def _octave(x: Array) -> Array:
    """The power of two up to a row's largest magnitude: 0 if zeros, infinite if not finite.

    The row is the last axis, kept with length one.
    """
    words = jax.lax.bitcast_convert_type(jnp.abs(x).max(-1, keepdims=True), jnp.uint32)
    return jax.lax.bitcast_convert_type(words >> 23 << 23, jnp.float32)


def _uniform(bits: Array) -> Array:
    """Numbers in [0, 1) from 32 bits."""
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def _root(x: Array, power: int) -> Array:
    for _ in range(int(math.log2(power))):
        x = jnp.sqrt(x)
    return x


def _inverse(scale: Array) -> Array:
    """One over it, or 0 where that would not be a normal number."""
    return jnp.where(scale > 2.0**-120, 1 / scale, 0)


def _up_to_bfloat16(x: Array) -> Array:
    """The nearest bfloat16 that is not less, as float32."""
    words = jax.lax.bitcast_convert_type(x, jnp.uint32) + 0xFFFF
    return jax.lax.bitcast_convert_type(words & np.uint32(0xFFFF0000), jnp.float32)
