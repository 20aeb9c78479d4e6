"""Our optimizers in Flax's own `nnx.Optimizer`."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import memopt


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.head = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.norm(nnx.relu(self.up(x))))


@pytest.mark.parametrize("name", ["adafactor", "apollo", "apollo_mini", "lion"])
def test_nnx_optimizer(name):
    model = Network(nnx.Rngs(0))
    rate = 1e-3 if name == "lion" else 1e-2
    optimizer = nnx.Optimizer(model, memopt.optimizer(name, rate), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (64, 8))
    y = jnp.stack([x[:, 0] * x[:, 1], x[:, 2], jnp.abs(x[:, 3]), -x[:, 4]], axis=1)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
