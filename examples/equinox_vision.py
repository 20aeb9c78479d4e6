"""An Equinox vision transformer that tells drawn shapes apart.

python -m examples.equinox_vision runs/equinox
"""

from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax

from examples.training import run
from memopt.models import StackedModel

SIZE, PATCH, WIDTH, HEADS, LAYERS, ROWS = 16, 4, 64, 4, 2, 32
PATCHES = (SIZE // PATCH) ** 2
SHAPES = ("disc", "square", "cross", "bars")


class Block(eqx.Module):
    """Attention among the patches of an image and an MLP, each after a norm."""

    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array):
        one, two = jax.random.split(key)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=one)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, activation=jax.nn.gelu, key=two)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the patches of one image, (patches, width), to the same shape."""
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


def make_model() -> tuple[StackedModel, dict[str, Any]]:
    """Returns the model as three functions, and its parameters."""
    keys = jax.random.split(jax.random.key(0), 4)
    modules = {
        "patch_embed": eqx.nn.Linear(PATCH * PATCH, WIDTH, key=keys[0]),
        "pos_embed": 0.02 * jax.random.normal(keys[1], (PATCHES, WIDTH)),
        "blocks": eqx.filter_vmap(Block)(jax.random.split(keys[2], LAYERS)),
        "norm": eqx.nn.LayerNorm(WIDTH),
        "head": eqx.nn.Linear(WIDTH, len(SHAPES), key=keys[3]),
    }
    # Arrays on one side; on the other what a module is besides, to be combined with them.
    params, static = eqx.partition(modules, eqx.is_array)

    def embed(rest: Any, batch: Any) -> jax.Array:
        cut = batch["images"].reshape(-1, SIZE // PATCH, PATCH, SIZE // PATCH, PATCH)
        patches = cut.swapaxes(2, 3).reshape(-1, PATCHES, PATCH * PATCH)
        module = eqx.combine(rest["patch_embed"], static["patch_embed"])
        return jax.vmap(jax.vmap(module))(patches) + rest["pos_embed"]

    def block(layer: Any, x: jax.Array, batch: Any) -> jax.Array:
        return jax.vmap(eqx.combine(layer, static["blocks"]))(x)

    def head(rest: Any, x: jax.Array, batch: Any) -> tuple[jax.Array, int]:
        norm, linear = (eqx.combine(rest[name], static[name]) for name in ("norm", "head"))
        logits = jax.vmap(lambda x: linear(norm(x.mean(0))))(x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["classes"])
        return losses.sum(), len(losses)

    return StackedModel(embed, block, head), params


def make_batch(number: int) -> dict[str, np.ndarray]:
    """Draws shapes at places and in sizes of their own, in noise; the step's number decides."""
    draw = np.random.default_rng(number)
    classes = draw.integers(0, len(SHAPES), ROWS).astype(np.int32)
    centre, radius = draw.integers(5, SIZE - 5, (2, ROWS, 1, 1)), draw.integers(3, 6, (ROWS, 1, 1))
    down, across = np.abs(np.mgrid[:SIZE, :SIZE][:, None] - centre)
    inside = np.maximum(down, across) < radius
    each = (
        down**2 + across**2 < radius**2,
        inside,
        inside & (np.minimum(down, across) < 2),
        inside & (down % 2 == 0),
    )
    images = np.choose(classes[:, None, None], each) + draw.normal(0, 0.3, (ROWS, SIZE, SIZE))
    return {"images": images.astype(np.float32), "classes": classes}


if __name__ == "__main__":
    run(*make_model(), make_batch)
