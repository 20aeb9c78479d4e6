"""The interface of codecs."""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from memopt.shapes import Bits, Numbers
from memopt.state.precision import zeros_of


class Coded(NamedTuple):
    """Numbers as a codec stores them.

    Attributes:
      codes: of the array's shape.
      side_data: what the codec keeps beside them, such as scales: arrays of that shape
        but for a shorter last axis.
    """

    codes: Array
    side_data: tuple[Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """A way to store float32 numbers in few bits.

    Rounding is stochastic: a number between two that have codes becomes either, so that the
    expected one is the number itself. A change too small for the next code is not lost, it is
    made now and then. Where numbers share a scale, one that is not finite makes all NaN.
    """

    @abc.abstractmethod
    def encode(self, x: Numbers, bits: Bits, like: Coded | None = None) -> Coded:
        """The codes of some numbers.

        Args:
          x: float32, ``(..., n)``.
          bits: uint32, broadcastable to it, that decide the rounding; see `memopt.state.rounding`.
          like: the codes that these take the place of, whose scales stay where they still fit;
            None to fit new ones.
        """

    @abc.abstractmethod
    def decode(self, coded: Coded) -> Numbers:
        """The numbers, float32."""

    def is_unfit(self, side_data: tuple[Array, ...]) -> Array | bool:
        """Whether numbers outgrew their scales, which `fit` must see to before the next `encode`.

        Only of a codec that goes by the scales of the step before; others look at the numbers.
        """
        return False

    def fit(self, side_data: tuple[Array, ...], x: Array) -> tuple[Array, ...]:
        """The scales by which `encode` is to go for numbers like `x`."""
        return side_data

    def init(self, x: Any) -> Coded:
        """The codes of zeros with the shape, dtype and sharding of `x`."""
        return zeros_of(lambda x: self.encode(x, jnp.zeros(x.shape, jnp.uint32)), x)


@dataclasses.dataclass(frozen=True)
class AsIs(Codec):
    """Numbers as they are."""

    def encode(self, x: Numbers, bits: Bits, like: Coded | None = None) -> Coded:
        """Returns the numbers unchanged."""
        return Coded(x)

    def decode(self, coded: Coded) -> Numbers:
        """Returns the codes, which are the numbers."""
        return coded.codes


def bits_of(dtype: Any) -> int:
    """The bits of a number of a dtype; numpy counts those of 4 bits as 8.

    Example:
      >>> bits_of(jnp.int4), bits_of(jnp.bfloat16)
      (4, 16)
    """
    dtype = jnp.dtype(dtype)
    return 4 if dtype.name in ("int4", "uint4") else 8 * dtype.itemsize


def reciprocal(scale: Array) -> Array:
    """1 / scale, or 0 where that would not be a normal number."""
    return jnp.where(scale > 2.0**-120, 1 / scale, 0)
