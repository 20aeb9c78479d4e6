"""Finds the moments in an optimizer's state and carries them to a new subspace."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from memopt.errors import IncompatiblePairingError
from memopt.state.owners import SECOND, Part, parts


@dataclasses.dataclass(frozen=True)
class CarryOver:
    """Transforms the moments of an Adam-like optimizer to a new subspace.

    With T the r×r change of basis from coordinates of the old subspace to those of the new one::

        M ← T M
        V ← |T² (V − M²) + (T M)²|           elementwise squares, bias-corrected moments

    A moment is a tree of arrays shaped like the projected gradients; the name of its field tells
    whether it is a second moment (`memopt.state.owners`). Without a first moment, or with several,
    V ← |T² V|. All other state, including factored second moments, is unchanged.

    Attributes:
      b1: decay of the first moment, for its bias correction; 0 means no correction.
      b2: decay of the second moment, likewise.
      power: the power to which entries of T are raised for second moments: 2. LDAdam's released
        code uses 4.

    References:
      Hao et al., Flora, 2024, https://arxiv.org/abs/2402.03293, section 3.3 (first moments);
      Robert et al., LDAdam, 2024, https://arxiv.org/abs/2410.16103, section 3.2 (second).
    """

    b1: float | Array = 0.0
    b2: float | Array = 0.0
    power: int = 2

    def __call__(
        self, state: Any, like: Any, carry: Callable[[Any, int], Any], steps: Array
    ) -> Any:
        """Carries over every moment shaped like `like`; other state is unchanged.

        Args:
          state: the inner optimizer's state.
          like: the projected gradients.
          carry: transforms a tree of moments to the new subspace, by T to the given power.
          steps: the number of steps that the moments have averaged over.
        """
        t = jnp.maximum(steps, 1)
        c1, c2 = 1 - self.b1**t, 1 - self.b2**t

        def second(v: Any, m: Any) -> Any:
            if m is None:
                return jax.tree.map(jnp.abs, carry(v, self.power))
            spread = jax.tree.map(lambda v, m: v / c2 - jnp.square(m / c1), v, m)
            rule = lambda s, m: c2 * jnp.abs(s + jnp.square(m / c1))
            return jax.tree.map(rule, carry(spread, self.power), carry(m, 1))

        fields = list(_fields(state, like))

        def first_beside(second: Part) -> Any:
            """The first moment in the same state, if there is exactly one."""
            found = [
                part.tree
                for part, is_moment in fields
                if is_moment and part.moment != SECOND and part.path[:-1] == second.path[:-1]
            ]
            return found[0] if len(found) == 1 else None

        def carried(part: Part, is_moment: bool) -> Any:
            if not is_moment:
                return part.tree
            if part.moment == SECOND:
                return second(part.tree, first_beside(part))
            return carry(part.tree, 1)

        structure: Any = jax.tree.structure(state)
        return structure.unflatten(jax.tree.leaves([carried(*field) for field in fields]))


def first_moment(state: Any, like: Any) -> Any:
    """The first tree in a state that is shaped like `like` and is not a second moment, or None."""
    fields = _fields(state, like)
    return next((p.tree for p, is_moment in fields if is_moment and p.moment != SECOND), None)


def _fields(state: Any, like: Any) -> Iterator[tuple[Part, bool]]:
    """The fields of a state in order; the moments are trees of floats shaped like `like`."""
    structure: Any = jax.tree.structure(like)
    shapes = [x.shape for x in jax.tree.leaves(like)]
    for part in parts(state, like):
        leaves = jax.tree.leaves(part.tree)
        has_shapes = part.has_parameters and [x.shape for x in leaves] == shapes
        are_floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves)
        is_like = has_shapes and are_floats and jax.tree.structure(part.tree) == structure
        yield part, is_like


def check_moments_are_known(state: Any, like: Any) -> None:
    """Raises `IncompatiblePairingError` if a field may be either moment."""
    for part, is_moment in _fields(state, like):
        if is_moment and part.moment is None and jax.tree.leaves(like):
            raise IncompatiblePairingError(
                f"on_refresh='carry' does not know whether the field {part.field!r} of "
                f"{part.state or 'a state'} is a first or a second moment; call it 'mu' or 'nu', "
                "or use 'keep', 'reset' or 'reset_moments'."
            )
