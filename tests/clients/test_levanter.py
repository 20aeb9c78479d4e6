"""Levanter's Llama and its optimizers' configuration, where it is installed (extra `levanter`)."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from memopt.trees import named_leaves
from tests.clients.optimizers import METHODS
from tests.clients.training import (
    HEADS,
    HIDDEN,
    TOKENS,
    VOCABULARY,
    WIDTH,
    make_mesh,
    next_token_loss,
    rate,
    saved_and_read,
)
from tests.clients.trees import assert_like

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # its own warnings


@pytest.fixture(scope="module")
def llama():
    return pytest.importorskip("levanter.models.llama")


def make_model(llama):
    import haliax as hax

    config = llama.LlamaConfig(
        max_seq_len=TOKENS.shape[1],
        hidden_dim=WIDTH,
        intermediate_dim=HIDDEN,
        num_layers=4,
        num_heads=HEADS,
        num_kv_heads=2,
    )
    vocabulary = hax.Axis("vocab", VOCABULARY)
    return llama.LlamaLMHeadModel.init(vocabulary, config, key=jax.random.key(0))


@pytest.mark.parametrize("method", METHODS)
def test_trains(llama, method, tmp_path):
    """State is made and kept where Levanter's axis names put it; the loss falls."""
    import equinox as eqx
    import haliax as hax
    from levanter.optim.config import OptimizerConfig

    @dataclasses.dataclass(frozen=True)
    class Memopt(OptimizerConfig):
        method: str = "adafactor"

        def build(self, num_train_steps):
            return METHODS[self.method](self.learning_rate)

    tx = Memopt(method=method, learning_rate=rate(method)).build(100)
    mapping = {"embed": "fsdp", "mlp": "tp", "vocab": "tp"}
    tokens = hax.named(jnp.asarray(TOKENS), ("batch", "position"))
    with jax.set_mesh(make_mesh()), hax.axis_mapping(mapping):
        params, static = eqx.partition(make_model(llama), eqx.is_inexact_array)
        params = hax.shard(params)
        state = hax.named_jit(tx.init, out_axis_resources=mapping)(params)

        @hax.named_jit(axis_resources=mapping)
        def step(params, state):
            def loss(params):
                logits = eqx.combine(params, static)(tokens)
                logits = logits.rearrange(("batch", "position", "vocab")).array
                return next_token_loss(logits)

            value, gradients = eqx.filter_value_and_grad(loss)(params)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

        losses = []
        for _ in range(3):
            params, state, loss = step(params, state)
            losses.append(float(loss))
    assert losses[-1] < losses[0]
    chex.assert_tree_all_finite((params, state))
    for name, x in named_leaves(state)[0]:
        if isinstance(x, hax.NamedArray):
            assert x.array.ndim == len(x.axis_names), name
    saved_and_read((params, state), tmp_path)


def test_tree_by_hand_is_levanters(llama):
    import equinox as eqx

    assert_like("levanter_llama", eqx.filter(make_model(llama), eqx.is_inexact_array))
