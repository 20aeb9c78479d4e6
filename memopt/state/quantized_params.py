"""Stores parameters in fewer bits, and adds updates to them with stochastic rounding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from memopt.checked import checked
from memopt.matrices import Layout, Matrices, every_matrix, map_matrices
from memopt.state.codecs import BFloat16, Codec, Coded, named
from memopt.state.precision import check_real, to_float32
from memopt.state.rounding import NEAREST, rounding_bits
from memopt.trees import map_named


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A parameter stored by a codec, in place of its array in a tree.

    Attributes:
        codes: an array of the parameter's shape.
        scales: the codec's other arrays, such as scales.
        codec: encodes and decodes the parameter.
        dtype: the dtype of the dequantised parameter.
    """

    codes: Array
    scales: tuple[Array, ...]
    codec: Codec = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.codes.shape

    def dequantize(self) -> Array:
        """Decodes the parameter."""
        return self.codec.decode(Coded(self.codes, self.scales)).astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred:
    """A quantised matrix for a function that dequantises a part of it at a time.

    Its gradient is that of `change`, which is zero and need not be read.

    Attributes:
        stored: the matrix.
        change: zeros of its shape and dtype, added to it.
    """

    stored: Quantized
    change: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return self.change.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the dequantised matrix."""
        return self.change.dtype

    def dequantize(self) -> Array:
        """Decodes the whole matrix."""
        return self.stored.dequantize() + self.change


def take_rows(matrix: Array | Deferred, indices: Array) -> Array:
    """Returns rows of a matrix; of a deferred one only these are dequantised.

    Args:
        matrix: ``(rows, cols)``.
        indices: integers of any shape.

    Returns:
        ``(*indices.shape, cols)``.

    Example:
        >>> stored = quantize_params({"w": jnp.arange(512.0).reshape(2, 256)})["w"]
        >>> rows = take_rows(Deferred(stored, jnp.zeros((2, 256))), jnp.array([1, 1, 0]))
        >>> rows.shape, bool((rows[0] == stored.dequantize()[1]).all())
        ((3, 256), True)
    """
    if not isinstance(matrix, Deferred):
        return jnp.take(matrix, indices, axis=0)
    if any(x.shape[:1] != matrix.shape[:1] for x in jax.tree.leaves(matrix.stored)):
        return jnp.take(matrix.dequantize(), indices, axis=0)
    return jax.tree.map(lambda x: jnp.take(x, indices, axis=0), matrix.stored).dequantize()


def is_quantized(x: Any) -> bool:
    """Whether a node of a tree is a `Quantized`."""
    return isinstance(x, Quantized)


def quantize_params(params: Any, codec: str | Codec = "int8", *, matrices: Matrices = None) -> Any:
    """Stores a tree's matrices in 8 bits, 4 bits, or bfloat16 with a remainder.

    Args:
        params: arrays or ``jax.ShapeDtypeStruct``.
        codec: "int8" or "int4" (asymmetric, with a scale for each 128 numbers of the last axis),
            "float8", "bfloat16+8" (bfloat16 and the next eight bits of a float32), or a codec of
            `memopt.codecs`.
        matrices: which leaves to quantise; by default every matrix, embeddings included, see
            `memopt.every_matrix`. Other leaves are unchanged.

    Returns:
        A tree with a `Quantized` in place of each matrix, rounded to the nearest code.

    Raises:
        ValueError: if the codec's name is unknown, or a parameter complex.

    References:
        Zhu et al., APOLLO, 2024, https://arxiv.org/abs/2412.05270 (Q-APOLLO).

    Example:
        >>> params = {"up": jnp.ones((4, 256)), "norm": jnp.ones(4)}
        >>> stored = quantize_params(params)
        >>> stored["up"].codes.dtype, stored["up"].scales[0].shape, stored["norm"].dtype
        (dtype('int8'), (4, 2), dtype('float32'))
        >>> bool(abs(dequantize_params(stored)["up"] - 1).max() < 0.005)
        True
    """
    stored = named(codec).weights
    check_real(params)

    def store(layout: Layout, x: Any) -> Any:
        if not layout.is_matrix:
            return x
        encode = lambda x: stored.encode(x.astype(jnp.float32), jnp.asarray(NEAREST))
        coded = jax.eval_shape(encode, x) if isinstance(x, jax.ShapeDtypeStruct) else encode(x)
        if isinstance(x, jax.ShapeDtypeStruct) and isinstance(x.sharding, NamedSharding):
            coded = jax.tree.map(lambda part: _placed(part, x.sharding), coded)
        return Quantized(coded.codes, coded.side_data, stored, jnp.dtype(x.dtype))

    return map_matrices(store, params, matrices=matrices, default=every_matrix)


def dequantize_params(params: Any) -> Any:
    """Decodes every `Quantized` in a tree; other leaves are unchanged.

    Args:
        params: a tree from `quantize_params`, or any part of it.
    """
    is_stored = lambda x: isinstance(x, Quantized | Deferred)
    return jax.tree.map(lambda x: x.dequantize() if is_stored(x) else x, params, is_leaf=is_stored)


@checked
def apply_rounded_updates(
    params: Any, updates: Any, step: Array | int, *, seed: int | Array = 0
) -> Any:
    """Adds updates to parameters, with stochastic rounding in bfloat16 and quantised ones.

    If sums are rounded to nearest, a bfloat16 weight of 1 never changes by updates below 0.002,
    however many; here it changes by their sum in expectation, and so do parameters from
    `quantize_params`. Parameters in float32 are updated as by ``optax.apply_updates``.

    Args:
        params: a tree of arrays and `Quantized` parameters.
        updates: a tree like it, of arrays; None leaves a parameter unchanged.
        step: the number of previous steps, or any integer that differs from step to step.
        seed: the seed of the rounding bits.

    Returns:
        The new parameters, stored as before.

    Example:
        >>> w = {"w": jnp.ones((64, 64), jnp.bfloat16)}
        >>> for step in range(100):
        ...     w = apply_rounded_updates(w, {"w": jnp.full((64, 64), 1e-4)}, step)
        >>> bool(abs(w["w"].astype("float32").mean() - 1.01) < 1e-4)
        True
    """

    def add(name: str, p: Any, u: Any) -> Any:
        if p is None or u is None:
            return p
        bits = lambda: rounding_bits(p.shape, name, step, seed)
        if is_quantized(p):
            new = p.codec.decode(Coded(p.codes, p.scales)) + to_float32(u)
            # A number that nothing is added to keeps its code, although its quotient is inexact.
            rounding = jnp.where(u == 0, NEAREST, bits())
            coded = p.codec.encode(new, rounding, Coded(p.codes, p.scales))
            return dataclasses.replace(p, codes=coded.codes, scales=coded.side_data)
        if p.dtype == jnp.bfloat16:
            return BFloat16().encode(to_float32(p) + to_float32(u), bits()).codes
        return (p + u).astype(p.dtype)

    is_leaf = lambda x: x is None or is_quantized(x)
    return map_named(add, params, updates, is_leaf=is_leaf)


def _placed(part: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Codes or scales with their parameter's sharding, without the last axis if not divisible."""
    spec = (*sharding.spec, *(None,) * (len(part.shape) - len(sharding.spec)))
    placed = NamedSharding(sharding.mesh, jax.P(*spec))
    try:
        placed.shard_shape(part.shape)
    except ValueError:
        placed = NamedSharding(sharding.mesh, jax.P(*spec[:-1], None))
    return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=placed)
