"""Runs optimizers in the eigenbases of a matrix's two second moments (Shampoo's, SOAP)."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.axis_types import on_auto_axes, varying_as
from memopt.checked import checked
from memopt.errors import check_at_least, check_static
from memopt.matrices import Layout, Matrices, map_matrices
from memopt.reductions import for_any, scale_to_one
from memopt.shapes import Square, Stack
from memopt.state.owners import SECOND, Part
from memopt.state.precision import (
    average,
    bounded,
    check_real,
    float32_zeros,
    where_applied,
)
from memopt.transforms.linalg import (
    Across,
    by_matrix,
    distributed,
    leading_eigenvectors,
    orthonormal,
    product,
)
from memopt.transforms.moments import check_moments_are_known, moment_fields
from memopt.transforms.projectors import MatrixSpec, RefreshClock
from memopt.transforms.projectors.base import is_unchosen
from memopt.transforms.projectors.replay import Replay
from memopt.transforms.subspace import (
    OF_PARAMETERS,
    as_stacks_of_matrices,
    check_keeps_no_values,
    matrix_spec,
    partition_by_phase,
    without_loss,
)
from memopt.trees import NOTHING, map_named


class InEigenbasisState(NamedTuple):
    """State of `in_eigenbasis`.

    Attributes:
        count: steps taken, int32.
        left: L, the average of G Gᵀ of each matrix, or of each block of its rows; ``MaskedNode``
            for a side without one.
        right: R, the average of GᵀG, likewise.
        left_basis: the basis of L, in its shape; zeros until it is chosen.
        right_basis: the basis of R.
        inner: the inner optimizer's state for the rotated gradients.
    """

    count: Array  # type: ignore[assignment]
    left: Any
    right: Any
    left_basis: Any
    right_basis: Any
    inner: Any


@checked
def in_eigenbasis(
    inner: optax.GradientTransformation,
    decay: float = 0.95,
    refresh_every: int = 10,
    *,
    refresh_phase: int | Sequence[int] = 0,
    max_side: int = 10000,
    block_size: int | None = None,
    one_sided: bool = False,
    start: Replay | None = None,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer on gradients in the eigenbases of the averages of G Gᵀ and GᵀG.

    For each m×n matrix G of the stack, at each step::

        N = inner(Q_Lᵀ G Q_R)                      any optimizer
        U = Q_L N Q_Rᵀ
        L ← decay L + (1 − decay) G Gᵀ             R likewise, of GᵀG
        Q_L ← qr(L Q_L), Q_R ← qr(R Q_R)           every `refresh_every` steps

    The first step takes Q_L and Q_R as the eigenvectors of L and R, and updates nothing. At a
    refresh the columns of Q_L and Q_R are sorted by their estimated eigenvalues first, the
    largest first. First moments of `inner` are rotated to the new bases; second moments, factored
    ones too, are permuted as the columns are. All other state is unchanged.

    With Adam inside this is SOAP. With `memopt.scale_by_factored_matrix_rms` it is Shampoo with the
    power ½, with bases that are refreshed more seldom than its eigenvalues.

    A leaf that is not a matrix is passed to `inner` as it is. A matrix, or a block of one, whose
    gradients were all zeros waits for its first other one, and rests until then.

    Args:
        inner: any Optax transformation; it receives float32 arrays of m×n numbers, and as
            parameters Q_Lᵀ W Q_R. It must not keep parameters in its state.
        decay: the decay of L and R.
        refresh_every: steps between two refreshes of the bases.
        refresh_phase: shifts refreshes, or staggers them over the matrices; see
            `memopt.in_subspace`.
        max_side: sides longer than this have no factor and no basis: only the other one is rotated.
        block_size: sides longer than this are cut into equal blocks, each with a factor and a basis
            of its own: the fewest of at most this length.
        one_sided: rotate only the shorter side of each matrix (of a square one, the rows).
        start: recorded first bases, see `memopt.projectors.replay`; by default eigenvectors.
        matrices: which leaves are rotated, and which axes are their rows and columns; by default
            the hidden matrices, see `memopt.hidden_matrices`.

    Returns:
        A transformation whose state is an `InEigenbasisState`.

    Raises:
        ValueError: if `refresh_every`, `max_side` or `block_size` is below one, or `start` lacks a
            basis.
        IncompatiblePairingError: by `init`, if the inner optimizer keeps parameters, or moments
            that are neither known as first nor as second ones.

    References:
        Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, 2024,
        https://arxiv.org/abs/2409.11321, Algorithms 3 and 4, Claim 1.

    Example:
        >>> tx = in_eigenbasis(optax.scale_by_adam(), max_side=10)
        >>> state = tx.init({"w": jnp.zeros((3, 16, 8))})        # three layers of 16×8
        >>> state.left["w"], state.right["w"].shape, state.inner.mu["w"].shape
        (MaskedNode(), (3, 8, 8), (3, 16, 8))
    """
    if isinstance(refresh_phase, Sequence):
        return partition_by_phase(
            refresh_phase,
            matrices,
            lambda phase: in_eigenbasis(
                *(inner, decay, refresh_every),
                refresh_phase=phase,
                max_side=max_side,
                block_size=block_size,
                one_sided=one_sided,
                start=start,
                matrices=matrices,
            ),
        )
    check_at_least("refresh_every", refresh_every, 1)
    check_at_least("refresh_phase", refresh_phase, 0)
    check_static("max_side", max_side)
    check_at_least("max_side", max_side, 1)
    if block_size is not None:
        check_static("block_size", block_size)
        check_at_least("block_size", block_size, 1)
    inner = optax.with_extra_args_support(inner)
    on = functools.partial(map_matrices, matrices=matrices)
    sides = functools.partial(
        sides_of, max_side=max_side, block_size=block_size, one_sided=one_sided
    )

    def find(tree: Any) -> Any:
        """The `Sides` of each parameter's matrices; None if it is not a matrix."""
        return on(lambda layout, x: sides(matrix_spec(layout, x)), tree)

    def init(params: Any) -> InEigenbasisState:
        check_real(params)
        found = find(params)
        left, right, left_basis, right_basis, low = on(_zeros, params, found, outputs=5)
        with _as_matrices(found):
            inner_state = inner.init(low)
            check_keeps_no_values(inner.init, low)
        check_moments_are_known(inner_state, low, needed_by="in_eigenbasis")
        count = jnp.zeros((), jnp.int32)
        return InEigenbasisState(count, left, right, left_basis, right_basis, inner_state)

    def step(found: Any, updates: Any, state: InEigenbasisState, params: Any, extra: Any) -> Any:
        clock = RefreshClock.at(state.count, refresh_every, refresh_phase)
        old = state.left_basis, state.right_basis
        low = on(rotate, updates, found, *old)
        if params is not None:
            params = on(rotate, params, found, *old)

        with _as_matrices(found):
            low_updates, inner_state = inner.update(low, state.inner, params, **extra)
        # The first step only chooses bases.
        started = state.count > 0
        keep = functools.partial(where_applied, started)
        inner_state = jax.tree.map(keep, inner_state, state.inner)
        back = functools.partial(rotate_back, started)
        new_updates = on(back, updates, found, *old, low_updates)

        learn = functools.partial(update_bases, decay, clock, start)
        factors = state.left, state.right
        left, right, new_left, new_right, orders = on(
            learn, updates, found, *factors, *old, outputs=5
        )
        new = new_left, new_right
        inner_state = jax.lax.cond(
            started & clock.refresh_now,
            lambda: _carried(inner_state, low, on(_turn, updates, found, *old, *new, orders)),
            lambda: inner_state,
        )
        count = optax.safe_increment(state.count)
        return new_updates, InEigenbasisState(count, left, right, *new, inner_state)

    def update(updates: Any, state: InEigenbasisState, params: Any = None, **extra: Any) -> Any:
        extra = without_loss(extra, OF_PARAMETERS)
        on_sides = functools.partial(step, find(updates))
        return on_auto_axes(on_sides, (updates, state, params, extra), like=(updates, state))

    return optax.GradientTransformationExtraArgs(init, update)


class Sides(NamedTuple):
    """The blocks into which the two sides of a stack of matrices are cut.

    Attributes:
        spec: the matrices.
        blocks: for rows and columns the number of blocks, 1 for a whole side; 0 for a side that has
            no factor and is not rotated.
    """

    spec: MatrixSpec
    blocks: tuple[int, int]

    def factor_shape(self, side: int) -> tuple[int, ...]:
        """The shape of L, for side 0, or of R, for side 1: ``(*stack, [blocks,] length, length)``.

        Example:
            >>> sides_of(MatrixSpec("w", (2, 6, 4), jnp.float32), block_size=4).factor_shape(0)
            (2, 2, 3, 3)
        """
        count = self.blocks[side]
        length = self.spec.shape[side - 2] // count
        return (*self.spec.stack, *((count,) if count > 1 else ()), length, length)


def sides_of(
    spec: MatrixSpec | None,
    *,
    max_side: int = 10000,
    block_size: int | None = None,
    one_sided: bool = False,
) -> Sides | None:
    """Decides which sides of a stack of matrices are rotated, and in how many blocks.

    Args:
        spec: the matrices; None for another array.
        max_side: as in `in_eigenbasis`.
        block_size: as in `in_eigenbasis`.
        one_sided: as in `in_eigenbasis`.

    Raises:
        ValueError: if a long side has no equal blocks of nearly `block_size`.

    Example:
        >>> sides_of(MatrixSpec("w", (16, 12000), jnp.float32)).blocks
        (1, 0)
        >>> sides_of(MatrixSpec("w", (16, 12000), jnp.float32), block_size=5000).blocks
        (1, 3)
    """
    if spec is None:
        return None

    def count(length: int) -> int:
        if block_size is None or length <= block_size:
            return int(length <= max_side)
        blocks = next(k for k in range(-(-length // block_size), length + 1) if length % k == 0)
        if 4 * (length // blocks) < block_size:
            raise ValueError(
                f"block_size must leave equal blocks of a quarter of it or more: the side of "
                f"{length} of {spec.name!r} has only blocks of {length // blocks} for {block_size}."
            )
        return blocks if length // blocks <= max_side else 0

    m, n = spec.shape[-2:]
    rows, cols = (not one_sided or m <= n), (not one_sided or m > n)
    return Sides(spec, (count(m) if rows else 0, count(n) if cols else 0))


_ROTATE = ("...kbn,...kbr->...krn", "...mkb,...kbr->...mkr")
_BACK = ("...krn,...kbr->...kbn", "...mkr,...kbr->...mkb")
_GRAM = ("...kbn,...kcn->...kbc", "...mkb,...mkc->...kbc")


def _subscripts(of_blocks: str, blocks: int) -> str:
    """The subscripts of a product, without the axis of blocks if there is one block."""
    return of_blocks if blocks > 1 else of_blocks.replace("k", "")


def _split(x: Stack, side: int, blocks: int) -> Array:
    """Splits rows (side 0) or columns (side 1) into an axis of blocks and one inside of them."""
    if blocks == 1:
        return x
    stack, m, n = x.shape[:-2], *x.shape[-2:]
    inside = (blocks, m // blocks, n) if side == 0 else (m, blocks, n // blocks)
    return x.reshape(*stack, *inside)


def _times(subscripts: tuple[str, str], sides: Sides, bases: Sequence[Any], x: Stack) -> Stack:
    """Multiplies matrices by the bases of their sides, which have one."""
    given = [side for side, blocks in enumerate(sides.blocks) if blocks]

    def multiply(x: Stack, *bases: Array, across: Across) -> Stack:
        for side, basis in zip(given, bases, strict=True):
            shape, blocks = x.shape, sides.blocks[side]
            other, by = -1 - side, _subscripts(subscripts[side], blocks)
            x = _split(across(x, other), side, blocks)
            x = across(product(by, x, across(basis)).reshape(shape), other)
        return x

    return by_matrix(multiply, x, *(bases[side] for side in given)) if given else x


def rotate(layout: Layout, x: Array, sides: Sides | None, left: Any, right: Any) -> Array:
    """Computes Q_Lᵀ X Q_R in float32 or wider; an array that is no matrix is only cast.

    Args:
        layout: the axes of the array.
        x: a gradient or a parameter.
        sides: its sides; None if it is not a matrix.
        left: Q_L, or `NOTHING`.
        right: Q_R, or `NOTHING`.
    """
    if sides is None:
        return bounded(x)
    return bounded(_times(_ROTATE, sides, (left, right), bounded(layout.to_matrices(x))))


def rotate_back(
    started: Array, layout: Layout, g: Array, sides: Sides | None, left: Any, right: Any, low: Array
) -> Array:
    """Computes Q_L N Q_Rᵀ in the shape and dtype of the gradient; zeros until `started`.

    Args:
        started: a bool.
        layout: the axes of the gradient.
        g: the gradient.
        sides: its sides; None if it is not a matrix.
        left: Q_L, or `NOTHING`.
        right: Q_R, or `NOTHING`.
        low: N, the inner update.
    """
    if sides is not None:
        low = layout.from_matrices(_times(_BACK, sides, (left, right), low), g)
    return jnp.where(started, low, 0).astype(g.dtype)


def gram(sides: Sides, side: int, g: Stack) -> Square:
    """Computes G Gᵀ for side 0, GᵀG for side 1, in the shape of the side's factor."""

    def squared(g: Stack, across: Across) -> Array:
        x = _split(across(g, -1 - side), side, sides.blocks[side])
        return product(_subscripts(_GRAM[side], sides.blocks[side]), x, x)

    return by_matrix(squared, g).reshape(sides.factor_shape(side))


def update_bases(
    decay: Any,
    clock: RefreshClock,
    start: Replay | None,
    layout: Layout,
    g: Array,
    sides: Sides | None,
    left: Any,
    right: Any,
    left_basis: Any,
    right_basis: Any,
) -> tuple[Any, Any, Any, Any, Any]:
    """Averages the factors and refreshes the bases at the end of a step.

    Args:
        decay: the decay of the factors.
        clock: the clock of this step.
        start: recorded first bases, or None.
        layout: the axes of the gradient.
        g: the gradient.
        sides: its sides; None if it is not a matrix.
        left: L, or `NOTHING`.
        right: R, or `NOTHING`.
        left_basis: Q_L, or `NOTHING`.
        right_basis: Q_R, or `NOTHING`.

    Returns:
        The new L, R, Q_L and Q_R, and for each side the order of its old columns, or None.
    """
    factors, bases = [left, right], [left_basis, right_basis]
    orders: list[Any] = [None, None]
    if sides is None:
        return (*factors, *bases, tuple(orders))
    g = bounded(layout.to_matrices(g))
    for side, blocks in enumerate(sides.blocks):
        if blocks:
            factors[side] = average(decay, factors[side], gram(sides, side, g))
            first = functools.partial(_first_basis, start, sides, side)
            bases[side], orders[side] = next_basis(factors[side], bases[side], clock, first)
    return (*factors, *bases, tuple(orders))


def _first_basis(start: Replay | None, sides: Sides, side: int, factor: Square) -> Square:
    """The eigenvectors of a factor, or the recorded basis."""
    if start is None:
        return distributed(eigenvectors, factor)
    recorded = start.first_basis(sides.spec, side)
    return varying_as(factor, jnp.broadcast_to(recorded.astype(factor.dtype), factor.shape))


def next_basis(
    factor: Square, basis: Square, clock: RefreshClock, first: Any
) -> tuple[Square, Array]:
    """Refreshes bases by one step of the power iteration, and chooses those that wait.

    Args:
        factor: L or R.
        basis: the stored bases, zeros for one that waits for its first gradient.
        clock: the clock of this step.
        first: a function from factors to first bases.

    Returns:
        The new bases, and the order of the old columns in them.
    """
    waiting = is_unchosen(basis)
    stay = jnp.broadcast_to(jnp.arange(basis.shape[-1], dtype=jnp.int32), basis.shape[:-1])
    stay = varying_as(basis, stay)
    pick = lambda which, a, b: jnp.where(which[..., None, None], a, b)

    def look() -> tuple[Square, Array]:
        scale, exists = scale_to_one(factor)
        due, moves = waiting & exists, ~waiting & exists & clock.refresh_now
        scaled = scale * factor
        chosen = jax.lax.cond(for_any(due), lambda: pick(due, first(scaled), basis), lambda: basis)

        def move() -> tuple[Square, Array]:
            moved, order = distributed(power_step, scaled, basis)
            return pick(moves, moved, chosen), jnp.where(moves[..., None], order, stay)

        return jax.lax.cond(for_any(moves), move, lambda: (chosen, stay))

    return jax.lax.cond(clock.refresh_now | for_any(waiting), look, lambda: (basis, stay))


def eigenvectors(factor: Square) -> Square:
    """The eigenvectors of L, those of the largest eigenvalues first.

    The factor of one gradient may have a lower rank than its side. Its other directions are
    completed from the eigenvectors, so that they do not depend on rounding.

    Example:
        >>> eigenvectors(jnp.diag(jnp.array([0.0, 3.0, 0.0])))[:, 0].tolist()
        [0.0, 1.0, 0.0]
    """
    length = factor.shape[-1]
    vectors = leading_eigenvectors(factor, length)
    images = product("...ij,...jk->...ik", factor, vectors)
    values = (vectors * images).sum(-2, keepdims=True)
    least = length * jnp.finfo(factor.dtype).eps * values.max(-1, keepdims=True)
    kept = orthonormal(jnp.where(values > least, vectors, 0))
    return jnp.where(values > least, vectors, kept)


def power_step(factor: Square, basis: Square) -> tuple[Square, Array]:
    """One step of the power iteration: qr(L Q), the columns of Q sorted by qᵀ L q first.

    Returns:
        The new basis, and the order of the old columns, the largest eigenvalue first, int32.

    Example:
        >>> basis, order = power_step(jnp.diag(jnp.array([1.0, 3.0])), jnp.eye(2))
        >>> jnp.abs(basis).tolist(), order.tolist()
        ([[0.0, 1.0], [1.0, 0.0]], [1, 0])
    """
    moved = product("...ij,...jk->...ik", factor, basis)
    estimates = (basis * moved).sum(-2)
    order = jnp.argsort(-estimates, axis=-1).astype(jnp.int32)
    return orthonormal(jnp.take_along_axis(moved, order[..., None, :], -1)), order


class _Turn(NamedTuple):
    """A change of the bases of a stack of matrices; the fields are pairs, for rows and columns."""

    sides: Sides
    old: tuple[Any, Any]
    new: tuple[Any, Any]
    orders: tuple[Any, Any]


def _turn(
    layout: Layout, g: Array, sides: Sides | None, left: Any, right: Any, *new: Any
) -> _Turn | None:
    if sides is None:
        return None
    new_left, new_right, orders = new
    return _Turn(sides, (left, right), (new_left, new_right), orders)


def _carried(state: Any, low: Any, turns: Any) -> Any:
    """Carries the moments of the inner optimizer to new bases."""
    structure: Any = jax.tree.structure(state)

    def one(rule: Any) -> Any:
        return lambda _, x, turn, moment: moment if turn is None else rule(turn, moment)

    def carried(part: Part, is_moment: bool) -> Any:
        if is_moment and part.moment != SECOND:
            return map_named(one(_rotated), low, turns, part.tree)
        if part.moment == SECOND and part.has_parameters:
            return map_named(one(functools.partial(_permuted, part.field)), low, turns, part.tree)
        return part.tree

    carried_parts = [carried(*field) for field in moment_fields(state, low)]
    return structure.unflatten(jax.tree.leaves(carried_parts))


def _rotated(turn: _Turn, m: Stack) -> Stack:
    """A first moment in the new bases."""
    return _times(_ROTATE, turn.sides, turn.new, _times(_BACK, turn.sides, turn.old, m))


def _permuted(field: str, turn: _Turn, v: Any) -> Any:
    """A second moment, or one of its factors for rows or columns, permuted as the columns are."""
    (*stack, m, n), blocks = turn.sides.spec.shape, turn.sides.blocks
    if not isinstance(v, jax.Array):
        return v
    for side, length in enumerate((m, n)):
        if not blocks[side]:
            continue
        if v.shape == (*stack, m, n):
            axis = side - 2
        elif v.shape == (*stack, length) and field == ("rows", "cols")[side]:
            axis = -1
        else:
            continue
        order = turn.orders[side].reshape(*stack, blocks[side], -1)
        start = jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 2)
        order = (order + length // blocks[side] * start).reshape(*stack, length)
        if axis == -1 and v.ndim == order.ndim:
            v = jnp.take_along_axis(v, order, axis)
            continue
        take = functools.partial(_take_lines, side=side)
        v = by_matrix(take, v, jnp.expand_dims(order, -1 - side))
    return v


def _take_lines(x: Stack, order: Array, *, side: int, across: Across) -> Stack:
    """Permutes rows (side 0) or columns (side 1)."""
    return jnp.take_along_axis(across(x, -1 - side), across(order), side - 2)


def _zeros(layout: Layout, p: Any, sides: Sides | None) -> tuple[Any, Any, Any, Any, Array]:
    """Initial L, R, Q_L, Q_R and rotated gradient."""
    if sides is None:
        return (*(NOTHING,) * 4, float32_zeros(p))
    dtype = sides.spec.dtype
    zeros = lambda shape: varying_as(p, jnp.zeros(shape, dtype))
    factor = lambda side: zeros(sides.factor_shape(side)) if sides.blocks[side] else NOTHING
    return factor(0), factor(1), factor(0), factor(1), zeros(sides.spec.shape)


def _as_matrices(found: Any) -> Any:
    """A context in which rotated gradients are read as stacks of matrices."""
    is_sides = lambda x: isinstance(x, Sides)
    specs = [sides.spec for sides in jax.tree.leaves(found, is_leaf=is_sides)]
    return as_stacks_of_matrices([(spec, spec.shape) for spec in specs])
