"""BAdam."""

from typing import Unpack

import optax
from jax import Array

from memopt.optimizers.by_partition import Common, finish, inner_or_adam
from memopt.optimizers.registry import method
from memopt.state.quantized_state import store_state
from memopt.transforms.block_cycle import cycle_blocks


@method("fine-tuning with the state of one layer", learning_rate=1e-3)
def badam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    switch_every: int = 50,
    order: str = "descending",
    embedding: bool = False,
    head: bool = False,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    inner: optax.GradientTransformation | None = None,
    seed: int | Array = 0,
    as_released: bool = False,
    **common: Unpack[Common],
) -> optax.GradientTransformationExtraArgs:
    """BAdam: Adam for one layer at a time; the state is that of one layer.

    For the gradients G and the parameters W of the layer whose turn it is, and M = V = 0 at the
    first of its `switch_every` steps::

        U, M, V = Adam(G, M, V)                    with a bias correction that restarts
        W ← W − lr · (U + weight_decay · W)

    All other parameters stay as they are and do not decay; parameters that `rest` updates have no
    turns. Layers are recognised as by `memopt.cycle_blocks`; a model without layers is one block.

    It is a method for fine-tuning. From random weights its loss is far above Adam's in published
    runs: 7.9 against 3.4 with 60M parameters (https://arxiv.org/abs/2502.01586).

    State: 2mn/L numbers per matrix of L layers, whether they are stacked or not, and none for the
    embedding and for what is in no layer, such as the output head, unless they have turns.

    Args:
        learning_rate: a number or a schedule.
        switch_every: K, the steps of one turn.
        order: "descending" from the last layer, "ascending", or "random", in which each cycle has a
            new order.
        embedding: whether the embedding has a turn, as the first block.
        head: whether the parameters that are in no layer, such as the output head and the last
            norm, have a turn, as the last block.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        inner: any Optax transformation, used instead of Adam.
        seed: the seed of the random order.
        as_released: has no effect, since the authors' code follows the paper; every method has this
            switch.
        **common: see `memopt.Common`.

    Raises:
        ValueError: if `switch_every` is below one, `order` is unknown, or `b1`, `b2` or `eps` is
            given with `inner`.

    References:
        Luo et al., BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language
        Models, 2024, https://arxiv.org/abs/2404.02827, Algorithm 1. For parameters in bfloat16 the
        authors' code also keeps a float32 copy of the block; see `memopt.quantize_params`.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> params = {"embed": jnp.ones((64, 16)), "blocks": {"up": jnp.ones((8, 16, 32))}}
        >>> memopt.state_bytes(memopt.badam(1e-3), params).states        # 2·16·32 floats
        {'blocks/up': 4096, 'embed': 0}
    """
    decay = common.pop("weight_decay", 0.0), common.pop("weight_decay_mask", None)
    state, rest = common.pop("state", None), common.get("rest")
    if rest is not None:
        common["rest"] = store_state(rest, state)
    adam = inner_or_adam(inner, badam, b1=b1, b2=b2, eps=eps)
    decayed = optax.chain(adam, optax.add_decayed_weights(*decay))
    block = cycle_blocks(
        store_state(decayed, state),
        switch_every,
        order,
        embedding=embedding,
        head=head,
        seed=seed,
        matrices=common.get("matrices"),
    )
    return finish(learning_rate, block, **common)
