"""Codecs of integers and hardware float8, with a scale for each block of an array."""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from memopt.axis_types import on_auto_axes, spec_of
from memopt.checked import check_fields
from memopt.errors import check_at_least, check_choice
from memopt.reductions import largest_magnitude
from memopt.shapes import Bits, Numbers
from memopt.state.codecs.base import Codec, Coded, reciprocal
from memopt.state.rounding import uniform

BLOCK = 128
"""Numbers that share a scale, by default."""

SUBLANES = 8
"""Rows of the tiles in which a TPU stores arrays of 32 bits."""

LANES = 128
"""Columns of these tiles."""


@dataclasses.dataclass(frozen=True)
class Blockwise(Codec):
    """Integers or small floats relative to a scale for each block along the last axis.

    Scales are computed from the numbers being stored, but a scale that still fits is kept: numbers
    that did not change then keep their codes. A scale that changes at each step would round every
    number again.

    Attributes:
        block: the number of values that share a scale, or None for the whole last axis.
    """

    block: int | None = BLOCK

    slack: ClassVar[float] = 1.125
    """The ratio of a new scale to the smallest one that fits the block."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.block is not None:
            check_at_least("block", self.block, 1)

    def _per_block(self, f: Callable[..., Array], x: Array) -> Array:
        """Applies ``f`` to each block of the last axis; the last block is padded with zeros."""

        def plain(x: Array) -> Array:
            return f(self._cut(x), -1)

        def tiled(x: Array) -> Array:
            found = f(_tiles(x, self.block or LANES), (-3, -1))
            return found.swapaxes(-2, -1).reshape(*x.shape[:-1], -1)

        spec = tuple(spec_of(x))
        if spec and spec[-1] is not None:
            parts = x.shape[-1] // jax.typeof(x).sharding.shard_shape(x.shape)[-1]
            whole_blocks = x.shape[-1] // parts % self._size(x) == 0
            spec = (*spec[:-1], spec[-1] if whole_blocks else None)
        return on_auto_axes(
            functools.partial(self._on_tiles, tiled, plain), (x,), like=jax.P(*spec)
        )

    def _scaled(self, f: Callable[..., Array], x: Array, *scales: Array) -> Array:
        """Applies ``f`` elementwise to the numbers and the scales of their blocks."""
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
            tiles = _tiles(x, self.block or LANES).astype(jnp.float32)
            y = f(tiles, *(rows(s)[..., None, :, None] for s in scales))
            y = y.reshape(*y.shape[:-4], -1, SUBLANES, LANES)
            return y.swapaxes(-3, -2).reshape(shape)

        on_tiles = functools.partial(self._on_tiles, tiled, plain)
        return on_auto_axes(on_tiles, (x, *scales), like=spec_of(x))

    def _size(self, x: Array) -> int:
        """The length of a block."""
        return min(self.block or x.shape[-1], x.shape[-1])

    def _cut(self, x: Array) -> Array:
        """Splits the last axis into blocks: ``(..., n)`` to ``(..., blocks, block)``."""
        n, block = x.shape[-1], self._size(x)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % block)])
        return x.reshape(*x.shape[:-1], -(-n // block), block)

    def _on_tiles(
        self, tiled: Callable[..., Array], plain: Callable[..., Array], *xs: Any
    ) -> Array:
        """Runs ``tiled`` on a TPU if blocks are rows of its tiles, which avoids a copy."""
        shape, block = xs[0].shape, self.block or 1
        fits = len(shape) > 1 and shape[-2] % SUBLANES == shape[-1] % block == 0
        if not fits or block % LANES:
            return plain(*xs)
        return jax.lax.platform_dependent(*xs, tpu=tiled, default=plain)

    def _fresh(self, least: Array) -> Array:
        """A new scale that can be stored, as float32, which is not below `least`."""
        return _scale(least, self.slack)

    def _kept(self, old: Array, least: Array) -> Array:
        """The old scale if `least` is at most that and more than half of it, else a new one."""
        old = old.astype(jnp.float32)
        near = 1 + 1e-5  # tolerates rounding of the numbers that the scale was fitted to
        return jnp.where((least <= near * old) & (2 * least > old), old, self._fresh(least))


class Mapped(Blockwise):
    """Codes that stand for fixed numbers from 0 to 1 times the scale; see `Blockwise`.

    Subclasses say which numbers, in increasing order. Without a sign no number is rounded to zero,
    because updates are divided by second moments.

    Attributes:
        signed: whether numbers may be negative.
        bits: those of a code.
    """

    signed: bool
    bits: int = 8

    scale_dtype: ClassVar[Any] = jnp.bfloat16
    """The dtype in which scales are stored."""

    @property
    def _top(self) -> int:
        """The largest code that both signs have."""
        return 2 ** (self.bits - self.signed) - 1

    @property
    def _dtype(self) -> Any:
        """The dtype of codes."""
        return jnp.dtype(f"{'' if self.signed else 'u'}int{self.bits}")

    @abc.abstractmethod
    def _below(self, y: Array) -> Array:
        """The largest code, as float32, whose number is at most `y`, give or take rounding."""

    @abc.abstractmethod
    def _number(self, code: Array) -> Array:
        """The number that a code, as float32, stands for."""

    def _least(self, largest: Array) -> Array:
        """The smallest scale for blocks with these largest numbers."""
        return largest

    def _factor(self, scale: Array) -> Array:
        """The factor of numbers in blocks with this scale."""
        return scale

    def encode(self, x: Numbers, bits: Bits, like: Coded | None = None) -> Coded:
        """Rounds to the code below or above, with probabilities that preserve the mean."""
        least = self._least(self._per_block(largest_magnitude, x))
        old = jnp.zeros_like(least) if like is None else like.side_data[0]
        scale = self._kept(old, least)
        relative = lambda x, inverse: jnp.abs(x) * self._factor(inverse)
        y = self._scaled(relative, x, reciprocal(scale))
        below = jnp.minimum(self._below(y), self._top)
        low, high = self._number(below), self._number(below + 1)
        codes = jnp.minimum(below + (uniform(bits) * (high - low) < y - low), self._top)
        return self._stored(x, codes if self.signed else jnp.maximum(codes, 1), scale)

    def _stored(self, x: Array, codes: Array, scale: Array) -> Coded:
        """Adds the signs of `x` to codes, and casts."""
        codes = jnp.where(x < 0, -codes, codes) if self.signed else codes
        codes = codes.astype(jnp.int32).astype(self._dtype)
        return Coded(codes, (scale.astype(self.scale_dtype),))

    def decode(self, coded: Coded) -> Numbers:
        """Multiplies the number of a code by its block's scale."""

        def value(code: Array, scale: Array) -> Array:
            return jnp.sign(code) * self._number(jnp.abs(code)) * self._factor(scale)

        return self._scaled(value, coded.codes, *coded.side_data)


@dataclasses.dataclass(frozen=True)
class Integers(Mapped):
    """Integer codes, evenly spaced or companded; see `Blockwise`.

    A code c with magnitudes up to C represents (c/C)^power times the scale. With a power of 2 or 4,
    numbers far below the largest of their block keep some relative precision.

    Attributes:
        bits: 8 or 4.
        power: 1, 2 or 4; with 1 codes are evenly spaced.
        signed: whether numbers may be negative.
    """

    bits: int = 8
    power: int = 1
    signed: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bits", self.bits, (4, 8))
        check_choice("power", self.power, (1, 2, 4))

    def _below(self, y: Array) -> Array:
        return jnp.floor(_root(y, self.power) * self._top)

    def _number(self, code: Array) -> Array:
        return (code / self._top) ** self.power


@dataclasses.dataclass(frozen=True)
class Asymmetric(Blockwise):
    """Integers evenly spaced from a block's smallest number to its largest; see `Blockwise`.

    Each block has a scale and the code of zero, in three bytes.

    Attributes:
        bits: 8 or 4.

    References:
        Zhu et al., APOLLO, 2024, https://arxiv.org/abs/2412.05270 (Q-APOLLO's weights).
    """

    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bits", self.bits, (4, 8))

    def encode(self, x: Numbers, bits: Bits, like: Coded | None = None) -> Coded:
        """Rounds to the code below or above, with probabilities that preserve the mean."""
        first, last = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        low = jnp.minimum(self._per_block(jnp.min, x), 0)
        high = jnp.maximum(self._per_block(jnp.max, jnp.where(jnp.isnan(x), jnp.inf, x)), 0)
        least = high / (last - first - 1) - low / (last - first - 1)
        old = jnp.zeros_like(least) if like is None else like.side_data[0]
        step = self._kept(old, least)
        inverse = reciprocal(step)
        # Centers the numbers among the codes, unless the old code of zero still fits.
        zero = jnp.round((first + last - (high + low) * inverse) / 2)
        if like is not None:
            old, near = like.side_data[1].astype(jnp.float32), 1e-3  # near: tolerance for rounding
            fits = (low * inverse + old >= first - near) & (high * inverse + old <= last + near)
            zero = jnp.where(fits & (step == like.side_data[0].astype(jnp.float32)), old, zero)
        y = self._scaled(lambda x, inverse, zero: x * inverse + zero, x, inverse, zero)
        codes = jnp.clip(jnp.floor(y + uniform(bits)), first, last).astype(f"int{self.bits}")
        return Coded(codes, (step.astype(jnp.bfloat16), zero.astype(jnp.int8)))

    def decode(self, coded: Coded) -> Numbers:
        """Multiplies a code's distance from the code of zero by the step."""
        value = lambda code, step, zero: (code - zero) * step
        return self._scaled(value, coded.codes, *coded.side_data)


@dataclasses.dataclass(frozen=True)
class Float8(Blockwise):
    """Hardware float8 relative to a block's largest number; see `Blockwise`.

    Attributes:
        dtype: "float8_e4m3fn" or "float8_e5m2".
    """

    dtype: str = "float8_e4m3fn"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dtype", self.dtype, ("float8_e4m3fn", "float8_e5m2"))

    def encode(self, x: Numbers, bits: Bits, like: Coded | None = None) -> Coded:
        """Adds random low bits to the mantissa of a float32 and truncates it to float8."""
        info = jnp.finfo(self.dtype)
        top = float(info.max)
        least = self._per_block(largest_magnitude, x) / top
        old = jnp.zeros_like(least) if like is None else like.side_data[0]
        scale = self._kept(old, least)
        y = self._scaled(jnp.multiply, x, reciprocal(scale))
        # `step` is the distance of float8 numbers at the magnitude of y.
        exponent = jnp.maximum(jnp.frexp(y)[1] - 1, int(info.minexp))
        step = jnp.ldexp(jnp.float32(1), exponent - int(info.nmant))
        codes = jnp.clip(jnp.floor(y / step + uniform(bits)) * step, -top, top)
        return Coded(codes.astype(self.dtype), (scale.astype(jnp.bfloat16),))

    def decode(self, coded: Coded) -> Numbers:
        """Multiplies codes, in float32, by their block's scale."""
        return self._scaled(jnp.multiply, coded.codes, *coded.side_data)


def _tiles(x: Array, block: int) -> Array:
    """Splits an array into tiles, by blocks of b: ``(..., m/8, n/b, b/128, 8, 128)``."""
    if x.dtype.itemsize == 1:
        x = x.astype(jnp.bfloat16)  # exact, and its TPU tiles convert to those of float32
    m, n = x.shape[-2:]
    x = x.reshape(*x.shape[:-2], m // SUBLANES, SUBLANES, n // LANES, LANES).swapaxes(-3, -2)
    return x.reshape(*x.shape[:-3], n // block, block // LANES, SUBLANES, LANES)


def _root(x: Array, power: int) -> Array:
    for _ in range(int(math.log2(power))):
        x = jnp.sqrt(x)
    return x


def _scale(least: Array, slack: float) -> Array:
    """Rounds ``least * slack`` up to a bfloat16 whose reciprocal is normal; returns float32."""
    words = jax.lax.bitcast_convert_type(least * slack, jnp.uint32) + 0xFFFF
    rounded = jax.lax.bitcast_convert_type(words & np.uint32(0xFFFF0000), jnp.float32)
    return jnp.where((rounded < 2.0**126) | ~jnp.isfinite(least), rounded, 2.0**126)
