"""Causal attention that never holds the scores of a long sequence all at once."""

import jax
import jax.numpy as jnp

# Queries scored at a time: rows enough to fill a matrix unit, few enough to keep scores small.
QUERY_CHUNK = 256


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None = None,
    offset: jax.Array | int = 0,
    *,
    chunked: bool = False,
) -> jax.Array:
    """Grouped-query attention of each position to itself and to what precedes it.

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
        chunked: Score queries in chunks on a GPU, too.

    Returns:
        Shape and dtype of `query`.

    Example:
        >>> x = jnp.ones((1, 3, 2, 8))
        >>> causal_attention(x, x, x).shape
        (1, 3, 2, 8)

    """
    if not chunked and _flash(query, key):
        same = None if segment_ids is None else _same(segment_ids, segment_ids)
        return jax.nn.dot_product_attention(
            query, key, value, mask=same, is_causal=True, implementation="cudnn"
        )
    length = query.shape[1]
    index = offset + jnp.arange(length)
    if length <= 2 * QUERY_CHUNK:
        return _attend(query, key, value, index, segment_ids, segment_ids)

    @jax.checkpoint
    def attend(part: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        query, index, segments = part
        return _attend(query, key, value, index, segments, segment_ids)

    segments = None if segment_ids is None else _split(segment_ids, 1)
    out = jnp.moveaxis(jax.lax.map(attend, (_split(query, 1), _split(index, 0), segments)), 0, 1)
    return out.reshape(query.shape[0], -1, *query.shape[2:])[:, :length]


def _flash(query: jax.Array, key: jax.Array) -> bool:
    """Whether cuDNN's flash attention takes these arrays; whole training sequences only."""
    return (
        jax.default_backend() == "gpu"
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[1] == key.shape[1] > 1
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 128
    )


def _same(first: jax.Array, second: jax.Array) -> jax.Array:
    return first[:, None, :, None] == second[:, None, None, :]


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
) -> jax.Array:
    mask = (index[:, None] >= jnp.arange(key.shape[1]))[None, None]
    if query_segments is not None and key_segments is not None:
        mask = mask & _same(query_segments, key_segments)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")


def _split(x: jax.Array, axis: int) -> jax.Array:
    """Pad an axis with zeros, cut it into chunks, and bring the chunks to the front."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % QUERY_CHUNK)
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, QUERY_CHUNK, *x.shape[axis + 1 :]), axis, 0)
