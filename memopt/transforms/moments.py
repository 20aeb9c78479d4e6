"""Finds the moments in an optimizer's state and carries them to a new subspace."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from memopt.errors import IncompatiblePairingError
from memopt.shapes import LowRank
from memopt.state.owners import SECOND, Part, parts
from memopt.state.precision import bias_correction
from memopt.transforms.recombine import Subspace
from memopt.trees import map_named


@dataclasses.dataclass(frozen=True)
class CarryOver:
    """Transforms the moments of an Adam-like optimizer to a new subspace.

    With T the r×r change of basis from coordinates of the old subspace to those of the new one,
    squares elementwise, moments bias-corrected and s = Σⱼ T², a number for each new direction::

        M ← T M
        V ← |T² (V − M²) + (T M)²| + (1 − s) · mean(V)

    Derivation: let C be the matrix of second moments of the gradient's channels, so that a basis
    vector pⱼ has vⱼ = pⱼᵀC pⱼ. Adam keeps only C's diagonal, and the mean. A new unit vector
    p = Σⱼ Tⱼ pⱼ + q has a part q of squared length 1 − s outside the old subspace, where C is taken
    to be the mean of V. Then pᵀC p = Σⱼ Tⱼ² vⱼ + (1 − s) · mean(v), in which the known mean has the
    part (T m)² rather than T² m². All weights add up to one, so that equal second moments stay
    equal: updates keep their expected size, whatever the subspaces. With the weights T² alone, V
    would shrink by r/side at each refresh of an independent orthonormal basis.

    If bases are not orthonormal, M and V are first divided by the lengths of the old basis vectors
    and their squares, T has the cosines between old and new vectors, and the results are multiplied
    by the new lengths. M is then multiplied by r / ‖PᵀP‖² of the old unit vectors, with which up(M)
    fits best; without it M would grow. V ← T² V + (1 − s) · mean(V), where T² and s
    are divided by s if s > 1. A selection of entries has a T of zeros and ones; newly selected
    entries begin with the mean of V.

    A moment is a tree of arrays shaped like the projected gradients; the name of its field tells
    whether it is a second moment (`memopt.state.owners`). Without a first moment, or with several,
    V ← T² V + (1 − s) · mean(V). Without a second moment, M ← T M, with the plain T of bases of any
    length, as in Flora. All other state, including factored second moments, is unchanged.

    Attributes:
        b1: decay of the first moment, for its bias correction; 0 means no correction.
        b2: decay of the second moment, likewise.
        power: the power to which entries of T are raised for second moments: 2. LDAdam's released
            code uses 4.
        mean_outside: add (1 − s) · mean(V). LDAdam does not, whose successive subspaces are close.

    References:
        Hao et al., Flora, 2024, https://arxiv.org/abs/2402.03293, section 3.3 (first moments);
        Robert et al., LDAdam, 2024, https://arxiv.org/abs/2410.16103, section 3.2 (second).
    """

    b1: float | Array = 0.0
    b2: float | Array = 0.0
    power: int = 2
    mean_outside: bool = True

    def __call__(self, state: Any, low: Any, spaces: Any, steps: Array) -> Any:
        """Carries over every moment shaped like `low`; other state is unchanged.

        Args:
            state: the inner optimizer's state.
            low: the projected gradients.
            spaces: the new `Subspace` of each gradient; None for one that is not projected.
            steps: the number of steps that the moments have averaged over.
        """
        fields = list(moment_fields(state, low))

        def beside(part: Part, is_second: bool) -> list[Any]:
            """The first or the second moments in the same state."""
            return [
                other.tree
                for other, is_moment in fields
                if is_moment
                and (other.moment == SECOND) == is_second
                and other.path[:-1] == part.path[:-1]
            ]

        def each(f: Callable[..., Array], *moments: Any) -> Any:
            one = lambda _, x, space, *m: m[0] if space is None else f(space, *m)
            return map_named(one, low, spaces, *moments)

        def carried(part: Part, is_moment: bool) -> Any:
            if not is_moment:
                return part.tree
            if part.moment != SECOND:
                by = carry_first_moment if beside(part, is_second=True) else Subspace.carry
                return each(by, part.tree)
            first = beside(part, is_second=False)
            rule = functools.partial(carry_second_moment, rule=self, steps=steps)
            return each(rule, part.tree, *(first if len(first) == 1 else ()))

        structure: Any = jax.tree.structure(state)
        return structure.unflatten(jax.tree.leaves([carried(*field) for field in fields]))


def carry_first_moment(space: Subspace, m: LowRank) -> LowRank:
    """Carries a first moment beside a second one, by the rule of `CarryOver`."""
    old, new = space.lengths()
    return new * space.overlap() * space.carry_by_cosines(m / old)


def carry_second_moment(
    space: Subspace, v: LowRank, m: LowRank | None = None, *, rule: CarryOver, steps: Array
) -> LowRank:
    """Carries a second moment by the rule of `CarryOver`.

    Args:
        space: the new subspace.
        v: the second moment.
        m: the first moment, if there is one.
        rule: the options.
        steps: the number of steps that the moments have averaged over.
    """
    old, new = space.lengths()
    v = v / old**2
    inside = space.carry_by_cosines(jnp.ones_like(v), rule.power)
    if m is not None and space.projector.orthonormal:
        c1, c2 = (bias_correction(decay, steps, v.dtype) for decay in (rule.b1, rule.b2))
        spread = space.carry_by_cosines(v / c2 - jnp.square(m / c1), rule.power)
        kept = c2 * jnp.abs(spread + jnp.square(space.carry_by_cosines(m / c1)))
    else:
        kept = space.carry_by_cosines(v, rule.power) / jnp.maximum(inside, 1)
    if rule.mean_outside:
        kept += jnp.maximum(1 - inside, 0) * space.previous_mean(v)
    return new**2 * kept


def first_moment(state: Any, like: Any) -> Any:
    """The first tree in a state that is shaped like `like` and is not a second moment, or None."""
    fields = moment_fields(state, like)
    return next((p.tree for p, is_moment in fields if is_moment and p.moment != SECOND), None)


def moment_fields(state: Any, like: Any) -> Iterator[tuple[Part, bool]]:
    """The fields of a state in order; the moments are trees of floats shaped like `like`."""
    structure: Any = jax.tree.structure(like)
    shapes = [x.shape for x in jax.tree.leaves(like)]
    for part in parts(state, like):
        leaves = jax.tree.leaves(part.tree)
        has_shapes = part.has_parameters and [x.shape for x in leaves] == shapes
        are_floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves)
        is_like = has_shapes and are_floats and jax.tree.structure(part.tree) == structure
        yield part, is_like


def check_moments_are_known(
    state: Any, like: Any, *, needed_by: str, otherwise: str = "", per_matrix: bool = True
) -> None:
    """Raises `IncompatiblePairingError` for a moment that cannot be carried.

    Args:
        state: the inner optimizer's state.
        like: the projected gradients.
        needed_by: the transformation, or the argument, that carries moments.
        otherwise: what else can be done, at the end of the sentence.
        per_matrix: whether each matrix keeps moments of its own.
    """
    for part, is_moment in moment_fields(state, like):
        if is_moment and part.moment is None and jax.tree.leaves(like):
            raise IncompatiblePairingError(
                f"{needed_by} does not know whether the field {part.field!r} of "
                f"{part.state or 'a state'} is a first or a second moment; call it 'mu' or 'nu'"
                f"{otherwise}."
            )
        if is_moment and part.moment == SECOND and not per_matrix:
            raise IncompatiblePairingError(
                f"{needed_by} has no second moment {part.field!r} for a layer that the projector "
                "selects anew; use 'reset'."
            )
