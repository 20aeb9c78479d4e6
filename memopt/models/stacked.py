"""A model as embedding, a stack of equal blocks, and a head with its loss."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Batch = Mapping[str, Any]


class StackedModel(NamedTuple):
    """Three plain functions of a model's parameters, for steps that walk it block by block.

    `memopt.training.release.release_step` takes any model in this form; `llama.stacked_model`
    makes one of a LLaMA.

    The parameters are a dict in which ``"blocks"`` holds a pytree of arrays with a leading axis of
    layers; everything else is the rest. The loss of a batch is::

        x = embed(rest, batch)
        for each layer:
            x = block(that layer of params["blocks"], x, batch)
        total, tokens = head(rest, x, batch)

    Attributes:
        embed: Maps (rest, batch) to x, one array.
        block: Maps (parameters of one layer, x, batch) to the next x, of the same shape and dtype.
        head: Maps (rest, x, batch) to (summed loss, number of tokens), both scalars.

    Example:
        >>> import jax.numpy as jnp
        >>> model = StackedModel(
        ...     embed=lambda rest, batch: batch["x"] @ rest["in"],
        ...     block=lambda w, x, batch: x + jnp.tanh(x @ w),
        ...     head=lambda rest, x, batch: (jnp.sum((x @ rest["out"]) ** 2), jnp.asarray(len(x))),
        ... )
        >>> model.embed({"in": jnp.ones((3, 5))}, {"x": jnp.ones((2, 3))}).shape
        (2, 5)
    """

    embed: Callable[[Any, Batch], jax.Array]
    block: Callable[[Any, jax.Array, Batch], jax.Array]
    head: Callable[[Any, jax.Array, Batch], tuple[jax.Array, jax.Array]]
