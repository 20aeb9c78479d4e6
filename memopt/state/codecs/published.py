"""The 8-bit codecs of FlashOptim and bitsandbytes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from memopt.reductions import largest_magnitude
from memopt.shapes import Numbers
from memopt.state.codecs.base import Coded
from memopt.state.codecs.blockwise import Mapped


@dataclasses.dataclass(frozen=True)
class Companded(Mapped):
    """FlashOptim's integers of a softsign or a square root; see `Blockwise`.

    With a sign, a code c stands for y/(2 − |y|) times the scale, where y = c/127: the inverse of
    2z/(1 + |z|). Without, it stands for (c/255)² times the square of the scale.

    Scales are float16. Where FlashOptim's are zero or infinite, they are the smallest or largest
    positive number here, 2⁻²⁴ ≈ 6e-8 or 65,504: smaller numbers are kept as multiples of about
    2⁻³², second moments as squares of such, and larger numbers are clipped.

    Attributes:
        signed: whether numbers may be negative.
        block: the number of values that share a scale.

    References:
        FlashOptim, 2026, https://arxiv.org/abs/2602.23349.
    """

    signed: bool = True
    block: int | None = 32

    scale_dtype: ClassVar[Any] = jnp.float16

    def _position(self, y: Array) -> Array:
        """The code of a number from 0 to 1, not rounded."""
        return self._top * (2 * y / (1 + y) if self.signed else jnp.sqrt(y))

    def _below(self, y: Array) -> Array:
        return jnp.floor(self._position(y))

    def _number(self, code: Array) -> Array:
        y = code / self._top
        return y / (2 - y) if self.signed else y * y

    def _least(self, largest: Array) -> Array:
        return largest if self.signed else jnp.sqrt(largest)

    def _factor(self, scale: Array) -> Array:
        return scale if self.signed else scale * scale

    def _fresh(self, least: Array) -> Array:
        least = _in_range(least)
        nearest = least.astype(jnp.float16)
        above = jnp.nextafter(nearest, jnp.float16(jnp.inf))
        return jnp.where(nearest.astype(jnp.float32) < least, above, nearest).astype(jnp.float32)

    def encode_nearest(self, x: Numbers, like: Coded | None = None) -> Coded:
        """Rounds scales and codes as FlashOptim: codes to the nearest integer, halves upwards."""
        scale = _in_range(self._least(self._per_block(largest_magnitude, x)))

        def code(x: Array, scale: Array) -> Array:
            z = jnp.where(scale > 0, (x if self.signed else jnp.sqrt(x)) / scale, 0)
            y = 2 * z / (1 + jnp.abs(z)) if self.signed else z
            return jnp.clip(jnp.floor(self._top * y + 0.5), -self._top, self._top)

        codes = self._scaled(code, x, scale)
        return Coded(codes.astype(self._dtype), (scale.astype(jnp.float16),))


def _in_range(scale: Array) -> Array:
    """Clips finite positive numbers to the range of float16; others are unchanged."""
    info = jnp.finfo(jnp.float16)
    clipped = jnp.clip(scale, float(info.smallest_subnormal), float(info.max))
    return jnp.where((scale > 0) & jnp.isfinite(scale), clipped, scale)


@dataclasses.dataclass(frozen=True)
class DynamicTree(Mapped):
    """The dynamic map of bitsandbytes; see `Blockwise`.

    There are seven decades below the largest number of a block. The uppermost has 64 evenly spaced
    codes, or 128 without a sign, and each decade has half as many as the one above it. The code of
    bitsandbytes is ``code + 127`` modulo 256 with a sign, and the same without.

    Attributes:
        signed: whether numbers may be negative.
        block: the number of values that share a scale.

    References:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021,
        https://arxiv.org/abs/2110.02861.
    """

    signed: bool = True
    block: int | None = 256

    scale_dtype: ClassVar[Any] = jnp.float32

    @property
    def _last(self) -> int:
        """The code of 1, which only positive numbers have."""
        return 128 if self.signed else 255

    def _below(self, y: Array) -> Array:
        decade, cells = self._decade(y, [self._first(i) for i in range(7)])
        place = jnp.clip(jnp.floor((y / decade - 0.1) / 0.9 * cells - 0.5), 0, cells - 1)
        code = jnp.where(y < self._first(0), 0, place + cells - (not self.signed))
        return jnp.where(y < 1, code, self._last)

    def _number(self, code: Array) -> Array:
        place = code + (not self.signed)
        decade, cells = self._decade(place, [self._cells(i) for i in range(7)])
        y = (0.1 + 0.9 * ((place + 0.5) / cells - 1)) * decade
        return jnp.where(code < 1, 0, jnp.where(code < self._last, y, 1))

    def _decade(self, x: Array, first: Sequence[float]) -> tuple[Array, Array]:
        """The upper end of the decade that begins with the last of `first` up to `x`; its codes."""
        # Seven selections; looking up 256 numbers would be slow on a TPU.
        decade, cells = jnp.float32(1e-6), jnp.float32(self._cells(0))
        for i in range(1, 7):
            decade = jnp.where(x < first[i], decade, jnp.float32(10.0 ** (i - 6)))
            cells = jnp.where(x < first[i], cells, jnp.float32(self._cells(i)))
        return decade, cells

    def _cells(self, i: int) -> int:
        """The number of codes in the decade up to 10^(i − 6), and that of the codes below it."""
        return 2 ** (i + (not self.signed))

    def _first(self, i: int) -> float:
        """The smallest number of that decade."""
        return (0.1 + 0.45 / self._cells(i)) * 10.0 ** (i - 6)

    def _least(self, largest: Array) -> Array:
        # So that the largest number of a block may be negative.
        return largest / (1 - 0.45 / self._cells(6)) if self.signed else largest

    def _fresh(self, least: Array) -> Array:
        return least

    def encode_nearest(self, x: Numbers, like: Coded | None = None) -> Coded:
        """Rounds to the nearest number, and to the lower one in the middle, as bitsandbytes."""
        scale = self._per_block(largest_magnitude, x)
        divide = lambda x, scale: jnp.where(scale > 0, jnp.abs(x) / scale, 0)
        y = self._scaled(divide, x, scale)
        below = self._below(y)
        down, up = y - self._number(below), self._number(below + 1) - y
        codes = below + jnp.where(x < 0, up <= down, up < down)
        codes = jnp.minimum(codes, jnp.where(x < 0, self._top, self._last))
        return self._stored(x, codes, scale)

    def decode(self, coded: Coded) -> Numbers:
        """Multiplies the number of a code by its block's scale."""
        codes = coded.codes.astype(jnp.int32)
        return super().decode(coded._replace(codes=jnp.where(codes == -128, 128, codes)))
