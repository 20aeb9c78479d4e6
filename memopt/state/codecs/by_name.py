"""Codecs by name."""

from typing import NamedTuple

from memopt.errors import check_choice
from memopt.state.codecs.base import Codec
from memopt.state.codecs.bfloat16 import BFloat16, BFloat16AndRemainder
from memopt.state.codecs.blockwise import Asymmetric, Float8, Integers
from memopt.state.codecs.published import Companded, DynamicTree
from memopt.state.codecs.row_scaled import Dynamic, Tapered


class Named(NamedTuple):
    """The codecs of one name.

    Attributes:
        weights: the codec for parameters.
        signed: the codec for first moments and other arrays that may be negative.
        unsigned: the codec for second moments.
    """

    weights: Codec
    signed: Codec
    unsigned: Codec


_SECOND_MOMENTS = Tapered(signed=False, octaves=8, headroom=4)  # squares have twice as many octaves
_NAMED = {
    "int8": Named(Asymmetric(), Tapered(), _SECOND_MOMENTS),
    "int4": Named(Asymmetric(bits=4), Integers(bits=4, power=2), _SECOND_MOMENTS),
    "float8": Named(Float8(), Float8(), Dynamic(5, 3, signed=False)),
    "e5m2": Named(Float8(dtype="float8_e5m2"), Dynamic(5, 2), Dynamic(5, 3, signed=False)),
    "flash8": Named(BFloat16AndRemainder(), Companded(), Companded(signed=False)),
    "dynamic8": Named(DynamicTree(), DynamicTree(), DynamicTree(signed=False)),
    "bfloat16": Named(BFloat16(), BFloat16(), BFloat16()),
    "bfloat16+8": Named(*3 * (BFloat16AndRemainder(),)),
}


def named(codec: "str | Codec") -> Named:
    """Returns the codecs of a name; a given codec is used for all three purposes.

    Raises:
        ValueError: if the name is unknown; the closest name is suggested.
    """
    if isinstance(codec, Codec):
        return Named(codec, codec, codec)
    check_choice("codec", codec, _NAMED)
    return _NAMED[codec]
