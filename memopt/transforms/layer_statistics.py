"""Collects the inputs of linear layers, and the gradients of their outputs, over a batch."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from memopt.matrices import Layout, Matrices, map_matrices
from memopt.state.precision import statistics_dtype


class LayerStatistics(NamedTuple):
    """Sums over the tokens of a batch, for a linear layer with an m×n kernel or a stack of them.

    Attributes:
        inputs: the sum of its inputs over tokens, ``(*stack, m)``.
        outputs: the sum over tokens of the loss's gradient with respect to its outputs,
            ``(*stack, n)``.
        tokens: the number of tokens that `inputs` is a sum of, in the shape of the stack.
    """

    inputs: Any
    outputs: Any
    tokens: Any


def zero_statistics(params: Any, *, matrices: Matrices = None) -> Any:
    """Zeros to differentiate a loss with respect to, so that layers report their statistics.

    See `observe`.

    Args:
        params: the parameters, or their shapes.
        matrices: which leaves are matrices; see `memopt.hidden_matrices`.

    Returns:
        A tree like `params`, with a `LayerStatistics` of float32 zeros for each hidden matrix, and
        None for other leaves.

    Example:
        >>> params = {"up": {"kernel": jnp.ones((8, 4, 6))}, "norm": {"scale": jnp.ones(4)}}
        >>> zeros = zero_statistics(params)
        >>> [x.shape for x in zeros["up"]["kernel"]], zeros["norm"]["scale"]
        ([(8, 4), (8, 6), (8,)], None)
    """

    def zeros(layout: Layout, p: Any) -> Any:
        if not layout.is_matrix:
            return None
        *stack, m, n = layout.shape(p)
        shapes = (*stack, m), (*stack, n), tuple(stack)
        return LayerStatistics(*(jnp.zeros(shape, statistics_dtype(p)) for shape in shapes))

    return map_matrices(zeros, params, matrices=matrices)


@jax.custom_vjp
def _observe(statistics: LayerStatistics, x: Array, y: Array) -> Array:
    return y


def _observe_forward(statistics: LayerStatistics, x: Array, y: Array) -> tuple[Array, Any]:
    inputs, tokens = _sum_over_tokens(x, statistics.inputs)
    return y, (inputs, statistics.outputs, tokens)


def _observe_backward(kept: Any, dy: Array) -> tuple[Any, None, Array]:
    inputs, like, tokens = kept
    return LayerStatistics(inputs, _sum_over_tokens(dy, like)[0], tokens), None, dy


def _sum_over_tokens(x: Array, like: Array) -> tuple[Array, Array]:
    """The sum over all but the last axes, as large as `like`, and the number of its terms."""
    sizes = [math.prod(x.shape[axis:]) for axis in range(x.ndim)]
    if like.size not in sizes:
        raise ValueError(
            "the last axes of x and y must be the rows and the columns of their matrix, "
            f"{like.size} numbers, got an array of shape {x.shape}."
        )
    tokens = x.reshape(-1, like.size).astype(like.dtype)
    return tokens.sum(0), jnp.asarray(len(tokens), like.dtype)


_observe.defvjp(_observe_forward, _observe_backward)


def observe(statistics: LayerStatistics | None, x: Array, y: Array) -> Array:
    """Returns a linear layer's output `y`, and notes what the layer saw.

    The gradient of the loss with respect to `statistics`, zeros from `zero_statistics`, is the sum
    over tokens of the inputs, of the outputs' gradients, and the number of tokens. So statistics
    come with the gradient, whether layers are scanned, rematerialised or accumulated over
    micro-batches; they are scaled as gradients are.

    Args:
        statistics: zeros for one matrix. None notes nothing.
        x: the layer's inputs, (…, m); m may be several axes.
        y: its outputs, (…, n), with the bias or without.

    Example:
        >>> def loss(params, statistics, x):
        ...     w = params["hidden"]
        ...     return jnp.square(observe(statistics["hidden"], x, x @ w)).mean()
        >>> params = {"hidden": jnp.eye(2)}
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> zeros = zero_statistics(params)
        >>> gradients, statistics = jax.grad(loss, argnums=(0, 1))(params, zeros, x)
        >>> [x.tolist() for x in statistics["hidden"]]      # of 2 tokens
        [[4.0, 6.0], [2.0, 3.0], 2.0]
    """
    return y if statistics is None else _observe(statistics, x, y)
