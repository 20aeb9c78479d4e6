"""The interface of codecs."""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from memopt.shapes import Bits, Numbers
from memopt.state.precision import zeros_of
from memopt.state.rounding import NEAREST


class Coded(NamedTuple):
    """Numbers as stored by a codec.

    Attributes:
        codes: an array of the numbers' shape.
        side_data: the codec's other arrays, such as scales, of the same shape except for a shorter
            last axis.
    """

    codes: Array
    side_data: tuple[Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """A way to store float32 numbers in few bits.

    Rounding is stochastic: a number between two codes is rounded to either one, and its expected
    value is the number itself, so that changes smaller than the distance of codes are not lost. If
    numbers share a scale, one that is not finite makes all of them NaN.
    """

    @abc.abstractmethod
    def encode(self, x: Numbers, bits: Bits, like: Coded | None = None) -> Coded:
        """Encodes numbers.

        Args:
            x: float32, ``(..., n)``.
            bits: uint32, broadcastable to `x`, which decide the rounding; see
                `memopt.state.rounding`.
            like: the previous codes, whose scales are kept if they still fit; None to fit new ones.
        """

    def encode_nearest(self, x: Numbers, like: Coded | None = None) -> Coded:
        """Encodes numbers without randomness; arguments as of `encode`."""
        return self.encode(x, jnp.asarray(NEAREST), like)

    @abc.abstractmethod
    def decode(self, coded: Coded) -> Numbers:
        """Decodes numbers to float32."""

    def is_unfit(self, side_data: tuple[Array, ...]) -> Array | bool:
        """Whether some scales are unusable, so that `fit` must run before the next `encode`.

        This can be true only for a codec that uses the scales of the previous step.
        """
        return False

    def fit(self, side_data: tuple[Array, ...], x: Array) -> tuple[Array, ...]:
        """Returns side data with which `encode` can encode numbers like `x`."""
        return side_data

    def init(self, x: Any) -> Coded:
        """Encodes zeros with the shape, dtype and sharding of `x`."""
        return zeros_of(lambda x: self.encode(x, jnp.zeros(x.shape, jnp.uint32)), x)


@dataclasses.dataclass(frozen=True)
class AsIs(Codec):
    """Stores numbers unchanged."""

    def encode(self, x: Numbers, bits: Bits, like: Coded | None = None) -> Coded:
        """Returns the numbers unchanged."""
        return Coded(x)

    def decode(self, coded: Coded) -> Numbers:
        """Returns the codes, which are the numbers."""
        return coded.codes


def bits_of(dtype: Any) -> int:
    """The number of bits of a dtype; NumPy counts 4-bit dtypes as 8 bits.

    Example:
        >>> bits_of(jnp.int4), bits_of(jnp.bfloat16)
        (4, 16)
    """
    dtype = jnp.dtype(dtype)
    return 4 if dtype.name in ("int4", "uint4") else 8 * dtype.itemsize


def reciprocal(scale: Array) -> Array:
    """Computes 1 / scale, or 0 if that would not be a normal number."""
    return jnp.where(scale > 2.0**-120, 1 / scale, 0)
