"""Causal attention that never holds the scores of a long sequence all at once."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# Queries scored at a time: rows enough to fill a matrix unit, few enough to keep scores small.
QUERY_CHUNK = 256

_cudnn = contextvars.ContextVar("_cudnn", default=True)


def causal_attention(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array | None = None,
    offset: Array | int = 0,
    *,
    window: int | None = None,
    chunked: bool = False,
) -> Array:
    """Grouped-query attention of each position to itself and the positions before it.

    On a GPU, half-precision training runs cuDNN's flash attention. Elsewhere queries are scored in
    chunks and each chunk is recomputed in the backward pass, so float32 scores take
    `batch × heads × 256 × keys` at most.

    Args:
        query: `(batch, queries, heads, head_dim)`.
        key: `(batch, keys, kv_heads, head_dim)`; `kv_heads` divides `heads`.
        value: Like `key`.
        segment_ids: Integers `(batch, keys)`, of documents packed in a row: a position attends
            within its own only. Needs `queries == keys`.
        offset: Index, among the keys, of the first query.
        window: Number of keys each position attends to, its own included. None: all.
        chunked: Score queries in chunks on a GPU, too.

    Returns:
        Shape and dtype of `query`.

    Example:
        >>> x = jnp.ones((1, 3, 2, 8))
        >>> causal_attention(x, x, x).shape
        (1, 3, 2, 8)

    """
    keys = jnp.arange(key.shape[1])
    if not chunked and _flash(query, key):
        mask = None if segment_ids is None else _same(segment_ids, segment_ids)
        local: Any = {} if window is None else {"local_window_size": (window - 1, 0)}
        if mask is not None and window is not None:
            mask, local = mask & (keys[:, None] < keys + window), {}
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=True, implementation="cudnn", **local
        )

    def attend(part: tuple[Array, Array, Array | None]) -> Array:
        query, index, segments = part
        mask = (index[..., None] >= keys)[:, None]
        if window is not None:
            mask = mask & (index[..., None] < keys + window)[:, None]
        if segments is not None and segment_ids is not None:
            mask = mask & _same(segments, segment_ids)
        with jax.softmax_custom_jvp(True):  # whose backward pass reads its result only
            return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")

    length = query.shape[1]
    whole = query, (offset + jnp.arange(length))[None], segment_ids
    if length <= 2 * QUERY_CHUNK:
        return attend(whole)
    chunks = jax.tree.map(lambda x: split_sequence(x, QUERY_CHUNK), whole)
    out = jnp.moveaxis(jax.lax.map(jax.checkpoint(attend), chunks), 0, 1)
    return out.reshape(query.shape[0], -1, *query.shape[2:])[:, :length]


def split_sequence(x: Array, size: int) -> Array:
    """Cuts the second axis into chunks, the last padded with zeros.

    Args:
        x: `(batch, seq, ...)`.
        size: Positions of a chunk.

    Returns:
        `(chunks, batch, size, ...)`.

    Example:
        >>> split_sequence(jnp.ones((2, 5, 3)), 4).shape
        (2, 2, 4, 3)

    """
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """Traces attention without cuDNN, which this machine may have, but not the one compiled for."""
    token = _cudnn.set(False)
    try:
        yield
    finally:
        _cudnn.reset(token)


def _flash(query: Array, key: Array) -> bool:
    """Whether cuDNN's flash attention takes these arrays; whole training sequences only."""
    return (
        _cudnn.get()
        and jax.default_backend() == "gpu"
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[1] == key.shape[1] > 1
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 128
    )


def _same(first: Array, second: Array) -> Array:
    return first[:, None, :, None] == second[:, None, None, :]
