"""Inverse Kronecker factors from what layers see of a batch (MKOR)."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.axis_types import on_auto_axes, varying_as
from memopt.checked import checked
from memopt.errors import check_above_zero, check_at_least, check_between
from memopt.matrices import Layout, Matrices, map_matrices
from memopt.reductions import largest_magnitude
from memopt.shapes import Square, Stack
from memopt.state.precision import bounded, check_real, statistics_dtype, to_float32
from memopt.transforms.layer_statistics import LayerStatistics
from memopt.transforms.linalg import product
from memopt.transforms.norm_growth import matrix_norm
from memopt.trees import NOTHING, named_leaves


class ScaleByKroneckerInversesState(NamedTuple):
    """State of `scale_by_kronecker_inverses`.

    Attributes:
        count: steps taken, int32.
        inputs: for each matrix the inverse factor of its inputs, ``(*stack, m, m)``;
            ``MaskedNode`` for other leaves.
        outputs: that of its outputs' gradients, ``(*stack, n, n)``.
    """

    count: Array  # type: ignore[assignment]
    inputs: Any
    outputs: Any


@checked
def scale_by_kronecker_inverses(
    decay: float = 0.95,
    refresh_every: int = 10,
    max_entry: float = 2.0,
    blend: float = 0.9,
    clip_value: float = 100.0,
    *,
    as_released: bool = False,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies gradients by the inverses of two factors that rank-one updates keep.

    Every `refresh_every` steps, for a layer's mean input a (m) and summed output gradient g (n),
    given as ``update(updates, state, params, statistics=…)``, with J_A = I and J_G = I at
    the start, and v of length at most `clip_value`, for J, v of J_A, a and J_G, g::

        J ← ζ J + (1 − ζ) I                        if max|J| > ε
        J ← J/γ − (1−γ)/(γ² (1 + (1−γ)/γ · vᵀJv)) · Jv(Jv)ᵀ
          = (γ J⁻¹ + (1−γ) vvᵀ)⁻¹                  the identity of Sherman and Morrison

    and at every step, for kernels stored as (inputs, outputs)::

        U = J_A G J_G · ‖G‖ / ‖J_A G J_G‖

    A matrix without gradient is not updated. State: m² + n² numbers per matrix, in float32 or
    wider.

    Args:
        decay: γ.
        refresh_every: steps between two updates of the factors.
        max_entry: ε, beyond which a factor is drawn towards the identity; without data, J grows.
        blend: ζ.
        clip_value: the largest length of a statistic; if `as_released`, its largest entry. The
            smallest eigenvalue of J stays near 1/clip_value² or above, and J positive definite.
        as_released: J ← J' − (J'v)(J'v)ᵀ / (1 + vᵀJ'v) with J' = γ J + (1−γ) I; the first
            statistics are not used.
        matrices: which leaves are matrices; others are left alone. See `memopt.hidden_matrices`.

    Returns:
        A transformation whose state is a `ScaleByKroneckerInversesState`.

    Raises:
        ValueError: if an argument is out of range; at an update, if a matrix has no statistics, or
            of another shape.

    References:
        Mozaffari et al., MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using Rank-1
        Updates, 2023, https://arxiv.org/abs/2306.01685.

    Example:
        >>> tx = scale_by_kronecker_inverses(refresh_every=1)
        >>> params = {"hidden": jnp.eye(2)}
        >>> seen = LayerStatistics(jnp.array([3.0, 0.0]), jnp.zeros(2), jnp.array(1.0))
        >>> _, state = tx.update(params, tx.init(params), statistics={"hidden": seen})
        >>> print(1 / jnp.diag(state.inputs["hidden"]))            # 0.95 + 0.05·3²
        [1.4  0.95]
    """
    check_between("decay", decay, 0, 1)
    check_between("blend", blend, 0, 1)
    check_at_least("refresh_every", refresh_every, 1)
    check_at_least("max_entry", max_entry, 1)
    check_above_zero("clip_value", clip_value)
    bound = functools.partial(_clip, by_entry=as_released, most=clip_value)
    maps = functools.partial(map_matrices, matrices=matrices)

    def new_factor(inverse: Square, v: Array) -> Square:
        v = bound(v)
        if as_released:
            return released_rank_one(inverse, v, decay)
        return rank_one(toward_identity(inverse, max_entry, blend), v, decay)

    def init(params: Any) -> ScaleByKroneckerInversesState:
        check_real(params)

        def start(layout: Layout, p: Any) -> Any:
            if not layout.is_matrix:
                return NOTHING, NOTHING
            *stack, m, n = layout.shape(p)
            dtype = statistics_dtype(p)
            eye = lambda k: varying_as(p, jnp.broadcast_to(jnp.eye(k, dtype=dtype), (*stack, k, k)))
            return eye(m), eye(n)

        factors = maps(start, params, outputs=2)
        return ScaleByKroneckerInversesState(jnp.zeros((), jnp.int32), *factors)

    def step(updates: Any, state: ScaleByKroneckerInversesState, seen: Any) -> Any:
        now = state.count % jnp.asarray(refresh_every).astype(jnp.int32) == 0
        if as_released:
            now &= state.count > 0

        def rule(layout: Layout, g: Array, inputs: Any, outputs: Any) -> tuple[Any, Any, Any]:
            if not layout.is_matrix:
                return g, NOTHING, NOTHING
            a, b = vectors(layout, g, seen)

            def refreshed() -> tuple[Square, Square]:
                return new_factor(inputs, a), new_factor(outputs, b)

            inputs, outputs = jax.lax.cond(now, refreshed, lambda: (inputs, outputs))
            return precondition(layout, g, inputs, outputs), inputs, outputs

        updates, *factors = maps(rule, updates, *state[1:], outputs=3)
        count = optax.safe_increment(state.count)
        return updates, ScaleByKroneckerInversesState(count, *factors)

    def update(
        updates: Any, state: ScaleByKroneckerInversesState, params: Any = None, **extra: Any
    ) -> Any:
        seen = by_name(extra.get("statistics"))
        return on_auto_axes(step, (updates, state, seen), like=(updates, state))

    return optax.GradientTransformationExtraArgs(init, update)


def by_name(statistics: Any) -> dict[str, LayerStatistics]:
    """The statistics of each matrix by its name, from a tree or from such a dict."""
    is_leaf = lambda x: isinstance(x, LayerStatistics)
    return {name: x for name, x in named_leaves(statistics, is_leaf)[0] if is_leaf(x)}


def vectors(layout: Layout, g: Array, seen: Mapping[str, LayerStatistics]) -> tuple[Array, Array]:
    """The mean input and the summed output gradient of a layer; zeros if it saw no token.

    Raises:
        ValueError: if there are none, or of another shape; names the matrix.
    """
    if layout.name not in seen:
        raise ValueError(
            f"statistics must have a LayerStatistics for {layout.name!r}; see memopt.observe, or "
            "leave the leaf out of `matrices`."
        )
    *stack, m, n = layout.shape(g)
    wanted = (*stack, m), (*stack, n), tuple(stack)
    found = tuple(jnp.shape(x) for x in seen[layout.name])
    if found != wanted:
        raise ValueError(
            f"statistics of {layout.name!r} must have inputs, outputs and tokens of shapes "
            f"{wanted}, got {found}."
        )
    a, b, tokens = (to_float32(x) for x in seen[layout.name])
    return a / jnp.where(tokens > 0, tokens, 1)[..., None], b


def _clip(v: Array, *, by_entry: bool, most: Any) -> Array:
    """Bounds the entries of vectors, or their length."""
    if by_entry:
        return jnp.clip(v, -most, most)
    v = bounded(v)
    length = jnp.sqrt(jnp.square(v).sum(-1, keepdims=True))
    return v * jnp.minimum(1, most / jnp.where(length > 0, length, 1))


def toward_identity(inverse: Square, max_entry: Any, blend: Any) -> Square:
    """Computes ζJ + (1 − ζ)I for each matrix that has an entry beyond `max_entry`."""
    eye = jnp.broadcast_to(jnp.eye(inverse.shape[-1], dtype=inverse.dtype), inverse.shape)
    beyond = largest_magnitude(inverse, (-2, -1), keepdims=True) > max_entry
    return jnp.where(beyond, blend * inverse + (1 - blend) * eye, inverse)


def rank_one(inverse: Square, v: Array, decay: Any) -> Square:
    """Computes (γ J⁻¹ + (1 − γ) vvᵀ)⁻¹ from J, for each matrix of a stack.

    Example:
        >>> inverse = rank_one(jnp.eye(1), jnp.array([2.0]), 0.5)      # 1 / (0.5 + 0.5·2²)
        >>> round(float(inverse[0, 0]), 4)
        0.4
    """
    ratio = (1 - decay) / decay
    u, length = _applied(inverse, v)
    return inverse / decay - ratio / decay * _outer(u) / (1 + ratio * length)


def released_rank_one(inverse: Square, v: Array, decay: Any) -> Square:
    """Computes J' − (J'v)(J'v)ᵀ / (1 + vᵀJ'v) with J' = γJ + (1 − γ)I, as the authors' code."""
    eye = jnp.broadcast_to(jnp.eye(inverse.shape[-1], dtype=inverse.dtype), inverse.shape)
    inverse = decay * inverse + (1 - decay) * eye
    u, length = _applied(inverse, v)
    return inverse - _outer(u) / (1 + length)


def _applied(inverse: Square, v: Array) -> tuple[Array, Array]:
    """Jv, and vᵀJv with two axes of length one, which rounding does not make negative."""
    v = v.astype(inverse.dtype)
    u = product("...ij,...j->...i", inverse, v)
    return u, jnp.maximum((u * v).sum(-1), 0)[..., None, None]


def _outer(u: Array) -> Square:
    return jnp.expand_dims(u, -1) * jnp.expand_dims(u, -2)


def precondition(layout: Layout, g: Array, inputs: Square, outputs: Square) -> Stack:
    """Computes J_A G J_G with the norm of G, for each matrix."""
    matrices = bounded(layout.to_matrices(g))
    moved = product("...ij,...jn->...in", inputs, matrices)
    moved = layout.from_matrices(product("...mi,...ij->...mj", moved, outputs), g)
    norm = matrix_norm(layout, moved)
    factor = matrix_norm(layout, bounded(g)) / jnp.where(norm > 0, norm, 1)
    return (moved * jnp.expand_dims(factor, layout.core)).astype(g.dtype)
