"""Adam without bias correction, the correction as a schedule, AMSGrad, and Adam-atan2."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.checked import checked
from memopt.errors import check_at_least
from memopt.state.precision import (
    average,
    bias_correction,
    bounded,
    check_real,
    float32_zeros,
)


class ScaleByUncorrectedAdamState(NamedTuple):
    """State of `scale_by_uncorrected_adam`.

    Attributes:
        mu: first moment, float32 or wider, shaped like the parameters.
        nu: second moment, likewise.
    """

    mu: Any
    nu: Any


@checked
def scale_by_uncorrected_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6
) -> optax.GradientTransformationExtraArgs:
    """Adam's M / (√V + ε), without bias correction.

    GaLore and its descendants use this Adam: ε is added to the root of the uncorrected second
    moment, and the bias correction multiplies the learning rate (`adam_bias_correction`). At
    ε = 1e-6 this differs from Optax's Adam: in early steps, its ε is in effect up to
    1/√(1−β₂) ≈ 32 times larger.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.

    Returns:
        A transformation whose state is a `ScaleByUncorrectedAdamState`.

    References:
        Zhu et al., APOLLO, 2024, https://arxiv.org/abs/2412.05270, Algorithm 1.

    Example:
        >>> tx = scale_by_uncorrected_adam(0.9, 0.99, eps=0.0)
        >>> u, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
        >>> round(float(u[0]), 3)                                  # 0.1·2 / √(0.01·4)
        1.0
    """

    def init(params: Any) -> ScaleByUncorrectedAdamState:
        check_real(params)
        return ScaleByUncorrectedAdamState(float32_zeros(params), float32_zeros(params))

    def update(
        updates: Any, state: ScaleByUncorrectedAdamState, params: Any = None, **_: Any
    ) -> Any:
        mu = jax.tree.map(lambda g, m: average(b1, m, bounded(g)), updates, state.mu)
        nu = jax.tree.map(lambda g, v: average(b2, v, jnp.square(bounded(g))), updates, state.nu)
        ratio = lambda g, m, v: (m / (jnp.sqrt(v) + eps)).astype(g.dtype)
        return jax.tree.map(ratio, updates, mu, nu), ScaleByUncorrectedAdamState(mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


@checked
def scale_by_released_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6
) -> optax.GradientTransformationExtraArgs:
    """Adam as in the released code of GaLore and its descendants: ε before the bias correction.

    Chains `scale_by_uncorrected_adam` and `adam_bias_correction`.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the uncorrected second moment.

    Example:
        >>> tx = scale_by_released_adam(eps=0.0)
        >>> u, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
        >>> round(float(u[0]), 3)
        1.0
    """
    return optax.chain(
        scale_by_uncorrected_adam(b1, b2, eps),
        optax.scale_by_schedule(adam_bias_correction(b1, b2)),
    )


@checked
def adam_bias_correction(b1: float = 0.9, b2: float = 0.999) -> Callable[[Array], Array]:
    """Returns the schedule √(1 − β₂ᵗ) / (1 − β₁ᵗ), t = count + 1, that corrects Adam's bias.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.

    Example:
        >>> tx = optax.chain(
        ...     scale_by_uncorrected_adam(), optax.scale_by_schedule(adam_bias_correction())
        ... )
    """

    def correction(count: Array) -> Array:
        t = jnp.asarray(count, float) + 1
        return jnp.sqrt(1 - b2**t) / (1 - b1**t)

    return correction


class ScaleByRawAmsgradState(NamedTuple):
    """State of `scale_by_raw_amsgrad`.

    Attributes:
        count: steps taken, int32.
        mu: first moment, float32 or wider, shaped like the parameters.
        nu: second moment, likewise.
        nu_max: the largest second moment so far, likewise.
    """

    count: Array  # type: ignore[assignment]
    mu: Any
    nu: Any
    nu_max: Any


@checked
def scale_by_raw_amsgrad(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, debias: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Adam's M / (√V_max + ε), with the largest second moment V so far, as AMSGrad has it.

    The maximum is over moments that are not corrected for their bias. `optax.scale_by_amsgrad`
    corrects first by default: after a large first gradient, steps are up to 1/√(1−β₂) ≈ 32 times
    smaller, for good. State: three numbers per parameter.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        debias: divide M by 1 − β₁ᵗ and V_max by 1 − β₂ᵗ, as ``torch.optim.Adam`` does.

    Returns:
        A transformation whose state is a `ScaleByRawAmsgradState`.

    References:
        Reddi et al., On the Convergence of Adam and Beyond, 2018,
        https://openreview.net/forum?id=ryQu7f-RZ, Algorithm 2.

    Example:
        >>> tx = scale_by_raw_amsgrad(0.0, 0.99, eps=0.0)
        >>> state = tx.init(jnp.zeros(1))
        >>> for g in (10.0, 1.0):
        ...     u, state = tx.update(jnp.array([g]), state)
        >>> round(u.item(), 3)                                    # 1 / √max(0.01·10², 0.99 + 0.01)
        1.0
    """

    def init(params: Any) -> ScaleByRawAmsgradState:
        check_real(params)
        mu, nu, nu_max = (float32_zeros(params) for _ in range(3))
        return ScaleByRawAmsgradState(jnp.zeros((), jnp.int32), mu, nu, nu_max)

    def update(updates: Any, state: ScaleByRawAmsgradState, params: Any = None, **_: Any) -> Any:
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: average(b1, m, bounded(g)), updates, state.mu)
        nu = jax.tree.map(lambda g, v: average(b2, v, jnp.square(bounded(g))), updates, state.nu)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu)

        def ratio(g: Array, m: Array, v: Array) -> Array:
            of = lambda b: bias_correction(b, count, v.dtype) if debias else 1
            return (m / of(b1) / (jnp.sqrt(v / of(b2)) + eps)).astype(g.dtype)

        new = ScaleByRawAmsgradState(count, mu, nu, nu_max)
        return jax.tree.map(ratio, updates, mu, nu_max), new

    return optax.GradientTransformationExtraArgs(init, update)


class ScaleByAdamAtan2State(NamedTuple):
    """State of `scale_by_adam_atan2`.

    Attributes:
        count: steps taken, int32.
        mu: first moment, float32 or wider, shaped like the parameters.
        nu: second moment, likewise.
    """

    count: Array  # type: ignore[assignment]
    mu: Any
    nu: Any


@checked
def scale_by_adam_atan2(
    b1: float = 0.9, b2: float = 0.99, *, a: float = 1.27, b: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Adam's update with an arctangent in place of the quotient and its ε.

    ::

        M ← β₁ M + (1 − β₁) G
        V ← β₂ V + (1 − β₂) G²
        U = a · atan2(M / (1 − β₁ᵗ), b · √(V / (1 − β₂ᵗ)))

    U has the sign of M, is at most aπ/2, and zero where M and V are zero. Multiplying all gradients
    by a constant does not change it, as long as their squares are float32 numbers. State: two
    numbers per parameter.

    Args:
        b1: β₁, the decay of the first moment.
        b2: β₂, the decay of the second moment.
        a: multiplies the update; 4/π ≈ 1.27 makes it one where M is the root of V.
        b: multiplies the root of the second moment; the smaller it is, the closer U is to
            aπ/2 · sign(M).

    Returns:
        A transformation whose state is a `ScaleByAdamAtan2State`.

    Raises:
        ValueError: if `b` is negative.

    References:
        Everett et al., Scaling Exponents Across Parameterizations and Optimizers, 2024,
        https://arxiv.org/abs/2407.05872.

    Example:
        >>> tx = scale_by_adam_atan2()
        >>> for scale in (1.0, 1e-12):
        ...     g = scale * jnp.array([1.0, -1.0, 0.0])
        ...     u, _ = tx.update(g, tx.init(g))
        ...     print([round(float(x), 3) for x in u])
        [0.997, -0.997, 0.0]
        [0.997, -0.997, 0.0]
    """
    check_at_least("b", b, 0)

    def init(params: Any) -> ScaleByAdamAtan2State:
        check_real(params)
        moments = float32_zeros(params), float32_zeros(params)
        return ScaleByAdamAtan2State(jnp.zeros((), jnp.int32), *moments)

    def update(updates: Any, state: ScaleByAdamAtan2State, params: Any = None, **_: Any) -> Any:
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: average(b1, m, bounded(g)), updates, state.mu)
        nu = jax.tree.map(lambda g, v: average(b2, v, jnp.square(bounded(g))), updates, state.nu)

        def angle(g: Array, m: Array, v: Array) -> Array:
            mean = m / bias_correction(b1, count, m.dtype)
            root = jnp.sqrt(v / bias_correction(b2, count, v.dtype))
            return (a * jnp.atan2(mean, b * root)).astype(g.dtype)

        return jax.tree.map(angle, updates, mu, nu), ScaleByAdamAtan2State(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
