"""OASIS."""

from typing import Any, Unpack

import optax
from jax import Array

from memopt.errors import check_unused
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.state.precision import in_float32
from memopt.transforms.hutchinson import scale_by_hutchinson
from memopt.transforms.oasis import scale_by_oasis


@method("steps from the curvature, at four gradients a step", learning_rate=1.0, needs="obj_fn")
def oasis(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    min_curvature: float = 1e-3,
    adaptive: bool = True,
    first_step: float = 1e-3,
    first_probes: int = 100,
    refresh_every: int = 1,
    seed: int | Array = 0,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """OASIS: steps from the Hessian's diagonal, for untuned learning rates; costs four gradients.

    With z random signs, H the Hessian and F the loss of this step's batch at both points, and norms
    over all parameters::

        D ← β₂ D + (1 − β₂) z ∘ H z                   the mean of many at the first step
        D̂ = max(|D|, min_curvature)
        η ← min(√(1 + θ) η, ½ ‖Wₖ − Wₖ₋₁‖_D̂ / ‖∇F(Wₖ) − ∇F(Wₖ₋₁)‖_(D̂⁻¹))     η₀ = first_step
        θ ← η / η_before                                                     θ₀ = ∞
        W ← W − lr · (η ∇F(Wₖ) / D̂ + weight_decay · W)

    A step costs two gradients and a product with the Hessian, as much as about two more; the first
    costs `first_probes` products. The update needs the loss as a function of the parameters,
    `obj_fn`, as memopt's training step passes it. All parameters are treated alike, including
    embeddings and norms. State: 2mn numbers per matrix.

    Args:
        learning_rate: a number or a schedule, multiplied by η; the paper's is 1.0. If `adaptive` is
            off, the step size itself.
        b1: decay of the first moment, if `adaptive` is off.
        b2: decay of the estimate of the Hessian.
        min_curvature: the smallest denominator, α.
        adaptive: adapt the step size η as above; otherwise η = 1, and ∇F is replaced by its moving
            average with bias correction, so that a step costs one gradient and one product. Better
            for noisy batches: it trains a small LLaMA to a lower loss than tuned SGD, with η to a
            higher one (docs/convergence.md).
        first_step: η₀; small, since the next step is free to grow.
        first_probes: random vectors of the first step; all others have one.
        refresh_every: steps between two estimates of the Hessian.
        seed: the seed of the random vectors.
        as_released: has no effect, since no code of the authors was found; every method has this
            switch.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `first_probes` or `refresh_every` is below one, or `b1` or `first_step` given
            where it has no effect; by the update, if `obj_fn` is missing.

    References:
        Jahani et al., Doubly Adaptive Scaled Algorithm for Machine Learning Using Second-Order
        Information, 2021, https://arxiv.org/abs/2109.05198, Algorithm 1.

    Example:
        >>> import memopt, jax, jax.numpy as jnp
        >>> loss = lambda w: 0.5 * (jnp.array([4.0, 0.25]) * w**2).sum()
        >>> tx, w = memopt.oasis(1.0), jnp.ones(2)
        >>> state = tx.init(w)
        >>> update = jax.jit(lambda state, w: tx.update(jax.grad(loss)(w), state, w, obj_fn=loss))
        >>> for _ in range(20):
        ...     updates, state = update(state, w)
        ...     w += updates
        >>> bool(loss(w) < 1e-9)
        True
    """
    curvature: dict[str, Any] = {
        "min_curvature": min_curvature,
        "first_probes": first_probes,
        "refresh_every": refresh_every,
        "seed": seed,
    }
    if adaptive:
        check_unused(oasis, "an adaptive step has no first moment", b1=b1)
        step = scale_by_oasis(b2, first_step=first_step, **curvature)
        return finish(learning_rate, step, **common)
    check_unused(oasis, "the step size is not adapted", first_step=first_step)
    return finish(
        learning_rate,
        in_float32(optax.ema(b1)),
        scale_by_hutchinson(b2, **curvature),
        **common,
    )
