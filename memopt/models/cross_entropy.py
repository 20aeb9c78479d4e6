"""Cross-entropy over a large vocabulary, a part of the vocabulary at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from memopt.models.sharding import shards

#: Columns of a part are a multiple of this: a row of a TPU's tiles, and a block of int8 weights.
LANES = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_cross_entropy(
    x: Array, kernel: Array, targets: Array, weights: Array, logits_bytes: int
) -> Array:
    """Cross-entropy of `x @ kernel`, summed with weights, without holding all logits.

    The logits of a part of the vocabulary are computed for all positions at once, and computed
    again by the backward pass, which thus writes each part of the kernel's gradient once.

    Args:
        x: `(batch, seq, hidden)`.
        kernel: `(hidden, vocab)`, used in the dtype of `x`.
        targets: Integers `(batch, seq)`.
        weights: float32 `(batch, seq)`.
        logits_bytes: Float32 logits to hold at a time, at most.

    Returns:
        A float32 scalar.

    References:
        Wijmans et al. 2024, "Cut your losses in large-vocabulary language models"
        (arXiv:2411.09009), sections 4.1 and 4.2.

    Example:
        >>> x, kernel = jnp.ones((1, 2, 4)), jnp.ones((4, 300))
        >>> targets, weights = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2))
        >>> total = chunked_cross_entropy(x, kernel, targets, weights, 4 * 2 * 128)
        >>> round(float(total / 2 - jnp.log(300)), 5)
        0.0
    """
    return _forward(x, kernel, targets, weights, logits_bytes)[0]


def _forward(
    x: Array, kernel: Array, targets: Array, weights: Array, logits_bytes: int
) -> tuple[Array, Any]:
    parts = _Parts(x, kernel, logits_bytes)

    def read(carry: tuple[Array, Array, Array], start: Array | int, size: int) -> Any:
        highest, total, chosen = carry
        logits, ids = parts.logits(x, kernel, start, size)
        new = jnp.maximum(highest, logits.max((-2, -1)))
        total = total * jnp.exp(highest - new) + jnp.exp(logits - _wide(new)).sum((-2, -1))
        chosen += jnp.where(ids == _wide(targets), logits, 0).sum((-2, -1))
        return new, total, chosen

    zeros = jnp.zeros(targets.shape, jnp.float32)
    highest, total, chosen = parts.scan(read, (zeros - jnp.inf, zeros, zeros))
    normalizer = highest + jnp.log(total)
    losses = normalizer - chosen
    return (losses * weights).sum(), (x, kernel, targets, weights, normalizer, losses)


def _backward(logits_bytes: int, kept: Any, cotangent: Array) -> tuple[Array, Array, None, Array]:
    x, kernel, targets, weights, normalizer, losses = kept
    parts = _Parts(x, kernel, logits_bytes)
    scale = _wide(cotangent * weights)

    def read(carry: tuple[Array, Array], start: Array | int, size: int) -> Any:
        dx, dkernel = carry
        logits, ids = parts.logits(x, kernel, start, size)
        d = (jnp.exp(logits - _wide(normalizer)) - (ids == _wide(targets))) * scale
        d = d.astype(x.dtype)
        columns = parts.columns(kernel, start, size).astype(x.dtype)
        wide = {"preferred_element_type": jnp.float32}
        dx += jnp.einsum("bstc,htc->bsh", d, columns, **wide)
        new = jnp.einsum("bsh,bstc->htc", x, d, **wide).astype(dkernel.dtype)
        return dx, jax.lax.dynamic_update_slice_in_dim(dkernel, new, start, axis=2)

    zeros = jnp.zeros(x.shape, jnp.float32), jnp.zeros(parts.shape, kernel.dtype)
    dx, dkernel = parts.scan(read, zeros)
    return dx.astype(x.dtype), dkernel.reshape(kernel.shape), None, cotangent * losses


chunked_cross_entropy.defvjp(_forward, _backward)


class _Parts:
    """Equal parts of the columns of each device, and what is left of them."""

    def __init__(self, x: Array, kernel: Array, logits_bytes: int):
        hidden, vocab = kernel.shape
        devices = shards("vocab", vocab)
        self.shape = hidden, devices, vocab // devices
        positions = x.shape[0] * x.shape[1] // shards("batch", x.shape[0])
        fitting = max(1, logits_bytes // (4 * positions))
        size = fitting // LANES * LANES or fitting
        self.size = min(size, self.shape[2])

    def columns(self, kernel: Array, start: Array | int, size: int) -> Array:
        """The columns of a part, (hidden, devices, size)."""
        kernel = kernel.reshape(self.shape)
        return jax.lax.dynamic_slice_in_dim(kernel, start, size, axis=2)

    def logits(self, x: Array, kernel: Array, start: Array | int, size: int) -> tuple[Array, Array]:
        """Float32 logits of a part, (batch, seq, devices, size), and the ids of its columns."""
        columns = self.columns(kernel, start, size).astype(x.dtype)
        logits = jnp.einsum("bsh,htc->bstc", x, columns, preferred_element_type=jnp.float32)
        _, devices, length = self.shape
        return logits, start + length * jnp.arange(devices)[:, None] + jnp.arange(size)

    def scan(self, read: Callable[..., Any], carry: Any) -> Any:
        """Calls `read(carry, start, size)` for each part."""
        whole, left = divmod(self.shape[2], self.size)
        step = lambda carry, part: (read(carry, self.size * part, self.size), None)
        carry, _ = jax.lax.scan(step, carry, jnp.arange(whole))
        return read(carry, self.size * whole, left) if left else carry


def _wide(x: Array) -> Array:
    return x[..., None, None]
