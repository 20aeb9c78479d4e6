"""A Flax NNX transformer with `nnx.MultiHeadAttention`, dropout and an auxiliary loss.

python -m examples.nnx_dropout runs/nnx
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.training import run, text_batch
from memopt.models import StackedModel

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH, ROWS = 256, 64, 4, 2, 32, 8
DROPOUT = 0.1
# Weight of the mean square of hidden activations (activation regularisation, Merity et al. 2017).
ACTIVATIONS = 1e-2


class Block(nnx.Module):
    """Attention and an MLP, each after a norm, with dropout before it is added."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            *(HEADS, WIDTH),
            dropout_rate=DROPOUT,
            use_bias=False,
            decode=False,
            rngs=rngs,
            keep_rngs=False,  # the step gives a key
        )
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(DROPOUT)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> tuple[jax.Array, jax.Array]:
        """Returns the new x, and the mean square of the MLP's activations."""
        given: dict[str, Any] = {"rngs": rngs, "deterministic": rngs is None}
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.dropout(self.attention(self.norm1(x), mask=mask, **given), **given)
        hidden = nnx.gelu(self.up(self.norm2(x)))
        return x + self.dropout(self.down(hidden), **given), jnp.square(hidden).mean()


def make_model() -> tuple[StackedModel, dict[str, Any]]:
    """Returns the model as three functions, and its parameters."""
    rngs = nnx.Rngs(0)
    keys = jax.random.split(rngs.params(), LAYERS)
    modules = {
        "embed": nnx.Embed(VOCABULARY, WIDTH, rngs=rngs),
        "position": nnx.Embed(LENGTH, WIDTH, rngs=rngs),
        "blocks": nnx.vmap(lambda key: Block(nnx.Rngs(key)))(keys),
        "norm": nnx.RMSNorm(WIDTH, rngs=rngs),
        "head": nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs),
    }
    # Each module as a function that makes it of its parameters, and these parameters.
    parts = {name: nnx.split(module, nnx.Param) for name, module in modules.items()}
    module = {name: functools.partial(nnx.merge, graphdef) for name, (graphdef, _) in parts.items()}
    params = {name: nnx.to_pure_dict(state) for name, (_, state) in parts.items()}

    def embed(rest: Any, batch: Any) -> Any:
        position = module["position"](rest["position"])(jnp.arange(batch["inputs"].shape[1]))
        x = module["embed"](rest["embed"])(batch["inputs"]) + position
        return {"x": x, "squares": 0.0, "rng": batch.get("rng")}

    def block(layer: Any, x: Any, batch: Any) -> Any:
        following, rngs = None, None
        if x["rng"] is not None:  # in training
            following, own = jax.random.split(x["rng"])
            rngs = nnx.Rngs(dropout=own)
        new, squares = module["blocks"](layer)(x["x"], rngs)
        return {"x": new, "squares": x["squares"] + squares, "rng": following}

    def head(rest: Any, x: Any, batch: Any) -> tuple[jax.Array, int]:
        logits = module["head"](rest["head"])(module["norm"](rest["norm"])(x["x"]))
        targets = batch["targets"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum()
        if x["rng"] is not None:
            loss += ACTIVATIONS * x["squares"] / LAYERS * targets.size
        return loss, targets.size

    return StackedModel(embed, block, head), params


make_batch = functools.partial(text_batch, rows=ROWS, length=LENGTH)


if __name__ == "__main__":
    run(*make_model(), make_batch)
