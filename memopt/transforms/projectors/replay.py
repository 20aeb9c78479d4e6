"""Given bases, so that another framework's run can be followed number by number."""

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from memopt.errors import check_choice
from memopt.transforms.projectors.base import Leaf, Projector, When
from memopt.transforms.projectors.selected import Selected

Recorded = Mapping[str, Mapping[int, ArrayLike]]


@dataclasses.dataclass(frozen=True)
class Replay(Projector):
    """Given bases; see `replay`.

    Attributes:
      matrices: {leaf name: {step first used: matrix}}.
    """

    matrices: Recorded = dataclasses.field(default_factory=dict)

    def is_left(self, leaf: Leaf) -> bool:
        """Read off the matrices' shape, unless `side` says."""
        if self.side in ("left", "right"):
            return self.side == "left"
        m, n = leaf.shape[-2:]
        given = np.shape(next(iter(_steps(self.matrices, leaf).values())))[-2:]
        if max(given) not in (m, n):
            raise ValueError(
                f"the matrices to replay for {leaf.name!r} have shape {given}: "
                f"their longer side should be {m} (rows) or {n} (columns)."
            )
        return given[0] >= given[1] if m == n else max(given) == m

    def basis(self, leaf: Leaf, gradient: Array, when: When) -> Array:
        """The matrix last begun at this step, in this package's orientation."""
        tall = lambda b: b if b.shape[-2] >= b.shape[-1] else b.swapaxes(-1, -2)
        return _in_force(self.matrices, leaf, when, tall).astype(leaf.dtype)


@dataclasses.dataclass(frozen=True)
class ReplaySelected(Selected):
    """Given choices of lines, entries or whole matrices; see `replay`.

    Attributes:
      matrices: {leaf name: {step first used: choice}}.
    """

    matrices: Recorded = dataclasses.field(default_factory=dict)

    def basis(self, leaf: Leaf, gradient: Array, when: When) -> Array:
        """The choice last begun at this step."""
        return _in_force(self.matrices, leaf, when, lambda chosen: chosen)

    def down(self, leaf: Leaf, basis: Array, gradient: Array) -> Array:
        """The chosen lines or entries; of a matrix switched off zeros."""
        if basis.ndim == 0:
            return jnp.where(basis, gradient, 0)
        if self._are_entries(leaf, basis):
            return gradient.reshape(*gradient.shape[:-2], -1)[..., basis]
        return jnp.take(gradient, basis, -2 if self.is_left(leaf) else -1)

    def up(self, leaf: Leaf, basis: Array, low: Array) -> Array:
        """The chosen entries in their places, zeros elsewhere."""
        if basis.ndim == 0:
            return jnp.where(basis, low, 0)
        *stack, m, n = leaf.shape
        if self._are_entries(leaf, basis):
            flat = jnp.zeros((*stack, m * n), low.dtype).at[..., basis].set(low)
            return flat.reshape(leaf.shape)
        index = (..., basis, slice(None)) if self.is_left(leaf) else (..., basis)
        return jnp.zeros(leaf.shape, low.dtype).at[index].set(low)

    def _are_entries(self, leaf: Leaf, basis: Array) -> bool:
        return basis.shape[0] > leaf.shape[-2 if self.is_left(leaf) else -1]


def replay(matrices: Recorded, *, side: str = "short") -> Projector:
    """Given bases, so that a run of another framework can be followed number by number.

    Args:
      matrices: {leaf name: {step first used, from 1: matrix}}. A matrix may be side×r or
        r×side. Which side it projects follows from its longer side; of a square one r×side
        projects the columns and side×r the rows, as the authors' codes of GaLore's family
        store them. A choice in its place selects entries, as FRUGAL's code records it: integers,
        the indices of lines (of columns, or of rows with ``side="left"``) or, more of them than
        there are lines, of entries in row-major order; or a bool, the whole matrix or nothing.
      side: "left" or "right" to say it instead.

    Raises:
      ValueError: if a leaf has no matrices, none from step 1, or of a wrong shape.

    Example:
      >>> replay({"w": {1: np.eye(4)[:2]}}).is_left(Leaf("w", (4, 4), jnp.float32))
      False
    """
    some = next((m for steps in matrices.values() for m in steps.values()), np.eye(1))
    if np.ndim(some) >= 2:
        return Replay(1, side, matrices=matrices)
    return ReplaySelected(1, "right" if side == "short" else side, matrices=matrices)


def _steps(matrices: Recorded, leaf: Leaf) -> Mapping[int, ArrayLike]:
    check_choice("replay: leaf", leaf.name, matrices)
    steps = matrices[leaf.name]
    if min(steps) != 1:
        raise ValueError(f"replay for {leaf.name!r} must begin at step 1, not {min(steps)}.")
    return steps


def _in_force(
    matrices: Recorded, leaf: Leaf, when: When, oriented: Callable[[np.ndarray], np.ndarray]
) -> Array:
    """What was last begun at this step."""
    steps = _steps(matrices, leaf)
    begins = jnp.asarray(sorted(steps), jnp.int32)
    every = jnp.asarray(np.stack([oriented(np.asarray(steps[t])) for t in sorted(steps)]))
    return every[jnp.searchsorted(begins, when.step + 1, side="right") - 1]
