"""Turns of blocks."""

import jax
import jax.numpy as jnp
import optax
import pytest

import memopt

SIZES = {
    "embed/embedding": (8, 4),
    "blocks/up/kernel": (3, 4, 6),
    "norm/scale": (4,),
    "head/kernel": (4, 8),
}


def turns(steps, **options):
    """For each step, the parameters that move; of the stack the number of the layer."""
    params = {name: jnp.ones(shape) for name, shape in SIZES.items()}
    tx = memopt.cycle_blocks(optax.identity(), switch_every=1, **options)
    state, update = tx.init(params), jax.jit(tx.update)
    found = []
    for _ in range(steps):
        updates, state = update(params, state, params)
        moved = {name for name, u in updates.items() if u.any()}
        layers = jnp.flatnonzero(updates["blocks/up/kernel"].any((1, 2))).tolist()
        found.append((moved - {"blocks/up/kernel"}) | set(layers))
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [{2}, {1}, {0}, {2}]),
        ({"embedding": True}, [{2}, {1}, {0}, {"embed/embedding"}, {2}]),
        ({"head": True}, [{"norm/scale", "head/kernel"}, {2}, {1}, {0}]),
        (
            {"embedding": True, "head": True, "order": "ascending"},
            [
                {"embed/embedding"},
                {0},
                {1},
                {2},
                {"norm/scale", "head/kernel"},
                {"embed/embedding"},
            ],
        ),
    ],
    ids=["layers", "embedding", "head", "ascending"],
)
def test_embedding_and_head_have_turns_on_request(options, expected):
    assert turns(len(expected), **options) == expected


def test_the_state_of_what_has_no_turns_is_stored_in_8_bits_too():
    params = {"embed": jnp.ones((64, 128)), "blocks": {"up": jnp.ones((2, 64, 128))}}
    tx = memopt.badam(1e-3, rest=optax.adam(1e-3), state="int8")
    states = memopt.state_bytes(tx, params).states
    assert states["embed"] == states["blocks/up"] == 2 * 64 * 128 + 2 * 64 * 8
