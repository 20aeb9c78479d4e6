"""Tunix's trainer on its own Llama, where it is installed (extra `tunix`)."""

import contextlib
import shutil

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import CheckpointManagerOptions

from tests.clients.optimizers import METHODS
from tests.clients.page import run
from tests.clients.trainers import SOME, assert_on_the_page, assert_same
from tests.clients.training import HEADS, HIDDEN, TOKENS, VOCABULARY, WIDTH, make_mesh, rate
from tests.clients.trees import assert_like

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # its own warnings
llama = pytest.importorskip("tunix.models.llama3.model")
peft_trainer = pytest.importorskip("tunix.sft.peft_trainer")

STEPS = 3


def make_model():
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


def given(directory, method, mesh=None):
    """The names that the page's code uses without defining them: a model, its data and inputs."""
    batch = peft_trainer.TrainingInput(input_tokens=TOKENS, input_mask=np.ones_like(TOKENS))
    return run({}, "Tunix", "optimizer") | {
        "model": make_model(),
        "tx": METHODS[method](rate(method)),
        "batches": [batch] * STEPS,
        "inputs": arguments,
        "steps": STEPS,
        "directory": directory,
        "checkpoints": CheckpointManagerOptions(save_interval_steps=2),
        "mesh": contextlib.nullcontext() if mesh is None else mesh,
    }


def arrays(names):
    """All arrays of a model and of its optimizer."""
    trainer = names["trainer"]
    return nnx.to_pure_dict(nnx.state(trainer.model)), nnx.to_pure_dict(
        nnx.state(trainer.optimizer)
    )


@pytest.mark.parametrize("method", METHODS)
def test_trains(method):
    names = run(given(None, method, make_mesh()), "Tunix", "mesh")
    before = jax.device_get(nnx.to_pure_dict(nnx.state(names["model"], nnx.Param)))
    params, state = arrays(run(names, "Tunix", "train"))
    change = jax.tree.map(lambda a, b: (a != b).any(), before, jax.device_get(params))
    assert all(jax.tree.leaves(change))
    chex.assert_tree_all_finite((params, state))


def shifted(model, of):
    """The same model with other weights, which a checkpoint must replace."""
    nnx.update(model, jax.tree.map(lambda x: x + 1, nnx.state(model, of)))
    return model


@pytest.mark.parametrize(
    ("method", "blocks"),
    [(method, "mesh") for method in SOME] + [("apollo_mini", "LoRA"), ("galore", "LoRA mesh")],
)
def test_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(method, blocks, tmp_path):
    """The first run saves after two steps and after all three; the second goes on from two."""
    is_lora, is_split = "LoRA" in blocks, "mesh" in blocks
    both = []
    for is_second in (False, True):
        names = given(tmp_path, method, make_mesh() if is_split else None)
        run(names, "Tunix", *["LoRA"] * is_lora)
        if is_second:
            names["model"] = shifted(names["model"], nnx.LoRAParam if is_lora else nnx.Param)
        run(names, "Tunix", *["mesh"] * is_split, "train")
        shutil.rmtree(tmp_path / str(STEPS))
        both.append(arrays(names))
    chex.assert_tree_all_finite(both)
    if method == "muon":
        # Tunix's jitted step returns weights with other shardings than it gets, and a restart has
        # the first ones again: another program, whose sums are rounded differently.
        chex.assert_trees_all_close(*jax.device_get(both), rtol=1e-4, atol=1e-6)
    else:
        assert_same(*both)
    split = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(both[0][1])]
    assert any(split) == is_split


def test_the_page_has_its_names():
    names = given(None, "apollo_mini")
    assert_on_the_page("Tunix", names["tx"], nnx.state(names["model"], nnx.Param))


def test_tree_by_hand_is_tunixs():
    with nnx.use_eager_sharding(False):
        assert_like("tunix_llama", nnx.state(make_model(), nnx.Param))
