"""A few steps in somebody else's trainer, on eight devices, saved and read back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from orbax.checkpoint import v1 as ocp

VOCABULARY, WIDTH, HEADS, HIDDEN, LENGTH = 64, 16, 4, 32, 8
RATE = 3e-3
SLOWER = {"lion": 1e-3, "lomo": 1.0}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (8, LENGTH))

Step = Callable[[Any], tuple[Any, jax.Array]]


def rate(method: str) -> float:
    """A learning rate with which three steps lower the loss."""
    return SLOWER.get(method, RATE)


def make_mesh() -> jax.sharding.Mesh:
    """Eight devices, with the axes that the models' boxes name."""
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


def shard(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Arrays of two or more axes split along the first that divides; the rest on each device."""

    def place(x: jax.Array) -> jax.Array:
        axis = next((i for i, n in enumerate(x.shape) if x.ndim > 1 and n % 4 == 0), None)
        spec = jax.P() if axis is None else jax.P(*(None,) * axis, "fsdp")
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def next_token_loss(logits: jax.Array) -> jax.Array:
    """Cross-entropy of each row's next token."""
    logs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logs, TOKENS[:, 1:, None], -1).mean()


def check(state: Any, step: Step, path: Path, steps: int = 3) -> None:
    """Trains: the loss falls, all stays finite, some is split, a checkpoint is the same."""
    arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    assert any(not x.sharding.is_fully_replicated for x in arrays)
    places = jax.tree.map(lambda x: x.sharding, state)
    step, losses = jax.jit(step, out_shardings=(places, None)), []
    for _ in range(steps):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    chex.assert_tree_all_finite(state)
    restored = saved_and_read(state, path)
    chex.assert_trees_all_equal(step(restored)[1], step(state)[1])


def saved_and_read(state: Any, path: Path) -> Any:
    """Saves a state with Orbax, reads it back and checks that it is the same."""
    ocp.save(path / "state", state)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    restored = ocp.load(path / "state", jax.tree.map(shape, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    chex.assert_trees_all_equal(restored, state)
    return restored
