"""Scaling by the diagonal of the Hessian, estimated with random signs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.axis_types import on_auto_axes, varying_as
from memopt.checked import checked
from memopt.errors import check_above_zero, check_at_least, check_given
from memopt.matrices import Layout, every_matrix, map_matrices
from memopt.state.precision import average, bounded, check_real, float32_zeros, to_float32
from memopt.transforms.projectors import MatrixSpec

Objective = Callable[[Any], Array]
"""A loss as a function of the parameters, as `memopt`'s training step passes it: `obj_fn`."""


class ScaleByHutchinsonState(NamedTuple):
    """State of `scale_by_hutchinson`.

    Attributes:
        count: steps taken, int32.
        hessian: the average of the estimates, float32 or wider, shaped like the parameters.
    """

    count: Array  # type: ignore[assignment]
    hessian: Any


class HutchinsonRule(NamedTuple):
    """The estimate of `scale_by_hutchinson`, for transformations that need more than its update.

    Its attributes are the arguments of `scale_by_hutchinson`.
    """

    b2: float | Array = 0.999
    min_curvature: float | Array = 1e-3
    first_probes: int = 100
    refresh_every: int = 1
    seed: int | Array = 0

    def check(self) -> None:
        """Raises `ValueError` for an option out of range."""
        check_above_zero("min_curvature", self.min_curvature)
        check_at_least("first_probes", self.first_probes, 1)
        check_at_least("refresh_every", self.refresh_every, 1)

    def init(self, params: Any) -> ScaleByHutchinsonState:
        """The state before the first step: zeros."""
        check_real(params)
        return ScaleByHutchinsonState(jnp.zeros((), jnp.int32), float32_zeros(params))

    def average(
        self, state: ScaleByHutchinsonState, params: Any, obj_fn: Objective | None
    ) -> ScaleByHutchinsonState:
        """Averages in the estimate of this step.

        Raises:
            ValueError: if `params` or `obj_fn` is None.
        """
        check_given("params", params, "the parameters")
        check_given("obj_fn", obj_fn, "the loss as a function of the parameters")
        loss: Any = obj_fn
        count, first = state.count, state.count == 0
        later = jnp.where(count % self.refresh_every == 0, 1, 0)
        probes = jnp.where(first, self.first_probes, later)

        def add(probe: Array, total: Any) -> Any:
            signs = on_auto_axes(random_signs, (params, self.seed, count, probe), like=params)
            products = jax.jvp(jax.grad(loss), (params,), (signs,))[1]
            one = lambda t, z, hz: t + to_float32(z) * to_float32(hz)
            return jax.tree.map(one, total, signs, products)

        zeros = jax.tree.map(jnp.zeros_like, state.hessian)
        sums = jax.lax.fori_loop(0, probes, add, zeros)
        decay = jnp.where(first, 0.0, jnp.where(probes > 0, self.b2, 1.0))

        def new(old: Array, total: Array) -> Array:
            found = average(decay, old, total / jnp.maximum(probes, 1).astype(total.dtype))
            return jnp.where(jnp.isfinite(found), found, old)

        hessian = jax.tree.map(new, state.hessian, sums)
        return ScaleByHutchinsonState(optax.safe_increment(count), hessian)

    def curvature(self, hessian: Array) -> Array:
        """The denominators of updates, max(|D|, min_curvature)."""
        return jnp.maximum(jnp.abs(hessian), jnp.asarray(self.min_curvature, hessian.dtype))


@checked
def scale_by_hutchinson(
    b2: float = 0.999,
    *,
    min_curvature: float = 1e-3,
    first_probes: int = 100,
    refresh_every: int = 1,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the diagonal of the Hessian, estimated by Hutchinson's method.

    With H the Hessian of the loss and z random signs::

        D ← β₂ D + (1 − β₂) z ∘ H z            D = the mean of z ∘ H z at the first step
        U = G / max(|D|, min_curvature)

    The update needs the loss as a function of the parameters, `obj_fn`, as memopt's training step
    passes it. An estimate costs about two gradients, for Hz is one forward derivative of the
    gradient. The signs are a function of seed, parameter and step, and not stored; they do not
    depend on how arrays are sharded or layers stacked. An entry of H that is not finite is left
    out. State: mn numbers per matrix.

    Args:
        b2: decay of the estimate.
        min_curvature: the smallest denominator, α.
        first_probes: random vectors of the first step; all others have one.
        refresh_every: steps between two estimates.
        seed: the seed of the signs.

    Returns:
        A transformation whose state is a `ScaleByHutchinsonState`. It raises a `ValueError` if
        `obj_fn` is missing.

    References:
        Jahani et al., Doubly Adaptive Scaled Algorithm for Machine Learning Using Second-Order
        Information, 2021, https://arxiv.org/abs/2109.05198, section 3; Hutchinson's estimator:
        Bekas et al., An estimator for the diagonal of a matrix, 2007.

    Example:
        >>> loss = lambda w: 0.5 * (jnp.array([4.0, 0.25]) * w**2).sum()
        >>> tx, w = scale_by_hutchinson(), jnp.ones(2)
        >>> tx.update(jax.grad(loss)(w), tx.init(w), w, obj_fn=loss)[0].tolist()
        [1.0, 1.0]
    """
    rule = HutchinsonRule(b2, min_curvature, first_probes, refresh_every, seed)
    rule.check()

    def update(
        updates: Any,
        state: ScaleByHutchinsonState,
        params: Any = None,
        *,
        obj_fn: Objective | None = None,
        **_: Any,
    ) -> Any:
        state = rule.average(state, params, obj_fn)
        divide = lambda g, d: (bounded(g) / rule.curvature(d)).astype(g.dtype)
        return jax.tree.map(divide, updates, state.hessian), state

    return optax.GradientTransformationExtraArgs(rule.init, update)


def random_signs(params: Any, seed: int | Array, step: Array, probe: Array | int = 0) -> Any:
    """Draws ±1 for every entry of a tree; each matrix of a stack has its own, by its index.

    Args:
        params: arrays, whose shapes and dtypes the signs have.
        seed: the seed of the draws, which also depend on the parameter.
        step: the number of previous steps.
        probe: which of the draws of that step.
    """

    def draw(layout: Layout, p: Array) -> Array:
        spec = MatrixSpec(layout.name, p.shape, p.dtype)
        key = jax.random.fold_in(spec.key(seed, step), probe)
        core = tuple(p.shape[a] for a in layout.core)
        count = math.prod(p.shape[a] for a in layout.stack)
        one = lambda i: jax.random.bits(jax.random.fold_in(key, i), core, jnp.uint32)
        bits = jax.vmap(one)(spec.layer * count + jnp.arange(count, dtype=jnp.int32))
        signs = 1 - 2 * (layout.from_matrices(bits, p) & 1).astype(jnp.int32)
        return varying_as(p, signs.astype(p.dtype))

    return map_matrices(draw, params, default=every_matrix)
