"""A model as embedding, a stack of equal blocks, and a head with its loss."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from memopt.state.quantized_params import dequantize_params
from memopt.trees import leaf_name

Batch = Mapping[str, Any]
BLOCKS = "blocks"


class StackedModel(NamedTuple):
    """Three plain functions of a model's parameters, for steps that walk it block by block.

    `memopt.training.release_step` takes any model in this form, and `loss` is what
    `memopt.training.train_step` and `memopt.training.evaluate` take; `llama.stacked_model` makes
    one of a LLaMA.

    The parameters are a dict in which ``"blocks"`` holds a pytree of arrays with a leading axis of
    layers; everything else is the rest. The loss of a batch is::

        x = embed(rest, batch)
        for each layer:
            x = block(that layer of params["blocks"], x, batch)
        total, tokens = head(rest, x, batch)

    x is any pytree: activations, and what else goes from block to block, such as a sum of auxiliary
    losses or a key for dropout. Gradients flow through its floating-point arrays; integers, bools
    and keys only pass. A step keeps every x until its backward pass: what all blocks read and none
    changes belongs in the batch, or is computed in the block.

    Attributes:
        embed: Maps (rest, batch) to x.
        block: Maps (parameters of one layer, x, batch) to the next x, a tree like it, with the same
            shapes and dtypes.
        head: Maps (rest, x, batch) to (summed loss, number of tokens), both scalars.
        in_parts: Names of matrices, such as "head/kernel", that `embed` and `head` take as
            `memopt.state.quantized_params.Deferred` if they are quantised, to dequantise a part at
            a time.

    Example:
        >>> model = StackedModel(
        ...     embed=lambda rest, batch: batch["x"] @ rest["in"],
        ...     block=lambda w, x, batch: x + jnp.tanh(x @ w),
        ...     head=lambda rest, x, batch: (jnp.sum((x @ rest["out"]) ** 2), jnp.asarray(len(x))),
        ... )
        >>> model.embed({"in": jnp.ones((3, 5))}, {"x": jnp.ones((2, 3))}).shape
        (2, 5)
    """

    embed: Callable[[Any, Batch], Any]
    block: Callable[[Any, Any, Batch], Any]
    head: Callable[[Any, Any, Batch], tuple[Array, Array]]
    in_parts: tuple[str, ...] = ()

    def loss(self, params: Any, batch: Batch, *, remat: bool = False) -> tuple[Array, Array]:
        """Returns the summed loss of a batch and its number of tokens, both scalars.

        Args:
            params: The parameters; quantised ones are read one block at a time.
            batch: What the three functions read.
            remat: Whether a backward pass keeps what enters each block only, and computes the rest
                again.

        Raises:
            ValueError: A block does not return a tree like its input, or the head no two scalars.

        Example:
            >>> model = StackedModel(
            ...     embed=lambda rest, batch: {"x": batch["x"], "sum": jnp.zeros(())},
            ...     block=lambda w, x, batch: {"x": w * x["x"], "sum": x["sum"] + x["x"].sum()},
            ...     head=lambda rest, x, batch: (x["sum"], jnp.asarray(2)),
            ... )
            >>> total, tokens = model.loss({"blocks": jnp.full((3, 1), 2.0)}, {"x": jnp.ones(2)})
            >>> print(total, tokens)  # of inputs that are 1, 2 and 4
            14.0 2
        """
        embed, block, head, _ = checked(self)
        stacked = blocks_of(params)
        rest = dequantize_params({k: v for k, v in params.items() if k != BLOCKS})
        run = lambda layer, x: block(dequantize_params(layer), x, batch)
        run = jax.checkpoint(run, prevent_cse=False) if remat else run
        x, _ = jax.lax.scan(lambda x, layer: (run(layer, x), None), embed(rest, batch), stacked)
        return head(rest, x, batch)


def blocks_of(params: Any) -> Any:
    """Returns the stacked parameters of a model's blocks.

    Raises:
        ValueError: There are none, or they count different layers.
    """
    stacked = params.get(BLOCKS) if isinstance(params, Mapping) else None
    leaves = _describe(stacked)
    counts = {name: x.shape[:1] for name, x in zip(leaves, jax.tree.leaves(stacked), strict=True)}
    # One leaf of each count: two of them already disagree.
    one = {count: f"{BLOCKS}/{name} of {leaves[name]}" for name, count in counts.items()}
    if len(one) != 1 or () in one:
        kind = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(
            f"params must be a dict with arrays under {BLOCKS!r} whose first axes count the same "
            f"layers, got {' and '.join(one.values()) or kind}."
        )
    return stacked


def checked(model: StackedModel) -> StackedModel:
    """Returns a model whose functions return arrays, and raise a sentence for any other tree.

    Example:
        >>> wider = lambda w, x, batch: {"x": x["x"][None]}
        >>> model = StackedModel(lambda rest, batch: {"x": batch["x"]}, wider, None)
        >>> checked(model).block(None, {"x": jnp.ones(2)}, {})
        Traceback (most recent call last):
        ValueError: block must return a tree like its input: 'x' is float32[2] before and ...
    """

    def embed(rest: Any, batch: Batch) -> Any:
        x = jax.tree.map(_strong, model.embed(rest, batch))
        if not split_floats(x)[0]:
            raise ValueError(
                "embed must return a tree with a floating-point array, through which gradients "
                f"flow, got {_describe(x) or 'no array'}."
            )
        return x

    def block(layer: Any, x: Any, batch: Batch) -> Any:
        new = jax.tree.map(_strong, model.block(layer, x, batch))
        before, after = _describe(x), _describe(new)
        for name in sorted(before.keys() | after.keys()):
            pair = before.get(name, "absent"), after.get(name, "absent")
            if pair[0] != pair[1]:
                raise ValueError(
                    f"block must return a tree like its input: {name!r} is {pair[0]} before and "
                    f"{pair[1]} after it."
                )
        structures: list[Any] = [jax.tree.structure(x), jax.tree.structure(new)]
        if structures[0] != structures[1]:
            raise ValueError(
                f"block must return a tree like its input: that is {structures[0]} before and "
                f"{structures[1]} after it."
            )
        return new

    def head(rest: Any, x: Any, batch: Batch) -> tuple[Array, Array]:
        sums = jax.tree.map(_strong, model.head(rest, x, batch))
        leaves = jax.tree.leaves(sums)
        if [s.shape for s in leaves] != [(), ()] or not split_floats(leaves[:1])[0]:
            raise ValueError(
                "head must return (summed loss, number of tokens), a floating-point scalar and a "
                f"scalar, got {', '.join(_describe(sums).values()) or 'no array'}."
            )
        total, tokens = leaves
        return total, tokens

    return model._replace(embed=embed, block=block, head=head)


def split_floats(tree: Any) -> tuple[list[Array], Callable[[list[Array]], Any]]:
    """Returns a tree's leaves that gradients flow through, and puts others in their place.

    Args:
        tree: A tree of arrays.

    Returns:
        The floating-point (or complex) leaves, and a function of as many that returns a tree with
        them and the other leaves of `tree`.

    Example:
        >>> floats, join = split_floats({"ids": jnp.arange(2), "x": jnp.ones(2)})
        >>> join([2 * x for x in floats])
        {'ids': Array([0, 1], dtype=int32), 'x': Array([2., 2.], dtype=float32)}
    """
    structure: Any
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def join(floats: list[Array]) -> Any:
        new = dict(zip(places, floats, strict=True))
        return structure.unflatten([new.get(i, x) for i, x in enumerate(leaves)])

    return [leaves[i] for i in places], join


def _strong(x: Any) -> Array:
    """Makes an array of a number, or of a result whose dtype a Python number left open."""
    x = jnp.asarray(x)
    return jnp.asarray(x, dtype=x.dtype)


def _describe(tree: Any) -> dict[str, str]:
    """Maps names of leaves to dtypes and shapes; an array that is no tree is called x."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {leaf_name(path) or "x": f"{x.dtype}{list(x.shape)}" for path, x in leaves}
