"""A step size from the change of the gradient along the last step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.axis_types import on_auto_axes, varying_as_any
from memopt.checked import checked
from memopt.reductions import total_over_trees
from memopt.state.precision import bounded, to_float32
from memopt.transforms.hutchinson import HutchinsonRule, ScaleByHutchinsonState


class ScaleByOasisState(NamedTuple):
    """State of `scale_by_oasis`.

    Attributes:
        curvature: the estimate of the Hessian's diagonal.
        previous: the parameters of the previous step, in their dtype.
        rate: the step size η of the previous step, float32 or wider.
        ratio: its ratio θ to the one before; infinite before the second step.
    """

    curvature: ScaleByHutchinsonState
    previous: Any
    rate: Array
    ratio: Array


@checked
def scale_by_oasis(
    b2: float = 0.999,
    *,
    min_curvature: float = 1e-3,
    first_step: float = 1e-3,
    first_probes: int = 100,
    refresh_every: int = 1,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the Hessian's diagonal, with a step size that adapts itself.

    With D from `memopt.scale_by_hutchinson`, D̂ = max(|D|, min_curvature), F the loss of this
    step's batch at both points, and norms over all parameters, weighted by D̂ or its inverse::

        η ← min(√(1 + θ) η, ½ ‖Wₖ − Wₖ₋₁‖_D̂ / ‖∇F(Wₖ) − ∇F(Wₖ₋₁)‖_(D̂⁻¹))     η₀ = first_step
        θ ← η / η_before                                                     θ₀ = ∞
        U = η G / D̂

    A step costs two gradients, ∇F(Wₖ) and ∇F(Wₖ₋₁), and one product with the Hessian, which is as
    much as about two more. If parameters or gradients did not change, η and θ stay as they are.
    State: 2mn numbers per matrix, and two.

    Args:
        b2: decay of the estimate of the Hessian.
        min_curvature: the smallest denominator, α.
        first_step: η₀; small, since the next step is free to grow.
        first_probes: random vectors of the first step; all others have one.
        refresh_every: steps between two estimates of the Hessian.
        seed: the seed of the random vectors.

    Returns:
        A transformation whose state is a `ScaleByOasisState`. It raises a `ValueError` if `obj_fn`,
        the loss as a function of the parameters, is missing.

    References:
        Jahani et al., Doubly Adaptive Scaled Algorithm for Machine Learning Using Second-Order
        Information, 2021, https://arxiv.org/abs/2109.05198, Algorithm 1.

    Example:
        >>> loss = lambda w: 0.5 * (jnp.array([4.0, 0.25]) * w**2).sum()
        >>> tx, w = optax.chain(scale_by_oasis(), optax.scale(-1.0)), jnp.ones(2)
        >>> state = tx.init(w)
        >>> for _ in range(3):
        ...     updates, state = tx.update(jax.grad(loss)(w), state, w, obj_fn=loss)
        ...     w += updates
        ...     print(round(float(w[0]), 4), round(float(state[0].rate), 4))
        0.999 0.001
        0.4995 0.5
        0.2498 0.5
    """
    hessian = HutchinsonRule(b2, min_curvature, first_probes, refresh_every, seed)
    hessian.check()

    def init(params: Any) -> ScaleByOasisState:
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
        number = lambda x: varying_as_any(params, jnp.asarray(x, dtype))
        previous = jax.tree.map(jnp.zeros_like, params)
        return ScaleByOasisState(
            hessian.init(params), previous, number(first_step), number(jnp.inf)
        )

    def scale(updates: Any, state: ScaleByOasisState, params: Any, past: tuple[Any, Any]) -> Any:
        curvatures = jax.tree.map(hessian.curvature, state.curvature.hessian)
        moved = weighted_norm(params, past[0], curvatures)
        turned = weighted_norm(updates, past[1], jax.tree.map(jnp.reciprocal, curvatures))
        known = (moved > 0) & (turned > 0)
        longest = jnp.sqrt(1 + state.ratio) * state.rate
        rate = jnp.minimum(longest, 0.5 * moved / jnp.where(known, turned, 1))
        known &= jnp.isfinite(rate) & (rate > 0)
        rate = jnp.where(known, rate, state.rate)
        ratio = jnp.where(known, rate / state.rate, state.ratio)
        step = lambda g, d: (rate * bounded(g) / d).astype(g.dtype)
        scalars = (x.astype(state.rate.dtype) for x in (rate, ratio))
        return jax.tree.map(step, updates, curvatures), *scalars

    def update(
        updates: Any,
        state: ScaleByOasisState,
        params: Any = None,
        *,
        obj_fn: Any = None,
        **_: Any,
    ) -> Any:
        curvature = hessian.average(state.curvature, params, obj_fn)
        is_first = state.curvature.count == 0
        previous = jax.tree.map(lambda p, q: jnp.where(is_first, p, q), params, state.previous)
        past = previous, jax.grad(obj_fn)(previous)
        state = state._replace(curvature=curvature)
        updates, rate, ratio = on_auto_axes(
            scale, (updates, state, params, past), like=(updates, state.rate, state.ratio)
        )
        return updates, ScaleByOasisState(curvature, params, rate, ratio)

    return optax.GradientTransformationExtraArgs(init, update)


def weighted_norm(new: Any, old: Any, weights: Any) -> Array:
    """The root of the sum of weight · (new − old)² over all entries of the trees."""
    change = lambda a, b: bounded(to_float32(a) - to_float32(b))
    square = lambda a, b, w: w * jnp.square(change(a, b))
    return jnp.sqrt(total_over_trees(square, new, old, weights))
