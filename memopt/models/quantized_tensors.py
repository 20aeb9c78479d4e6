"""Quantised parameters as plain arrays with names, as safetensors hold them.

A `memopt.Quantized` parameter is the arrays `codes` and, after the codec, `scale` and `zero`, or
`remainder`. Values are, with a scale and a zero for each 128 numbers of our last axis::

    int8, int4      (codes - zero) * scale
    bfloat16+8      codes, with 8 more bits of the mantissa in remainder

Four-bit codes are stored two in a byte, the first in the lower half.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from memopt.state.codecs import named
from memopt.state.quantized_params import is_quantized

#: Codecs that a directory may name, and the arrays they keep beside codes.
SIDE_DATA = {"int8": ("scale", "zero"), "int4": ("scale", "zero"), "bfloat16+8": ("remainder",)}

#: The arrays of parameters, of all codecs.
PARTS = ("codes", *dict.fromkeys(name for names in SIDE_DATA.values() for name in names))


def codec_of(params: Any) -> str | None:
    """The name of the codec that parameters are stored by; None if they are arrays.

    Raises:
        ValueError: They are stored by a codec that has no name in `SIDE_DATA`.

    Example:
        >>> import memopt
        >>> codec_of(memopt.quantize_params({"w": np.ones((4, 4), "float32")}, "int4"))
        'int4'

    """
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    codecs = {leaf.codec for leaf in leaves if is_quantized(leaf)}
    names = {name for name in SIDE_DATA for codec in codecs if named(name).weights == codec}
    if len(names) != len(codecs) or len(names) > 1:
        raise ValueError(
            f"weights stored by {', '.join(map(repr, codecs))} cannot be written; those of one of "
            f"{', '.join(SIDE_DATA)} can."
        )
    return next(iter(names), None)


def split_parts(params: Any) -> Any:
    """Parameters with a dict of named arrays in place of each `Quantized`.

    Example:
        >>> import memopt
        >>> stored = memopt.quantize_params({"w": np.ones((4, 256), "float32")})
        >>> {name: x.shape for name, x in split_parts(stored)["w"].items()}
        {'codes': (4, 256), 'scale': (4, 2), 'zero': (4, 2)}

    """

    def split(x: Any) -> Any:
        if not is_quantized(x):
            return x
        return dict(
            zip(("codes", *SIDE_DATA[codec_of(x) or ""]), (x.codes, *x.scales), strict=True)
        )

    return jax.tree.map(split, params, is_leaf=is_quantized)


def join_parts(parts: Mapping[str, Any], like: Mapping[str, Any]) -> Any:
    """Inverts `split_parts`.

    Args:
        parts: Nested dict of arrays.
        like: Parameters whose `Quantized` say where they belong.

    """

    def join(x: Any, part: Any) -> Any:
        if not is_quantized(x):
            return part
        codes, *scales = part.values()
        return dataclasses.replace(x, codes=codes, scales=tuple(scales))

    return jax.tree.map(join, like, parts, is_leaf=is_quantized)


def pack(codes: np.ndarray) -> np.ndarray:
    """Puts pairs of four-bit codes of the last axis into bytes.

    Example:
        >>> pack(np.array([1, -1, 7], np.int8))
        array([241,   7], dtype=uint8)

    """
    nibbles = codes.astype(np.int8).view(np.uint8) & 15
    nibbles = np.pad(nibbles, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def unpack(packed: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Inverts `pack` for the codes from `start` to `stop`, of the bytes that hold them.

    Example:
        >>> unpack(np.array([241, 7], np.uint8), 1, 3)
        array([-1,  7], dtype=int8)

    """
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    first = start % 2
    return ((nibbles ^ 8).astype(np.int8) - 8)[..., first : first + stop - start]
