"""Measures of gradients, updates and parameters, for `with_diagnostics`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from memopt.checked import checked
from memopt.errors import check_choice
from memopt.matrices import Layout, Matrices, every_matrix, map_matrices
from memopt.reductions import scale_to_one
from memopt.state.precision import to_float32
from memopt.transforms.matrix_rms import rms as matrix_rms
from memopt.transforms.projectors import Projector
from memopt.transforms.recombine import Recombine, Subspace
from memopt.transforms.subspace import in_subspace
from memopt.trees import NOTHING


class Measure(NamedTuple):
    """A measure of a step: a pair of pure functions.

    Attributes:
        init: maps the parameters to the measure's state.
        update: maps ``(seen, state)`` to a tree of small arrays and the new state; `seen` has the
            trees "gradient", "update" and "parameter".
    """

    init: Callable[[Any], Any]
    update: Callable[[dict[str, Any], Any], tuple[Any, Any]]


def measure(rule: Callable[..., Any], *of: str, matrices: Matrices = None) -> Measure:
    """Makes a measure of a rule for one parameter.

    Args:
        rule: maps ``(layout, *arrays)`` to a small array that begins with the axes of the stack, or
            to ``memopt.trees.NOTHING``. It must treat each matrix of a stack separately.
        *of: the arrays that it takes: "gradient", "update", "parameter".
        matrices: which leaves are matrices; see `memopt.matrices`. By default
            `memopt.every_matrix`.

    Raises:
        ValueError: if `of` names something else.

    Example:
        >>> largest = measure(lambda layout, w: abs(w).max(layout.core), "parameter")
    """
    for name in of:
        check_choice("of", name, ("gradient", "update", "parameter"))

    def update(seen: dict[str, Any], state: Any) -> tuple[Any, Any]:
        trees = [seen[name] for name in of]
        return map_matrices(rule, *trees, matrices=matrices, default=every_matrix), state

    return Measure(lambda params: optax.EmptyState(), update)


def of_matrices(f: Callable[..., Array], *of: str, matrices: Matrices = None) -> Measure:
    """Makes a measure of a function of matrices, such as `stable_rank` or `singular_values`.

    Args:
        f: maps arrays ``(*stack, m, n)`` to one that begins with the axes of the stack.
        *of: as in `measure`.
        matrices: as in `measure`.

    Example:
        >>> from memopt import diagnostics
        >>> spectrum = diagnostics.of_matrices(diagnostics.singular_values, "update")
    """

    def rule(layout: Layout, *arrays: Array) -> Any:
        return f(*map(layout.to_matrices, arrays)) if layout.is_matrix else NOTHING

    return measure(rule, *of, matrices=matrices)


def rms(of: str = "update") -> Measure:
    """Measures the root mean square of each matrix, and of each vector.

    Args:
        of: as in `measure`.
    """
    return measure(_rms, of)


def update_to_weight() -> Measure:
    """Measures ‖U‖ / ‖W‖ of each matrix, and of each vector; infinite for parameters of zeros."""
    ratio = lambda layout, u, w: _rms(layout, u) / _rms(layout, w)
    return measure(ratio, "update", "parameter")


def _rms(layout: Layout, x: Array) -> Array:
    """The root mean square of each matrix, in the shape of the stack."""
    x = to_float32(x)
    factor, _ = scale_to_one(x, layout.core)
    return (matrix_rms(layout, factor * x) / factor).squeeze(layout.core)


@checked
def projected_energy(
    projector: Projector, refresh_every: int = 1, of: str = "gradient", *, matrices: Matrices = None
) -> Measure:
    """Measures ‖P Pᵀ G‖² / ‖G‖², the share of a matrix that a subspace of rank r holds.

    Args:
        projector: the rule that gives each matrix a subspace, with an orthonormal basis P; see
            `memopt.projectors`.
        refresh_every: measurements between two choices of the subspace; with 1, it is chosen for
            the gradient that is measured.
        of: "gradient" or "update".
        matrices: which leaves are projected; by default `memopt.hidden_matrices`.

    Raises:
        ValueError: if `of` names something else, or the projector's bases are not orthonormal.

    Example:
        >>> from memopt import projectors
        >>> energy = projected_energy(projectors.svd(4), refresh_every=20)
    """
    check_choice("of", of, ("gradient", "update"))
    if not projector.orthonormal:
        raise ValueError(
            "projector must have orthonormal bases, such as svd, orthogonal or columns; the norm "
            f"of a projection by {type(projector).__name__} is no share."
        )

    def share(space: Subspace, _: Any) -> tuple[Array, Array]:
        factor, _ = scale_to_one(space.gradient)
        square = lambda x: jnp.square(factor * x).sum((-2, -1))
        return space.gradient, square(space.low_gradient) / square(space.gradient)

    rule = Recombine(share, lambda spec: jnp.zeros(spec.stack, spec.dtype))
    tx = in_subspace(optax.identity(), projector, rule, refresh_every, matrices=matrices)

    def update(seen: dict[str, Any], state: Any) -> tuple[Any, Any]:
        _, state = tx.update(seen[of], state)
        return state.recombine, state

    return Measure(tx.init, update)
