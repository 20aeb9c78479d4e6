"""A Flax linen transformer scanned by `nn.scan`, with a mixture of experts in every block.

python -m examples.linen_experts runs/linen
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from examples.training import run, text_batch
from memopt.models import StackedModel

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH, ROWS = 256, 64, 4, 2, 32, 8
EXPERTS, HIDDEN = 4, 128
BALANCE = 1e-2  # weight of the balancing loss, Fedus et al. 2021, §2.2


class Experts(nn.Module):
    """A router, and MLPs of which each token is sent to one (Fedus et al., Switch, 2021)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the experts' outputs, and the loss that is 1 if all are used alike."""
        tokens = x.reshape(-1, WIDTH)
        shares = jax.nn.softmax(nn.Dense(EXPERTS, use_bias=False, name="router")(tokens))
        init = nn.initializers.lecun_normal(batch_axis=0)
        up = self.param("experts_up", init, (EXPERTS, WIDTH, HIDDEN))
        down = self.param("experts_down", init, (EXPERTS, HIDDEN, WIDTH))

        expert = shares.argmax(-1)
        order = jnp.argsort(expert)  # the tokens of one expert stand together
        counts = jnp.bincount(expert, length=EXPERTS)
        hidden = nn.gelu(jax.lax.ragged_dot(tokens[order], up, counts))
        out = jax.lax.ragged_dot(hidden, down, counts)[jnp.argsort(order)]
        balance = EXPERTS * jnp.sum(counts / len(tokens) * shares.mean(0))
        return (out * shares.max(-1, keepdims=True)).reshape(x.shape), balance


class Block(nn.Module):
    """Attention and the experts, each after a norm and added to what came in."""

    @nn.compact
    def __call__(self, carry: Any, _: None = None) -> tuple[Any, None]:
        """Maps the activations and the sum of balancing losses to the next ones."""
        x, balance = carry
        attention = nn.MultiHeadDotProductAttention(HEADS, use_bias=False, name="attention")
        x = x + attention(nn.RMSNorm(name="norm1")(x), mask=nn.make_causal_mask(x[..., 0]))
        y, own = Experts(name="mixture")(nn.RMSNorm(name="norm2")(x))
        return (x + y, balance + own), None


class Model(nn.Module):
    """The whole model; `nn.scan` gives the parameters of its blocks a leading axis of layers."""

    def setup(self) -> None:
        """Names the parts."""
        scan = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        self.embedding, self.position = nn.Embed(VOCABULARY, WIDTH), nn.Embed(LENGTH, WIDTH)
        self.blocks, self.norm = scan(), nn.RMSNorm()
        self.head = nn.Dense(VOCABULARY, use_bias=False)

    def embed(self, tokens: jax.Array) -> Any:
        """Returns what the first block is given."""
        return self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1])), jnp.zeros(())

    def loss(self, carry: Any, targets: jax.Array) -> tuple[jax.Array, int]:
        """Returns the summed loss of what leaves the last block, and the number of tokens."""
        x, balance = carry
        logits = self.head(self.norm(x))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum()
        return loss + BALANCE * balance / LAYERS * targets.size, targets.size

    def __call__(self, batch: Any) -> tuple[jax.Array, int]:
        """Returns the summed loss of a batch and its number of tokens."""
        carry, _ = self.blocks(self.embed(batch["inputs"]), None)
        return self.loss(carry, batch["targets"])


make_batch = functools.partial(text_batch, rows=ROWS, length=LENGTH)


def make_model() -> tuple[StackedModel, dict[str, Any]]:
    """Returns the model as three functions, and its parameters."""
    whole = Model()
    params = jax.jit(whole.init)(jax.random.key(0), make_batch(0))["params"]
    embed = lambda rest, batch: whole.apply({"params": rest}, batch["inputs"], method="embed")
    block = lambda layer, x, batch: Block().apply({"params": layer}, x)[0]
    head = lambda rest, x, batch: whole.apply({"params": rest}, x, batch["targets"], method="loss")
    return StackedModel(embed, block, head), params


if __name__ == "__main__":
    run(*make_model(), make_batch)
