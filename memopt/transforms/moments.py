"""An optimizer's moments, found in its state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class CarryOver:
    """Moves the moments of an Adam-like optimizer into a new subspace.

    With T the r×r numbers that take coordinates of the old subspace to those of the new::

        M ← T M
        V ← |T² (V − M²) + (T M)²|           entries squared, moments corrected for their start

    A moment is what is shaped like the projected gradients; anything else, a factored second
    moment too, is kept as it is.

    Attributes:
      b1: decay of the first moment, for its correction; 0 corrects nothing.
      b2: decay of the second moment, likewise.
      power: to which T is raised for second moments: 2. LDAdam's released code has 4.

    References:
      Hao et al., Flora, 2024, https://arxiv.org/abs/2402.03293, section 3.3 (first moments);
      Robert et al., LDAdam, 2024, https://arxiv.org/abs/2410.16103, section 3.2 (second).
    """

    b1: float | Array = 0.0
    b2: float | Array = 0.0
    power: int = 2

    def __call__(
        self,
        state: Any,
        like: Any,
        turn: Callable[[Any, int], Any],
        steps: Array,
    ) -> Any:
        """The state with every moment shaped like `like` carried over; the rest as it is.

        Args:
          state: the inner optimizer's.
          like: the projected gradients.
          turn: takes a tree of moments to the new subspace, by T to the given power.
          steps: how many the moments have seen.
        """
        t = jnp.maximum(steps, 1)
        c1, c2 = 1 - self.b1**t, 1 - self.b2**t

        def second(v: Any, m: Any) -> Any:
            if m is None:
                return jax.tree.map(jnp.abs, turn(v, self.power))
            spread = jax.tree.map(lambda v, m: v / c2 - jnp.square(m / c1), v, m)
            rule = lambda s, m: c2 * jnp.abs(s + jnp.square(m / c1))
            return jax.tree.map(rule, turn(spread, self.power), turn(m, 1))

        moments, structure = _moments(state, like)
        first = {where: m for where, name, m in moments if name not in ("nu", None)}
        carried = [
            x if name is None else second(x, first.get(where)) if name == "nu" else turn(x, 1)
            for where, name, x in moments
        ]
        return structure.unflatten(carried)


def first_moment(state: Any, like: Any) -> Any:
    """The first tree in a state that is shaped like `like` and no second moment, or None."""
    moments, _ = _moments(state, like)
    return next((m for _, name, m in moments if name not in ("nu", None)), None)


def _moments(state: Any, like: Any) -> tuple[list[tuple[Any, str | None, Any]], Any]:
    """The state as (where, name, subtree), name None for what is no moment, and its structure.

    A moment is a subtree with the structure and the shapes of `like`. Its name is that of the
    field it stands in; Optax, and memopt, call second moments ``nu``.
    """
    structure: Any = jax.tree.structure(like)
    shapes = [x.shape for x in jax.tree.leaves(like)]

    def is_moment(x: Any) -> bool:
        if jax.tree.structure(x) != structure:
            return False
        leaves = jax.tree.leaves(x)
        return [y.shape for y in leaves] == shapes and all(
            jnp.issubdtype(y.dtype, jnp.floating) for y in leaves
        )

    name = lambda path: getattr(path[-1], "name", "moment") if path else "moment"
    found, outline = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_moment)
    return [(p[:-1], name(p) if is_moment(x) else None, x) for p, x in found], outline
