"""Chunked attention equals the textbook's, and its memory grows with the length, not its square."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt.models import attention
from memopt.models.attention import QUERY_CHUNK, causal_attention, without_cudnn


def textbook(query, key, value, segment_ids=None, offset=0, window=None):
    """Every score at once, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    groups = query.shape[2] // key.shape[2]
    key, value = np.repeat(key, groups, 2), np.repeat(value, groups, 2)
    scores = np.einsum("bqnh,bknh->bnqk", query, key) / np.sqrt(query.shape[-1])
    back = (offset + np.arange(query.shape[1]))[:, None] - np.arange(key.shape[1])
    allowed = (back >= 0) & (back < (window or np.inf))
    allowed = np.broadcast_to(allowed, scores.shape)
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * allowed
    return np.einsum("bnqk,bknh->bqnh", weights / weights.sum(-1, keepdims=True), value)


def qkv(length, keys=None, batch=2, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    keys = keys or length
    sizes = (batch, length, 4, 8), (batch, keys, 2, 8), (batch, keys, 2, 8)
    return [jnp.asarray(rng.normal(size=size), dtype) for size in sizes]


# Short, exactly two chunks, just above, and not a multiple of a chunk.
LENGTHS = [1, 7, 2 * QUERY_CHUNK, 2 * QUERY_CHUNK + 1, 3 * QUERY_CHUNK]


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_is_the_textbooks(length, segmented):
    query, key, value = qkv(length)
    segments = np.sort(np.random.default_rng(0).integers(0, 4, (2, length)))
    segments = segments if segmented else None
    ours = jax.jit(causal_attention)(query, key, value, segments)
    np.testing.assert_allclose(ours, textbook(query, key, value, segments), atol=2e-6)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("length", "window"), [(7, 1), (7, 3), (3 * QUERY_CHUNK - 1, 300)])
def test_a_window_counts_the_position_itself(length, window, segmented):
    query, key, value = qkv(length)
    segments = np.sort(np.random.default_rng(0).integers(0, 4, (2, length)))
    segments = segments if segmented else None
    ours = jax.jit(functools.partial(causal_attention, window=window))(query, key, value, segments)
    theirs = textbook(query, key, value, segments, window=window)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("length", [1, 5, 2 * QUERY_CHUNK + 1])
def test_offset_places_the_queries_among_the_keys(length, window):
    query, key, value = qkv(length, keys=length + 9)
    ours = causal_attention(query, key, value, offset=jnp.int32(4), window=window)
    theirs = textbook(query, key, value, offset=4, window=window)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_chunks_do_not_change_the_gradient(monkeypatch):
    arrays = qkv(3 * QUERY_CHUNK)
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, 3 * QUERY_CHUNK))))
    target = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)
    objective = lambda *arrays: (causal_attention(*arrays, segments) * target).sum()
    chunked = jax.grad(objective, (0, 1, 2))(*arrays)
    monkeypatch.setattr(attention, "QUERY_CHUNK", 3 * QUERY_CHUNK)
    for ours, whole in zip(chunked, jax.grad(objective, (0, 1, 2))(*arrays), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5)


def temporary_bytes(function, *arrays):
    gradient = jax.grad(lambda *arrays: function(*arrays).astype(jnp.float32).sum(), (0, 1, 2))
    return jax.jit(gradient).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_its_square():
    short, long = (
        [jax.ShapeDtypeStruct((1, length, 8, 16), jnp.float32)] * 3 for length in (2048, 4096)
    )
    scores = 8 * 4096 * 4096 * 4
    whole = lambda *arrays: jax.nn.dot_product_attention(*arrays, is_causal=True)
    assert temporary_bytes(whole, *long) > scores
    assert temporary_bytes(causal_attention, *long) < 0.3 * scores
    assert temporary_bytes(causal_attention, *long) < 2.2 * temporary_bytes(
        causal_attention, *short
    )


@pytest.mark.parametrize(
    ("dtype", "head_dim", "keys", "flash"),
    [
        (jnp.bfloat16, 64, 16, True),
        (jnp.float16, 128, 16, True),
        (jnp.float32, 64, 16, False),
        (jnp.bfloat16, 256, 16, False),
        (jnp.bfloat16, 12, 16, False),
        (jnp.bfloat16, 64, 32, False),
    ],
)
def test_on_a_gpu_half_precision_runs_flash_attention(monkeypatch, dtype, head_dim, keys, flash):
    """No GPU here: the call is recorded in place of being run."""
    calls = []
    record = lambda query, *_, **options: calls.append(options) or query
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    query, key = jnp.ones((1, 16, 4, head_dim), dtype), jnp.ones((1, keys, 2, head_dim), dtype)
    causal_attention(query, key, key)
    expected = {"implementation": "cudnn", "is_causal": True, "mask": None}
    assert (calls[0] == expected) == flash


def test_a_step_for_another_machine_does_without_cudnn(monkeypatch):
    calls = []
    record = lambda query, *_, implementation, **options: calls.append(implementation) or query
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    x = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    with without_cudnn():
        causal_attention(x, x, x)
    causal_attention(x, x, x)
    assert calls == ["xla", "cudnn"]


@pytest.mark.parametrize("segmented", [False, True])
def test_flash_attention_has_the_same_window(monkeypatch, segmented):
    """XLA computes in place of cuDNN what cuDNN was asked for."""
    attend = jax.nn.dot_product_attention
    on_xla = lambda *arrays, **options: attend(*arrays, **(options | {"implementation": "xla"}))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    query, key, value = qkv(16, dtype=jnp.bfloat16)
    segments = jnp.repeat(jnp.arange(2), 8)[None] if segmented else None
    ours = causal_attention(query, key, value, segments, window=3)
    chunked = causal_attention(query, key, value, segments, window=3, chunked=True)
    np.testing.assert_array_equal(ours, chunked)


def test_the_backward_pass_keeps_one_array_of_scores():
    query = jax.random.normal(jax.random.key(0), (1, 16, 2, 8))
    _, pullback = jax.vjp(causal_attention, query, query, query)
    scores = [x for x in jax.tree.leaves(pullback) if x.shape[-2:] == (16, 16)]
    kept = {np.asarray(x).tobytes() for x in scores if x.dtype == jnp.float32 and x.any()}
    assert len(kept) == 1
