"""TAG."""

from typing import Unpack

import optax
from jax import Array

from memopt.errors import check_unused
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.transforms.task_moments import scale_by_task_moments


@method("tasks learnt one after another", learning_rate=5e-4)
def tag(
    learning_rate: optax.ScalarOrSchedule,
    *,
    tasks: int = 1,
    similarity: float = 5.0,
    adam: bool = False,
    factored: bool = False,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    seed: int | Array = 0,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """TAG: RMSprop for tasks learnt one after another, to forget less of the earlier ones.

    Each task τ has moments of its own, which mix by the similarity of the tasks' gradients. On
    task t, given as ``update(updates, state, params, task=t)``::

        M_t ← β₁ M_t + (1 − β₁) G
        V_t ← β₂ V_t + (1 − β₂) G²
        V = exp(−b) V_t + Σ_τ exp(−b · cos(M_t, M_τ)) V_τ     V_t alone on the first task
        W ← W − lr · (G / (√V + ε) + weight_decay · W)

    All parameters are treated alike, with a cosine for each matrix or vector. With one task it is
    RMSprop. State: 2mn numbers per matrix and task; 2(m + n) if factored, see
    `memopt.scale_by_task_moments`.

    Args:
        learning_rate: a number or a schedule.
        tasks: the number of tasks, T. With one, `task` may be left out.
        similarity: b; the larger, the smaller are the steps that go against an earlier task.
        adam: take the bias-corrected first moment in place of G, and correct V; the authors' b2 is
            then 0.999.
        factored: keep row and column sums of the moments of matrices; not with `adam`.
        b1: decay of the first moments.
        b2: decay of the second moments.
        eps: added to the root of V.
        seed: the seed of the random signs in the factored first moments.
        as_released: has no effect, since the authors' code follows this rule; it divides by zero
            where an earlier task had no gradient, and does not return to one. Every method has this
            switch.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `tasks` is below 1, `adam` is `factored`, or `seed` is given with nothing to
            draw; at an update, if the task is missing or is not one of them.

    References:
        Malviya et al., TAG: Task-based Accumulated Gradients for Lifelong learning, 2021,
        https://arxiv.org/abs/2105.05155.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}}
        >>> tx = memopt.tag(1e-2, tasks=3)
        >>> updates, state = tx.update(params, tx.init(params), params, task=0)
        >>> memopt.state_bytes(tx, params)["up/kernel"]            # 3·2·64·16 floats
        24576
        >>> tx = memopt.tag(1e-2, tasks=3, factored=True)
        >>> memopt.state_bytes(tx, params)["up/kernel"]            # 3·2·(64 + 16) floats
        1920
    """
    if not factored:
        check_unused(tag, "nothing is drawn unless factored", seed=seed)
    moments = scale_by_task_moments(
        tasks,
        similarity,
        b1,
        b2,
        eps,
        adam=adam,
        factored=factored,
        seed=seed,
        matrices=common.get("matrices"),
    )
    return finish(learning_rate, moments, is_flat=True, **common)
