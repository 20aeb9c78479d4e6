"""MKOR and MKOR-H."""

from typing import Unpack

import optax

from memopt.errors import check_unused
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.state.precision import in_float32
from memopt.transforms.kronecker import scale_by_kronecker_inverses
from memopt.transforms.while_loss_falls import while_loss_falls


@method("second-order steps that cost little", learning_rate=2e-1, needs="statistics")
def mkor(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.95,
    refresh_every: int = 10,
    max_entry: float = 2.0,
    blend: float = 0.9,
    clip_value: float = 100.0,
    momentum: float = 0.9,
    inner: optax.GradientTransformation | None = None,
    hybrid: bool = False,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """MKOR: Kronecker factors inverted by rank-one updates; a second-order method for cheap steps.

    Every `refresh_every` steps, with a layer's mean input a and summed output gradient g::

        J ← ζ J + (1 − ζ) I                        for J_A and J_G, if max|J| > ε
        J_A ← (γ J_A⁻¹ + (1−γ) a aᵀ)⁻¹             by the identity of Sherman and Morrison
        J_G ← (γ J_G⁻¹ + (1−γ) g gᵀ)⁻¹

    and at every step, for kernels stored as (inputs, outputs)::

        U = J_A G J_G · ‖G‖ / ‖J_A G J_G‖
        M ← momentum · M + U                       or any `inner` optimizer
        W ← W − lr · (M + weight_decay · W)

    State: m² + n² + mn numbers per matrix; mn of them are the momentum's.

    The update needs what the layers saw, ``update(updates, state, params, statistics=…)``:
    `memopt.observe` collects it together with the gradient. Other leaves than hidden matrices get
    the `inner` optimizer alone; the authors' code appends biases to the matrices.

    The paper's equation for J has a plus before its rank-one term and other weights. It is not the
    identity that it refers to: it amplifies the direction of g, which the inverse damps. The
    authors' code has a third update, without weights. Here it is the identity; ε = 2 is the code's,
    γ = 0.95 and ζ = 0.9 are the numbers there, and the paper gives none.

    `memopt.quantize_state` stores the momentum in fewer bits and J_A and J_G as they are: rounded,
    they do not stay positive definite.

    Args:
        learning_rate: a number or a schedule.
        decay: γ.
        refresh_every: steps between two updates of the factors.
        max_entry: ε.
        blend: ζ.
        clip_value: the largest length of a and g; the largest entry if `as_released`.
        momentum: of the inner optimizer.
        inner: any Optax transformation, in place of the momentum.
        hybrid: MKOR-H: stop preconditioning once the loss has nearly stopped falling, by the rule
            of `memopt.while_loss_falls`, which is memopt's, since none is published. The update
            then needs `value`, the loss, too.
        as_released: J ← J' − (J'v)(J'v)ᵀ / (1 + vᵀJ'v) with J' = γ J + (1−γ) I, as the authors'
            code, which does not use the first statistics. That code bounds every token's entries by
            `clip_value` before it averages them; here the entries of the averages are bounded.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if an option is out of range or has no effect; at an update, if a hidden matrix
            has no statistics, or the loss is missing for `hybrid`.

    References:
        Mozaffari et al., MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using Rank-1
        Updates, 2023, https://arxiv.org/abs/2306.01685.

    Example:
        >>> import jax, memopt, jax.numpy as jnp
        >>> def loss(params, statistics, x):
        ...     y = memopt.observe(statistics["hidden"], x, x @ params["hidden"])
        ...     return jnp.square(y - 1).mean()
        >>> params = {"hidden": jnp.eye(4, 3)}
        >>> tx = memopt.mkor(0.1)
        >>> gradient = jax.grad(loss, argnums=(0, 1))
        >>> g, statistics = gradient(params, memopt.zero_statistics(params), jnp.ones((5, 4)))
        >>> updates, state = tx.update(g, tx.init(params), params, statistics=statistics)
        >>> memopt.state_bytes(tx, params)["hidden"]                # 4² + 3² + 4·3 floats
        148
    """
    if inner is not None:
        check_unused(mkor, "inner runs in the momentum's place", momentum=momentum)
    if as_released:
        why = "the released code never blends"
        check_unused(mkor, why, max_entry=max_entry, blend=blend)
    factors = scale_by_kronecker_inverses(
        decay,
        refresh_every,
        max_entry,
        blend,
        clip_value,
        as_released=as_released,
        matrices=common.get("matrices"),
    )
    inner = optax.trace(momentum) if inner is None else inner
    return finish(
        learning_rate,
        in_float32(optax.chain(while_loss_falls(factors) if hybrid else factors, inner)),
        others=inner,
        **common,
    )
