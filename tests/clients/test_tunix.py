"""Tunix's trainer on its own Llama, where it is installed (extra `tunix`)."""

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from tests.clients.optimizers import METHODS
from tests.clients.training import (
    HEADS,
    HIDDEN,
    TOKENS,
    VOCABULARY,
    WIDTH,
    make_mesh,
    rate,
    saved_and_read,
)
from tests.clients.trees import assert_like

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # its own warnings
STEPS = 3


@pytest.fixture(scope="module")
def llama():
    return pytest.importorskip("tunix.models.llama3.model")


@pytest.fixture(scope="module")
def trainer():
    return pytest.importorskip("tunix.sft.peft_trainer")


def make_model(llama):
    config = llama.ModelConfig(
        num_layers=2,
        vocab_size=VOCABULARY,
        embed_dim=WIDTH,
        hidden_dim=HIDDEN,
        num_heads=HEADS,
        head_dim=WIDTH // HEADS,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    # The MLPs' zeros, which weights from a file replace, would have gradients of zeros.
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape)
    nnx.update(model, jax.tree.map(noise, nnx.state(model, nnx.Param)))
    return model


def arguments(example):
    rows, length = example.input_tokens.shape
    return {
        "input_tokens": example.input_tokens,
        "input_mask": example.input_mask,
        "positions": np.tile(np.arange(length), (rows, 1)),
        "attention_mask": np.tile(np.tri(length, dtype=bool), (rows, 1, 1)),
    }


@pytest.mark.parametrize("method", METHODS)
def test_trains(llama, trainer, method, tmp_path):
    model = make_model(llama)
    config = trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=STEPS)
    batch = trainer.TrainingInput(input_tokens=TOKENS, input_mask=np.ones_like(TOKENS))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with make_mesh():
        training = trainer.PeftTrainer(model, METHODS[method](rate(method)), config)
        training.with_gen_model_input_fn(arguments).train([batch] * STEPS)
    params, state = nnx.state(model, nnx.Param), nnx.state(training.optimizer)
    change = jax.tree.map(lambda a, b: (a != b).any(), before, nnx.to_pure_dict(params))
    assert all(jax.tree.leaves(change))
    chex.assert_tree_all_finite((params, state))
    # Tunix's own way to resume stops on a mesh with optax.adamw, too: counts are on one device.
    saved_and_read((params, state), tmp_path)


def test_tree_by_hand_is_tunixs(llama):
    with nnx.use_eager_sharding(False):
        assert_like("tunix_llama", nnx.state(make_model(llama), nnx.Param))
