"""Works through a batch in pieces, one after another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memopt.state.precision import float32_zeros


def sum_microbatches(f: Callable[..., tuple[Any, Any]], *xs: Any) -> tuple[Any, Any]:
    """Sums one result of `f` over micro-batches, in float32, and stacks the other.

    Args:
        f: Maps a micro-batch of each of `xs` to (tree to sum, tree to stack).
        *xs: Trees of arrays of shape (micro-batches, ...).
    """
    first = jax.tree.map(lambda x: x[0], xs)
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        sums, others = f(*first)
        return sums, jax.tree.map(lambda x: x[None], others)

    def add(sums: Any, xs: Any) -> tuple[Any, Any]:
        new, others = f(*xs)
        return jax.tree.map(jnp.add, sums, new), others

    like, _ = jax.eval_shape(f, *first)
    return jax.lax.scan(add, float32_zeros(like), xs)


def split_microbatches(batch: Any, pieces: int) -> Any:
    """Cuts (batch, ...) into (pieces, batch / pieces, ...), every piece with rows of every shard.

    Row i goes to piece i mod pieces, so a batch sharded over its rows needs no communication.
    """
    return jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)


def join_microbatches(pieces: Any) -> Any:
    """Inverts `split_microbatches`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), pieces)
