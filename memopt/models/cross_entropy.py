"""Cross-entropy over a large vocabulary, a part of the vocabulary at a time."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from memopt.models.sharding import shards
from memopt.state.quantized_params import Deferred, dequantize_params

#: Columns of a part are a multiple of this: a row of a TPU's tiles, and a block of int8 weights.
LANES = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def chunked_cross_entropy(
    x: Array,
    kernel: Array | Deferred,
    targets: Array,
    weights: Array,
    logits_bytes: int,
    vocab_axis: int = 1,
) -> Array:
    """Cross-entropy of `x @ kernel`, summed with weights, without holding all logits.

    The logits of a part of the vocabulary are computed for all positions at once, and computed
    again by the backward pass, which thus writes each part of the kernel's gradient once.

    Args:
        x: `(batch, seq, hidden)`.
        kernel: `(hidden, vocab)`, used in the dtype of `x`; `(vocab, hidden)` with a `vocab_axis`
            of 0. Of a deferred one a part is dequantised at a time.
        targets: Integers `(batch, seq)`.
        weights: float32 `(batch, seq)`.
        logits_bytes: Float32 logits to hold at a time, at most.
        vocab_axis: The axis of the vocabulary.

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
    return _forward(x, kernel, targets, weights, logits_bytes, vocab_axis)[0]


def _forward(
    x: Array, kernel: Any, targets: Array, weights: Array, logits_bytes: int, vocab_axis: int
) -> tuple[Array, Any]:
    parts = _Parts(x, kernel, logits_bytes, vocab_axis)

    def read(carry: tuple[Array, Array, Array], part: Array) -> Any:
        highest, total, chosen = carry
        logits, ids, is_new = parts.logits(x, parts.columns(part), part)
        logits = jnp.where(is_new, logits, -jnp.inf)
        new = jnp.maximum(highest, logits.max((1, 3)))
        total = total * jnp.exp(highest - new) + jnp.exp(logits - _wide(new)).sum((1, 3))
        chosen += jnp.where(is_new & (ids == _wide(targets)), logits, 0).sum((1, 3))
        return (new, total, chosen), None

    zeros = jnp.zeros(targets.shape, jnp.float32)
    carry = zeros - jnp.inf, zeros, zeros
    (highest, total, chosen), _ = jax.lax.scan(read, carry, jnp.arange(parts.count))
    normalizer = highest + jnp.log(total)
    losses = normalizer - chosen
    return (losses * weights).sum(), (x, kernel, targets, weights, normalizer, losses)


def _backward(
    logits_bytes: int, vocab_axis: int, kept: Any, cotangent: Array
) -> tuple[Array, Any, None, Array]:
    x, kernel, targets, weights, normalizer, losses = kept
    parts = _Parts(x, kernel, logits_bytes, vocab_axis)
    scale = _wide(cotangent * weights)

    def read(carry: tuple[Array, Array], part: Array) -> Any:
        dx, dkernel = carry
        columns = parts.columns(part)
        logits, ids, is_new = parts.logits(x, columns, part)
        d = (jnp.exp(logits - _wide(normalizer)) - (ids == _wide(targets))) * scale
        d = d.astype(x.dtype)
        wide = {"preferred_element_type": jnp.float32}
        dx += jnp.einsum(f"btsc,{parts.axes}->bsh", jnp.where(is_new, d, 0), columns, **wide)
        # Columns that the part before has, too, are written again as they are.
        new = jnp.einsum(f"bsh,btsc->{parts.axes}", x, d, **wide).astype(dkernel.dtype)
        start = parts.start(part)
        dkernel = jax.lax.dynamic_update_slice_in_dim(dkernel, new, start, vocab_axis + 1)
        return (dx, dkernel), None

    zeros = jnp.zeros(kernel.shape, kernel.dtype)
    carry = jnp.zeros(x.shape, jnp.float32), parts.on_devices(zeros)
    (dx, new), _ = jax.lax.scan(read, carry, jnp.arange(parts.count))
    dkernel: Any = parts.from_devices(new)
    if isinstance(kernel, Deferred):
        dkernel = Deferred(cast(Any, None), dkernel)
    return dx.astype(x.dtype), dkernel, None, cotangent * losses


chunked_cross_entropy.defvjp(_forward, _backward)


class _Parts:
    """Equal parts of the vocabulary on each device; the last one may overlap the one before."""

    def __init__(self, x: Array, kernel: Any, logits_bytes: int, vocab_axis: int):
        self.axis, self.dtype, vocab = vocab_axis, x.dtype, kernel.shape[vocab_axis]
        self.devices = shards("vocab", vocab)
        self.length = vocab // self.devices
        self.axes, self.shape = ("tch", "thc")[vocab_axis], kernel.shape
        positions = x.shape[0] * x.shape[1] // shards("batch", x.shape[0])
        fitting = max(1, logits_bytes // (4 * positions))
        self.size = min(fitting // LANES * LANES or fitting, self.length)
        self.count = -(-self.length // self.size)
        self.kernel = self._readable(kernel)

    def start(self, part: Array) -> Array:
        """The first of a device's columns that a part has."""
        return jnp.minimum(self.size * part, self.length - self.size)

    def columns(self, part: Array) -> Array:
        """A part of the kernel, (devices, hidden, size) or (devices, size, hidden)."""

        def cut(x: Array) -> Array:
            x, axis = self.on_devices(x), self.axis + 1
            block = self.length // x.shape[axis]  # numbers for each scale
            start = self.start(part) // block
            return jax.lax.dynamic_slice_in_dim(x, start, self.size // block, axis)

        return dequantize_params(jax.tree.map(cut, self.kernel)).astype(self.dtype)

    def logits(self, x: Array, columns: Array, part: Array) -> tuple[Array, Array, Array]:
        """Float32 logits of a part, the ids of its columns, and which no part before has.

        Logits are (batch, devices, seq, size), the others (devices, 1, size) and (size,).
        """
        wide = {"preferred_element_type": jnp.float32}
        logits = jnp.einsum(f"bsh,{self.axes}->btsc", x, columns, **wide)
        places = self.start(part) + jnp.arange(self.size)
        ids = places + self.length * jnp.arange(self.devices)[:, None, None]
        return logits, ids, places >= self.size * part

    def on_devices(self, x: Array) -> Array:
        """Splits the vocabulary into an axis of devices, the first, and one inside of them."""
        shape = list(x.shape)
        shape[self.axis : self.axis + 1] = self.devices, x.shape[self.axis] // self.devices
        return jnp.moveaxis(x.reshape(shape), self.axis, 0)

    def from_devices(self, x: Array) -> Array:
        """Inverts `on_devices` for the kernel."""
        return jnp.moveaxis(x, 0, self.axis).reshape(self.shape)

    def _readable(self, kernel: Any) -> Any:
        """The kernel, dequantised at once if its parts cannot be read by themselves."""
        if not isinstance(kernel, Deferred):
            # Or XLA keeps the float32 numbers that it was rounded from.
            return jax.lax.optimization_barrier(kernel)
        stored = kernel.stored
        block = getattr(stored.codec, "block", None) if self.axis == 1 else 1
        counts = {x.shape[self.axis] for x in jax.tree.leaves(stored)}
        whole = block and self.length % block == self.size % block == 0
        vocab = self.length * self.devices
        if whole and counts <= {vocab, vocab // block}:
            return stored
        return stored.dequantize()


def _wide(x: Array) -> Array:
    """Adds axes of devices and columns to (batch, seq)."""
    return x[:, None, :, None]
