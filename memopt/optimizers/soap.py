"""SOAP."""

import functools
from collections.abc import Sequence
from typing import Unpack

import optax

from memopt.errors import check_unused
from memopt.optimizers.by_partition import Common, finish
from memopt.optimizers.registry import method
from memopt.transforms import projectors
from memopt.transforms.adam import scale_by_released_adam
from memopt.transforms.decay import from_second_step, updated_weights
from memopt.transforms.eigenbasis import in_eigenbasis
from memopt.transforms.projectors.replay import Replay


@method("fewest steps, if memory allows two squares a matrix", learning_rate=5e-3)
def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    factor_decay: float | None = None,
    eps: float = 1e-8,
    refresh_every: int = 10,
    refresh_phase: int | Sequence[int] = 0,
    max_side: int = 10000,
    block_size: int | None = None,
    one_sided: bool = False,
    inner: optax.GradientTransformation | None = None,
    projector: projectors.Projector | None = None,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """SOAP: Adam in Shampoo's eigenbases; the fewest steps, if memory allows m² + n² per matrix.

    For an m×n matrix with gradient G::

        N = Adam(Q_Lᵀ G Q_R)
        W ← W − lr · (Q_L N Q_Rᵀ + weight_decay · W)
        L ← β₂ L + (1 − β₂) G Gᵀ,  R ← β₂ R + (1 − β₂) GᵀG
        Q_L ← qr(L Q_L),  Q_R ← qr(R Q_R)          every `refresh_every` steps

    At a refresh the columns of Q_L and Q_R are sorted by their eigenvalues first, Adam's first
    moment is rotated to the new bases, and its second moment permuted as the columns are. The first
    step only chooses the bases, the eigenvectors of L and R: N is zero, and Adam counts from the
    second step.

    State: 2mn + 2m² + 2n² numbers per matrix; without the square of a side longer than `max_side`,
    and of the longer one with `one_sided`. Blocks of length b make 2bm of 2m², and 2bn of 2n².
    `memopt.quantize_state` stores all of it in 8 bits, factors by `memopt.codecs.Gram`.

    Args:
        learning_rate: a number or a schedule; the authors take 3e-3.
        b1: decay of the first moment.
        b2: decay of the second moment.
        factor_decay: decay of L and R; by default that of the second moment.
        eps: added to the root of the second moment.
        refresh_every: steps between two refreshes of the bases.
        refresh_phase: shifts refreshes, or staggers them over the matrices; see
            `memopt.in_subspace`.
        max_side: sides longer than this have no factor and no basis: only the other one is rotated.
        block_size: sides longer than this are cut into equal blocks, each with a factor and a basis
            of its own: the fewest of at most this length.
        one_sided: rotate only the shorter side of each matrix (of a square one, the rows).
        inner: any Optax transformation, used in the eigenbases instead of Adam.
        projector: recorded first bases, see `memopt.projectors.replay`.
        as_released: follow the authors' code: ε is added before Adam's bias correction, decay
            applies to the weights after the step, and the first step moves no parameter of any
            kind.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `refresh_every`, `max_side` or `block_size` is below one, a side has no
            blocks of about `block_size`, `projector` has no recorded bases, or `b1` or `eps` is
            given with `inner`.

    References:
        Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, 2024,
        https://arxiv.org/abs/2409.11321, Algorithm 3. With `one_sided` it is Eigen-Adam of Gong et
        al., 2025, https://arxiv.org/abs/2502.07752.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((64, 16))}, "norm": {"scale": jnp.ones(16)}}
        >>> memopt.state_bytes(memopt.soap(3e-3), params)["up/kernel"]  # 2·64·16 + 2·(64² + 16²)
        43008
    """
    if projector is not None and not isinstance(projector, Replay):
        raise ValueError(
            "projector must be memopt.projectors.replay(...) with the bases of both sides, since "
            f"soap computes its own, got {type(projector).__name__}."
        )
    rotate = functools.partial(
        in_eigenbasis,
        decay=b2 if factor_decay is None else factor_decay,
        refresh_every=refresh_every,
        refresh_phase=refresh_phase,
        max_side=max_side,
        block_size=block_size,
        one_sided=one_sided,
        start=projector,
    )
    if inner is not None:
        check_unused(soap, "inner runs in Adam's place", b1=b1, eps=eps)
    matrices = common.get("matrices")
    if as_released:
        adam = scale_by_released_adam(b1, b2, eps)
        return finish(
            from_second_step(learning_rate),
            rotate(inner or adam, matrices=matrices),
            others=rotate(adam, matrices=lambda name, parameter: None),
            decayed=updated_weights,
            **common,
        )
    adam = optax.scale_by_adam(b1, b2, eps)
    return finish(learning_rate, rotate(inner or adam, matrices=matrices), others=adam, **common)
