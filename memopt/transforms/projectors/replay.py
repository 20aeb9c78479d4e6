"""Replays recorded bases, to reproduce another framework's run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from memopt.errors import check_choice
from memopt.shapes import Basis, LowRank, Stack
from memopt.transforms.projectors.base import MatrixSpec, Projector, RefreshClock
from memopt.transforms.projectors.selected import Selected

Recorded = Mapping[str, Mapping[Any, ArrayLike]]


@dataclasses.dataclass(frozen=True)
class Replay(Projector):
    """Given bases; see `replay`.

    Attributes:
        matrices: {leaf name: {step first used: matrix}}.
    """

    matrices: Recorded = dataclasses.field(default_factory=dict)

    def is_left(self, spec: MatrixSpec) -> bool:
        """Whether the rows are projected: given by `side`, or by the matrices' shape."""
        if self.side in ("left", "right"):
            return self.side == "left"
        m, n = spec.shape[-2:]
        given = _first(self.matrices, spec).shape[-2:]
        if max(given) not in (m, n):
            raise ValueError(
                f"the matrices to replay for {spec.name!r} have shape {given}: "
                f"their longer side should be {m} (rows) or {n} (columns)."
            )
        return given[0] >= given[1] if m == n else max(given) == m

    def size(self, spec: MatrixSpec) -> tuple[int, int]:
        """The longer and the shorter side of the recorded matrices."""
        given = _first(self.matrices, spec).shape[-2:]
        return max(given), min(given)

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """The recorded matrix in use at this step, as side×r."""
        tall = lambda b: b if b.shape[-2] >= b.shape[-1] else b.swapaxes(-1, -2)
        return _at_step(self.matrices, spec, clock, tall).astype(spec.dtype)

    def first_basis(self, spec: MatrixSpec, side: int) -> Array:
        """The recorded basis of one side from the first step on: of rows, 0, or of columns, 1."""
        check_choice("replay: leaf", spec.name, self.matrices)
        key, length = f"1.Q{side}", spec.shape[side - 2]
        check_choice(f"replay for {spec.name!r}: basis", key, self.matrices[spec.name])
        given = jnp.asarray(self.matrices[spec.name][key])
        if given.shape[-2:] != (length, length):
            raise ValueError(
                f"the basis {key!r} to replay for {spec.name!r} must be {length}×{length}, "
                f"got {given.shape}."
            )
        return given


@dataclasses.dataclass(frozen=True)
class ReplaySelected(Selected):
    """Given selections of lines, entries or whole matrices; see `replay`.

    Attributes:
        matrices: {leaf name: {step first used: selection}}.
    """

    matrices: Recorded = dataclasses.field(default_factory=dict)

    def basis(self, spec: MatrixSpec, gradient: Stack, clock: RefreshClock) -> Basis:
        """The recorded selection in use at this step."""
        return _at_step(self.matrices, spec, clock, lambda chosen: chosen)

    def projected_shape(self, spec: MatrixSpec) -> tuple[int, ...]:
        """The shape of the selection: a vector for entries, the full shape for whole matrices."""
        *stack, m, n = spec.shape
        chosen = _first(self.matrices, spec)
        if chosen.ndim == 0:
            return spec.shape
        if self._are_entries(spec, chosen):
            return (*stack, len(chosen))
        return (*stack, len(chosen), n) if self.is_left(spec) else (*stack, m, len(chosen))

    def down(self, spec: MatrixSpec, basis: Basis, gradient: Stack) -> LowRank:
        """The selected lines or entries; zeros for a matrix that is not selected."""
        if basis.ndim == 0:
            return jnp.where(basis, gradient, 0)
        if self._are_entries(spec, basis):
            return gradient.reshape(*gradient.shape[:-2], -1)[..., basis]
        return jnp.take(gradient, basis, -2 if self.is_left(spec) else -1)

    def up(self, spec: MatrixSpec, basis: Basis, low: LowRank) -> Stack:
        """Puts the selected entries back in their places, with zeros elsewhere."""
        if basis.ndim == 0:
            return jnp.where(basis, low, 0)
        *stack, m, n = spec.shape
        if self._are_entries(spec, basis):
            flat = jnp.zeros((*stack, m * n), low.dtype).at[..., basis].set(low)
            return flat.reshape(spec.shape)
        index = (..., basis, slice(None)) if self.is_left(spec) else (..., basis)
        return jnp.zeros(spec.shape, low.dtype).at[index].set(low)

    def mean(self, spec: MatrixSpec, basis: Basis, low: LowRank) -> LowRank:
        """The mean over the selected entries, or over the selected lines in each channel."""
        is_flat = low.ndim < len(spec.shape)
        return low.mean(-1, keepdims=True) if is_flat else super().mean(spec, basis, low)

    def _are_entries(self, spec: MatrixSpec, basis: Basis | np.ndarray) -> bool:
        return basis.shape[0] > spec.shape[-2 if self.is_left(spec) else -1]


def replay(matrices: Recorded, *, side: str = "short") -> Projector:
    """Uses recorded bases, to reproduce a run of another framework.

    Args:
        matrices: {leaf name: {step first used, from 1: matrix}}. A matrix may be side×r or r×side;
            its longer side determines which side it projects. For square parameters, r×side
            projects the columns and side×r the rows, as stored by the released code of GaLore and
            related methods. A selection in place of a matrix selects entries, as recorded from
            FRUGAL's code: integers are indices of lines (columns, or rows with ``side="left"``) or,
            if there are more integers than lines, of entries in row-major order; a bool selects the
            whole matrix or nothing.
        side: "left" or "right", to set the projected side explicitly.

    `memopt.soap` and `memopt.in_eigenbasis` take the first bases of both sides, recorded as
    {leaf name: {"1.Q0": that of the rows, "1.Q1": that of the columns}}.

    Raises:
        ValueError: if a leaf has no matrices, none from step 1, or of a wrong shape.

    Example:
        >>> replay({"w": {1: np.eye(4)[:2]}}).is_left(MatrixSpec("w", (4, 4), jnp.float32))
        False
    """
    some = next((m for steps in matrices.values() for m in steps.values()), np.eye(1))
    if np.ndim(some) >= 2:
        return Replay(1, side, matrices=matrices)
    return ReplaySelected(1, "right" if side == "short" else side, matrices=matrices)


def _steps(matrices: Recorded, spec: MatrixSpec) -> Mapping[int, ArrayLike]:
    check_choice("replay: leaf", spec.name, matrices)
    steps = matrices[spec.name]
    if min(steps, key=str) != 1:
        raise ValueError(f"replay for {spec.name!r} must begin at step 1, not {min(steps)}.")
    return steps


def _first(matrices: Recorded, spec: MatrixSpec) -> np.ndarray:
    """The matrix or selection of the first step."""
    return np.asarray(_steps(matrices, spec)[1])


def _at_step(
    matrices: Recorded,
    spec: MatrixSpec,
    clock: RefreshClock,
    oriented: Callable[[np.ndarray], np.ndarray],
) -> Array:
    """The recorded matrix or selection in use at this step."""
    steps = _steps(matrices, spec)
    begins = jnp.asarray(sorted(steps), jnp.int32)
    every = jnp.asarray(np.stack([oriented(np.asarray(steps[t])) for t in sorted(steps)]))
    return every[jnp.searchsorted(begins, clock.step + 1, side="right") - 1]
