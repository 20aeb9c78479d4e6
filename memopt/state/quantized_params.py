"""Parameters in fewer bits, and updates that are rounded into them stochastically."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from memopt.matrices import Layout, Matrices, every_matrix, map_matrices
from memopt.state.codecs import BFloat16, Codec, Coded, named
from memopt.state.rounding import NEAREST, rounding_bits
from memopt.trees import map_named


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A parameter stored by a codec; stands in a tree where the array did.

    Attributes:
      codes: of the parameter's shape.
      scales: what the codec keeps beside them.
      codec: how they are read and written.
      dtype: that of the parameter when it is read.
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
        """The parameter."""
        return self.codec.decode(Coded(self.codes, self.scales)).astype(self.dtype)


def is_quantized(x: Any) -> bool:
    """Whether a node of a tree is a `Quantized`."""
    return isinstance(x, Quantized)


def quantize_params(params: Any, codec: str | Codec = "int8", *, matrices: Matrices = None) -> Any:
    """Stores a tree's matrices in 8 bits, in 4, or in bfloat16 with a remainder.

    Args:
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place.
      codec: "int8" or "int4" (asymmetric, 128 numbers of the last axis to a scale), "float8",
        "bfloat16+8" (bfloat16 and the next eight bits of a float32), or a codec of
        `memopt.codecs`.
      matrices: which leaves are stored so; by default every matrix, embeddings too, see
        `memopt.every_matrix`. The others stay as they are.

    Returns:
      A tree with a `Quantized` in place of each matrix, rounded to the nearest code.

    Raises:
      ValueError: if the codec's name is unknown.

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
    """The tree with every `Quantized` read; other leaves stay as they are.

    Args:
      params: as from `quantize_params`, or any part of it.
    """
    read = lambda x: x.dequantize() if is_quantized(x) else x
    return jax.tree.map(read, params, is_leaf=is_quantized)


def apply_rounded_updates(
    params: Any, updates: Any, step: Array | int, *, seed: int | Array = 0
) -> Any:
    """Adds updates to parameters, and rounds what cannot hold the sum stochastically.

    In bfloat16 a weight of 1 does not move by updates below 0.002, however many, when each sum
    is rounded to the nearest; here it moves as far as they add up to. So do parameters from
    `quantize_params`. Those in float32 are as from ``optax.apply_updates``.

    Args:
      params: arrays, and `Quantized` ones.
      updates: a tree like it, of arrays; None leaves a parameter as it is.
      step: steps taken, any integer that differs from step to step.
      seed: other roundings.

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
        wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
        bits = lambda: rounding_bits(p.shape, name, step, seed)
        if is_quantized(p):
            new = p.codec.decode(Coded(p.codes, p.scales)) + wide(u)
            coded = p.codec.encode(new, bits(), Coded(p.codes, p.scales))
            return dataclasses.replace(p, codes=coded.codes, scales=coded.side_data)
        if p.dtype == jnp.bfloat16:
            return BFloat16().encode(wide(p) + wide(u), bits()).codes
        return (p + u).astype(p.dtype)

    is_leaf = lambda x: x is None or is_quantized(x)
    return map_named(add, params, updates, is_leaf=is_leaf)


def _placed(part: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """A parameter's codes or scales sharded as it is; a last axis that does not divide, not."""
    spec = (*sharding.spec, *(None,) * (len(part.shape) - len(sharding.spec)))
    placed = NamedSharding(sharding.mesh, jax.P(*spec))
    try:
        placed.shard_shape(part.shape)
    except ValueError:
        placed = NamedSharding(sharding.mesh, jax.P(*spec[:-1], None))
    return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=placed)
