"""A codec of averages of Gram matrices."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from memopt.axis_types import on_auto_axes, spec_of
from memopt.shapes import Bits, Square
from memopt.state.codecs.base import Codec, Coded, reciprocal
from memopt.state.rounding import uniform

_COARSE, _FINE = 127, 128
"""Coarse codes from 0 to the largest correlation, 1; fine codes in each coarse one."""


@dataclasses.dataclass(frozen=True)
class Gram(Codec):
    """Averages of G Gᵀ: their diagonal in float32, and correlations in 14 bits and a sign.

    An entry x is stored as x / √(x_row x_column), relative to the diagonal, which is at most 1.
    Both triangles hold the same numbers, so that each pair of entries has two bytes: the upper one
    the nearest of 2·127 + 1 coarse codes, the lower one the last 8 bits of 2·16,256 + 1 fine codes.
    These overlap in a bit, so that the two entries of a pair may differ by rounding. Eigenvalues
    far below the largest, which 8 bits for each entry would drown, are kept.

    A number that is not finite makes its row NaN.

    Example:
        >>> g = jnp.array([[1.0, 2.0], [30.0, -10.0]])
        >>> coded = Gram().encode_nearest(g @ g.T)
        >>> coded.codes.dtype, coded.side_data[0].tolist()
        (dtype('int8'), [[5.0], [1000.0]])
        >>> Gram().decode(coded).round(2).tolist()  # g @ g.T is 10 there
        [[5.0, 10.0], [10.0, 1000.0]]
    """

    def encode(self, x: Square, bits: Bits, like: Coded | None = None) -> Coded:
        """Rounds correlations to coarse codes above the diagonal and to fine ones below it."""
        spec = tuple(spec_of(x))
        column = jax.P(*spec[:-1], None) if spec else jax.P()
        bits = jnp.broadcast_to(bits, x.shape)
        codes, diagonal = on_auto_axes(_encode, (x, bits), like=(jax.P(*spec), column))
        return Coded(codes, (diagonal,))

    def decode(self, coded: Coded) -> Square:
        """Joins both codes of each pair, and multiplies them by the roots of the diagonal."""
        codes, (diagonal,) = coded
        return on_auto_axes(_decode, (codes, diagonal), like=spec_of(codes))


def _encode(x: Square, bits: Bits) -> tuple[Array, Array]:
    rows, cols = _places(x)
    # Entries beside the diagonal count as zero, but for NaN and infinity, which are not lost.
    diagonal = jnp.where(rows == cols, x, 0 * x).sum(-1, keepdims=True)
    inverse = reciprocal(jnp.sqrt(diagonal))
    correlation = jnp.clip(x * inverse * inverse.mT, -1, 1)
    coarse = jnp.round(_COARSE * correlation).astype(jnp.int32)
    fine = jnp.floor(_COARSE * _FINE * correlation + uniform(bits)).astype(jnp.int32)
    codes = jnp.where(rows < cols, coarse, _last_byte(fine)).astype(jnp.int8)
    return codes, diagonal


def _decode(codes: Array, diagonal: Array) -> Square:
    rows, cols = _places(codes)
    mine, other = codes.astype(jnp.int32), codes.mT.astype(jnp.int32)
    coarse = _FINE * jnp.where(rows < cols, mine, other)
    fine = coarse + _last_byte(jnp.where(rows < cols, other, mine) - coarse)
    root = jnp.sqrt(diagonal)
    entries = fine.astype(jnp.float32) / (_COARSE * _FINE) * (root * root.mT)
    return jnp.where(rows == cols, diagonal, entries)


def _places(x: Array) -> tuple[Array, Array]:
    """The row and the column of each entry."""
    iota = lambda axis: jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim + axis)
    return iota(-2), iota(-1)


def _last_byte(x: Array) -> Array:
    """The number from -128 to 127 that differs from `x` by a multiple of 256."""
    return ((x + 128) & 255) - 128
