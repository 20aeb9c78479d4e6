"""Computes the gradient of a loss of a whole batch in the memory of one chunk of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memopt.checked import checked
from memopt.errors import check_at_least
from memopt.transforms.microbatches import (
    join_microbatches,
    split_microbatches,
    sum_microbatches,
)
from memopt.trees import named_leaves


@checked
def cached_value_and_grad(
    encode: Callable[[Any, Any], Any],
    loss: Callable[..., Any],
    chunks: int,
    *,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """Differentiates a loss that is no sum over examples, such as a contrastive one, in chunks.

    `accumulate` adds up the gradients of micro-batches, which is exact for sums over examples only.
    Here the loss sees the representations of all examples, and its gradient is that of the whole
    batch up to rounding, for one more forward pass (GradCache)::

        r ← encode(params, chunk)            for each chunk; nothing is kept for a backward pass
        value, d ← loss(r), ∂loss/∂r         on the whole batch
        g ← Σ (∂encode/∂params)ᵀ d           for each chunk, encoded once more

    Sums of gradients are in float32 or wider. `encode` must compute the same both times: put random
    keys, one for each example, into the batch. A learned temperature multiplies a representation in
    `encode`.

    Args:
        encode: maps the parameters and a chunk to a tree of representations, arrays of floats with
            an entry for each example in the first axis.
        loss: maps such a tree for the whole batch, and the further arguments, to a scalar, or with
            `has_aux` to a pair of it and other results.
        chunks: in how many chunks a batch is encoded; it divides the examples. Chunk i has examples
            i, i + chunks, i + 2·chunks, …, so that a batch that is sharded over its examples stays
            where it is.
        has_aux: as in ``jax.value_and_grad``.

    Returns:
        A function of the parameters, the batch (arrays with an entry for each example in the first
        axis) and further arguments of `loss`, which are not differentiated. It returns what `loss`
        returns, and the gradient with respect to the parameters.

    Raises:
        ValueError: if `chunks` is below one or, from that function, does not divide the examples.

    References:
        Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021,
        https://arxiv.org/abs/2101.06983.

    Example:
        >>> import jax.numpy as jnp
        >>> def encode(params, chunk):
        ...     return jnp.tanh(chunk["query"] @ params), jnp.tanh(chunk["answer"] @ params)
        >>> def loss(representations):
        ...     query, answer = representations
        ...     return -jnp.diagonal(jax.nn.log_softmax(query @ answer.T)).mean()
        >>> draw = lambda seed: jax.random.normal(jax.random.key(seed), (8, 4))
        >>> batch, params = {"query": draw(0), "answer": draw(1)}, draw(2)[:4]
        >>> value, gradient = cached_value_and_grad(encode, loss, chunks=4)(params, batch)
        >>> whole = jax.value_and_grad(lambda params: loss(encode(params, batch)))(params)
        >>> bool(jnp.allclose(value, whole[0])), bool(jnp.allclose(gradient, whole[1], atol=1e-6))
        (True, True)
    """
    check_at_least("chunks", chunks, 1)

    def value_and_grad(params: Any, batch: Any, *args: Any) -> tuple[Any, Any]:
        _check_examples(batch, chunks)
        pieces = split_microbatches(batch, chunks)
        _, encoded = sum_microbatches(lambda piece: ((), encode(params, piece)), pieces)
        _check_representations(encoded, batch, chunks)
        representations = join_microbatches(encoded)
        value, cotangents = jax.value_and_grad(loss, has_aux=has_aux)(representations, *args)

        def pulled_back(piece: Any, cotangent: Any) -> tuple[Any, None]:
            _, pull_back = jax.vjp(lambda params: encode(params, piece), params)
            return pull_back(cotangent)[0], None

        gradient, _ = sum_microbatches(pulled_back, pieces, split_microbatches(cotangents, chunks))
        return value, jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, params)

    return value_and_grad


def _check_examples(batch: Any, chunks: int) -> None:
    counts = {name: jnp.shape(x)[:1] for name, x in named_leaves(batch)[0]}
    if len(set(counts.values())) != 1 or () in counts.values():
        raise ValueError(
            f"the first axes of all arrays of a batch must count the same examples, got {counts}."
        )
    [(examples,)] = set(counts.values())
    if examples % chunks:
        raise ValueError(f"chunks={chunks} must divide the {examples} examples of a batch.")


def _check_representations(encoded: Any, batch: Any, chunks: int) -> None:
    examples = jax.tree.leaves(batch)[0].shape[0] // chunks
    for name, x in named_leaves(encoded)[0]:
        if x.shape[1:2] != (examples,):
            raise ValueError(
                f"encode must return arrays whose first axis counts the {examples} examples of a "
                f"chunk, got {name!r} of shape {x.shape[1:]}."
            )
