"""Measurements of the gradients of a step's micro-batches, from which its gradient's noise is told.

With g_j the gradient of the mean loss of micro-batch j, T_j its tokens, T their sum and
ḡ = Σ_j T_j g_j / T the step's gradient, "norms" are Σ_j T_j ‖g_j‖² / T and "inner_products" also
Σ_j T_j ⟨g_j, ḡ⟩² / T. Micro-batches of as many tokens have the same weight; one without any has
none. These weights keep (Σ_j T_j ‖g_j‖² / T − ‖ḡ‖²) / (k − 1) an unbiased estimate of the variance
of ḡ if each token adds as much to it, whatever the T_j; k counts micro-batches with tokens.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from memopt.reductions import total_over_trees
from memopt.state.precision import bounded
from memopt.transforms.microbatches import sum_microbatches

#: Measurements that a step can make.
Measure = Literal["norms", "inner_products"]


class Measured(NamedTuple):
    """Measurements of some parameters' gradients of the *summed* loss, G_j = T_j g_j.

    Attributes:
        squares: ‖G_j‖², float32 (micro-batches,).
        products: ⟨G_j, Σ_i G_i⟩, float32 (micro-batches,), or None.
    """

    squares: Array
    products: Array | None


def check_measure(measure: Measure | None, accumulation: int) -> None:
    """Raises if there is one micro-batch only, whose gradient tells nothing of its noise."""
    if measure and accumulation < 2:
        raise ValueError(
            f"measure={measure!r} compares the gradients of micro-batches: accumulation must be at "
            f"least 2, got {accumulation}."
        )


def sum_measured(
    f: Callable[..., tuple[Any, Any]],
    *xs: Any,
    measure: Measure | None,
    gradients_of: Callable[[Any], Any] = lambda sums: sums,
) -> tuple[Any, Any, Measured | None]:
    """Sums one result of `f` over micro-batches, stacks the other, and measures gradients.

    Inner products call `f` for each micro-batch again, when the sum is known, so that no two
    gradients of micro-batches are ever held.

    Args:
        f: Maps a micro-batch of each of `xs` to (tree to sum, tree to stack).
        *xs: Trees of arrays of shape (micro-batches, ...).
        measure: What to measure.
        gradients_of: Picks the gradients out of what is summed.
    """
    if measure is None:
        return *sum_microbatches(f, *xs), None

    def with_square(*xs: Any) -> tuple[Any, Any]:
        new, others = f(*xs)
        return new, (others, _inner(gradients_of(new), gradients_of(new)))

    def product(*xs: Any) -> tuple[Any, Any]:
        return (), _inner(gradients_of(f(*xs)[0]), gradients_of(sums))

    sums, (others, squares) = sum_microbatches(with_square, *xs)
    products = sum_microbatches(product, *xs)[1] if measure == "inner_products" else None
    return sums, others, Measured(squares, products)


def measured_metrics(measured: Measured | None, counts: Any) -> dict[str, Array]:
    """Returns the metrics `micro_square` and `micro_dot_square`, as far as they are measured.

    Args:
        measured: The measurements, summed over all parameters.
        counts: The tokens of each micro-batch, (micro-batches,).
    """
    if measured is None:
        return {}
    counts = counts.astype(jnp.float32)
    tokens, counts = jnp.maximum(counts.sum(), 1), jnp.where(counts > 0, counts, 1)
    metrics = {"micro_square": (measured.squares / counts).sum() / tokens}
    if measured.products is not None:
        squares = jnp.square(measured.products / counts / tokens)
        metrics["micro_dot_square"] = (squares * counts).sum() / tokens
    return metrics


def _inner(a: Any, b: Any) -> Array:
    """The inner product of two trees of arrays, a float32 or wider scalar."""
    return total_over_trees(lambda a, b: (bounded(a).conj() * bounded(b)).real, a, b)
