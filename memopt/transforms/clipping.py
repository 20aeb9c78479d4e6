"""Update clipping: bounds on the size of each matrix's update."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.matrices import Layout, Matrices, every_matrix, map_matrices
from memopt.reductions import total
from memopt.state.precision import statistics_dtype, zeros_of

_TINY = float(jnp.finfo(jnp.float32).tiny)
_VANISHED = 1e-3


def rms(layout: Layout, x: Array) -> Array:
    """Root mean square of each matrix of the stack of `x`, its axes kept with length one."""
    square = jnp.square(x.astype(statistics_dtype(x)))
    mean = total(square, layout.core, keepdims=True) / math.prod(x.shape[a] for a in layout.core)
    return jnp.sqrt(mean)


def clip_by_matrix_rms(
    threshold: float = 1.0, *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each matrix of the stack down to a root mean square of at most `threshold`.

    U ← U / max(1, RMS(U) / threshold). Where `optax.clip_by_block_rms` pools a stacked array
    into one root mean square, layers here do not touch each other. No state.

    Args:
      threshold: the largest root mean square that passes, d in the paper.
      matrices: which leaves are matrices, and of which axes; see `memopt.matrices`.

    References:
      Shazeer & Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235, section 6.

    Example:
      >>> tx = clip_by_matrix_rms(1.0)
      >>> layers = jnp.stack([jnp.full((2, 2), 3.0), jnp.full((2, 2), 0.5)])
      >>> tx.update(layers, tx.init(layers))[0][:, 0, 0].tolist()
      [1.0, 0.5]
    """

    def clip(layout: Layout, u: Array) -> Array:
        return (u / jnp.maximum(1.0, rms(layout, u) / threshold)).astype(u.dtype)

    def update(updates: Any, params: Any = None) -> Any:
        return map_matrices(clip, updates, matrices=matrices, default=every_matrix)

    return optax.with_extra_args_support(optax.stateless(update))


def scale_by_parameter_rms(
    min_scale: float = 1e-3, *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each matrix's update by the root mean square of its parameter.

    U ← max(min_scale, RMS(W)) · U, per matrix of the stack. No state.

    Args:
      min_scale: the least scale, so that parameters can leave zero.
      matrices: which leaves are matrices, and of which axes; see `memopt.matrices`.

    Raises:
      ValueError: if `update` is called without `params`.

    References:
      Shazeer & Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235, section 8.

    Example:
      >>> tx = scale_by_parameter_rms()
      >>> w = jnp.full((2, 2), 0.5)
      >>> tx.update(jnp.ones((2, 2)), tx.init(w), w)[0].tolist()
      [[0.5, 0.5], [0.5, 0.5]]
    """

    def scale(layout: Layout, u: Array, w: Array) -> Array:
        return (u * jnp.maximum(min_scale, rms(layout, w))).astype(u.dtype)

    def update(updates: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError(
                "scale_by_parameter_rms needs params: tx.update(grads, state, params)."
            )
        return map_matrices(scale, updates, params, matrices=matrices, default=every_matrix)

    return optax.with_extra_args_support(optax.stateless(update))


def normalize_by_group(
    threshold: float = 1.0, min_scale: float = 1e-3, *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """AdaLomo's grouped update normalisation, each matrix of the stack a group.

    U ← max(min_scale, RMS(W)) · U / max(1, RMS(U) / threshold). No state.

    Args:
      threshold: the largest root mean square that passes.
      min_scale: the least scale taken from the parameter.
      matrices: which leaves are matrices, and of which axes; see `memopt.matrices`.

    References:
      Lv et al., AdaLomo, 2023, https://arxiv.org/abs/2310.10195, section 3.2.

    Example:
      >>> tx = normalize_by_group()
      >>> w = jnp.full((2, 2), 0.5)
      >>> tx.update(jnp.full((2, 2), 4.0), tx.init(w), w)[0].tolist()
      [[0.5, 0.5], [0.5, 0.5]]
    """
    return optax.with_extra_args_support(
        optax.chain(
            clip_by_matrix_rms(threshold, matrices=matrices),
            scale_by_parameter_rms(min_scale, matrices=matrices),
        )
    )


class ClipByGradientNormState(NamedTuple):
    """State of `clip_by_gradient_norm` with `previous`.

    Attributes:
      norm: of the gradient of the step before, float32; zero before there is one.
    """

    norm: Array


def clip_by_gradient_norm(
    max_norm: float, *, previous: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Scales gradients down to a norm of at most `max_norm`, all of them together.

    G ← G · min(1, max_norm / ‖all G‖), as ``optax.clip_by_global_norm``. The norm is that of the
    extra argument `gradient_norm` where the training step gives it, as those of memopt do, so that
    one that never holds all gradients can use this too; else that of the updates that arrive.

    Args:
      max_norm: the largest norm that passes.
      previous: divide by the norm of the step before, which is known before this step's gradients
        are; the first step passes as it is. State: one number. By default no state.

    References:
      Pascanu et al., On the difficulty of training recurrent neural networks, 2013,
      https://arxiv.org/abs/1211.5063, Algorithm 1.

    Example:
      >>> tx = clip_by_gradient_norm(1.0, previous=True)
      >>> state = tx.init(jnp.zeros(2))
      >>> for g in [4.0, 1.0, 1.0]:
      ...     u, state = tx.update(jnp.array([g, 0.0]), state)
      ...     print(u[0])
      4.0
      0.25
      1.0
    """

    def init(params: Any) -> Any:
        return ClipByGradientNormState(jnp.zeros(())) if previous else optax.EmptyState()

    def update(
        updates: Any, state: Any, params: Any = None, *, gradient_norm: Any = None, **_: Any
    ) -> Any:
        if gradient_norm is None:
            gradient_norm = optax.tree.norm(optax.tree.cast(updates, jnp.float32))
        norm = state.norm if previous else gradient_norm
        factor = jnp.where(norm > max_norm, max_norm / norm, 1.0)
        updates = jax.tree.map(lambda u: (u * factor).astype(u.dtype), updates)
        return updates, ClipByGradientNormState(gradient_norm) if previous else state

    return optax.GradientTransformationExtraArgs(init, update)


class GrowthLimiter(NamedTuple):
    """The rule of `limit_norm_growth`, for whoever knows a norm without the array.

    Attributes:
      limit: the largest ratio of a norm to the one before, γ.
      as_released: store every norm, zero too, as the authors' code does.
    """

    limit: float = 1.01
    as_released: bool = False

    def __call__(self, norm: Array, previous: Array) -> tuple[Array, Array]:
        """The factor that limits an update of this norm, and the norm to remember.

        Args:
          norm: of the update.
          previous: what the call before remembered; 0 stands for none.
        """
        excess = jnp.maximum(norm / (previous + 1e-8), self.limit) / self.limit
        factor = jnp.where(previous > 0, 1.0 / excess, 1.0)
        limited = norm * factor
        if self.as_released:
            return factor, jnp.maximum(limited, _TINY)
        # An update that all but vanishes says nothing of the next one's size.
        return factor, jnp.where(limited > _VANISHED * previous, limited, previous)


class LimitNormGrowthState(NamedTuple):
    """State of `limit_norm_growth`.

    Attributes:
      norm: the norm of each matrix's last update, with the axes of its stack.
    """

    norm: Any


def limit_norm_growth(
    limit: float = 1.01, *, matrices: Matrices = None, as_released: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Lets the norm of each matrix's update grow by at most a factor of `limit` a step.

    With γ = limit and ‖U‖ the norm that was let through the step before::

        U ← U / (max(‖U‖ / (‖U‖_before + 1e-8), γ) / γ)

    The first step passes as it is. An update smaller than a thousandth of the one before, an
    expert without tokens, say, is let through but not remembered: the published rule would
    hold the matrix at that size for ever. State: one number a matrix.

    Args:
      limit: the largest ratio of two successive norms, γ.
      matrices: which leaves are matrices, and of which axes; see `memopt.matrices`.
      as_released: remember every norm, as the authors' code does; for replaying its runs.

    References:
      Zhu et al., APOLLO, 2024, https://arxiv.org/abs/2412.05270, section 4.2; Chen et al., Fira,
      2024, https://arxiv.org/abs/2410.01623.

    Example:
      >>> tx = limit_norm_growth(2.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in [1.0, 5.0, 0.0, 5.0]:
      ...     u, state = tx.update(jnp.array([g]), state)
      ...     print(round(float(u[0]), 4))
      1.0
      2.0
      0.0
      4.0
    """
    limiter = GrowthLimiter(limit, as_released)

    def norm(layout: Layout, u: Array) -> Array:
        return jnp.sqrt(total(jnp.square(u.astype(statistics_dtype(u))), layout.core))

    def init(params: Any) -> LimitNormGrowthState:
        start = lambda layout, p: zeros_of(lambda p: norm(layout, p), p)
        return LimitNormGrowthState(
            map_matrices(start, params, matrices=matrices, default=every_matrix)
        )

    def update(updates: Any, state: LimitNormGrowthState, params: Any = None, **_: Any) -> Any:
        def step(layout: Layout, u: Array, previous: Array) -> tuple[Array, Array]:
            factor, remembered = limiter(norm(layout, u), previous)
            return (u * jnp.expand_dims(factor, layout.core)).astype(u.dtype), remembered

        updates, norms = map_matrices(
            step, updates, state.norm, matrices=matrices, default=every_matrix, outputs=2
        )
        return updates, LimitNormGrowthState(norms)

    return optax.GradientTransformationExtraArgs(init, update)
